"""Rebuilds the trees of a surveyed region in memory: what changes, and what can stay.

What can stay, stays where it is.  The rest becomes new nodes in free blocks.  So an interrupted
repair has changed nothing but tags, and the user can run it again.  If the region is too full for
that, the repair writes over blocks of the tree that it replaces.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from ivshmemfs.errors import NoSpace
from ivshmemfs.format import inode as ino_format
from ivshmemfs.format import node as node_format
from ivshmemfs.format import words, xattr
from ivshmemfs.format.dirent import (
    COLLISIONS,
    ENTRY_FIXED,
    NODE_ENTRY,
    TYPE_SHIFT,
    encode_leaf,
    interior_of,
)
from ivshmemfs.format.inode import InodeRecord
from ivshmemfs.format.node import HEADER, HEADER_SIZE, ROOT_RECORD, HeaderRecord, RootRecord
from ivshmemfs.fsck import invariants as inv
from ivshmemfs.fsck.repair.inodes import UNKNOWN_SIZE, SoundInode
from ivshmemfs.fsck.repair.names import DIRECTORY, ORPHANS, FoundName, KeptNames
from ivshmemfs.fsck.repair.slots import SlotPlan
from ivshmemfs.fsck.repair.survey import (
    LenientRadix,
    NodeReader,
    Settled,
    Survey,
    Untaken,
    read_node,
)
from ivshmemfs.fsck.repair.writer import RepairedTree, Tail
from ivshmemfs.fsck.walk import Pointer, pointers_in, weigh

_POINTER = words.POINTER
_SIZE = words.POINTER_SIZE


class PackedDirectory(NamedTuple):
    """The names of a directory as the payload of its inode."""

    payload: int
    height: int
    data: bytes
    below: int  # blocks of the tree


class BlockPlan:
    """Which blocks the repaired tree has: those that stay, and new nodes in memory."""

    def __init__(self, survey: Survey, slots: SlotPlan, tag: int) -> None:
        self.tags: array[int] = array("Q", bytes(8 * survey.image.block_count))  # 0: not reached
        self.nodes: dict[int, bytes] = {}  # new nodes by block
        self.overwrites = False  # a new node is in a block of the tree that it replaces
        self._slots = slots
        self._tag = tag  # of the claims of this repair
        self._free = self._unused(survey)
        self._retired: list[int] = []  # blocks that the repaired tree replaces

    def _unused(self, survey: Survey) -> Iterator[int]:
        """Return the blocks to write to: free ones first, then claimed ones that nothing reaches.

        The latter may belong to the tree from before the repair.
        """
        owners, tags = survey.owners, survey.image.tags
        yield from (b for b, owner in enumerate(owners) if not owner and not tags[b])
        for block, owner in enumerate(owners):
            if not owner and tags[block] and tags[block] not in self._slots.in_flight:
                yield block

    def retire(self, block: int) -> None:
        """Note that the repaired tree does not have `block` any more."""
        self._retired.append(block)

    def keep(self, block: int, weight: int, tag: int) -> bytes:
        """Keep `block` under `tag`; return the pointer to it."""
        self.tags[block] = tag
        return _POINTER.pack(block, weight, tag)

    def keep_data(self, block: int, tag: int) -> bytes:
        """Keep a data block, under a new tag if its own is impossible; return the pointer."""
        return self.keep(block, 1, self._tag if self._slots.impossible(tag) else tag)

    def add_node(
        self, kind: int, level: int, owner: int, count: int, body: bytes, weight: int = 1
    ) -> bytes:
        """Add a metadata block; return the pointer to it.  Raises NoSpace."""
        block = next(self._free, None)
        if block is None:
            if not self._retired:
                raise NoSpace(
                    "the region is too full to store the repaired metadata: nothing was changed"
                )
            block, self.overwrites = self._retired.pop(), True
        header = HeaderRecord(0, kind, level, count, 0, owner, self._tag)
        self.nodes[block] = node_format.seal(header, body)
        return self.keep(block, weight, self._tag)


class _RebuiltRadix:
    """The keeper that rebuilds one radix tree from what is kept of it."""

    def __init__(
        self, blocks: BlockPlan, slots: SlotPlan, reader: NodeReader, owner: int, limit: int
    ) -> None:
        self._blocks = blocks
        self._slots = slots
        self._reader = reader
        self._owner = owner
        self._limit = limit
        self.last_index = -1  # of the last leaf that is kept
        self.last_block = -1
        self.lost_count = 0
        self.new_nodes = 0
        self._origins = set[int]()  # where leaf 0 would be if each leaf began the row: two are kept
        self._kept = 0  # leaves that are kept

    def is_row(self, count: int) -> bool:
        """Return whether `count` leaves were kept, and their blocks follow each other."""
        return self._kept == count > 0 and len(self._origins) == 1

    def leaves(self, slots: bytes, first: int) -> bytes:
        kept = []
        for index, (block, _, tag) in enumerate(pointers_in(slots), first):
            new = words.NULL
            if tag and index < self._limit:
                if self._reader.claim(block, tag, self._owner):
                    new = self._blocks.keep_data(block, tag)
                    self.last_index, self.last_block = index, block
                    self._kept += 1
                    if len(self._origins) < 2:
                        self._origins.add(block - index)
                else:
                    self.lost_count += 1
            kept.append(new)
        return b"".join(kept)

    def node(self, pointer: Pointer, level: int, first: int, slots: bytes, kept: bytes) -> bytes:
        block, _, tag = pointer
        weight = 1 + weigh(kept)
        if kept and kept == slots and not self._slots.impossible(tag):
            return self._blocks.keep(block, weight, tag)
        self._blocks.retire(block)
        self.new_nodes += 1
        if not kept:
            return words.NULL
        return self._blocks.add_node(node_format.INDEX, level, self._owner, 0, kept, weight)

    def lost(self, pointer: Pointer) -> None:
        self.lost_count += bool(pointer[2])  # a pointer without tag leads nowhere

    def beyond(self) -> None:
        """A pointer beyond the end loses nothing."""


class _Pieces:
    """The keeper that collects the blocks of extended attributes, and keeps nothing yet."""

    def __init__(self, reader: NodeReader, owner: int, limit: int) -> None:
        self._reader = reader
        self._owner = owner
        self._limit = limit
        self.blocks: dict[int, int] = {}  # block by index

    def leaves(self, slots: bytes, first: int) -> bytes:
        for index, (block, _, tag) in enumerate(pointers_in(slots), first):
            if index < self._limit and self._reader.claim(block, tag, self._owner):
                self.blocks[index] = block
        return slots

    def node(self, pointer: Pointer, level: int, first: int, slots: bytes, kept: bytes) -> bytes:
        return _POINTER.pack(*pointer)

    def lost(self, pointer: Pointer) -> None:
        """The number of blocks shows it."""

    def beyond(self) -> None:
        """A pointer beyond the end loses nothing."""


class TreeBuilder:
    """Rebuilds the trees of one surveyed region."""

    def __init__(self, names: KeptNames, slots: SlotPlan, tag: int) -> None:
        self._names = names
        self._survey = names.survey
        self._image = names.survey.image
        self._inodes = names.survey.inodes
        self._log = names.survey.log
        self._slots = slots
        self._blocks = BlockPlan(names.survey, slots, tag)
        self._tails: list[Tail] = []
        self._taken = bytearray(self._image.block_count)  # 1: the rebuild followed a pointer to it
        self._claims = Settled(names.survey.claims, self._taken)
        self._room = names.survey.owners.count(0)  # blocks

    def build(self) -> RepairedTree:
        """Return the repaired tree.

        Raises NoSpace when the region is too full for it.
        """
        numbers: array[int] = array("Q")
        pointers = bytearray()
        for row, ino in enumerate(self._inodes.numbers):
            if not self._inodes.dropped[row]:
                pointers += self._inode(row)
                numbers.append(ino)
        count = len(numbers)
        height, slots = self._table(numbers, bytes(pointers))
        commit = self._root(height, slots, count)
        blocks = self._blocks
        return RepairedTree(commit, blocks.tags, blocks.nodes, self._tails, blocks.overwrites)

    # --- inodes ---

    def _inode(self, row: int) -> bytes:
        """Return the pointer to a kept inode."""
        inodes, ino = self._inodes, self._inodes.numbers[row]
        if ino in self._names.created:
            sound, old = self._fresh_directory(), None
        else:
            self._taken[inodes.blocks[row]] = 1
            sound = self._names.reader.inode(row)
            old = self._image.block(inodes.blocks[row])
            old = old[HEADER_SIZE : HEADER.unpack(old).used]
            for change in sound.changes:
                self._log.add(f"inode {ino}: {change}")
        sound = self._contents(row, ino, sound)
        body = sound.body()
        block, tag = inodes.blocks[row], inodes.tags[row]
        if body == old and not self._slots.impossible(tag):
            return self._blocks.keep(block, 1, tag)
        if old is not None:
            self._blocks.retire(block)
            self._tell(ino, old, sound.record)
        return self._blocks.add_node(node_format.INODE, 0, ino, 0, body)

    def _tell(self, ino: int, old: bytes, new: InodeRecord) -> None:
        """Log the fields that only the whole tree shows to be wrong."""
        if len(old) < ino_format.INODE.size:
            return
        was = ino_format.INODE.unpack(old)
        told = [
            f"{field} {getattr(was, field)} becomes {getattr(new, field)}"
            for field in ("nlink", "blocks", "parent", "entries")
            if getattr(was, field) != getattr(new, field)
        ]
        self._log.add(f"inode {ino}: {', '.join(told) or 'stored anew'}")

    def _fresh_directory(self) -> SoundInode:
        now = time.time_ns()
        record = InodeRecord(
            mode=DIRECTORY << 12 | 0o700, nlink=2, uid=0, gid=0, size=0, blocks=1,
            atime_ns=now, mtime_ns=now, ctime_ns=now, btime_ns=now, rdev=0, parent=0, entries=0,
            payload=ino_format.EMPTY, height=0, xattr_height=0, fixed=0, payload_size=0,
            xattr_size=0, xattr_inline=0, xattr_pointer=words.NULL,
        )  # fmt: skip
        return SoundInode(record, b"", b"", ())

    def _contents(self, row: int, ino: int, sound: SoundInode) -> SoundInode:
        """Return the inode with the kept part of its contents, and with true counts."""
        inodes, record, payload, below = self._inodes, sound.record, sound.payload, 0
        if inodes.kinds[row] == DIRECTORY:
            packed, names = self._directory(row, ino, sound)
            record = record._replace(
                payload=packed.payload, height=packed.height, entries=names,
                parent=inodes.parents[row], nlink=2 + inodes.subdirs[row],
            )  # fmt: skip
            payload, below = packed.data, packed.below
        else:
            record = record._replace(nlink=inodes.links[row])
            if record.payload == ino_format.MAP:
                payload, record = self._map(ino, record, payload)
                below = weigh(payload)
        pointer, beside = self._xattr(ino, record)
        if pointer != record.xattr_pointer:
            record = record._replace(xattr_pointer=pointer)
            if pointer == words.NULL:
                record = record._replace(xattr_size=0, xattr_height=0)
        record = record._replace(payload_size=len(payload), blocks=1 + below + beside)
        return sound._replace(record=record, payload=payload)

    def _rebuild_radix(
        self, slots: bytes, height: int, owner: int, limit: int
    ) -> tuple[bytes, _RebuiltRadix]:
        reader = NodeReader(self._image, self._claims)
        keeper = _RebuiltRadix(self._blocks, self._slots, reader, owner, limit)
        return LenientRadix(reader, owner, limit, keeper).walk(slots, height), keeper

    def _map(self, ino: int, record: InodeRecord, slots: bytes) -> tuple[bytes, InodeRecord]:
        """Return (block map, record with the true size) of a file.

        A fixed file whose blocks are not a row becomes an ordinary one.
        """
        size = self._image.block_size
        unknown = record.size == UNKNOWN_SIZE
        limit = 1 << 64 if unknown else -(-record.size // size)
        new, rebuilt = self._rebuild_radix(slots, record.height, ino, limit)
        if rebuilt.new_nodes:
            text = f"{rebuilt.new_nodes} index blocks of its map are stored anew"
            self._log.add(f"inode {ino}: {text}")
        if rebuilt.lost_count:
            text = f"{rebuilt.lost_count} pieces of its contents are lost, now zeros"
            self._log.add(f"inode {ino}: {text}")
        length = record.size
        if unknown:
            length = min((rebuilt.last_index + 1) * size, ino_format.MAX_FILE_SIZE)
            self._log.add(f"inode {ino}: its size was impossible; now {length}")
        if length % size and rebuilt.last_index == length // size:
            self._tail(ino, rebuilt.last_block, length % size)
        if record.fixed and not rebuilt.is_row(-(-length // size)):
            self._log.add(f"inode {ino}: its blocks are not a row, so it is an ordinary file now")
            record = record._replace(fixed=0)
        return new, record._replace(size=length)

    def _tail(self, ino: int, block: int, kept: int) -> None:
        if any(self._image.block(block)[kept:]):
            self._tails.append(Tail(ino, block, kept))

    def _xattr(self, ino: int, record: InodeRecord) -> tuple[bytes, int]:
        """Return (pointer, blocks) of extended attributes that have blocks of their own."""
        if record.xattr_pointer == words.NULL:
            return words.NULL, 0
        size = self._image.block_size
        count = -(-record.xattr_size // size)
        slots, height = record.xattr_pointer, record.xattr_height
        reader = NodeReader(self._image, Untaken(self._claims))
        found = _Pieces(reader, ino, count)
        LenientRadix(reader, ino, count, found).walk(slots, height)
        parts = (self._image.block(found.blocks[at]) for at in range(count) if at in found.blocks)
        blob = b"".join(parts)[: record.xattr_size]
        try:
            xattr.decode(blob)
            whole = len(found.blocks) == count
        except ValueError:
            whole = False
        if not whole:
            self._log.add(f"inode {ino}: its extended attributes are lost")
            return words.NULL, 0
        pointer, _ = self._rebuild_radix(slots, height, ino, count)
        return pointer, weigh(pointer)

    # --- directories ---

    def _directory(self, row: int, ino: int, sound: SoundInode) -> tuple[PackedDirectory, int]:
        """Return (payload, number of names) of a directory."""
        record, entries = sound.record, self._names.rewritten.get(ino)
        if ino not in self._names.created:
            found = self._names.reader.contents(row)
            for block in found.nodes:
                self._taken[block] = 1
            usable = not any(self._slots.impossible(tag) for tag in found.nodes.values())
            if entries is None and usable:
                for block, tag in found.nodes.items():
                    self._blocks.keep(block, 1, tag)
                same = PackedDirectory(
                    record.payload, record.height, sound.payload, len(found.nodes)
                )
                return same, len(found.names)
            for block in found.nodes:
                self._blocks.retire(block)
            self._log.add(f"directory {ino}: its names are stored anew")
            entries = found.names if entries is None else entries
        room = ino_format.payload_capacity(self._image.block_size) - record.xattr_inline
        entries = self._keyed(entries or [])
        return self._pack(ino, entries, room), len(entries)

    def _keyed(self, entries: list[FoundName]) -> list[FoundName]:
        """Return the names by ascending key, no key twice."""
        done: list[FoundName] = []
        for base, group in groupby(sorted(entries), lambda e: e.key // COLLISIONS * COLLISIONS):
            key = base
            for entry in group:
                key = max(key, entry.key)
                if key >= base + COLLISIONS:
                    self._log.add(f"{inv.show(entry.name)} is dropped: too many of equal hash")
                else:
                    done.append(entry._replace(key=key))
                key += 1
        return done

    def _pack(self, ino: int, entries: list[FoundName], room: int) -> PackedDirectory:
        if _size(entries) <= room:
            kind = ino_format.DIRLEAF if entries else ino_format.EMPTY
            return PackedDirectory(kind, 0, _encode(entries), 0)
        capacity = self._image.block_size - HEADER_SIZE
        pairs: list[tuple[int, bytes]] = []
        for part in _leaves(entries, self._wanted(entries, capacity)):
            body = _encode(part)
            pointer = self._blocks.add_node(node_format.DIRLEAF, 0, ino, len(part), body)
            pairs.append((part[0].key // COLLISIONS * COLLISIONS, pointer))
        pairs[0] = 0, pairs[0][1]
        level = 1
        while len(pairs) * NODE_ENTRY > room:
            per_node = capacity // NODE_ENTRY
            parts = [pairs[at : at + per_node] for at in range(0, len(pairs), per_node)]
            pairs = [(part[0][0], self._interior(ino, level, part)) for part in parts]
            level += 1
        data = interior_of(pairs).raw
        below = sum(_POINTER.unpack(pointer)[1] for _, pointer in pairs)
        return PackedDirectory(ino_format.DIRTREE, level, data, below)

    def _wanted(self, entries: list[FoundName], capacity: int) -> int:
        """Return the bytes per leaf; with free blocks, leaves keep room for the next names."""
        roomy = self._room * capacity > 4 * _size(entries)
        return capacity * 7 // 8 if roomy else capacity

    def _interior(self, ino: int, level: int, pairs: list[tuple[int, bytes]]) -> bytes:
        weight = 1 + sum(_POINTER.unpack(pointer)[1] for _, pointer in pairs)
        body = interior_of(pairs).raw
        return self._blocks.add_node(node_format.DIRNODE, level, ino, len(pairs), body, weight)

    # --- inode table and root ---

    def _height(self, highest: int) -> int:
        capacity, height = node_format.root_capacity(self._image.block_size), 0
        while highest >= capacity * self._image.fanout**height:
            height += 1
        old = self._survey.root.record.height if self._survey.root else 0
        usable = any(level == old - 1 for level, _ in self._survey.table_nodes)
        return old if old > height and usable else height

    def _table(self, numbers: array[int], pointers: bytes) -> tuple[int, bytes]:
        height = self._height(max(numbers, default=0))
        for level in range(height):
            places: array[int] = array("Q")
            above = bytearray()
            for place, slots in self._runs(numbers, pointers, self._image.fanout):
                places.append(place)
                above += self._table_node(level, place, slots)
            numbers, pointers = places, bytes(above)
        parts = list(self._runs(numbers, pointers, 1 << 64))
        return height, parts[0][1] if parts else b""

    def _runs(
        self, numbers: array[int], pointers: bytes, fanout: int
    ) -> Iterator[tuple[int, bytes]]:
        """Return (place, slots) of the parents of a level's pointers."""
        for place, group in groupby(enumerate(numbers), lambda pair: pair[1] // fanout):
            slots = bytearray()
            for at, number in group:
                slots += bytes((number % fanout) * _SIZE - len(slots))
                slots += pointers[at * _SIZE : at * _SIZE + _SIZE]
            yield place, bytes(slots)

    def _table_node(self, level: int, place: int, slots: bytes) -> bytes:
        old = self._survey.table_nodes.get((level, place))
        if old is not None:
            block, tag = old
            data = read_node(self._image, block, tag, node_format.INDEX, level, 0)
            same = data is not None and data[HEADER_SIZE:] == slots
            if same and not self._slots.impossible(tag):
                return self._blocks.keep(block, 1 + weigh(slots), tag)
            self._blocks.retire(block)
        self._log.add(f"a part of the inode table is stored anew (level {level}, part {place})")
        return self._blocks.add_node(node_format.INDEX, level, 0, 0, slots, 1 + weigh(slots))

    def _root(self, height: int, slots: bytes, inodes: int) -> int:
        old, commit = self._survey.root, self._image.commit
        used = sum(1 for tag in self._blocks.tags if tag) + 1
        orphans = self._orphans()
        sequence = words.next_sequence(self._image.sequence) & words.SEQUENCE_MASK
        record = RootRecord(
            fsid=self._image.superblock.fsid,
            sequence=sequence,
            next_ino=self._names.next_ino(),
            used=used,
            inodes=inodes,
            orphans=orphans,
            time_ns=time.time_ns(),
            height=height,
            slots=len(slots) // _SIZE,
        )
        if old is not None:
            same = record._replace(sequence=old.record.sequence, time_ns=old.record.time_ns)
            ahead = (old.record.sequence - sequence) & words.SEQUENCE_MASK
            sound = old.tag == self._image.tags[old.block] and not self._slots.impossible(old.tag)
            leads = words.split_commit(commit)[1] == old.block and commit
            past = ahead == 0 or ahead >= words.SEQUENCE_MASK // 2
            if same == old.record and slots == old.slots and sound and leads and past:
                self._blocks.keep(old.block, 1, old.tag)
                return commit
            self._blocks.retire(old.block)
        self._log.add(f"a new root block: {inodes} inodes, {used} blocks in use, {orphans} orphans")
        body = ROOT_RECORD.pack(record) + slots
        block = _POINTER.unpack(self._blocks.add_node(node_format.ROOT, 0, 0, 0, body))[0]
        return words.make_commit(sequence, block)

    def _orphans(self) -> int:
        if ORPHANS in self._names.rewritten:
            return len(self._names.rewritten[ORPHANS])
        return len(self._names.reader.contents(self._inodes.index(ORPHANS)).names)


def _size(entries: list[FoundName]) -> int:
    return sum(ENTRY_FIXED + len(entry.name) for entry in entries)


def _encode(names: list[FoundName]) -> bytes:
    return encode_leaf([(e.key, e.ino | e.kind << TYPE_SHIFT, e.name) for e in names])


def _leaves(entries: list[FoundName], wanted: int) -> Iterator[list[FoundName]]:
    """Return the names in parts of at most `wanted` bytes; equal hashes stay together."""
    part: list[FoundName] = []
    size = 0
    for _, same in groupby(entries, lambda entry: entry.key // COLLISIONS):
        group = list(same)
        more = _size(group)
        if part and size + more > wanted:
            yield part
            part, size = [], 0
        part += group
        size += more
    if part:
        yield part
