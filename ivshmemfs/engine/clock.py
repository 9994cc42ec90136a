"""The time of a change, by the clock that the kernel itself uses for files.

That clock runs in steps of some milliseconds.  The kernel sends its reading when a program sets a
time to the present, so a finer clock here would let `touch` move a time backwards.  Newer kernels
may be ahead of the steps at times; what they send as the present is remembered, so that the next
change is not before it.  A file whose contents change twice within a step gets a moment between the
steps, as Linux 6.13 has it for its own filesystems.
"""

from __future__ import annotations

import time

_REALTIME_COARSE = 5  # CLOCK_REALTIME_COARSE of Linux, which the module time does not name


class Clock:
    """One mount's clock.  Never ahead of the machine's own."""

    def __init__(self) -> None:
        self._latest = 0

    def now(self) -> int:
        """The present, in ns since 1970."""
        present = time.clock_gettime_ns(_REALTIME_COARSE)
        if present < self._latest <= time.time_ns():
            return self._latest
        return present

    def between(self) -> int:
        """The present between two steps of the clock; what `now` tells is not before it."""
        self._latest = time.time_ns()
        return self._latest

    def seen(self, moment: int) -> None:
        """Somebody gave a time to a file; maybe as the present."""
        if self._latest < moment <= time.time_ns():
            self._latest = moment
