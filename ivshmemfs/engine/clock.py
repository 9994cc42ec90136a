"""The time of a change, by the clock that the kernel itself uses for files.

That clock runs in steps of some milliseconds.  The kernel sends its reading when a program sets a
time to the present, so a finer clock here would let `touch` move a time backwards.  Newer kernels
may be ahead of the steps at times; what they send as the present is remembered, so that the next
change is not before it.  A file whose contents change twice within a step gets a moment between the
steps, as Linux 6.13 has it for its own filesystems.

Programs compare times of files (make does), and the clocks of two machines differ.  So a change is
not before the last commit of another machine, if that one is ahead by at most TRUSTED_NS.  A clock
that is further ahead is wrong, or hostile, and changes nothing: it cannot drag the others along
further than that, for each of them compares with its own clock.
"""

from __future__ import annotations

import time
from typing import Final

_REALTIME_COARSE = 5  # CLOCK_REALTIME_COARSE of Linux, which the module time does not name
TRUSTED_NS: Final = 10 * 10**9  # how far the last commit may be ahead of the machine's own clock


class Clock:
    """One mount's clock; at most TRUSTED_NS ahead of the machine's own."""

    def __init__(self) -> None:
        self._latest = 0  # the last moment that was told, committed by others, or set to now

    def now(self) -> int:
        """The present, in ns since 1970."""
        present = time.clock_gettime_ns(_REALTIME_COARSE)
        if present < self._latest <= time.time_ns() + TRUSTED_NS:
            return self._latest
        return present

    def between(self) -> int:
        """The present between two steps of the clock; later than `now` told, not after it tells."""
        present = time.time_ns()
        if present <= self._latest <= present + TRUSTED_NS:
            present = self._latest + 1
        self._latest = present
        return present

    def seen(self, moment: int) -> None:
        """Somebody gave a time to a file; maybe as the present."""
        if self._latest < moment <= time.time_ns():
            self._latest = moment

    def committed(self, moment: int) -> None:
        """Some machine committed at `moment`, by its clock."""
        if self._latest < moment <= time.time_ns() + TRUSTED_NS:
            self._latest = moment
