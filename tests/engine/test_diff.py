"""A watcher finds what other mounts changed, and reads no more than what changed."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem, diff
from ivshmemfs.engine.diff import Change, Kind, Watcher
from ivshmemfs.errors import FsError, Unfinished
from tests.support.regions import ROOT, TestRegion, new_region
from tests.support.turns import cost_of

DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644


@pytest.fixture
def region() -> Iterator[TestRegion]:
    with new_region(16 << 20) as made:
        yield made


def _watching(fs: Filesystem, *folders: int, recursive: bool = False) -> Watcher:
    watcher = Watcher(fs, recursive=recursive)
    for folder in folders or (ROOT_INO,):
        watcher.watch(folder)
    assert _changes(watcher) == []
    return watcher


def _changes(watcher: Watcher, between: Callable[[], None] = lambda: None) -> list[Change]:
    """All changes, in as many pieces as it takes."""
    while True:
        try:
            return watcher.changes()
        except Unfinished:
            between()


def _write(fs: Filesystem, ino: int, content: bytes, offset: int = 0) -> None:
    handle = fs.open(ino, os.O_WRONLY, ROOT)
    fs.write(handle, offset, content)
    fs.release(handle)


def test_each_kind_of_change(region: TestRegion) -> None:
    here, there = region.mount(), region.mount()
    sub = there.mkdir(ROOT_INO, b"sub", 0o755, ROOT).ino
    file = there.mknod(ROOT_INO, b"file", FILE, 0, ROOT).ino
    watcher = _watching(here, ROOT_INO, sub)

    made = there.mknod(ROOT_INO, b"new", FILE, 0, ROOT).ino
    assert watcher.changes() == [Change(Kind.CREATED, ROOT_INO, b"new", made, False)]
    folder = there.mkdir(sub, b"dir", 0o755, ROOT).ino
    assert watcher.changes() == [Change(Kind.CREATED, sub, b"dir", folder, True)]
    _write(there, file, b"contents")
    assert watcher.changes() == [Change(Kind.CHANGED, ROOT_INO, b"file", file, False)]
    there.setattr(file, ROOT, mode=0o600)
    assert watcher.changes() == [Change(Kind.ATTRIBUTES, ROOT_INO, b"file", file, False)]
    there.rename(ROOT_INO, b"file", sub, b"moved", 0, ROOT)
    change = Change(Kind.MOVED, ROOT_INO, b"file", file, False, to=(sub, b"moved"))
    assert watcher.changes()[0] == change
    there.unlink(ROOT_INO, b"new", ROOT)
    assert watcher.changes() == [Change(Kind.REMOVED, ROOT_INO, b"new", made, False)]
    there.rmdir(sub, b"dir", ROOT)
    assert watcher.changes() == [Change(Kind.REMOVED, sub, b"dir", folder, True)]
    assert watcher.changes() == []


def test_renaming_over_a_name(region: TestRegion) -> None:
    here, there = region.mount(), region.mount()
    old = there.mknod(ROOT_INO, b"name", FILE, 0, ROOT).ino
    new = there.mknod(ROOT_INO, b"temporary", FILE, 0, ROOT).ino
    watcher = _watching(here)
    there.rename(ROOT_INO, b"temporary", ROOT_INO, b"name", 0, ROOT)
    found = watcher.changes()
    assert Change(Kind.REMOVED, ROOT_INO, b"name", old, False) in found
    moved = Change(Kind.MOVED, ROOT_INO, b"temporary", new, False, to=(ROOT_INO, b"name"))
    assert moved in found


def test_a_watched_directory_that_is_removed(region: TestRegion) -> None:
    here, there = region.mount(), region.mount()
    sub = there.mkdir(ROOT_INO, b"sub", 0o755, ROOT).ino
    there.mknod(sub, b"a", FILE, 0, ROOT)
    watcher = _watching(here, sub)
    there.unlink(sub, b"a", ROOT)
    there.rmdir(ROOT_INO, b"sub", ROOT)
    assert [change.kind for change in watcher.changes()] == [Kind.REMOVED]
    assert watcher.folders == frozenset()
    assert watcher.changes() == []


def test_new_directories_are_watched_too(region: TestRegion) -> None:
    here, there = region.mount(), region.mount()
    watcher = _watching(here, recursive=True)
    one = there.mkdir(ROOT_INO, b"one", 0o755, ROOT).ino
    two = there.mkdir(one, b"two", 0o755, ROOT).ino
    file = there.mknod(two, b"file", FILE, 0, ROOT).ino
    assert {(c.folder, c.name) for c in watcher.changes()} == {
        (ROOT_INO, b"one"), (one, b"two"), (two, b"file"),
    }  # fmt: skip
    _write(there, file, b"x")
    assert watcher.changes() == [Change(Kind.CHANGED, two, b"file", file, False)]
    there.unlink(two, b"file", ROOT)
    there.rmdir(one, b"two", ROOT)
    assert {c.name for c in watcher.changes()} == {b"file", b"two"}
    assert watcher.folders == {ROOT_INO, one}


def test_no_commit_costs_one_load(region: TestRegion) -> None:
    here, there = region.mount(), region.mount()
    watcher = _watching(here)
    cost = cost_of(here, watcher.changes)
    assert (cost.result, cost.work) == ([], 0)
    there.mkdir(ROOT_INO, b"one", 0o755, ROOT)
    assert cost_of(here, watcher.changes).work > 0


def test_a_change_costs_the_same_in_a_large_directory() -> None:
    """One path of nodes, for any number of names beside it."""
    with new_region(64 << 20) as made:
        here, there = made.mount(), made.mount()
        work: list[int] = []
        for count in (100, 20_000):
            folder = there.mkdir(ROOT_INO, b"%d" % count, 0o755, ROOT).ino
            file = there.mknod(folder, b"0", FILE, 0, ROOT).ino
            for number in range(1, count):
                there.link(file, folder, b"%d" % number, ROOT)
            watcher = _watching(here, folder)
            there.mknod(folder, b"new", FILE, 0, ROOT)
            cost = cost_of(here, watcher.changes)
            assert [change.name for change in cost.result] == [b"new"]
            work.append(cost.work)
        assert max(work) < 200, work


def test_a_large_directory_is_remembered_in_pieces(region: TestRegion) -> None:
    """No call reads much more than its share, and all names are there in the end."""
    here, there = region.mount(), region.mount()
    first = there.mknod(ROOT_INO, b"0", FILE, 0, ROOT).ino
    for number in range(1, 10_000):
        there.link(first, ROOT_INO, b"%d" % number, ROOT)
    watcher = Watcher(here)
    watcher.watch(ROOT_INO)
    known = [0]

    def between() -> None:
        known.append(len(watcher.names_of(first)))

    assert _changes(watcher, between) == []
    steps = [later - before for before, later in pairwise(known)]
    assert len(steps) > 5
    assert max(steps) < 2 * diff.NAMES_AT_ONCE
    assert len(watcher.names_of(first)) == 10_000
    there.unlink(ROOT_INO, b"7", ROOT)
    found = _changes(watcher)
    assert Change(Kind.REMOVED, ROOT_INO, b"7", first, False) in found


def test_a_large_directory_is_forgotten_in_pieces(
    region: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nearly all leaves were replaced at once, no call forgets much more than its share."""
    monkeypatch.setattr(diff, "NAMES_AT_ONCE", 100)
    here, there = region.mount(), region.mount()
    inodes = [there.mknod(ROOT_INO, b"%d" % number, FILE, 0, ROOT).ino for number in range(3000)]
    watcher = _watching(here)
    for number in range(0, 3000, 2):
        there.unlink(ROOT_INO, b"%d" % number, ROOT)
    known = [3000]

    def between() -> None:
        known.append(sum(bool(watcher.names_of(ino)) for ino in inodes))

    found = _changes(watcher, between)
    assert {(change.kind, change.name) for change in found} == {
        (Kind.REMOVED, b"%d" % number) for number in range(0, 3000, 2)
    }
    steps = [before - later for before, later in pairwise(known)]
    assert max(steps) <= 2 * diff.GOING_PER_NAME * diff.NAMES_AT_ONCE
    assert [bool(watcher.names_of(ino)) for ino in inodes] == [False, True] * 1500


