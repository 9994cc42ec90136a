"""The budget of a turn: how many requests are answered before other tasks run.

    full     other tasks have just run: `renew`
    spent    REQUESTS_PER_TURN requests, or SECONDS_PER_TURN seconds: other tasks must run now

Only every eighth request reads the clock.
"""

from __future__ import annotations

import time

#: Maximum number of requests in a row before other tasks get a turn.  A turn of other tasks costs
#: as much as a short request, and most turns end by their time.
REQUESTS_PER_TURN = 256
#: Maximum time before other tasks get a turn, in seconds.
SECONDS_PER_TURN = 0.002


class Budget:
    """The budget of one loop."""

    __slots__ = ("ends", "left")

    def __init__(self) -> None:
        self.left = REQUESTS_PER_TURN
        self.ends = 0.0  # by the monotonic clock, in seconds

    def renew(self) -> None:
        """Start a turn: every other task has just had its chance to run."""
        self.left = REQUESTS_PER_TURN
        self.ends = time.monotonic() + SECONDS_PER_TURN
