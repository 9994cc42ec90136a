"""`watch`: one line for each change of a file or directory by any machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from ivshmemfs.cli.attach.complete import complete_path
from ivshmemfs.cli.attach.paths import Target, reached, resolve, target_of
from ivshmemfs.cli.commits import commits
from ivshmemfs.cli.exits import exits
from ivshmemfs.errors import Busy, Unfinished, UsageError
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.engine.diff import Change

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
    """What one watched argument names, and the paths of the directories below it."""

    def __init__(self, fs: Filesystem, target: Target, *, recursive: bool) -> None:
        from ivshmemfs.engine.diff import Watcher

        self._target = target
        attr = resolve(fs, target.path)
        self._file = b""  # the only name that counts, if a file is watched
        folder, path = attr.ino, b""
        if attr.mode & 0o170000 != 0o040000:
            above, _, self._file = target.path.rpartition(b"/")
            folder, path = resolve(fs, above).ino, b""
        self._paths: dict[int, bytes] = {folder: path}
        self._base = folder
        self._early: list[Change] = []  # what changed while the names were remembered
        self._watcher = Watcher(fs, recursive=recursive and not self._file)

    def start(self) -> None:
        """Remember what is there now.  Raises UsageError for too many names."""
        from ivshmemfs.engine.diff import NAMES_MAX, Kind

        self._watcher.watch(self._base)
        self._early = _patiently(self._watcher)
        if any(change.kind is Kind.OVERFLOW for change in self._early):
            raise UsageError(f"{os.fsdecode(self._target.shown)} has more than {NAMES_MAX} names")

    def events(self) -> Iterator[Event]:
        """Yield what changed since the last call."""
        from ivshmemfs.engine.diff import Kind

        found = self._early + _patiently(self._watcher)
        self._early = []
        if any(change.kind is Kind.OVERFLOW for change in found):
            yield Event(Kind.OVERFLOW.value, self._target.shown, self._base, True, None)
            self.start()
            return
        for change in found:
            if self._counts(change):
                yield self._event(change)
        for change in found:
            if change.is_dir:
                self._paths = {self._base: b""}  # paths below may be other ones now
                break

    @property
    def is_over(self) -> bool:
        """Whether nothing is watched any more: the directory was removed."""
        return self._base not in self._watcher.folders

    def _counts(self, change: Change) -> bool:
        if not self._file:
            return True
        return self._file in (change.name, change.to[1] if change.to is not None else b"")

    def _event(self, change: Change) -> Event:
        path = self._path(change.folder, change.name)
        to = None if change.to is None else self._path(*change.to)
        return Event(change.kind.value, path, change.ino, change.is_dir, to)

    def _path(self, folder: int, name: bytes) -> bytes:
        if self._file:
            above = self._target.shown[: -len(self._file)] if name != self._file else b""
            return above + name if name != self._file else self._target.shown
        above = self._folder_path(folder)
        return self._target.named(above + b"/" + name if above else name)

    def _folder_path(self, folder: int) -> bytes:
        known = self._paths.get(folder)
        if known is None:
            places = sorted(self._watcher.names_of(folder))
            if not places:
                return b"?"  # it was removed in the same moment
            above = self._folder_path(places[0][0])
            known = above + b"/" + places[0][1] if above else places[0][1]
            self._paths[folder] = known
        return known


def _patiently(watcher: object) -> list[Change]:
    from ivshmemfs.engine.diff import Watcher

    assert isinstance(watcher, Watcher)
    while True:
        try:
            return watcher.changes()
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
def watch_command(paths: tuple[str, ...], recursive: bool, form: str, as_json: bool) -> int:
    """Print a line for each change of PATH by any machine.

    PATH is a file or a directory: on a mount, or REGION:/path, which needs no mount.  All PATHs are
    in one region.  Nothing is stored in the region.  Changes that follow each other within
    milliseconds come as their sum: of a file that came and went nothing is told.

    \b
    Events: created, removed, moved, changed (contents), attributes,
    overflow (changes are missing: list the directories).
    """
    targets = [target_of(path) for path in paths]
    if len({target.region for target in targets}) > 1:
        raise UsageError("all paths must be in one region: start a command for each")
    Event("", b"", 0, False, None).line(form)  # refuses a bad format before anything happens
    with reached(targets[0], readonly=True) as fs:
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
