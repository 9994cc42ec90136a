"""Radix trees of pointers: the inode table, the block map of a file, large extended attributes.

A tree is a run of top slots (packed 16-byte pointers, trimmed of trailing nulls) that stands in
its owner, and a height.  At height 0 the slots are the leaves; at height h each leads to an INDEX
node of level h - 1 with `fanout` slots, itself trimmed.  A missing slot is a null pointer, and
null pointers are holes.

Nodes are never changed in place: a change writes new nodes along the path (Transaction.space)
and reports what it replaced.  A pointer's weight counts the blocks below it and itself, so that
dropping a subtree costs a look at its pointer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from ivshmemfs.format import words
from ivshmemfs.format.node import HEADER_SIZE, INDEX, MAX_HEIGHT
from ivshmemfs.shm.space import Space
from ivshmemfs.shm.store import Node

_POINTER = words.POINTER
SIZE = words.POINTER_SIZE
NULL = words.NULL


class Reader(Protocol):
    """Where nodes come from: a snapshot, or a transaction with nodes of its own."""

    fanout: int

    def pointed(self, pointer: bytes, kind: int, level: int, owner: int) -> Node:
        """The node that a packed pointer leads to."""


class Writer(Reader, Protocol):
    """A transaction."""

    space: Space

    def drop(self, pointer: bytes, kind: int, level: int, owner: int) -> None:
        """Release a whole subtree after the commit."""


class Tree(NamedTuple):
    """Top slots, and levels of index nodes below them."""

    height: int
    slots: bytes


def find(reader: Reader, tree: Tree, owner: int, index: int) -> bytes:
    """The packed pointer of leaf `index`; NULL for a hole."""
    data, base, height = tree.slots, 0, tree.height
    while height:
        top, index = divmod(index, reader.fanout**height)
        at = base + top * SIZE
        pointer = data[at : at + SIZE]
        if len(pointer) < SIZE or pointer == NULL:
            return NULL
        height -= 1
        data, base = reader.pointed(pointer, INDEX, height, owner).data, HEADER_SIZE
    at = base + index * SIZE
    return data[at : at + SIZE] or NULL


def find_range(reader: Reader, tree: Tree, owner: int, first: int, count: int) -> bytes:
    """The packed pointers of leaves [first, first + count), holes as nulls."""
    parts: list[bytes] = []
    _collect(reader, tree.slots, tree.height, owner, first, count, parts)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def _collect(
    reader: Reader, slots: bytes, height: int, owner: int, first: int, count: int, out: list[bytes]
) -> None:
    if height == 0:
        got = slots[first * SIZE : (first + count) * SIZE]
        out.append(got + bytes(count * SIZE - len(got)) if len(got) < count * SIZE else got)
        return
    span = reader.fanout**height
    while count:
        top, inner = divmod(first, span)
        here = min(count, span - inner)
        pointer = slots[top * SIZE : top * SIZE + SIZE]
        if len(pointer) < SIZE or pointer == NULL:
            out.append(bytes(here * SIZE))
        else:
            node = reader.pointed(pointer, INDEX, height - 1, owner)
            _collect(reader, node.data[HEADER_SIZE:], height - 1, owner, inner, here, out)
        first += here
        count -= here


def next_leaf(reader: Reader, tree: Tree, owner: int, first: int, *, present: bool) -> int:
    """The index of the first leaf from `first` on that is there, or with not `present` is not.

    -1 when all the rest are holes; for holes, what is behind the tree counts as one.
    """
    return _next(reader, tree.slots, tree.height, owner, first, present)


def _next(reader: Reader, slots: bytes, height: int, owner: int, first: int, present: bool) -> int:
    span: int = reader.fanout**height
    full = _full_weight(reader.fanout, height)
    (top, inner), count = divmod(first, span), len(slots) // SIZE
    while top < count:
        pointer = slots[top * SIZE : top * SIZE + SIZE]
        if pointer == NULL:
            if not present:
                return top * span + inner
        elif height == 0:
            if present:
                return top
        elif present or _POINTER.unpack(pointer)[1] < full:
            below = reader.pointed(pointer, INDEX, height - 1, owner).data[HEADER_SIZE:]
            found = _next(reader, below, height - 1, owner, inner, present)
            if 0 <= found < span:
                return top * span + found
        top, inner = top + 1, 0
    return -1 if present else max(count * span, first)


def _full_weight(fanout: int, height: int) -> int:
    """The weight of a pointer to a subtree of that height without holes."""
    weight_below = 1
    for _ in range(height):
        weight_below = 1 + fanout * weight_below
    return weight_below


def trim(slots: bytes) -> bytes:
    """`slots` without trailing null pointers."""
    kept = len(slots.rstrip(b"\0"))
    return slots[: -(-kept // SIZE) * SIZE]


def count_pointers(pointers: bytes) -> int:
    """How many of packed leaf pointers are not null."""
    if not pointers.strip(b"\0"):
        return 0
    return sum(memoryview(pointers).cast("I")[1::4].tolist())


def weight(slots: bytes) -> int:
    """Blocks below a run of slots."""
    return sum(memoryview(slots).cast("I")[1::4].tolist())


def store(tx: Writer, tree: Tree, owner: int, first: int, pointers: bytes, capacity: int) -> Tree:
    """A tree whose leaves from `first` on are `pointers` (packed; nulls make holes).

    `capacity` is how many top slots the owner has room for.  Leaves that were there before are
    replaced (released after the commit); the leaves themselves must be blocks, not subtrees.
    """
    last = first + len(pointers) // SIZE - 1
    tree = fit(tx, tree, owner, last, capacity)
    slots, _ = _store(tx, tree.slots, tree.height, owner, first, pointers)
    return Tree(tree.height, trim(slots))


def store_some(
    tx: Writer, tree: Tree, owner: int, leaves: list[tuple[int, bytes]], capacity: int
) -> Tree:
    """The same for scattered leaves: (index, pointer) by ascending index; no node twice."""
    tree = fit(tx, tree, owner, leaves[-1][0], capacity)
    slots, _ = _store_some(tx, tree.slots, tree.height, owner, leaves)
    return Tree(tree.height, trim(slots))


def _store_some(
    tx: Writer, slots: bytes, height: int, owner: int, leaves: list[tuple[int, bytes]]
) -> tuple[bytes, int]:
    """(new slots, change of weight)"""
    new, total = bytearray(slots), 0
    if height == 0:
        short = (leaves[-1][0] + 1) * SIZE - len(new)
        if short > 0:
            new += bytes(short)
        for index, pointer in leaves:
            old = bytes(new[index * SIZE : index * SIZE + SIZE])
            if old != NULL:
                tx.space.replace(old)
            new[index * SIZE : index * SIZE + SIZE] = pointer
            total += (pointer != NULL) - (old != NULL)
        return bytes(new), total
    span = tx.fanout**height
    while leaves:
        top = leaves[0][0] // span
        here = [(index - top * span, pointer) for index, pointer in leaves if index // span == top]
        leaves = leaves[len(here) :]
        child = slots[top * SIZE : top * SIZE + SIZE] or NULL
        pointer, delta = _rewrite_child(
            tx, child, height - 1, owner, partial(_store_some, leaves=here)
        )
        if len(new) <= top * SIZE:
            new += bytes((top + 1) * SIZE - len(new))
        new[top * SIZE : top * SIZE + SIZE] = pointer
        total += delta
    return bytes(new), total


def fit(tx: Writer, tree: Tree, owner: int, last: int, capacity: int) -> Tree:
    """The same leaves in a tree that has place for leaf `last` under `capacity` top slots."""
    height, slots = tree
    while last >= capacity * tx.fanout**height or len(slots) > capacity * SIZE:
        if height >= MAX_HEIGHT:
            raise ValueError("the tree cannot grow any higher")
        step = tx.fanout * SIZE
        pieces = [slots[at : at + step] for at in range(0, len(slots), step)]
        slots = b"".join(_node(tx, height, owner, piece) for piece in pieces)
        height += 1
    return Tree(height, slots)


def _node(tx: Writer, level: int, owner: int, slots: bytes) -> bytes:
    slots = trim(slots)
    if not slots:
        return NULL
    return tx.space.add_node(INDEX, level, owner, 0, slots, 1 + weight(slots))


def _splice(slots: bytes, at: int, pointers: bytes) -> bytes:
    start = at * SIZE
    if len(slots) < start:
        slots += bytes(start - len(slots))
    return slots[:start] + pointers + slots[start + len(pointers) :]


def _store(
    tx: Writer, slots: bytes, height: int, owner: int, first: int, pointers: bytes
) -> tuple[bytes, int]:
    """(new slots, change of weight)"""
    if height == 0:
        old = slots[first * SIZE : first * SIZE + len(pointers)]
        gone = count_pointers(old)
        if gone == 1 and len(old) == SIZE:
            tx.space.replace(old)
        elif gone:
            tx.space.replace_many(old, gone)
        return _splice(slots, first, pointers), count_pointers(pointers) - gone
    span, total = tx.fanout**height, 0
    while pointers:
        top, inner = divmod(first, span)
        here = pointers[: (span - inner) * SIZE]
        child = slots[top * SIZE : top * SIZE + SIZE] or NULL
        pointer, delta = _rewrite_child(
            tx, child, height - 1, owner, partial(_store, first=inner, pointers=here)
        )
        slots = _splice(slots, top, pointer)
        total += delta
        first += len(here) // SIZE
        pointers = pointers[len(here) :]
    return slots, total


def _rewrite_child(
    tx: Writer, child: bytes, level: int, owner: int, change: Callable[..., tuple[bytes, int]]
) -> tuple[bytes, int]:
    """(pointer to the child as `change` leaves it, change of weight)"""
    below, old_weight = b"", 0
    if child != NULL:
        below = tx.pointed(child, INDEX, level, owner).data[HEADER_SIZE:]
        old_weight = _POINTER.unpack(child)[1]
    below, delta = change(tx, below, level, owner)
    if child != NULL:
        tx.space.replace(child)
    below = trim(below)
    if not below:
        return NULL, -old_weight
    new_weight = (old_weight or 1) + delta
    return tx.space.add_node(INDEX, level, owner, 0, below, new_weight), new_weight - old_weight


def cut(tx: Writer, tree: Tree, owner: int, first: int) -> Tree:
    """A tree without leaves from `first` on; what is cut off is dropped whole."""
    slots, _ = _cut(tx, tree.slots, tree.height, owner, first)
    return Tree(tree.height if slots else 0, slots)


def _cut(tx: Writer, slots: bytes, height: int, owner: int, first: int) -> tuple[bytes, int]:
    span = tx.fanout**height
    keep, inner = divmod(first, span)
    beyond = slots[(keep + (1 if inner else 0)) * SIZE :]
    lost = weight(beyond)
    if height == 0:
        if lost:
            tx.space.replace_many(beyond, lost)
        return trim(slots[: keep * SIZE]), -lost
    for at in range(0, len(beyond), SIZE):
        if beyond[at : at + SIZE] != NULL:
            tx.drop(beyond[at : at + SIZE], INDEX, height - 1, owner)
    kept = slots[: keep * SIZE]
    child = slots[keep * SIZE : keep * SIZE + SIZE] if inner else b""
    if not child or child == NULL:
        return trim(kept), -lost
    pointer, delta = _cut_child(tx, child, height - 1, owner, inner)
    return trim(kept + pointer), delta - lost


def _cut_child(tx: Writer, child: bytes, level: int, owner: int, first: int) -> tuple[bytes, int]:
    below = tx.pointed(child, INDEX, level, owner).data[HEADER_SIZE:]
    below, delta = _cut(tx, below, level, owner, first)
    old_weight = _POINTER.unpack(child)[1]
    tx.space.replace(child)
    if not below:
        return NULL, -old_weight
    new_weight = old_weight + delta
    return tx.space.add_node(INDEX, level, owner, 0, below, new_weight), delta
