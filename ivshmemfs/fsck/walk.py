"""Walking everything that the root reaches, once, and asking the invariants about it.

Two passes: the first goes through the inode table and, under each inode, its block map and
extended attributes; the second through all directories, when it is known which inodes exist.
Between them stands one row of numbers per inode (`Inodes`), in the order of inode numbers.

Whatever the bytes say, no block is read twice by a pass (a second reference is a finding and is
not followed), trees are at most MAX_HEIGHT levels high, and the findings are bounded by `Report`;
so time and memory are bounded by the size of the region.
"""

from __future__ import annotations

import stat
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise

from ivshmemfs.format import inode as ino_format
from ivshmemfs.format import node as node_format
from ivshmemfs.format import words
from ivshmemfs.format.dirent import (
    INO_MASK,
    NODE_ENTRY,
    TYPE_SHIFT,
    Leaf,
    decode_interior,
    decode_leaf,
)
from ivshmemfs.format.inode import INODE, PAYLOAD_OFFSET, InodeRecord
from ivshmemfs.format.node import HEADER, HEADER_SIZE, MAX_HEIGHT, ROOT_RECORD, RootRecord
from ivshmemfs.fsck import invariants as inv
from ivshmemfs.fsck.image import Image
from ivshmemfs.fsck.report import Place, Report

KEY_END = 1 << 64
_FIXED = (ino_format.ROOT_INO, ino_format.ORPHANS_INO)
_POINTERS = struct.Struct("<IIQ")


class Inodes:
    """What the second pass needs to know of each inode; the columns are parallel."""

    def __init__(self) -> None:
        self.numbers: array[int] = array("Q")  # ascending
        self.kinds = bytearray()  # mode >> 12
        self.nlinks: array[int] = array("I")
        self.parents: array[int] = array("Q")  # as stated by directories
        self.blocks: array[int] = array("Q")  # as stated
        self.found_blocks: array[int] = array("Q")
        self.where: array[int] = array("I")  # inode block
        self.links: array[int] = array("I")  # names found
        self.subdirs: array[int] = array("I")
        self.found_parents: array[int] = array("Q")
        self.listed = bytearray()  # among the inodes without links

    def add(self, ino: int, record: InodeRecord, block: int, found_blocks: int) -> None:
        """One inode more; `ino` is above all others."""
        self.numbers.append(ino)
        self.kinds.append(min(record.mode >> 12, 255))
        self.nlinks.append(record.nlink)
        self.parents.append(record.parent)
        self.blocks.append(record.blocks)
        self.found_blocks.append(found_blocks)
        self.where.append(block)
        self.links.append(0)
        self.subdirs.append(0)
        self.found_parents.append(0)
        self.listed.append(0)

    def index(self, ino: int) -> int:
        """Row of an inode; -1 if there is none."""
        at = bisect_left(self.numbers, ino)
        return at if at < len(self.numbers) and self.numbers[at] == ino else -1

    def kind(self, ino: int) -> int | None:
        """mode >> 12 of an inode; None if there is none."""
        at = self.index(ino)
        return None if at < 0 else self.kinds[at]


class Tree:
    """One radix tree under way: whose it is, how far it may go, what its leaves are."""

    def __init__(
        self, owner: int, limit: int, on_leaf: Callable[[int, int, int], None] | None
    ) -> None:
        self.owner = owner
        self.limit = limit  # leaves from this index on are beyond the end
        self.on_leaf = on_leaf  # (index, block, tag); None: data, nothing to look into
        self.beyond = 0


