"""Surveys a damaged region: which blocks belong to which inode, and what a repair can keep.

The survey walks the same trees as the check, under a lenient policy.  It follows a pointer that
contradicts the tag table if no other pointer has a better claim to the block.  The repair then
corrects the table.  After the survey `owners` has the inode that keeps each block, and `tags` the
tag of each block.  Both are final.  Later walks read the trees again under `Settled` claims, so
they find the same blocks.

If the way to inodes is damaged, the survey searches all blocks.  An inode block has the number of
its inode, a directory leaf the number of its directory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from ivshmemfs.format import inode as ino_format
from ivshmemfs.format import node as node_format
from ivshmemfs.format import words
from ivshmemfs.format.dirent import NODE_ENTRY, Interior, Leaf, decode_interior, decode_leaf
from ivshmemfs.format.inode import PAYLOAD_OFFSET
from ivshmemfs.format.node import HEADER, HEADER_SIZE, ROOT_RECORD, RootRecord
from ivshmemfs.fsck import invariants as inv
from ivshmemfs.fsck.image import Image
from ivshmemfs.fsck.repair.inodes import make_sound
from ivshmemfs.fsck.walk import (
    KeyRange,
    Pointer,
    directory_node_kind,
    pointers_in,
    walk_directory,
    walk_radix,
)

NO_LIMIT = 1 << 192  # above the index of any leaf of a tree of MAX_HEIGHT levels


class RepairLog:
    """What a repair tells its user, in bounded memory."""

    LIMIT = 500  # lines; the log counts the rest

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.more = 0

    def add(self, text: str) -> None:
        """Append one line."""
        if len(self.lines) < self.LIMIT:
            self.lines.append(text)
        else:
            self.more += 1

    def text(self) -> list[str]:
        """Return all lines, and one that counts those left out."""
        return [*self.lines, f"and {self.more} more"] if self.more else self.lines


class KeptInodes:
    """The inodes that a repair keeps, by ascending number.  The columns are parallel."""

    def __init__(self) -> None:
        self.numbers: array[int] = array("Q")
        self.blocks: array[int] = array("I")  # where the inode is
        self.tags: array[int] = array("Q")
        self.kinds = bytearray()  # mode >> 12, of the sound inode
        self.nlinks: array[int] = array("I")  # as the inode states it
        self.links: array[int] = array("I")  # names that the repair keeps
        self.parents: array[int] = array("Q")  # directories: the directory with the kept name
        self.subdirs: array[int] = array("I")
        self.dropped = bytearray()  # 1: the repair drops it after all

    def index(self, ino: int) -> int:
        """Return the row of an inode; -1 if there is none."""
        at = bisect_left(self.numbers, ino)
        return at if at < len(self.numbers) and self.numbers[at] == ino else -1

    def insert(self, ino: int, block: int, tag: int, kind: int, nlink: int) -> None:
        """Insert one inode; the rows after it move."""
        at = bisect_left(self.numbers, ino)
        self.numbers.insert(at, ino)
        self.blocks.insert(at, block)
        self.tags.insert(at, tag)
        self.kinds.insert(at, kind)
        self.nlinks.insert(at, nlink)
        self.links.insert(at, 0)
        self.parents.insert(at, 0)
        self.subdirs.insert(at, 0)
        self.dropped.insert(at, 0)


# --- claims: which pointers the lenient policy follows --------------------------------------


class Claims(Protocol):
    """Decides which owner gets which block."""

    def may(self, block: int, tag: int, owner: int) -> bool:
        """Return whether inode `owner` may have `block` under `tag`; changes nothing."""

    def take(self, block: int, tag: int, owner: int) -> None:
        """Give `block` to `owner`, after `may` agreed."""


class FirstCome:
    """The claims of the survey: a block belongs to the first owner that reaches it.

    A pointer may contradict the tag table, unless the check reached that block by a right tag.
    """

    def __init__(self, image: Image, confirmed: array[int]) -> None:
        self.owners: array[int] = array("Q", bytes(8 * image.block_count))  # inode + 1; 0: none
        self.tags = image.tags[:]
        self._table = image.tags
        self._count = image.block_count
        self._confirmed = confirmed  # not 0: blocks that the check reached

    def may(self, block: int, tag: int, owner: int) -> bool:
        """See Claims."""
        if not tag or block >= self._count or self.owners[block]:
            return False
        return self._table[block] == tag or not self._confirmed[block]

    def take(self, block: int, tag: int, owner: int) -> None:
        """See Claims."""
        self.tags[block] = tag
        self.owners[block] = owner + 1

    def give_back(self, block: int) -> None:
        """Make `block` free for other owners."""
        self.owners[block] = 0

    def settled(self, block: int, tag: int, owner: int) -> bool:
        """Return whether the survey gave `block` to inode `owner` under `tag`."""
        return (
            bool(tag)
            and block < self._count
            and self.owners[block] == owner + 1
            and self.tags[block] == tag
        )


class Settled:
    """The claims of a walk after the survey: it follows each block that the survey gave, once."""

    def __init__(self, survey: FirstCome, taken: bytearray | Counter[int]) -> None:
        self._survey = survey
        self._taken = taken  # not 0: the walk has followed a pointer to the block

    def may(self, block: int, tag: int, owner: int) -> bool:
        """See Claims."""
        return self._survey.settled(block, tag, owner) and not self._taken[block]

    def take(self, block: int, tag: int, owner: int) -> None:
        """See Claims."""
        self._taken[block] = 1


class Untaken:
    """Claims that agree as others do, and take nothing."""

    def __init__(self, claims: Claims) -> None:
        self.may = claims.may

    def take(self, block: int, tag: int, owner: int) -> None:
        """See Claims."""


# --- the lenient policy ---------------------------------------------------------------------


class NodeReader:
    """Reads the metadata blocks that its claims give out."""

    def __init__(self, image: Image, claims: Claims) -> None:
        self.image = image
        self.claims = claims

    def claim(self, block: int, tag: int, owner: int) -> bool:
        """Claim a block with nothing to look into; return whether that was possible."""
        if not self.claims.may(block, tag, owner):
            return False
        self.claims.take(block, tag, owner)
        return True

    def node(self, block: int, tag: int, kind: int, level: int, owner: int) -> bytes | None:
        """Claim a metadata block; return its used bytes, None if it is damaged or not to have."""
        if not self.claims.may(block, tag, owner):
            return None
        data = read_node(self.image, block, tag, kind, level, owner)
        if data is not None:
            self.claims.take(block, tag, owner)
        return data


def read_node(
    image: Image, block: int, tag: int, kind: int, level: int, owner: int
) -> bytes | None:
    """Return the used bytes of the metadata block `block`; None if it violates I5."""
    data = image.block(block)
    if any(inv.check_node(data, image.block_size, tag, kind, level, owner)):
        return None
    return data[: HEADER.unpack(data).used]


class RadixKeeper(Protocol):
    """What the lenient policy tells about one radix tree."""

    def leaves(self, slots: bytes, first: int) -> bytes:
        """Take the pointers to leaves from index `first` on; return the run that is kept."""

    def node(self, pointer: Pointer, level: int, first: int, slots: bytes, kept: bytes) -> bytes:
        """Return the pointer to the node that replaces one whose `slots` become `kept`."""

    def lost(self, pointer: Pointer) -> None:
        """Note that the policy does not follow `pointer`."""

    def beyond(self) -> None:
        """Note a pointer beyond the end of the tree."""


class LenientRadix:
    """The lenient policy for one radix tree."""

    def __init__(self, reader: NodeReader, owner: int, limit: int, keeper: RadixKeeper) -> None:
        self._reader = reader
        self._owner = owner
        self._limit = limit  # leaves from this index on are beyond the end
        self._keeper = keeper
        self.leaves = keeper.leaves
        self.leave = keeper.node

    def walk(self, slots: bytes, height: int) -> bytes:
        """Walk the whole tree; return the top run of pointers that the keeper keeps."""
        return walk_radix(self, self._reader.image.fanout, slots, height)

    def enter(self, pointer: Pointer, level: int, first: int) -> bytes | None:
        """See RadixPolicy."""
        block, _, tag = pointer
        if not block and not tag:
            return None
        if first >= self._limit:
            self._keeper.beyond()
            return None
        data = self._reader.node(block, tag, node_format.INDEX, level, self._owner)
        if data is None:
            self._keeper.lost(pointer)
        return data


class DirectoryKeeper(Protocol):
    """What the lenient policy tells about one directory tree."""

    def lost(self) -> None:
        """Note that a part of the tree is lost."""

    def node(self, block: int, tag: int) -> None:
        """Note a node of the tree, before the nodes below it."""

    def subtree(self, pointer: Pointer, blocks: int) -> None:
        """Note the subtree of `pointer`, which has `blocks` blocks."""

    def interior(self, node: Interior, count: int, keys: KeyRange, top: bool) -> None:
        """Note an interior node whose header states `count` children."""

    def leaf(self, raw: bytes, count: int, keys: KeyRange) -> None:
        """Take the names of a leaf block."""


class LenientDirectory:
    """The lenient policy for one directory tree."""

    def __init__(self, reader: NodeReader, owner: int, keeper: DirectoryKeeper) -> None:
        self._reader = reader
        self._owner = owner
        self._keeper = keeper
        self.reached = 0
        self.leave = keeper.subtree

    def walk(self, payload: bytes, height: int) -> None:
        """Walk the whole tree; `payload` is that of the inode."""
        walk_directory(self, payload, len(payload) // NODE_ENTRY, height)

    def enter(self, pointer: Pointer, level: int, block: int | None) -> bytes | None:
        """See DirectoryPolicy."""
        child, _, tag = pointer
        data = self._reader.node(child, tag, directory_node_kind(level), level, self._owner)
        if data is None:
            self._keeper.lost()
        else:
            self.reached += 1
            self._keeper.node(child, tag)
        return data

    def interior(
        self, raw: bytes, count: int, keys: KeyRange, block: int | None
    ) -> Interior | None:
        """See DirectoryPolicy; reads all children that the bytes have room for."""
        try:
            node = decode_interior(raw, len(raw) // NODE_ENTRY)
        except ValueError:
            self._keeper.lost()
            return None
        self._keeper.interior(node, count, keys, block is None)
        return node

    def leaf(self, raw: bytes, count: int, keys: KeyRange, block: int | None) -> None:
        """See DirectoryPolicy."""
        self._keeper.leaf(raw, count, keys)


# --- the survey -----------------------------------------------------------------------------


class RootCandidate(NamedTuple):
    """A root block from which a repair can go on."""

    block: int
    tag: int
    record: RootRecord
    slots: bytes


class Survey:
    """One survey of one image."""

    def __init__(self, image: Image, confirmed: array[int], log: RepairLog) -> None:
        self.image = image
        self.log = log
        self.claims = FirstCome(image, confirmed)
        self.owners, self.tags = self.claims.owners, self.claims.tags
        self.reader = NodeReader(image, self.claims)
        self.inodes = KeptInodes()
        self.root: RootCandidate | None = None
        # Index blocks of the inode table that can stay: (level, place) -> (block, tag).
        self.table_nodes: dict[tuple[int, int], tuple[int, int]] = {}
        self.next_ino = 0  # as the newest root block states it; 0: no root block
        self.table_damaged = False
        self.damaged_directories: set[int] = set()

    def run(self) -> None:
        """Survey everything that the root reaches, then search all blocks if that is damaged."""
        self.root = self._find_root()
        if self.root is not None:
            self.reader.claim(self.root.block, self.root.tag, 0)
            table = LenientRadix(self.reader, 0, ino_format.MAX_INO + 1, _TableSurvey(self))
            table.walk(self.root.slots, self.root.record.height)
        else:
            self.log.add("no root block is usable: the repair searches all blocks for inodes")
            self.table_damaged = True
        if self.table_damaged:
            self._search_inodes()

    # --- the root ---

    def _find_root(self) -> RootCandidate | None:
        """Return the root to go on from.

        The best root is the one that the commit word leads to.  The next best is another root
        that still has its tag in the table.  An older root leads to blocks that other inodes
        took since.  Inodes with their own tag are better than that.  So an older root is the last
        resort, and counts only when no block is such an inode.
        """
        named = self._named_root()
        if named is not None and named.tag == self.image.tags[named.block]:
            self.next_ino = named.record.next_ino
            return named
        self.log.add("the commit word leads to no root block: the repair searches for another one")
        best = self._newest_root()
        if best is not None and best.tag == self.image.tags[best.block]:
            return best
        if named is not None:
            return named
        if any(True for _ in self.search(node_format.INODE)):
            return None
        return best

    def _newest_root(self) -> RootCandidate | None:
        best: RootCandidate | None = None
        for block in range(self.image.block_count):
            root = self._root_at(block)
            if root is not None:
                self.next_ino = max(self.next_ino, root.record.next_ino)
                best = root if best is None else max(best, root, key=self._rank)
        return best

    def _rank(self, root: RootCandidate) -> tuple[bool, int]:
        return root.tag == self.image.tags[root.block], root.record.sequence

    def _named_root(self) -> RootCandidate | None:
        _, block = words.split_commit(self.image.commit)
        if not self.image.commit or block >= self.image.block_count:
            return None
        return self._root_at(block)

    def _root_at(self, block: int) -> RootCandidate | None:
        data = self.image.block(block)
        header = HEADER.unpack(data)
        if header.kind != node_format.ROOT or header.used < node_format.ROOT_POINTERS:
            return None
        size = self.image.block_size
        if not header.tag or any(inv.check_node(data, size, header.tag, node_format.ROOT, 0, 0)):
            return None
        record = ROOT_RECORD.unpack(data, HEADER_SIZE)
        if record.fsid != self.image.superblock.fsid or record.height > node_format.MAX_HEIGHT:
            return None
        slots = data[node_format.ROOT_POINTERS : header.used]
        return RootCandidate(block, header.tag, record, slots)

    # --- inodes ---

    def keep_inode(self, ino: int, block: int, tag: int) -> bool:
        """Keep an inode and its blocks; return whether its block is an inode block of it."""
        if not 0 < ino <= ino_format.MAX_INO or self.inodes.index(ino) >= 0:
            return False
        data = self.reader.node(block, tag, node_format.INODE, 0, ino)
        if data is None or len(data) < PAYLOAD_OFFSET:
            if data is not None:
                self.claims.give_back(block)
            return False
        sound = make_sound(data)
        record = sound.record
        self.inodes.insert(ino, block, tag, record.mode >> 12, record.nlink)
        blocks = LenientRadix(self.reader, ino, NO_LIMIT, _BlockSurvey(self.reader, ino))
        if record.payload == ino_format.MAP:
            blocks.walk(sound.payload, record.height)
        elif record.payload == ino_format.DIRTREE:
            keeper = _DirectorySurvey(ino, self.damaged_directories)
            LenientDirectory(self.reader, ino, keeper).walk(sound.payload, record.height)
        if record.xattr_pointer != words.NULL:
            blocks.walk(record.xattr_pointer, record.xattr_height)
        return True

    # --- searching ---

    def search(self, kind: int) -> Iterator[tuple[int, int, int]]:
        """Return (block, tag, owner) of claimed blocks without owner whose header has `kind`."""
        for block, tag in enumerate(self.image.tags):
            if tag and not self.owners[block]:
                header = HEADER.unpack(self._header(block))
                if header.kind == kind and header.tag == tag and header.level == 0:
                    yield block, tag, header.owner

    def _header(self, block: int) -> bytes:
        geometry = self.image.geometry
        at = geometry.data_offset + block * geometry.block_size
        return self.image.memory.read(at, HEADER_SIZE)

    def _search_inodes(self) -> None:
        newest: dict[int, tuple[int, int, int]] = {}
        for block, tag, ino in self.search(node_format.INODE):
            if self.inodes.index(ino) >= 0 or not 0 < ino <= ino_format.MAX_INO:
                continue
            data = read_node(self.image, block, tag, node_format.INODE, 0, ino)
            if data is not None and len(data) >= PAYLOAD_OFFSET:
                changed = make_sound(data).record.ctime_ns
                newest[ino] = max(newest.get(ino, (changed, block, tag)), (changed, block, tag))
        for ino in sorted(newest):
            _, block, tag = newest[ino]
            if self.keep_inode(ino, block, tag):
                self.log.add(f"inode {ino} is in block {block}, but not in the inode table")

    def search_leaves(self) -> dict[int, list[Leaf]]:
        """Return the leaves that damaged directories lost, by directory.

        The repair reads their names; it does not keep their blocks.
        """
        found: dict[int, list[Leaf]] = {}
        if not self.damaged_directories:
            return found
        for block, tag, owner in self.search(node_format.DIRLEAF):
            if owner not in self.damaged_directories:
                continue
            data = read_node(self.image, block, tag, node_format.DIRLEAF, 0, owner)
            if data is None:
                continue
            try:
                leaf = decode_leaf(data[HEADER_SIZE:], HEADER.unpack(data).count)
            except ValueError:
                continue
            found.setdefault(owner, []).append(leaf)
        return found


class _TableSurvey:
    """The keeper of the inode table's walk: its leaves are inodes."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey

    def leaves(self, slots: bytes, first: int) -> bytes:
        for ino, (block, _, tag) in enumerate(pointers_in(slots), first):
            if (block or tag) and not self._survey.keep_inode(ino, block, tag):
                self._survey.table_damaged = True
        return slots

    def node(self, pointer: Pointer, level: int, first: int, slots: bytes, kept: bytes) -> bytes:
        survey = self._survey
        place = first // survey.image.fanout ** (level + 1)
        survey.table_nodes[level, place] = pointer[0], pointer[2]
        return words.POINTER.pack(*pointer)

    def lost(self, pointer: Pointer) -> None:
        self._survey.log.add(f"a part of the inode table is lost (block {pointer[0]})")
        self._survey.table_damaged = True

    def beyond(self) -> None:
        self._survey.table_damaged = True


