"""The private side of one transaction: blocks that it claimed, nodes that it will publish.

States of a block in a transaction:

    claimed    (tag table: 0 -> own tag)  in the pool; no pointer leads to it
    used       taken from the pool for a node or for data; still private
    published  the commit word names a root that reaches it
    replaced   published, but the new root no longer reaches it; released after the commit

Before the commit the transaction stores only to its own blocks.  Giving up at any point leaves
nothing but claims, which `settle` releases.  After a death a collector releases them.

A claim belongs to the transaction only while the mount's state word says that it is under way.
A machine may be put back into an older state.  It then finds its old claims settled, perhaps even
published, by what it did before.  So the native layer checks the state word before it fills blocks
(`Blocks.guard`).  A mount releases claims only if it ended their transaction itself.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, Final

from ivshmemfs.errors import Fenced, FsError, NoSpace
from ivshmemfs.format.node import HEADER_SIZE
from ivshmemfs.format.words import NULL, TAG_AT, WEIGHT_AT, WORD
from ivshmemfs.native import packed_node, record_node, swapped_node, weight_of, with_weight
from ivshmemfs.shm.freelist import BULK, RECOUNT, SIZE, FreeList
from ivshmemfs.shm.nodes import Node, NodeSource
from ivshmemfs.shm.published import Store

# Names of this module are bound by the compiler; those of others are looked up at each use.
_packed_node: Final = packed_node
_record_node: Final = record_node
_swapped_node: Final = swapped_node
_with_weight: Final = with_weight
_NULL: Final = NULL
_FREE: Final = bytes(WORD)
_ONE: Final = (1).to_bytes(TAG_AT - WEIGHT_AT, "little")
SMALL_CLAIM: Final = 4  # blocks of each claim of an ordinary transaction but the first
COMMITTED: Final = 1  # steps of `Turn.commit` after which the plan is published
_ZEROED: Final = 256  # blocks of a row that are filled with zeros at once
_NOT_OURS = "another peer declared this mount gone in the middle of a transaction"


class Workspace(NodeSource):
    """The blocks of one transaction.  `tag` comes from `Membership.begin`.

    All pointers are packed; those in `_claims`, `_pool`, `_bulk` and `_spare` have weight 1.
    """

    def __init__(self, store: Store, tag: int, free_list: FreeList) -> None:
        super().__init__(store.block_size, store.fanout)
        self._store = store
        self._free_list = free_list
        self._tag = tag
        self._mark = tag.to_bytes(WORD, "little")  # the tag, as in a packed pointer
        self._claims: list[bytes] = []  # all claims but the bulk ones
        self._pool: list[bytes] = []  # those of `_claims` that are not in use
        self._nodes: dict[bytes, Node] = {}
        self._bulk = b""  # bulk claims in use, one after another
        self._spare = b""  # bulk claims not in use, one after another
        self._row = b""  # claims that follow each other in the region, in use
        self._spare_row = b""  # the same, not in use; they hold zeros
        self._replaced: list[bytes] = []
        self.dropped: list[tuple[bytes, int, int, int]] = []
        self._replaced_bulk = bytearray()
        self.replaced_count = 0
        self.keep = 0  # free blocks that this transaction must leave; 0: no limit
        self.used = 0  # blocks that the root reaches on which the plan is based
        self.published = False  # whether other peers can read the blocks of the plan

    # --- taking blocks ---

    def _fill_pool(self, want: int) -> None:
        self._watch_room(want)
        got = self._free_list.claim_few(want, self._tag)
        self._claims += got
        self._pool += got

    def _watch_room(self, want: int) -> None:
        if not self.keep:
            return
        need, free_list = want + self.keep, self._free_list
        if free_list.free(self.used, RECOUNT) < need and free_list.free(self.used) < need:
            raise NoSpace("the region is full")

    def claim(self, count: int) -> bytes:
        """Return `count` packed pointers to fresh private blocks.  Raises NoSpace."""
        if count >= BULK:
            return self._claim_many(count)
        if len(self._pool) < count:
            # The nodes above the first data blocks are claimed by the same call.
            nodes = SMALL_CLAIM if not self._claims and count + SMALL_CLAIM < BULK else 0
            self._fill_pool(count + nodes - len(self._pool))
            if len(self._pool) < count:
                raise NoSpace("no free blocks are left on the region")
        pointers = b"".join(self._pool[:count]) if count != 1 else self._pool[0]
        del self._pool[:count]
        return pointers

    def _claim_many(self, count: int) -> bytes:
        """Claim `BULK` blocks or more; reuse the claims of a failed plan if their number fits."""
        if len(self._spare) == count * SIZE:
            got, self._spare = self._spare, b""
        else:
            self._watch_room(count)
            got = self._free_list.claim(count, self._tag)
        self._bulk += got
        if len(got) < count * SIZE:
            raise NoSpace("no free blocks are left on the region")
        return got

    def claim_row(self, count: int, steps: Sequence[tuple[int, int]]) -> bytes:
        """Return pointers to `count` fresh blocks that follow each other and hold zeros.

        A step (first, blocks) names the places where the row may begin: block `first`, and each
        multiple of `blocks` behind it.  Earlier steps are preferred.  A plan has one row.  Raises
        NoSpace, Fenced.
        """
        if len(self._spare_row) != count * SIZE:
            self._spare += self._spare_row
            self._spare_row = b""
            self._watch_room(count)
            for first, blocks in steps:
                claimed = self._free_list.claim_row(count, blocks, first, self._tag)
                self._spare_row, strays = claimed
                self._spare += strays
                if self._spare_row:
                    break
            else:
                raise NoSpace(f"no {count} free blocks follow each other; a smaller file may fit")
            for at in range(0, len(self._spare_row), _ZEROED * SIZE):
                pointers = self._spare_row[at : at + _ZEROED * SIZE]
                self.fill(pointers, bytes(len(pointers) // SIZE * self._store.block_size))
        self._row, self._spare_row = self._spare_row, b""
        return self._row

    def _take(self) -> bytes:
        if not self._pool:
            self._fill_pool(SMALL_CLAIM if self._claims else self._free_list.usual)
            if not self._pool:
                raise NoSpace("no free blocks are left on the region")
        return self._pool.pop()

    def add_node(
        self,
        kind: int,
        level: int,
        owner: int,
        count: int,
        body: bytes,
        weight: int = 1,
        parsed: Any = None,
        more: bytes = b"",
        rest: bytes = b"",
    ) -> bytes:
        """Make a private node with `body`, `more`, `rest` after its header; return its pointer.

        `publish` stores it to the region.
        """
        pointer = self._take()
        if weight != 1:
            pointer = _with_weight(pointer, weight)
        data = _packed_node(pointer, kind, level, owner, count, body, more, rest)
        node = Node(pointer, kind, level, owner, count, data)
        node.parsed = parsed
        self._nodes[pointer] = node
        return pointer

    def add_record(
        self,
        kind: int,
        owner: int,
        values: tuple[Any, ...],
        plan: bytes,
        size: int,
        more: bytes,
        rest: bytes = b"",
    ) -> Node:
        """Make a private node with a record of `size` bytes, `more` and `rest` after its header.

        `plan` is a plan of a `Layout` for the values.
        """
        pointer = self._take()
        data = _record_node(pointer, kind, owner, values, plan, size, more, rest)
        node = Node(pointer, kind, 0, owner, 0, data)
        self._nodes[pointer] = node
        return node

    def swap_leaves(
        self,
        kind: int,
        owner: int,
        old: bytes,
        had: bytes,
        runs: list[tuple[int, bytes]],
        first: int,
        stop: int,
        base: int,
    ) -> bytes:
        """Make a lowest node of pointers: node `had` with some `runs`, (index, packed pointers).

        These are runs `first` to before `stop`; the node begins at index `base`.  Each pointer
        leads to one block; those that others take the place of are replaced.  `old` is the pointer
        to `had`, or NULL.  Returns the new pointer with its weight, or NULL for a node without
        pointers.
        """
        claim = self._take()
        pointer, data, gone = _swapped_node(claim, kind, owner, old, had, runs, first, stop, base)
        self.replace_leaves(gone)
        if len(data) == HEADER_SIZE:
            self._pool.append(claim)
            return _NULL
        self._nodes[pointer] = Node(pointer, kind, 0, owner, 0, data)
        return pointer

    def node(self, pointer: bytes, kind: int, level: int, owner: int | None) -> Node:
        """Return a node of this transaction, or a published one; see `NodeSource.node`."""
        own = self._nodes.get(pointer)
        return own if own is not None else self._store.node(pointer, kind, level, owner)

    def replace(self, pointer: bytes) -> None:
        """Note that the new root does not reach this block; blocks below it are not concerned."""
        tag = pointer[TAG_AT:]
        if tag == self._mark and self._claimed(pointer):
            self._nodes.pop(pointer, None)
            self._pool.append(pointer[:WEIGHT_AT] + _ONE + tag)
        elif tag != _FREE:
            self._replaced.append(pointer)
            self.replaced_count += 1

    def _claimed(self, pointer: bytes) -> bool:
        """Return whether this transaction claimed the block, which has its tag.

        Tags come back after 2^20 mounts of one slot, so the block may be older.
        """
        claim = pointer[:WEIGHT_AT] + _ONE + self._mark
        if claim in self._claims:
            return True
        for claims in (self._bulk, self._row):
            at = claims.find(claim)
            while at >= 0 and at % SIZE:
                at = claims.find(claim, at + 1)
            if at >= 0:
                return True
        return False

    def drop(self, pointer: bytes, kind: int, level: int, owner: int) -> None:
        """Note that the new root does not reach this subtree, for release after the commit."""
        self.dropped.append((pointer, kind, level, owner))
        self.replaced_count += weight_of(pointer)

    def replace_many(self, pointers: bytes, count: int) -> None:
        """Note the same of published data blocks: packed pointers, `count` of them not null."""
        self._replaced_bulk += pointers
        self.replaced_count += count

    def replace_leaves(self, gone: list[bytes]) -> None:
        """Note the same of blocks of any kind: packed pointers, of one block or of data blocks."""
        for pointers in gone:
            if len(pointers) == SIZE:
                self.replace(pointers)
            else:
                self.replace_many(pointers, weight_of(pointers))

    @property
    def balance(self) -> int:
        """The number by which blocks in use grow at the commit; negative if they become fewer."""
        claimed = len(self._claims) + (len(self._bulk) + len(self._row)) // SIZE
        return claimed - len(self._pool) - self.replaced_count

    def fill(self, pointers: bytes, content: bytes | bytearray | memoryview) -> None:
        """Store `content` into claimed blocks, zeros after it in the last.  Raises Fenced."""
        if not self._store.blocks.scatter(pointers, content):
            raise Fenced(_NOT_OURS)

    def overwrite(self, block: int, skip: int, content: bytes | bytearray | memoryview) -> None:
        """Store `content` from byte `skip` of a block on, over published blocks of a fixed file.

        Raises Fenced.
        """
        if not self._store.blocks.overwrite(block, skip, content):
            raise Fenced(_NOT_OURS)

    def fill_from(self, pointers: bytes, file: int, at: int, length: int) -> int:
        """Store `length` bytes of an open file, from its byte `at` on, into claimed blocks.

        Returns how many bytes the file had there; blocks that stay empty return to the pool.
        Raises Fenced, or FsError for an error of the file.
        """
        try:
            got = self._store.blocks.fill(pointers, file, at, length)
        except OSError as error:
            raise FsError(error.errno or errno.EIO, error.strerror or "") from None
        if got < 0:
            raise Fenced(_NOT_OURS)
        used = -(-got // self._store.geometry.block_size) * SIZE
        unused = pointers[used:]
        if self._bulk.endswith(unused):
            self._bulk = self._bulk[: len(self._bulk) - len(unused)]
            self._spare += unused
        else:
            for place in range(0, len(unused), SIZE):
                self.replace(unused[place : place + SIZE])
        return got

    # --- ending ---

    def publish(self, planned_on: int, root: Node) -> int:
        """Store the nodes, still private, fence, and swap the commit word.

        Returns the new commit word, or 0 when another peer committed first.  Raises Fenced.
        """
        nodes, store = self._nodes, self._store
        turn, pointers = store.turn, list(nodes.keys())
        data, root_pointer = [node.data for node in nodes.values()], root.pointer
        try:
            word = turn.commit(pointers, data, planned_on, root_pointer)
        finally:  # the handler of a signal may raise right after the call
            self.published = turn.passed == COMMITTED
        if word < 0:
            raise Fenced(_NOT_OURS)
        if word:
            store.cache.renew(self._replaced, nodes)
            store.know(word, root)
            self._free_list.note_use(len(self._claims) - len(self._pool))
        return word

    @property
    def is_small(self) -> bool:
        """Whether it has and replaces single blocks only."""
        return not (self._bulk or self._replaced_bulk or self._spare or self._spare_row)

    def leftovers(self) -> bytes:
        """Return what `settle` would release after a commit and the end of the transaction."""
        return b"".join(self._pool + self._replaced)

    def forget_plan(self) -> None:
        """Drop the plan and keep the claims: all used blocks return to the pool."""
        self._pool = list(self._claims)
        self._spare, self._bulk = self._spare + self._bulk, b""
        if self._row:
            self._spare_row, self._row = self._row, b""
        self._nodes.clear()
        self._replaced.clear()
        self._replaced_bulk.clear()
        self.dropped.clear()
        self.replaced_count = 0

    def settle(self, ended: bool) -> None:
        """Release the replaced blocks, if the plan is published, and all claims that are not.

        The claims are released only if this mount `ended` the transaction itself.  Otherwise they
        may be published by now, or are garbage for a collector.
        """
        if not self.published:
            self.forget_plan()
        few = b"".join(self._pool + self._replaced if ended else self._replaced)
        if few:
            self._free_list.release(few)
        if self._replaced_bulk or self._spare or self._spare_row:
            bulk = bytes(self._replaced_bulk)
            if ended:
                bulk = self._spare + self._spare_row + bulk
            if bulk:
                self._free_list.release(bulk, bulk=True)
            self._spare = self._spare_row = b""
            self._replaced_bulk.clear()
        self._pool.clear()
        self._replaced.clear()
