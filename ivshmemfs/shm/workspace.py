"""The private side of one transaction: blocks that it claimed, nodes that it will publish.

States of a block in a transaction:

    claimed    (tag table: 0 -> our tag)        in the pool, nobody points at it
    used       taken from the pool for a node or for data; still private
    published  the commit word was swapped to a root from which it is reachable
    replaced   a published block that the new root no longer reaches; released after the commit

Until the commit nothing that anybody else can reach was stored to, so giving up at any point
leaves nothing but claims, which `settle` (or, after a death, a collector) takes back.

A claim is ours while our state word says that its transaction is under way, and no longer: a
machine that was put back into an older state finds what it had claimed settled, and perhaps
published, by what it did in the meantime.  So that word is looked at before blocks are filled
(`Blocks.guard`), and claims are released only by whoever has ended the transaction itself.
"""

from __future__ import annotations

import errno
from typing import Any, Final

from ivshmemfs.errors import Fenced, FsError, NoSpace
from ivshmemfs.format.node import HEADER, HEADER_SIZE
from ivshmemfs.format.words import TAG_AT, WEIGHT_AT, WORD, weight_of
from ivshmemfs.shm.freelist import BULK, RECOUNT, SIZE, FreeList
from ivshmemfs.shm.nodes import Node, NodeSource
from ivshmemfs.shm.published import Store

_FREE: Final = bytes(WORD)
_ONE: Final = (1).to_bytes(TAG_AT - WEIGHT_AT, "little")
_pack_header = HEADER.pack_values
FIRST_CLAIM: Final = 6  # blocks that an ordinary transaction needs
SMALL_CLAIM: Final = 4
_NOT_OURS = "another peer declared this mount gone in the middle of a transaction"


