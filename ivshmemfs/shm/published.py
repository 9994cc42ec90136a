"""Reading published blocks: the snapshot, verified nodes, and the cache of them.

No peer modifies a published block.  So a node that was read under a pointer (block and tag) stays
valid as long as a tree has that pointer.  The cache is keyed by the pointer and needs no
invalidation.  One load of the commit word tells whether the known root is the present one.

The cache forgets what commits replaced, so that its memory is used again while the processor still
has it in its caches.  A commit of this mount names the nodes (`NodeCache.renew`).  After commits of
other peers, a snapshot forgets the old root, and `radix.find_again` the path to each inode.

Contradictory bytes raise Corrupt.  Blocks that other peers have replaced raise Restart; then the
operation starts again from the new root.

The store counts work, because every walk goes from node to node.  A visit costs 1; a node that must
be read from the region costs `READ_COST` more.  `begin_turn` sets the budget of one turn; beyond it
the walk raises Unfinished.  The nodes that it has read stay in the cache, so the next try gets
further.  A turn that reads no node makes no such progress, so its budget is `KNOWN_TURNS` times as
large.  No sound tree needs that much: a walk beyond it is in a cycle (Corrupt).
"""

from __future__ import annotations

import errno
from typing import Any, Final

from ivshmemfs.errors import Corrupt, FsError, Restart, StaleHandle, UnderRepair, Unfinished
from ivshmemfs.format import node as fmt
from ivshmemfs.format import peer, words
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET, REPAIR_OFFSET
from ivshmemfs.format.superblock import Superblock
from ivshmemfs.region import Blocks, Memory, Turn
from ivshmemfs.shm.commit import CommitWord
from ivshmemfs.shm.nodes import Node, NodeSource
from ivshmemfs.shm.repair import abandoned, describe

CACHE_BYTES = 18 << 20  # size of the node cache; keeps a mount below 64 MiB
PARSED_BYTES: Final = 1600  # estimated size of the objects that a reader makes of one node
RECENT: Final = 8  # lists of extended attributes that are kept, of up to 2 MiB of objects each
READ_COST: Final = 15  # additional cost of a node that is read; a visit of a known one costs 1
TURN: Final = 4096  # budget of one turn: 256 nodes read, or 4096 visited, in about 5 ms
KNOWN_TURNS: Final = 4  # budget of a turn that reads no node, in `TURN`s: 15 ms
ENDLESS: Final = 1 << 60  # budget without limit
ROOT_TRIES: Final = 200  # roots that one snapshot reads while other peers commit
_unpack_pointer = words.POINTER.unpack
_unpack_header = fmt.HEADER.unpack


class NodeCache:
    """Bounded cache of nodes by pointer.  It has two generations; a node in use survives."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit // 2
        self._size = 0
        self._young: dict[bytes, Node] = {}
        self._old: dict[bytes, Node] = {}

    def get(self, pointer: bytes) -> Node | None:
        """Return the node that a packed pointer leads to, or None."""
        node = self._young.get(pointer)
        if node is None:
            node = self._old.get(pointer)
            if node is not None:
                self.put(node)
        return node

    def put(self, node: Node) -> None:
        """Keep a node that was read or published."""
        if self._size > self._limit:
            self._old, self._young, self._size = self._young, {}, 0
        self._young[node.pointer] = node
        self._size += len(node.data) + PARSED_BYTES

    def renew(self, replaced: list[bytes], nodes: dict[bytes, Node]) -> None:
        """Do what a commit of this mount means: forget the replaced nodes, keep the new ones."""
        young, size = self._young, self._size
        for pointer in replaced:
            gone = young.get(pointer)
            if gone is not None:
                size -= len(gone.data) + PARSED_BYTES
                del young[pointer]
        for node in nodes.values():
            size += len(node.data) + PARSED_BYTES
        young.update(nodes)
        self._size = size
        if size > self._limit:
            self._old, self._young, self._size = young, {}, 0

    def drop(self, pointer: bytes) -> Node | None:
        """Forget a node that a commit has replaced, and return it; None if it is not kept."""
        old, node = self._old.pop(pointer, None), self._young.pop(pointer, None)
        if node is None:
            return old
        self._size -= len(node.data) + PARSED_BYTES
        return node

    def __len__(self) -> int:
        """Return the number of nodes, counting twice what both generations have."""
        return len(self._young) + len(self._old)

    def clear(self) -> None:
        """Forget all nodes."""
        self._young, self._old, self._size = {}, {}, 0


class Recent:
    """Objects that a reader made of a few large values, by pointer; the least recent goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: dict[bytes, Any] = {}

    def get(self, key: bytes) -> Any:
        """Return the object of `key`, or None."""
        made = self._made.pop(key, None)
        if made is not None:
            self._made[key] = made
        return made

    def put(self, key: bytes, made: Any) -> None:
        """Keep the object of `key`."""
        self._made.pop(key, None)
        if len(self._made) >= self._most:
            del self._made[next(iter(self._made))]
        self._made[key] = made


