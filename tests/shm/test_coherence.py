"""Peers that see the same memory find that out, and peers that do not refuse to write."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from ivshmemfs.errors import FsError
from ivshmemfs.format import coherence, peer
from ivshmemfs.shm.coherence import PATIENCE, Coherence
from tests.shm.conftest import Member

New = Callable[[], Member]


class Checked:
    """A peer with its checks; `tick` does what its upkeep does."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.membership = member.membership
        self.membership.join(wait=0.01)
        self.check = Coherence(member.table, self.membership)

    @property
    def slot(self) -> int:
        return self.membership.slot

    def tick(self, *, answers: bool = True) -> None:
        self.membership.beat()
        self.member.table.watch.look()
        if answers:
            self.check.turn()

    def verdict(self) -> tuple[str, int]:
        at = self.member.table.offset(self.slot, coherence.VERDICT_OFFSET)
        return coherence.split_verdict(self.member.memory.load(at))

    def tally(self) -> tuple[int, int]:
        """Offset and value."""
        at = self.member.table.offset(self.slot, coherence.TALLY_OFFSET)
        return at, self.member.memory.load(at)

    def writes(self) -> None:
        self.membership.begin()
        self.membership.end()

    def is_refused(self) -> bool:
        with pytest.raises(FsError) as refused:
            self.membership.begin()
        text = str(refused.value)
        assert refused.value.errno == errno.EROFS
        assert "do not see the same memory" in text
        assert "-o ro" in text
        return True


@pytest.fixture
def pair(new: New) -> list[Checked]:
    return [Checked(new()), Checked(new())]


def test_peers_on_one_memory_agree_within_seconds(pair: list[Checked]) -> None:
    for _ in range(6):
        for one in pair:
            one.tick()
    for one in pair:
        assert one.verdict() == ("agrees", 0)
        one.writes()


def test_three_peers_all_agree_and_then_ask_no_more(new: New) -> None:
    peers = [Checked(new()) for _ in range(3)]
    for _ in range(12):
        for one in peers:
            one.tick()
    assert [one.verdict() for one in peers] == [("agrees", 0)] * 3
    assert all(len(one.check._judged) == 2 for one in peers)
    before = [one.tally() for one in peers]
    for _ in range(3):
        for one in peers:
            one.tick()
    assert [one.tally() for one in peers] == before


def test_a_peer_that_never_sees_the_stores_of_another_makes_it_refuse_to_write(
    pair: list[Checked],
) -> None:
    """The second beats, and its view of the first one's slot is old: it answers nothing."""
    first, second = pair
    for _ in range(PATIENCE + 6):
        first.tick()
        second.tick(answers=False)
    assert first.verdict() == ("differs", second.slot)
    assert first.is_refused()


def test_a_lost_addition_makes_both_sides_unequal(pair: list[Checked]) -> None:
    """What the second added stays in its cache; the asker's own count wins in memory."""
    first, second = pair
    lost = False
    for _ in range(PATIENCE + 8):
        first.tick()
        at, before = first.tally()
        second.tick()
        now = first.tally()[1]
        if now != before:
            first.member.memory.store(at, before + (now - before) // 2)
            lost = True
    assert lost
    assert first.is_refused()
    assert first.verdict() == ("differs", second.slot)


def test_an_addition_that_is_overwritten_later_is_noticed(pair: list[Checked]) -> None:
    """The line of the first comes back from a cache after both have counted."""
    first, second = pair
    for _ in range(8):
        first.tick()
        second.tick()
        if first.check._counted:
            at, now = first.tally()
            first.member.memory.store(at, now - 1)
            first.tick()
            break
    assert first.is_refused()


def test_silent_older_and_leaving_peers_stay_unknown(pair: list[Checked], new: New) -> None:
    first, second = pair
    first.tick()
    second.tick()
    first.tick()
    for _ in range(3 * PATIENCE):  # the second is stopped
        first.tick()
    first.writes()
    assert first.verdict() == ("unknown", 0)
    second.membership.leave()
    older = new()
    older.membership.join(wait=0.01)
    record = older.membership._record
    assert record is not None
    older.membership._identify(record._replace(capabilities=0))
    for _ in range(3 * PATIENCE):
        older.membership.beat()
        first.tick()
    first.writes()
    assert first.verdict() == ("unknown", 0)


def test_a_peer_that_wakes_up_late_answers(pair: list[Checked]) -> None:
    first, second = pair
    for _ in range(3):
        first.tick()
        second.tick(answers=first.check._asked is None)
    assert first.check._asked is not None
    for _ in range(50):
        first.tick()
    for _ in range(6):
        second.tick()
        first.tick()
    assert first.verdict() == ("agrees", 0)


def test_a_new_incarnation_is_asked_anew(pair: list[Checked]) -> None:
    first, second = pair
    for _ in range(6):
        for one in pair:
            one.tick()
    before = first.tally()[1]
    second.membership.leave()
    second.membership.join(wait=0.01)
    for _ in range(6):
        for one in pair:
            one.tick()
    assert first.tally()[1] != before
    assert first.verdict() == second.verdict() == ("agrees", 0)


def test_hostile_words_cost_little_and_are_harmless(pair: list[Checked]) -> None:
    first, second = pair
    memory, table = first.member.memory, first.member.table
    for number in range(20):
        at = table.offset(second.slot, coherence.COHERENCE_OFFSET)
        for place in range(0, coherence.COHERENCE.size, 8):
            memory.store(at + place, (1 << 64) - 1 if number % 2 else number << 32)
        first.tick()
    challenge = coherence.make_challenge(first.slot, first.membership.incarnation, (1 << 32) - 1)
    memory.store(table.offset(second.slot, coherence.CHALLENGE_OFFSET), challenge)
    memory.store(
        table.offset(second.slot, coherence.TALLY_OFFSET),
        coherence.make_tally(challenge, coherence.COUNT_MASK),
    )
    first.tick()
    assert coherence.split_verdict((1 << 64) - 1) == ("unknown", 255)
    first.writes()


def test_the_words_are_in_the_free_part_of_the_first_line() -> None:
    end = coherence.COHERENCE_OFFSET + coherence.COHERENCE.size
    assert peer.NONCE_OFFSET + 8 <= coherence.COHERENCE_OFFSET
    assert end <= peer.IDENTITY_OFFSET
