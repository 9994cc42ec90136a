"""Packed nodes, pointers, slots and records in private memory, beside plain Python."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.format import node
from ivshmemfs.format.inode import INODE
from ivshmemfs.native import (
    packed_node,
    packed_tuple,
    picked_tuple,
    placed_tuple,
    record_node,
    split_pointers,
    swap_slots,
    swapped_node,
    weight_of,
    with_weight,
)

TAG = 0x0102030405060708
SIZE = 16
NULL = bytes(SIZE)


def pointer(block: int, weight: int = 1) -> bytes:
    """A packed pointer of the tag TAG."""
    return struct.pack("<IIQ", block, weight, TAG)


@pytest.mark.parametrize("parts", [(b"",), (b"abc",), (b"a", b"bc", b"d" * 4000)])
def test_a_packed_node_is_sealed(parts: tuple[bytes, ...]) -> None:
    header = node.HeaderRecord(0, node.DIRLEAF, 3, 700, 0, 1 << 55, TAG)
    made = packed_node(pointer(9), node.DIRLEAF, 3, 1 << 55, 700, *parts)
    assert made == node.seal(header, b"".join(parts))


@pytest.mark.parametrize(
    "arguments",
    [
        (pointer(1)[:15], 2, 0, 0, 0, b""),
        (bytearray(pointer(1)), 2, 0, 0, 0, b""),
        (pointer(1), 256, 0, 0, 0, b""),
        (pointer(1), 2, -1, 0, 0, b""),
        (pointer(1), 2, 0, 1 << 64, 0, b""),
        (pointer(1), 2, 0, 0, 1 << 16, b""),
        (pointer(1), 2, 0, 0, 0, bytearray()),
    ],
)
def test_a_node_that_does_not_fit_its_header_is_refused(arguments: tuple[object, ...]) -> None:
    with pytest.raises((ValueError, TypeError)):
        packed_node(*arguments)  # type: ignore[arg-type]


def test_pointers_are_split_and_weighed() -> None:
    pointers = [pointer(1, 5), NULL, pointer(3, 2)]
    assert split_pointers(b"".join(pointers)) == pointers
    assert split_pointers(b"") == []
    assert weight_of(b"".join(pointers)) == 7
    assert with_weight(pointer(4), 6) == pointer(4, 6)
    for wrong in (-1, 1 << 32):
        with pytest.raises(ValueError, match="weight"):
            with_weight(pointer(4), wrong)
    for function in (split_pointers, weight_of):
        with pytest.raises(ValueError, match="half a pointer"):
            function(bytes(SIZE + 1))


SLOTS = st.lists(st.booleans(), max_size=6)


@given(had=SLOTS, changes=st.lists(st.tuples(st.integers(0, 8), SLOTS), max_size=3))
def test_swapped_slots_are_those_of_a_list(
    had: list[bool], changes: list[tuple[int, list[bool]]]
) -> None:
    """Runs that do not overlap; True is a pointer to one block."""
    runs, last = [], 0
    for first, new in sorted(changes):
        if first >= last and new:
            runs.append((first, new))
            last = first + len(new)
    model = [pointer(100 + at) if full else NULL for at, full in enumerate(had)]
    expected, gone, gain, given_runs = list(model), [], 0, []
    for first, new in runs:
        packed = [pointer(200 + first + at) if full else NULL for at, full in enumerate(new)]
        given_runs.append((first, b"".join(packed)))
        expected += [NULL] * (first + len(new) - len(expected))
        expected[first : first + len(new)] = packed
        old = model[first : first + len(new)]
        lost = sum(slot != NULL for slot in old)
        gain += sum(new) - lost
        if lost:
            gone.append(b"".join(old))
    while expected and expected[-1] == NULL:
        expected.pop()
    raw = b"header" + b"".join(model)
    if runs:
        assert swap_slots(raw, 6, given_runs) == (b"".join(expected), gone, gain)
        before = packed_node(pointer(1), node.INDEX, 0, 5, 0, b"".join(model))
        after = packed_node(pointer(2), node.INDEX, 0, 5, 0, b"".join(expected))
        for base in (0, 254 << 40):
            there = [(base + at, slots) for at, slots in given_runs]
            part = [(0, b"?"), *there, (base, pointer(9))]
            place, made, left = swapped_node(
                pointer(2), node.INDEX, 5, pointer(1, 40), before, part, 1, len(part) - 1, base
            )
            assert (made, left) == (after, gone)
            assert place == pointer(2, 40 + gain if len(after) > node.HEADER_SIZE else 0)


def test_a_single_slot_counts_whatever_its_weight() -> None:
    """A damaged region may give a leaf any weight, also 0."""
    for weight in (0, 7):
        slots, gone, gain = swap_slots(pointer(1, weight), 0, [(0, NULL)])
        assert (slots, gone, gain) == (b"", [pointer(1, weight)], -1)


def test_the_weight_of_a_swapped_node_is_judged() -> None:
    """A damaged region may give a node any weight; that of a new node is 1."""
    before = packed_node(pointer(1), node.INDEX, 0, 5, 0, pointer(7) + pointer(8))
    for old, weight in ((NULL, 2), (pointer(1, 0), 2), (pointer(1, 3), 4)):
        runs = [(5, pointer(9))]
        place, _, _ = swapped_node(pointer(2), node.INDEX, 5, old, before, runs, 0, 1, 0)
        assert place == pointer(2, weight)
    for old, runs in ((pointer(1, (1 << 32) - 1), [(5, pointer(9))]), (NULL, [(0, 2 * NULL)])):
        runs.append((6, pointer(9)) if old != NULL else (1, NULL))
        with pytest.raises(ValueError, match="weight"):
            swapped_node(pointer(2), node.INDEX, 5, old, before + pointer(6), runs, 0, 2, 0)


@pytest.mark.parametrize(
    ("runs", "first", "base"),
    [([(4, NULL)], 0, 5), ([(5000, NULL)], 0, 0), ([(5, NULL)], -1, 0), ([(5, b"half")], 0, 0),
     ([(5, NULL)], 0, 1 << 64), (((5, NULL),), 0, 0), ([[5, NULL]], 0, 0), ([(-1, NULL)], 0, 0)],
)  # fmt: skip
def test_wrong_changes_of_a_node_are_refused(runs: Any, first: int, base: int) -> None:
    had = packed_node(pointer(1), node.INDEX, 0, 5, 0, pointer(7))
    with pytest.raises((ValueError, TypeError)):
        swapped_node(pointer(2), node.INDEX, 5, NULL, had, runs, first, 1, base)


def test_placed_values_keep_the_type_and_the_others() -> None:
    record = INODE.unpack(bytes(INODE.size))
    places = INODE.places("size", "mode")
    new = INODE.placed(record, places, (5, 0o644))
    assert new == record._replace(size=5, mode=0o644)
    assert type(new) is type(record)
    with pytest.raises(ValueError, match="as many"):
        placed_tuple(record, places, (1,))
    with pytest.raises(IndexError):
        placed_tuple(record, (99,), (1,))


def test_picked_items_come_from_two_tuples() -> None:
    model = Sample(0, 0, b"")
    picked = picked_tuple(model, (3, 0, 2), (1, 2), (b"x", 4))
    assert picked == (4, 1, b"x")
    assert type(picked) is Sample
    for places in ((4, 0, 0), (-1, 0, 0)):
        with pytest.raises(IndexError):
            picked_tuple(model, places, (1, 2), (b"x", 4))
    with pytest.raises(ValueError, match="as many"):
        picked_tuple(model, (0, 0), (1,), (2,))
    with pytest.raises(TypeError):
        picked_tuple(model, [0, 0, 0], (1,), (2,))  # type: ignore[arg-type]


class Sample(NamedTuple):
    """Fields of all kinds."""

    small: int
    signed: int
    raw: bytes


PLAN = struct.pack("<HHcxHHcxHHcx", 0, 1, b"u", 2, 2, b"s", 4, 3, b"b")


@pytest.mark.parametrize(("signed", "raw"), [(-1, b"abc"), (0x7FFF, b"a"), (-0x8000, b"abcde")])
def test_a_record_is_packed_as_struct_packs_it(signed: int, raw: bytes) -> None:
    assert packed_tuple(Sample(255, signed, raw), PLAN, 8) == struct.pack(
        "<Bxh3sx", 255, signed, raw
    )


@pytest.mark.parametrize("parts", [(), (b"abc",), (b"", b"bc"), (b"a", b"d" * 4000)])
def test_a_node_with_a_record_is_sealed(parts: tuple[bytes, ...]) -> None:
    values = Sample(255, -3, b"xyz")
    made = record_node(pointer(9), node.INODE, 1 << 55, values, PLAN, 8, *parts)
    body = packed_tuple(values, PLAN, 8) + b"".join(parts)
    assert made == packed_node(pointer(9), node.INODE, 0, 1 << 55, 0, body)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (struct.error, (pointer(9), 2, 0, (256, 0, b""), PLAN, 8)),
        (ValueError, (pointer(9), 2, 0, (0, 0, b""), PLAN, 6)),
        (ValueError, (pointer(9), 2, 0, (0, 0, b""), PLAN, -1)),
        (ValueError, (b"short", 2, 0, (0, 0, b""), PLAN, 8)),
        (TypeError, (pointer(9), 2, 0, [0, 0, b""], PLAN, 8)),
        (TypeError, (pointer(9), 2, 0, (0, 0, b""), PLAN, 8, bytearray())),
    ],
)
def test_a_record_that_fits_no_node_is_refused(error: type[Exception], arguments: Any) -> None:
    with pytest.raises(error):
        record_node(*arguments)


@pytest.mark.parametrize(
    "values", [(256, 0, b""), (-1, 0, b""), (0, 1 << 15, b""), (0, -(1 << 15) - 1, b""),
               (0, 0, 1), (b"", 0, b""), (0, 1 << 64, b""), (0, 0)]
)  # fmt: skip
def test_what_does_not_fit_a_field_is_refused(values: tuple[object, ...]) -> None:
    with pytest.raises(struct.error):
        packed_tuple(values, PLAN, 8)


def test_a_plan_does_not_lead_outside_of_its_record() -> None:
    with pytest.raises(ValueError, match="outside"):
        packed_tuple(Sample(0, 0, b""), PLAN, 6)
