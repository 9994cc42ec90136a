"""The time of a change, from the clock that the kernel uses for files.

The clock has steps of some milliseconds.  The kernel sends its reading when a program sets a time
to the present.  A finer clock here would let `touch` move a time backwards.  Newer kernels may send
a present that is between two steps.  The clock remembers it, so the next change is not before it.
When the contents of a file change twice within a step, the second change gets a time between two
steps, as on Linux 6.13 filesystems.

Programs such as make compare times of files, and the clocks of two machines differ.  So a change is
not before the last commit of another machine that is at most TRUSTED_NS ahead.  A clock that is
further ahead is wrong or hostile; this clock ignores it.  Each machine compares with its own clock,
so one machine cannot drag the others along further than TRUSTED_NS.
"""

from __future__ import annotations

import time
from typing import Final

_REALTIME_COARSE: Final = 5  # clock id of Linux; the module `time` has no name for it
TRUSTED_NS: Final = 10 * 10**9  # ns that the last commit may be ahead of the machine's own clock


class Clock:
    """The clock of one mount; at most TRUSTED_NS ahead of the machine's own clock."""

    def __init__(self) -> None:
        self._latest = 0  # the latest time returned, committed by a peer or set by a caller

    def now(self) -> int:
        """Return the present, in ns since 1970."""
        present = time.clock_gettime_ns(_REALTIME_COARSE)
        if present < self._latest <= time.time_ns() + TRUSTED_NS:
            return self._latest
        return present

    def between(self) -> int:
        """Return a present between two steps; later than every earlier `now` and `between`."""
        present = time.time_ns()
        if present <= self._latest <= present + TRUSTED_NS:
            present = self._latest + 1
        self._latest = present
        return present

    def seen(self, moment: int) -> None:
        """Note a timestamp set by a caller; it may mean "now"."""
        if self._latest < moment <= time.time_ns():
            self._latest = moment

    def committed(self, moment: int) -> None:
        """Note the time of the last commit, by the clock of its machine."""
        if self._latest < moment <= time.time_ns() + TRUSTED_NS:
            self._latest = moment
