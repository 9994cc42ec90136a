"""The 64-bit words that change in place, and the parts of the pointer.

    tag          slot 8 | incarnation 20 | counter 36      the peer and transaction of a claim
    commit word  sequence 36 | root block 28               the one word that publishes a transaction
                                                           (root block 2^28 - 1: under repair)
    state word   state 8 | incarnation 20 | counter 36     the state of a peer slot
    hint word    slot 8 | need 8 | progress 48             the peer about to commit (advice only)

`open_filter` declares the filter word.

A tag never comes back to the same block.  The counter grows with each transaction of an
incarnation, and the incarnation grows with each mount that uses a slot.

    counter      wraps after 2^36 transactions (8 days at 100,000/s); then the peer rejoins with a
                 new incarnation
    incarnation  wraps after 2^20 mounts of one slot
    sequence     wraps after 2^36 - 1 commits.  A stale compare-and-swap succeeds only if the peer
                 slept for exactly that many, and the root is in the same block again
"""

from typing import Final

from ivshmemfs.format.pointer import NULL as NULL
from ivshmemfs.format.pointer import POINTER as POINTER
from ivshmemfs.format.pointer import POINTER_LAYOUT as POINTER_LAYOUT
from ivshmemfs.format.pointer import POINTER_SIZE as POINTER_SIZE
from ivshmemfs.format.pointer import TAG_AT as TAG_AT
from ivshmemfs.format.pointer import WEIGHT_AT as WEIGHT_AT
from ivshmemfs.format.pointer import PointerRecord as PointerRecord

WORD: Final = 8

SLOT_SHIFT: Final = 56
INCARNATION_SHIFT: Final = 36
INCARNATION_MASK: Final = (1 << 20) - 1
COUNTER_MASK: Final = (1 << 36) - 1

BLOCK_BITS: Final = 28
BLOCK_MASK: Final = (1 << BLOCK_BITS) - 1
SEQUENCE_MASK: Final = (1 << 36) - 1
#: In place of the root block during a repair; no region has that many blocks.
UNDER_REPAIR: Final = BLOCK_MASK
MAX_BLOCKS: Final = BLOCK_MASK

NEED_SHIFT: Final = 48
NEED_MASK: Final = (1 << 8) - 1
PROGRESS_MASK: Final = (1 << NEED_SHIFT) - 1

# States of a peer slot, in the usual order.  shm/peers.py says which peer may make which change.
FREE: Final = 0
JOINING: Final = 1
IDLE: Final = 2
ACTIVE: Final = 3
DEAD: Final = 4
STATE_NAMES = ("free", "joining", "idle", "active", "dead")


def make_tag(slot: int, incarnation: int, counter: int) -> int:
    """Return the tag of a claim; `slot` or `counter` is not 0, so the tag is not 0."""
    return slot << SLOT_SHIFT | incarnation << INCARNATION_SHIFT | counter


def split_tag(tag: int) -> tuple[int, int, int]:
    """Return (slot, incarnation, counter)."""
    return (
        tag >> SLOT_SHIFT,
        tag >> INCARNATION_SHIFT & INCARNATION_MASK,
        tag & COUNTER_MASK,
    )


def block_of(pointer: bytes) -> int:
    """Return the block number of a packed pointer."""
    return int.from_bytes(pointer[:WEIGHT_AT], "little")


def make_commit(sequence: int, block: int) -> int:
    """Return the commit word that publishes root `block` as commit number `sequence`."""
    return (sequence & SEQUENCE_MASK) << BLOCK_BITS | block


def next_sequence(sequence: int) -> int:
    """Return the number of the next commit.

    It skips numbers whose low 36 bits are 0.  With block 0 such a commit word would be 0, which
    means "being formatted".
    """
    after = sequence + 1
    return after if after & SEQUENCE_MASK else after + 1


def split_commit(word: int) -> tuple[int, int]:
    """Return (sequence, root block)."""
    return word >> BLOCK_BITS, word & BLOCK_MASK


def under_repair(word: int) -> bool:
    """Return whether a commit word says that the region is being repaired."""
    return word & BLOCK_MASK == UNDER_REPAIR


def make_state(state: int, incarnation: int, counter: int) -> int:
    """Return a peer slot's state word."""
    return state << SLOT_SHIFT | incarnation << INCARNATION_SHIFT | counter


def split_state(word: int) -> tuple[int, int, int]:
    """Return (state, incarnation, counter); the parts are those of a tag."""
    return split_tag(word)


def make_hint(slot: int, need: int, progress: int) -> int:
    """Return the hint word of a writer that needs about `need` ms.

    Any change of the word counts as progress.
    """
    return slot << SLOT_SHIFT | min(need, NEED_MASK) << NEED_SHIFT | progress & PROGRESS_MASK


def hint_need(word: int) -> int:
    """Return the ms that the writer of a hint word expects to need."""
    return word >> NEED_SHIFT & NEED_MASK
