"""Operations that take several turns, and what each turn costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import IvshmemfsError, Unfinished

MOST_TURNS = 100_000


def finish(call: Callable[[], Any]) -> Any:
    """The result of an operation, however many turns it takes."""
    for _ in range(MOST_TURNS):
        try:
            return call()
        except Unfinished as turn:
            call = turn.go_on or call
    raise AssertionError("it does not end")


class Cost(NamedTuple):
    """What an operation came to."""

    turns: int
    work: int  # of the turn that did most, as the store counts it
    result: Any


def cost_of(fs: Filesystem, call: Callable[[], Any]) -> Cost:
    """Do an operation in as many turns as it takes; an error is a result, too."""
    most = 0
    for turn in range(1, MOST_TURNS):
        before = fs.store.work
        try:
            result = call()
        except Unfinished as unfinished:
            call = unfinished.go_on or call
        except IvshmemfsError as error:
            return Cost(turn, max(most, fs.store.work - before), error)
        else:
            return Cost(turn, max(most, fs.store.work - before), result)
        most = max(most, fs.store.work - before)
    raise AssertionError("it does not end")
