"""How a command becomes a peer of a region for a while, without a mount."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from ivshmemfs.errors import Busy

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.region import Region

T = TypeVar("T")

#: Seconds between two attempts of what is busy.
PAUSE = 0.002


@contextmanager
def peer(region: Region, *, readonly: bool) -> Iterator[Filesystem]:
    """A peer for the time of a `with`."""
    from ivshmemfs.engine import Filesystem

    fs = Filesystem.mount(region, readonly=readonly)
    try:
        yield fs
    finally:
        fs.unmount()


def patiently(call: Callable[[], T], seconds: float = 30.0) -> T:
    """Call again while the region is busy; raises Busy when that does not end."""
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Busy:
            if time.monotonic() > end:
                raise
            time.sleep(PAUSE)