class Walker:
    """One check of one image."""

    def __init__(self, image: Image, report: Report) -> None:
        self.image = image
        self.report = report
        self.inodes = Inodes()
        self.refs: array[int] = array("Q", bytes(8 * image.block_count))  # owner + 1
        self.used = 0  # blocks taken
        self.lost = 0  # pointers that could not be followed
        self.root: RootRecord | None = None

    def run(self) -> None:
        """Walk everything and report."""
        root = self._root()
        if root is not None:
            self.root, slots = root
            tree = Tree(0, ino_format.MAX_INO + 1, self._inode)
            self._run_of_slots(slots, tree, self.root.height, 0, Place(ino=0), True)
            self._second_pass()
            self._relations()
            self._counters()
        self._tags()

    # --- pointers and nodes ---

    def take(self, block: int, weight: int, tag: int, owner: int) -> bool:
        """Note a reference to a block; whether it may be followed."""
        image, report = self.image, self.report
        place = Place(block, owner)
        good = report.test(inv.check_pointer, place, block, weight, tag, image.block_count)
        if good and tag:
            good = report.test(inv.check_tag, place, tag, image.tags[block])
            if good and self.refs[block]:
                report.test(inv.check_single_reference, place, owner, self.refs[block] - 1)
                good = False
            if good:
                self.refs[block] = owner + 1
                self.used += 1
                return True
        if tag:
            self.lost += 1
        return False

    def node(self, block: int, tag: int, kind: int, level: int, owner: int) -> bytes | None:
        """The bytes in use of a metadata block, header included; None if it cannot be used."""
        data = self.image.block(block)
        place = Place(block, owner)
        size = self.image.block_size
        if not self.report.test(inv.check_node, place, data, size, tag, kind, level, owner):
            self.lost += 1
            return None
        return data[: HEADER.unpack(data).used]

    def _root(self) -> tuple[RootRecord, bytes] | None:
        image = self.image
        _, block = words.split_commit(image.commit)
        place = Place(block)
        if not image.commit:
            self.report.add(inv.check_root, place, "the commit word is 0: mkfs did not finish")
            return None
        if block >= image.block_count:
            text = f"the commit word leads to block {block} of {image.block_count}"
            self.report.add(inv.check_root, place, text)
            return None
        tag = image.tags[block]
        if not tag:
            self.report.add(inv.check_root, place, "the commit word leads to a free block")
            return None
        data = image.block(block)
        kind = HEADER.unpack(data).kind
        if kind != node_format.ROOT:
            text = f"the commit word leads to a {node_format.KIND_NAMES.get(kind, kind)}"
            self.report.add(inv.check_root, place, text)
            return None
        if not self.report.test(
            inv.check_node, place, data, image.block_size, tag, node_format.ROOT, 0, 0
        ):
            return None
        header = HEADER.unpack(data)
        if header.used < node_format.ROOT_POINTERS:
            self.report.add(inv.check_root, place, f"the root block has {header.used} bytes")
            return None
        record = ROOT_RECORD.unpack(data, HEADER_SIZE)
        fsid = image.superblock.fsid
        if not self.report.test(inv.check_root, place, header, record, fsid, image.commit):
            return None
        self.take(block, 1, tag, 0)
        return record, data[node_format.ROOT_POINTERS : header.used]

    # --- radix trees ---

    def _run_of_slots(
        self, slots: bytes, tree: Tree, height: int, first: int, place: Place, may_be_empty: bool
    ) -> int:
        """Follow a run of slots whose first one stands for leaf `first`.

        Returns the sum of the weights that the pointers state.
        """
        whole = len(slots) // words.POINTER_SIZE * words.POINTER_SIZE
        self.report.test(inv.check_slots, place, slots, len(slots), may_be_empty)
        if height == 0 and tree.on_leaf is None:
            return self._data_slots(slots[:whole], tree, first)
        span, total = self.image.fanout**height, 0
        for block, weight, tag in _POINTERS.iter_unpack(slots[:whole]):
            if tag and first >= tree.limit:
                tree.beyond += 1
            if block or weight or tag:
                total += weight
                if self.take(block, weight, tag, tree.owner):
                    self._child(block, weight, tag, tree, height, first)
            first += span
        return total

    def _child(
        self, block: int, weight: int, tag: int, tree: Tree, height: int, first: int
    ) -> None:
        place = Place(block, tree.owner)
        if height == 0:
            self.report.test(inv.check_weight, place, weight, 1)
            assert tree.on_leaf is not None
            tree.on_leaf(first, block, tag)
            return
        data = self.node(block, tag, node_format.INDEX, height - 1, tree.owner)
        if data is None:
            return
        slots = data[HEADER_SIZE:]
        below = self._run_of_slots(slots, tree, height - 1, first, place, False)
        self.report.test(inv.check_weight, place, weight, 1 + below)

    def _data_slots(self, slots: bytes, tree: Tree, first: int) -> int:
        """The same for data blocks, which there are most of and nothing to look into."""
        refs, tags, count = self.refs, self.image.tags, self.image.block_count
        mark, limit, total, taken = tree.owner + 1, tree.limit, 0, 0
        for block, weight, tag in _POINTERS.iter_unpack(slots):
            if tag and first >= limit:
                tree.beyond += 1
            first += 1
            if tag and weight == 1 and block < count and tags[block] == tag and not refs[block]:
                refs[block] = mark
                taken += 1
                total += 1
            elif block or weight or tag:
                total += weight
                self.take(block, weight, tag, tree.owner)
                self.report.test(inv.check_weight, Place(block, tree.owner), weight, 1)
        self.used += taken
        return total

    # --- inodes ---

    def _inode(self, ino: int, block: int, tag: int) -> None:
        before = self.used - 1, self.lost
        place = Place(block, ino)
        data = self.node(block, tag, node_format.INODE, 0, ino)
        if data is None:
            return
        if len(data) < PAYLOAD_OFFSET:
            self.report.add(inv.check_inode, place, f"an inode block of {len(data)} bytes")
            self.lost += 1
            return
        record = INODE.unpack(data, HEADER_SIZE)
        self.report.test(inv.check_fixed_inodes, place, ino, record.mode >> 12)
        if self.report.test(inv.check_inode, place, record, len(data)):
            self._map(ino, record, data, place)
        self._xattr(ino, record, data, place)
        found = self.used - before[0] if self.lost == before[1] else record.blocks
        self.inodes.add(ino, record, block, found)

    def _map(self, ino: int, record: InodeRecord, data: bytes, place: Place) -> None:
        if record.payload != ino_format.MAP:
            return
        slots = data[PAYLOAD_OFFSET : PAYLOAD_OFFSET + record.payload_size]
        tree = Tree(ino, -(-record.size // self.image.block_size), None)
        self._run_of_slots(slots, tree, record.height, 0, place, True)
        self.report.test(inv.check_map, place, tree.beyond)
        if record.size % self.image.block_size:
            self._tail(record, slots, place)

    def _tail(self, record: InodeRecord, slots: bytes, place: Place) -> None:
        """The bytes beyond the end of the file in its last block."""
        pointer = self._find(slots, record.height, record.size // self.image.block_size)
        if pointer is None:
            return
        block, _, tag = pointer
        if self.refs[block] == place.ino + 1 and self.image.tags[block] == tag:
            tail = self.image.block(block)[record.size % self.image.block_size :]
            self.report.test(inv.check_tail, place, tail)

    def _find(self, slots: bytes, height: int, index: int) -> tuple[int, int, int] | None:
        """The pointer of leaf `index`, as far as everything on the way can be used."""
        while True:
            top, index = divmod(index, self.image.fanout**height)
            if (top + 1) * words.POINTER_SIZE > len(slots):
                return None
            block, weight, tag = words.POINTER.unpack_from(slots, top * words.POINTER_SIZE)
            if not tag or block >= self.image.block_count:
                return None
            if height == 0:
                return block, weight, tag
            height -= 1
            data = self.image.block(block)
            header = HEADER.unpack(data)
            if header.kind != node_format.INDEX or header.used > len(data):
                return None
            slots = data[HEADER_SIZE : header.used]

    def _xattr(self, ino: int, record: InodeRecord, data: bytes, place: Place) -> None:
        if record.xattr_pointer == words.NULL:
            start = PAYLOAD_OFFSET + record.payload_size
            self.report.test(inv.check_xattr, place, record, data[start:])
            self.report.test(inv.check_locks, place, data[start:])
            return
        if not self.report.test(inv.check_xattr, place, record, None):
            self.lost += 1
            return
        pieces: dict[int, int] = {}
        size = self.image.block_size
        count = -(-record.xattr_size // size)

        def leaf(index: int, block: int, _: int) -> None:
            pieces[index] = block

        tree = Tree(ino, count, leaf)
        self._run_of_slots(record.xattr_pointer, tree, record.xattr_height, 0, place, False)
        self.report.test(inv.check_map, place, tree.beyond)
        parts = (self.image.block(pieces[i]) if i in pieces else bytes(size) for i in range(count))
        blob = b"".join(parts)
        self.report.test(inv.check_xattr, place, record, blob[: record.xattr_size])
        self.report.test(inv.check_locks, place, blob[: record.xattr_size])

    # --- directories ---

    def _second_pass(self) -> None:
        for row, kind in enumerate(self.inodes.kinds):
            if kind == stat.S_IFDIR >> 12:
                self._directory(row)
        for row, ino in enumerate(self.inodes.numbers):
            place = Place(self.inodes.where[row], ino)
            stated, found = self.inodes.blocks[row], self.inodes.found_blocks[row]
            self.report.test(inv.check_blocks, place, stated, found)

    def _directory(self, row: int) -> None:
        ino, block = self.inodes.numbers[row], self.inodes.where[row]
        data = self.image.block(block)
        record = INODE.unpack(data, HEADER_SIZE)
        payload = data[PAYLOAD_OFFSET : PAYLOAD_OFFSET + record.payload_size]
        place, before = Place(block, ino), (self.used, self.lost)
        names = 0
        if record.payload == ino_format.DIRLEAF:
            names = self._leaf(row, payload, record.entries, 0, KEY_END, place)
        elif record.payload == ino_format.DIRTREE and 1 <= record.height <= MAX_HEIGHT:
            count = len(payload) // NODE_ENTRY
            names = self._interior(row, payload, count, record.height, (0, KEY_END), place)
        if self.lost == before[1]:
            self.inodes.found_blocks[row] += self.used - before[0]
            self.report.test(inv.check_entries, place, record.entries, names)
        else:
            self.inodes.found_blocks[row] = self.inodes.blocks[row]

    def _interior(
        self, row: int, raw: bytes, count: int, height: int, span: tuple[int, int], place: Place
    ) -> int:
        """Follow an interior node whose children are `height` - 1 high; returns the names below."""
        try:
            node = decode_interior(raw, count)
        except ValueError as error:
            self.report.add(inv.check_directory_bounds, place, str(error))
            self.lost += 1
            return 0
        top = place.block == self.inodes.where[row]
        self.report.test(inv.check_directory_bounds, place, node.keys, *span, top)
        names, ino = 0, self.inodes.numbers[row]
        bounds = inv.child_bounds(node.keys, *span)
        for (block, weight, tag), child in zip(
            _POINTERS.iter_unpack(node.pointers), bounds, strict=True
        ):
            here = Place(block, ino)
            if not tag:
                self.report.add(inv.check_directory_bounds, place, "a null pointer")
                self.lost += 1
            elif self.take(block, weight, tag, ino):
                names += self._directory_child(row, here, tag, height - 1, child, weight)
        return names

    def _directory_child(
        self, row: int, place: Place, tag: int, level: int, span: tuple[int, int], weight: int
    ) -> int:
        kind = node_format.DIRNODE if level else node_format.DIRLEAF
        data = self.node(place.block, tag, kind, level, place.ino)
        if data is None:
            return 0
        count, body, before = HEADER.unpack(data).count, data[HEADER_SIZE:], self.used
        if level:
            names = self._interior(row, body, count, level, span, place)
        else:
            names = self._leaf(row, body, count, *span, place)
            if not count:
                self.report.add(inv.check_directory_keys, place, "a leaf without names")
        self.report.test(inv.check_weight, place, weight, 1 + self.used - before)
        return names

    def _leaf(self, row: int, raw: bytes, count: int, low: int, high: int, place: Place) -> int:
        try:
            leaf = decode_leaf(raw, count)
        except ValueError as error:
            self.report.add(inv.check_directory_keys, place, str(error))
            self.lost += 1
            return 0
        self.report.test(inv.check_directory_keys, place, leaf.keys, low, high)
        orphans = place.ino == ino_format.ORPHANS_INO
        seen: set[bytes] = set()
        for key, both, name in zip(leaf.keys, leaf.inos, names_of(leaf), strict=True):
            self.report.test(inv.check_name, place, name, key, self.image.superblock.uuid)
            if name in seen:
                self.report.test(inv.check_unique_name, place, name)
            seen.add(name)
            self._entry(row, both & INO_MASK, both >> TYPE_SHIFT, name, place, orphans)
        return count

    def _entry(
        self, row: int, target: int, kind: int, name: bytes, place: Place, orphans: bool
    ) -> None:
        inodes = self.inodes
        at = inodes.index(target)
        found = inodes.kinds[at] if at >= 0 else None
        self.report.test(inv.check_target, place, name, target, kind, found)
        if at < 0 or target in _FIXED:
            return
        if orphans:
            self.report.test(inv.check_orphan_name, place, name, target)
            inodes.listed[at] = 1
            return
        inodes.links[at] += 1
        if inodes.kinds[at] == stat.S_IFDIR >> 12:
            inodes.found_parents[at] = place.ino
            inodes.subdirs[row] += 1

    # --- what only the whole shows ---

    def _relations(self) -> None:
        inodes = self.inodes
        for ino in _FIXED:
            if inodes.index(ino) < 0:
                self.report.test(inv.check_fixed_inodes, Place(ino=ino), ino, None)
        connected = self._connected()
        for row, ino in enumerate(inodes.numbers):
            if ino in _FIXED:
                self._fixed(row, ino)
            else:
                self._linked(row, ino, bool(connected[row]))

    def _fixed(self, row: int, ino: int) -> None:
        inodes, place = self.inodes, Place(self.inodes.where[row], ino)
        links = 2 + inodes.subdirs[row]
        self.report.test(inv.check_parent, place, 1, inodes.parents[row], ino, True)
        self.report.test(inv.check_links, place, inodes.nlinks[row], links)

    def _linked(self, row: int, ino: int, connected: bool) -> None:
        inodes, place = self.inodes, Place(self.inodes.where[row], ino)
        links = inodes.links[row]
        listed = bool(inodes.listed[row])
        self.report.test(inv.check_orphan, place, listed, bool(links))
        if not links and not listed:
            return
        if links and inodes.kinds[row] == stat.S_IFDIR >> 12:
            parent, found = inodes.parents[row], inodes.found_parents[row]
            self.report.test(inv.check_parent, place, links, parent, found, connected)
            links = 2 + inodes.subdirs[row]
        self.report.test(inv.check_links, place, inodes.nlinks[row], links)

    def _connected(self) -> bytearray:
        """For each row: 1 if going up from that directory leads to the root directory."""
        inodes = self.inodes
        known = bytearray(len(inodes.numbers))  # 0 not yet, 1 yes, 2 no, 3 on the way
        top = inodes.index(ino_format.ROOT_INO)
        if top >= 0:
            known[top] = 1
        for start in range(len(known)):
            path, row = [], start
            while row >= 0 and not known[row] and inodes.found_parents[row]:
                known[row] = 3
                path.append(row)
                row = inodes.index(inodes.found_parents[row])
            outcome = 1 if row >= 0 and known[row] == 1 else 2
            for passed in path:
                known[passed] = outcome
        return bytearray(1 if state == 1 else 0 for state in known)

    def _counters(self) -> None:
        if self.root is None or self.lost:
            return  # what could not be followed was not counted either
        inodes = self.inodes
        highest = max(inodes.numbers, default=0)
        place = Place(words.split_commit(self.image.commit)[1])
        count, orphans = len(inodes.numbers), sum(inodes.listed)
        self.report.test(inv.check_counters, place, self.root, self.used, count, orphans, highest)

    def _tags(self) -> None:
        states, refs, leaked = self.image.states, self.refs, 0
        flying = {
            words.make_tag(slot, *words.split_state(state)[1:])
            for slot, state in enumerate(states)
            if state >> words.SLOT_SHIFT in (words.ACTIVE, words.DEAD)
        }
        sound: set[int] = set()  # incarnations of slots whose tags are all in the past
        for block, tag in enumerate(self.image.tags):
            if not tag:
                continue
            if tag >> words.INCARNATION_SHIFT not in sound:
                latest = tag | words.COUNTER_MASK
                if not any(inv.check_tag_past(latest, states)):
                    sound.add(tag >> words.INCARNATION_SHIFT)
                else:
                    self.report.test(inv.check_tag_past, Place(block), tag, states)
            if not refs[block] and tag not in flying:
                leaked += 1
        if not self.lost:
            self.report.test(inv.check_leak, Place(), leaked)


def names_of(leaf: Leaf) -> list[bytes]:
    """The names in a directory leaf, in its order."""
    ends = [0]
    for size in leaf.sizes:
        ends.append(ends[-1] + size)
    return [leaf.names[start:end] for start, end in pairwise(ends)]
