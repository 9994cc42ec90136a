"""Mount points: their checks, the list of mounts, mounting and unmounting.

fusermount3 mounts for root and for ordinary users.  It is the only program that may mount for a
user, and it sets nosuid and nodev unless root asks otherwise.  Without fusermount3 root mounts by
mount(2).  Root unmounts by umount2(2).

A mount with a stopped daemon blocks every caller that looks at its root.  So this module passes no
path to the kernel that is the root of a mount in /proc/self/mountinfo.  Nor does it pass one that
leads through the root of an ivshmemfs mount.  The exception is `answers`, which limits its wait.

Most commands only look at the list, so the modules that mounting needs are imported by its
functions.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ivshmemfs.errors import MountError

if TYPE_CHECKING:
    import socket

FSTYPE = "fuse.ivshmemfs"
AUTOFS = "autofs"
FUSE_DEVICE = "/dev/fuse"
#: Time limit of fusermount3, in seconds; an unmount writes back modified mapped pages.
HELPER_SECONDS = 30.0
#: Time limit for a mount to answer a stat(2), in seconds.
ANSWER_SECONDS = 5.0
#: Maximum number of symbolic links in one path; the kernel's limit.
MAX_LINKS = 40

_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8  # flags of umount2(2)
#: Reasons why mount(2) refuses, by errno.
_REFUSALS = {
    errno.ENODEV: "the kernel does not know FUSE: load its module ('modprobe fuse')",
    errno.EPERM: "the kernel lets this root not mount: run the container with CAP_SYS_ADMIN",
}


class MountEntry(NamedTuple):
    """One line of /proc/self/mountinfo."""

    device: str  # "0:45"
    path: str
    options: str
    fstype: str
    source: str
    data: str = ""  # options of the file system


class BusyMount(MountError):
    """The mount is in use."""

    errno = errno.EBUSY


# --- looking ----------------------------------------------------------------------------------


def mounted(mountinfo: str = "/proc/self/mountinfo") -> list[MountEntry]:
    """Return all mounts, in the order of mounting.  Raises MountError without /proc."""
    try:
        with open(mountinfo, "rb") as lines:
            return [_parse(line) for line in lines]
    except FileNotFoundError:
        raise MountError(
            f"{mountinfo} is missing: mount /proc first ('mount -t proc proc /proc')"
        ) from None


def _parse(line: bytes) -> MountEntry:
    fields = line.rstrip(b"\n").split(b" ")
    rest = fields[fields.index(b"-") + 1 :]
    return MountEntry(
        device=fields[2].decode(),
        path=_unescape(fields[4]),
        options=fields[5].decode(),
        fstype=rest[0].decode(),
        source=_unescape(rest[1]),
        data=os.fsdecode(b" ".join(rest[2:])),
    )


def _unescape(field: bytes) -> str:
    """Decode the octal escapes that the kernel writes for blanks, newlines and backslashes."""
    plain = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
    return os.fsdecode(plain)


def find(path: str) -> MountEntry | None:
    """Return the topmost mount whose root is *path* (absolute, resolved); None without one."""
    return next((entry for entry in reversed(mounted()) if entry.path == path), None)


def ours() -> list[MountEntry]:
    """Return the mounts of type ivshmemfs, in the order of mounting."""
    return [entry for entry in mounted() if entry.fstype == FSTYPE]


def of_device(device: str) -> MountEntry | None:
    """Return the first ivshmemfs mount with this device number; None without one."""
    return next((entry for entry in ours() if entry.device == device), None)


def resolve(path: str) -> str:
    """Return the absolute path of *path* without symbolic links.

    The roots of mounts are directories and need no look.  Below the root of an ivshmemfs mount the
    rest of the path is not resolved.  Raises MountError for a cycle of links.
    """
    roots = {entry.path: entry.fstype for entry in mounted()}  # the topmost one counts
    todo = _parts(absolute(path, "mount point"))
    done, links = "/", 0
    while todo:
        name = todo.pop()
        if name == "..":
            done = os.path.dirname(done)
            continue
        here = os.path.join(done, name)
        target = None if here in roots else _link(here)
        if target is None:
            done = here
            if roots.get(here) == FSTYPE:
                return os.path.normpath(os.path.join(done, *reversed(todo)))
            continue
        links += 1
        if links > MAX_LINKS:
            raise MountError(f"mount point {path} cannot be used: too many symbolic links")
        todo += _parts(target)
        if target.startswith("/"):
            done = "/"
    return done


def absolute(path: str, what: str) -> str:
    """Return the absolute form of *path*; raises MountError without a current directory."""
    if path.startswith("/"):
        return path
    try:
        return os.path.join(os.getcwd(), path)
    except FileNotFoundError:
        raise MountError(
            f"{what} {path} cannot be found: the current directory was removed; give the whole path"
        ) from None


def _parts(path: str) -> list[str]:
    """Return the components of a path in reverse order."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _link(path: str) -> str | None:
    """Return the target of the symbolic link *path*; None if it is not one or does not exist."""
    try:
        return os.readlink(path)
    except OSError:
        return None


