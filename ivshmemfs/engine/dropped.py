"""Subtrees that commits of this mount cut off, and the release of their blocks, piece by piece.

    cut off     `Transaction` drops a subtree: one pointer, whatever stands below it
    queued      the commit succeeded; nothing reaches the subtree any more (`add`)
    walked      `step` reads its nodes and releases their children, then the nodes themselves
    released    all its blocks are free

A file of 16 GiB has 16,000 index nodes, too many for one turn.  So the commit releases a first
piece, and upkeep, or an allocation that finds no room, the rest.  The order does not matter:
only a collector may compete, and each skips what the other released.  When this mount dies or
leaves, what is queued is garbage, which is collected as after any death.
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
RELEASED_AT_ONCE: Final = 128  # nodes of one step; of a file in blocks of 4 KiB, 127 MiB


class _Walk:
    """A node whose children are being released."""

    __slots__ = ("at", "kind", "level", "owner", "pointer", "pointers")

    def __init__(self, pointer: bytes, kind: int, level: int, owner: int, pointers: bytes) -> None:
        self.pointer: Final = pointer
        self.kind: Final = kind  # of its children
        self.level: Final = level  # of its children
        self.owner: Final = owner
        self.pointers: Final = pointers
        self.at = 0  # the next child, in bytes


class Dropped:
    """The queue of one mount."""

    def __init__(self, store: Store, supply: FreeList) -> None:
        self._store = store
        self._supply = supply
        self._queue: deque[tuple[bytes, int, int, int]] = deque()
        self._walks: list[_Walk] = []  # from the root of a subtree down

    @property
    def pending(self) -> bool:
        """Whether anything is left to release."""
        return bool(self._queue or self._walks)

    def add(self, subtrees: list[tuple[bytes, int, int, int]]) -> None:
        """Queue (pointer, kind, level, owner) of subtrees that no root reaches any more."""
        self._queue.extend(subtrees)

    def leave(self) -> bool:
        """Leave what is queued to a collection; returns whether that was anything."""
        left = self.pending
        self._queue.clear()
        self._walks.clear()
        return left

    def step(self, most: int = RELEASED_AT_ONCE) -> bool:
        """Release what `most` nodes lead to; returns whether that was anything."""
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
        """Release a node that leads to blocks alone, or begin with its children.

        What was released already is skipped: a forged subtree reaches a node by endless ways.
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
