"""`map`: a file as shared memory of programs, which find it by its offset in the region."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

import click

from ivshmemfs.cli.attach.complete import complete_path
from ivshmemfs.cli.attach.making import make_fixed
from ivshmemfs.cli.attach.names import region_of
from ivshmemfs.cli.attach.paths import about, attributes, target_of
from ivshmemfs.cli.attach.peer import patiently, peer
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.output import JSON_HELP, show, show_json
from ivshmemfs.errors import RegionError, UsageError
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import printable, say, shown
from ivshmemfs.region import exact_size, open_region, parse_size

if TYPE_CHECKING:
    from ivshmemfs.cli.attach.paths import Target
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.region import Region

MANUAL = Manual(
    examples=(
        Example(
            "ivshmemfs map --create 1M /mnt/shared/counters",
            "Make a file that programs of all machines map, and print where it is.",
        ),
        Example("ivshmemfs map label=hello:/counters", "Print where it is, without a mount."),
        Example(
            "ivshmemfs map --c /mnt/shared/counters",
            "Print the same as a header for C programs on this machine.",
        ),
        Example(
            "ivshmemfs map --release /mnt/shared/counters && rm /mnt/shared/counters",
            "Remove it, once the programs that use it have ended.",
        ),
    ),
    exits=exits({1: "wrong usage, or refused: a peer has the file open"}),
)


class Mapping(NamedTuple):
    """How mmap(2) finds a file's bytes on this machine; bytes."""

    path: str
    offset: int  # for mmap(2) of `path`
    region_offset: int  # from the start of the region, or of the BAR
    size: int


@click.command("map", cls=Command, manual=MANUAL)
@click.argument("file", shell_complete=complete_path)
@click.option("--create", "size", metavar="SIZE",
              help="Make the file of zeros, unless it is there with that size.")  # fmt: skip
@click.option("--release", is_flag=True, help="Make it an ordinary file, which can be removed.")
@click.option("--force", is_flag=True, help="With --release: also if a peer has it open.")
@click.option("--c", "as_c", is_flag=True, help="Print a header for C.")
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def map_command(
    file: str, size: str | None, release: bool, force: bool, as_c: bool, as_json: bool
) -> None:
    """Print where the bytes of FILE are, for programs that share them as memory.

    FILE is on a mount, or REGION:/path.  `--create` makes it: one row of bytes that keeps its
    place, so programs of all machines map it and change it without ivshmemfs.  SIZE is rounded up
    to 4096 bytes.  Reads and writes of the file through a mount work on the same bytes; they are
    not atomic.  The file keeps its size, and cannot be removed before `--release`.
    """
    if release and (size is not None or as_c or as_json):
        raise UsageError("--release goes with no option but --force")
    if force and not release:
        raise UsageError("--force goes with --release")
    target = target_of(file)
    wanted = None if size is None else parse_size(size)
    writes = release or wanted is not None
    from ivshmemfs.format.superblock import identify

    with (
        open_region(region_of(target.region), readonly=not writes, identify=identify) as region,
        peer(region, readonly=not writes) as fs,
        about(lambda: target.shown),
    ):
        if release:
            _release(fs, target, force=force)
            return
        if wanted is not None:
            make_fixed(fs, target, wanted)
        mapping = _mapping(region, fs, target, wanted)
    if as_json:
        show_json({"file": mapping.path, **_numbers(mapping)})
    elif as_c:
        _print_header(mapping, os.path.basename(os.fsdecode(target.path)))
    else:
        rows = [("file", printable(mapping.path))]
        rows += [
            (name.replace("_", " "), f"{at} ({at:#x})") for name, at in _numbers(mapping).items()
        ]
        show(rows)


def _numbers(mapping: Mapping) -> dict[str, int]:
    return {name: value for name, value in mapping._asdict().items() if name != "path"}


def _release(fs: Filesystem, target: Target, *, force: bool) -> None:
    from ivshmemfs.engine import fixed

    ino = attributes(fs, target).ino
    if not patiently(lambda: fs.change(lambda tx: fixed.release(tx, ino, force=force))):
        raise UsageError(f"{shown(target.shown)}: it is an ordinary file already")


def _mapping(region: Region, fs: Filesystem, target: Target, wanted: int | None) -> Mapping:
    from ivshmemfs.engine import fixed

    ino = attributes(fs, target).ino
    extent = patiently(lambda: fs.look(lambda view: fixed.extent(view, ino)))
    if wanted is not None and extent.size != fixed.whole_pages(wanted):
        raise UsageError(
            f"{shown(target.shown)}: it is there already, with {exact_size(extent.size)}"
        )
    if region.start is None:
        raise RegionError(
            f"{shown(target.shown)}: a device of vfio has no file to map; bind another driver to "
            f"it, or add {extent.offset} to where your program maps its BAR 2"
        )
    offset = region.start + extent.offset
    return Mapping(str(region.path), offset, extent.offset, extent.size)


def _print_header(mapping: Mapping, name: str) -> None:
    """Print #define lines; the name of the file becomes their prefix."""
    prefix = re.sub("[^A-Z0-9]", "_", os.path.splitext(name)[0].upper())
    if not prefix or prefix[0].isdigit():
        prefix = f"MAP_{prefix}"
    text = mapping.path.replace("\\", "\\\\").replace('"', '\\"')
    say(f"/* mmap(NULL, {prefix}_SIZE, ..., MAP_SHARED, open({prefix}_FILE), {prefix}_OFFSET) */")
    say(f'#define {prefix}_FILE "{text}"')
    say(f"#define {prefix}_OFFSET {mapping.offset:#x}ULL")
    say(f"#define {prefix}_SIZE {mapping.size:#x}ULL")
