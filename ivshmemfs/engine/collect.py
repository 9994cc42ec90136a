"""Collection: it frees blocks that no peer will ever reach.

A block leaks when a peer dies between claiming it and publishing or releasing it.  It leaks too
when a peer dies between a commit and the release of what the commit replaced.  A collection finds
such blocks in this order:

    limits    read from all slots' state words which claims are settled, *before* it loads the root
    mark      walk from the root and note the tag of every reachable block
    sweep     release every block with a settled claim that has no mark of its present tag

A settled claim that one root does not reach is not reached by a later root either.  So the tree may
change during the walk.  When the walk meets a replaced node, it starts again at the new root.  It
skips subtrees that it has walked, because the contents of a pair (block, tag) never change.  Blocks
that it marked and that were replaced since are collected next time.

The caller says how many nodes one piece takes, so no request waits for a collection.

A repair may reach blocks that no root reached.  So a collection starts again when it finds that a
repair took place, and it pauses during a repair.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import NULL, SIZE
from ivshmemfs.engine.transaction import CommitCache, View
from ivshmemfs.errors import Corrupt, InUse, Restart, UnderRepair
from ivshmemfs.format import inode as fmt
from ivshmemfs.format import repair, words
from ivshmemfs.format.dirent import decode_interior
from ivshmemfs.format.node import DIRNODE, HEADER_SIZE, INDEX
from ivshmemfs.shm.peers import PeerTable
from ivshmemfs.shm.published import ENDLESS, Store

_POINTER = words.POINTER
SWEEP_STEP = 1 << 14  # blocks that one piece sweeps
SWEEP_COST = 32  # nodes that take as long as sweeping SWEEP_STEP blocks


class Collector:
    """One collection, in pieces.

    LIMITS -> MARKING (again from the new root after each Restart) -> SWEEPING -> `done`.

    A repair takes it back to LIMITS.  Only `step` moves it on.
    """

    def __init__(self, store: Store, table: PeerTable) -> None:
        self._store = store
        self._table = table
        self.released = 0
        self.done = False
        self._begin()

    def _begin(self) -> None:
        self._repairs = self._table.state(repair.SLOT)
        self._limits = self._table.limits()
        # One word per block.  The kernel zeroes anonymous memory at its first use, page by page.
        size = self._store.geometry.block_count * words.WORD
        self._marks = memoryview(mmap.mmap(-1, size)).cast("Q")
        self._work = self._run()

    def step(self, most: int = ENDLESS) -> bool:
        """Do a piece of about `most` nodes; returns whether the collection is done.

        Raises UnderRepair; the next call starts the collection again.
        """
        self._store.begin_turn(ENDLESS)  # `most` bounds this turn instead
        try:
            while not self.done and most > 0:
                cost = next(self._work, -1)
                self.done = cost < 0
                most -= max(cost, 0)
                if self._table.state(repair.SLOT) != self._repairs:
                    self._begin()
                    self.done = False
        except UnderRepair:
            self._begin()
            raise
        return self.done

    def _run(self) -> Iterator[int]:
        self._store.memory.fence()
        while True:
            yield 0
            word = 0
            try:
                word, root = self._store.snapshot()
                yield from self._mark_root(View(self._store, word, root, CommitCache()))
                break
            except Restart as overtaken:
                if self._store.commit_word.load() == word:
                    raise Corrupt(f"the present root leads astray: {overtaken}") from None
                yield 1
        for start in range(0, self._store.geometry.block_count, SWEEP_STEP):
            yield 0  # `step` checks for a repair before each sweep
            stop = min(start + SWEEP_STEP, self._store.geometry.block_count)
            garbage = self._store.blocks.sweep(self._marks, self._limits, start, stop)
            self.released += self._store.blocks.release(garbage)
            yield SWEEP_COST

    def _marked(self, pointer: bytes) -> bool:
        block, _, tag = _POINTER.unpack(pointer)
        return bool(self._marks[block] == tag)

    def _mark(self, pointers: bytes) -> None:
        self._store.blocks.mark(pointers, self._marks)

    def _mark_root(self, view: View) -> Iterator[int]:
        table = view.root.table
        yield from self._mark_slots(view, table.slots, table.height, 0)
        self._mark(view.root.pointer)

    def _mark_slots(self, view: View, slots: bytes, height: int, owner: int) -> Iterator[int]:
        """Mark what `slots` lead to; a marked pointer means that everything below it is marked."""
        if height == 0 and owner:
            self._mark(slots)
            return
        for at in range(0, len(slots), SIZE):
            pointer = slots[at : at + SIZE]
            if pointer == NULL or self._marked(pointer):
                continue
            if height:
                body = view.nodes.node(pointer, INDEX, height - 1, owner).data[HEADER_SIZE:]
                yield from self._mark_slots(view, body, height - 1, owner)
            else:
                yield from self._mark_inode(view, view.inode_at(pointer))
            self._mark(pointer)
            yield 1

    def _mark_inode(self, view: View, inode: Inode) -> Iterator[int]:
        record = inode.record
        if record.payload == fmt.MAP:
            yield from self._mark_slots(view, inode.data, record.height, inode.ino)
        elif record.payload == fmt.DIRTREE:
            pointers = decode_interior(inode.data, len(inode.data) // (8 + SIZE)).pointers
            yield from self._mark_children(view, pointers, record.height - 1, inode.ino)
        if record.xattr_pointer != NULL:
            yield from self._mark_slots(view, record.xattr_pointer, record.xattr_height, inode.ino)

    def _mark_children(self, view: View, pointers: bytes, level: int, owner: int) -> Iterator[int]:
        for at in range(0, len(pointers), SIZE):
            pointer = pointers[at : at + SIZE]
            if self._marked(pointer):
                continue
            if level:
                node = view.nodes.node(pointer, DIRNODE, level, owner)
                body = node.data[HEADER_SIZE + 8 * node.count :]
                yield from self._mark_children(view, body, level - 1, owner)
            self._mark(pointer)
            yield 1


def evict(store: Store, table: PeerTable, slot: int, word: int) -> int:
    """Retire the owner of a slot in state `word`, and collect what it claimed.

    The caller vouches that the owner is gone, and needs no slot of its own.  Returns the number of
    freed blocks.  Raises InUse when the owner has changed the state word since, Corrupt.
    """
    if not table.retire(slot, word):
        raise InUse(f"the peer in slot {slot} is moving on: try again")
    collector = Collector(store, table)
    collector.step()
    return collector.released
