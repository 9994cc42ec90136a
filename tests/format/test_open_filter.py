"""The open filter: where an inode is listed, and which incarnation a word speaks of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.format import inode, open_filter, peer
from ivshmemfs.format.words import INCARNATION_MASK, WORD

GOLDEN = {1: 500, 2: 1001, 3: 1501, 1000: 1455, inode.MAX_INO: 523}
INODES = st.integers(1, inode.MAX_INO)
INCARNATIONS = st.integers(0, INCARNATION_MASK)


def test_golden_indices() -> None:
    """These numbers are part of the format: peers of another build must set the same bits."""
    found = {ino: open_filter.index_of(ino) for ino in (1, 2, 3, 1000, inode.MAX_INO)}
    assert found == GOLDEN


def test_the_words_end_where_the_statistics_begin() -> None:
    assert peer.FILTER_OFFSET + open_filter.WORDS * WORD == peer.STATISTICS_OFFSET
    assert open_filter.SIZE == 1536


@given(INODES)
def test_the_kernel_computes_what_the_document_says(ino: int) -> None:
    index = (ino * open_filter.FACTOR >> open_filter.SHIFT) % open_filter.SIZE
    assert open_filter.index_of(ino) == index


@given(INODES)
def test_an_index_has_one_bit(ino: int) -> None:
    index = open_filter.index_of(ino)
    word, mask = open_filter.split_index(index)
    assert 0 <= word < open_filter.WORDS
    assert mask & open_filter.MASK == mask
    assert word * open_filter.BITS + mask.bit_length() - 1 == index


@given(st.integers(0, (1 << 64) - 1), INCARNATIONS, INCARNATIONS)
def test_a_word_has_one_stamp(word: int, mine: int, other: int) -> None:
    stamped = open_filter.stamped(word, mine)
    assert 0 <= stamped < 1 << 64
    assert stamped & open_filter.MASK == word & open_filter.MASK
    assert open_filter.has_stamp(stamped, mine)
    assert open_filter.has_stamp(stamped, other) == ((mine ^ other) & 0xFFFF == 0)
