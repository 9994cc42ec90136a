"""Helpers for packed words, bytes and records in private memory, against plain lists."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.native import (
    ascending,
    changed_tuple,
    leaf_find,
    leaf_insert,
    leaf_move,
    leaf_remove,
    lower_bound,
    put_bytes,
    put_slots,
    range_of,
    sum_bytes,
    word_at,
)

WORDS = st.lists(st.integers(0, 2**64 - 1), max_size=40)


@given(WORDS.map(sorted), st.integers(0, 2**64 - 1), st.binary(max_size=20))
def test_lower_bound(words: list[int], value: int, behind: bytes) -> None:
    raw = array("Q", words).tobytes() + behind
    for sought in {value, *words}:
        assert lower_bound(raw, len(words), sought) == bisect_left(words, sought)
        assert range_of(raw, len(words), sought) == max(bisect_right(words, sought) - 1, 0)


@given(WORDS | WORDS.map(sorted))
def test_ascending(words: list[int]) -> None:
    assert ascending(array("Q", words), len(words)) == (words == sorted(set(words)))


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 400))
def test_sum_bytes(raw: bytes, start: int, stop: int) -> None:
    assert sum_bytes(raw, start, stop) == sum(raw[start:stop])


@pytest.mark.parametrize("count", [3, 2**64 - 1, 2**61, -1])
def test_more_words_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"more than|out of range"):
        lower_bound(bytes(23), count, 0)
    with pytest.raises(ValueError, match=r"more than|out of range"):
        ascending(bytes(23), count)


SLOT = st.one_of(st.just(bytes(16)), st.binary(min_size=16, max_size=16))
SLOTS = st.lists(SLOT, max_size=12).map(b"".join)
CHANGES = st.lists(st.tuples(st.integers(0, 20), SLOTS), max_size=5)


@given(st.binary(max_size=40), SLOTS, CHANGES)
def test_put_slots(before: bytes, slots: bytes, changes: list[tuple[int, bytes]]) -> None:
    wanted = bytearray(slots)
    for index, run in changes:
        wanted += bytes(max(0, index * 16 + len(run) - len(wanted)))
        wanted[index * 16 : index * 16 + len(run)] = run
    while wanted.endswith(bytes(16)) and wanted:
        del wanted[-16:]
    assert put_slots(before + slots, len(before), changes) == bytes(wanted)


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        (1, []),  # half a slot is left
        (17, []),  # behind the end
        (2**64 - 1, []),
        (0, [(0, bytes(8))]),
        (0, [(-1, bytes(16))]),
        (0, [(2**64, bytes(16))]),
        (0, [(1 << 21, bytes(16))]),
    ],
)
def test_slots_that_cannot_be(start: int, changes: list[tuple[int, bytes]]) -> None:
    with pytest.raises(ValueError, match=r"slot|out of range"):
        put_slots(bytes(16), start, changes)


@pytest.mark.parametrize("changes", [None, (), [None], [(1,)], [(1, bytearray(16))], [(1, 2, 3)]])
def test_changes_of_a_wrong_type(changes: Any) -> None:
    with pytest.raises(TypeError):
        put_slots(bytes(16), 0, changes)


class Rows:
    """A leaf as rows (key, value, name); packs itself into columns."""

    def __init__(self, rows: list[tuple[int, int, bytes]]) -> None:
        self.rows = sorted(rows, key=lambda row: row[0])

    def packed(self) -> bytes:
        keys = array("Q", [key for key, _, _ in self.rows]).tobytes()
        values = array("Q", [value for _, value, _ in self.rows]).tobytes()
        names = [name for _, _, name in self.rows]
        return keys + values + bytes(map(len, names)) + b"".join(names)


SPAN = 3


def lowest_free(rows: list[tuple[int, int, bytes]], key: int, span: int) -> int | None:
    """The lowest of `span` keys from `key` on that no row has."""
    known = {row[0] for row in rows}
    return next((at for at in range(key, min(key + span, 1 << 64)) if at not in known), None)


@given(st.binary(max_size=40), st.integers(0, 50), st.binary(max_size=20))
def test_words_and_parts_of_bytes(raw: bytes, at: int, part: bytes) -> None:
    if 8 * at + 8 <= len(raw):
        assert word_at(raw, at) == int.from_bytes(raw[8 * at : 8 * at + 8], "little")
    else:
        with pytest.raises(ValueError, match="no word"):
            word_at(raw, at)
    if at + len(part) <= len(raw):
        assert put_bytes(raw, at, part) == raw[:at] + part + raw[at + len(part) :]
    else:
        with pytest.raises(ValueError, match="do not fit"):
            put_bytes(raw, at, part)
    with pytest.raises(TypeError, match="bytes are wanted"):
        put_bytes(raw, at, bytearray(part))  # type: ignore[arg-type]
    for wrong in (-1, 1 << 64):
        with pytest.raises(ValueError, match="out of range"):
            put_bytes(raw, wrong, part)
        with pytest.raises(ValueError, match="out of range"):
            word_at(raw, wrong)


NAME = st.binary(min_size=1, max_size=255)
WORD = st.integers(0, 2**64 - 1)
ROWS = st.lists(
    st.tuples(st.integers(0, 300) | WORD, WORD, NAME), max_size=20, unique_by=lambda row: row[0]
).map(Rows)


@given(ROWS, st.integers(0, 300) | WORD, WORD, NAME)
def test_an_entry_more(leaf: Rows, key: int, value: int, name: bytes) -> None:
    free = lowest_free(leaf.rows, key, SPAN)
    more = Rows([*leaf.rows, (free, value, name)]).packed() if free is not None else None
    assert leaf_insert(leaf.packed(), len(leaf.rows), key, SPAN, value, name) == more


@given(ROWS, st.integers(0, 300) | WORD, WORD, NAME)
def test_another_entry(leaf: Rows, key: int, value: int, name: bytes) -> None:
    for at in range(len(leaf.rows)):
        rest = leaf.rows[:at] + leaf.rows[at + 1 :]
        free = lowest_free(rest, key, SPAN)
        other = Rows([*rest, (free, value, name)]).packed() if free is not None else None
        assert leaf_move(leaf.packed(), len(leaf.rows), at, key, SPAN, value, name) == other


@given(ROWS)
def test_an_entry_less(leaf: Rows) -> None:
    for at in range(len(leaf.rows)):
        less = Rows(leaf.rows[:at] + leaf.rows[at + 1 :])
        assert leaf_remove(leaf.packed(), len(leaf.rows), at) == less.packed()


@given(ROWS, st.integers(0, 300) | WORD, st.integers(0, 300), NAME)
def test_finding_an_entry(leaf: Rows, key: int, span: int, name: bytes) -> None:
    for sought in {name, *(row[2] for row in leaf.rows)}:
        found = [
            at
            for at, (known, _, called) in enumerate(leaf.rows)
            if called == sought and key <= known < key + span
        ]
        at = leaf_find(leaf.packed(), len(leaf.rows), key, span, sought)
        assert at == (found[0] if found else -1)


@given(st.binary(max_size=200), st.integers(0, 12), st.integers(0, 2**64 - 1), NAME)
def test_a_leaf_of_anything_is_survived(raw: bytes, count: int, key: int, name: bytes) -> None:
    if 17 * count > len(raw):
        with pytest.raises(ValueError, match="more than"):
            leaf_find(raw, count, key, 256, name)
        with pytest.raises(ValueError, match="more than"):
            leaf_insert(raw, count, key, 256, 1, name)
        with pytest.raises(ValueError, match="more than"):
            leaf_move(raw, count, 0, key, 256, 1, name)
        return
    assert -1 <= leaf_find(raw, count, key, 256, name) < count
    more = leaf_insert(raw, count, key, 256, 1, name)
    assert more is None or len(more) == len(raw) + 17 + len(name)
    for at in range(count):
        less = leaf_remove(raw, count, at)
        assert len(less) <= len(raw) - 17
        other = leaf_move(raw, count, at, key, 256, 1, name)
        assert other is None or len(other) == len(less) + 17 + len(name)


def test_entries_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        leaf_insert(b"", 0, 1, 256, 1, b"")
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        leaf_insert(b"", 0, 1, 256, 1, bytes(256))
    with pytest.raises(ValueError, match="no entry"):
        leaf_remove(bytes(17), 1, 1)
    with pytest.raises(ValueError, match="no entry"):
        leaf_move(bytes(17), 1, 1, 1, 256, 1, b"x")
    with pytest.raises(ValueError, match="out of range"):
        leaf_insert(b"", 0, 1, -1, 1, b"x")
    with pytest.raises(ValueError, match="out of range"):
        leaf_find(bytes(17), 1, -1, 1, b"x")


class Pair(NamedTuple):
    one: object
    two: object


PLACES = {"one": 0, "two": 1, "three": 2}


def test_a_changed_tuple() -> None:
    before = Pair([1], "x")
    after = changed_tuple(before, PLACES, {"two": 5})
    assert (before, after, type(after)) == (Pair([1], "x"), Pair([1], 5), Pair)
    assert after.one is before.one
    assert changed_tuple(before, PLACES, {}) == before
    assert changed_tuple((1, 2, 3), PLACES, {"one": 3, "three": 1}) == (3, 2, 1)


def test_a_tuple_that_cannot_be_changed_so() -> None:
    with pytest.raises(KeyError, match="four"):
        changed_tuple(Pair(1, 2), PLACES, {"four": 4})
    with pytest.raises(IndexError):
        changed_tuple(Pair(1, 2), PLACES, {"three": 3})
    with pytest.raises(IndexError):
        changed_tuple(Pair(1, 2), {"one": -1}, {"one": 3})
    with pytest.raises(TypeError):
        changed_tuple(Pair(1, 2), {"one": "0"}, {"one": 3})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        changed_tuple([1], PLACES, {})  # type: ignore[type-var]


def test_changing_tuples_loses_and_keeps_no_references() -> None:
    item, other = object(), object()
    counts = sys.getrefcount(item), sys.getrefcount(other)
    for _ in range(100):
        changed_tuple(Pair(item, item), PLACES, {"two": other})
        with pytest.raises(KeyError):
            changed_tuple(Pair(item, other), PLACES, {"two": item, "none": other})
    assert (sys.getrefcount(item), sys.getrefcount(other)) == counts