class Workspace(NodeSource):
    """Blocks of one transaction.  `tag` must come from `Membership.begin`.

    All pointers are packed; those in `_claims`, `_pool`, `_bulk` and `_spare` weigh 1.
    """

    def __init__(self, store: Store, tag: int, free_list: FreeList) -> None:
        super().__init__(store.block_size, store.fanout)
        self._store = store
        self._free_list = free_list
        self._tag = tag
        self._mark = tag.to_bytes(WORD, "little")  # as pointers bear it
        self._claims = b""  # in a row, all but those for bulk
        self._pool: list[bytes] = []  # those of them that are not in use
        self._nodes: dict[bytes, Node] = {}
        self._bulk = b""  # in a row, in use
        self._spare = b""  # in a row, not in use
        self._replaced: list[bytes] = []
        self.dropped: list[tuple[bytes, int, int, int]] = []
        self._replaced_bulk = bytearray()
        self.replaced_count = 0
        self.keep = 0  # free blocks that must be left, where they are few
        self.used = 0  # blocks in use by the root that the plan is based on

    # --- taking blocks ---

    def _fill_pool(self, want: int) -> None:
        self._watch_room(want)
        got = self._free_list.claim(want, self._tag)
        self._claims += got
        self._give_to_pool(got)

    def _give_to_pool(self, claims: bytes) -> None:
        for at in range(0, len(claims), SIZE):
            self._pool.append(claims[at : at + SIZE])

    def _watch_room(self, want: int) -> None:
        if not self.keep:
            return
        need, free_list = want + self.keep, self._free_list
        if free_list.free(self.used, RECOUNT) < need and free_list.free(self.used) < need:
            raise NoSpace("the region is full")

    def claim(self, count: int) -> bytes:
        """`count` packed pointers to fresh private blocks; NoSpace if there are not that many."""
        if count >= BULK:
            return self._claim_many(count)
        if len(self._pool) < count:
            self._fill_pool(count - len(self._pool))
            if len(self._pool) < count:
                raise NoSpace("no free blocks are left on the region")
        pointers = b"".join(self._pool[:count])
        del self._pool[:count]
        return pointers

    def _claim_many(self, count: int) -> bytes:
        """The same for so many that they are kept packed; those of a failed plan come first."""
        if len(self._spare) == count * SIZE:
            got, self._spare = self._spare, b""
        else:
            self._watch_room(count)
            got = self._free_list.claim(count, self._tag)
        self._bulk += got
        if len(got) < count * SIZE:
            raise NoSpace("no free blocks are left on the region")
        return got

    def _take(self) -> bytes:
        if not self._pool:
            self._fill_pool(SMALL_CLAIM if self._claims else FIRST_CLAIM)
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
    ) -> bytes:
        """A private node with `body` after its header; returns its packed pointer.

        It is stored to the region at the commit.
        """
        pointer = self._take()
        if weight != 1:
            pointer = (
                pointer[:WEIGHT_AT]
                + weight.to_bytes(TAG_AT - WEIGHT_AT, "little")
                + pointer[TAG_AT:]
            )
        size = HEADER_SIZE + len(body)
        data = _pack_header(0, kind, level, count, size, owner, self._tag) + body
        node = Node(pointer, kind, level, owner, count, data)
        node.parsed = parsed
        self._nodes[pointer] = node
        return pointer

    def node(self, pointer: bytes, kind: int, level: int, owner: int | None) -> Node:
        """A node of this transaction, or a published one; see `NodeSource`."""
        own = self._nodes.get(pointer)
        return own if own is not None else self._store.node(pointer, kind, level, owner)

    def replace(self, pointer: bytes) -> None:
        """The new root will not reach this block (the block alone, not what it points at)."""
        tag = pointer[TAG_AT:]
        if tag == self._mark and self._claimed(pointer):
            self._nodes.pop(pointer, None)
            self._pool.append(pointer[:WEIGHT_AT] + _ONE + tag)
        elif tag != _FREE:
            self._replaced.append(pointer)
            self.replaced_count += 1

    def _claimed(self, pointer: bytes) -> bool:
        """Whether it was this transaction that claimed a block with its tag.

        Tags come back after 2^20 mounts of one slot, and the block may have been there since.
        """
        claim = pointer[:WEIGHT_AT] + _ONE + self._mark
        for claims in (self._claims, self._bulk):
            at = claims.find(claim)
            while at >= 0 and at % SIZE:
                at = claims.find(claim, at + 1)
            if at >= 0:
                return True
        return False

    def drop(self, pointer: bytes, kind: int, level: int, owner: int) -> None:
        """The new root will not reach a whole subtree; after the commit `dropped` is released."""
        self.dropped.append((pointer, kind, level, owner))
        self.replaced_count += weight_of(pointer)

    def replace_many(self, pointers: bytes, count: int) -> None:
        """The same for packed pointers of published data, `count` of them not null."""
        self._replaced_bulk += pointers
        self.replaced_count += count

    @property
    def balance(self) -> int:
        """How many blocks more would be in use after the commit than before."""
        claimed = (len(self._claims) + len(self._bulk)) // SIZE
        return claimed - len(self._pool) - self.replaced_count

    def fill(self, pointers: bytes, content: bytes | bytearray | memoryview) -> None:
        """Store `content` into claimed blocks, zeros after it in the last.  Raises Fenced."""
        if not self._store.blocks.scatter(pointers, content):
            raise Fenced(_NOT_OURS)

    def fill_from(self, pointers: bytes, file: int, at: int, length: int) -> int:
        """The same with what stands in an open file from `at` on, which may end before `length`.

        Returns how many bytes there were; blocks that none came for are given back.  Raises Fenced,
        FsError for what went wrong with the file.
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

    def store_nodes(self) -> None:
        """Write the nodes to the region; they are private still.  Raises Fenced."""
        data = [node.data for node in self._nodes.values()]
        if not self._store.blocks.write_nodes(list(self._nodes), data):
            raise Fenced(_NOT_OURS)
        self._store.memory.fence()

    def publish(self, planned_on: int, root: Node) -> int:
        """Swap the commit word; returns the new one, or 0 when somebody else committed first."""
        word = self._store.commit_word.publish(planned_on, root.block)
        if not word:
            return 0
        cache = self._store.cache
        for pointer in self._replaced:
            cache.drop(pointer)
        for node in self._nodes.values():
            cache.put(node)
        self._store.know(word, root)
        return word

    def forget_plan(self) -> None:
        """Back to claims alone, for planning again: all used blocks return to the pool."""
        self._pool.clear()
        self._give_to_pool(self._claims)
        self._spare, self._bulk = self._spare + self._bulk, b""
        self._nodes.clear()
        self._replaced.clear()
        self._replaced_bulk.clear()
        self.dropped.clear()
        self.replaced_count = 0

    def settle(self, published: bool, ended: bool) -> None:
        """Release what was replaced (if the commit succeeded) and every claim not published.

        Where it was not us who `ended` the transaction, what becomes of its claims is not ours to
        say: they are garbage, which somebody collects, or published.
        """
        if not published:
            self.forget_plan()
        few, bulk = b"".join(self._replaced), bytes(self._replaced_bulk)
        if ended:
            few, bulk = b"".join(self._pool) + few, self._spare + bulk
        if few:
            self._free_list.release(few)
        if bulk:
            self._free_list.release(bulk, bulk=True)
        self._pool.clear()
        self._spare = b""
        self._replaced.clear()
        self._replaced_bulk.clear()
