"""`ls`, `cat`, `du` and `df`: they only look, and store nothing in the region."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ivshmemfs.cli.attach.complete import complete_any_region, complete_path
from ivshmemfs.cli.attach.paths import (
    Target,
    about,
    attributes,
    contents,
    reached,
    region_target_of,
    target_of,
)
from ivshmemfs.cli.attach.peer import patiently
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.files.walk import Directory, above_first, below_first, is_directory, joined
from ivshmemfs.cli.operands import for_each
from ivshmemfs.cli.output import JSON_HELP, show, show_json, table
from ivshmemfs.errors import UsageError
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say, shown
from ivshmemfs.region import readable_size

if TYPE_CHECKING:
    from ivshmemfs.engine import Attr, Filesystem

#: Bytes that `Attr.blocks` counts in.
SECTOR = 512
KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "character device", stat.S_IFBLK: "block device",
}  # fmt: skip

LS = Manual(
    examples=(
        Example("ivshmemfs ls /dev/shm/hello:/", "List the root directory."),
        Example("ivshmemfs ls -lR label=hello:/inbox", "List a tree with attributes."),
        Example("ivshmemfs ls --json pci:/ | jq -r .path", "List for a program."),
    ),
    exits=exits(),
)
CAT = Manual(
    examples=(
        Example("ivshmemfs cat /dev/shm/hello:/notes.txt", "Print a file."),
        Example("ivshmemfs cat pci:/log.1 pci:/log.2 | grep error", "Search in two files."),
    ),
    exits=exits(),
)
DU = Manual(
    examples=(
        Example("ivshmemfs du /dev/shm/hello:/", "Show the size of each directory."),
        Example("ivshmemfs du -s label=hello:/inbox label=hello:/done", "Compare two trees."),
    ),
    exits=exits(),
)
DF = Manual(
    examples=(
        Example("ivshmemfs df /dev/shm/hello", "Show how full a region is."),
        Example("ivshmemfs df --json pci | jq .available", "Print the bytes that are free."),
    ),
    exits=exits(),
)


# --- ls -----------------------------------------------------------------------------------------


@click.command("ls", cls=Command, manual=LS)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_path)
@click.option("-l", "--long", "details", is_flag=True, help="Show attributes as well.")
@click.option("-R", "--recursive", is_flag=True, help="List directories below as well.")
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def ls_command(paths: tuple[str, ...], details: bool, recursive: bool, as_json: bool) -> int:
    """List the files at PATH, or in the directory PATH.

    PATH is REGION:/path, or a path on a mount.  Names that begin with a dot are listed as well.
    Symbolic links are not followed.
    """
    titled = recursive or len(paths) > 1

    def show_one(numbered: tuple[int, str]) -> None:
        number, target = numbered[0], target_of(numbered[1])
        with reached(target, readonly=True) as fs:
            attr = attributes(fs, target)
            if not is_directory(attr):
                _print_entries(fs, [(target.shown, target.shown, attr)], details, as_json)
                return
            walk = above_first(fs, attr, target.shown)
            for count, directory in enumerate(walk):
                if titled and not as_json:
                    if count or number:
                        say("")
                    say(f"{shown(directory.path)}:")
                path = directory.path
                rows = [(name, joined(path, name), one)
                        for name, one in directory.names.items()]  # fmt: skip
                _print_entries(fs, rows, details, as_json)
                if not recursive:
                    break

    return for_each(enumerate(paths), show_one)


def _print_entries(
    fs: Filesystem, rows: list[tuple[bytes, bytes, Attr]], details: bool, as_json: bool
) -> None:
    """Print the name, path and attributes of each of `rows`."""
    if as_json:
        for _name, path, attr in rows:
            show_json(_described(fs, path, attr))
    elif details:
        for line in table([_row(fs, name, path, attr) for name, path, attr in rows]):
            say(line)
    else:
        for name, _path, _attr in rows:
            say(shown(name))


def _row(fs: Filesystem, name: bytes, path: bytes, attr: Attr) -> tuple[str, ...]:
    target = _link_target(fs, path, attr)
    what = shown(name) if target is None else f"{shown(name)} -> {shown(target)}"
    return (
        stat.filemode(attr.mode), str(attr.nlink), str(attr.uid), str(attr.gid), _size(attr),
        _when(attr.mtime_ns), what,
    )  # fmt: skip


def _size(attr: Attr) -> str:
    """The size, or the numbers of a device."""
    if stat.S_ISCHR(attr.mode) or stat.S_ISBLK(attr.mode):
        return f"{os.major(attr.rdev)}, {os.minor(attr.rdev)}"
    return str(attr.size)


def _when(ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return "?"


def _link_target(fs: Filesystem, path: bytes, attr: Attr) -> bytes | None:
    if not stat.S_ISLNK(attr.mode):
        return None
    with about(lambda: path):
        return patiently(lambda: fs.readlink(attr.ino))


def _described(fs: Filesystem, path: bytes, attr: Attr) -> dict[str, object]:
    """The members of a file's JSON object."""
    described: dict[str, object] = {
        "path": os.fsdecode(path),
        "type": KINDS.get(stat.S_IFMT(attr.mode), "unknown"),
        "mode": f"{stat.S_IMODE(attr.mode):04o}",
        "links": attr.nlink,
        "uid": attr.uid,
        "gid": attr.gid,
        "size": attr.size,
        "allocated": attr.blocks * SECTOR,
        "mtime_ns": attr.mtime_ns,
        "inode": attr.ino,
    }
    target = _link_target(fs, path, attr)
    if target is not None:
        described["target"] = os.fsdecode(target)
    return described