def enclosing(path: str) -> MountEntry | None:
    """Return the ivshmemfs mount that holds *path*; None without one."""
    target, found = resolve(path), None
    for entry in mounted():  # the last one with the longest path covers the others
        inside = target == entry.path or target.startswith(entry.path.rstrip("/") + "/")
        if inside and (found is None or len(entry.path) >= len(found.path)):
            found = entry
    return found if found is not None and found.fstype == FSTYPE else None


def answers(path: str, seconds: float = ANSWER_SECONDS) -> bool:
    """Return whether the mount *path* answers a stat(2) within *seconds*; an error is an answer.

    A daemon thread calls stat(2); the kernel ends it together with the process.
    """

    def look() -> None:
        with suppress(OSError):
            os.stat(path)

    thread = threading.Thread(target=look, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # a limit on processes or memory; count it as an answer
        return True
    thread.join(seconds)
    return not thread.is_alive()


def check(path: str) -> str:
    """Return the resolved *path* if it can be a mount point; raise MountError if not."""
    target = resolve(path)
    entry = find(target)
    if entry is not None and not _is_asked_for(entry):
        raise MountError(_occupied(path, entry))
    if (around := enclosing(target)) is not None:
        refuse_hung(around)
        target = os.path.realpath(target)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        raise MountError(f"mount point {path} does not exist: create the directory first") from None
    except OSError as error:
        raise MountError(f"mount point {path} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"mount point {path} is not a directory")
    return target


def is_asked_for(path: str) -> bool:
    """Return whether an automounter waits for this process to mount on *path* (resolved)."""
    entry = find(path)
    return entry is not None and _is_asked_for(entry)


def _is_asked_for(entry: MountEntry) -> bool:
    """Return whether a mount is an autofs of this process group.

    The kernel lets that group alone pass without waiting for the automounter.  systemd mounts in
    its own group.
    """
    group = re.search(r"(?:^|,)pgrp=(\d+)", entry.data)
    return entry.fstype == AUTOFS and group is not None and int(group[1]) == os.getpgrp()


def _occupied(path: str, entry: MountEntry) -> str:
    if entry.fstype == AUTOFS:
        return f"{path} is an automount point: use a file there, and it is mounted"
    if entry.fstype != FSTYPE:
        return f"mount point {path} is busy: {entry.fstype} is mounted there; choose another one"
    return (
        f"mount point {path} is busy: {entry.source} is mounted there already; "
        f"'ivshmemfs umount {path}' ends that mount, also when its daemon is dead"
    )


def refuse_hung(entry: MountEntry) -> None:
    """Raise MountError if the daemon of a mount does not answer."""
    from ivshmemfs.fuse import lifeline

    grip = lifeline.grasp(entry.device)
    if grip is not None:
        with grip:
            server = lifeline.serving(grip)
        if server.stopped:
            raise MountError(
                f"the mount at {entry.path} does not answer, because its daemon (process "
                f"{server.pid}) is stopped: 'kill -CONT {server.pid}' continues it"
            )
    if not answers(entry.path):
        raise MountError(
            f"the mount at {entry.path} does not answer within {ANSWER_SECONDS:.0f} s: "
            f"'ivshmemfs umount --lazy {entry.path}' detaches it"
        )


def check_fuse_device() -> None:
    """Raise MountError if this user cannot use /dev/fuse."""
    if not os.path.exists(FUSE_DEVICE):
        raise MountError(f"{FUSE_DEVICE} is missing: load the kernel module ('modprobe fuse')")
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise MountError(
            f"no permission to open {FUSE_DEVICE}: run as root, or allow this user to read and "
            "write it"
        )


# --- mounting ---------------------------------------------------------------------------------


def helper() -> str | None:
    """Return the path of fusermount3; None if it is not installed."""
    import shutil

    return shutil.which("fusermount3")


def _needed_helper() -> str:
    """Return the path of fusermount3; raises MountError if it is not installed."""
    command = helper()
    if command is None:
        raise MountError("fusermount3 is missing: install the package fuse3, or be root")
    return command


def open_mount(path: str, options: str) -> int:
    """Mount a new FUSE connection on *path* and return its descriptor.

    *options* are in the syntax of fusermount3 -o.  Raises MountError.
    """
    import socket

    command = _needed_helper()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        _run(
            [command, "-o", options, "--", path],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )
        ours.settimeout(HELPER_SECONDS)
        return _receive_descriptor(ours)


def open_mount_directly(path: str, source: str, flags: int, data: str) -> int:
    """Mount a new FUSE connection on *path* by mount(2) and return its descriptor.

    *flags* are those of mount(2); *data* are options of the kernel's FUSE, separated by commas.
    Raises MountError.
    """
    try:
        device = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"{FUSE_DEVICE} cannot be opened: {error.strerror}") from None
    owner = f"user_id={os.getuid()},group_id={os.getgid()}"
    words = ",".join(filter(None, (f"fd={device},rootmode=40000,{owner}", data)))
    number = _mount(source, path, FSTYPE, flags, words)
    if number:
        os.close(device)
        raise MountError(_REFUSALS.get(number, f"{path} cannot be mounted: {os.strerror(number)}"))
    return device


def remount(path: str, flags: int) -> None:
    """Set the flags of mount(2) of the mount *path*.  Raises MountError."""
    if number := _mount("none", path, None, flags, None):
        raise MountError(f"{path} cannot be remounted: {os.strerror(number)}")


def _mount(source: str, path: str, fstype: str | None, flags: int, data: str | None) -> int:
    """Call mount(2); return 0 or the errno."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mount(
        ctypes.c_char_p(os.fsencode(source)),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_char_p(None if fstype is None else fstype.encode()),
        ctypes.c_ulong(flags),
        ctypes.c_char_p(None if data is None else data.encode()),
    )
    return ctypes.get_errno() if failed else 0


def refuses_changes(path: str) -> bool:
    """Return whether the daemon of the mount *path* refuses every change (mounted with ``ro``).

    Sends a request to the mount, but changes nothing.
    """
    try:
        os.removexattr(path, "user.ivshmemfs.no such attribute")
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def _receive_descriptor(channel: socket.socket) -> int:
    import array
    import socket

    space = array.array("i", [-1])
    _data, ancillary, _flags, _address = channel.recvmsg(
        1, socket.CMSG_SPACE(space.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            space = array.array("i")
            space.frombytes(payload[: space.itemsize])
            return space[0]
    raise MountError("fusermount3 returned no FUSE descriptor")


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount *path*; *lazy* detaches it at once even if it is in use.  Raises MountError."""
    if os.geteuid() == 0 and _umount2(path, lazy=lazy):
        return
    _run([_needed_helper(), "-u", *(["-z"] if lazy else []), "--", path])


def _umount2(path: str, *, lazy: bool) -> bool:
    """Call umount2(2), which needs no answer of the daemon; return whether it succeeded.

    Raises BusyMount.
    """
    import ctypes

    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(ctypes.c_char_p(os.fsencode(path)), ctypes.c_int(flags)) == 0:
        return True
    if ctypes.get_errno() == errno.EBUSY:
        raise BusyMount(f"{path}: {os.strerror(errno.EBUSY)}")
    return False  # a container's root may lack the right; fusermount3 reports the cause


def _run(
    command: list[str], *, pass_fds: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> None:
    import subprocess

    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=pass_fds,
            env=env,
            timeout=HELPER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MountError(f"{command[0]} did not finish in {HELPER_SECONDS:.0f} s") from None
    if result.returncode != 0:
        raise _failure(os.fsdecode(result.stderr).replace(f"{command[0]}: ", ""))


def _failure(stderr: str) -> MountError:
    """Return the last line that fusermount3 printed, without its name, as an error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    text = lines[-1] if lines else "fusermount3 failed without a message"
    if "busy" in text:
        return BusyMount(text)
    if "/etc/mtab" in text and not os.path.exists("/etc/mtab"):
        return MountError(
            "fusermount3 needs /etc/mtab, which is missing: 'ln -s /proc/self/mounts /etc/mtab' as "
            "root makes it"
        )
    return MountError(text)
