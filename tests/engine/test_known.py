"""What a mount knows outlives its own commits, agrees with the region, and does not pile up."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from ivshmemfs.engine import RENAME_EXCHANGE, ROOT_INO, Attr, Filesystem, contents
from ivshmemfs.engine.transaction import CACHED_MAX, Transaction
from ivshmemfs.errors import FsError, StaleHandle
from tests.support.checks import assert_clean
from tests.support.regions import ROOT, TestRegion, get, new_region, put


def seen(fs: Filesystem, numbers: list[int]) -> list[Attr | None]:
    found: list[Attr | None] = []
    for ino in numbers:
        try:
            found.append(fs.lookup_number(ino))
        except StaleHandle:
            found.append(None)
    return found


def change(fs: Filesystem, chance: random.Random, numbers: list[int]) -> None:
    """Make a random change, which may fail."""
    name, to = (b"%d" % chance.randrange(6) for _ in range(2))
    what = chance.randrange(6)
    if what == 0:
        numbers.append(fs.mkdir(ROOT_INO, name, 0o755, ROOT).ino)
    elif what == 1:
        fs.unlink(ROOT_INO, name, ROOT)
    elif what == 2:
        fs.rename(ROOT_INO, name, ROOT_INO, to, 0, ROOT)
    elif what == 3:
        fs.rmdir(ROOT_INO, name, ROOT)
    elif what == 4:
        fs.setattr(chance.choice(numbers), ROOT, mode=chance.randrange(0o1000))
    else:
        numbers.append(put(fs, ROOT_INO, name, bytes(chance.randrange(3000))).ino)


def test_what_is_known_is_what_stands_there(made: TestRegion) -> None:
    mounts, chance, numbers = [made.mount(), made.mount()], random.Random(1), [ROOT_INO]
    for _ in range(150):
        fs = mounts[chance.random() < 0.2]
        for _ in range(chance.randrange(1, 5)):
            try:
                change(fs, chance, numbers)
            except FsError:
                continue
        fresh = made.mount(readonly=True)
        assert seen(fs, numbers) == seen(fresh, numbers)
    assert len(set(numbers)) > 20


def test_a_change_that_fails_forgets_nothing(made: TestRegion) -> None:
    fs = made.mount()
    ino = put(fs, ROOT_INO, b"file", b"abc").ino
    fs.mkdir(ROOT_INO, b"full", 0o755, ROOT)
    inside = fs.lookup(ROOT_INO, b"full").ino
    put(fs, inside, b"inner", b"")

    def refused() -> None:
        with pytest.raises(FsError):
            fs.mkdir(ROOT_INO, b"file", 0o755, ROOT)
        with pytest.raises(FsError):
            fs.unlink(ROOT_INO, b"missing", ROOT)
        with pytest.raises(FsError):
            fs.rmdir(ROOT_INO, b"full", ROOT)
        fs.rename(ROOT_INO, b"file", ROOT_INO, b"file", 0, ROOT)  # changes nothing

    fs.lookup(ROOT_INO, b"file")
    known = fs.view().cache
    refused()
    assert fs.view().cache is known
    assert known.find_name(ROOT_INO, b"file") == ino
    # What a failed change has read is known as well, when it is the first look at a commit.
    other = made.mount()
    other.setattr(ino, ROOT, mode=0o600)
    refused()
    assert ino in fs.view().cache.inodes
    assert fs.lookup_number(ino) == other.lookup_number(ino)


def test_more_than_is_remembered() -> None:
    with new_region(128 << 20) as made:
        fs = made.mount()
        names = [b"%d" % at for at in range(CACHED_MAX + 2000)]
        for first in range(0, len(names), 500):
            few = names[first : first + 500]

            def plan(tx: Transaction, few: list[bytes] = few) -> None:
                for name in few:
                    contents.store(tx, ROOT_INO, name, name, 0o600, ROOT)

            fs.change(plan)
        numbers = [fs.lookup(ROOT_INO, name).ino for name in names]
        for name in names[::37]:
            assert get(fs, ROOT_INO, name) == name
        gone = numbers[-2000::2]
        for name in names[-2000::2]:
            fs.unlink(ROOT_INO, name, ROOT)
        fresh = made.mount(readonly=True)
        kept = numbers[-1999::2] + numbers[:-2000:97]
        assert seen(fs, kept) == seen(fresh, kept)
        assert seen(fs, gone) == seen(fresh, gone) == [None] * len(gone)
        assert_clean(made)


def test_a_change_that_failed_leaves_nothing_behind(fs: Filesystem, other: Filesystem) -> None:
    handle, attr = fs.create(ROOT_INO, b"f", 0o644, os.O_RDWR, ROOT)
    for _ in range(3):
        try:
            fs.mkdir(ROOT_INO, b"f", 0o755, ROOT)
        except FsError:
            assert fs.getattr(attr.ino) == other.getattr(attr.ino) == attr
    fs.release(handle)


def test_names_lead_where_they_led_after_own_commits(fs: Filesystem, other: Filesystem) -> None:
    folders = [fs.mkdir(ROOT_INO, b"%d" % at, 0o755, ROOT).ino for at in range(2)]
    put(fs, folders[0], b"f", b"one")
    first, second = (fs.lookup(ROOT_INO, b"%d" % at).ino for at in range(2))
    assert [first, second] == folders
    assert fs.find(folders[1], b"f") is None
    fs.rename(folders[0], b"f", folders[1], b"f", 0, ROOT)
    assert fs.find(folders[0], b"f") is None
    assert fs.lookup(folders[1], b"f") == other.lookup(folders[1], b"f")
    assert fs.lookup(ROOT_INO, b"0") == other.lookup(ROOT_INO, b"0")  # its times have changed
    fs.rename(ROOT_INO, b"0", ROOT_INO, b"1", RENAME_EXCHANGE, ROOT)
    assert [fs.lookup(ROOT_INO, b"%d" % at).ino for at in range(2)] == folders[::-1]
    other.unlink(folders[1], b"f", ROOT)
    assert fs.find(folders[1], b"f") is None


def chmod(fs: Filesystem, folder: int, turn: int) -> None:
    fs.setattr(folder, ROOT, mode=0o700 + turn % 8)


def make(fs: Filesystem, folder: int, turn: int) -> None:
    fs.mknod(folder, b"new%d" % turn, 0o100644, 0, ROOT)
    fs.unlink(folder, b"new%d" % turn, ROOT)


def move(fs: Filesystem, folder: int, turn: int) -> None:
    fs.rename(folder, b"0" if turn % 2 else b"1", folder, b"1" if turn % 2 else b"0", 0, ROOT)


@pytest.mark.parametrize("files", [4, 300, 4000])  # inode tables of height 0, 1, 2
@pytest.mark.parametrize("act", [chmod, make, move])
def test_what_others_replaced_is_forgotten(
    roomy: TestRegion, files: int, act: Callable[[Filesystem, int, int], None]
) -> None:
    mounts = [roomy.mount(), roomy.mount()]
    folders = [fs.mkdir(ROOT_INO, b"%d" % at, 0o755, ROOT).ino for at, fs in enumerate(mounts)]
    for folder, fs in zip(folders, mounts, strict=True):
        fs.mknod(folder, b"1", 0o100644, 0, ROOT)
    numbers = [put(mounts[0], ROOT_INO, b"file%d" % at, b"").ino for at in range(files)]
    sizes = list[int]()
    for turn in range(100):
        for folder, fs in zip(folders, mounts, strict=True):
            act(fs, folder, turn)
        sizes.append(sum(len(fs.store.cache) for fs in mounts))
    assert max(sizes[50:]) <= max(sizes[:50]) + 2
    numbers = [*folders, *numbers[:: max(files // 20, 1)]]
    assert seen(mounts[0], numbers) == seen(roomy.mount(readonly=True), numbers)
