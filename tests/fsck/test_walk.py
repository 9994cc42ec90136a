"""The walker alone: which ranges it hands out, in which order, and what it makes of the answers."""

from __future__ import annotations

import struct

from ivshmemfs.format import words
from ivshmemfs.format.dirent import NODE_ENTRY, Interior, decode_interior
from ivshmemfs.format.node import HEADER, HEADER_SIZE, HeaderRecord
from ivshmemfs.fsck.walk import (
    KEY_END,
    KeyRange,
    Pointer,
    child_bounds,
    trim,
    walk_directory,
    walk_radix,
    weigh,
)

FANOUT = 4
PACK = words.POINTER.pack


def node(body: bytes, count: int = 0) -> bytes:
    return HEADER.pack(HeaderRecord(0, 0, 0, count, HEADER_SIZE + len(body), 0, 0)) + body


class Radix:
    """Two index blocks below the top; it refuses block 7 and drops the leaf in block 21."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.nodes = {
            5: node(PACK(20, 1, 1) + words.NULL + PACK(21, 1, 1)),
            6: node(PACK(21, 1, 1)),
        }

    def enter(self, pointer: Pointer, level: int, first: int) -> bytes | None:
        self.calls.append(("enter", pointer[0], first))
        return self.nodes.get(pointer[0])

    def leaves(self, slots: bytes, first: int) -> bytes:
        self.calls.append(("leaves", weigh(slots), first))
        return slots.replace(PACK(21, 1, 1), words.NULL)

    def leave(self, pointer: Pointer, level: int, first: int, slots: bytes, kept: bytes) -> bytes:
        self.calls.append(("leave", pointer[0], len(kept) // words.POINTER_SIZE))
        return PACK(pointer[0], 1 + weigh(kept), 9) if kept else words.NULL


def test_a_radix_walk_returns_what_its_policy_keeps() -> None:
    policy = Radix()
    slots = PACK(5, 3, 1) + words.NULL + PACK(7, 2, 1) + PACK(6, 2, 1)
    kept = walk_radix(policy, FANOUT, slots, 1)
    assert policy.calls == [
        ("enter", 5, 0), ("leaves", 2, 0), ("leave", 5, 1),
        ("enter", 7, 2 * FANOUT),
        ("enter", 6, 3 * FANOUT), ("leaves", 1, 3 * FANOUT), ("leave", 6, 0),
    ]  # fmt: skip
    assert kept == PACK(5, 2, 9)  # the null pointers at the end are gone


def test_a_pointer_with_nothing_but_a_weight_is_shown_to_the_policy() -> None:
    policy = Radix()
    assert walk_radix(policy, FANOUT, PACK(0, 3, 0) + words.NULL, 2) == b""
    assert policy.calls == [("enter", 0, 0)]


class Directory:
    """An interior node of two leaves, of which the policy refuses the second."""

    def __init__(self) -> None:
        self.reached = 0
        self.calls: list[tuple[object, ...]] = []

    def enter(self, pointer: Pointer, level: int, block: int | None) -> bytes | None:
        if pointer[0] == 12:
            return None
        self.reached += 1
        if pointer[0] == 10:
            body = struct.pack("<2Q", 512, 1024) + PACK(11, 1, 1) + PACK(12, 1, 1)
            return node(body, 2)
        return node(b"names", 5)

    def interior(
        self, raw: bytes, count: int, keys: KeyRange, block: int | None
    ) -> Interior | None:
        self.calls.append(("interior", keys, block))
        return decode_interior(raw, count) if len(raw) == count * NODE_ENTRY else None

    def leaf(self, raw: bytes, count: int, keys: KeyRange, block: int | None) -> None:
        self.calls.append(("leaf", raw, count, keys, block))

    def leave(self, pointer: Pointer, blocks: int) -> None:
        self.calls.append(("leave", pointer[0], blocks))


def test_a_directory_walk_narrows_the_keys_and_counts_the_blocks() -> None:
    policy = Directory()
    walk_directory(policy, struct.pack("<Q", 0) + PACK(10, 3, 1), 1, 2)
    assert policy.calls == [
        ("interior", (0, KEY_END), None),
        ("interior", (0, KEY_END), 10),
        ("leaf", b"names", 5, (0, 1024), 11),  # the first child begins where its parent does
        ("leave", 11, 1),
        ("leave", 10, 2),  # without the leaf that the policy refused
    ]


def test_a_node_that_cannot_be_read_ends_the_walk_there() -> None:
    policy = Directory()
    walk_directory(policy, b"too short", 1, 2)
    assert policy.calls == [("interior", (0, KEY_END), None)]
    assert policy.reached == 0


def test_runs_and_ranges() -> None:
    assert trim(PACK(1, 0, 0) + words.NULL * 3) == PACK(1, 0, 0)
    assert trim(words.NULL * 2) == b""
    assert weigh(PACK(1, 2, 3) + PACK(4, 5, 6) + b"half a pointer"[:8]) == 7
    assert child_bounds([7, 100, 200], 50, 300) == [(50, 100), (100, 200), (200, 300)]
