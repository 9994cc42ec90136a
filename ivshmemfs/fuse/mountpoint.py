"""Mount points: their checks, the list of mounts, mounting and unmounting.

fusermount3 mounts for root and for ordinary users.  It is the only program that may mount for a
user, and it sets nosuid and nodev unless root asks otherwise.  Without fusermount3 root mounts by
mount(2).  Root unmounts by umount2(2).

A mount with a stopped daemon blocks every caller that looks at its root.  So this module passes no
path to the kernel that is the root of a mount in /proc/self/mountinfo.  Nor does it pass one that
leads through the root of an ivshmemfs mount.  The exception is `answers`, which limits its wait.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ivshmemfs.errors import MountError

if TYPE_CHECKING:
    from ivshmemfs.region import Condition

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
    grip = grasp_lifeline(entry.device)
    if grip is not None:
        with grip:
            server = serving(grip)
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


# --- the end of a daemon ----------------------------------------------------------------------
#
# A lifeline is a listening socket that a daemon holds until its process ends.  Its name contains
# the device number of the mount.  A client connects and waits until the connection breaks.  It
# needs no answer, so a stopped or hung daemon cannot block it.
#
# After an event on the region, the daemon binds a second name, the sign, which ends in a word for
# the event.  A client sees from the bind alone whether the name exists.
#
# The kernel reuses a device number after an unmount, maybe long before the daemon ends.  So the
# names of one device number have a counter.  The highest one in use belongs to the mount.

#: Maximum number of daemons with the same device number.
LIFELINES = 16
#: Maximum number of connections that wait for `tidy`; a stopped daemon does not call it.
BACKLOG = 256


class Lifeline:
    """The lifeline of one mount, and its sign."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        listening.setblocking(False)
        self._callers: list[socket.socket] = []
        self._sign: socket.socket | None = None

    def tidy(self) -> None:
        """Accept new clients, and close the connections that clients have closed."""
        with suppress(OSError):
            while True:
                self._callers.append(self._listening.accept()[0])
        for caller in self._callers[:]:
            with suppress(BlockingIOError):
                if not caller.recv(1, socket.MSG_DONTWAIT):
                    self._callers.remove(caller)
                    caller.close()

    def show(self, condition: Condition) -> None:
        """Replace the sign by one for *condition*; a sound region has no sign."""
        if self._sign is not None:
            self._sign.close()
            self._sign = None
        if condition.explained:
            self._sign = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            with suppress(OSError):
                self._sign.bind(_sign_name(self._listening.getsockname(), condition))

    def close(self) -> None:
        """Close all sockets, which ends the waits of all clients."""
        for one in (self._listening, *self._callers, *([self._sign] if self._sign else [])):
            one.close()


def hold_lifeline(device: str) -> Lifeline | None:
    """Bind the lifeline of the mount *device*; None if LIFELINES of that number exist."""
    held = _highest_lifeline(device)
    if held is not None:
        held[1].close()
    number = 0 if held is None else held[0] + 1
    lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if number < LIFELINES:
            lifeline.bind(_lifeline_name(device, number))
            lifeline.listen(BACKLOG)
            return Lifeline(lifeline)
    except OSError:
        pass
    lifeline.close()
    return None


def grasp_lifeline(device: str) -> socket.socket | None:
    """Connect to the lifeline of the mount *device*; None if no daemon holds it."""
    held = _highest_lifeline(device)
    return None if held is None else held[1]


def _highest_lifeline(device: str) -> tuple[int, socket.socket] | None:
    """Return the highest counter in use for *device* and a connection to that lifeline."""
    for number in reversed(range(LIFELINES)):
        grip = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        grip.setblocking(False)
        try:
            grip.connect(_lifeline_name(device, number))
            return number, grip
        except OSError:
            grip.close()
    return None


class Serving(NamedTuple):
    """The process that holds a lifeline; pid 0 if it is in a pid namespace outside ours."""

    pid: int
    stopped: bool


def serving(grip: socket.socket) -> Serving:
    """Return the process at the other end of *grip*."""
    raw = grip.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("3i", raw)[0]
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b") ")[2][:1]
    except OSError:
        state = b""
    return Serving(pid, state in (b"T", b"t"))


def wait_for_end(grip: socket.socket, seconds: float) -> bool:
    """Wait until the process at the other end of *grip* ends; False if it still runs."""
    grip.settimeout(seconds)
    try:
        return grip.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def condition(entry: MountEntry) -> str:
    """Return the faults of an ivshmemfs mount as words, "" for none.

    Sends nothing to the mount or its daemon, which may be stopped.
    """
    from ivshmemfs.region import Condition

    held = _highest_lifeline(entry.device)
    if held is None:
        return "daemon dead"
    number, grip = held
    with grip:
        words = ["daemon stopped"] if serving(grip).stopped else []
    lifeline = _lifeline_name(entry.device, number)
    words += [
        condition.value for condition in Condition if _is_bound(_sign_name(lifeline, condition))
    ]
    return ", ".join(words)


def _is_bound(name: bytes) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as caller:
        return caller.connect_ex(name) == 0


def _sign_name(lifeline: bytes, condition: Condition) -> bytes:
    return lifeline + b" " + condition.value.encode()


def _lifeline_name(device: str, number: int) -> bytes:
    return f"\0ivshmemfs mount {device} {number}".encode()
