"""A sample filesystem, and a knife: it changes bytes of a region and makes checksums good."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable
from functools import cache

from ivshmemfs.engine import Filesystem
from ivshmemfs.engine.names import make_fixed
from ivshmemfs.format import inode, node, peer, superblock, words
from ivshmemfs.format.dirent import name_key
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.format.inode import InodeRecord
from ivshmemfs.format.node import RootRecord
from ivshmemfs.fsck.image import Image, read_superblocks
from ivshmemfs.region import Memory, crc32c
from ivshmemfs.shm.watch import living
from tests.support.regions import ROOT, TestRegion, new_region, put

SIZE = 512 << 10
BIG = b"0123456789abcdef" * 3800  # 60 blocks: a map with index blocks
LONG_NAMES = [b"%03d-" % at + b"n" * 200 for at in range(170)]  # a directory tree of two levels


class Names:
    """Inode numbers of the sample."""

    folder = inner = crowd = small = big = sparse = near = far = link = device = orphan = fixed = 0


def fill(fs: Filesystem, names: type[Names]) -> None:
    """One of everything; many names for one file make a large directory of few inodes."""
    names.folder = fs.mkdir(1, b"folder", 0o755, ROOT).ino
    names.inner = fs.mkdir(names.folder, b"inner", 0o755, ROOT).ino
    names.crowd = fs.mkdir(1, b"crowd", 0o755, ROOT).ino
    names.small = put(fs, 1, b"small", b"a few bytes").ino
    names.big = put(fs, names.folder, b"big", BIG).ino
    names.sparse = put(fs, names.inner, b"sparse", b"start").ino
    handle = fs.open(names.sparse, os.O_RDWR, ROOT)
    fs.write(handle, 900_000, b"end")
    fs.release(handle)
    names.near = put(fs, 1, b"near", b"1").ino
    fs.setxattr(names.near, b"user.colour", b"red", 0, ROOT)
    names.far = put(fs, 1, b"far", b"2").ino
    fs.setxattr(names.far, b"user.large", b"value" * 500, 0, ROOT)
    names.link = fs.symlink(names.inner, b"link", b"../big", ROOT).ino
    names.device = fs.mknod(names.inner, b"device", 0o020600, 0x103, ROOT).ino
    for name in LONG_NAMES:
        fs.link(names.small, names.crowd, name, ROOT)
    for at in range(70):
        put(fs, names.folder, b"file%02d" % at, b"%d" % at)
    names.fixed, _ = fs.change(lambda tx: make_fixed(tx, 1, b"fixed", 0o600, 8192, ROOT))


def keep_an_orphan(made: TestRegion, names: type[Names]) -> None:
    """An inode that has no links any more, left behind by a mount that died with it open."""
    one, other = made.mount(), made.mount()
    names.orphan = put(one, 1, b"orphan", b"still open" * 200).ino
    handle = one.open(names.orphan, os.O_RDONLY, ROOT)
    other.unlink(1, b"orphan", ROOT)
    other.unmount()
    memory = made.region().memory
    for slot in range(16):
        at = 4096 + slot * peer.SLOT_SIZE
        memory.store(at, memory.load(at) & (1 << words.SLOT_SHIFT) - 1)  # free
    del handle


@cache
def sample() -> bytes:
    """The bytes of the sample; `Names` says where things are in it."""
    with new_region(SIZE) as made:
        fs = made.mount()
        fill(fs, Names)
        fs.unmount()
        keep_an_orphan(made, Names)
        assert not living(made.region().memory, fs.superblock.geometry)
        return made.path.read_bytes()


class Knife:
    """Changes a region as no mount would."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.image = Image(memory, read_superblocks(memory).usable)
        self.geometry = self.image.geometry
        self.block_size = self.geometry.block_size
        self.uuid = self.image.superblock.seed

    # --- blocks ---

    def at(self, block: int, offset: int = 0) -> int:
        """Byte offset in the region of a place in a block."""
        return self.geometry.data_offset + block * self.block_size + offset

    def read(self, block: int) -> bytes:
        """A whole block."""
        return self.memory.read(self.at(block), self.block_size)

    def write(self, block: int, raw: bytes, seal: bool = True) -> None:
        """A whole block, its checksum made good unless told otherwise."""
        used = struct.unpack_from("<I", raw, 8)[0]
        if seal and used <= len(raw):
            raw = struct.pack("<I", crc32c(raw[4:used])) + raw[4:]
        self.memory.write(self.at(block), raw)

    def edit(self, block: int, offset: int, raw: bytes, seal: bool = True) -> None:
        """Other bytes at a place in a block."""
        old = self.read(block)
        self.write(block, old[:offset] + raw + old[offset + len(raw) :], seal)

    def flip(self, block: int, offset: int, bit: int = 0, seal: bool = True) -> None:
        """One bit."""
        byte = self.read(block)[offset] ^ 1 << bit
        self.edit(block, offset, bytes((byte,)), seal)

    def resize(self, block: int, used: int, rest: bytes = b"") -> None:
        """Another number of bytes in use; `rest` from there."""
        raw = self.read(block)[:used] + rest
        header = node.HEADER.unpack(raw)._replace(used=len(raw))
        self.write(block, (node.HEADER.pack(header) + raw[32:]).ljust(self.block_size, b"\0"))

    def header(self, block: int, **fields: int) -> None:
        """Other header fields."""
        header = node.HEADER.unpack(self.read(block))._replace(**fields)
        self.edit(block, 0, node.HEADER.pack(header))

    # --- tags ---

    def tag(self, block: int) -> int:
        """The tag of a block."""
        return self.memory.load(self.geometry.tags_offset + 8 * block)

    def set_tag(self, block: int, tag: int) -> None:
        """Another tag."""
        self.memory.store(self.geometry.tags_offset + 8 * block, tag)

    def free_block(self) -> int:
        """A block without a tag."""
        return next(b for b in range(self.geometry.block_count) if not self.tag(b))

    # --- root and inodes ---

    @property
    def root(self) -> int:
        """The root block."""
        return words.split_commit(self.memory.load(COMMIT_OFFSET))[1]

    def root_record(self) -> RootRecord:
        """What it says."""
        return node.ROOT_RECORD.unpack(self.read(self.root), node.HEADER_SIZE)

    def edit_root(self, **fields: int) -> None:
        """Other fields of the root."""
        record = self.root_record()._replace(**fields)
        self.edit(self.root, node.HEADER_SIZE, node.ROOT_RECORD.pack(record))

    def place_of(self, ino: int) -> tuple[int, int]:
        """(block, offset) of the pointer to an inode."""
        record, block, base = self.root_record(), self.root, node.ROOT_POINTERS
        height = record.height
        fanout = node.index_fanout(self.block_size)
        while height:
            top, ino = divmod(ino, fanout**height)
            block = words.POINTER.unpack_from(self.read(block), base + 16 * top)[0]
            height, base = height - 1, node.HEADER_SIZE
        return block, base + 16 * ino

    def block_of(self, ino: int) -> int:
        """The block of an inode."""
        block, offset = self.place_of(ino)
        found: int = words.POINTER.unpack_from(self.read(block), offset)[0]
        return found

    def record(self, ino: int) -> InodeRecord:
        """What an inode says."""
        return inode.INODE.unpack(self.read(self.block_of(ino)), node.HEADER_SIZE)

    def edit_inode(self, ino: int, **fields: int | bytes) -> None:
        """Other fields of an inode."""
        record = self.record(ino)._replace(**fields)  # type: ignore[arg-type]
        self.edit(self.block_of(ino), node.HEADER_SIZE, inode.INODE.pack(record))

    def payload(self, ino: int) -> bytes:
        """The payload of an inode."""
        size = self.record(ino).payload_size
        return self.read(self.block_of(ino))[inode.PAYLOAD_OFFSET :][:size]

    def set_payload(self, ino: int, content: bytes, **fields: int | bytes) -> None:
        """Another payload of any length."""
        block, record = self.block_of(ino), self.record(ino)
        beside = self.read(block)[inode.PAYLOAD_OFFSET + record.payload_size :]
        beside = beside[: record.xattr_inline]
        self.edit_inode(ino, payload_size=len(content), **fields)
        self.resize(block, inode.PAYLOAD_OFFSET, content + beside)

    def edit_payload(self, ino: int, offset: int, raw: bytes) -> None:
        """Other bytes at a place in a payload."""
        self.edit(self.block_of(ino), inode.PAYLOAD_OFFSET + offset, raw)

    def pointers(self, ino: int, offset: int = 0) -> list[tuple[int, int, int]]:
        """The pointers in a payload from `offset` on."""
        raw = self.payload(ino)[offset:]
        return list(words.POINTER.iter_unpack(raw[: len(raw) // 16 * 16]))

    def data_block(self, ino: int) -> tuple[int, int]:
        """(index block, block) of the first data block of a file whose map is one level high."""
        index = self.pointers(ino)[0][0]
        return index, words.POINTER.unpack_from(self.read(index), node.HEADER_SIZE)[0]

    # --- directories ---

    def leaf_of(self, ino: int) -> int:
        """The first leaf block of a directory tree."""
        record = self.record(ino)
        columns, height = self.payload(ino), record.height
        while True:
            block: int = words.POINTER.unpack_from(columns, len(columns) // 24 * 8)[0]
            height -= 1
            if not height:
                return block
            raw = self.read(block)
            columns = raw[32 : node.HEADER.unpack(raw).used]

    def interior_of(self, ino: int) -> int:
        """The first interior block of a directory tree of two levels."""
        columns = self.payload(ino)
        block: int = words.POINTER.unpack_from(columns, len(columns) // 24 * 8)[0]
        return block

    def edit_entry(self, ino: int, at: int, change: Callable[[int, int], tuple[int, int]]) -> None:
        """Change (key, ino and type) of entry `at` of a directory in its inode block."""
        count = self.record(ino).entries
        raw = self.payload(ino)
        key, both = (struct.unpack_from("<Q", raw, 8 * (at + n))[0] for n in (0, count))
        key, both = change(key, both)
        self.edit_payload(ino, 8 * at, struct.pack("<Q", key))
        self.edit_payload(ino, 8 * (at + count), struct.pack("<Q", both))

    def entries(self, ino: int) -> list[tuple[int, int, bytes]]:
        """(key, ino and type, name) of a directory in its inode block."""
        count, raw = self.record(ino).entries, self.payload(ino)
        numbers = struct.unpack_from(f"<{2 * count}Q", raw)
        names, found = raw[17 * count :], []
        for at in range(count):
            size = raw[16 * count + at]
            found.append((numbers[at], numbers[count + at], names[:size]))
            names = names[size:]
        return found

    def set_entries(self, ino: int, entries: list[tuple[int, int, bytes]]) -> None:
        """Other entries of a directory in its inode block, in the order given."""
        keys, inos = [e[0] for e in entries], [e[1] for e in entries]
        raw = struct.pack(f"<{2 * len(entries)}Q", *keys, *inos)
        raw += bytes(len(e[2]) for e in entries) + b"".join(e[2] for e in entries)
        kind = inode.DIRLEAF if entries else inode.EMPTY
        self.set_payload(ino, raw, entries=len(entries), payload=kind)

    def set_names(self, ino: int, names: list[tuple[bytes, int]]) -> None:
        """Other (name, inode) pairs in a directory in its inode block.

        Names lead to what their inodes are, and are listed in the order given if they are alike.
        """
        entries = []
        for name, target in names:
            kind = self.record(target).mode >> 12
            entries.append((name_key(name, self.uuid), kind << words.SLOT_SHIFT | target, name))
        entries.sort(key=lambda entry: entry[0])
        free = 0
        for at, (key, both, name) in enumerate(entries):
            free = max(key, free)
            entries[at], free = (free, both, name), free + 1
        self.set_entries(ino, entries)

    # --- superblock and peers ---

    def edit_superblock(self, offset: int = superblock.OFFSET, **fields: int | bytes) -> None:
        """Other fields of a superblock, its checksum made good."""
        record = superblock.SUPERBLOCK.unpack(self.memory.read(offset, 512))
        raw = superblock.seal(record._replace(**fields))  # type: ignore[arg-type]
        self.memory.write(offset, raw)

    def set_slot(self, slot: int, word: int) -> None:
        """Another state word."""
        self.memory.store(self.geometry.peers_offset + (slot - 1) * peer.SLOT_SIZE, word)

    def slot(self, slot: int) -> int:
        """A state word."""
        return self.memory.load(self.geometry.peers_offset + (slot - 1) * peer.SLOT_SIZE)


def metadata_blocks(knife: Knife) -> list[int]:
    """All blocks that have a header of their own tag."""
    tags: array[int] = knife.image.tags
    return [
        block
        for block, tag in enumerate(tags)
        if tag and node.HEADER.unpack(knife.read(block)).tag == tag
    ]


def names_in(fs: Filesystem, ino: int) -> set[bytes]:
    """The names in a directory."""
    return {name for name, _, _ in fs.readdir(fs.opendir(ino), 0)} - {b".", b".."}