class Store(NodeSource):
    """The published blocks of one region."""

    def __init__(self, memory: Memory, superblock: Superblock) -> None:
        geometry = superblock.geometry
        super().__init__(geometry.block_size, fmt.index_fanout(geometry.block_size))
        self.memory = memory
        self.superblock = superblock
        self.geometry = geometry
        # Of `superblock`, for each transaction: a look-up in a record takes 30 ns.
        self.seed: Final = superblock.seed
        self.reserve: Final = geometry.reserve
        self.block_count: Final = geometry.block_count
        self.root_capacity: Final = fmt.root_capacity(geometry.block_size)
        self.commit_word = CommitWord(memory)
        self.blocks = Blocks(
            memory,
            geometry.tags_offset,
            geometry.data_offset,
            geometry.block_size,
            geometry.block_count,
        )
        self.turn = Turn(self.blocks, HINT_OFFSET, REPAIR_OFFSET, COMMIT_OFFSET, peer.NONCE_OFFSET)
        self.cache = NodeCache()
        self.recent = Recent(RECENT)
        self.work = 0  # work done so far
        self.reads = 0  # nodes read so far
        self._turn_ends = ENDLESS  # value of `work` at which the turn's budget is used up
        self._turn_reads = 0  # `reads` when the turn began
        self._word = 0
        self._root: Node | None = None

    def begin_turn(self, most: int = TURN) -> None:
        """Allow `most` work from now on."""
        self._turn_ends = self.work + most
        self._turn_reads = self.reads

    def _end_turn(self) -> None:
        if self.reads != self._turn_reads:
            raise Unfinished("the operation needs more reads than one turn may do")
        if self.work > self._turn_ends + (KNOWN_TURNS - 1) * TURN:
            steps = KNOWN_TURNS * TURN
            raise Corrupt(f"the metadata has a cycle: {steps} steps reach no new node")

    def snapshot(self) -> tuple[int, Node]:
        """Return the present (commit word, root node).

        Raises StaleHandle when the region was reformatted, UnderRepair during a repair, Corrupt
        when the root is damaged, Restart when other peers commit too fast.
        """
        return self.snapshot_at(self.commit_word.load())

    def snapshot_at(self, word: int) -> tuple[int, Node]:
        """Do the same; `word` was just loaded."""
        if word == self._word and self._root is not None:
            return word, self._root
        for _ in range(ROOT_TRIES):
            root = self._read_root(word)
            if root is not None:
                if self._root is not None and self._root.pointer != root.pointer:
                    self.cache.drop(self._root.pointer)
                self._word, self._root = word, root
                return word, root
            word, before = self.commit_word.load(), word
            if word == before and not self._overtaken(word):
                block = word & words.BLOCK_MASK
                raise Corrupt(f"the commit word leads to block {block}, which is free")
        raise Restart("other peers commit faster than this mount can read the root")

    def _overtaken(self, word: int) -> bool:
        return self._read_root(word) is not None or self.commit_word.load() != word

    def _read_root(self, word: int) -> Node | None:
        if word == 0:
            raise StaleHandle("the region is being formatted")
        block = word & words.BLOCK_MASK
        if block == words.UNDER_REPAIR:
            if abandoned(self.memory) and self.commit_word.load() == word:
                raise Corrupt(
                    "the commit word says that a repair is under way, and none is: run "
                    "fsck.ivshmemfs -y on the region"
                )
            raise UnderRepair(describe(self.memory))
        if block >= self.geometry.block_count:
            raise Corrupt(f"the commit word {word:#x} leads past the end of the region")
        tag = self.blocks.tag(block)
        if tag == 0:
            return None
        pointer = words.POINTER.pack(block, 1, tag)
        root = self.cache.get(pointer)
        if root is None or root.kind != fmt.ROOT:
            try:
                root = self._load(pointer, fmt.ROOT, 0, 0)
            except (Corrupt, Restart):
                if self.commit_word.load() != word:
                    return None
                raise
        if root is not None and self.commit_word.load() != word:
            return None
        if root is not None and fmt.fsid_bytes(root.data) != self.superblock.seed[: words.WORD]:
            raise StaleHandle("the region was formatted anew: unmount it and mount it again")
        return root

    def know(self, word: int, root: Node) -> None:
        """Note that this mount has just published `root` with commit word `word`."""
        self._word, self._root = word, root

    def _load(self, pointer: bytes, kind: int, level: int, owner: int | None) -> Node | None:
        block, _, tag = _unpack_pointer(pointer)
        self.work += READ_COST
        self.reads += 1
        try:
            data = self.blocks.read_node(block, tag)
        except ValueError as error:
            told = str(error)  # most of them name the block
            raise Corrupt(told if told.startswith("block ") else f"block {block}: {told}") from None
        if data is None:
            return None
        header = _unpack_header(data)
        node = Node(pointer, header.kind, header.level, header.owner, header.count, data)
        self._expect(node, kind, level, owner)
        self.cache.put(node)
        return node

    def _expect(self, node: Node, kind: int, level: int, owner: int | None) -> None:
        if owner is None:
            owner = node.owner
        if (node.kind, node.level, node.owner) != (kind, level, owner):
            raise Corrupt(
                f"block {node.block} is a {fmt.KIND_NAMES.get(node.kind, node.kind)} of level "
                f"{node.level} of inode {node.owner} where a {fmt.KIND_NAMES[kind]} of level "
                f"{level} of inode {owner} should be"
            )

    def node(self, pointer: bytes, kind: int, level: int, owner: int | None) -> Node:
        """Return the published node that a packed pointer leads to; see `NodeSource.node`."""
        self.work += 1
        if self.work > self._turn_ends:
            self._end_turn()
        node = self.cache.get(pointer)
        if node is None:
            node = self._load(pointer, kind, level, owner)
            if node is None:
                raise Restart(f"block {_unpack_pointer(pointer)[0]} was replaced")
        elif (
            node.kind != kind or node.level != level or (owner is not None and node.owner != owner)
        ):
            self._expect(node, kind, level, owner)
        return node

    def drain(self, pointers: bytes, skip: int, length: int, file: int, at: int) -> None:
        """Copy as `gather` does, into an open file from its byte `at` on.

        After any error the bytes written there are invalid.  Raises what `gather` raises, and
        FsError for an error of the file.
        """
        try:
            good = self.blocks.drain(pointers, skip, length, file, at)
        except ValueError as error:
            raise Corrupt(f"a block map leads astray: {error}") from None
        except OSError as error:
            raise FsError(error.errno or errno.EIO, error.strerror or "") from None
        if not good:
            raise Restart("a data block was replaced")

    def gather(
        self, pointers: bytes, skip: int, length: int, into: memoryview | None = None
    ) -> bytearray | memoryview:
        """Return `length` bytes of the blocks that packed `pointers` name, from byte `skip` on.

        The bytes go into `into`, or into new memory.  Null pointers read as zeros.  Raises Restart
        when another peer has replaced a block, or Corrupt.
        """
        out = bytearray(length) if into is None else into[:length]
        try:
            good = self.blocks.gather(pointers, skip, length, out)
        except ValueError as error:
            raise Corrupt(f"a block map leads astray: {error}") from None
        if not good:
            raise Restart("a data block was replaced")
        return out
