"""What all commands share: their start, their standard streams, and how they end.

Every entry point calls `begin` before it imports anything else, then `run`, and last `conclude`:

    state       SIGINT, SIGTERM or SIGHUP                       who changes it
    loading     one line, and the process ends at once          `begin`
    running     Interrupted is raised: the command cleans up    `run`
    cleaning    ignored for CLEANING seconds, then it ends      the first signal
    done        ignored: the exit code is known                 `run`, once the command has ended

`run` turns every exception into one line on standard error and an exit code.  This module imports
next to nothing, so that the time before `begin` is as short as it can be.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple, NoReturn

from ivshmemfs.errors import Interrupted, IvshmemfsError, OutputError, UsageError
from ivshmemfs.printing import say

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: New objects until the first collection of garbage.  What modules make stays.  With Python's 700
#: the collector looks through it again and again, for 5 % of a short command's time.
_COLLECTED = 20_000
#: Seconds that a command has to clean up after a signal, before another one ends it at once.
CLEANING = 1.0


class Exits(NamedTuple):
    """Exit codes of a command; an error's own code counts where `own` is True."""

    usage: int
    system: int
    interrupted: int
    internal: int
    own: bool = False

    def of(self, error: IvshmemfsError) -> int:
        """The exit code for `error`."""
        if self.own:
            return error.exit_code
        return self.usage if isinstance(error, UsageError) else self.system


# --- the start ------------------------------------------------------------------------------


def begin(name: str, interrupted: int) -> None:
    """Open the standard streams that are closed, and let a signal end the process in one line."""
    open_streams()

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        with suppress(OSError):
            os.write(2, f"{name}: interrupted\n".encode())
        os._exit(interrupted)

    _handle_signals(end)
    gc.set_threshold(_COLLECTED, *gc.get_threshold()[1:])


@contextmanager
def loading(name: str, failed: int) -> Iterator[None]:
    """Import a command; one line and the exit code `failed` where this machine cannot run it."""
    try:
        yield
    except (IvshmemfsError, ImportError, MemoryError) as error:
        complain(name, str(error) or "out of memory")
        sys.exit(failed)


def _handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup(1) and a shell's & leave it
            signal.signal(number, handler)


class _Interruption:
    """What a signal does to a running command.

    timeout(1) sends each signal twice, and users press Ctrl-C again.  So the first signal alone
    raises Interrupted; it must not be raised again in the midst of cleaning up.
    """

    def __init__(self, code: int) -> None:
        self._code = code
        self._first = 0.0

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._first:
            self._first = now
            raise Interrupted
        if now - self._first > CLEANING:
            os._exit(self._code)


def _ignore_signals() -> None:
    for number in _ENDING:
        if isinstance(signal.getsignal(number), _Interruption):
            signal.signal(number, signal.SIG_IGN)


def open_streams() -> None:
    """Open the wrong end of a pipe for each standard descriptor that is closed.

    Otherwise the region or the FUSE connection would get its number, and what is printed would go
    there.  The wrong end can be neither read nor written, as a closed descriptor.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _occupy(number)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115


def _occupy(number: int) -> None:
    """Open `number`, the lowest free descriptor; 0 cannot be read, and the others not written."""
    _reading, writing = os.pipe()  # the first one gets the lowest number
    if number == 0:
        os.dup2(writing, number)
    os.close(writing)
    os.set_inheritable(number, True)


class _Output(io.FileIO):
    """Standard output; a failure to write it is told from the failures of everything else."""

    def write(self, data: object) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"write error: standard output: {error.strerror}") from None


def _name_output_errors() -> None:
    """Let a failure to print raise OutputError, unless a test has put its own stream there."""
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output(1, "w", closefd=False)),
            encoding=sys.stdout.encoding,
            errors="backslashreplace",
            line_buffering=sys.stdout.line_buffering,
        )


def tell_systemd() -> None:
    """Say that the service is ready, if systemd started it as Type=notify (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    import socket

    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        notify.send(b"READY=1")


# --- the end --------------------------------------------------------------------------------


def run(name: str, command: Callable[[], int | None], exits: Exits) -> int:
    """Run `command`; returns the exit code: what it returns, or the error's."""
    with suppress(ValueError):  # not in the main thread
        if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN, None):
            _handle_signals(_Interruption(exits.interrupted))
    try:
        try:
            _name_output_errors()
            result = command()
            sys.stdout.flush()
            _ignore_signals()
            return result if isinstance(result, int) else 0
        except BaseException as error:
            _ignore_signals()
            return _failed(name, error, exits)
    except Interrupted as late:  # by a signal just before they were ignored
        return _failed(name, late, exits)


def conclude(main: Callable[[], None]) -> NoReturn:
    """Run `main`, and end the process with the exit code that it leaves with.

    What a command holds is given back by then, and the exit functions are called here.  Python
    would go on to free every single object, which is 15 % of a short command's time.
    """
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    threads = sys.modules.get("threading")
    if not isinstance(code, int) or (threads and threads.active_count() > 1):
        sys.exit(code)  # type: ignore[arg-type]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _failed(name: str, error: BaseException, exits: Exits) -> int:
    """Complain about `error` in one line; returns the exit code."""
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        complain(name, "interrupted")
        return exits.interrupted
    if isinstance(error, BrokenPipeError):  # the reader has seen enough, as `head` has
        _abandon_output()
        return exits.system
    if isinstance(error, OutputError):
        _abandon_output()
    if isinstance(error, (IvshmemfsError, OSError)):
        complain(name, reason(error))
        return exits.of(error) if isinstance(error, IvshmemfsError) else exits.system
    if isinstance(error, MemoryError):
        complain(name, "out of memory")
        return exits.system
    return _refused(name, error, exits)


def _refused(name: str, error: BaseException, exits: Exits) -> int:
    """The same for click's exceptions, and for bugs."""
    import click

    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # click 8.2
        for line in error.format_message().splitlines():  # type: ignore[attr-defined]
            say(line, err=True)
        return exits.usage
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx is not None else name
        complain(name, f"{error.format_message().rstrip('.')} (see '{command} --help')")
        return exits.usage
    if isinstance(error, click.ClickException):
        complain(name, error.format_message())
        return exits.usage
    if isinstance(error, click.Abort):
        complain(name, "interrupted")
        return exits.interrupted
    if os.environ.get("IVSHMEMFS_DEBUG"):
        import traceback

        traceback.print_exception(error)
    complain(name, f"internal error, please report it: {type(error).__name__}: {error}")
    return exits.internal


def reason(error: IvshmemfsError | OSError) -> str:
    """What an error says, without a number."""
    if isinstance(error, IvshmemfsError):
        return str(error) or type(error).__name__
    if error.strerror is None:
        return str(error)
    if error.filename is None:
        return error.strerror
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


def _abandon_output() -> None:
    """Let what is still buffered for standard output go nowhere, in silence."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def complain(name: str, text: str) -> None:
    """Print one line on standard error, if it can be written at all; escapes control characters."""
    with suppress(OSError, ValueError):
        say(f"{name}: {' '.join(text.split())}", err=True)
