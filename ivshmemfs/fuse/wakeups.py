"""Sleeps of a mount's tasks that end when another machine rings.

    deaf      there is no doorbell, or it is lost: tasks nap, as before
    ringing   `run` waits for rings of the doorbell, and calls each listener

A task announces the mount, looks again, and then sleeps (`shm/bells.py` has the order).  All tasks
share one doorbell, so `run` alone forgets rings.  It rests after a ring without a commit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

#: Seconds of rest after a ring without a commit: such rings cost no more than polling.
REST: Final = 0.004


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
        """Let the next commit ring; whether it will.  The caller looks again before it sleeps."""
        return self._bells is not None and self._bells.announce()

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
            before, word = word, self._fs.commit_word()
            if before == word:
                await trio.sleep(REST)
