"""`python -m ivshmemfs`, and the entry points of all commands.

Each prepares for signals and closed streams before it loads the command, which takes a while.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while `command` is loaded

import importlib
import sys
from collections.abc import Callable

from ivshmemfs import command
from ivshmemfs.errors import UnfitMachine


def _main(module: str, name: str, unfit: int) -> Callable[[], None]:
    """Return the `main` of a command; ends in one line on a machine that cannot use a region."""
    try:
        main: Callable[[], None] = importlib.import_module(module).main
    except UnfitMachine as error:
        command.complain(name, str(error))
        sys.exit(unfit)
    except MemoryError:
        command.complain(name, "out of memory")
        sys.exit(unfit)
    return main


def ivshmemfs() -> None:
    """Run `ivshmemfs`, or under the name of a mount helper its subcommand `mount`."""
    command.begin("ivshmemfs", interrupted=8)
    _main("ivshmemfs.cli.main", "ivshmemfs", unfit=2)()


def mkfs() -> None:
    """Run `mkfs.ivshmemfs`."""
    command.begin("mkfs.ivshmemfs", interrupted=1)
    _main("mkfs.main", "mkfs.ivshmemfs", unfit=1)()


def fsck() -> None:
    """Run `fsck.ivshmemfs`."""
    command.begin("fsck.ivshmemfs", interrupted=32)
    _main("ivshmemfs.fsck.main", "fsck.ivshmemfs", unfit=8)()


if __name__ == "__main__":
    ivshmemfs()
