"""The 64-bit words that change in place, and the pointer: how their bits are divided.

    tag          slot 8 | incarnation 20 | counter 36      who claimed a block, in which transaction
    commit word  sequence 36 | root block 28               the one word that publishes a transaction
                                                           (root block 2^28 - 1: under repair)
    state word   state 8 | incarnation 20 | counter 36     what a peer slot is doing
    hint word    slot 8 | need 8 | progress 48             who is about to commit (advice only)

A tag never comes back to the same block: the counter grows with each transaction of an
incarnation and the incarnation with each mount that uses a slot.  Counters wrap after 2^36
transactions (8 days at 100,000/s; the peer then rejoins with a new incarnation), incarnations
after 2^20 mounts of one slot, the commit word after 2^36 - 1 commits (a peer would have to sleep
for exactly that many, and the root would have to stand in the same block, for its stale
compare-and-swap to succeed).
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
#: In place of the root block while a repair shuts everybody else out; no region has that many.
UNDER_REPAIR: Final = BLOCK_MASK
MAX_BLOCKS: Final = BLOCK_MASK

NEED_SHIFT: Final = 48
NEED_MASK: Final = (1 << 8) - 1
PROGRESS_MASK: Final = (1 << NEED_SHIFT) - 1

# States of a peer slot, in the order in which they follow each other (shm/peers.py says who may
# change which).
FREE: Final = 0
JOINING: Final = 1
IDLE: Final = 2
ACTIVE: Final = 3
DEAD: Final = 4
STATE_NAMES = ("free", "joining", "idle", "active", "dead")


def make_tag(slot: int, incarnation: int, counter: int) -> int:
    """The tag of a claim; `slot` counts from 1, so that a tag is never 0."""
    return slot << SLOT_SHIFT | incarnation << INCARNATION_SHIFT | counter


def split_tag(tag: int) -> tuple[int, int, int]:
    """(slot, incarnation, counter)"""
    return (
        tag >> SLOT_SHIFT,
        tag >> INCARNATION_SHIFT & INCARNATION_MASK,
        tag & COUNTER_MASK,
    )


def block_of(pointer: bytes) -> int:
    """Return the block number of a packed pointer."""
    return int.from_bytes(pointer[:WEIGHT_AT], "little")


def weight_of(pointer: bytes) -> int:
    """Return the number of blocks in the subtree that a packed pointer leads to."""
    return int.from_bytes(pointer[WEIGHT_AT:TAG_AT], "little")


def with_weight(pointer: bytes, weight: int) -> bytes:
    """Return a packed pointer to the same block, with another weight."""
    return pointer[:WEIGHT_AT] + weight.to_bytes(TAG_AT - WEIGHT_AT, "little") + pointer[TAG_AT:]


def make_commit(sequence: int, block: int) -> int:
    """The commit word that publishes root `block` as the `sequence`-th commit."""
    return (sequence & SEQUENCE_MASK) << BLOCK_BITS | block


def next_sequence(sequence: int) -> int:
    """The number of the next commit.

    Those whose low 36 bits are 0 are left out: the commit word of block 0 would be 0, which says
    that there is no filesystem.
    """
    after = sequence + 1
    return after if after & SEQUENCE_MASK else after + 1


def split_commit(word: int) -> tuple[int, int]:
    """(sequence, root block)"""
    return word >> BLOCK_BITS, word & BLOCK_MASK


def under_repair(word: int) -> bool:
    """Whether a commit word says that the region is being repaired."""
    return word & BLOCK_MASK == UNDER_REPAIR


def make_state(state: int, incarnation: int, counter: int) -> int:
    """A peer slot's state word."""
    return state << SLOT_SHIFT | incarnation << INCARNATION_SHIFT | counter


def split_state(word: int) -> tuple[int, int, int]:
    """(state, incarnation, counter); the same division as a tag's."""
    return split_tag(word)


def make_hint(slot: int, need: int, progress: int) -> int:
    """The hint word of a writer that needs about `need` ms; any change of it counts as progress."""
    return slot << SLOT_SHIFT | min(need, NEED_MASK) << NEED_SHIFT | progress & PROGRESS_MASK


def hint_need(word: int) -> int:
    """How many ms the writer of a hint word expects to take."""
    return word >> NEED_SHIFT & NEED_MASK
