"""Finding out what of a damaged region can be kept: which blocks belong to whom.

The survey goes the way of the check, but accepts more: a pointer whose tag the tag table
contradicts is followed if nobody else has a better claim to the block, and the table is what will
be corrected.  Afterwards `owners` says for each block which inode keeps it, and `tags` under which
tag; both are final, so whoever goes through the trees again (`mine`) finds exactly the same.

When the way to inodes is damaged, the blocks themselves are searched: an inode block says which
inode it is, a directory leaf whose it is.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from ivshmemfs.format import inode as ino_format
from ivshmemfs.format import node as node_format
from ivshmemfs.format import words
from ivshmemfs.format.dirent import NODE_ENTRY, Leaf, decode_interior, decode_leaf
from ivshmemfs.format.inode import PAYLOAD_OFFSET
from ivshmemfs.format.node import HEADER, HEADER_SIZE, ROOT_RECORD, RootRecord
from ivshmemfs.fsck import invariants as inv
from ivshmemfs.fsck.image import Image
from ivshmemfs.fsck.mend import mend

_POINTER = words.POINTER
SIZE = words.POINTER_SIZE


class Log:
    """What a repair tells, in bounded memory."""

    LIMIT = 500

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.more = 0

    def add(self, text: str) -> None:
        """One line more."""
        if len(self.lines) < self.LIMIT:
            self.lines.append(text)
        else:
            self.more += 1

    def text(self) -> list[str]:
        """All lines, and how many were left out."""
        return [*self.lines, f"and {self.more} more"] if self.more else self.lines


class Rows:
    """The inodes that are kept, by ascending number; the columns are parallel."""

    def __init__(self) -> None:
        self.numbers: array[int] = array("Q")
        self.blocks: array[int] = array("I")
        self.tags: array[int] = array("Q")
        self.kinds = bytearray()  # mode >> 12, after mending
        self.nlinks: array[int] = array("I")  # as stated
        self.links: array[int] = array("I")  # names that are kept
        self.parents: array[int] = array("Q")  # directories: who holds it
        self.subdirs: array[int] = array("I")
        self.gone = bytearray()  # 1: decided to drop it

    def index(self, ino: int) -> int:
        """Row of an inode; -1 if there is none."""
        at = bisect_left(self.numbers, ino)
        return at if at < len(self.numbers) and self.numbers[at] == ino else -1

    def insert(self, ino: int, block: int, tag: int, kind: int, nlink: int) -> None:
        """One inode more."""
        at = bisect_left(self.numbers, ino)
        self.numbers.insert(at, ino)
        self.blocks.insert(at, block)
        self.tags.insert(at, tag)
        self.kinds.insert(at, kind)
        self.nlinks.insert(at, nlink)
        self.links.insert(at, 0)
        self.parents.insert(at, 0)
        self.subdirs.insert(at, 0)
        self.gone.insert(at, 0)


class Root(NamedTuple):
    """A root block that can be gone on from."""

    block: int
    tag: int
    record: RootRecord
    slots: bytes


class Survey:
    """One survey of one image."""

    def __init__(self, image: Image, strict: array[int], log: Log) -> None:
        self.image = image
        self.log = log
        self.strict = strict  # blocks that the check reached by pointers with the right tag
        self.owners: array[int] = array("Q", bytes(8 * image.block_count))  # inode + 1
        self.tags = image.tags[:]
        self.rows = Rows()
        self.root: Root | None = None
        # Index blocks of the inode table that can stay: (level, place) -> (block, tag).
        self.table_nodes: dict[tuple[int, int], tuple[int, int]] = {}
        self.next_ino = 0  # as the newest root block says, if there is any
        self.table_damaged = False
        self.damaged_directories: set[int] = set()

    def run(self) -> None:
        """Survey everything that can be reached, then what can only be found by searching."""
        self.root = self._root()
        if self.root is not None:
            self._accept(self.root.block, self.root.tag, 0)
            self._table(self.root.slots, self.root.record.height, 0)
        else:
            self.log.add("no root block could be used: all inodes are searched for")
            self.table_damaged = True
        if self.table_damaged:
            self._search_inodes()

    # --- accepting ---

    def _plausible(self, block: int, tag: int) -> bool:
        return bool(tag) and block < self.image.block_count

    def _accept(self, block: int, tag: int, owner: int) -> bool:
        """Give `block` to `owner`, unless it is wild, taken or better claimed by others."""
        if not self._plausible(block, tag) or self.owners[block]:
            return False
        if self.image.tags[block] != tag:
            if self.strict[block]:
                return False
            self.tags[block] = tag
        self.owners[block] = owner + 1
        return True

    def mine(self, block: int, tag: int, owner: int) -> bool:
        """Whether a pointer of `owner` leads to a block that the survey gave it."""
        return (
            self._plausible(block, tag)
            and self.owners[block] == owner + 1
            and self.tags[block] == tag
        )

    def read(self, block: int, tag: int, kind: int, level: int, owner: int) -> bytes | None:
        """The bytes in use of a metadata block in range; None unless it is whole and the one."""
        data = self.image.block(block)
        if any(inv.check_node(data, self.image.block_size, tag, kind, level, owner)):
            return None
        return data[: HEADER.unpack(data).used]

    def _accept_node(self, block: int, tag: int, kind: int, level: int, owner: int) -> bytes | None:
        if not self._plausible(block, tag) or self.owners[block]:
            return None
        data = self.read(block, tag, kind, level, owner)
        return data if data is not None and self._accept(block, tag, owner) else None

    # --- root and inode table ---

    def _root(self) -> Root | None:
        """The root to go on from.

        Best is the one that the commit word leads to, next another that still bears its tag.  A
        root that was replaced long ago leads to blocks that others took since, so searching for
        inodes that bear their tags gives more; it is the last resort, when no block bears any.
        """
        named = self._named_root()
        if named is not None and named.tag == self.image.tags[named.block]:
            self.next_ino = named.record.next_ino
            return named
        self.log.add("the commit word leads to no root block: another one is searched for")
        best = self._newest_root()
        if best is not None and best.tag == self.image.tags[best.block]:
            return best
        if named is not None:
            return named
        if any(True for _ in self.search(node_format.INODE)):
            return None
        return best

    def _newest_root(self) -> Root | None:
        best: Root | None = None
        for block in range(self.image.block_count):
            root = self._root_at(block)
            if root is not None:
                self.next_ino = max(self.next_ino, root.record.next_ino)
                best = root if best is None else max(best, root, key=self._rank)
        return best

    def _rank(self, root: Root) -> tuple[bool, int]:
        return root.tag == self.image.tags[root.block], root.record.sequence

    def _named_root(self) -> Root | None:
        _, block = words.split_commit(self.image.commit)
        if not self.image.commit or block >= self.image.block_count:
            return None
        return self._root_at(block)

    def _root_at(self, block: int) -> Root | None:
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
        return Root(block, header.tag, record, slots)

    def _table(self, slots: bytes, height: int, first: int) -> None:
        span = self.image.fanout**height
        for block, _, tag in pointers_in(slots):
            if block or tag:
                if height == 0:
                    self.table_damaged |= not self._inode(first, block, tag)
                elif first > ino_format.MAX_INO:
                    self.table_damaged = True
                else:
                    self._table_node(block, tag, height - 1, first)
            first += span

    def _table_node(self, block: int, tag: int, level: int, first: int) -> None:
        data = self._accept_node(block, tag, node_format.INDEX, level, 0)
        if data is None:
            self.log.add(f"a part of the inode table is lost (block {block})")
            self.table_damaged = True
            return
        place = first // self.image.fanout ** (level + 1)
        self.table_nodes[level, place] = block, tag
        self._table(data[HEADER_SIZE:], level, first)

    # --- inodes ---

    def _inode(self, ino: int, block: int, tag: int) -> bool:
        """Keep an inode and what belongs to it; whether that was possible."""
        if not 0 < ino <= ino_format.MAX_INO or self.rows.index(ino) >= 0:
            return False
        data = self._accept_node(block, tag, node_format.INODE, 0, ino)
        if data is None or len(data) < PAYLOAD_OFFSET:
            if data is not None:
                self.owners[block] = 0
            return False
        whole = mend(data)
        record = whole.record
        self.rows.insert(ino, block, tag, record.mode >> 12, record.nlink)
        if record.payload == ino_format.MAP:
            self._map(whole.payload, record.height, ino)
        elif record.payload == ino_format.DIRTREE:
            self._directory(whole.payload, record.height, ino)
        if record.xattr_pointer != words.NULL:
            self._map(record.xattr_pointer, record.xattr_height, ino)
        return True

    def _map(self, slots: bytes, height: int, owner: int) -> None:
        for block, _, tag in pointers_in(slots):
            if height == 0:
                self._accept(block, tag, owner)
                continue
            data = self._accept_node(block, tag, node_format.INDEX, height - 1, owner)
            if data is not None:
                self._map(data[HEADER_SIZE:], height - 1, owner)

    def _directory(self, raw: bytes, height: int, owner: int) -> None:
        try:
            pointers = decode_interior(raw, len(raw) // NODE_ENTRY).pointers
        except ValueError:
            self.damaged_directories.add(owner)
            return
        for block, _, tag in pointers_in(pointers):
            kind = node_format.DIRNODE if height > 1 else node_format.DIRLEAF
            data = self._accept_node(block, tag, kind, height - 1, owner)
            if data is None:
                self.damaged_directories.add(owner)
            elif height > 1:
                self._directory(data[HEADER_SIZE:], height - 1, owner)

    # --- searching ---

    def search(self, kind: int) -> Iterator[tuple[int, int, int]]:
        """(block, tag, owner) of claimed blocks that nobody owns and that say they are `kind`."""
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
            if self.rows.index(ino) >= 0 or not 0 < ino <= ino_format.MAX_INO:
                continue
            data = self.read(block, tag, node_format.INODE, 0, ino)
            if data is not None and len(data) >= PAYLOAD_OFFSET:
                changed = mend(data).record.ctime_ns
                newest[ino] = max(newest.get(ino, (changed, block, tag)), (changed, block, tag))
        for ino in sorted(newest):
            _, block, tag = newest[ino]
            if self._inode(ino, block, tag):
                self.log.add(f"inode {ino} was found in block {block}, the inode table lacks it")

    def search_leaves(self) -> dict[int, list[Leaf]]:
        """Leaves that damaged directories lost, by directory.  They are read, not kept."""
        found: dict[int, list[Leaf]] = {}
        if not self.damaged_directories:
            return found
        for block, tag, owner in self.search(node_format.DIRLEAF):
            if owner not in self.damaged_directories:
                continue
            data = self.read(block, tag, node_format.DIRLEAF, 0, owner)
            if data is None:
                continue
            try:
                leaf = decode_leaf(data[HEADER_SIZE:], HEADER.unpack(data).count)
            except ValueError:
                continue
            found.setdefault(owner, []).append(leaf)
        return found


def pointers_in(slots: bytes) -> Iterator[tuple[int, int, int]]:
    """The whole pointers in a run of slots."""
    return _POINTER.iter_unpack(slots[: len(slots) // SIZE * SIZE])
