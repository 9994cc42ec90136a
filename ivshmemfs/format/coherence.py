"""The words of a slot by which two peers check that they see the same memory.

They are in the slot's first cache line, behind the nonce.  Peers of earlier versions leave
them alone, so the layout signature leaves them out.  `CHECKS` in the capabilities tells that a peer
answers.  `shm/coherence.py` says when each word is stored.
"""

from typing import Annotated, Final, NamedTuple

from ivshmemfs.format.record import At, Buffer, Layout
from ivshmemfs.format.words import WORD

COHERENCE_OFFSET: Final = 32  # in the slot
CHALLENGE_OFFSET: Final = COHERENCE_OFFSET
TALLY_OFFSET: Final = COHERENCE_OFFSET + 8
VERDICT_OFFSET: Final = COHERENCE_OFFSET + 16

CHECKS: Final = 2  # bit of a slot's capabilities: its owner answers challenges

UNKNOWN, AGREES, DIFFERS = 0, 1, 2
VERDICT_NAMES: Final = ("unknown", "agrees", "differs")

_TARGET_SHIFT: Final = 56
_ROUND_BITS: Final = 32
COUNT_BITS: Final = 32
COUNT_MASK: Final = (1 << COUNT_BITS) - 1


class CoherenceRecord(NamedTuple):
    """The words of one slot at byte 32."""

    challenge: Annotated[int, At(0, "Q", "slot, incarnation, round that the owner asks, or 0")]
    tally: Annotated[int, At(8, "Q", "round, and a count by both peers' compare-and-swaps")]
    verdict: Annotated[int, At(16, "Q", "0 unknown, 1 agrees, 2 differs; bits 8 to 15: with slot")]


COHERENCE = Layout(CoherenceRecord, 24)


def make_challenge(slot: int, incarnation: int, round_: int) -> int:
    """Return the challenge of a peer; `round_` is random, 32 bits."""
    return slot << _TARGET_SHIFT | incarnation << _ROUND_BITS | round_


def is_for(challenge: int, slot: int, incarnation: int) -> bool:
    """Return whether a challenge asks this incarnation of a slot."""
    return challenge >> _ROUND_BITS == make_challenge(slot, incarnation, 0) >> _ROUND_BITS


def make_tally(challenge: int, count: int) -> int:
    """Return the tally of a challenge's round with a count."""
    return (challenge & ((1 << _ROUND_BITS) - 1)) << COUNT_BITS | count


def make_verdict(verdict: int, slot: int = 0) -> int:
    """Return the verdict word; `slot` is the peer that it is about, if it is DIFFERS."""
    return verdict | slot << 8


def describe(raw: Buffer) -> str:
    """Return the verdict in a slot's bytes in words."""
    at = VERDICT_OFFSET
    name, slot = split_verdict(int.from_bytes(raw[at : at + WORD], "little"))
    return f"{name} from slot {slot}" if name == VERDICT_NAMES[DIFFERS] else name


def split_verdict(word: int) -> tuple[str, int]:
    """Return (name, slot) of a verdict word, which may hold anything."""
    verdict = word & 0xFF
    return VERDICT_NAMES[verdict if verdict < len(VERDICT_NAMES) else UNKNOWN], word >> 8 & 0xFF
