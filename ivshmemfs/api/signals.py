"""Signals wait while a call of the engine runs.

Python runs signal handlers in the main thread between any two bytecodes.  A handler that raises,
as that of Ctrl-C, would end a call of the engine between a store and the note of it.  The peer
would then no longer know the state of its own slot.

    NOT CALLING   the program's handlers are in place
    CALLING       `deferred` has put `note` in their place; the signals that come are noted
    then          the handlers are back, and the noted signals are raised again

Only `deferred` changes the state.  Other threads run no handlers, so they skip all of it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed knows only the module above it
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

#: Signals whose handlers may raise: those of terminals, timers and administrators.
NUMBERS = tuple(
    map(
        int,
        (
            signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM,
            signal.SIGVTALRM, signal.SIGPROF, signal.SIGUSR1, signal.SIGUSR2,
        ),
    )
)  # fmt: skip

# The functions below those of the module `signal`, which spend a microsecond on enumerations.
_get: Callable[[int], Any] = _signal.getsignal
_set: Callable[[int, Any], Any] = _signal.signal

_Kept = list[tuple[int, Any]]


def deferred(call: Callable[[], T]) -> T:
    """Return what `call` returns; a signal that comes meanwhile is handled right after it."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    kept: _Kept = []
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        noted.append(number)

    try:
        for number in NUMBERS:
            handler = _get(number)
            if callable(handler):
                kept.append((number, handler))
                _set(number, note)
        return call()
    finally:
        _restore(kept, noted)


def _restore(kept: _Kept, noted: list[int]) -> None:
    """Put the handlers back and raise what was noted; a handler that raises delays neither."""
    try:
        while kept:
            number, handler = kept[-1]
            _set(number, handler)
            kept.pop()
        while noted:
            signal.raise_signal(noted.pop())
    finally:
        if kept or noted:
            _restore(kept, noted)
