"""Checks a region against all invariants, live or not, and stores nothing.

The check walks everything that the root reaches, once, under a strict policy: it reports what
violates an invariant and does not descend there.  It takes two passes.  The first goes through the
inode table and, below each inode, its block map and extended attributes.  The second goes through
all directories, when the first has found which inodes exist.  Between them `InodeFacts` holds one
row of numbers per inode.

The size of the region bounds time and memory for any bytes.  No pass follows two
pointers to one block, a tree has at most MAX_HEIGHT levels, and `Report` bounds the findings.
"""

from __future__ import annotations

import stat
from array import array
from bisect import bisect_left
from collections.abc import Callable

from ivshmemfs.errors import Busy
from ivshmemfs.format import inode as ino_format
from ivshmemfs.format import node as node_format
from ivshmemfs.format import superblock, words
from ivshmemfs.format.dirent import (
    INO_MASK,
    NODE_ENTRY,
    TYPE_SHIFT,
    Interior,
    Leaf,
    decode_interior,
    decode_leaf,
)
from ivshmemfs.format.inode import INODE, PAYLOAD_OFFSET, InodeRecord
from ivshmemfs.format.node import HEADER, HEADER_SIZE, MAX_HEIGHT, ROOT_RECORD, RootRecord
from ivshmemfs.fsck import invariants as inv
from ivshmemfs.fsck.image import Image, Overtaken, Superblocks, read_superblocks
from ivshmemfs.fsck.report import Place, Report
from ivshmemfs.fsck.walk import (
    KEY_END,
    KeyRange,
    Pointer,
    directory_node_kind,
    names_of,
    pointers_in,
    walk_directory,
    walk_radix,
    weigh,
)
from ivshmemfs.region import Memory, Region

ATTEMPTS = 50  # checks of a region that peers change, before `check` raises Busy
_FIXED = (ino_format.ROOT_INO, ino_format.ORPHANS_INO)
_DIRECTORY = stat.S_IFDIR >> 12


def check(region: Region | Memory) -> Report:
    """Check all invariants of a region; `Report.clean` tells the outcome.

    Peers may work meanwhile.  If a peer commits before the check reports a violation, the check
    starts again.  Raises FormatError or Corrupt when the region has no filesystem that can be
    read, Busy when peers commit faster than it checks, UnderRepair.
    """
    memory = region if isinstance(region, Memory) else region.memory
    found = read_superblocks(memory)
    for _ in range(ATTEMPTS):
        try:
            return check_once(memory, found)
        except Overtaken:
            continue
    raise Busy("the filesystem changes faster than it can be checked: try again when it is quieter")


def check_once(memory: Memory, found: Superblocks) -> Report:
    """Check the present state once; raises Overtaken when a peer commits meanwhile."""
    return check_image(Image(memory, found.usable), found)


def check_image(image: Image, found: Superblocks) -> Report:
    """Check an image that is open; raises as `Image.refuse_moved` does."""
    report = Report()
    check_superblocks(found, image.memory.length, report)
    report.before_adding = image.refuse_moved
    check_slots(image, report)
    run = StrictRun(image, report)
    run.run()
    inodes, used = len(run.inodes.numbers), run.used
    report.summary = (
        f"{inodes} inodes, {used} of {image.block_count} blocks in use, {image.tags.count(0)} free"
    )
    return report


def check_superblocks(found: Superblocks, region_size: int, report: Report) -> None:
    """Check the invariants of both copies of the superblock; `region_size` in bytes."""
    region = Place()
    if report.test(inv.check_superblock, region, found.raw):
        geometry = superblock.geometry_of(superblock.SUPERBLOCK.unpack(found.raw))
        report.test(inv.check_geometry, region, geometry, region_size)
    report.test(inv.check_superblock_copy, region, found.raw, found.copy)


def check_slots(image: Image, report: Report) -> None:
    """Check the invariants of the peer table."""
    for occupant in image.occupants():
        place = Place(slot=occupant.slot)
        report.test(inv.check_slot, place, occupant.state, occupant.identity_valid)


