"""Directories that grow from the inode into a tree and shrink back, and reads of them meanwhile."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.format import dirent
from ivshmemfs.format import inode as fmt
from ivshmemfs.format.dirent import name_key
from tests.engine.asking import names
from tests.support.checks import assert_adds_up, free_blocks
from tests.support.regions import ROOT, TestRegion


def shape(fs: Filesystem, ino: int) -> tuple[int, int]:
    """Return (payload kind, height) of a directory."""
    record = fs.view().inode(ino).record
    return record.payload, record.height


def varied_names(count: int, chance: random.Random) -> list[bytes]:
    """Return names of all lengths up to 255 with every byte that a name may have."""
    letters = bytes(b for b in range(1, 256) if b != ord("/"))
    found: dict[bytes, None] = {}
    while len(found) < count:
        length = chance.choice((1, 2, 8, 20, 60, 255, chance.randint(1, 255)))
        name = bytes(chance.choice(letters) for _ in range(length))
        if name not in (b".", b".."):
            found[name] = None
    return list(found)


def fill(fs: Filesystem, ino: int, target: int, called: Iterable[bytes]) -> None:
    for name in called:
        fs.link(target, ino, name, ROOT)


def test_a_directory_grows_and_shrinks(roomy: TestRegion) -> None:
    fs, other = roomy.mount(), roomy.mount()
    folder = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    file = fs.mknod(ROOT_INO, b"file", 0o100644, 0, ROOT).ino
    free = free_blocks(fs)
    chance = random.Random(1)
    called = varied_names(3000, chance)
    heights = set()
    for number, name in enumerate(called):
        (fs, other)[number % 2].link(file, folder, name, ROOT)
        heights.add(shape(fs, folder))
    assert (fmt.DIRLEAF, 0) in heights
    assert max(heights) >= (fmt.DIRTREE, 2)
    assert names(other, folder) == sorted(called)
    assert all(fs.lookup(folder, name).ino == file for name in called)
    assert fs.getattr(file).nlink == 3001
    chance.shuffle(called)
    for number, name in enumerate(called):
        (fs, other)[number % 2].unlink(folder, name, ROOT)
        if number % 500 == 0:
            assert names(fs, folder) == sorted(called[number + 1 :])
    assert shape(fs, folder) == (fmt.EMPTY, 0)
    assert fs.getattr(file).nlink == 1
    assert free_blocks(fs) == free


def test_random_changes_match_a_set(roomy: TestRegion) -> None:
    mounts = [roomy.mount(), roomy.mount()]
    chance = random.Random(7)
    pool, there = varied_names(900, chance), set[bytes]()
    file = mounts[0].mknod(ROOT_INO, b"file", 0o100644, 0, ROOT).ino
    folder = mounts[0].mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    for round_number in range(6000):
        fs, name = chance.choice(mounts), chance.choice(pool)
        growing = round_number // 1500 % 2 == 0
        if name in there and (not growing or chance.random() < 0.2):
            fs.unlink(folder, name, ROOT)
            there.remove(name)
        elif name not in there and (growing or chance.random() < 0.2):
            fs.link(file, folder, name, ROOT)
            there.add(name)
        if round_number % 1000 == 999:
            assert names(chance.choice(mounts), folder) == sorted(there)
    assert_adds_up(mounts[0])


@pytest.mark.parametrize("pool", [12, 60, 900])
def test_random_renames_match_a_dict(roomy: TestRegion, pool: int) -> None:
    """Renames within a leaf and between leaves, which split and merge, also over other names."""
    mounts, chance = [roomy.mount(), roomy.mount()], random.Random(pool)
    called, there = varied_names(2 * pool, chance), dict[bytes, int]()
    folder = mounts[0].mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    for name in called[:pool]:
        there[name] = mounts[0].mknod(folder, name, 0o100644, 0, ROOT).ino
    heights = {shape(mounts[0], folder)}
    for _ in range(1500):
        fs, old, new = chance.choice(mounts), chance.choice(list(there)), chance.choice(called)
        if new in there and (len(there) < pool // 2 or chance.random() < 0.5):
            continue
        fs.rename(folder, old, folder, new, 0, ROOT)
        there[new] = there.pop(old)
        record = fs.view().inode(folder).record
        assert record.entries == len(there)
        heights.add(shape(fs, folder))
    for fs in mounts:
        assert names(fs, folder) == sorted(there)
        assert {name: fs.lookup(folder, name).ino for name in there} == there
    assert max(heights)[1] == {12: 1, 60: 1, 900: 2}[pool]
    assert_adds_up(mounts[0])


def test_a_tree_returns_into_the_inode(roomy: TestRegion) -> None:
    fs = roomy.mount()
    file = fs.mknod(ROOT_INO, b"file", 0o100644, 0, ROOT).ino
    folder = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    called = [b"name%d" % n for n in range(120)]
    fill(fs, folder, file, called)
    assert shape(fs, folder)[0] == fmt.DIRTREE
    while len(called) > 5:
        fs.unlink(folder, called.pop(), ROOT)
    assert shape(fs, folder) == (fmt.DIRLEAF, 0)
    assert names(fs, folder) == sorted(called)


def test_few_names_are_left_of_many(roomy: TestRegion) -> None:
    """A directory that shrinks gives its blocks back."""
    fs = roomy.mount()
    file = fs.mknod(ROOT_INO, b"file", 0o100644, 0, ROOT).ino
    folder = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    called = [b"%0240d" % n for n in range(5000)]
    fill(fs, folder, file, called)
    assert shape(fs, folder) == (fmt.DIRTREE, 3)
    full = fs.view().inode(folder).record.blocks
    random.Random(3).shuffle(called)
    for name in called[20:]:
        fs.unlink(folder, name, ROOT)
    assert names(fs, folder) == sorted(called[:20])
    assert fs.view().inode(folder).record.blocks < full / 4


def test_names_of_one_hash(roomy: TestRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colliding names share a leaf; the engine refuses more of them than fit a leaf."""
    from ivshmemfs.errors import NoSpace

    fs = roomy.mount()
    same = hashlib.blake2b(b"same", digest_size=8)
    monkeypatch.setattr(dirent, "blake2b", lambda *_name, **_options: same)
    called = [b"%d" % n for n in range(40)]
    for name in called:
        fs.mknod(ROOT_INO, name, 0o100644, 0, ROOT)
    assert names(fs) == sorted(called)
    with suppress(NoSpace):
        for more in range(300):
            fs.mknod(ROOT_INO, b"more%d" % more, 0o100644, 0, ROOT)
    assert 0 < more < 256
    assert len(names(fs)) == 40 + more
    for name in names(fs):
        fs.unlink(ROOT_INO, name, ROOT)
    assert names(fs) == []


