"""Names and link targets that cannot be: refused where they are decoded, and mended by fsck."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import Corrupt
from ivshmemfs.format import inode, node
from ivshmemfs.format.dirent import decode_leaf
from ivshmemfs.native import is_name
from tests.support.checks import assert_sound
from tests.support.damage import Knife, names_in
from tests.support.regions import ROOT, TestRegion, new_region, put

NO_NAMES = (b".", b"..", b"/", b"a/b", b"../x", b"/etc/x", b"nul\0", b"\0")
NAMES = (b"...", b"a", b".a", b"a.", b"\x1b[2J", b"\xff" * 255, b"..x", b"\n", b"\\")


@pytest.fixture
def region() -> Iterator[TestRegion]:
    with new_region(512 << 10, block_size=1024) as made:
        fs = made.mount()
        fs.mkdir(1, b"folder", 0o755, ROOT)
        crowd = fs.mkdir(1, b"crowd", 0o755, ROOT).ino
        put(fs, 1, b"file", b"content")
        for at in range(100):
            fs.link(fs.lookup(1, b"file").ino, crowd, b"name %03d" % at, ROOT)
        fs.unmount()
        yield made


def forge_inline(region: TestRegion, name: bytes) -> None:
    """`folder` in the root directory, which its inode block contains, is called `name`."""
    knife = Knife(region.region().memory)
    called = {b"folder": name}
    forged = [(key, both, called.get(old, old)) for key, both, old in knife.entries(1)]
    knife.set_entries(1, forged)


def forge_leaf(region: TestRegion, ino: int, name: bytes) -> int:
    """The first name of a leaf block becomes `name` (of 8 bytes); returns the block."""
    knife = Knife(region.region().memory)
    block = knife.leaf_of(ino)
    count = node.HEADER.unpack(knife.read(block)).count
    knife.edit(block, node.HEADER_SIZE + 17 * count, name)
    return block


def refused(fs: Filesystem, ino: int, *words: str) -> None:
    with pytest.raises(Corrupt) as caught:
        list(fs.readdir(fs.opendir(ino), 2))
    assert caught.value.errno == errno.EUCLEAN
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(Corrupt):
        list(fs.entries(fs.opendir(ino), 2))


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_forged_name_never_leaves_the_engine(region: TestRegion, name: bytes) -> None:
    forge_inline(region, name)
    fs = region.mount(readonly=True)
    refused(fs, 1, "directory 1", ascii(name)[1:], "fsck")
    with pytest.raises(Corrupt):
        fs.lookup(1, b"none")


@pytest.mark.parametrize("name", [b"../../..", b"/tmp/xyz", b"nul\0nul\0"])
def test_a_forged_name_in_a_leaf_block(region: TestRegion, name: bytes) -> None:
    fs = region.mount(readonly=True)
    ino = fs.lookup(1, b"crowd").ino
    block = forge_leaf(region, ino, name)
    refused(region.mount(readonly=True), ino, f"directory {ino}", f"block {block}")


@pytest.mark.parametrize("name", NO_NAMES)
def test_fsck_drops_the_name_and_keeps_the_file(region: TestRegion, name: bytes) -> None:
    forge_inline(region, name)
    found = fsck.check(region.region())
    assert any("cannot be a name" in line for line in found.lines()), str(found)
    fsck.repair(region.region())
    assert_sound(region.region().memory)
    fs = region.mount(readonly=True)
    assert names_in(fs, 1) == {b"file", b"crowd", b"lost+found"}
    assert len(names_in(fs, fs.lookup(1, b"lost+found").ino)) == 1


def test_what_is_a_name() -> None:
    assert not any(map(is_name, (*NO_NAMES, b"", b"n" * 256)))
    assert all(map(is_name, NAMES))


@pytest.mark.parametrize("name", [*NO_NAMES, *NAMES])
def test_a_leaf_tells_which_name_is_none(name: bytes) -> None:
    others = [b"a", b"b.c", b"long name without"]
    for at in range(4):
        listed = [*others[:at], name, *others[at:]]
        raw = b"".join(n.to_bytes(8, "little") for n in range(4)) + bytes(32)
        raw += bytes(map(len, listed)) + b"".join(listed)
        assert decode_leaf(raw, 4).unfit() == (b"" if is_name(name) else name)


def test_a_damaged_block_is_named_once(region: TestRegion) -> None:
    fs = region.mount()
    crowd = fs.lookup(1, b"crowd").ino
    fs.unmount()
    knife = Knife(region.region().memory)
    block = knife.leaf_of(crowd)
    knife.flip(block, node.HEADER_SIZE, seal=False)
    reader = region.mount(readonly=True)
    with pytest.raises(Corrupt) as caught:
        list(reader.readdir(reader.opendir(crowd), 2))
    assert str(caught.value).count(f"block {block}") == 1


@pytest.mark.parametrize("target", [b"", b"\0", b"a\0b", b"../a\0"])
def test_a_link_target_that_cannot_be(region: TestRegion, target: bytes) -> None:
    fs = region.mount()
    link = fs.symlink(1, b"link", b"target", ROOT).ino
    fs.unmount()
    Knife(region.region().memory).set_payload(link, target, size=len(target), payload=inode.INLINE)
    with pytest.raises(Corrupt, match=f"inode {link}") as caught:
        region.mount(readonly=True).readlink(link)
    assert caught.value.errno == errno.EUCLEAN


def test_reading_names_that_are_allowed(region: TestRegion) -> None:
    fs = region.mount()
    folder = fs.lookup(1, b"folder").ino
    for name in NAMES:
        put(fs, folder, name, name)
    fs.unmount()
    fresh = region.mount(readonly=True)
    assert names_in(fresh, folder) == set(NAMES)
    handle = fresh.open(fresh.lookup(folder, b"...").ino, os.O_RDONLY, ROOT)
    assert fresh.read(handle, 0, 10) == b"..."
