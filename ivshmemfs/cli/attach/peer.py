"""How a command becomes a peer of a region for a while, without a mount."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar, cast

from ivshmemfs import __version__
from ivshmemfs.errors import Busy, RegionDenied, RegionError, UnderRepair, Unfinished

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.format.peer import Occupant
    from ivshmemfs.region import Region
    from ivshmemfs.shm.bells import Doorbell

T = TypeVar("T")

#: Seconds that a newcomer waits for the end of a repair.
REPAIR_SECONDS = 3.0
#: Seconds between two attempts of what is busy.
PAUSE = 0.002
#: Seconds between two signs of life of a command that changes a region.
PULSE = 1.0


def enter(region: Region, *, readonly: bool, doorbell: Doorbell | None = None) -> Filesystem:
    """Mount `region`; a repair is waited for shortly, since most take less.  Raises UnderRepair."""
    from ivshmemfs.engine import Filesystem

    end = time.monotonic() + REPAIR_SECONDS
    while True:
        try:
            return Filesystem.mount(region, readonly=readonly, doorbell=doorbell)
        except OSError as error:
            if short := region.shortage():
                raise RegionError(short) from error
            raise
        except UnderRepair:
            if time.monotonic() > end:
                raise
            time.sleep(PAUSE)


@contextmanager
def peer(
    region: Region, *, readonly: bool, waits: bool = False, doorbell: str | None = None
) -> Iterator[Filesystem]:
    """A peer for the time of a `with`; it has a doorbell if it writes or `waits`.

    `doorbell` is the socket of a server, see `doorbell_of`.
    """
    with ExitStack() as stack:
        bell = None
        if waits or not readonly:
            from ivshmemfs.doorbell.finding import doorbell_of

            bell = doorbell_of(region, doorbell)
            if bell is not None:
                stack.callback(bell.close)
        fs = enter(region, readonly=readonly, doorbell=bell)
        stack.callback(fs.unmount)
        yield fs


class Pulse:
    """Signs of life of a command that takes long; without them others take it for dead."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        self._last = time.monotonic()

    def beat(self) -> None:
        """Beat if the last time is PULSE seconds ago."""
        now = time.monotonic()
        if now - self._last > PULSE:
            self._last = now
            with suppress(Busy):
                self._fs.tick()


@contextmanager
def attached(
    spec: str, *, readonly: bool, waits: bool = False, doorbell: str | None = None
) -> Iterator[Filesystem]:
    """Open the region that `spec` names, and be a peer of it for the time of a `with`.

    `spec` is a region or a mount point; `waits` and `doorbell` are as `peer` has them.  Raises
    RegionError, FormatError.
    """
    from ivshmemfs.cli.attach.names import region_of
    from ivshmemfs.format.superblock import identify
    from ivshmemfs.region import open_region

    region = open_region(region_of(spec), readonly=readonly, identify=identify)
    if waits and readonly:
        region = _announcing(region, doorbell)
    with region, peer(region, readonly=readonly, waits=waits, doorbell=doorbell) as fs:
        yield fs


def _announcing(region: Region, doorbell: str | None) -> Region:
    """Return `region` with stores allowed if it has a doorbell and this user may store.

    A waiter announces itself in the region.  Closes `region` if it opens it again.
    """
    from ivshmemfs.doorbell.finding import doorbell_of
    from ivshmemfs.region import open_region

    bell = doorbell_of(region, doorbell)
    if bell is None:
        return region
    bell.close()
    region.close()
    try:
        return open_region(region.spec)
    except RegionDenied:
        return open_region(region.spec, readonly=True)


def older_peers(peers: Iterable[Occupant]) -> str:
    """What to tell of peers that run an older version; empty when none does."""
    own = _numbers(__version__)
    older = [peer for peer in peers if peer.version and _numbers(peer.version) < own]
    if not older:
        return ""
    named = ", ".join(f"{peer.describe()} runs {peer.version}" for peer in older)
    return f"this is ivshmemfs {__version__} and {named}: use one version on all machines"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d{1,9}", version)]


def patiently(call: Callable[[], T], seconds: float = 30.0) -> T:
    """Call again while the region is busy; raises Busy when that does not end.

    What takes several turns may take as long as it needs, because it makes progress.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Unfinished as turn:
            call = cast("Callable[[], T]", turn.go_on or call)
            end = time.monotonic() + seconds
        except Busy:
            if time.monotonic() > end:
                raise
            time.sleep(PAUSE)
