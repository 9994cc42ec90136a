"""`python -m ivshmemfs`, and the entry points of all commands.

Each prepares for signals and closed streams before it loads the command, which takes a while.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while `command` is loaded

from ivshmemfs import command


def ivshmemfs() -> None:
    """Run `ivshmemfs`, or under the name of a mount helper its subcommand `mount`."""
    command.begin("ivshmemfs", interrupted=8)
    with command.loading("ivshmemfs", failed=2):
        from ivshmemfs.cli.main import main
    command.conclude(main)


def mkfs() -> None:
    """Run `mkfs.ivshmemfs`."""
    command.begin("mkfs.ivshmemfs", interrupted=1)
    with command.loading("mkfs.ivshmemfs", failed=1):
        from mkfs.main import main
    command.conclude(main)


def fsck() -> None:
    """Run `fsck.ivshmemfs`."""
    command.begin("fsck.ivshmemfs", interrupted=32)
    with command.loading("fsck.ivshmemfs", failed=8):
        from ivshmemfs.fsck.main import main
    command.conclude(main)


if __name__ == "__main__":
    ivshmemfs()