class InodeFacts:
    """What the second pass needs of each inode.  The columns are parallel, one row per inode.

    *Stated* fields come from the inode itself; the check counts the *found* ones.
    """

    def __init__(self) -> None:
        self.numbers: array[int] = array("Q")  # ascending
        self.kinds = bytearray()  # mode >> 12
        self.nlinks: array[int] = array("I")  # stated
        self.parents: array[int] = array("Q")  # stated, by directories
        self.blocks: array[int] = array("Q")  # stated
        self.found_blocks: array[int] = array("Q")
        self.inode_blocks: array[int] = array("I")  # where the inode is
        self.links: array[int] = array("I")  # found names
        self.subdirs: array[int] = array("I")  # found
        self.found_parents: array[int] = array("Q")
        self.listed = bytearray()  # 1: in the list of inodes without links

    def add(self, ino: int, record: InodeRecord, block: int, found_blocks: int) -> None:
        """Append one inode; `ino` is above all others."""
        self.numbers.append(ino)
        self.kinds.append(min(record.mode >> 12, 255))
        self.nlinks.append(record.nlink)
        self.parents.append(record.parent)
        self.blocks.append(record.blocks)
        self.found_blocks.append(found_blocks)
        self.inode_blocks.append(block)
        self.links.append(0)
        self.subdirs.append(0)
        self.found_parents.append(0)
        self.listed.append(0)

    def index(self, ino: int) -> int:
        """Return the row of an inode; -1 if there is none."""
        at = bisect_left(self.numbers, ino)
        return at if at < len(self.numbers) and self.numbers[at] == ino else -1

    def place(self, row: int) -> Place:
        """Return where an inode is."""
        return Place(self.inode_blocks[row], self.numbers[row])


