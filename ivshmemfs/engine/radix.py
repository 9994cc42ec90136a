"""Radix trees of pointers: the inode table, block maps of files, large extended attributes.

A tree is a height and a run of top slots in its owner: packed 16-byte pointers, without trailing
nulls.  At height 0 the slots are the leaves.  At height h each slot leads to an INDEX node of level
h - 1 with up to `fanout` slots, also without trailing nulls.  A missing slot is a null pointer, and
null pointers are holes.

Published nodes are never changed.  A change writes new nodes along the path into the transaction's
`Workspace`, which also notes the replaced ones.  A pointer's weight is the number of blocks below
it and its own; so a whole subtree can be dropped and counted without a read.
"""

from __future__ import annotations

from typing import Final

from ivshmemfs.errors import Corrupt
from ivshmemfs.format import words
from ivshmemfs.format.node import HEADER_SIZE, INDEX, MAX_HEIGHT
from ivshmemfs.native import put_slots, swap_slots, weight_of
from ivshmemfs.shm.nodes import Node, NodeSource
from ivshmemfs.shm.published import NodeCache
from ivshmemfs.shm.workspace import Workspace

SIZE: Final = words.POINTER_SIZE
NULL: Final = words.NULL
# Names of this module are bound by the compiler; those of others are looked up at each use.
_put_slots: Final = put_slots
_swap_slots: Final = swap_slots
_weight_of: Final = weight_of
_NO_NODE: Final = bytes(HEADER_SIZE)  # a node without slots


class RadixTree:
    """The top slots of a tree, and the number of levels of INDEX nodes below them."""

    __slots__ = ("height", "slots")

    def __init__(self, height: int, slots: bytes) -> None:
        self.height: Final = height
        self.slots: Final = slots


def find(nodes: NodeSource, tree: RadixTree, owner: int, index: int) -> bytes:
    """Return the packed pointer of leaf `index`; NULL for a hole.  Raises Corrupt."""
    data, base, height = tree.slots, 0, tree.height
    while height:
        span = span_of(nodes.fanout, height)
        at = base + index // span * SIZE
        index %= span
        pointer = data[at : at + SIZE]
        if len(pointer) < SIZE or pointer == NULL:
            return NULL
        height -= 1
        data, base = nodes.node(pointer, INDEX, height, owner).data, HEADER_SIZE
    at = base + index * SIZE
    return data[at : at + SIZE] or NULL


def find_again(
    nodes: NodeSource, cache: NodeCache, tree: RadixTree, before: RadixTree, owner: int, index: int
) -> bytes:
    """Return what `find` returns; `cache` forgets the replaced nodes on the path to the leaf.

    These are the nodes, and the block of the leaf, that `before` has there, an older state of the
    tree, and `tree` does not.
    """
    data, base, height = tree.slots, 0, tree.height
    old = before.slots if before.height == height else b""
    while height:
        span = span_of(nodes.fanout, height)
        at = base + index // span * SIZE
        index %= span
        height -= 1
        pointer = data[at : at + SIZE]
        gone = _forgotten(cache, old[at : at + SIZE], pointer)
        if len(pointer) < SIZE or pointer == NULL:
            return NULL
        old = gone.data if gone is not None else b""
        data, base = nodes.node(pointer, INDEX, height, owner).data, HEADER_SIZE
    at = base + index * SIZE
    pointer = data[at : at + SIZE]
    _forgotten(cache, old[at : at + SIZE], pointer)
    return pointer or NULL


def _forgotten(cache: NodeCache, old: bytes, pointer: bytes) -> Node | None:
    """Forget the node at `old` if `pointer` is in its place now; return it if it was kept."""
    return cache.drop(old) if old and old != pointer else None


def find_range(nodes: NodeSource, tree: RadixTree, owner: int, first: int, count: int) -> bytes:
    """Return the packed pointers of leaves [first, first + count), holes as nulls."""
    parts: list[bytes] = []
    _collect(nodes, tree.slots, tree.height, owner, first, count, parts)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def _collect(
    nodes: NodeSource,
    slots: bytes,
    height: int,
    owner: int,
    first: int,
    count: int,
    out: list[bytes],
) -> None:
    """Append the packed pointers of leaves below `slots` to `out`."""
    if height == 0:
        got = slots[first * SIZE : (first + count) * SIZE]
        out.append(got + bytes(count * SIZE - len(got)) if len(got) < count * SIZE else got)
        return
    span = span_of(nodes.fanout, height)
    while count:
        top, inner = divmod(first, span)
        here = min(count, span - inner)
        pointer = slots[top * SIZE : top * SIZE + SIZE]
        if len(pointer) < SIZE or pointer == NULL:
            out.append(bytes(here * SIZE))
        else:
            node = nodes.node(pointer, INDEX, height - 1, owner)
            _collect(nodes, node.data[HEADER_SIZE:], height - 1, owner, inner, here, out)
        first += here
        count -= here


