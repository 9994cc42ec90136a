"""Subtrees that commits of this mount cut off, and the release of their blocks, in pieces.

    cut off     `Transaction` drops a subtree, by the pointer to its top node
    queued      the commit succeeded, and no root reaches the subtree (`add`)
    walked      `step` reads its nodes, releases their children, then the nodes themselves
    released    all its blocks are free
    left        `leave` emptied the queue: a collection frees the blocks

A file of 16 GiB has 16,000 index nodes, too many for one turn.  So the commit releases the first
piece.  The upkeep, or an allocation that finds no space, releases the others.  Only a collector can
release the same blocks meanwhile, and each of the two skips what the other released.
When this mount dies, the blocks in its queue are garbage for a collection.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from ivshmemfs.errors import Corrupt, Restart
from ivshmemfs.format import words
from ivshmemfs.format.node import DIRLEAF, DIRNODE, HEADER_SIZE, INDEX
from ivshmemfs.shm.freelist import BULK, FreeList
from ivshmemfs.shm.published import Store

SIZE: Final = words.POINTER_SIZE
NULL: Final = words.NULL
RELEASED_AT_ONCE: Final = 128  # nodes of one step; with blocks of 4 KiB, 127 MiB of a file


class _Walk:
    """A node whose children `step` releases."""

    __slots__ = ("at", "kind", "level", "owner", "pointer", "pointers")

    def __init__(self, pointer: bytes, kind: int, level: int, owner: int, pointers: bytes) -> None:
        self.pointer: Final = pointer
        self.kind: Final = kind  # of the children
        self.level: Final = level  # of the children
        self.owner: Final = owner
        self.pointers: Final = pointers
        self.at = 0  # offset of the next child in `pointers`, in bytes


class Dropped:
    """The queue of one mount.  Its release does not change what any root reaches."""

    def __init__(self, store: Store, supply: FreeList) -> None:
        self._store = store
        self._supply = supply
        self._queue: deque[tuple[bytes, int, int, int]] = deque()
        self._walks: list[_Walk] = []  # from the top node of a subtree down to the present one

    @property
    def pending(self) -> bool:
        """Whether any block is left to release."""
        return bool(self._queue or self._walks)

    def add(self, subtrees: list[tuple[bytes, int, int, int]]) -> None:
        """Queue subtrees that no root reaches: (pointer, kind, level, owner) of their top nodes."""
        self._queue.extend(subtrees)

    def leave(self) -> bool:
        """Empty the queue, for a collection to free its blocks; returns whether it held any."""
        left = self.pending
        self._queue.clear()
        self._walks.clear()
        return left

    def step(self, most: int = RELEASED_AT_ONCE) -> bool:
        """Release what `most` nodes lead to; returns whether there was any node."""
        left = most
        while left > 0 and (self._walks or self._queue):
            left -= 1
            if not self._walks:
                self._enter(*self._queue.popleft())
                continue
            walk = self._walks[-1]
            child = self._next_child(walk)
            if child:
                self._enter(child, walk.kind, walk.level, walk.owner)
            else:
                self._walks.pop()
                self._supply.release(walk.pointer)
                self._store.cache.drop(walk.pointer)
        return left < most

    @staticmethod
    def _next_child(walk: _Walk) -> bytes:
        pointers = walk.pointers
        while walk.at < len(pointers):
            child = pointers[walk.at : walk.at + SIZE]
            walk.at += SIZE
            if child != NULL:
                return child
        return b""

    def _enter(self, pointer: bytes, kind: int, level: int, owner: int) -> None:
        """Release the data blocks of a lowest index node, or begin with the node's children.

        Skips a node that is released already: a forged subtree may reach it by many paths.
        """
        block, _, tag = words.POINTER.unpack(pointer)
        known = block < self._store.geometry.block_count and tag != 0
        if not known or self._store.blocks.tag(block) != tag:
            return
        pointers, below = b"", kind
        if kind != DIRLEAF:
            try:
                node = self._store.node(pointer, kind, level, owner)
            except (Corrupt, Restart, ValueError):
                return
            pointers = node.data[HEADER_SIZE:]
            if kind == DIRNODE:
                pointers = pointers[words.WORD * node.count :]
                below = DIRLEAF if level == 1 else DIRNODE
        if kind == INDEX and level == 0:
            self._supply.release(pointers, bulk=len(pointers) >= BULK * SIZE)
            pointers = b""
        self._walks.append(_Walk(pointer, below, level - 1, owner, pointers))
