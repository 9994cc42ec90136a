"""Changes by path, where directories are deep, and where a hostile region makes a ring of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem, directory, watched_path
from ivshmemfs.engine.diff import Kind
from ivshmemfs.engine.transaction import Transaction
from ivshmemfs.engine.watched_path import PathChange, WatchedPath
from tests.support.regions import ROOT, TestRegion, new_region, put
from tests.support.turns import finish

DEEP = 3000  # more than a recursion may have
DIRECTORY = 4


@pytest.fixture
def made() -> Iterator[TestRegion]:
    with new_region(64 << 20) as region:
        yield region


def _watched(made: TestRegion, ino: int) -> WatchedPath:
    watched = WatchedPath(made.mount(), ino, recursive=True)
    finish(watched.begin)
    return watched


def _told(watched: WatchedPath) -> list[PathChange]:
    found: list[PathChange] = finish(watched.changes)
    return found


def _chain(fs: Filesystem, top: int, name: bytes, depth: int) -> int:
    for _ in range(depth):
        top = fs.mkdir(top, name, 0o755, ROOT).ino
    return top


def test_a_deep_tree_comes_and_goes(made: TestRegion) -> None:
    fs = made.mount()
    base = fs.mkdir(ROOT_INO, b"base", 0o755, ROOT).ino
    last = _chain(fs, base, b"d", DEEP)
    watched = _watched(made, base)
    put(fs, last, b"file", b"")
    (change,) = _told(watched)
    assert change.path == b"?/file"  # its path is too long for any system call
    fs.rename(base, b"d", ROOT_INO, b"away", 0, ROOT)
    assert [(it.kind, it.path) for it in _told(watched)] == [(Kind.REMOVED, b"d")]
    put(fs, last, b"unseen", b"")
    assert _told(watched) == []


def test_a_path_that_a_system_call_takes_is_told(made: TestRegion) -> None:
    fs = made.mount()
    base = fs.mkdir(ROOT_INO, b"base", 0o755, ROOT).ino
    name = b"n" * 200
    depth = watched_path.PATH_MAX // (len(name) + 1)
    last = _chain(fs, base, name, depth)
    watched = _watched(made, base)
    put(fs, last, b"file", b"")
    (change,) = _told(watched)
    assert change.path == b"/".join([name] * depth + [b"file"])


def test_a_ring_of_directories(made: TestRegion) -> None:
    fs = made.mount()
    low = fs.mkdir(ROOT_INO, b"low", 0o755, ROOT).ino  # a smaller number than those above it
    base = fs.mkdir(ROOT_INO, b"base", 0o755, ROOT).ino
    inner = fs.mkdir(base, b"inner", 0o755, ROOT).ino
    fs.rename(ROOT_INO, b"low", inner, b"low", 0, ROOT)

    def close_ring(tx: Transaction) -> None:
        folder = tx.inode(low)
        place = directory.locate(tx, folder, b"up")
        tx.put(directory.insert(tx, folder, place, inner, DIRECTORY))

    fs.change(close_ring)
    watched = _watched(made, base)
    put(fs, low, b"file", b"")
    (change,) = _told(watched)
    assert (change.kind, change.path) == (Kind.CREATED, b"?/file")
    fs.rename(base, b"inner", ROOT_INO, b"away", 0, ROOT)
    assert (Kind.REMOVED, b"inner") in [(it.kind, it.path) for it in _told(watched)]
