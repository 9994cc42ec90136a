"""Upkeep of a mount: housekeeping of the engine, and a check of the region at every tick.

States, the values of `Standing`:

SOUND    the region is the one that was mounted
another  something happened to the region; the log has one line when that begins and one at its end
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ivshmemfs.errors import Busy
from ivshmemfs.fuse.retry import errno_of
from ivshmemfs.region import Standing

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

log = logging.getLogger(__name__)


class Upkeep:
    """The upkeep of one mounted engine.  Nothing here raises; errors are logged."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        #: The state of the region at the last check.
        self.standing = Standing.SOUND
        #: Called with each new state.
        self.on_standing: Callable[[Standing], None] = lambda _standing: None

    def run(self) -> bool:
        """Do the work of one tick; call it about once a second.

        Returns whether work is left; then call `work` soon.
        """
        self._logged(self._watch_region)
        return self._logged(lambda: self._fs.tick())

    def work(self) -> bool:
        """Do another piece of the work; return whether work is left."""
        return self._logged(lambda: self._fs.work())

    def _logged(self, call: Callable[[], bool]) -> bool:
        try:
            return call()
        except Busy:
            pass  # the next tick retries
        except Exception as error:
            if self.standing is Standing.SOUND:  # else the log has the cause already
                errno_of("upkeep", error)
        return False

    def _watch_region(self) -> bool:
        before, self.standing = self.standing, self._fs.standing()
        if self.standing is before:
            return False
        if self.standing is Standing.SOUND:
            log.warning("the region is sound again; it was %s", before.value)
        else:
            log.error("%s", self.standing.explained)
        self.on_standing(self.standing)
        return False
