"""Sleeps of a mount's tasks that end when another machine rings.

    deaf      there is no doorbell, or it is lost: tasks nap, as before
    ringing   `run` waits for rings of the doorbell, and calls each listener

A task announces the mount, looks again, and then sleeps (`shm/bells.py` has the order).  All tasks
share one doorbell, so `run` alone forgets rings.  It rests after a ring without a commit.  `Naps`
are those of a task that looks for commits again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from ivshmemfs.errors import IvshmemfsError

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

#: Seconds of rest after a ring without a commit: such rings cost no more than polling.
REST: Final = 0.004
#: Looks without a commit before a task sleeps until a ring: commits come in rows.
IDLE_LOOKS: Final = 5
#: Maximum seconds of that sleep: a ring may be lost.
SLEEP_SECONDS: Final = 1.0


class Wakeups:
    """The rings of one mount's doorbell."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        self._bells = fs.bells
        self._listeners: list[Callable[[], None]] = []

    def on_ring(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each ring."""
        self._listeners.append(listener)

    def announce(self) -> bool:
        """Let the next commit ring; whether it will.  The caller looks again before it sleeps.

        False where the region cannot be reached any more: the caller finds that out by itself.
        """
        try:
            return self._bells is not None and self._bells.announce()
        except (IvshmemfsError, OSError):
            return False

    async def run(self) -> None:
        """Wait for rings as long as there is a doorbell."""
        bells = self._bells
        if bells is None:
            return
        word = 0
        while (descriptor := bells.doorbell.fileno()) >= 0 and bells.doorbell.keep():
            await trio.lowlevel.wait_readable(descriptor)
            bells.doorbell.quiet()
            for listener in self._listeners:
                listener()
            before, word = word, _commit_word(self._fs)
            if before == word:
                await trio.sleep(REST)


def _commit_word(fs: Filesystem) -> int:
    """Return the commit word; 0, which no commit has, where the region cannot be read any more."""
    try:
        return fs.commit_word()
    except (IvshmemfsError, OSError):  # the upkeep says why
        return 0


class Naps:
    """The naps of one task between its looks at the commit word.

    Each takes *seconds*.  After IDLE_LOOKS of them, and where bells work, it sleeps until a ring.
    """

    def __init__(self, fs: Filesystem, seconds: float, wakeups: Wakeups | None = None) -> None:
        self._fs = fs
        self._seconds = seconds
        self._wakeups = wakeups
        self._woken = trio.Event()
        self._idle = 0  # looks in a row that found nothing to do
        if wakeups is not None:
            wakeups.on_ring(self.wake)

    def wake(self) -> None:
        """End a sleep; the next naps are short."""
        self._woken.set()
        self._idle = 0

    async def nap(self, word: int, *, busy: bool = False) -> bool:
        """Nap; or sleep if the commit word is still *word*, unless *busy*.  Whether it slept."""
        self._idle += 1
        if not busy and self._idle >= IDLE_LOOKS and self._announced(word):
            self._woken = trio.Event()
            with trio.move_on_after(SLEEP_SECONDS):
                await self._woken.wait()
            return True
        await trio.sleep(self._seconds)
        return False

    def _announced(self, word: int) -> bool:
        """Announce the mount; whether the next commit rings, and is still to come."""
        announced = self._wakeups is not None and self._wakeups.announce()
        return announced and _commit_word(self._fs) == word
