"""Upkeep of a mount: housekeeping of the engine, and a check of the region at every tick.

States, the values of `Condition`:

    SOUND    the region is the one that was mounted
    another  something happened to the region; the log has one line when that begins, and one at
             its end
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from ivshmemfs.errors import Busy
from ivshmemfs.fuse.retry import errno_of
from ivshmemfs.region import Condition

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

log = logging.getLogger(__name__)


class PathWatch:
    """Looks at the region's path, in a thread.

    The path may lead through this very mount, which lies above it, or through a mount whose server
    hangs.  A daemon that looked by itself would wait for itself.
    """

    def __init__(self, look: Callable[[], Condition]) -> None:
        self._look = look
        self._found = Condition.SOUND
        self._thread: threading.Thread | None = None

    def found(self) -> Condition:
        """Return what the last look that ended has shown, and begin another one."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="path", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # a limit on threads or memory; the next tick tries again
                self._thread = None
        return self._found

    def _run(self) -> None:
        with suppress(OSError):  # the region was closed meanwhile
            self._found = self._look()


class MountUpkeep:
    """The upkeep of one mounted engine.  Nothing here raises; errors are logged."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        self._path = PathWatch(fs.region.condition)
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
        found = self._path.found()
        if found is Condition.SOUND and self._fs.region.is_cut:  # known before an access fails
            found = Condition.CUT
        before, self.condition = self.condition, self._fs.condition(found)
        if self.condition is before:
            return False
        if self.condition is Condition.SOUND:
            log.warning("the region is sound again; it was %s", before.value)
        else:
            log.error("%s", self.condition.explained)
        self.on_condition(self.condition)
        return False
