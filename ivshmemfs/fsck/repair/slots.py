"""Plans the peer slots after a repair, and so which tags blocks can keep.

Every slot becomes free, except those of living peers.  A tag must be of the past: its (slot,
incarnation, counter) must not come again.  So a slot may have to move on by some incarnations,
past the tags that the repair keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ivshmemfs.format import repair, words
from ivshmemfs.fsck.invariants import FUTURE


class SlotPlan:
    """The state words that the slots get, and what they make of tags."""

    def __init__(
        self, states: tuple[int, ...], kept_tags: Iterable[int], living: frozenset[int]
    ) -> None:
        self._old = states
        self.living = living | {repair.SLOT}  # slots that keep their state
        self._past: set[int] = set()  # (slot, incarnation) whose tags blocks can keep
        self._reached: dict[int, int] = {}  # the same of living peers -> the last counter
        self.states = self._plan(Counter(tag >> words.INCARNATION_SHIFT for tag in kept_tags))
        self.in_flight = frozenset(  # tags that living peers neither published nor released
            words.make_tag(slot, *words.split_state(states[slot])[1:])
            for slot in self.living
            if slot and states[slot] >> words.SLOT_SHIFT == words.ACTIVE
        )

    def impossible(self, tag: int) -> bool:
        """Return whether a tag is of no slot of this region, or not of the past."""
        both = tag >> words.INCARNATION_SHIFT
        reached = self._reached.get(both, words.COUNTER_MASK)
        return both not in self._past or tag & words.COUNTER_MASK > reached

    def _plan(self, kept: Counter[int]) -> list[int]:
        states = [
            state if slot in self.living else _free_after(words.split_state(state)[1])
            for slot, state in enumerate(self._old)
        ]
        for slot in self.living:
            _, incarnation, counter = words.split_state(states[slot])
            self._reached[slot << 20 | incarnation] = counter
        past: dict[int, set[int]] = {}
        for both, _ in kept.most_common():  # the incarnation of most blocks is right most likely
            slot, incarnation = both >> 20, both & words.INCARNATION_MASK
            if slot >= len(states):
                continue
            now = words.split_state(states[slot])[1]
            if slot in self.living:
                if not 0 < incarnations_ahead(incarnation, now) < FUTURE:
                    self._past.add(both)
                continue
            after = (incarnation + 1) & words.INCARNATION_MASK
            before = past.setdefault(slot, set())
            if incarnations_ahead(incarnation, now) < FUTURE:
                if any(0 < incarnations_ahead(other, after) < FUTURE for other in before):
                    continue
                states[slot] = _free_after(incarnation)
            before.add(incarnation)
            self._past.add(both)
        return states


def _free_after(incarnation: int) -> int:
    return words.make_state(words.FREE, (incarnation + 1) & words.INCARNATION_MASK, 0)


def incarnations_ahead(incarnation: int, now: int) -> int:
    """Return how many incarnations after `now` another one comes, modulo 2^20."""
    return (incarnation - now) & words.INCARNATION_MASK