# --- cat ----------------------------------------------------------------------------------------


@click.command("cat", cls=Command, manual=CAT)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_path)
def cat_command(paths: tuple[str, ...]) -> int:
    """Print the contents of the files PATH, one after the other.

    PATH is REGION:/path, or a path on a mount.  Symbolic links are not followed.
    """

    def show_one(path: str) -> None:
        target = target_of(path)
        with reached(target, readonly=True) as fs:
            attr = attributes(fs, target)
            if not stat.S_ISREG(attr.mode):
                kind = KINDS.get(stat.S_IFMT(attr.mode), "unknown")
                raise UsageError(f"{os.fsdecode(target.shown)}: it is a {kind}, not a file")
            for piece in _pieces(fs, target, attr):
                sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()

    return for_each(paths, show_one)


def _pieces(fs: Filesystem, target: Target, attr: Attr) -> Iterator[memoryview]:
    """The contents; an error of the region tells the path."""
    pieces = contents(fs, attr.ino)
    while True:
        with about(lambda: target.shown):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


# --- du and df ----------------------------------------------------------------------------------


@click.command("du", cls=Command, manual=DU)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", shell_complete=complete_path)
@click.option("-s", "--summarize", is_flag=True, help="Show the total of each PATH only.")
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def du_command(paths: tuple[str, ...], summarize: bool, as_json: bool) -> int:
    """Show how much room PATH, and each directory below it, takes in the region.

    PATH is REGION:/path, or a path on a mount.  A file with several names counts once.  Holes take
    no room.
    """

    def show_one(path: str) -> None:
        target = target_of(path)
        with reached(target, readonly=True) as fs:
            attr = attributes(fs, target)
            if not is_directory(attr):
                _print_size(target.shown, attr.blocks * SECTOR, as_json)
                return
            for directory, size in _sizes(fs, attr, target.shown):
                if not summarize or directory.attr.ino == attr.ino:
                    _print_size(directory.path, size, as_json)

    return for_each(paths, show_one)


def _print_size(path: bytes, size: int, as_json: bool) -> None:
    if as_json:
        show_json({"path": os.fsdecode(path), "allocated": size})
    else:
        say(f"{readable_size(size):>10}  {shown(path)}")


def _sizes(fs: Filesystem, attr: Attr, path: bytes) -> Iterator[tuple[Directory, int]]:
    """Yield each directory and its size in bytes, after those below it."""
    met: set[int] = set()
    totals: dict[int, int] = {}  # of directories, by inode
    for directory in below_first(fs, attr, path):
        total = directory.attr.blocks
        for one in directory.names.values():
            if is_directory(one):
                total += totals.get(one.ino, 0)
            elif one.nlink == 1 or one.ino not in met:
                total += one.blocks
                met.add(one.ino)
        totals[directory.attr.ino] = total
        yield directory, total * SECTOR


@click.command("df", cls=Command, manual=DF)
@click.argument(
    "regions", nargs=-1, required=True, metavar="REGION...", shell_complete=complete_any_region
)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def df_command(regions: tuple[str, ...], as_json: bool) -> int:
    """Show how full each REGION is.

    REGION is a region, its mount point, REGION:/path or a path on a mount.  What is available is
    less than what is free: a reserve lets a full region still remove files.
    """
    rows: list[tuple[str, ...]] = [("REGION", "SIZE", "USED", "AVAILABLE", "USE", "INODES")]

    def add(region: str) -> None:
        with reached(region_target_of(region), readonly=True) as fs:
            stats, spec = patiently(fs.statfs), fs.region.spec
        unit = stats.block_size
        size, free = stats.blocks * unit, stats.blocks_free * unit
        used, available = size - free, stats.blocks_avail * unit
        inodes = stats.files - stats.files_free
        if as_json:
            show_json({"region": spec, "size": size, "used": used, "free": free,
                       "available": available, "inodes": inodes})  # fmt: skip
        share = f"{used / (used + available):.0%}" if used + available else "-"
        sizes = map(readable_size, (size, used, available))
        rows.append((spec, *sizes, share, str(inodes)))

    code = for_each(regions, add)
    if len(rows) > 1 and not as_json:
        show(rows)
    return code