def next_leaf(nodes: NodeSource, tree: RadixTree, owner: int, first: int, *, present: bool) -> int:
    """Return the index of the first leaf from `first` on; with `present` false, of the first hole.

    Returns -1 when no leaf follows.  Behind the last leaf, all are holes.  Reads at most two nodes
    of each level: no subtree is empty, and its weight tells whether it has holes.  Raises Corrupt
    when a subtree contradicts that.
    """
    return _next(nodes, tree.slots, tree.height, owner, first, present)


def _next(
    nodes: NodeSource, slots: bytes, height: int, owner: int, first: int, present: bool
) -> int:
    """Do the same below `slots`."""
    span = span_of(nodes.fanout, height)
    (top, inner), count = divmod(first, span), len(slots) // SIZE
    if inner and top < count:
        pointer = slots[top * SIZE : top * SIZE + SIZE]
        if pointer == NULL:
            if not present:
                return first
        elif present or _weight_of(pointer) < _full_weight(nodes.fanout, height):
            below = slots_at(nodes, pointer, height - 1, owner)
            found = _next(nodes, below, height - 1, owner, inner, present)
            if 0 <= found < span:
                return top * span + found
        top += 1
    top = _first_slot(slots, top, 0 if present else _full_weight(nodes.fanout, height), present)
    if top >= count:
        return -1 if present else max(count * span, first)
    pointer = slots[top * SIZE : top * SIZE + SIZE]
    if pointer == NULL or (height == 0 and present):
        return top * span
    if height == 0:  # as a hole it would be filled for ever
        raise Corrupt(f"inode {owner}: the pointer to a block has weight {_weight_of(pointer)}")
    below = slots_at(nodes, pointer, height - 1, owner)
    found = _next(nodes, below, height - 1, owner, 0, present)
    if not 0 <= found < span:
        what = "no pointer" if present else "no hole"
        raise Corrupt(f"inode {owner}: a subtree of weight {_weight_of(pointer)} has {what}")
    return top * span + found


def slots_at(nodes: NodeSource, pointer: bytes, level: int, owner: int) -> bytes:
    """Return the slots of an INDEX node."""
    return nodes.node(pointer, INDEX, level, owner).data[HEADER_SIZE:]


def _first_slot(slots: bytes, start: int, full: int, present: bool) -> int:
    """Return the first slot from `start` on with a pointer.

    With `present` false: the first slot of a weight below `full`.
    """
    if present:
        rest = slots[start * SIZE :]
        return start + (len(rest) - len(rest.lstrip(b"\0"))) // SIZE
    whole = len(slots) // SIZE * SIZE  # a damaged node may end within a slot
    weights = memoryview(slots)[:whole].cast("I")[1::4].tolist()
    for at in range(start, len(weights)):
        if weights[at] < full:
            return at
    return len(weights)


def _full_weight(fanout: int, height: int) -> int:
    """Return the weight of a pointer to a subtree of that height without holes."""
    weight_below = 1
    for _ in range(height):
        weight_below = 1 + fanout * weight_below
    return weight_below


def span_of(fanout: int, height: int) -> int:
    """Return the number of leaves below one slot of a node of that height."""
    span = 1
    for _ in range(height):
        span *= fanout
    return span


