"""The words: their parts never reach into each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.format import words

SLOTS = st.integers(1, 255)
INCARNATIONS = st.integers(0, words.INCARNATION_MASK)
COUNTERS = st.integers(0, words.COUNTER_MASK)


@given(SLOTS, INCARNATIONS, COUNTERS)
def test_tag(slot: int, incarnation: int, counter: int) -> None:
    tag = words.make_tag(slot, incarnation, counter)
    assert 0 < tag < 1 << 64
    assert words.split_tag(tag) == (slot, incarnation, counter)


@given(st.integers(0, 255), INCARNATIONS, COUNTERS)
def test_state(state: int, incarnation: int, counter: int) -> None:
    word = words.make_state(state, incarnation, counter)
    assert words.split_state(word) == (state, incarnation, counter)


@given(st.integers(0, 1 << 40), st.integers(0, words.MAX_BLOCKS - 1))
def test_commit(sequence: int, block: int) -> None:
    word = words.make_commit(sequence, block)
    assert 0 <= word < 1 << 64
    assert words.split_commit(word) == (sequence & words.SEQUENCE_MASK, block)


@given(SLOTS, st.integers(0, 1 << 12), st.integers(0, 1 << 60))
def test_hint(slot: int, need: int, progress: int) -> None:
    word = words.make_hint(slot, need, progress)
    assert word >> 56 == slot
    assert words.hint_need(word) == min(need, 255)
    assert word & words.PROGRESS_MASK == progress & words.PROGRESS_MASK


def test_golden_words() -> None:
    assert words.make_tag(1, 2, 3) == 0x0100_0020_0000_0003
    assert words.make_commit(1, 2) == 0x0000_0000_1000_0002
    assert words.make_state(words.ACTIVE, 2, 3) == 0x0300_0020_0000_0003
    assert words.make_hint(5, 6, 7) == 0x0506_0000_0000_0007
    assert words.STATE_NAMES[words.DEAD] == "dead"
