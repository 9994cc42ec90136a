"""What the shell offers for mount points, and for paths in a region."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem

from ivshmemfs.cli.attach.paths import entries, reached, resolve, target_of
from ivshmemfs.completion import FILES, quietly, regions
from ivshmemfs.fuse.mountpoint import ours

#: Names of one directory that are offered.
NAMES_MAX = 1000


def mounts(_incomplete: str) -> Iterator[str]:
    """Yield the mount points of ivshmemfs."""
    for entry in ours():
        yield entry.path


def regions_and_mounts(incomplete: str) -> Iterator[str]:
    """Yield what a command takes as REGION."""
    yield from regions(incomplete)
    yield from mounts(incomplete)


def paths(incomplete: str) -> Iterator[str]:
    """Yield REGION:/path: regions first, then the names in a directory of one."""
    region, colon, path = incomplete.rpartition(":/")
    if not colon or region == "file":
        for word in regions(incomplete):
            yield word if word.endswith("=") else f"{word}:/"
        return
    above = path[: path.rfind("/") + 1]
    start = f"{region}:/{above}"
    target = target_of(start)
    with reached(target, readonly=True) as fs:
        found = entries(fs, resolve(fs, target.path).ino)
    for name, attr in list(found.items())[:NAMES_MAX]:
        yield start + os.fsdecode(name) + "/" * stat.S_ISDIR(attr.mode)


def complete_inside(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer paths in the region that an earlier argument names; local files where none does."""
    region = context.params.get("region")
    if not isinstance(region, str) or not incomplete.startswith("/"):
        return [FILES]
    found = quietly(paths)(context, parameter, f"{region}:{incomplete}")
    return [CompletionItem(str(item.value)[len(region) + 1 :]) for item in found]


complete_mount = quietly(mounts, CompletionItem("", type="dir"))
complete_any_region = quietly(regions_and_mounts, FILES)
complete_path = quietly(paths, FILES)