def trim(slots: bytes) -> bytes:
    """Return `slots` without trailing null pointers."""
    kept = len(slots.rstrip(b"\0"))
    return slots[: -(-kept // SIZE) * SIZE]


def count_pointers(pointers: bytes) -> int:
    """Return how many packed leaf pointers are not null."""
    if len(pointers) == SIZE:
        return int(pointers != NULL)
    return _weight_of(pointers)


def store(
    space: Workspace, tree: RadixTree, owner: int, first: int, pointers: bytes, capacity: int
) -> RadixTree:
    """Return the tree with `pointers` (packed, nulls for holes) as leaves from `first` on.

    The owner has room for `capacity` top slots.  Old leaves are replaced.  Each leaf, old or new,
    is one block.  Raises NoSpace.
    """
    count = len(pointers) // SIZE
    tree = fit(space, tree, owner, first + count - 1, capacity)
    runs = [(first, pointers)]
    if tree.height == 1 and count and first % space.fanout + count <= space.fanout:
        return RadixTree(1, _store_lowest(space, tree.slots, owner, runs))
    slots, _ = _store(space, tree.slots, 0, tree.height, owner, runs)
    return RadixTree(tree.height, slots)


def store_some(
    space: Workspace, tree: RadixTree, owner: int, leaves: list[tuple[int, bytes]], capacity: int
) -> RadixTree:
    """Do the same for scattered leaves: (index, pointer) by ascending index.

    Writes each node once.
    """
    tree = fit(space, tree, owner, leaves[-1][0], capacity)
    if tree.height == 1:
        return RadixTree(1, _store_lowest(space, tree.slots, owner, leaves))
    slots, _ = _store(space, tree.slots, 0, tree.height, owner, leaves)
    return RadixTree(tree.height, slots)


def _store(
    space: Workspace,
    node: bytes,
    start: int,
    height: int,
    owner: int,
    runs: list[tuple[int, bytes]],
) -> tuple[bytes, int]:
    """Return (slots of `node` from byte `start` on with new leaves, change of weight).

    `runs` are (index of the first leaf, packed pointers) by ascending index.
    """
    if height == 0:
        slots, gone, gain = _swap_slots(node, start, runs)
        space.replace_leaves(gone)
        return slots, gain
    total, changes = 0, list[tuple[int, bytes]]()
    for top, here in _by_child(runs, span_of(space.fanout, height)):
        child = node[start + top * SIZE : start + top * SIZE + SIZE] or NULL
        below = _below(space, child, height - 1, owner)
        if height == 1:
            pointer = _swapped(space, child, owner, below, here, 0, len(here), 0)
            delta = _weight_of(pointer) - _weight_of(child)
        else:
            slots, delta = _store(space, below, HEADER_SIZE, height - 1, owner, here)
            pointer, delta = _renewed(space, child, height - 1, owner, slots, delta)
        changes.append((top, pointer))
        total += delta
    return _put_slots(node, start, changes), total


def _store_lowest(
    space: Workspace, slots: bytes, owner: int, runs: list[tuple[int, bytes]]
) -> bytes:
    """Return the top slots of a tree of height 1 with new leaves; no run crosses two nodes."""
    changes = list[tuple[int, bytes]]()
    fanout, first, count = space.fanout, 0, len(runs)
    while first < count:
        top, stop = runs[first][0] // fanout, first + 1
        while stop < count and runs[stop][0] < (top + 1) * fanout:
            stop += 1
        child = slots[top * SIZE : top * SIZE + SIZE] or NULL
        below = _below(space, child, 0, owner)
        pointer = _swapped(space, child, owner, below, runs, first, stop, top * fanout)
        changes.append((top, pointer))
        first = stop
    return _put_slots(slots, 0, changes)


def _by_child(
    runs: list[tuple[int, bytes]], span: int
) -> list[tuple[int, list[tuple[int, bytes]]]]:
    """Return (slot of a child, runs within the child); each child has `span` leaves."""
    found = list[tuple[int, list[tuple[int, bytes]]]]()
    last = -1
    for first, pointers in runs:
        while pointers:
            top, inner = first // span, first % span
            if top != last:
                here = list[tuple[int, bytes]]()
                found.append((top, here))
                last = top
            room = (span - inner) * SIZE
            if len(pointers) <= room:
                here.append((inner, pointers))
                break
            here.append((inner, pointers[:room]))
            first += span - inner
            pointers = pointers[room:]
    return found


def fit(space: Workspace, tree: RadixTree, owner: int, last: int, capacity: int) -> RadixTree:
    """Return the same leaves in a tree high enough for leaf `last`.

    The tree has at most `capacity` top slots.  Raises NoSpace, ValueError beyond MAX_HEIGHT.
    """
    height, slots = tree.height, tree.slots
    while last >= capacity * span_of(space.fanout, height) or len(slots) > capacity * SIZE:
        if height >= MAX_HEIGHT:
            raise ValueError("the tree cannot grow any higher")
        step = space.fanout * SIZE
        pieces = [slots[at : at + step] for at in range(0, len(slots), step)]
        slots = b"".join(_node(space, height, owner, piece) for piece in pieces)
        height += 1
    return tree if height == tree.height else RadixTree(height, slots)


def _node(space: Workspace, level: int, owner: int, slots: bytes) -> bytes:
    """Store an INDEX node with `slots`; return its pointer, or NULL when all slots are null."""
    slots = trim(slots)
    if not slots:
        return NULL
    return space.add_node(INDEX, level, owner, 0, slots, 1 + _weight_of(slots))


def _below(space: Workspace, child: bytes, level: int, owner: int) -> bytes:
    """Return the INDEX node of `child`, with its header; an empty one for a null pointer."""
    return space.node(child, INDEX, level, owner).data if child != NULL else _NO_NODE


def _renewed(
    space: Workspace, child: bytes, level: int, owner: int, below: bytes, delta: int
) -> tuple[bytes, int]:
    """Replace `child` by a node with slots `below`, whose weight grows by `delta`.

    Returns (its pointer, change of the pointer's weight).
    """
    old_weight = 0
    if child != NULL:
        old_weight = _weight_of(child)
        space.replace(child)
    if not below:
        return NULL, -old_weight
    new_weight = (old_weight or 1) + delta
    return space.add_node(INDEX, level, owner, 0, below, new_weight), new_weight - old_weight


def _swapped(
    space: Workspace,
    child: bytes,
    owner: int,
    below: bytes,
    runs: list[tuple[int, bytes]],
    first: int,
    stop: int,
    base: int,
) -> bytes:
    """Replace lowest node `child`, whose bytes are `below`, by one with new leaves.

    These are runs `first` to before `stop`; the node begins at index `base`.  Returns its pointer.
    """
    if child != NULL:
        space.replace(child)
    return space.swap_leaves(INDEX, owner, child, below, runs, first, stop, base)


def cut(space: Workspace, tree: RadixTree, owner: int, first: int) -> RadixTree:
    """Return the tree without leaves from `first` on; whole subtrees are dropped unread."""
    return clear(space, tree, owner, first, len(tree.slots) // SIZE * _span(space, tree))


def clear(space: Workspace, tree: RadixTree, owner: int, first: int, last: int) -> RadixTree:
    """Return the tree without leaves `first` to `last - 1`.

    Whole subtrees are dropped unread, so at most two nodes of each level are read and replaced.
    """
    last = min(last, len(tree.slots) // SIZE * _span(space, tree))
    slots, _ = _clear(space, tree.slots, tree.height, owner, first, last)
    return RadixTree(tree.height if slots else 0, slots)


def _span(space: Workspace, tree: RadixTree) -> int:
    """Return the number of leaves below one top slot."""
    return span_of(space.fanout, tree.height)


def _clear(
    space: Workspace, slots: bytes, height: int, owner: int, first: int, last: int
) -> tuple[bytes, int]:
    """Return (slots without leaves `first` to `last - 1`, change of weight)."""
    if height == 0:
        gone = slots[first * SIZE : last * SIZE]
        count = count_pointers(gone)
        if not count:
            return slots, 0
        space.replace_many(gone, count)
        return _put_slots(slots, 0, [(first, bytes(len(gone)))]), -count
    span, total = span_of(space.fanout, height), 0
    changes = list[tuple[int, bytes]]()
    last = min(last, len(slots) // SIZE * span)
    while first < last:
        top, inner = divmod(first, span)
        here = min(last - first, span - inner)
        child = slots[top * SIZE : top * SIZE + SIZE]
        if child != NULL:
            pointer, delta = _cleared(space, child, height - 1, owner, inner, here)
            if pointer != child:
                changes.append((top, pointer))
                total += delta
        first += here
    return _put_slots(slots, 0, changes) if changes else slots, total


def _cleared(
    space: Workspace, child: bytes, level: int, owner: int, first: int, count: int
) -> tuple[bytes, int]:
    """Return (pointer to `child` without `count` leaves from `first` on, change of weight)."""
    if count == span_of(space.fanout, level + 1):
        space.drop(child, INDEX, level, owner)
        return NULL, -_weight_of(child)
    before = _below(space, child, level, owner)[HEADER_SIZE:]
    below, delta = _clear(space, before, level, owner, first, first + count)
    if below == before:
        return child, 0
    return _renewed(space, child, level, owner, below, delta)
