"""Signals wait while a call of the engine runs.

Python runs signal handlers in the main thread between any two bytecodes.  A handler that raises,
as that of Ctrl-C, would end a call of the engine between a store and the note of it.  The peer
would then no longer know the state of its own slot.

    NOT CALLING   the program's handlers are in place
    CALLING       `deferred` has put `_note` in their place; the signals that come are noted
    then          the handlers are back, and the noted signals are raised again

Only `deferred` changes the state.  Other threads run no handlers, so they skip all of it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # typeshed knows only the module above it
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

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

# Only the main thread uses these.
_handlers: list[Any] = []  # all handlers at the last call
_running: _Kept = []  # those of them that can run
_noted: list[int] = []  # signals that came during the present call


def _note(number: int, _frame: FrameType | None) -> None:
    _noted.append(number)


def _present() -> _Kept:
    """Return (number, handler) of each handler that can run now."""
    global _handlers, _running
    handlers = list(map(_get, NUMBERS))
    if handlers != _handlers:
        pairs = zip(NUMBERS, handlers, strict=True)
        # Within another call `_note` is there already.
        _running = [(n, h) for n, h in pairs if callable(h) and h is not _note]
        _handlers = handlers
    return _running


def deferred(call: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
    """Return what `call` returns; a signal that comes meanwhile is handled right after it."""
    if threading.current_thread() is not threading.main_thread():
        return call(*arguments)
    kept = _present()
    try:
        for number, _ in kept:
            _set(number, _note)
        return call(*arguments)
    finally:
        if kept:
            _restore(kept.copy())


def _restore(kept: _Kept) -> None:
    """Put the handlers back and raise what was noted; a handler that raises delays neither.

    A handler may have called the engine before the call around it has put back all handlers.  That
    call raises what is noted for the rest of them.
    """
    try:
        while kept:
            number, handler = kept[-1]
            _set(number, handler)
            kept.pop()
        while _noted and (due := _due()):
            _noted.remove(due[-1])
            signal.raise_signal(due[-1])
    finally:
        if kept or (_noted and _due()):
            _restore(kept)


def _due() -> list[int]:
    """Return the signals that were noted and whose handlers are back."""
    return [number for number in _noted if _get(number) is not _note]
