"""What reads the format, each as a function of arbitrary bytes that may only fail as documented."""

from __future__ import annotations

import atexit
import os
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import islice

from ivshmemfs import fsck
from ivshmemfs.engine import Filesystem
from ivshmemfs.engine.inode import attributes, parse
from ivshmemfs.errors import Corrupt, FormatError, NoSpace
from ivshmemfs.format import dirent, node, peer, superblock, words, xattr
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET
from ivshmemfs.format.inode import INODE
from ivshmemfs.format.node import HEADER, HEADER_SIZE
from ivshmemfs.region import Blocks, Memory
from tests.support.attacks import of_use
from tests.support.damage import Knife, metadata_blocks
from tests.support.exercise import Ledger
from tests.support.regions import ROOT, TestRegion, new_region, put

SIZE, BLOCK = 160 << 10, 1024
TAG = words.make_tag(1, 1, 1)
PATCH = struct.Struct("<HBQ")  # which word of the sample, how it changes, value


@cache
def _region() -> TestRegion:
    """One region for a whole run: small, because every input is tried on all of it."""
    context = new_region(SIZE, block_size=BLOCK, peer_count=3)
    atexit.register(context.__exit__, None, None, None)
    return context.__enter__()


@cache
def sample() -> bytes:
    """A filesystem with one of everything."""
    fs = _region().mount()
    folder = fs.mkdir(1, b"folder", 0o755, ROOT).ino
    for at in range(12):  # a directory that is a tree
        fs.mknod(folder, b"%02d" % at + b"n" * 240, stat.S_IFREG | 0o600, 0, ROOT)
    put(fs, 1, b"small", b"a few bytes")
    big = put(fs, 1, b"big", b"0123456789abcdef" * 1300)
    put(fs, folder, b"map", b"x" * 3000)
    fs.setxattr(big.ino, b"user.large", b"value" * 300, 0, ROOT)
    fs.setxattr(big.ino, b"user.small", b"value", 0, ROOT)
    fs.symlink(1, b"link", b"folder/map", ROOT)
    fs.symlink(1, b"long", b"there/" * 300, ROOT)
    fs.mknod(1, b"device", stat.S_IFCHR | 0o600, 0x103, ROOT)
    fs.unmount()
    return _region().path.read_bytes()


@cache
def _memory() -> Memory:
    return _region().region().memory


@cache
def _blocks() -> Blocks:
    """One block of a region, with its tag."""
    memory = _memory()
    return Blocks(memory, 0, 4096, BLOCK, 1)  # over the present contents


# --- pure readers -----------------------------------------------------------------------------


def read_superblock(data: bytes) -> None:
    """As it is, and with its checksum made good."""
    raw = data[: superblock.SUPERBLOCK.size].ljust(superblock.SUPERBLOCK.size, b"\0")
    superblock.identify(data)
    for candidate in (data, superblock.seal(superblock.SUPERBLOCK.unpack(raw))):
        try:
            found = superblock.decode(candidate)
        except (FormatError, Corrupt):
            continue
        layout = found.geometry
        tags_end = layout.tags_offset + 8 * layout.block_count
        blocks_end = layout.data_offset + layout.block_count * layout.block_size
        assert tags_end <= layout.data_offset or blocks_end <= layout.tags_offset
        assert max(tags_end, blocks_end) <= layout.region_size
        assert str(superblock.identify(candidate))


def read_peers(data: bytes) -> None:
    """A peer table."""
    count = len(data) // peer.SLOT_SIZE
    for found in peer.occupants(data, count):
        assert found.describe().isprintable()


def read_xattrs(data: bytes) -> None:
    """A set of extended attributes: what is accepted is what encoding it gives."""
    try:
        found = xattr.decode(data)
    except ValueError:
        return
    assert xattr.encode(found) == data


