"""`get` and `put`: copy files and trees between a region and the local disk, without a mount.

`put` becomes one more peer of the region for as long as it copies; `get` only looks and stores
nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ivshmemfs.cli.attach.complete import complete_any_region, complete_inside
from ivshmemfs.cli.attach.paths import Place, found, needed, resolve
from ivshmemfs.cli.attach.peer import attached
from ivshmemfs.cli.exits import EXIT_PARTLY, PARTLY, exits
from ivshmemfs.cli.transfer.meter import metered
from ivshmemfs.errors import ForeignFormat, NotFormatted, RegionSize, UsageError
from ivshmemfs.manual import Command, Example, Manual

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

#: The name for standard input or output.
STREAM = b"-"


def _path(_: click.Context, __: click.Parameter, value: str) -> bytes:
    """A path as bytes; unlike click.Path it does not look whether anything is there."""
    return os.fsencode(value)


def _paths(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(os.fsencode(value) for value in values)


def _options(command: Callable[..., int]) -> Callable[..., int]:
    for decorate in (
        click.option("-q", "--quiet", is_flag=True, help="No progress bar."),
        click.option("-f", "--force", is_flag=True, help="Replace files that exist."),
        click.option("-r", "-R", "--recursive", is_flag=True, help="Copy directories as well."),
        click.argument("destination", callback=_path, shell_complete=complete_inside),
        click.argument(
            "sources",
            nargs=-1,
            metavar="SOURCES...",
            callback=_paths,
            shell_complete=complete_inside,
        ),
        click.argument("region", shell_complete=complete_any_region),
    ):
        command = decorate(command)
    return command


@contextmanager
def _opened(
    spec: str, usage: str, local: tuple[bytes, ...], *, readonly: bool
) -> Iterator[Filesystem]:
    """The filesystem on a region; `usage` tells how the command is written.

    None of the paths `local` may be on a file system that hangs.
    """
    from ivshmemfs.region import refuse_hung

    for path in local:
        if path != STREAM:
            refuse_hung(os.fsdecode(path))
    try:
        with attached(spec, readonly=readonly) as fs:
            yield fs
    except (NotFormatted, ForeignFormat, RegionSize):
        raise NotFormatted(
            f"{spec} is not a region: there is no ivshmemfs filesystem on it (usage: {usage})"
        ) from None


def _last(path: bytes) -> bytes:
    """The last name of a path; raises UsageError when there is none."""
    name = os.path.basename(path.rstrip(b"/"))
    if name in (b"", b".", b".."):
        raise UsageError(f"{os.fsdecode(path)}: name what to copy it to")
    return name


def _single(sources: tuple[bytes, ...], destination: bytes, where: str) -> bytes:
    """The one source that may get a new name; raises UsageError for several."""
    if len(sources) > 1:
        raise UsageError(f"{os.fsdecode(destination)} is not a directory{where}")
    return sources[0]


PUT = Manual(
    examples=(
        Example("ivshmemfs put /dev/shm/hello report.pdf /", "Copy a file to the root."),
        Example("ivshmemfs put -r label=hello src include /backup", "Copy trees."),
        Example("tar -c src | ivshmemfs put /dev/shm/hello - /src.tar", "Store a stream."),
    ),
    exits=exits({EXIT_PARTLY: PARTLY}),
)
GET = Manual(
    examples=(
        Example("ivshmemfs get /dev/shm/hello /report.pdf .", "Copy a file out."),
        Example("ivshmemfs get -r label=hello /backup /srv", "Copy a tree out."),
        Example("ivshmemfs get /dev/shm/hello /src.tar - | tar -x", "Read a file as a stream."),
    ),
    exits=exits({EXIT_PARTLY: PARTLY}),
)


@click.command("put", cls=Command, manual=PUT)
@_options
def put_command(
    region: str,
    sources: tuple[bytes, ...],
    destination: bytes,
    recursive: bool,
    force: bool,
    quiet: bool,
) -> int:
    """Copy local SOURCES to DESTINATION in REGION, without a mount.

    DESTINATION counts from the region's root.  Several sources, or an existing directory: they go
    into it.  Mode, times, hard links and, as root, owners are kept.  The source - is standard
    input.  Without -r symbolic links are followed, with -r they are copied, as by cp.
    """
    from ivshmemfs.cli.transfer.put import Putter

    usage = "ivshmemfs put REGION FILE... DESTINATION"
    needed(sources, destination, usage)
    with _opened(region, usage, sources, readonly=False) as fs, metered(quiet=quiet) as meter:
        putter = Putter(fs, meter, recursive=recursive, force=force)
        into = found(fs, destination)
        if into is not None and stat.S_ISDIR(into.mode):
            for source in sources:
                if source == STREAM:
                    raise UsageError("standard input has no name: name the file to make of it")
                putter.copy(source, Place(into.ino, _last(source), destination))
        else:
            source = _single(sources, destination, f" in {region}")
            place = _new_place(fs, region, source, destination)
            if source == STREAM:
                putter.copy_stream(0, place)
            else:
                putter.copy(source, place)
        return EXIT_PARTLY if meter.left_out else 0


def _new_place(fs: Filesystem, region: str, source: bytes, destination: bytes) -> Place:
    """Where in the region a source goes under a new name."""
    if destination.endswith(b"/") and (source == STREAM or not os.path.isdir(source)):
        raise UsageError(f"{os.fsdecode(destination)} is not a directory in {region}")
    name = _last(destination)
    above = os.path.dirname(destination.rstrip(b"/"))
    return Place(resolve(fs, above).ino, name, above)


@click.command("get", cls=Command, manual=GET)
@click.option("--devices", is_flag=True, help="Make device nodes, fifos and sockets as well.")
@click.option("--preserve-special", "special", is_flag=True, help="Keep set-ID and sticky bits.")
@_options
def get_command(
    region: str,
    sources: tuple[bytes, ...],
    destination: bytes,
    recursive: bool,
    force: bool,
    quiet: bool,
    devices: bool,
    special: bool,
) -> int:
    """Copy SOURCES in REGION to the local DESTINATION, without a mount.

    SOURCES count from the region's root.  Several sources, or an existing directory: they go into
    it.  The destination - is standard output.  Mode, times, hard links and, as root, owners are
    kept.  Nothing is stored in the region.

    The region is not trusted: no name in it makes the command write outside of DESTINATION.  Only
    files, directories and symbolic links are made, without set-user-ID, set-group-ID and, on
    files, sticky bits.

    What is left out is named on standard error, one line each.
    """
    from ivshmemfs.cli.transfer.get import Getter, Wishes
    from ivshmemfs.cli.transfer.local import Folder

    usage = "ivshmemfs get REGION FILE... DESTINATION"
    needed(sources, destination, usage)
    with _opened(region, usage, (destination,), readonly=True) as fs, metered(quiet=quiet) as meter:
        getter = Getter(fs, meter, Wishes(recursive, force, devices, special))
        if destination == STREAM:
            for source in sources:
                getter.pour_out(resolve(fs, source), source, 1)
            return 0
        if os.path.isdir(destination):
            with Folder(destination) as folder:
                for source in sources:
                    name = _last(source)
                    getter.copy(resolve(fs, source), folder, name)
        else:
            attr = resolve(fs, _single(sources, destination, ""))
            name = _last(destination)
            if destination.endswith(b"/") and not stat.S_ISDIR(attr.mode):
                raise UsageError(f"{os.fsdecode(destination)} is not a directory")
            with Folder(os.path.dirname(destination.rstrip(b"/"))) as folder:
                getter.copy(attr, folder, name)
        return EXIT_PARTLY if meter.left_out else 0
