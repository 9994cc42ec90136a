"""Directory leaves and interior nodes against plain dictionaries."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ivshmemfs.errors import NoSpace
from ivshmemfs.format import words
from ivshmemfs.format.dirent import (
    COLLISIONS,
    EMPTY_LEAF,
    ENTRY_FIXED,
    FIRST_KEY,
    NODE_ENTRY,
    decode_interior,
    decode_leaf,
    interior_of,
    name_key,
)

SECRET = bytes(range(16))
NAMES = st.binary(min_size=1, max_size=255)
TARGETS = st.integers(0, (1 << 64) - 1)


class LeafMachine(RuleBasedStateMachine):
    """A leaf under changes, beside a dictionary of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = EMPTY_LEAF
        self.model: dict[bytes, int] = {}

    def at(self, name: bytes) -> int:
        return self.leaf.find(name_key(name, SECRET), name)

    @rule(name=NAMES, both=TARGETS)
    def insert_or_replace(self, name: bytes, both: int) -> None:
        if name in self.model:
            self.leaf = self.leaf.replace(self.at(name), both)
        else:
            assert self.at(name) == -1
            self.leaf = self.leaf.insert(name_key(name, SECRET), both, name)
        self.model[name] = both

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.leaf = self.leaf.remove(self.at(name))
        del self.model[name]
        assert self.at(name) == -1

    @precondition(lambda self: self.model)
    @rule(data=st.data(), name=NAMES)
    def move(self, data: st.DataObject, name: bytes) -> None:
        if name in self.model:
            return
        old = data.draw(st.sampled_from(sorted(self.model)))
        self.leaf = self.leaf.move(self.at(old), name_key(name, SECRET), 5, name)
        del self.model[old]
        self.model[name] = 5
        assert self.at(old) == -1

    @rule(data=st.data())
    def divide_and_join(self, data: st.DataObject) -> None:
        cut = data.draw(st.integers(0, len(self.leaf.keys)))
        left, right = self.leaf.part(0, cut), self.leaf.part(cut, len(self.leaf.keys))
        assert left.size + right.size == self.leaf.size
        self.leaf = left.join(right)

    @rule()
    def through_bytes(self) -> None:
        raw = self.leaf.raw
        assert len(raw) == self.leaf.size
        self.leaf = decode_leaf(raw, len(self.leaf.keys))

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        leaf = self.leaf
        starts = [leaf.name_at(at) for at in range(leaf.count + 1)]
        found = {
            leaf.raw[a:b]: ino for (a, b), ino in zip(pairwise(starts), leaf.inos, strict=True)
        }
        assert found == self.model
        assert list(leaf.keys) == sorted(name_key(name, SECRET) for name in self.model)
        assert leaf.size == sum(ENTRY_FIXED + len(name) for name in self.model)


TestLeaf = LeafMachine.TestCase


def test_names_of_equal_hash_are_told_apart() -> None:
    base = name_key(b"one", SECRET)
    leaf = EMPTY_LEAF
    for at, name in enumerate((b"one", b"two", b"three")):  # as if they all hashed alike
        leaf = leaf.insert(base + at, at, name)
    assert [leaf.find(base, name) for name in (b"one", b"two", b"three", b"on")] == [0, 1, 2, -1]
    assert leaf.find(base + COLLISIONS, b"two") == -1


def test_keys_of_one_hash_are_used_up() -> None:
    base, leaf = name_key(b"one", SECRET), EMPTY_LEAF
    for at in range(COLLISIONS):
        leaf = leaf.insert(base, at, b"%d" % at)
    assert list(leaf.keys) == list(range(base, base + COLLISIONS))
    with pytest.raises(NoSpace, match="same hash"):
        leaf.insert(base, 1, b"one")
    moved = leaf.move(7, base, 1, b"one")
    assert moved.key(moved.find(base, b"one")) == base + 7
    assert moved.find(base, b"7") == -1
    with pytest.raises(NoSpace, match="same hash"):
        leaf.insert(base + COLLISIONS, 0, b"next").move(COLLISIONS, base, 1, b"one")


@given(NAMES)
def test_keys_leave_room(name: bytes) -> None:
    key = name_key(name, SECRET)
    assert FIRST_KEY <= key < 1 << 63
    assert key % COLLISIONS == 0
    assert key != name_key(name, b"another secret")


def test_golden_keys() -> None:
    assert name_key(b"hello", SECRET) == 0x17F97007B6305600
    assert name_key(b"\xff" * 255, SECRET) == 0x651382C1882CA400


def test_golden_leaf() -> None:
    leaf = EMPTY_LEAF.insert(0x100, 8 << 56 | 3, b"b")
    leaf = leaf.insert(0x200, 4 << 56 | 5, b"aa")
    assert leaf.raw.hex() == (
        "00010000000000000002000000000000"
        "03000000000000080500000000000004"
        "0102626161"
    )  # fmt: skip


@given(st.binary(max_size=400), st.integers(0, 1 << 16))
def test_any_bytes_are_a_leaf_or_refused(raw: bytes, count: int) -> None:
    try:
        leaf = decode_leaf(raw, count)
    except ValueError:
        return
    assert leaf.raw == raw
    assert len(leaf.keys) == len(leaf.inos) == len(leaf.sizes) == count


@pytest.mark.parametrize(
    ("raw", "count", "says"),
    [
        (bytes(16), 1, "fit"),
        (bytes(17), 1, "add up"),
        (bytes(16) + b"\1", 1, "add up"),
        (bytes(16) + b"\1ab", 1, "add up"),
        (bytes(32) + b"\1\1ab", 2, "order"),
    ],
)
def test_contradictions_in_a_leaf_are_refused(raw: bytes, count: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode_leaf(raw, count)


KEYS = st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=50, unique=True).map(sorted)


@given(KEYS)
def test_interior_round_trip(keys: list[int]) -> None:
    each = [words.POINTER.pack(at, 1, at + 1) for at in range(len(keys))]
    node = interior_of(list(zip(keys, each, strict=True)))
    raw = node.raw
    assert len(raw) == node.size == NODE_ENTRY * len(keys)
    back = decode_interior(raw, len(keys))
    assert list(back.keys) == keys
    assert back.pointers == b"".join(each)
    assert [back.pointer(at) for at in range(back.count)] == each


@given(st.binary(max_size=400), st.integers(0, 1 << 16))
def test_any_bytes_are_an_interior_node_or_refused(raw: bytes, count: int) -> None:
    try:
        node = decode_interior(raw, count)
    except ValueError:
        return
    assert node.raw == raw
    assert count > 0
