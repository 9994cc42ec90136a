"""Commands that take several operands go on after one that fails, as rm(1) and cat(1) do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from ivshmemfs.command import complain, reason
from ivshmemfs.errors import IvshmemfsError, OutputError

FAILED: Final = 2  # exit code after an error of the system
T = TypeVar("T")


def for_each(operands: Iterable[T], call: Callable[[T], None]) -> int:
    """Call `call` with each operand; returns the exit code, the largest of all that failed.

    One line on standard error tells each failure.  What cannot be printed ends it: raises
    OutputError, BrokenPipeError.
    """
    code = 0
    for operand in operands:
        try:
            call(operand)
        except (OutputError, BrokenPipeError):
            raise
        except (IvshmemfsError, OSError) as error:
            complain("ivshmemfs", reason(error))
            code = max(code, error.exit_code if isinstance(error, IvshmemfsError) else FAILED)
    return code
