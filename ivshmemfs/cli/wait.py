"""`wait`: until a name exists, is gone, or changes; any machine may change it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ivshmemfs.cli.attach.complete import complete_path
from ivshmemfs.cli.attach.paths import Target, found, reached, target_of
from ivshmemfs.cli.commits import DOORBELL_HELP, commits
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.seconds import Seconds
from ivshmemfs.errors import Busy
from ivshmemfs.manual import Command, Example, Manual

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

#: Exit code when the time is over, as timeout(1) has it.
TIMED_OUT = 124


MANUAL = Manual(
    examples=(
        Example(
            "ivshmemfs wait --timeout 60 /mnt/shared/result && cat /mnt/shared/result",
            "Read what another machine makes, once it is there.",
        ),
        Example(
            "ivshmemfs wait --gone label=hello:/running", "Wait for a removal, without a mount."
        ),
    ),
    exits=exits({0: "it happened", TIMED_OUT: "the time is over"}),
)


@click.command("wait", cls=Command, manual=MANUAL)
@click.argument("path", shell_complete=complete_path)
@click.option("--exists", "condition", flag_value="exists", default="exists",
              help="Until the name exists (the default).")  # fmt: skip
@click.option("--gone", "condition", flag_value="gone", help="Until the name does not exist.")
@click.option("--changed", "condition", flag_value="changed",
              help="Until contents, attributes or existence differ from now.")  # fmt: skip
@click.option("-t", "--timeout", type=Seconds(), metavar="SECONDS",
              help=f"Give up after so many seconds, with exit code {TIMED_OUT}.")  # fmt: skip
@click.option("--doorbell", metavar="SOCKET", help=DOORBELL_HELP)
def wait_command(path: str, condition: str, timeout: float | None, doorbell: str | None) -> int:
    """Wait for PATH; any machine may change it.

    PATH is on a mount, or REGION:/path, which needs no mount.  Nothing is stored in the region, but
    for the number of a doorbell.
    """
    target = target_of(path)
    with reached(target, readonly=True, waits=True, doorbell=doorbell) as fs:
        end = float("inf") if timeout is None else time.monotonic() + timeout
        before: object = _state(fs, target) if condition == "changed" else None
        for _ in commits(fs, end):
            now = _state(fs, target)
            if condition == "changed":
                happened = now != before
            else:
                happened = (now is not None) == (condition == "exists")
            if happened:
                return 0
    return TIMED_OUT


def _state(fs: Filesystem, target: Target) -> tuple[int, ...] | None:
    """What tells two states of a file apart; None if it does not exist."""
    while True:
        try:
            attr = found(fs, target.path)
        except NotADirectoryError:
            return None
        except Busy:
            continue
        if attr is None:
            return None
        return attr.ino, attr.mode, attr.size, attr.mtime_ns, attr.ctime_ns, attr.nlink
