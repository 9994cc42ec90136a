"""The open filter of a peer slot: which inodes the slot's owner may hold open.

The filter is `WORDS` words of 64 bits.  Each word has two parts:

    stamp 16 | bits 48     low 16 bits of the owner's incarnation, then the filter bits

An inode number sets one of the `SIZE` filter bits: bit (ino * FACTOR >> SHIFT) mod SIZE, computed
without overflow.  Bit `index` is bit index mod BITS of word index div BITS.  Several inodes share
a bit, so a set bit means "may be open".  A word with another stamp lists nothing.

This module is compiled: the engine computes an index for each file that it opens.
"""

from typing import Final

from ivshmemfs.native import filter_index

WORDS: Final = 32
BITS: Final = 48  # filter bits of one word
SIZE: Final = WORDS * BITS
MASK: Final = (1 << BITS) - 1
STAMP_MASK: Final = 0xFFFF
FACTOR: Final = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads consecutive inode numbers
SHIFT: Final = 20


#: index_of(ino) is the index, from 0 to SIZE - 1, of the filter bit of inode `ino`.
index_of: Final = filter_index


def split_index(index: int) -> tuple[int, int]:
    """Return (word, mask of the bit in that word) of a filter index."""
    return index // BITS, 1 << index % BITS


def stamped(word: int, incarnation: int) -> int:
    """Return a filter word with the filter bits of `word` and the stamp of `incarnation`."""
    return (incarnation & STAMP_MASK) << BITS | word & MASK


def has_stamp(word: int, incarnation: int) -> bool:
    """Return whether a filter word carries the stamp of `incarnation`."""
    return word >> BITS == incarnation & STAMP_MASK