class _BlockSurvey:
    """The keeper of a walk that claims the blocks of a file, or of extended attributes."""

    def __init__(self, reader: NodeReader, owner: int) -> None:
        self._reader = reader
        self._owner = owner

    def leaves(self, slots: bytes, first: int) -> bytes:
        for block, _, tag in pointers_in(slots):
            self._reader.claim(block, tag, self._owner)
        return slots

    def node(self, pointer: Pointer, level: int, first: int, slots: bytes, kept: bytes) -> bytes:
        return words.POINTER.pack(*pointer)

    def lost(self, pointer: Pointer) -> None:
        """The rebuilt map tells what is lost."""

    def beyond(self) -> None:
        """There is no limit."""


class _DirectorySurvey:
    """The keeper of a walk that claims the blocks of a directory."""

    def __init__(self, ino: int, damaged: set[int]) -> None:
        self._ino = ino
        self._damaged = damaged

    def lost(self) -> None:
        self._damaged.add(self._ino)

    def node(self, block: int, tag: int) -> None:
        """Nothing to note: `KeptNames` reads the directory again."""

    def subtree(self, pointer: Pointer, blocks: int) -> None:
        """Nothing to note."""

    def interior(self, node: Interior, count: int, keys: KeyRange, top: bool) -> None:
        """Nothing to note."""

    def leaf(self, raw: bytes, count: int, keys: KeyRange) -> None:
        """Nothing to note."""
