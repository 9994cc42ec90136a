"""Mount points: what may be mounted on, what is mounted there, and fusermount3.

Mounting and unmounting go through fusermount3 for root and for ordinary users alike: it is the
one program that may do it for a user, and it keeps nosuid and nodev on unless root asks otherwise.

Nothing here touches a path that may be the root of a mount before /proc/self/mountinfo has been
asked, because a mount whose daemon is stopped would block the caller for good.
"""

from __future__ import annotations

import array
import errno
import os
import re
import shutil
import socket
import stat
import subprocess
from typing import NamedTuple

from ivshmemfs.errors import MountError

FSTYPE = "fuse.ivshmemfs"
FUSE_DEVICE = "/dev/fuse"
#: Seconds that fusermount3 may take; unmounting writes back what is mapped and modified.
HELPER_SECONDS = 30.0


class MountEntry(NamedTuple):
    """One line of /proc/self/mountinfo."""

    device: str  # "0:45"
    path: str
    options: str
    fstype: str
    source: str


class BusyMount(MountError):
    """The mount is in use."""

    errno = errno.EBUSY


# --- looking ----------------------------------------------------------------------------------


def mounted(mountinfo: str = "/proc/self/mountinfo") -> list[MountEntry]:
    """Everything that is mounted, in the order of mounting."""
    with open(mountinfo, "rb") as lines:
        return [_parse(line) for line in lines]


def _parse(line: bytes) -> MountEntry:
    fields = line.rstrip(b"\n").split(b" ")
    rest = fields[fields.index(b"-") + 1 :]
    return MountEntry(
        device=fields[2].decode(),
        path=_unescape(fields[4]),
        options=fields[5].decode(),
        fstype=rest[0].decode(),
        source=_unescape(rest[1]),
    )


def _unescape(field: bytes) -> str:
    """Undo the octal escapes that the kernel uses for blanks, newlines and backslashes."""
    plain = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
    return os.fsdecode(plain)


def find(path: str) -> MountEntry | None:
    """The topmost mount whose root is exactly *path* (absolute, resolved)."""
    return next((entry for entry in reversed(mounted()) if entry.path == path), None)


def resolve(path: str) -> str:
    """The absolute path without symbolic links, leaving the last component alone if mounted on."""
    absolute = os.path.abspath(path)
    parent, name = os.path.split(absolute)
    candidate = os.path.join(os.path.realpath(parent), name)
    return candidate if find(candidate) is not None else os.path.realpath(absolute)


def check(path: str) -> str:
    """Return the resolved *path* if it can be mounted on; raise MountError if not."""
    target = resolve(path)
    entry = find(target)
    if entry is not None:
        raise MountError(_occupied(path, entry))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        raise MountError(f"mount point {path} does not exist: create the directory first") from None
    except OSError as error:
        raise MountError(f"mount point {path} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"mount point {path} is not a directory")
    return target


def _occupied(path: str, entry: MountEntry) -> str:
    if entry.fstype != FSTYPE:
        return f"mount point {path} is busy: {entry.fstype} is mounted there; choose another one"
    return (
        f"mount point {path} is busy: {entry.source} is mounted there already; "
        f"'ivshmemfs umount {path}' ends that mount, also when its daemon is dead"
    )


def check_fuse_device() -> None:
    """Raise MountError, saying what to do, when this user cannot use /dev/fuse."""
    if not os.path.exists(FUSE_DEVICE):
        raise MountError(f"{FUSE_DEVICE} is missing: load the kernel module ('modprobe fuse')")
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise MountError(
            f"no permission to open {FUSE_DEVICE}: run as root, or allow this user to read and "
            "write it"
        )


# --- mounting ---------------------------------------------------------------------------------


def helper() -> str | None:
    """The path of fusermount3, if it is installed."""
    return shutil.which("fusermount3")


def open_mount(path: str, options: str) -> int:
    """Mount a new FUSE connection on *path* and return its descriptor.

    *options* are in the syntax of fusermount3 -o.  Raises MountError.
    """
    command = helper()
    if command is None:
        raise MountError("fusermount3 is missing: install the package fuse3")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        _run(
            [command, "-o", options, "--", path],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )
        ours.settimeout(HELPER_SECONDS)
        return _receive_descriptor(ours)


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
    raise MountError("fusermount3 mounted nothing")


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount *path*; *lazy* detaches it at once even when it is in use.  Raises MountError."""
    command = helper()
    if command is None:
        raise MountError("fusermount3 is missing: install the package fuse3")
    _run([command, "-u", *(["-z"] if lazy else []), "--", path])


def unmount_command(path: str, *, lazy: bool) -> list[str] | None:
    """The command that `unmount` would run, for a caller that must not block."""
    command = helper()
    return None if command is None else [command, "-u", *(["-z"] if lazy else []), "--", path]


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
    """The last line that fusermount3 said, without its name, as an error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    text = lines[-1] if lines else "fusermount3 failed silently"
    if "busy" in text:
        return BusyMount(text)
    return MountError(text)


# --- the end of a daemon ----------------------------------------------------------------------
#
# A daemon holds a listening socket, named after the device number of its mount, until its process
# ends.  Whoever wants to know when that is connects, and waits for the connection to break.  The
# daemon itself never looks at the socket, so a stopped or hung one cannot block anybody.
#
# The kernel gives the device number away again as soon as a mount is gone, which may be long before
# its daemon has ended.  So the names of one device number are counted up, and the highest that
# anybody holds is that of the mount.

#: Daemons that can wait for their end at once with the same device number.
LIFELINES = 16


def hold_lifeline(device: str) -> socket.socket | None:
    """Bind the lifeline of the mount *device*; None when there are too many of the same number."""
    held = _highest_lifeline(device)
    if held is not None:
        held[1].close()
    number = 0 if held is None else held[0] + 1
    lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if number < LIFELINES:
            lifeline.bind(_lifeline_name(device, number))
            lifeline.listen(8)
            return lifeline
    except OSError:
        pass
    lifeline.close()
    return None


def grasp_lifeline(device: str) -> socket.socket | None:
    """Connect to the lifeline of the mount *device*; None when no daemon holds it."""
    held = _highest_lifeline(device)
    return None if held is None else held[1]


def _highest_lifeline(device: str) -> tuple[int, socket.socket] | None:
    """The number of the last lifeline that anybody holds, and a connection to it."""
    for number in reversed(range(LIFELINES)):
        grip = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        grip.setblocking(False)
        try:
            grip.connect(_lifeline_name(device, number))
            return number, grip
        except OSError:
            grip.close()
    return None


def wait_for_end(grip: socket.socket, seconds: float) -> bool:
    """Wait until the process at the other end of *grip* is gone; False when it is still there."""
    grip.settimeout(seconds)
    try:
        return grip.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def _lifeline_name(device: str, number: int) -> bytes:
    return f"\0ivshmemfs mount {device} {number}".encode()
