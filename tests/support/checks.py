"""What tests ask of a region when they are through with it."""

from __future__ import annotations

from ivshmemfs import fsck
from ivshmemfs.engine import Attr, Filesystem
from ivshmemfs.fsck import Report
from ivshmemfs.region import Memory, open_region
from tests.support.regions import TestRegion, get


def assert_sound(memory: Memory) -> Report:
    """fsck finds no contradiction; leaks are allowed."""
    report = fsck.check(memory)
    assert report.clean, str(report)
    return report


def assert_clean(region: TestRegion) -> None:
    """fsck finds nothing at all, not even a leak."""
    with open_region(str(region.path), readonly=True) as look:
        report = assert_sound(look.memory)
    assert not report.findings, str(report)


def free_blocks(fs: Filesystem) -> int:
    """The number of blocks without a tag."""
    return fs.store.blocks.free_count()


def unreachable(fs: Filesystem) -> int:
    """Blocks that are claimed and cannot be reached from the root."""
    count = fs.superblock.geometry.block_count
    return count - free_blocks(fs) - fs.view().root.record.used


def assert_adds_up(fs: Filesystem) -> None:
    """Every block is either free or reachable."""
    assert unreachable(fs) == 0


def assert_empty(fs: Filesystem) -> None:
    """Nothing is held but the root block, both fixed inodes and the inode table's way to them.

    The table does not become flatter again: inode numbers only grow.
    """
    record = fs.view().root.record
    assert record.inodes == 2
    assert record.used == 3 + record.height
    assert_adds_up(fs)


Detail = tuple[int, int, int, int, int, tuple[tuple[bytes, bytes], ...], object]


def _detail(fs: Filesystem, parent: int, name: bytes, attr: Attr) -> Detail:
    kind = attr.mode & 0o170000
    content: object = None
    if kind == 0o100000:
        content = get(fs, parent, name)
    elif kind == 0o120000:
        content = fs.readlink(attr.ino)
    elif kind == 0o040000:
        content = detailed_tree(fs, attr.ino)
    values = tuple((n, fs.getxattr(attr.ino, n)) for n in sorted(fs.listxattr(attr.ino)))
    return attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, values, content


def detailed_tree(fs: Filesystem, ino: int = 1) -> dict[bytes, Detail]:
    """Everything below a directory that users can see, times and inode numbers left out."""
    found = {}
    for name, attr, _ in fs.readdir(fs.opendir(ino), 0):
        if name not in (b".", b".."):
            found[name] = _detail(fs, ino, name, attr)
    return found
