"""`mkdir`, `mv` and `rm`: they are peers of the region while they change names in it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from ivshmemfs.cli.attach.complete import complete_path
from ivshmemfs.cli.attach.making import current_umask, me
from ivshmemfs.cli.attach.names import canonical
from ivshmemfs.cli.attach.paths import (
    Place,
    Target,
    about,
    child,
    found,
    needed,
    place_of,
    reached,
    target_of,
)
from ivshmemfs.cli.attach.peer import Pulse, patiently
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.files.walk import below_first, is_directory
from ivshmemfs.cli.operands import for_each
from ivshmemfs.errors import FsError, UsageError
from ivshmemfs.manual import Command, Example, Manual

if TYPE_CHECKING:
    from ivshmemfs.engine import Attr, Context, Filesystem

MKDIR = Manual(
    examples=(
        Example("ivshmemfs mkdir /dev/shm/hello:/inbox", "Make a directory."),
        Example("ivshmemfs mkdir -p label=hello:/a/b/c", "Make it and those above it."),
    ),
    exits=exits(),
)
MV = Manual(
    examples=(
        Example("ivshmemfs mv pci:/new pci:/old", "Rename a file; refuse if old exists."),
        Example("ivshmemfs mv --force pci:/new pci:/old", "Replace old in one commit."),
        Example("ivshmemfs mv pci:/a pci:/b pci:/done", "Move two files into a directory."),
    ),
    exits=exits(),
)
RM = Manual(
    examples=(
        Example("ivshmemfs rm /dev/shm/hello:/report.pdf", "Remove a file."),
        Example("ivshmemfs rm -r label=hello:/inbox", "Remove a tree."),
    ),
    exits=exits(),
)


# --- mkdir --------------------------------------------------------------------------------------


def _mode(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    with suppress(ValueError):
        if 0 <= (mode := int(value, 8)) <= 0o7777:
            return mode
    raise click.BadParameter(f"{value!r} is not an octal mode, such as 755")


@click.command("mkdir", cls=Command, manual=MKDIR)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_path)
@click.option("-p", "--parents", is_flag=True,
              help="Make directories above PATH as well; PATH may exist.")  # fmt: skip
@click.option("-m", "--mode", callback=_mode, metavar="MODE",
              help="Permissions in octal.  Default: 777 less the umask.")  # fmt: skip
def mkdir_command(paths: tuple[str, ...], parents: bool, mode: int | None) -> int:
    """Make the directories PATH.

    PATH is REGION:/path, or a path on a mount.
    """

    def make(path: str) -> None:
        target = target_of(path)
        with reached(target, readonly=False) as fs:
            if parents:
                _make_above(fs, target)
            if not (parents and _is_there(fs, target)):
                _make(fs, place_of(fs, target), mode)

    return for_each(paths, make)


def _make_above(fs: Filesystem, target: Target) -> None:
    """Make the directories above a path that do not exist."""
    names = target.path.split(b"/")[1:-1]
    for count in range(1, len(names) + 1):
        path = b"/" + b"/".join(names[:count])
        above = Target(target.region, path, path)
        if found(fs, path) is None:
            try:
                _make(fs, place_of(fs, above), None)
            except FileExistsError:  # another machine made it meanwhile
                continue


def _is_there(fs: Filesystem, target: Target) -> bool:
    attr = found(fs, target.path)
    return attr is not None and is_directory(attr)


def _make(fs: Filesystem, place: Place, mode: int | None) -> None:
    maker = me(current_umask() if mode is None else 0)
    bits = 0o777 if mode is None else mode
    with about(lambda: place.path):
        patiently(lambda: fs.mkdir(place.folder, place.name, bits, maker))


# --- mv -----------------------------------------------------------------------------------------


@click.command("mv", cls=Command, manual=MV)
@click.argument("sources", nargs=-1, metavar="SOURCE...", shell_complete=complete_path)
@click.argument("destination", shell_complete=complete_path)
@click.option("-f", "--force", is_flag=True, help="Replace a file that exists.")
def mv_command(sources: tuple[str, ...], destination: str, force: bool) -> int:
    """Move SOURCE to DESTINATION, or into the directory DESTINATION.

    Each is REGION:/path, or a path on a mount; all are in one region.  A move is one commit: other
    machines see the old name or the new one.
    """
    from ivshmemfs.engine import RENAME_NOREPLACE

    needed(sources, destination, "ivshmemfs mv SOURCE... DESTINATION")
    into, moved = target_of(destination), [target_of(source) for source in sources]
    for source in moved:
        if source.region != into.region and canonical(source.region) != canonical(into.region):
            raise UsageError(
                f"{os.fsdecode(source.shown)} and {destination} are not in one region: "
                "copy with 'ivshmemfs get' and 'ivshmemfs put'"
            )
    flags, mover = 0 if force else RENAME_NOREPLACE, me()
    with reached(into, readonly=False) as fs:
        attr = found(fs, into.path)
        folder = attr is not None and is_directory(attr)
        if not folder and (len(moved) > 1 or destination.endswith("/")):
            raise UsageError(f"{destination} is not a directory")

        def move(source: Target) -> None:
            old = place_of(fs, source)
            if folder:
                assert attr is not None
                new = Place(attr.ino, old.name, into.shown)
            else:
                new = place_of(fs, into)
            _move(fs, old, new, flags, mover)

        return for_each(moved, move)


def _move(fs: Filesystem, old: Place, new: Place, flags: int, mover: Context) -> None:
    try:
        patiently(lambda: fs.rename(old.folder, old.name, new.folder, new.name, flags, mover))
    except FsError as error:
        if error.errno == errno.EEXIST:
            raise UsageError(f"{os.fsdecode(new.path)} exists: --force replaces it") from None
        is_source = error.errno == errno.ENOENT
        path = old.path if is_source else new.path
        raise OSError(error.errno, str(error), os.fsdecode(path)) from None


# --- rm -----------------------------------------------------------------------------------------


@click.command("rm", cls=Command, manual=RM)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_path)
@click.option("-r", "-R", "--recursive", is_flag=True, help="Remove what is in a directory first.")
@click.option("-f", "--force", is_flag=True, help="Ignore a PATH that does not exist.")
def rm_command(paths: tuple[str, ...], recursive: bool, force: bool) -> int:
    """Remove the files, links and empty directories PATH.

    PATH is REGION:/path, or a path on a mount.  A file that is open on any machine stays readable
    there.  Each name is removed by a commit of its own.
    """

    def remove(path: str) -> None:
        target = target_of(path)
        with reached(target, readonly=False) as fs:
            remover = Remover(fs, recursive=recursive)
            try:
                place = place_of(fs, target)
                with about(lambda: place.path):
                    attr = child(fs, place.folder, place.name)
            except FileNotFoundError:
                if force:
                    return
                raise
            if recursive and is_directory(attr):
                remover.empty(attr, target.shown)
            remover.remove(place, attr)

    return for_each(paths, remove)


class Remover:
    """Removes names, and shows life meanwhile."""

    def __init__(self, fs: Filesystem, *, recursive: bool) -> None:
        self._fs = fs
        self._recursive = recursive
        self._me = me()
        self._pulse = Pulse(fs)

    def empty(self, attr: Attr, top: bytes) -> None:
        """Remove all that is below a directory; ignores what another machine removes meanwhile."""
        for directory in below_first(self._fs, attr, top):
            path = directory.path
            for name, one in directory.names.items():
                try:
                    self.remove(Place(directory.attr.ino, name, path), one)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ESTALE):
                        raise

    def remove(self, place: Place, attr: Attr) -> None:
        """Remove one name; raises UsageError for a directory that is not empty, OSError."""
        fs, me = self._fs, self._me
        call = fs.rmdir if is_directory(attr) else fs.unlink
        self._pulse.beat()
        try:
            with about(lambda: place.path):
                patiently(lambda: call(place.folder, place.name, me))
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                path = os.fsdecode(place.path)
                if self._recursive:
                    why = "another machine makes files in it: try again"
                else:
                    why = "the directory is not empty: --recursive removes what is in it"
                raise UsageError(f"{path}: {why}") from None
            raise
