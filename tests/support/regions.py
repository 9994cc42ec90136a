"""Regions for tests: small filesystems in /dev/shm, and mounts of them by several peers."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from ivshmemfs.engine import Attr, Context, Filesystem, Handle
from ivshmemfs.errors import Unfinished
from ivshmemfs.format import geometry
from ivshmemfs.region import Region, create_file, open_region
from mkfs.initial import Parameters
from mkfs.writer import format_region

T = TypeVar("T")

ROOT = Context(0, 0)
SMALL = 256 << 10


class TestRegion:
    """A formatted region file; mounts opened from it are closed with it."""

    __test__ = False

    def __init__(self, path: Path, size: int = SMALL, **plan: int) -> None:
        self.path = path
        self.size = size
        create_file(str(path), size, exist_ok=False)
        with open_region(str(path)) as region:
            parameters = Parameters(os.urandom(16))
            layout = geometry.plan(size, **plan)
            format_region(region.memory, layout, parameters, fresh=True, chance=random.Random(1))
        self._open: list[Region] = []

    def region(self, readonly: bool = False) -> Region:
        """Another mapping of the region."""
        region = open_region(str(self.path), readonly=readonly)
        self._open.append(region)
        return region

    def mount(self, readonly: bool = False) -> Filesystem:
        """Another peer."""
        return Filesystem.mount(self.region(readonly), readonly=readonly)

    def close(self) -> None:
        """Close all mappings and remove the file."""
        for region in self._open:
            region.close()
        self.path.unlink(missing_ok=True)


@contextmanager
def new_region(size: int = SMALL, **plan: int) -> Iterator[TestRegion]:
    """A freshly formatted region in /dev/shm; `plan` as geometry.plan takes it."""
    with tempfile.TemporaryDirectory(prefix="ivshmemfs-test-", dir="/dev/shm") as folder:
        made = TestRegion(Path(folder) / "region", size, **plan)
        try:
            yield made
        finally:
            made.close()


def put(fs: Filesystem, parent: int, name: bytes, content: bytes) -> Attr:
    """Create or overwrite a file with `content`."""
    flags = os.O_WRONLY | os.O_TRUNC
    handle, _ = in_turns(lambda: fs.create(parent, name, 0o644, flags, ROOT))
    try:
        done = 0
        while done < len(content):
            done += _written(fs, handle, done, content[done : done + (1 << 20)])
    finally:
        fs.release(handle)
    return fs.lookup(parent, name)


def _written(fs: Filesystem, handle: Handle, at: int, piece: bytes) -> int:
    return in_turns(lambda: fs.write(handle, at, piece))


def in_turns(action: Callable[[], T], most: int = 10_000) -> T:
    """What an operation returns that may need several turns, as when space is short."""
    for _ in range(most):
        try:
            return action()
        except Unfinished as turn:
            action = cast("Callable[[], T]", turn.go_on or action)
    raise AssertionError("an operation never ends")


def get(fs: Filesystem, parent: int, name: bytes) -> bytes:
    """The content of a file."""
    attr = fs.lookup(parent, name)
    handle = fs.open(attr.ino, os.O_RDONLY, ROOT)
    try:
        return bytes(fs.read(handle, 0, attr.size))
    finally:
        fs.release(handle)


def tree(fs: Filesystem, ino: int = 1) -> dict[bytes, object]:
    """Everything below a directory: nested dicts, file contents, symlink targets."""
    found: dict[bytes, object] = {}
    for name, attr, _ in fs.readdir(fs.opendir(ino), 0):
        if name in (b".", b".."):
            continue
        if attr.mode & 0o170000 == 0o040000:
            found[name] = tree(fs, attr.ino)
        elif attr.mode & 0o170000 == 0o120000:
            found[name] = ("->", fs.readlink(attr.ino))
        else:
            found[name] = get(fs, ino, name) if attr.mode & 0o170000 == 0o100000 else attr.mode
    return found
