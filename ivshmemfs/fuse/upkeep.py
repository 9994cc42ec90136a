"""Upkeep of a mount: housekeeping of the engine, and a check of the region at every tick.

States, the values of `Condition`:

    SOUND    the region is the one that was mounted
    another  something happened to the region; the log has one line when that begins, and one at
             its end
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ivshmemfs.errors import Busy
from ivshmemfs.fuse.retry import errno_of
from ivshmemfs.region import Condition

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

log = logging.getLogger(__name__)


class MountUpkeep:
    """The upkeep of one mounted engine.  Nothing here raises; errors are logged."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        #: The state of the region at the last check.
        self.condition = Condition.SOUND
        #: Called with each new state.
        self.on_condition: Callable[[Condition], None] = lambda _standing: None

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
            if self.condition is Condition.SOUND:  # else the log has the cause already
                errno_of("upkeep", error)
        return False

    def _watch_region(self) -> bool:
        before, self.condition = self.condition, self._fs.condition()
        if self.condition is before:
            return False
        if self.condition is Condition.SOUND:
            log.warning("the region is sound again; it was %s", before.value)
        else:
            log.error("%s", self.condition.explained)
        self.on_condition(self.condition)
        return False