def test_attributes_of_a_watched_directory(region: TestRegion) -> None:
    """Its mode and owner are told; its times and links change with its names."""
    here, there = region.mount(), region.mount()
    sub = there.mkdir(ROOT_INO, b"sub", 0o755, ROOT).ino
    watcher = _watching(here, recursive=True)
    there.setattr(sub, ROOT, mode=0o700)
    assert _changes(watcher) == [Change(Kind.ATTRIBUTES, ROOT_INO, b"sub", sub, True)]
    there.mkdir(sub, b"below", 0o755, ROOT)
    assert [change.kind for change in _changes(watcher)] == [Kind.CREATED]
    there.setattr(sub, ROOT, uid=7, gid=8)
    assert _changes(watcher) == [Change(Kind.ATTRIBUTES, ROOT_INO, b"sub", sub, True)]


def test_a_directory_that_comes_with_its_names_in_pieces(
    region: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All names below are told, each once, however many calls it takes."""
    monkeypatch.setattr(diff, "NAMES_AT_ONCE", 3)
    here, there = region.mount(), region.mount()
    watcher = _watching(here, recursive=True)
    outer = there.mkdir(ROOT_INO, b"outer", 0o755, ROOT).ino
    expected = {(ROOT_INO, b"outer")}
    for folder in range(4):
        inner = there.mkdir(outer, b"in%d" % folder, 0o755, ROOT).ino
        expected.add((outer, b"in%d" % folder))
        for number in range(60):
            there.mknod(inner, b"%d" % number, FILE, 0, ROOT)
            expected.add((inner, b"%d" % number))
    found = _changes(watcher)
    assert {change.kind for change in found} == {Kind.CREATED}
    assert sorted((change.folder, change.name) for change in found) == sorted(expected)
    there.mknod(inner, b"later", FILE, 0, ROOT)
    assert [change.name for change in _changes(watcher)] == [b"later"]


def _listing(fs: Filesystem) -> dict[tuple[int, bytes], tuple[int, int, int, int]]:
    """(inode, mtime, size, mode) of every name, by directory and name."""
    found: dict[tuple[int, bytes], tuple[int, int, int, int]] = {}
    folders = [ROOT_INO]
    while folders:
        folder = folders.pop()
        for name, attr, _ in fs.readdir(fs.opendir(folder), 2):
            found[folder, name] = attr.ino, attr.mtime_ns, attr.size, attr.mode
            if stat.S_ISDIR(attr.mode):
                folders.append(attr.ino)
    return found


def _step(fs: Filesystem, chance: random.Random) -> None:
    """One random change."""
    listed = _listing(fs)
    folders = [ROOT_INO, *(row[0] for row in listed.values() if stat.S_ISDIR(row[3]))]
    folder, name = chance.choice(folders), b"%d" % chance.randrange(400)
    there = [place for place in listed if not stat.S_ISDIR(listed[place][3])]
    match chance.randrange(7):
        case 0:
            fs.mkdir(folder, name, 0o755, ROOT)
        case 1 | 2:
            fs.mknod(folder, name, FILE, 0, ROOT)
        case 3 if there:
            _write(fs, listed[chance.choice(there)][0], b"x" * chance.randrange(1, 5000))
        case 4 if there:
            fs.unlink(*chance.choice(there), ROOT)
        case 5 if listed:
            fs.rename(*chance.choice(list(listed)), folder, name, 0, ROOT)
        case 6 if listed:
            fs.setattr(listed[chance.choice(list(listed))][0], ROOT, mode=chance.randrange(0o1000))


def _apply(names: dict[tuple[int, bytes], int], changes: list[Change], touched: set[int]) -> None:
    """What the names are after *changes*."""
    for change in changes:
        place = change.folder, change.name
        if change.kind in (Kind.CHANGED, Kind.ATTRIBUTES):
            touched.add(change.ino)
        elif change.kind is not Kind.CREATED:
            assert names.pop(place) == change.ino
    for change in changes:
        if change.kind is Kind.CREATED:
            names[change.folder, change.name] = change.ino
        elif change.to is not None:
            names[change.to] = change.ino


@pytest.mark.parametrize("at_once", [1, 20, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_history(
    region: TestRegion, seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Applied to the old names, the changes give the new ones; every change of a file is told."""
    monkeypatch.setattr(diff, "NAMES_AT_ONCE", at_once)
    chance = random.Random(seed)
    here, others = region.mount(), [region.mount() for _ in range(2)]
    watcher = _watching(here, recursive=True)
    names: dict[tuple[int, bytes], int] = {}
    before = _listing(here)
    for _ in range(60):
        for _ in range(chance.choice((1, 1, 2, 10))):
            try:
                _step(chance.choice(others), chance)
            except FsError:
                continue
        touched: set[int] = set()
        _apply(names, _changes(watcher), touched)
        now = _listing(here)
        assert names == {place: row[0] for place, row in now.items()}
        for place, row in now.items():
            if place in before and before[place][0] == row[0] and not stat.S_ISDIR(row[3]):
                assert (row[0] in touched) >= (before[place] != row), place
        before = now


@pytest.mark.parametrize("seed", range(6))
def test_changes_between_the_pieces(
    region: TestRegion, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others go on while a comparison is under way; when all is quiet the names are right."""
    monkeypatch.setattr(diff, "NAMES_AT_ONCE", 15)
    chance = random.Random(seed)
    here, there = region.mount(), region.mount()
    watcher = _watching(here, recursive=True)
    names: dict[tuple[int, bytes], int] = {}
    steps = 0

    def step() -> None:
        nonlocal steps
        found, watcher._found = watcher._found, []
        _apply(names, found, set())
        steps += 1
        if steps % 50:  # else it would never be quiet
            with suppress(FsError):
                _step(there, chance)

    for _ in range(12):
        for _ in range(30):
            with suppress(FsError):
                _step(there, chance)
        _apply(names, _changes(watcher, step), set())
        _apply(names, _changes(watcher), set())
        assert names == {place: row[0] for place, row in _listing(here).items()}


def test_too_many_names_overflow(region: TestRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ivshmemfs.engine.diff.NAMES_MAX", 20)
    here, there = region.mount(), region.mount()
    watcher = _watching(here)
    for number in range(30):
        there.mknod(ROOT_INO, b"%d" % number, FILE, 0, ROOT)
    assert Kind.OVERFLOW in {change.kind for change in watcher.changes()}