def test_keys_are_cookies_above_the_dots() -> None:
    keys = {name_key(b"%d" % n, b"secret") for n in range(1000)}
    assert len(keys) == 1000
    assert all(key >= 256 and key % 256 == 0 and key < 1 << 63 for key in keys)


# --- reading while it changes ---------------------------------------------------------------


def test_readdir_goes_on_from_any_cookie(roomy: TestRegion) -> None:
    fs = roomy.mount()
    file = fs.mknod(ROOT_INO, b"file", 0o100644, 0, ROOT).ino
    folder = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    called = [b"n%d" % n for n in range(300)]
    fill(fs, folder, file, called)
    handle = fs.opendir(folder)
    whole = list(fs.readdir(handle, 0))
    assert [name for name, _, _ in whole[:2]] == [b".", b".."]
    assert len({cookie for _, _, cookie in whole}) == 302
    for at in range(0, 302, 7):
        rest = list(fs.readdir(handle, whole[at][2]))
        assert [name for name, _, _ in rest] == [name for name, _, _ in whole[at + 1 :]]
        listed = chain.from_iterable(fs.entries(handle, whole[at][2]))
        entries = [(e.name, e.ino, e.kind, e.key) for e in listed]
        assert entries == [(name, attr.ino, attr.mode >> 12, key) for name, attr, key in rest]


LISTINGS: list[Callable[[Filesystem, int], Iterator[bytes]]] = [
    lambda fs, ino: (name for name, _, _ in fs.readdir(fs.opendir(ino), 0)),
    lambda fs, ino: (e.name for e in chain.from_iterable(fs.entries(fs.opendir(ino), 0))),
]


@pytest.mark.slow
@pytest.mark.parametrize("listed", LISTINGS, ids=["readdir", "entries"])
def test_readdir_while_another_mount_changes_it(
    roomy: TestRegion, listed: Callable[[Filesystem, int], Iterator[bytes]]
) -> None:
    """An entry that exists throughout appears exactly once; no entry appears twice."""
    fs, other = roomy.mount(), roomy.mount()
    chance = random.Random(11)
    file = fs.mknod(ROOT_INO, b"file", 0o100644, 0, ROOT).ino
    for count in (5, 40, 400):
        folder = fs.mkdir(ROOT_INO, b"dir%d" % count, 0o755, ROOT).ino
        staying = {b"stay%d" % n for n in range(count)}
        coming = {b"come%d" % n for n in range(count)}
        fill(fs, folder, file, staying | coming)
        seen: list[bytes] = []
        for name in listed(fs, folder):
            seen.append(name)
            for _ in range(3):
                victim = chance.choice(sorted(coming))
                coming.discard(victim)
                other.unlink(folder, victim, ROOT)
                fresh = b"come" + os.urandom(4).hex().encode()
                coming.add(fresh)
                other.link(file, folder, fresh, ROOT)
        assert len(seen) == len(set(seen))
        assert staying <= set(seen)


@pytest.mark.parametrize("listed", LISTINGS, ids=["readdir", "entries"])
def test_readdir_of_a_directory_that_is_emptied_meanwhile(
    roomy: TestRegion, listed: Callable[[Filesystem, int], Iterator[bytes]]
) -> None:
    fs, other = roomy.mount(), roomy.mount()
    folder = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    called = [b"n%d" % n for n in range(200)]
    for name in called:
        fs.mknod(folder, name, 0o100644, 0, ROOT)
    listing = listed(fs, folder)
    first = [next(listing) for _ in range(20)]
    for name in called:
        other.unlink(folder, name, ROOT)
    other.rmdir(ROOT_INO, b"dir", ROOT)
    rest = list(listing)
    assert len(first + rest) == len(set(first + rest)) < 202
