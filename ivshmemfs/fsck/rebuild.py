"""Storing a repaired filesystem: claims, new blocks, the caller's commit, then what it replaced.

What can stay, stays where it is.  What cannot is written anew into free blocks, so that a repair
that is interrupted before the commit word changes has changed nothing but tags, and can be run
again.  Only on a region that is too full for that are blocks of what is replaced written over.

A block never gets other contents under the tag that it bore, since mounts keep what they read by
block and tag.  Peers that live keep their slots, and what they have claimed in a transaction that
has not ended; whatever else a repair stores to tags and slots is a compare-and-swap from what the
survey saw, and a peer that was faster starts the survey again.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from ivshmemfs.errors import NoSpace
from ivshmemfs.format import inode as ino_format
from ivshmemfs.format import node as node_format
from ivshmemfs.format import repair, words, xattr
from ivshmemfs.format.dirent import (
    COLLISIONS,
    ENTRY_FIXED,
    NODE_ENTRY,
    TYPE_SHIFT,
    encode_leaf,
    interior_of,
)
from ivshmemfs.format.geometry import REPAIR_OFFSET
from ivshmemfs.format.inode import InodeRecord
from ivshmemfs.format.node import HEADER, HEADER_SIZE, ROOT_RECORD, HeaderRecord, RootRecord
from ivshmemfs.format.peer import INTENT_OFFSET, SLOT_SIZE
from ivshmemfs.fsck import invariants as inv
from ivshmemfs.fsck.graph import DIRECTORY, ORPHANS, Entry, Graph
from ivshmemfs.fsck.image import Overtaken
from ivshmemfs.fsck.mend import UNKNOWN_SIZE, Mended
from ivshmemfs.fsck.survey import SIZE, pointers_in
from ivshmemfs.shm.repair import RepairSession

_POINTER = words.POINTER


class Packed(NamedTuple):
    """A directory's entries as the payload of its inode."""

    payload: int
    height: int
    data: bytes
    below: int  # blocks of the tree


def trim(slots: bytes) -> bytes:
    """A run of pointers without the null pointers at its end."""
    while slots and not any(slots[-SIZE:]):
        slots = slots[:-SIZE]
    return slots


def weigh(slots: bytes) -> int:
    """Blocks below a run of pointers, as the pointers say."""
    return sum(weight for _, weight, _ in pointers_in(slots))


