"""Helpers for packed words and bytes in private memory, against plain lists."""

from __future__ import annotations

from array import array
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.region._memory import ascending, lower_bound, sum_bytes

WORDS = st.lists(st.integers(0, 2**64 - 1), max_size=40)


@given(WORDS.map(sorted), st.integers(0, 2**64 - 1), st.binary(max_size=20))
def test_lower_bound(words: list[int], value: int, behind: bytes) -> None:
    raw = array("Q", words).tobytes() + behind
    for sought in {value, *words}:
        assert lower_bound(raw, len(words), sought) == bisect_left(words, sought)


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
