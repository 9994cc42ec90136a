"""The lifeline of a mount: how clients learn that its daemon lives, has ended, or saw an event.

A lifeline is a listening socket that a daemon holds until its process ends.  Its name contains the
device number of the mount.  A client connects and waits until the connection breaks.  It needs no
answer, so a stopped or hung daemon cannot block it.

After an event on the region, the daemon binds a second name, the sign, which ends in a word for the
event.  A client sees from the bind alone whether the name exists.

The kernel reuses a device number after an unmount, maybe long before the daemon ends.  So the names
of one device number have a counter.  The highest one in use belongs to the mount.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ivshmemfs.fuse.mountpoint import MountEntry
    from ivshmemfs.region import Condition

#: Most daemons with the same device number.
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


def hold(device: str) -> Lifeline | None:
    """Bind the lifeline of the mount *device*; None if LIFELINES of that number exist."""
    held = _highest(device)
    if held is not None:
        held[1].close()
    number = 0 if held is None else held[0] + 1
    lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if number < LIFELINES:
            lifeline.bind(_name(device, number))
            lifeline.listen(BACKLOG)
            return Lifeline(lifeline)
    except OSError:
        pass
    lifeline.close()
    return None


def grasp(device: str) -> socket.socket | None:
    """Connect to the lifeline of the mount *device*; None if no daemon holds it."""
    held = _highest(device)
    return None if held is None else held[1]


def _highest(device: str) -> tuple[int, socket.socket] | None:
    """Return the highest counter in use for *device* and a connection to that lifeline."""
    for number in reversed(range(LIFELINES)):
        grip = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        grip.setblocking(False)
        try:
            grip.connect(_name(device, number))
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

    held = _highest(entry.device)
    if held is None:
        return "daemon dead"
    number, grip = held
    with grip:
        words = ["daemon stopped"] if serving(grip).stopped else []
    lifeline = _name(entry.device, number)
    words += [
        condition.value for condition in Condition if _is_bound(_sign_name(lifeline, condition))
    ]
    return ", ".join(words)


def _is_bound(name: bytes) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as caller:
        return caller.connect_ex(name) == 0


def _sign_name(lifeline: bytes, condition: Condition) -> bytes:
    return lifeline + b" " + condition.value.encode()


def _name(device: str, number: int) -> bytes:
    return f"\0ivshmemfs mount {device} {number}".encode()
