"""Which doorbell a process has for a region: its device's, or that of the host's server.

    a file on the host     the server's socket: the one that is named, or /run/ivshmemfs/NAME.sock
                           for a file NAME, where ivshmemfs-server@NAME listens
    a device in a guest    the device's own, where it is an ivshmem-doorbell one and this process
                           may use its registers

Nothing has to be switched on in a guest.  Without a doorbell everything works: waiters poll.

A server tells all its clients of each new one.  So a short command connects only when it finds
a waiter to ring, or waits itself (`OnDemand`).  Its states:

    idle      nothing was needed; the socket was there
    made      `ServerBell` connected
    failed    it could not; this process does not ring, and has no number
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ivshmemfs.errors import IvshmemfsError, UsageError
from ivshmemfs.region import Region
from ivshmemfs.region.driver import survey
from ivshmemfs.region.pci import is_ivshmem
from ivshmemfs.region.roots import HERE, Roots

if TYPE_CHECKING:  # most processes have no doorbell
    from ivshmemfs.doorbell.client import ServerBell
    from ivshmemfs.doorbell.device import DeviceBell

SOCKETS = Path("/run/ivshmemfs")
OFF = "off"  # in place of a socket's path


class OnDemand:
    """A doorbell that `connect` makes at the first ring, or when its number is asked for."""

    def __init__(self, connect: Callable[[], ServerBell]) -> None:
        self._connect: Callable[[], ServerBell] | None = connect
        self._bell: ServerBell | None = None

    def _made(self) -> ServerBell | None:
        connect, self._connect = self._connect, None
        if connect is not None:
            with suppress(IvshmemfsError, OSError):
                self._bell = connect()
        return self._bell

    @property
    def number(self) -> int:
        """The number by which others ring it, or -1."""
        bell = self._made()
        return -1 if bell is None else bell.number

    def keep(self) -> bool:
        """Return whether it reaches the others, as far as it knows."""
        return self._connect is not None or (self._bell is not None and self._bell.keep())

    def ring(self, numbers: Iterable[int]) -> None:
        """Ring these numbers."""
        bell = self._made()
        if bell is not None:
            bell.ring(numbers)

    def fileno(self) -> int:
        """Return the own eventfd, -1 before there is one."""
        return -1 if self._bell is None else self._bell.fileno()

    def quiet(self) -> None:
        """Forget the rings so far."""
        if self._bell is not None:
            self._bell.quiet()

    def close(self) -> None:
        """Close the connection."""
        self._connect = None
        if self._bell is not None:
            self._bell.close()


Bell: TypeAlias = "ServerBell | DeviceBell | OnDemand"


def usual_socket(region: Region, sockets: Path = SOCKETS) -> Path:
    """Return where the server of a region's file listens if its unit started it."""
    return sockets / f"{region.path.name}.sock"


def doorbell_of(
    region: Region,
    socket: str | None = None,
    *,
    at_once: bool = False,
    roots: Roots = HERE,
    sockets: Path = SOCKETS,
) -> Bell | None:
    """Return the doorbell for `region`, or None; the caller closes it, before the region.

    `socket` is a server's, `OFF` for none, or None to look for one.  With `at_once` it connects
    now, for a process that lives long.  Raises UsageError, RegionError for a socket that is named
    and cannot be used.
    """
    if socket == OFF:
        return None
    if region.kind == "file":
        if socket is not None:
            return _served(region, Path(socket))
        path = usual_socket(region, sockets)
        with suppress(IvshmemfsError, OSError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                made = OnDemand(lambda: _served(region, path))
                return made if not at_once or made.number >= 0 else None
        return None
    if socket is not None:
        raise UsageError(
            f"{region.spec} is a {region.kind}, which has its own doorbell; leave the socket out"
        )
    from ivshmemfs.doorbell.device import bell_of_device, bell_of_vfio

    if region.device is not None:
        return bell_of_vfio(region.device)
    directory = device_of(region, roots)
    return None if directory is None else bell_of_device(directory, roots)


def _served(region: Region, path: Path) -> ServerBell:
    from ivshmemfs.doorbell.client import ServerBell

    there = os.stat(region.path)

    def is_memory(descriptor: int) -> bool:
        return os.path.samestat(os.fstat(descriptor), there)

    return ServerBell(path, is_memory)


def device_of(region: Region, roots: Roots = HERE) -> Path | None:
    """Return the directory in sysfs of a region's ivshmem device, or None."""
    scheme, _, address = region.spec.partition(":")
    if scheme == "pci":
        return roots.sys / "bus/pci/devices" / address
    if is_ivshmem(region.path.parent):  # a resource file of sysfs
        return region.path.parent
    with suppress(OSError):
        number = roots.device_number(region.path)
        devices = survey(roots).behind(number) if number is not None else []
        if len(devices) == 1:
            return devices[0].directory
    return None