class StrictRun:
    """One check of one image: what all its policies share."""

    def __init__(self, image: Image, report: Report) -> None:
        self.image = image
        self.report = report
        self.inodes = InodeFacts()
        self.owners: array[int] = array("Q", bytes(8 * image.block_count))  # inode + 1; 0: none
        self.used = 0  # blocks that have an owner
        self.lost = 0  # pointers and nodes that the check could not follow
        self.root: RootRecord | None = None

    def run(self) -> None:
        """Walk everything and report."""
        root = self._root()
        if root is not None:
            self.root, slots = root
            table = StrictRadix(self, 0, ino_format.MAX_INO + 1, EachLeaf(self._inode))
            table.walk(slots, self.root.height, Place(ino=0), may_be_empty=True)
            self._second_pass()
            self._relations()
            self._counters()
        self._tags()

    # --- pointers and nodes ---

    def take(self, pointer: Pointer, owner: int) -> bool:
        """Note a reference to a block; return whether the walk may follow it."""
        block, weight, tag = pointer
        image, report = self.image, self.report
        place = Place(block, owner)
        good = report.test(inv.check_pointer, place, block, weight, tag, image.block_count)
        if good and tag:
            good = report.test(inv.check_tag, place, tag, image.tags[block])
            if good and self.owners[block]:
                report.test(inv.check_single_reference, place, owner, self.owners[block] - 1)
                good = False
            if good:
                self.owners[block] = owner + 1
                self.used += 1
                return True
        if tag:
            self.lost += 1
        return False

    def node(self, block: int, tag: int, kind: int, level: int, owner: int) -> bytes | None:
        """Return the used bytes of a metadata block, header included; None if it is damaged."""
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
        self.take((block, 1, tag), 0)
        return record, data[node_format.ROOT_POINTERS : header.used]

    # --- first pass: inodes ---

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
        self.report.test(inv.check_reserved_inodes, place, ino, record.mode >> 12)
        if self.report.test(inv.check_inode, place, record, len(data)):
            self._map(ino, record, data, place)
        self._xattr(ino, record, data, place)
        found = self.used - before[0] if self.lost == before[1] else record.blocks
        self.inodes.add(ino, record, block, found)

    def _map(self, ino: int, record: InodeRecord, data: bytes, place: Place) -> None:
        if record.payload != ino_format.MAP:
            return
        slots = data[PAYLOAD_OFFSET : PAYLOAD_OFFSET + record.payload_size]
        size = self.image.block_size
        data_leaves = DataLeaves(record.size // size)
        row = RowLeaves(data_leaves)
        count = -(-record.size // size)
        tree = StrictRadix(self, ino, count, row if record.fixed else data_leaves)
        tree.walk(slots, record.height, place, may_be_empty=True)
        self.report.test(inv.check_map, place, tree.beyond)
        if record.fixed:
            self.report.test(inv.check_row, place, count, row.found, row.strays)
        if record.size % size and data_leaves.last_block >= 0:
            tail = self.image.block(data_leaves.last_block)[record.size % size :]
            self.report.test(inv.check_tail, place, tail)

    def _xattr(self, ino: int, record: InodeRecord, data: bytes, place: Place) -> None:
        if record.xattr_pointer == words.NULL:
            start = PAYLOAD_OFFSET + record.payload_size
            self.report.test(inv.check_xattr, place, record, data[start:])
            self.report.test(inv.check_locks, place, data[start:])
            return
        if not self.report.test(inv.check_xattr, place, record, None):
            self.lost += 1
            return
        pieces: dict[int, int] = {}  # block by index
        size = self.image.block_size
        count = -(-record.xattr_size // size)

        def note(index: int, block: int, _: int) -> None:
            pieces[index] = block

        tree = StrictRadix(self, ino, count, EachLeaf(note))
        tree.walk(record.xattr_pointer, record.xattr_height, place, may_be_empty=False)
        self.report.test(inv.check_map, place, tree.beyond)
        parts = (self.image.block(pieces[i]) if i in pieces else bytes(size) for i in range(count))
        blob = b"".join(parts)
        self.report.test(inv.check_xattr, place, record, blob[: record.xattr_size])
        self.report.test(inv.check_locks, place, blob[: record.xattr_size])

    # --- second pass: directories ---

    def _second_pass(self) -> None:
        for row, kind in enumerate(self.inodes.kinds):
            if kind == _DIRECTORY:
                self._directory(row)
        for row in range(len(self.inodes.numbers)):
            stated, found = self.inodes.blocks[row], self.inodes.found_blocks[row]
            self.report.test(inv.check_blocks, self.inodes.place(row), stated, found)

    def _directory(self, row: int) -> None:
        data = self.image.block(self.inodes.inode_blocks[row])
        record = INODE.unpack(data, HEADER_SIZE)
        payload = data[PAYLOAD_OFFSET : PAYLOAD_OFFSET + record.payload_size]
        before = self.used, self.lost
        tree = StrictDirectory(self, row)
        if record.payload == ino_format.DIRLEAF:
            tree.leaf(payload, record.entries, (0, KEY_END), None)
        elif record.payload == ino_format.DIRTREE and 1 <= record.height <= MAX_HEIGHT:
            walk_directory(tree, payload, len(payload) // NODE_ENTRY, record.height)
        if self.lost == before[1]:
            self.inodes.found_blocks[row] += self.used - before[0]
            place = self.inodes.place(row)
            self.report.test(inv.check_entries, place, record.entries, tree.names)
        else:
            self.inodes.found_blocks[row] = self.inodes.blocks[row]

    # --- what only all inodes together show ---

    def _relations(self) -> None:
        inodes = self.inodes
        for ino in _FIXED:
            if inodes.index(ino) < 0:
                self.report.test(inv.check_reserved_inodes, Place(ino=ino), ino, None)
        connected = self._connected()
        for row, ino in enumerate(inodes.numbers):
            if ino in _FIXED:
                self._fixed(row, ino)
            else:
                self._linked(row, bool(connected[row]))

    def _fixed(self, row: int, ino: int) -> None:
        inodes, place = self.inodes, self.inodes.place(row)
        links = 2 + inodes.subdirs[row]
        self.report.test(inv.check_parent, place, 1, inodes.parents[row], ino, True)
        self.report.test(inv.check_links, place, inodes.nlinks[row], links)

    def _linked(self, row: int, connected: bool) -> None:
        inodes, place = self.inodes, self.inodes.place(row)
        links = inodes.links[row]
        listed = bool(inodes.listed[row])
        self.report.test(inv.check_orphan, place, listed, bool(links))
        if not links and not listed:
            return
        if links and inodes.kinds[row] == _DIRECTORY:
            parent, found = inodes.parents[row], inodes.found_parents[row]
            self.report.test(inv.check_parent, place, links, parent, found, connected)
            links = 2 + inodes.subdirs[row]
        self.report.test(inv.check_links, place, inodes.nlinks[row], links)

    def _connected(self) -> bytearray:
        """Return for each row 1 if the way from parent to parent leads to the root directory."""
        inodes = self.inodes
        known = bytearray(len(inodes.numbers))  # 0 not visited, 1 yes, 2 no, 3 on the present way
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
            return  # the check did not count what it could not follow
        inodes = self.inodes
        highest = max(inodes.numbers, default=0)
        place = Place(words.split_commit(self.image.commit)[1])
        count, orphans = len(inodes.numbers), sum(inodes.listed)
        self.report.test(inv.check_counters, place, self.root, self.used, count, orphans, highest)

    def _tags(self) -> None:
        states, leaked = self.image.states, 0
        in_flight = {
            words.make_tag(slot, *words.split_state(state)[1:])
            for slot, state in enumerate(states)
            if state >> words.SLOT_SHIFT in (words.ACTIVE, words.DEAD)
        }
        past: set[int] = set()  # (slot, incarnation) whose tags are all in the past
        for block, tag in enumerate(self.image.tags):
            if not tag:
                continue
            if tag >> words.INCARNATION_SHIFT not in past:
                latest = tag | words.COUNTER_MASK
                if not any(inv.check_tag_past(latest, states)):
                    past.add(tag >> words.INCARNATION_SHIFT)
                else:
                    self.report.test(inv.check_tag_past, Place(block), tag, states)
            if not self.owners[block] and tag not in in_flight:
                leaked += 1
        if not self.lost:
            self.report.test(inv.check_leak, Place(), leaked)


class StrictRadix:
    """The strict policy for one radix tree."""

    def __init__(self, run: StrictRun, owner: int, limit: int, take_leaves: TakeLeaves) -> None:
        self.run = run
        self.owner = owner
        self.limit = limit  # leaves from this index on are beyond the end
        self.beyond = 0  # pointers beyond the end
        self._take_leaves = take_leaves

    def walk(self, slots: bytes, height: int, place: Place, may_be_empty: bool) -> None:
        """Walk the whole tree; its top run of pointers is at `place`."""
        self.run.report.test(inv.check_slots, place, slots, len(slots), may_be_empty)
        walk_radix(self, self.run.image.fanout, slots, height)

    def enter(self, pointer: Pointer, level: int, first: int) -> bytes | None:
        """See RadixPolicy."""
        block, _, tag = pointer
        if tag and first >= self.limit:
            self.beyond += 1
        if not self.run.take(pointer, self.owner):
            return None
        data = self.run.node(block, tag, node_format.INDEX, level, self.owner)
        if data is not None:
            slots, place = data[HEADER_SIZE:], Place(block, self.owner)
            self.run.report.test(inv.check_slots, place, slots, len(slots), False)
        return data

    def leaves(self, slots: bytes, first: int) -> bytes:
        """See RadixPolicy."""
        self._take_leaves(self, slots, first)
        return slots

    def leave(self, pointer: Pointer, level: int, first: int, slots: bytes, kept: bytes) -> bytes:
        """See RadixPolicy."""
        block, weight, _ = pointer
        place = Place(block, self.owner)
        self.run.report.test(inv.check_weight, place, weight, 1 + weigh(slots))
        return words.POINTER.pack(*pointer)


TakeLeaves = Callable[[StrictRadix, bytes, int], None]  # (tree, slots, first index)


class EachLeaf:
    """Calls `on_leaf` with (index, block, tag) for every leaf that the check may follow."""

    def __init__(self, on_leaf: Callable[[int, int, int], None]) -> None:
        self._on_leaf = on_leaf

    def __call__(self, tree: StrictRadix, slots: bytes, first: int) -> None:
        """Take the leaves in `slots`."""
        for index, pointer in enumerate(pointers_in(slots), first):
            block, weight, tag = pointer
            if tag and index >= tree.limit:
                tree.beyond += 1
            if any(pointer) and tree.run.take(pointer, tree.owner):
                tree.run.report.test(inv.check_weight, Place(block, tree.owner), weight, 1)
                self._on_leaf(index, block, tag)


class DataLeaves:
    """Takes data blocks: most blocks of a region, and nothing in them can violate an invariant."""

    def __init__(self, last_index: int) -> None:
        self._last_index = last_index
        self.last_block = -1  # the block at `last_index`; -1: the file has none there

    def __call__(self, tree: StrictRadix, slots: bytes, first: int) -> None:
        """Take the leaves in `slots`."""
        run, limit, mark, taken = tree.run, tree.limit, tree.owner + 1, 0
        owners, tags, count = run.owners, run.image.tags, run.image.block_count
        for index, (block, weight, tag) in enumerate(pointers_in(slots), first):
            if tag and index >= limit:
                tree.beyond += 1
            if tag and weight == 1 and block < count and tags[block] == tag and not owners[block]:
                owners[block] = mark
                taken += 1
            elif block or weight or tag:
                run.take((block, weight, tag), tree.owner)
                run.report.test(inv.check_weight, Place(block, tree.owner), weight, 1)
        run.used += taken
        self._note_last(tree, slots, first)

    def _note_last(self, tree: StrictRadix, slots: bytes, first: int) -> None:
        at = self._last_index - first
        if 0 <= at < len(slots) // words.POINTER_SIZE:
            block, _, tag = words.POINTER.unpack_from(slots, at * words.POINTER_SIZE)
            image = tree.run.image
            own = block < image.block_count and tree.run.owners[block] == tree.owner + 1
            if own and tag and image.tags[block] == tag:
                self.last_block = block


class RowLeaves:
    """Takes the data blocks of a fixed file, and notes which do not follow each other."""

    def __init__(self, leaves: DataLeaves) -> None:
        self._leaves = leaves
        self._origin = 0  # the block of leaf 0, if the first leaf found is in its place
        self.found = 0  # leaves
        self.strays = 0  # leaves out of the row

    def __call__(self, tree: StrictRadix, slots: bytes, first: int) -> None:
        """Take the leaves in `slots`."""
        self._leaves(tree, slots, first)
        for index, (block, _, tag) in enumerate(pointers_in(slots), first):
            if tag and index < tree.limit:
                if not self.found:
                    self._origin = block - index
                self.found += 1
                self.strays += block != self._origin + index


class StrictDirectory:
    """The strict policy for one directory tree."""

    def __init__(self, run: StrictRun, row: int) -> None:
        self._run = run
        self._row = row
        self._home = run.inodes.place(row)
        self.names = 0  # names found

    @property
    def reached(self) -> int:
        """See DirectoryPolicy."""
        return self._run.used

    def _place(self, block: int | None) -> Place:
        return self._home if block is None else Place(block, self._home.ino)

    def enter(self, pointer: Pointer, level: int, block: int | None) -> bytes | None:
        """See DirectoryPolicy."""
        child, _, tag = pointer
        if not tag:
            self._run.report.add(inv.check_directory_bounds, self._place(block), "a null pointer")
            self._run.lost += 1
            return None
        if not self._run.take(pointer, self._home.ino):
            return None
        return self._run.node(child, tag, directory_node_kind(level), level, self._home.ino)

    def interior(
        self, raw: bytes, count: int, keys: KeyRange, block: int | None
    ) -> Interior | None:
        """See DirectoryPolicy."""
        place = self._place(block)
        try:
            node = decode_interior(raw, count)
        except ValueError as error:
            self._run.report.add(inv.check_directory_bounds, place, str(error))
            self._run.lost += 1
            return None
        self._run.report.test(inv.check_directory_bounds, place, node.keys, *keys, block is None)
        return node

    def leaf(self, raw: bytes, count: int, keys: KeyRange, block: int | None) -> None:
        """See DirectoryPolicy."""
        report, place = self._run.report, self._place(block)
        try:
            leaf = decode_leaf(raw, count)
        except ValueError as error:
            report.add(inv.check_directory_keys, place, str(error))
            self._run.lost += 1
        else:
            report.test(inv.check_directory_keys, place, leaf.keys, *keys)
            self._names(leaf, place)
            self.names += count
        if block is not None and not count:
            report.add(inv.check_directory_keys, place, "a leaf without names")

    def leave(self, pointer: Pointer, blocks: int) -> None:
        """See DirectoryPolicy."""
        block, weight, _ = pointer
        self._run.report.test(inv.check_weight, self._place(block), weight, blocks)

    def _names(self, leaf: Leaf, place: Place) -> None:
        report, secret = self._run.report, self._run.image.superblock.seed
        seen: set[bytes] = set()
        for key, both, name in zip(leaf.keys, leaf.inos, names_of(leaf), strict=True):
            report.test(inv.check_name, place, name, key, secret)
            if name in seen:
                report.test(inv.check_unique_name, place, name)
            seen.add(name)
            self._name(both & INO_MASK, both >> TYPE_SHIFT, name, place)

    def _name(self, target: int, kind: int, name: bytes, place: Place) -> None:
        inodes = self._run.inodes
        at = inodes.index(target)
        found = inodes.kinds[at] if at >= 0 else None
        self._run.report.test(inv.check_target, place, name, target, kind, found)
        if at < 0 or target in _FIXED:
            return
        if place.ino == ino_format.ORPHANS_INO:
            self._run.report.test(inv.check_orphan_name, place, name, target)
            inodes.listed[at] = 1
            return
        inodes.links[at] += 1
        if inodes.kinds[at] == _DIRECTORY:
            inodes.found_parents[at] = place.ino
            inodes.subdirs[self._row] += 1
