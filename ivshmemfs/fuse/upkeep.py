"""What a mount does without being asked: housekeeping, and watching the region.

SOUND    the region is what was mounted
another  a `Condition`: what became of the region; the log says so once, and once when it is over
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


class Upkeep:
    """The upkeep of one mounted engine.  Nothing here raises; errors are logged."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        #: What became of the region, when it was last looked at.
        self.condition = Condition.SOUND
        #: Called with each change of that.
        self.on_condition: Callable[[Condition], None] = lambda _condition: None

    def run(self) -> bool:
        """Do what is due about once a second.

        Returns whether there is more to do, for which `work` is to be called soon.
        """
        self._logged(self._watch_region)
        return self._logged(lambda: self._fs.tick())

    def work(self) -> bool:
        """Do another piece of that; returns whether there is still more."""
        return self._logged(lambda: self._fs.work())

    def _logged(self, call: Callable[[], bool]) -> bool:
        try:
            return call()
        except Busy:
            pass  # next time
        except Exception as error:
            if self.condition is Condition.SOUND:  # else the log says why already
                errno_of("upkeep", error)
        return False

    def _watch_region(self) -> bool:
        before, self.condition = self.condition, self._fs.condition()
        if self.condition is before:
            return False
        if self.condition is Condition.SOUND:
            log.warning("the region is as it was mounted again; it was %s", before.value)
        else:
            log.error("%s", self.condition.explained)
        self.on_condition(self.condition)
        return False