class Builder:
    """One repair of one surveyed region."""

    def __init__(self, graph: Graph, turn: RepairSession, living: frozenset[int]) -> None:
        self.graph = graph
        self._turn = turn
        self._living = living | {repair.SLOT}  # slots that keep their state
        self.survey = graph.survey
        self.image = graph.survey.image
        self.log = graph.survey.log
        self.final: array[int] = array("Q", bytes(8 * self.image.block_count))
        self.nodes: dict[int, bytes] = {}  # new nodes by block
        self.tails: list[tuple[int, int, int]] = []  # (inode, block, bytes that stay)
        self._past: set[int] = set()  # (slot, incarnation) of tags that can be kept
        self._reached: dict[int, int] = {}  # by the same, of living peers: the last counter
        self.slots = self._slot_words()
        self.tag = turn.tag
        self._in_flight = self._claims_in_flight()
        self._done = bytearray(self.image.block_count)
        self._room = self.survey.owners.count(0)
        self._free = self._unused()
        self._retired: list[int] = []
        self.overwrites = False
        self._leaf_at: dict[int, int] = {}
        self._lost = 0
        self._anew = 0

    # --- peers ---

    def _later(self, state: int) -> int:
        incarnation = (words.split_state(state)[1] + 1) & words.INCARNATION_MASK
        return words.make_state(words.FREE, incarnation, 0)

    def _slot_words(self) -> list[int]:
        """State words, by slot, that make every other slot free, and kept tags ones of the past."""
        states = [
            state if slot in self._living else self._later(state)
            for slot, state in enumerate(self.image.states)
        ]
        for slot in self._living:
            _, incarnation, counter = words.split_state(states[slot])
            self._reached[slot << 20 | incarnation] = counter
        pairs = zip(self.survey.tags, self.survey.owners, strict=True)
        kept = Counter(tag >> words.INCARNATION_SHIFT for tag, owner in pairs if owner)
        past: dict[int, set[int]] = {}
        for both, _ in kept.most_common():  # what most blocks say is right most likely
            slot, incarnation = both >> 20, both & words.INCARNATION_MASK
            if slot >= len(states):
                continue
            now = words.split_state(states[slot])[1]
            if slot in self._living:
                if not 0 < _ahead(incarnation, now) < inv.FUTURE:
                    self._past.add(both)
                continue
            later = (incarnation + 1) & words.INCARNATION_MASK
            before = past.setdefault(slot, set())
            if _ahead(incarnation, now) < inv.FUTURE:
                if any(0 < _ahead(other, later) < inv.FUTURE for other in before):
                    continue
                states[slot] = words.make_state(words.FREE, later, 0)
            before.add(incarnation)
            self._past.add(both)
        return states

    # --- blocks ---

    def _impossible(self, tag: int) -> bool:
        """Whether a tag is of no slot of this region, or cannot have been yet."""
        both = tag >> words.INCARNATION_SHIFT
        reached = self._reached.get(both, words.COUNTER_MASK)
        return both not in self._past or tag & words.COUNTER_MASK > reached

    def _claims_in_flight(self) -> frozenset[int]:
        """Tags of what living peers have claimed and neither published nor released."""
        return frozenset(
            words.make_tag(slot, *words.split_state(self.image.states[slot])[1:])
            for slot in self._living
            if slot and self.image.states[slot] >> words.SLOT_SHIFT == words.ACTIVE
        )

    def _unused(self) -> Iterator[int]:
        """Blocks to write to: free ones, and only then those that are claimed for nothing.

        The latter may belong to the tree from before the repair.
        """
        owners, tags = self.survey.owners, self.image.tags
        yield from (b for b, owner in enumerate(owners) if not owner and not tags[b])
        for block, owner in enumerate(owners):
            if not owner and tags[block] and tags[block] not in self._in_flight:
                yield block

    def _mine(self, block: int, tag: int, owner: int) -> bool:
        """Whether a pointer is followed; each block once."""
        if not self.survey.mine(block, tag, owner) or self._done[block]:
            return False
        self._done[block] = 1
        return True

    def _keep(self, block: int, weight: int, tag: int) -> bytes:
        self.final[block] = tag
        return _POINTER.pack(block, weight, tag)

    def _node(
        self, kind: int, level: int, owner: int, count: int, body: bytes, weight: int = 1
    ) -> bytes:
        """A new metadata block; returns the pointer to it."""
        block = next(self._free, None)
        if block is None:
            if not self._retired:
                raise NoSpace(
                    "the region is too full to store what must be made anew: nothing was changed"
                )
            block, self.overwrites = self._retired.pop(), True
        header = HeaderRecord(0, kind, level, count, 0, owner, self.tag)
        self.nodes[block] = node_format.seal(header, body)
        return self._keep(block, weight, self.tag)

    # --- radix trees ---

    def _slots_of(self, slots: bytes, height: int, owner: int, first: int, limit: int) -> bytes:
        """A run of slots with only what is kept below it."""
        out, span = [], self.image.fanout**height
        for block, _, tag in pointers_in(slots):
            new = words.NULL
            if tag and first < limit:
                if not self._mine(block, tag, owner):
                    self._lost += 1
                elif height == 0:
                    new = self._leaf(block, tag, first)
                else:
                    new = self._index(block, tag, height - 1, owner, first, limit)
            out.append(new)
            first += span
        return trim(b"".join(out))

    def _leaf(self, block: int, tag: int, index: int) -> bytes:
        self._leaf_at = {index: block}
        return self._keep(block, 1, self.tag if self._impossible(tag) else tag)

    def _index(self, block: int, tag: int, level: int, owner: int, first: int, limit: int) -> bytes:
        data = self.survey.read(block, tag, node_format.INDEX, level, owner)
        if data is None:
            self._lost += 1
            return words.NULL
        old = data[HEADER_SIZE:]
        new = self._slots_of(old, level, owner, first, limit)
        if new and new == old and not self._impossible(tag):
            return self._keep(block, 1 + weigh(new), tag)
        self._retired.append(block)
        self._anew += 1
        if not new:
            return words.NULL
        return self._node(node_format.INDEX, level, owner, 0, new, 1 + weigh(new))

    # --- inodes ---

    def _inode(self, row: int) -> bytes:
        """The pointer to an inode that is kept."""
        rows, ino = self.survey.rows, self.survey.rows.numbers[row]
        if ino in self.graph.created:
            whole, old = self._fresh_directory(), None
        else:
            self._done[rows.blocks[row]] = 1
            whole = self.graph.reader.inode(row)
            old = self.image.block(rows.blocks[row])
            old = old[HEADER_SIZE : HEADER.unpack(old).used]
            for change in whole.changes:
                self.log.add(f"inode {ino}: {change}")
        whole = self._contents(row, ino, whole)
        body = whole.body()
        block, tag = rows.blocks[row], rows.tags[row]
        if body == old and not self._impossible(tag):
            return self._keep(block, 1, tag)
        if old is not None:
            self._retired.append(block)
            self._tell(ino, old, whole.record)
        return self._node(node_format.INODE, 0, ino, 0, body)

    def _tell(self, ino: int, old: bytes, new: InodeRecord) -> None:
        """One line about the fields that only the whole could show to be wrong."""
        if len(old) < ino_format.INODE.size:
            return
        was = ino_format.INODE.unpack(old)
        told = [
            f"{field} {getattr(was, field)} becomes {getattr(new, field)}"
            for field in ("nlink", "blocks", "parent", "entries")
            if getattr(was, field) != getattr(new, field)
        ]
        self.log.add(f"inode {ino}: {', '.join(told) or 'stored anew'}")

    def _fresh_directory(self) -> Mended:
        now = time.time_ns()
        record = InodeRecord(
            mode=DIRECTORY << 12 | 0o700, nlink=2, uid=0, gid=0, size=0, blocks=1,
            atime_ns=now, mtime_ns=now, ctime_ns=now, btime_ns=now, rdev=0, parent=0, entries=0,
            payload=ino_format.EMPTY, height=0, xattr_height=0, payload_size=0, xattr_size=0,
            xattr_inline=0, xattr_pointer=words.NULL,
        )  # fmt: skip
        return Mended(record, b"", b"", ())

    def _contents(self, row: int, ino: int, whole: Mended) -> Mended:
        """The inode with what is kept of its contents, and every count of it true."""
        rows, record, payload, below = self.survey.rows, whole.record, whole.payload, 0
        if rows.kinds[row] == DIRECTORY:
            packed, names = self._directory(row, ino, whole)
            record = record._replace(
                payload=packed.payload, height=packed.height, entries=names,
                parent=rows.parents[row], nlink=2 + rows.subdirs[row],
            )  # fmt: skip
            payload, below = packed.data, packed.below
        else:
            record = record._replace(nlink=rows.links[row])
            if record.payload == ino_format.MAP:
                payload, size = self._map(ino, record, payload)
                record, below = record._replace(size=size), weigh(payload)
        pointer, beside = self._xattr(ino, record)
        if pointer != record.xattr_pointer:
            record = record._replace(xattr_pointer=pointer)
            if pointer == words.NULL:
                record = record._replace(xattr_size=0, xattr_height=0)
        record = record._replace(payload_size=len(payload), blocks=1 + below + beside)
        return whole._replace(record=record, payload=payload)

    def _map(self, ino: int, record: InodeRecord, slots: bytes) -> tuple[bytes, int]:
        """(block map, size) of a file."""
        size = self.image.block_size
        unknown = record.size == UNKNOWN_SIZE
        limit = 1 << 64 if unknown else -(-record.size // size)
        self._lost, self._anew, self._leaf_at = 0, 0, {}
        new = self._slots_of(slots, record.height, ino, 0, limit)
        if self._anew:
            self.log.add(f"inode {ino}: {self._anew} index blocks of its map are stored anew")
        if self._lost:
            self.log.add(f"inode {ino}: {self._lost} pieces of its contents are lost, now zeros")
        length = record.size
        if unknown:
            length = min((max(self._leaf_at, default=-1) + 1) * size, ino_format.MAX_FILE_SIZE)
            self.log.add(f"inode {ino}: its size was impossible; now {length}")
        for index, block in self._leaf_at.items():
            if length % size and index == length // size:
                self._tail(ino, block, length % size)
        return new, length

    def _tail(self, ino: int, block: int, kept: int) -> None:
        if any(self.image.block(block)[kept:]):
            self.tails.append((ino, block, kept))

    def _xattr(self, ino: int, record: InodeRecord) -> tuple[bytes, int]:
        """(pointer, blocks) of extended attributes that stand in blocks of their own."""
        if record.xattr_pointer == words.NULL:
            return words.NULL, 0
        size = self.image.block_size
        count = -(-record.xattr_size // size)
        blocks: dict[int, int] = {}
        self._find_leaves(record.xattr_pointer, record.xattr_height, ino, 0, count, blocks)
        parts = (self.image.block(blocks[at]) for at in range(count) if at in blocks)
        blob = b"".join(parts)[: record.xattr_size]
        try:
            xattr.decode(blob)
            whole = len(blocks) == count
        except ValueError:
            whole = False
        if not whole:
            self.log.add(f"inode {ino}: its extended attributes are lost")
            return words.NULL, 0
        pointer = self._slots_of(record.xattr_pointer, record.xattr_height, ino, 0, count)
        return pointer, weigh(pointer)

    def _find_leaves(
        self, slots: bytes, height: int, ino: int, first: int, limit: int, found: dict[int, int]
    ) -> None:
        span = self.image.fanout**height
        for block, _, tag in pointers_in(slots):
            if first < limit and self.survey.mine(block, tag, ino) and not self._done[block]:
                if height == 0:
                    found[first] = block
                else:
                    kind = node_format.INDEX
                    data = self.survey.read(block, tag, kind, height - 1, ino)
                    below = data[HEADER_SIZE:] if data is not None else b""
                    self._find_leaves(below, height - 1, ino, first, limit, found)
            first += span

    # --- directories ---

    def _directory(self, row: int, ino: int, whole: Mended) -> tuple[Packed, int]:
        """(payload, number of names)"""
        record, entries = whole.record, self.graph.rewritten.get(ino)
        if ino not in self.graph.created:
            found = self.graph.reader.contents(row)
            for block in found.nodes:
                self._done[block] = 1
            usable = not any(self._impossible(tag) for tag in found.nodes.values())
            if entries is None and usable:
                for block, tag in found.nodes.items():
                    self._keep(block, 1, tag)
                same = Packed(record.payload, record.height, whole.payload, len(found.nodes))
                return same, len(found.entries)
            self._retired += found.nodes
            self.log.add(f"directory {ino}: its names are stored anew")
            entries = found.entries if entries is None else entries
        room = ino_format.payload_capacity(self.image.block_size) - record.xattr_inline
        entries = self._keyed(entries or [])
        return self._pack(ino, entries, room), len(entries)

    def _keyed(self, entries: list[Entry]) -> list[Entry]:
        """The entries by ascending key, no key twice."""
        done: list[Entry] = []
        for base, group in groupby(sorted(entries), lambda e: e.key // COLLISIONS * COLLISIONS):
            key = base
            for entry in group:
                key = max(key, entry.key)
                if key >= base + COLLISIONS:
                    self.log.add(f"{inv.show(entry.name)} is dropped: too many of equal hash")
                else:
                    done.append(entry._replace(key=key))
                key += 1
        return done

    def _pack(self, ino: int, entries: list[Entry], room: int) -> Packed:
        if _size(entries) <= room:
            kind = ino_format.DIRLEAF if entries else ino_format.EMPTY
            return Packed(kind, 0, _encode(entries), 0)
        capacity = self.image.block_size - HEADER_SIZE
        pairs: list[tuple[int, bytes]] = []
        for part in _leaves(entries, self._wanted(entries, capacity)):
            body = _encode(part)
            pointer = self._node(node_format.DIRLEAF, 0, ino, len(part), body)
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
        return Packed(ino_format.DIRTREE, level, data, below)

    def _wanted(self, entries: list[Entry], capacity: int) -> int:
        """How full leaves are made: on a roomy region the next few names find a place."""
        roomy = self._room * capacity > 4 * _size(entries)
        return capacity * 7 // 8 if roomy else capacity

    def _interior(self, ino: int, level: int, pairs: list[tuple[int, bytes]]) -> bytes:
        weight = 1 + sum(_POINTER.unpack(pointer)[1] for _, pointer in pairs)
        body = interior_of(pairs).raw
        return self._node(node_format.DIRNODE, level, ino, len(pairs), body, weight)

    # --- inode table and root ---

    def build(self) -> int:
        """Make everything ready in memory; returns the new commit word."""
        rows = self.survey.rows
        numbers: array[int] = array("Q")
        pointers = bytearray()
        for row, ino in enumerate(rows.numbers):
            if not rows.gone[row]:
                pointers += self._inode(row)
                numbers.append(ino)
        count = len(numbers)
        height, slots = self._table(numbers, bytes(pointers))
        return self._root(height, slots, count)

    def _height(self, highest: int) -> int:
        capacity, height = node_format.root_capacity(self.image.block_size), 0
        while highest >= capacity * self.image.fanout**height:
            height += 1
        old = self.survey.root.record.height if self.survey.root else 0
        usable = any(level == old - 1 for level, _ in self.survey.table_nodes)
        return old if old > height and usable else height

    def _table(self, numbers: array[int], pointers: bytes) -> tuple[int, bytes]:
        height = self._height(max(numbers, default=0))
        for level in range(height):
            places: array[int] = array("Q")
            above = bytearray()
            for place, slots in self._runs(numbers, pointers, self.image.fanout):
                places.append(place)
                above += self._table_node(level, place, slots)
            numbers, pointers = places, bytes(above)
        parts = list(self._runs(numbers, pointers, 1 << 64))
        return height, parts[0][1] if parts else b""

    def _runs(
        self, numbers: array[int], pointers: bytes, fanout: int
    ) -> Iterator[tuple[int, bytes]]:
        """(place, slots) of the parents of a level's pointers."""
        for place, group in groupby(enumerate(numbers), lambda pair: pair[1] // fanout):
            slots = bytearray()
            for at, number in group:
                slots += bytes((number % fanout) * SIZE - len(slots))
                slots += pointers[at * SIZE : at * SIZE + SIZE]
            yield place, bytes(slots)

    def _table_node(self, level: int, place: int, slots: bytes) -> bytes:
        old = self.survey.table_nodes.get((level, place))
        if old is not None:
            block, tag = old
            data = self.survey.read(block, tag, node_format.INDEX, level, 0)
            same = data is not None and data[HEADER_SIZE:] == slots
            if same and not self._impossible(tag):
                return self._keep(block, 1 + weigh(slots), tag)
            self._retired.append(block)
        self.log.add(f"a part of the inode table is stored anew (level {level}, part {place})")
        return self._node(node_format.INDEX, level, 0, 0, slots, 1 + weigh(slots))

    def _root(self, height: int, slots: bytes, inodes: int) -> int:
        old, commit = self.survey.root, self.image.commit
        used = sum(1 for tag in self.final if tag) + 1
        orphans = self._orphans()
        sequence = words.next_sequence(self.image.sequence) & words.SEQUENCE_MASK
        record = RootRecord(
            fsid=self.image.superblock.fsid,
            sequence=sequence,
            next_ino=self.graph.next_ino(),
            used=used,
            inodes=inodes,
            orphans=orphans,
            time_ns=time.time_ns(),
            height=height,
            slots=len(slots) // SIZE,
        )
        if old is not None:
            same = record._replace(sequence=old.record.sequence, time_ns=old.record.time_ns)
            ahead = (old.record.sequence - sequence) & words.SEQUENCE_MASK
            sound = old.tag == self.image.tags[old.block] and not self._impossible(old.tag)
            leads = words.split_commit(commit)[1] == old.block and commit
            past = ahead == 0 or ahead >= words.SEQUENCE_MASK // 2
            if same == old.record and slots == old.slots and sound and leads and past:
                self._keep(old.block, 1, old.tag)
                return commit
            self._retired.append(old.block)
        self.log.add(f"a new root block: {inodes} inodes, {used} blocks in use, {orphans} orphans")
        body = ROOT_RECORD.pack(record) + slots
        block = _POINTER.unpack(self._node(node_format.ROOT, 0, 0, 0, body))[0]
        return words.make_commit(sequence, block)

    def _orphans(self) -> int:
        if ORPHANS in self.graph.rewritten:
            return len(self.graph.rewritten[ORPHANS])
        return len(self.graph.reader.contents(self.survey.rows.index(ORPHANS)).entries)

    # --- storing ---

    def store(self) -> None:
        """Claim and write everything; nobody reaches it yet.

        Raises Overtaken when a peer was faster at a tag or a slot: survey again.
        """
        self._claim()
        self._free_slots()
        memory, geometry = self.image.memory, self.image.geometry
        for block, raw in self.nodes.items():
            self._turn.check()
            memory.write(geometry.data_offset + block * geometry.block_size, raw)
        for ino, block, kept in self.tails:
            self._turn.check()
            at = geometry.data_offset + block * geometry.block_size
            memory.zero(at + kept, geometry.block_size - kept)
            self.log.add(f"inode {ino}: the bytes beyond its end are zeros again")
        memory.fence()

    def _swap(self, offset: int, old: int, new: int) -> None:
        if old != new and self.image.memory.cas(offset, old, new) != old:
            raise Overtaken

    def _claim(self) -> None:
        base, mended = self.image.geometry.tags_offset, 0
        for block, tag in enumerate(self.final):
            if tag and tag != self.image.tags[block]:
                self._turn.check()
                self._swap(base + block * words.WORD, self.image.tags[block], tag)
                mended += block not in self.nodes
        if mended:
            self.log.add(f"{mended} entries of the tag table are corrected")

    def _free_slots(self) -> None:
        memory = self.image.memory
        for slot, (old, new) in enumerate(zip(self.image.states, self.slots, strict=True)):
            if slot in self._living:
                continue
            at = REPAIR_OFFSET + slot * SLOT_SIZE
            ahead = _ahead(words.split_state(new)[1], words.split_state(old)[1])
            self._swap(at, old, new)
            if old >> words.SLOT_SHIFT != words.FREE:
                self.log.add(f"peer slot {slot} is free again")
            elif ahead > 1:  # more than every repair moves it on
                self.log.add(f"peer slot {slot} moves {ahead} incarnations on, past the tags")
            memory.cas(at + INTENT_OFFSET, memory.load(at + INTENT_OFFSET), 0)

    def release(self) -> int:
        """After the commit: free what it does not reach; returns how many blocks had leaked."""
        memory, base, freed = self.image.memory, self.image.geometry.tags_offset, 0
        for block, tag in enumerate(self.image.tags):
            if tag and not self.final[block] and tag not in self._in_flight:
                gone = memory.cas(base + block * words.WORD, tag, 0) == tag
                freed += gone and not self.survey.owners[block] and tag != self.tag
        return freed


def _ahead(incarnation: int, now: int) -> int:
    return (incarnation - now) & words.INCARNATION_MASK


def _size(entries: list[Entry]) -> int:
    return sum(ENTRY_FIXED + len(entry.name) for entry in entries)


def _encode(entries: list[Entry]) -> bytes:
    triples = [(entry.key, entry.ino | entry.kind << TYPE_SHIFT, entry.name) for entry in entries]
    return encode_leaf(triples)


def _leaves(entries: list[Entry], wanted: int) -> Iterator[list[Entry]]:
    """The entries in parts of at most `wanted` bytes, divided between hashes only."""
    part: list[Entry] = []
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
