"""What a copy tells while it runs: how far it is, and what it leaves out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ivshmemfs.printing import printable, say

if TYPE_CHECKING:
    from rich.progress import Progress

#: Seconds after which a copy shows how far it is.
LONG = 1.0


class Meter:
    """A progress bar on a terminal, once a copy takes long; a line for what is left out."""

    def __init__(self, *, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._since = time.monotonic()
        self._bar: Progress | None = None
        #: How many files were left out.
        self.left_out = 0

    def add(self, name: bytes, done: int, size: int) -> None:
        """So many bytes of a file are there."""
        if not self._shown or time.monotonic() - self._since < LONG:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TransferSpeedColumn,
            )

            name_column = TextColumn("{task.description}", markup=False)
            columns = (name_column, BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("")
            self._bar.start()
        text = printable(os.fsdecode(name))
        self._bar.update(self._bar.task_ids[0], description=text, completed=done, total=size)

    def leave_out(self, path: bytes, why: str) -> None:
        """Say that something is not copied, and count it."""
        self.left_out += 1
        say(f"ivshmemfs: {os.fsdecode(path)}: left out: {why}", err=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def metered(*, quiet: bool) -> Iterator[Meter]:
    """A meter for the time of a `with`."""
    meter = Meter(quiet=quiet)
    try:
        yield meter
    finally:
        meter.close()