def read_leaf(data: bytes) -> None:
    """A directory leaf, which is then changed."""
    count, raw = int.from_bytes(data[:2], "little"), data[2:]
    try:
        leaf = dirent.decode_leaf(raw, count)
    except ValueError:
        return
    assert leaf.raw == raw
    assert leaf.name_at(count) == len(raw)
    for at in range(min(count, 3)):
        name = raw[leaf.name_at(at) : leaf.name_at(at + 1)]
        assert leaf.find(leaf.keys[at] & ~0xFF, name) <= at
        assert leaf.remove(at).size < leaf.size
    more = leaf.insert(dirent.FIRST_KEY, 1, b"name")
    assert dirent.decode_leaf(leaf.part(0, count // 2).raw, count // 2).size <= more.size


def read_interior(data: bytes) -> None:
    """An interior node of a directory."""
    count, raw = int.from_bytes(data[:2], "little"), data[2:]
    try:
        interior = dirent.decode_interior(raw, count)
    except ValueError:
        return
    assert interior.raw == raw


def read_inode(data: bytes) -> None:
    """An inode, and what stat(2) would tell of it: all must fit its fields."""
    raw = (bytes(HEADER_SIZE) + data)[:BLOCK]
    try:
        inode = parse(7, raw, BLOCK)
    except Corrupt:
        return
    attr = attributes(inode, BLOCK)
    struct.pack("<QIIIIIqqqqq", *attr)
    body = INODE.pack(inode.record) + inode.data + inode.xattr
    again = parse(7, bytes(HEADER_SIZE) + body, BLOCK)
    assert (again.record, again.data, again.xattr) == (inode.record, inode.data, inode.xattr)


def read_node(data: bytes) -> None:
    """A node in a block, through the C extension, and as each kind of node that it may be."""
    memory, blocks = _memory(), _blocks()
    raw = bytearray(data[:BLOCK].ljust(BLOCK, b"\0"))
    used = int.from_bytes(raw[8:12], "little") % (BLOCK + 64)
    raw[8:12] = used.to_bytes(4, "little")
    raw[24:32] = TAG.to_bytes(8, "little")
    memory.store(0, TAG)
    if HEADER_SIZE <= used <= BLOCK:
        blocks.write_node(0, raw[:used])
    else:
        memory.write(4096, raw)
    try:
        found = blocks.read_node(0, TAG)
    except ValueError:
        return
    assert found is not None
    assert len(found) == used
    header = HEADER.unpack(found)
    for decode in (dirent.decode_leaf, dirent.decode_interior):
        try:
            decode(found[HEADER_SIZE:], header.count)
        except ValueError:
            continue
    read_inode(found[HEADER_SIZE:])


def seeds(reader: str) -> list[bytes]:
    """Whole inputs to begin with, from the sample."""
    _memory().write(0, sample())
    k = Knife(_memory())
    nodes = [k.read(block)[: HEADER.unpack(k.read(block)).used] for block in metadata_blocks(k)]
    by_kind = {HEADER.unpack(raw).kind: raw for raw in nodes}
    count = {kind: HEADER.unpack(raw).count.to_bytes(2, "little") for kind, raw in by_kind.items()}
    pointer = words.POINTER.pack(5, 1, TAG)
    found = {
        "superblock": [sample()[: superblock.SUPERBLOCK.size]],
        "peers": [sample()[k.geometry.peers_offset :][: 2 * peer.SLOT_SIZE]],
        "xattrs": [xattr.encode({b"user.a": b"value", b"user.b": b"", b"security.c": b"x" * 40})],
        "leaf": [count[node.DIRLEAF] + by_kind[node.DIRLEAF][HEADER_SIZE:]],
        "interior": [b"\3\0" + struct.pack("<3Q", 256, 512, 1 << 40) + pointer * 3],
        "inode": [raw[HEADER_SIZE:] for raw in nodes if HEADER.unpack(raw).kind == node.INODE][:20],
        "node": list(by_kind.values()),
    }
    return found.get(reader, [PATCH.pack(7 * n, n, (1 << n) - 1) * (n % 3 + 1) for n in range(9)])


# --- the whole region -----------------------------------------------------------------------


@cache
def _places() -> tuple[int, ...]:
    """The offsets of the words of the sample's metadata."""
    memory = _memory()
    memory.write(0, sample())
    k = Knife(memory)
    g = k.geometry
    found = [*range(0, superblock.SUPERBLOCK.size, 8), COMMIT_OFFSET, HINT_OFFSET]
    found += range(g.peers_offset, g.peers_offset + 2 * peer.SLOT_SIZE, 8)
    found += range(g.tags_offset, g.tags_offset + 8 * g.block_count, 8)
    for block in metadata_blocks(k):
        used = HEADER.unpack(k.read(block)).used
        found += range(k.at(block), k.at(block) + used // 8 * 8, 8)
    return tuple(found)


def _patch(data: bytes) -> None:
    """The sample with some words changed; checksums made good."""
    places, memory = _places(), _memory()
    memory.write(0, sample())
    k = Knife(memory)
    g, touched = k.geometry, set()
    for at, verb, value in PATCH.iter_unpack(data[: len(data) // PATCH.size * PATCH.size][:88]):
        place = places[at % len(places)]
        old = memory.load(place)
        changes = (value, old ^ value, old + value, 1 << value % 64, 0, old & value)
        memory.store(place, changes[verb % len(changes)] % (1 << 64))
        touched.add(place)
    if any(place < superblock.SUPERBLOCK.size for place in touched):
        k.edit_superblock()
    for place in touched:
        if place >= g.data_offset:
            block = (place - g.data_offset) // g.block_size
            k.write(block, k.read(block))


def check_image(data: bytes) -> None:
    """fsck reads it and repairs it, and then it can be used."""
    _patch(data)
    region = _region().region()
    try:
        fsck.check(region)
        after = fsck.repair(region, force=True)
    except (FormatError, Corrupt):
        return
    assert not after.findings, f"{after}\n{after.repairs}"
    with suppress(NoSpace):  # a reserve may be as large as the region
        of_use(region)
    region.close()


def mount_image(data: bytes) -> None:
    """A mount looks at all of it, and changes something of each kind."""
    _patch(data)
    region, ledger = _region().region(), Ledger()
    ledger.patience = 0.0
    fs = ledger.attempt(lambda: Filesystem.mount(region))
    if fs is not None:
        _look(fs, ledger, 1, 2)
        _change(fs, ledger)
        ledger.attempt(fs.unmount)
    region.close()


def _look(fs: Filesystem, ledger: Ledger, folder: int, depth: int) -> None:
    entries = ledger.attempt(lambda: list(islice(fs.readdir(fs.opendir(folder), 0), 40))) or []
    for name, attr, _ in entries:
        ledger.attempt(lambda n=name: fs.lookup(folder, n))  # type: ignore[misc]
        ledger.attempt(lambda i=attr.ino: _read(fs, i))  # type: ignore[misc]
        ledger.attempt(lambda i=attr.ino: fs.readlink(i))  # type: ignore[misc]
        for key in ledger.attempt(lambda i=attr.ino: fs.listxattr(i)) or ():  # type: ignore[misc]
            ledger.attempt(lambda i=attr.ino, k=key: fs.getxattr(i, k))  # type: ignore[misc]
        if depth and stat.S_ISDIR(attr.mode) and name not in (b".", b".."):
            _look(fs, ledger, attr.ino, depth - 1)


def _read(fs: Filesystem, ino: int) -> None:
    handle = fs.open(ino, os.O_RDONLY, ROOT)
    try:
        fs.read(handle, 0, 1 << 20)
        fs.read(handle, fs.getattr(ino).size - 5, 1 << 20)
    finally:
        fs.release(handle)


def _change(fs: Filesystem, ledger: Ledger) -> None:
    steps: list[Callable[[], object]] = [
        lambda: put(fs, 1, b"new", b"new" * 700),
        lambda: fs.mkdir(1, b"made", 0o755, ROOT),
        lambda: fs.rename(1, b"new", 1, b"small", 0, ROOT),
        lambda: fs.rename(1, b"folder", 1, b"link", 2, ROOT),
        lambda: fs.setattr(fs.lookup(1, b"big").ino, ROOT, size=5000),
        lambda: fs.write(fs.open(fs.lookup(1, b"big").ino, os.O_RDWR, ROOT), 1500, b"w" * 2000),
        lambda: fs.setxattr(fs.lookup(1, b"big").ino, b"user.more", b"m" * 900, 0, ROOT),
        lambda: fs.unlink(1, b"big", ROOT),
        lambda: fs.link(fs.lookup(1, b"device").ino, fs.lookup(1, b"link").ino, b"l", ROOT),
        lambda: fs.unlink(fs.lookup(1, b"link").ino, b"map", ROOT),
        lambda: fs.rmdir(1, b"made", ROOT),
        fs.statfs,
        fs.collect,
        *[fs.tick] * 4,
    ]
    for step in steps:
        ledger.attempt(step)


READERS: dict[str, Callable[[bytes], None]] = {
    "superblock": read_superblock,
    "peers": read_peers,
    "xattrs": read_xattrs,
    "leaf": read_leaf,
    "interior": read_interior,
    "inode": read_inode,
    "node": read_node,
    "check": check_image,
    "mount": mount_image,
}
