"""How `wait` and `watch` reach a path and notice commits: they look, and store nothing.

    looking    after a commit, or at the start: the caller looks at what it waits for
    awake      AWAKE seconds after a commit: naps of SHORT_NAP, since commits come in rows
    asleep     naps of LONG_NAP; each ends in one load of the commit word

A nap of 3 ms costs 0.3 % of a CPU, and gives a latency of 1.5 ms at the median.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ivshmemfs.errors import RegionMissing

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

#: Seconds between two loads of the commit word: usually, and soon after a commit.
LONG_NAP, SHORT_NAP = 0.003, 0.0005
#: Seconds for which naps are short after a commit.
AWAKE = 0.02
#: Seconds between two looks at whether the region still is what was opened.
CONDITION_SECONDS = 1.0


def commits(fs: Filesystem, end: float = float("inf")) -> Iterator[None]:
    """Yield at once, and after each commit, until the monotonic time `end`.

    Raises RegionError when the region is not the one any more that was opened.
    """
    from ivshmemfs.region import Condition

    load, sleep, clock = fs.store.commit_word.load, time.sleep, time.monotonic
    word, awake_until, next_check = -1, 0.0, 0.0
    while True:
        now = clock()
        if now >= next_check:
            condition = fs.condition()
            if condition not in (Condition.SOUND, Condition.RENAMED):
                raise RegionMissing(condition.explained)
            next_check = now + CONDITION_SECONDS
        seen = load()
        if seen != word:
            word, awake_until = seen, now + AWAKE
            yield
        elif now >= end:
            return
        if now < awake_until:
            sleep(SHORT_NAP)
            continue
        for _ in range(max(int((min(end, next_check) - now) / LONG_NAP), 1)):
            sleep(LONG_NAP)  # with as little else as possible: this is what waiting costs
            if load() != word:
                break
