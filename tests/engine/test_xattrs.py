"""Extended attributes in the inode block and in their own blocks."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.engine.xattr import (
    CACHED_FROM,
    CREATE,
    REPLACE,
    Table,
    _stored,
    save,
)
from ivshmemfs.format import xattr as encoding
from ivshmemfs.shm.published import RECENT
from tests.engine.asking import fails, names
from tests.support.checks import assert_adds_up, free_blocks
from tests.support.regions import ROOT, TestRegion, get, put


def values(fs: Filesystem, ino: int) -> dict[bytes, bytes]:
    return {name: fs.getxattr(ino, name) for name in fs.listxattr(ino)}


def test_flags_and_errors(fs: Filesystem, other: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"content").ino
    assert fs.listxattr(ino) == []
    fails(errno.ENODATA, lambda: fs.getxattr(ino, b"user.a"))
    fails(errno.ENODATA, lambda: fs.removexattr(ino, b"user.a", ROOT))
    fails(errno.ENODATA, lambda: fs.setxattr(ino, b"user.a", b"1", REPLACE, ROOT))
    fs.setxattr(ino, b"user.a", b"1", CREATE, ROOT)
    fails(errno.EEXIST, lambda: other.setxattr(ino, b"user.a", b"2", CREATE, ROOT))
    other.setxattr(ino, b"user.a", b"2", REPLACE, ROOT)
    other.setxattr(ino, b"user.b", b"", 0, ROOT)
    assert values(fs, ino) == {b"user.a": b"2", b"user.b": b""}
    fails(errno.ERANGE, lambda: fs.setxattr(ino, b"n" * 256, b"", 0, ROOT))
    fails(errno.E2BIG, lambda: fs.setxattr(ino, b"user.c", bytes(65537), 0, ROOT))
    fails(errno.ESTALE, lambda: fs.setxattr(999, b"user.c", b"", 0, ROOT))
    fs.removexattr(ino, b"user.a", ROOT)
    assert values(other, ino) == {b"user.b": b""}
    assert get(other, ROOT_INO, b"file") == b"content"


def test_values_of_every_size(fs: Filesystem, other: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"content").ino
    free = free_blocks(fs)
    half = (fs.block_size - 192) // 2
    for size in (0, 1, half - 20, half, half + 1, fs.block_size, 4 * fs.block_size + 1, 3, 0):
        value = os.urandom(size)
        fs.setxattr(ino, b"user.value", value, 0, ROOT)
        assert other.getxattr(ino, b"user.value") == value
        assert get(other, ROOT_INO, b"file") == b"content"
    fs.removexattr(ino, b"user.value", ROOT)
    assert free_blocks(fs) == free


def test_the_payload_makes_room(fs: Filesystem) -> None:
    """Attributes and contents each fit the inode block, but not together."""
    capacity = fs.block_size - 192
    for size in (0, capacity // 2, capacity - 40, capacity, capacity + 1):
        for value_size in (1, capacity // 3, capacity // 2 - 30):
            content, value = os.urandom(size), os.urandom(value_size)
            ino = put(fs, ROOT_INO, b"file", content).ino
            fs.setxattr(ino, b"user.value", value, 0, ROOT)
            assert get(fs, ROOT_INO, b"file") == content
            longer = os.urandom(capacity - 10)
            put(fs, ROOT_INO, b"file", longer)
            assert values(fs, ino) == {b"user.value": value}
            assert get(fs, ROOT_INO, b"file") == longer
            fs.unlink(ROOT_INO, b"file", ROOT)
    assert_adds_up(fs)


def test_maps_and_trees_give_way_to_attributes(roomy: TestRegion) -> None:
    fs = roomy.mount()
    content = os.urandom(50 * fs.block_size)
    ino = put(fs, ROOT_INO, b"file", content).ino
    folder = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    called = [b"name%0200d" % n for n in range(100)]
    for name in called:
        fs.link(ino, folder, name, ROOT)
    for target in (ino, folder):
        for n in range(12):
            fs.setxattr(target, b"user.%d" % n, bytes([n]) * 30, 0, ROOT)
    more = os.urandom(60 * fs.block_size)
    put(fs, ROOT_INO, b"file", more)
    for n in range(100, 140):
        called.append(b"name%0200d" % n)
        fs.link(ino, folder, called[-1], ROOT)
    assert get(fs, ROOT_INO, b"file") == more
    assert names(fs, folder) == sorted(called)
    for target in (ino, folder):
        assert values(fs, target) == {b"user.%d" % n: bytes([n]) * 30 for n in range(12)}


def test_random_attributes_match_a_dictionary(roomy: TestRegion) -> None:
    mounts = [roomy.mount(), roomy.mount()]
    chance, model = random.Random(2), dict[bytes, bytes]()
    ino = put(mounts[0], ROOT_INO, b"file", b"content").ino
    free = free_blocks(mounts[0])
    for _ in range(500):
        fs, name = chance.choice(mounts), b"user." + bytes([chance.randrange(97, 117)]) * 3
        if name in model and chance.random() < 0.4:
            fs.removexattr(ino, name, ROOT)
            del model[name]
        else:
            model[name] = chance.randbytes(chance.choice((0, 5, 50, 500, 5000)))
            fs.setxattr(ino, name, model[name], 0, ROOT)
        assert values(chance.choice(mounts), ino) == model
    for name in list(model):
        mounts[0].removexattr(ino, name, ROOT)
    assert free_blocks(mounts[0]) == free


def test_the_sum_is_limited(roomy: TestRegion) -> None:
    fs = roomy.mount()
    ino = put(fs, ROOT_INO, b"file", b"").ino
    for n in range(3):
        fs.setxattr(ino, b"user.%d" % n, bytes(65536), 0, ROOT)
    fails(errno.ENOSPC, lambda: fs.setxattr(ino, b"user.3", bytes(65536), 0, ROOT))
    assert len(values(fs, ino)) == 3
    fs.unlink(ROOT_INO, b"file", ROOT)
    assert_adds_up(fs)


def test_attributes_of_links_directories_and_nodes(fs: Filesystem) -> None:
    made = (
        fs.symlink(ROOT_INO, b"link", b"to", ROOT),
        fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT),
        fs.mknod(ROOT_INO, b"fifo", 0o010644, 0, ROOT),
    )
    for attr in made:
        fs.setxattr(attr.ino, b"trusted.x", b"v" * 600, 0, ROOT)
        assert values(fs, attr.ino) == {b"trusted.x": b"v" * 600}
    assert fs.readlink(made[0].ino) == b"to"
    fs.unlink(ROOT_INO, b"link", ROOT)
    fs.rmdir(ROOT_INO, b"dir", ROOT)
    fs.unlink(ROOT_INO, b"fifo", ROOT)
    assert_adds_up(fs)


def many(count: int) -> dict[bytes, bytes]:
    return {b"user.%05d" % number: b"%d" % number for number in range(count)}


def test_thousands_are_decoded_once(roomy: TestRegion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads, changes and commits of other inodes do not decode a string again."""
    fs, other = roomy.mount(), roomy.mount()
    real, decoded = encoding.split, []

    def split(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
        decoded.append(len(raw))
        return real(raw)

    monkeypatch.setattr(encoding, "split", split)
    ino = put(fs, ROOT_INO, b"file", b"").ino
    wanted = many(2000)
    for name, value in wanted.items():
        fs.setxattr(ino, name, value, 0, ROOT)
    large = sum(1 for size in decoded if size > CACHED_FROM)
    assert large == 0, "what this mount has set it knows"
    decoded.clear()
    for at, (name, value) in enumerate(wanted.items()):
        assert other.getxattr(ino, name) == value
        if at % 100 == 0:
            put(fs, ROOT_INO, b"another", b"%d" % at)
    assert other.listxattr(ino) == list(wanted)
    assert len(decoded) == 1
    for name in list(wanted)[::2]:
        other.removexattr(ino, name, ROOT)
        del wanted[name]
    assert len(decoded) == 1
    assert values(other, ino) == wanted
    assert values(fs, ino) == wanted


def test_many_large_sets_at_once(roomy: TestRegion) -> None:
    """With more tables than the cache holds, every operation still ends."""
    fs, other = roomy.mount(), roomy.mount()
    inos = [put(fs, ROOT_INO, b"%d" % number, b"").ino for number in range(2 * RECENT)]
    wanted = many(3000)
    for ino in inos:
        fs.change(lambda tx, ino=ino: tx.put(save(tx, tx.inode(ino), wanted)))  # type: ignore[misc]
    for _ in range(2):
        for ino in inos:
            assert other.getxattr(ino, b"user.00007") == b"7"


def test_the_largest_set_beside_a_writer(roomy: TestRegion) -> None:
    """Two mounts change one large string in turns; each finds the other's change."""
    fs, other = roomy.mount(), roomy.mount()
    ino = put(fs, ROOT_INO, b"file", b"").ino
    wanted = {b"user.%03x" % number: b"" for number in range(0x1000)}
    wanted |= {b"user.%02x" % number: b"" for number in range(0x100)}
    fs.change(lambda tx: tx.put(save(tx, tx.inode(ino), wanted)))
    for number in range(5):
        fs.setxattr(ino, b"user.fs", b"%d" % number, 0, ROOT)
        other.setxattr(ino, b"user.other", b"%d" % number, 0, ROOT)
    assert fs.getxattr(ino, b"user.other") == other.getxattr(ino, b"user.fs") == b"4"


def test_damage_is_found_each_time(roomy: TestRegion) -> None:
    fs, other = roomy.mount(), roomy.mount()
    ino = put(fs, ROOT_INO, b"file", b"").ino
    names = [*many(2000), b"user.00000"]  # the last one breaks the order
    entries = [encoding.encode_one(name, b"") for name in names]
    table = Table(names, entries, sum(map(len, entries)))
    fs.change(lambda tx: tx.put(_stored(tx, tx.inode(ino), table)))
    fails(errno.EUCLEAN, lambda: other.getxattr(ino, b"user.00000"))
    fails(errno.EUCLEAN, lambda: other.listxattr(ino))
    fs.unlink(ROOT_INO, b"file", ROOT)
