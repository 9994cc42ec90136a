"""How `wait` and `watch` reach a path and notice commits: they look, and store nothing.

    looking    after a commit, or at the start: the caller looks at what it waits for
    awake      AWAKE seconds after a commit: naps of 0.5 ms, since commits come in rows
    drowsy     DROWSY seconds after a commit, or after the start: naps of 3 ms
    asleep     later: naps of 8 ms
    in bed     in place of drowsy and asleep, where bells work (`shm/bells.py`): until a commit
               rings, SAFETY at most

Each nap ends in one load of the commit word.  A commit comes at any instant of a nap, so the
latency is half a nap at the median.  A nap costs a CPU 20 µs where the timer of a virtual machine
is slow: 0.7 % of it while drowsy, 0.3 % while asleep.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ivshmemfs.errors import RegionMissing

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

#: Of the option that `wait`, `watch` and `lock` share.
DOORBELL_HELP = (
    "Sleep until the server at SOCKET rings; 'off' to poll.  By default a device's own doorbell, "
    "or /run/ivshmemfs/NAME.sock for a file NAME."
)
#: Seconds after a commit until which a state lasts.
AWAKE, DROWSY = 0.02, 10.0
#: Seconds of a nap in each state.
SHORT_NAP, NAP, LONG_NAP = 0.0005, 0.003, 0.008
#: Seconds between two looks at whether the region still is what was opened.
CONDITION_SECONDS = 1.0


def commits(fs: Filesystem, end: float = float("inf")) -> Iterator[None]:
    """Yield at once, and after each commit, until the monotonic time `end`.

    Raises RegionError when the region is not the one any more that was opened.
    """
    from ivshmemfs.region import Condition
    from ivshmemfs.shm.commit import LOOKS

    commit_word, bells, clock = fs.store.commit_word, fs.bells, time.monotonic
    word, changed, next_check = -1, clock(), 0.0
    while True:
        now = clock()
        if now >= next_check:
            condition = fs.condition()
            if condition not in (Condition.SOUND, Condition.RENAMED):
                raise RegionMissing(condition.explained)
            next_check = now + CONDITION_SECONDS
        seen = commit_word.load()
        if seen != word:
            word, changed = seen, now
            yield
        elif now >= end:
            return
        quiet = now - changed
        if quiet >= AWAKE and bells is not None and bells.sleep(word, min(next_check, end) - now):
            continue
        nap, until = _state(quiet)
        until = min(changed + until, next_check, end)
        commit_word.await_other(word, nap, min(max(int((until - now) / nap), 1), LOOKS))


def _state(quiet: float) -> tuple[float, float]:
    """The nap, and when after the last commit the state ends, *quiet* seconds after that commit."""
    if quiet < AWAKE:
        return SHORT_NAP, AWAKE
    return (NAP, DROWSY) if quiet < DROWSY else (LONG_NAP, float("inf"))
