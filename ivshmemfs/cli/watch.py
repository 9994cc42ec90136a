"""`watch`: one line for each change of a file or directory by any machine."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from ivshmemfs.cli.attach.complete import complete_path
from ivshmemfs.cli.attach.paths import Target, reached, resolve, target_of
from ivshmemfs.cli.commits import DOORBELL_HELP, commits
from ivshmemfs.cli.exits import exits
from ivshmemfs.errors import Busy, FsError, Unfinished, UsageError
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

T = TypeVar("T")

DEFAULT_FORMAT = "%e %p%a"
#: Seconds between two attempts while the region is busy.
PAUSE = 0.002


class Event(NamedTuple):
    """One change, as it is printed."""

    event: str
    path: bytes
    inode: int
    directory: bool
    to: bytes | None  # of a move

    def line(self, form: str) -> str:
        """The event in the format of the user."""
        to = "" if self.to is None else os.fsdecode(self.to)
        values = {
            "e": self.event, "p": os.fsdecode(self.path), "t": to, "i": str(self.inode),
            "k": "directory" if self.directory else "file", "a": f" -> {to}" if to else "",
            "%": "%",
        }  # fmt: skip
        parts = form.split("%")
        text = parts[0]
        skip = False
        for part in parts[1:]:
            if skip:  # the second of two percent signs
                text, skip = text + part, False
            elif not part:
                text, skip = text + "%", True
            elif part[0] in values:
                text += values[part[0]] + part[1:]
            else:
                raise UsageError(f"--format: %{part[0]} is not known; see --help")
        return text

    def json(self) -> str:
        """The event as one line of JSON."""
        values: dict[str, object] = {
            "event": self.event, "path": os.fsdecode(self.path), "inode": self.inode,
            "directory": self.directory,
        }  # fmt: skip
        if self.to is not None:
            values["to"] = os.fsdecode(self.to)
        return json.dumps(values)


class View:
    """What one watched argument names, and the events there in the user's words."""

    def __init__(self, fs: Filesystem, target: Target, *, recursive: bool) -> None:
        from ivshmemfs.engine.watched_path import WatchedPath

        self._target = target
        attr = resolve(fs, target.path)
        self._file = b""  # the only name that counts, if a file is watched
        folder = attr.ino
        if not stat.S_ISDIR(attr.mode):
            above, _, self._file = target.path.rpartition(b"/")
            folder = resolve(fs, above).ino
        self._watched = WatchedPath(fs, folder, self._file, recursive=recursive)

    def start(self) -> None:
        """Remember what is there now.  Raises UsageError for too many names."""
        try:
            _patiently(self._watched.begin)
        except FsError as error:
            if error.errno != errno.EOVERFLOW:
                raise
            from ivshmemfs.engine.diff import NAMES_MAX

            raise UsageError(
                f"{os.fsdecode(self._target.shown)} has more than {NAMES_MAX} names"
            ) from None

    def events(self) -> Iterator[Event]:
        """Yield what changed since the last call."""
        for change in _patiently(self._watched.changes):
            to = None if change.to is None else self._named(change.to)
            path = self._named(change.path)
            yield Event(change.kind.value, path, change.ino, change.is_dir, to)

    @property
    def is_over(self) -> bool:
        """Whether nothing is watched any more: the directory was removed."""
        return self._watched.is_over

    def _named(self, inside: bytes) -> bytes:
        if not self._file:
            return self._target.named(inside)
        return self._target.shown[: -len(self._file)] + inside


def _patiently(call: Callable[[], T]) -> T:
    while True:
        try:
            return call()
        except Unfinished:
            continue
        except Busy:
            time.sleep(PAUSE)


MANUAL = Manual(
    examples=(
        Example("ivshmemfs watch -r /mnt/shared", "Print each change in a tree."),
        Example(
            "ivshmemfs watch --json label=hello:/inbox",
            "Print changes as JSON objects, without a mount.",
        ),
    ),
    exits=exits({0: "what was watched is gone"}),
)


@click.command("watch", cls=Command, manual=MANUAL)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_path)
@click.option("-r", "--recursive", is_flag=True, help="Also directories below, and new ones.")
@click.option("--format", "form", default=DEFAULT_FORMAT, metavar="FORMAT",
              help="%e event, %p path, %t new path of a move, %a the same after an arrow, "
              "%i inode, %k file or directory.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--doorbell", metavar="SOCKET", help=DOORBELL_HELP)
def watch_command(
    paths: tuple[str, ...], recursive: bool, form: str, as_json: bool, doorbell: str | None
) -> int:
    """Print a line for each change of PATH by any machine.

    PATH is a file or a directory: on a mount, or REGION:/path, which needs no mount.  All PATHs are
    in one region.  Nothing is stored in it, but for the number of a doorbell.  Changes that follow
    each other within milliseconds come as their sum: of a file that came and went nothing is told.

    \b
    Events: created, removed, moved, changed (contents), attributes,
    overflow (changes are missing: list the directories).
    """
    targets = [target_of(path) for path in paths]
    if len({target.region for target in targets}) > 1:
        raise UsageError("all paths must be in one region: start a command for each")
    Event("", b"", 0, False, None).line(form)  # refuses a bad format before anything happens
    with reached(targets[0], readonly=True, waits=True, doorbell=doorbell) as fs:
        views = [View(fs, target, recursive=recursive) for target in targets]
        for view in views:
            view.start()
        for _ in commits(fs):
            for view in views:
                for event in view.events():
                    say(event.json() if as_json else event.line(form))
            views = [view for view in views if not view.is_over]
            if not views:
                return 0
    return 0
