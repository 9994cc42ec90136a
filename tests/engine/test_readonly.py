"""Read-only mounts store nothing, also on a mapping without write permission."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.region import open_region
from tests.engine.asking import fails
from tests.support.checks import detailed_tree
from tests.support.regions import ROOT, TestRegion, put


@pytest.fixture
def filled(made: TestRegion) -> TestRegion:
    fs = made.mount()
    put(fs, ROOT_INO, b"file", b"content" * 1000)
    put(fs, ROOT_INO, b"small", b"content")
    fs.symlink(ROOT_INO, b"link", b"to", ROOT)
    folder = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    for n in range(8):
        fs.mknod(folder, b"name%d" % n, 0o100600, 0, ROOT)
    fs.setxattr(folder, b"user.x", b"value", 0, ROOT)
    fs.unmount()
    return made


def look_at_everything(fs: Filesystem) -> None:
    assert len(detailed_tree(fs)) == 4
    fs.statfs()
    fs.tick()
    with pytest.raises(Exception, match="gone"):
        fs.getattr(12345)


@pytest.mark.parametrize("mapped", ["mapped read-only", "mapped writable"])
def test_looking_stores_nothing(filled: TestRegion, mapped: str) -> None:
    before = filled.path.read_bytes()
    with open_region(str(filled.path), readonly=mapped == "mapped read-only") as region:
        fs = Filesystem.mount(region, readonly=True)
        look_at_everything(fs)
        fs.unmount()
        assert region.memory.stores == 0
    assert filled.path.read_bytes() == before


CHANGES: dict[str, Callable[[Filesystem], object]] = {
    "create": lambda fs: fs.create(ROOT_INO, b"new", 0o644, os.O_RDWR, ROOT),
    "mkdir": lambda fs: fs.mkdir(ROOT_INO, b"new", 0o755, ROOT),
    "mknod": lambda fs: fs.mknod(ROOT_INO, b"new", stat.S_IFIFO, 0, ROOT),
    "symlink": lambda fs: fs.symlink(ROOT_INO, b"new", b"to", ROOT),
    "link": lambda fs: fs.link(fs.lookup(ROOT_INO, b"file").ino, ROOT_INO, b"new", ROOT),
    "unlink": lambda fs: fs.unlink(ROOT_INO, b"file", ROOT),
    "rmdir": lambda fs: fs.rmdir(ROOT_INO, b"dir", ROOT),
    "rename": lambda fs: fs.rename(ROOT_INO, b"file", ROOT_INO, b"new", 0, ROOT),
    "setattr": lambda fs: fs.setattr(fs.lookup(ROOT_INO, b"file").ino, ROOT, mode=0o600),
    "truncate": lambda fs: fs.setattr(fs.lookup(ROOT_INO, b"file").ino, ROOT, size=0),
    "setxattr": lambda fs: fs.setxattr(ROOT_INO, b"user.x", b"", 0, ROOT),
    "removexattr": lambda fs: fs.removexattr(fs.lookup(ROOT_INO, b"dir").ino, b"user.x", ROOT),
    "write": lambda fs: fs.write(
        fs.open(fs.lookup(ROOT_INO, b"file").ino, os.O_RDWR, ROOT), 0, b"x"
    ),
    "open-truncate": lambda fs: fs.open(
        fs.lookup(ROOT_INO, b"file").ino, os.O_RDWR | os.O_TRUNC, ROOT
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_refused(filled: TestRegion, change: Callable[[Filesystem], object]) -> None:
    region = filled.region()
    fs = Filesystem.mount(region, readonly=True)
    fails(errno.EROFS, lambda: change(fs))
    assert region.memory.stores == 0


def test_a_mapping_without_write_permission_mounts_read_only(filled: TestRegion) -> None:
    fs = Filesystem.mount(filled.region(readonly=True))
    assert fs.readonly
    fails(errno.EROFS, lambda: fs.mkdir(ROOT_INO, b"new", 0o755, ROOT))
    look_at_everything(fs)


def test_a_reader_sees_each_change_at_once(filled: TestRegion) -> None:
    reader = filled.mount(readonly=True)
    fs = filled.mount()
    for n in range(20):
        fs.mknod(ROOT_INO, b"n%d" % n, 0o100600, 0, ROOT)
        assert detailed_tree(reader) == detailed_tree(fs)
    for n in range(20):
        fs.unlink(ROOT_INO, b"n%d" % n, ROOT)
        assert len(detailed_tree(reader)) == 4 + 19 - n
