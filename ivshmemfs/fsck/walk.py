"""The one walker of the trees in a region.

A region has trees of two shapes.  A *radix tree* is the inode table, a file's block map, or the
blocks of an inode's extended attributes.  A *directory tree* is a B+tree of names.  The walker
knows the shapes: which leaf index or which range of keys each child covers.  A *policy* knows what
to make of the blocks: it says which pointers the walker follows.

    strict    `check`: reports what violates an invariant, and does not descend there
    lenient   `repair/survey.py`: follows what is sound, and tells a keeper what it drops

For each pointer the walker calls `enter`.  If `enter` returns the bytes of a node, the walker walks
that node, then calls `leave`.  A policy bounds the walk: it never enters a block twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

from ivshmemfs.format import node as node_format
from ivshmemfs.format import words
from ivshmemfs.format.dirent import Interior, Leaf
from ivshmemfs.format.node import HEADER, HEADER_SIZE

KEY_END = 1 << 64  # above every key of a directory
Pointer = tuple[int, int, int]  # block, weight, tag
KeyRange = tuple[int, int]  # lowest key, and the key after the highest

_NULL_POINTER: Pointer = (0, 0, 0)


class RadixPolicy(Protocol):
    """What a walk of one radix tree follows, and what it keeps.

    `first` is the index of the first leaf that a pointer or a run of pointers covers.
    """

    def enter(self, pointer: Pointer, level: int, first: int) -> bytes | None:
        """Return the used bytes of the index node at `pointer`; None to skip what is below."""

    def leaves(self, slots: bytes, first: int) -> bytes:
        """Take the pointers to leaves in `slots`; return the run that is kept."""

    def leave(
        self, pointer: Pointer, level: int, first: int, slots: bytes, kept: bytes
    ) -> bytes:  # fmt: skip
        """Return the pointer that replaces `pointer`; `kept` replaces the node's `slots`."""


class DirectoryPolicy(Protocol):
    """What a walk of one directory tree follows.

    `block` is the block of a node; None for the top of the tree, which is in the inode block.
    """

    @property
    def reached(self) -> int:
        """Blocks that the policy has accepted; the walker takes differences of it."""

    def enter(self, pointer: Pointer, level: int, block: int | None) -> bytes | None:
        """Return the used bytes of the node at `pointer`; None to skip what is below.

        `block` has the pointer.
        """

    def interior(
        self, raw: bytes, count: int, keys: KeyRange, block: int | None
    ) -> Interior | None:
        """Return the children of an interior node; None if its bytes cannot be read."""

    def leaf(self, raw: bytes, count: int, keys: KeyRange, block: int | None) -> None:
        """Take the names of a leaf."""

    def leave(self, pointer: Pointer, blocks: int) -> None:
        """Note that the subtree of `pointer`, which has `blocks` blocks, was walked."""


def walk_radix(
    policy: RadixPolicy, fanout: int, slots: bytes, height: int, first: int = 0
) -> bytes:
    """Walk a run of pointers that have `height` levels of nodes below them.

    Returns the run that the policy keeps, without null pointers at its end.
    """
    if height == 0:
        return trim(policy.leaves(slots, first))
    kept, span = [], fanout**height
    for pointer in pointers_in(slots):
        node = None if pointer == _NULL_POINTER else policy.enter(pointer, height - 1, first)
        if node is None:
            kept.append(words.NULL)
        else:
            below = node[HEADER_SIZE:]
            new = walk_radix(policy, fanout, below, height - 1, first)
            kept.append(policy.leave(pointer, height - 1, first, below, new))
        first += span
    return trim(b"".join(kept))


def walk_directory(
    policy: DirectoryPolicy,
    raw: bytes,
    count: int,
    height: int,
    keys: KeyRange = (0, KEY_END),
    block: int | None = None,
) -> None:
    """Walk an interior node of `count` children that is `height` levels above the leaves."""
    node = policy.interior(raw, count, keys, block)
    if node is None:
        return
    level = height - 1
    bounds = child_bounds(node.keys, *keys)
    for pointer, child in zip(pointers_in(node.pointers), bounds, strict=True):
        data = policy.enter(pointer, level, block)
        if data is None:
            continue
        before, body, entries = policy.reached, data[HEADER_SIZE:], HEADER.unpack(data).count
        if level:
            walk_directory(policy, body, entries, level, child, pointer[0])
        else:
            policy.leaf(body, entries, child, pointer[0])
        policy.leave(pointer, 1 + policy.reached - before)


def directory_node_kind(level: int) -> int:
    """Return the kind of a directory node that is `level` levels above the leaves."""
    return node_format.DIRNODE if level else node_format.DIRLEAF


def pointers_in(slots: bytes) -> Iterator[Pointer]:
    """Return the whole pointers in a run of slots."""
    whole = len(slots) // words.POINTER_SIZE * words.POINTER_SIZE
    return words.POINTER.iter_unpack(slots[:whole])


def weigh(slots: bytes) -> int:
    """Return the number of blocks below a run of pointers, as the pointers state it."""
    return sum(weight for _, weight, _ in pointers_in(slots))


def trim(slots: bytes) -> bytes:
    """Return a run of pointers without the null pointers at its end."""
    used = len(slots.rstrip(b"\0"))
    return slots[: -(-used // words.POINTER_SIZE) * words.POINTER_SIZE]


def child_bounds(keys: Sequence[int], low: int, high: int) -> list[KeyRange]:
    """Return the key range of each child of an interior node with range [low, high).

    The first child's range begins where the range of the node does; its bound does not count.
    """
    lows = [low, *keys[1:]]
    return list(zip(lows, [*keys[1:], high], strict=True))


def names_of(leaf: Leaf) -> list[bytes]:
    """Return the names in a directory leaf, in its order."""
    ends = [0]
    for size in leaf.sizes:
        ends.append(ends[-1] + size)
    return [leaf.names[start:end] for start, end in pairwise(ends)]
