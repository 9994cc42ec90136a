"""Exit codes of the subcommands, as --help and the manual page explain them.

They are those of mount(8).  ivshmemfs/errors.py says which error gives which.
"""

from __future__ import annotations

from collections.abc import Mapping

COMMON = {
    0: "done",
    1: "wrong usage, or refused",
    2: "the operation failed: no such file, no permission, no space",
    4: "internal error: please report it",
    8: "interrupted by a signal",
    32: "the region cannot be opened, or carries no filesystem",
}
PARTLY = "done, but something was left out"
#: Exit code when all went well but something was left out; mount(8) calls it "some succeeded".
EXIT_PARTLY = 64


def exits(own: Mapping[int, str] = {}) -> dict[int, str]:  # never changed
    """Return all exit codes of a command with its `own`, in order."""
    return dict(sorted({**COMMON, **own}.items()))
