"""Turns of computing: requests run between two of them, however many tasks wait for one.

Tasks that are ready at once all run before the loop serves the next request.  A thousand waiters of
a lock would hold up each request for the sum of their looks.  So each takes a turn:

    free     no task computes; the next one may start when the rest is over
    taken    one task rests, if the rest is not over, and computes; others wait
    free     or taken by a waiting task: the rest lasts as long as the task computed

So turns take half of the time at most.  Every other turn goes to the task that has waited longest,
the others to the lowest rank.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


class Turns:
    """The turns of one mount.

    *pause* sleeps for some seconds while requests are served; *clock* returns seconds.
    """

    def __init__(
        self, pause: Callable[[float], Awaitable[None]], clock: Callable[[], float]
    ) -> None:
        self._pause = pause
        self._clock = clock
        self._waiting: list[tuple[int, trio.Event]] = []  # ranks, in the order of arrival
        self._is_taken = False
        self._given = 0  # turns that waiting tasks got
        self._rest_ends = 0.0

    @asynccontextmanager
    async def turn(self, rank: int) -> AsyncIterator[None]:
        """Compute inside the ``async with`` block, without a wait."""
        await self._take(rank)
        try:
            rest = self._rest_ends - self._clock()
            if rest > 0:
                await self._pause(rest)
            started = self._clock()
            try:
                yield
            finally:
                ended = self._clock()
                self._rest_ends = ended + (ended - started)
        finally:
            self._give()

    async def _take(self, rank: int) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        entry = (rank, trio.Event())
        self._waiting.append(entry)
        try:
            await entry[1].wait()
        except BaseException:
            if entry[1].is_set():  # it was given the turn at the same moment
                self._give()
            else:
                self._waiting.remove(entry)
            raise

    def _give(self) -> None:
        """Give the turn to a waiting task, if there is one."""
        if not self._waiting:
            self._is_taken = False
            return
        self._given += 1
        by_rank = min(range(len(self._waiting)), key=lambda at: self._waiting[at][0])
        _, event = self._waiting.pop(by_rank if self._given % 2 else 0)
        event.set()
