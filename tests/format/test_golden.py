"""The golden images of format 1.0 are made, and read, as ever."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import Context, fixed
from ivshmemfs.format import inode, node, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET
from tests.format import golden
from tests.support.regions import TestRegion, get, new_region

ME = Context(1000, 1001)


@pytest.fixture(params=["empty", "tree"])
def image(request: pytest.FixtureRequest) -> bytes:
    return golden.load(request.param)


@pytest.fixture
def tree() -> Iterator[TestRegion]:
    with new_region(golden.SIZE) as made:
        made.path.write_bytes(golden.load("tree"))
        yield made


def test_mkfs_makes_the_golden_image() -> None:
    made, expected = golden.make(False), golden.load("empty")
    wrong = [at for at in range(0, len(made), 8) if made[at : at + 8] != expected[at : at + 8]]
    assert not wrong, f"differs at {wrong[:20]}"


def test_the_superblock_is_read_as_ever(image: bytes) -> None:
    found = superblock.decode(image, golden.SIZE)
    assert found.geometry == golden.GEOMETRY
    assert found.label == "golden"
    assert found.uuid == golden.PARAMETERS.uuid
    assert found.created_ns == golden.PARAMETERS.now_ns
    assert image[:512] == image[2048:2560]


def test_the_empty_image_field_by_field() -> None:
    image = golden.load("empty")
    geometry = golden.GEOMETRY
    sequence, block = words.split_commit(int.from_bytes(image[COMMIT_OFFSET:][:8], "little"))
    assert (sequence, block) == (0xFDBE6CCCA, 0)
    at = geometry.data_offset
    header = node.HEADER.unpack(image, at)
    assert header[1:6] == (node.ROOT, 0, 0, 176, 0)
    root = node.ROOT_RECORD.unpack(image, at + node.HEADER_SIZE)
    assert root == node.RootRecord(
        fsid=int.from_bytes(golden.PARAMETERS.uuid[:8], "little"), sequence=sequence, next_ino=3,
        used=3, inodes=2, orphans=0, time_ns=golden.PARAMETERS.now_ns, height=0, slots=3,
    )  # fmt: skip
    tags = [int.from_bytes(image[geometry.tags_offset + 8 * n :][:8], "little") for n in range(4)]
    assert tags == [header.tag] * 3 + [0]
    for ino, mode in ((1, 0o040755), (2, 0o040700)):
        found = inode.INODE.unpack(image, at + ino * geometry.block_size + node.HEADER_SIZE)
        assert (found.mode, found.nlink, found.uid, found.gid) == (mode, 2, 1000, 1001)
        assert (found.parent, found.entries, found.payload, found.blocks) == (ino, 0, 0, 1)


def test_fsck_finds_nothing(image: bytes) -> None:
    with new_region(golden.SIZE) as made:
        made.path.write_bytes(image)
        report = fsck.check(made.region(readonly=True))
        assert not report.findings, str(report)


def test_the_tree_is_all_there(tree: TestRegion) -> None:
    fs = tree.mount(readonly=True)
    assert get(fs, 1, b"inline") == golden.INLINE
    assert get(fs, 1, b"mapped") == golden.MAPPED
    assert get(fs, 1, b"fixed") == golden.FIXED.ljust(4096, b"\0")
    place = fs.look(lambda view: fixed.extent(view, fs.lookup(1, b"fixed").ino))
    assert fs.region.memory.read(place.offset, len(golden.FIXED)) == golden.FIXED
    assert get(fs, 1, b"sparse") == bytes(golden.FAR) + b"end"
    attr = fs.lookup(1, b"inline")
    assert (attr.mode, attr.uid, attr.gid) == (0o100640, 1000, 1001)
    assert attr.nlink == len(golden.NAMES)
    assert fs.getxattr(attr.ino, b"user.near") == b"1"
    assert fs.getxattr(fs.lookup(1, b"sparse").ino, b"user.far") == golden.ATTRIBUTE
    folder = fs.lookup(1, b"folder").ino
    names = {name for name, _, _ in fs.readdir(fs.opendir(folder), 0)} - {b".", b".."}
    assert names == {*golden.NAMES, b"to inline", b"to nowhere"}
    assert fs.readlink(fs.lookup(folder, b"to inline").ino) == b"../inline"
    assert fs.readlink(fs.lookup(folder, b"to nowhere").ino) == b"n" * 1500
    assert fs.lookup(1, b"pipe").mode == 0o010644
    device = fs.lookup(1, b"device")
    assert (device.mode, device.rdev) == (0o020600, 0x103)


def test_a_region_without_shared_locks(tree: TestRegion) -> None:
    """A region that was made before them: its other writers may not know of any."""
    memory = tree.region().memory
    record = superblock.SUPERBLOCK.unpack(memory.read(0, superblock.SUPERBLOCK.size))
    memory.write(0, superblock.seal(record._replace(ro_compat=0)))
    assert not tree.mount().shares_locks
    with new_region(golden.SIZE) as made:
        assert made.mount().shares_locks
        assert not made.mount(readonly=True).shares_locks


def test_the_tree_can_be_written_to(tree: TestRegion) -> None:
    fs = tree.mount()
    handle, _ = fs.create(1, b"new", 0o644, os.O_WRONLY, ME)
    fs.write(handle, 0, b"something")
    fs.release(handle)
    fs.unlink(1, b"mapped", ME)
    fs.unmount()
    report = fsck.check(tree.region(readonly=True))
    assert not report.findings, str(report)


def test_the_images_are_small(image: bytes) -> None:
    assert len(image) == golden.SIZE
    assert sum(path.stat().st_size for path in golden.HERE.glob("*.xz")) < 16 << 10
