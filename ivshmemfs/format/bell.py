"""The bell words: which doorbells the next commit rings.

They follow the commit word in its cache line, so a commit looks at them at no cost.  Each word has
four lanes of 16 bits.  A lane is 0, or the number of a doorbell plus 1.  A doorbell's number is the
id that its server gave the device or process (docs of QEMU: ivshmem-spec).

Peers of earlier versions leave these words alone, so the layout signature leaves them out.  `RINGS`
in the capabilities tells that a peer rings.  `shm/bells.py` says when a word is stored.
"""

from collections.abc import Iterator
from typing import Final

from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.format.words import WORD

BELL_WORDS: Final = 4
BELLS_OFFSET: Final = COMMIT_OFFSET + WORD
#: Byte offsets in the region.  A word counts only if all words before it are full.
BELL_OFFSETS: Final = tuple(BELLS_OFFSET + WORD * place for place in range(BELL_WORDS))

RINGS: Final = 4  # bit of a slot's capabilities: its owner rings after each commit

LANE_BITS: Final = 16
LANES: Final = 4
LANE_MASK: Final = (1 << LANE_BITS) - 1
LARGEST_NUMBER: Final = LANE_MASK - 1


def numbers(word: int) -> Iterator[int]:
    """Yield the numbers in a bell word, which may hold anything: at most `LANES`."""
    for lane in range(LANES):
        if found := word >> lane * LANE_BITS & LANE_MASK:
            yield found - 1


def added(word: int, number: int) -> int | None:
    """Return a bell word with one more number, the same word if it has it, None if it is full."""
    free = None
    for lane in range(LANES):
        found = word >> lane * LANE_BITS & LANE_MASK
        if found == number + 1:
            return word
        if not found and free is None:
            free = lane
    return None if free is None else word | (number + 1) << free * LANE_BITS


def is_full(word: int) -> bool:
    """Return whether no lane of a bell word is free."""
    return sum(1 for _ in numbers(word)) == LANES
