"""Two owners of one identity: a machine that was cloned, or put back into an older state.

A fork of this process is the other machine: all that the original knew, it knows as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from ivshmemfs.errors import Fenced, IvshmemfsError
from ivshmemfs.format import peer, words
from ivshmemfs.shm import identity, watch
from ivshmemfs.shm.membership import Membership
from tests.shm.conftest import SLOTS, Member
from tests.support.laboratory import Fates
from tests.support.regions import TestRegion, put

New = Callable[[], Member]
ACTIONS: dict[str, Callable[[Membership], object]] = {
    "beat": Membership.beat,
    "begin": Membership.begin,
    "end": Membership.end,
    "check": Membership.check,
    "rejoin": Membership.rejoin,
    "list": lambda own: own.list_open(77),
    "slot": lambda own: own.slot,
    "twin_seen": lambda own: own.twin_seen,
}


def attempt(own: Membership, action: str) -> str:
    """What comes of an action: its result, or the name of the error."""
    try:
        return str(ACTIONS[action](own))
    except IvshmemfsError as error:
        return type(error).__name__


class Twin:
    """The same peer once more, in a process of its own."""

    def __init__(self, own: Membership) -> None:
        here, there = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(here[1])
            os.close(there[0])
            with os.fdopen(here[0]) as asked, os.fdopen(there[1], "w", 1) as answers:
                for line in asked:
                    print(attempt(own, line.strip()), file=answers)
            os._exit(0)
        os.close(here[0])
        os.close(there[1])
        self._ask, self._answers = os.fdopen(here[1], "w", 1), os.fdopen(there[0])

    def __call__(self, action: str) -> str:
        print(action, file=self._ask)
        return self._answers.readline().strip()

    def end(self) -> None:
        self._ask.close()
        self._answers.close()
        os.waitpid(self.pid, 0)


@pytest.fixture
def watcher(new: New) -> Member:
    """Another peer, in the first slot."""
    member = new()
    member.membership.join(wait=0)
    return member


@pytest.fixture
def pid(fates: Fates) -> int:
    """The process id that both have."""
    return fates.new()


@pytest.fixture
def one(new: New, watcher: Member, pid: int, fates: Fates) -> Member:
    """The original, in the second slot."""
    member = new()
    with fates.speaking(pid):
        member.membership.join(wait=0)
    assert (watcher.membership.slot, member.membership.slot) == (1, 2)
    return member


@pytest.fixture
def clone() -> Iterator[Callable[[Member], Twin]]:
    """Makes twins; they are ended when the test is over."""
    made: list[Twin] = []

    def make(member: Member) -> Twin:
        made.append(Twin(member.membership))
        return made[-1]

    yield make
    for twin in made:
        twin.end()


Clone = Callable[[Member], Twin]


def silence(member: Member, fates: Fates) -> None:
    """Let a member see that no other shows life."""
    for _ in range(round(watch.SILENCE) + 2):
        member.table.watch.look()
        fates.clock.sleep(1)


def assert_unprovable(member: Member, slot: int) -> None:
    """Nothing that others can find out proves that the owner of a slot is gone."""
    found = member.table.peer(slot)
    assert found.identity_valid
    assert identity.presence(found.record) is identity.Presence.UNKNOWN


def test_both_are_idle(one: Member, watcher: Member, clone: Clone, fates: Fates, pid: int) -> None:
    """The first sign of life of each tells the other; both go on in slots of their own."""
    twin, own = clone(one), one.membership
    own.beat()
    assert twin("beat") == "Fenced"
    assert twin("twin_seen") == "True"
    assert watcher.table.peer(2).record.nonce == peer.TWIN_MARK
    assert twin("rejoin") == "None"
    assert twin("slot") == "3"
    with pytest.raises(Fenced, match="uses the identity"):
        own.beat()
    assert own.twin_seen
    silence(watcher, fates)
    watcher.table.retire_gone()
    assert watcher.table.state(2) >> words.SLOT_SHIFT == words.FREE  # left by both
    with fates.speaking(pid):
        own.rejoin()
    fates.dead.add(pid)
    for slot in (2, 3):
        assert_unprovable(watcher, slot)
    assert (twin("begin"), twin("end"), twin("beat")) != ("Fenced",) * 3
    own.begin()
    own.end()
    own.beat()


def test_both_begin(one: Member, watcher: Member, clone: Clone, fates: Fates, pid: int) -> None:
    """One begins; what it has under way is kept although "its" process is gone."""
    twin, own = clone(one), one.membership
    own.begin()
    word = watcher.table.state(2)
    assert twin("begin") == "Fenced"
    assert twin("twin_seen") == "True"
    fates.dead.add(pid)
    silence(watcher, fates)
    assert not watcher.table.retire_gone()
    assert watcher.table.state(2) == word
    own.end()
    with pytest.raises(Fenced):
        own.beat()


def test_one_begins_and_the_other_shows_life(one: Member, clone: Clone) -> None:
    twin, own = clone(one), one.membership
    own.begin()
    assert twin("beat") == "Fenced"
    assert twin("twin_seen") == "True"
    own.check()
    own.end()


def test_one_shows_life_and_the_other_begins(one: Member, watcher: Member, clone: Clone) -> None:
    """It has claimed nothing yet, so its slot is settled."""
    twin, own = clone(one), one.membership
    own.beat()
    assert twin("begin") == "Fenced"
    assert twin("twin_seen") == "True"
    assert watcher.table.state(2) >> words.SLOT_SHIFT == words.IDLE
    assert watcher.table.peer(2).record.nonce == peer.TWIN_MARK


@pytest.mark.parametrize("action", ["beat", "begin", "list"])
def test_one_leaves(action: str, one: Member, watcher: Member, clone: Clone) -> None:
    """The other would be judged by its process, which is over."""
    twin, own = clone(one), one.membership
    own.leave()
    assert watcher.table.state(2) >> words.SLOT_SHIFT == words.FREE
    assert twin(action) == "Fenced"
    assert twin("twin_seen") == "True"
    assert twin("rejoin") == "None"
    assert_unprovable(watcher, 2)


def test_one_leaves_while_the_other_is_at_work(
    one: Member, watcher: Member, clone: Clone, fates: Fates, pid: int
) -> None:
    twin, own = clone(one), one.membership
    assert twin("begin") != "Fenced"
    own.leave()
    fates.dead.add(pid)
    silence(watcher, fates)
    assert not watcher.table.retire_gone()
    assert twin("end") == "None"


def test_the_mark_is_looked_for_after_the_process(
    one: Member,
    watcher: Member,
    clone: Clone,
    fates: Fates,
    pid: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One marks the slot and ends, while another is about to judge it."""
    twin, own = clone(one), one.membership
    assert twin("begin") != "Fenced"
    silence(watcher, fates)
    seen = watcher.table.peer(2)

    def exists(_: int) -> bool:
        with pytest.raises(Fenced):
            own.beat()
        return False

    monkeypatch.setattr(identity, "process_exists", exists)
    assert not watcher.table.watch.absent(seen)


def test_cloned_within_a_transaction(one: Member, clone: Clone) -> None:
    """The one that ends it first has it; the other notices before it plans or releases anything."""
    own = one.membership
    own.begin()
    twin = clone(one)
    own.end()
    assert twin("check") == "Fenced"
    assert twin("twin_seen") == "True"
    assert twin("end") == "Fenced"


def test_put_back_while_the_original_went_on(one: Member, watcher: Member, clone: Clone) -> None:
    restored, own = clone(one), one.membership
    for _ in range(3):
        own.begin()
        own.end()
        own.beat()
    own.leave()
    assert watcher.table.state(2) >> words.SLOT_SHIFT == words.FREE
    assert restored("begin") == "Fenced"
    assert restored("twin_seen") == "True"
    assert restored("rejoin") == "None"
    assert_unprovable(watcher, int(restored("slot")))


def test_an_open_file_of_each(one: Member, watcher: Member, clone: Clone) -> None:
    """Each list would take bits of the other away: the second to change it notices."""
    twin = clone(one)
    assert twin("list") == "None"
    own = one.membership
    with pytest.raises(Fenced):
        own.list_open(77)
    assert own.twin_seen
    own.rejoin()
    assert own.slot == 3
    assert watcher.membership.listed_elsewhere(77)


def test_no_slot_is_left_for_the_second(
    new: New, one: Member, watcher: Member, clone: Clone, fates: Fates
) -> None:
    """It does not go on in the slot that is the other's."""
    while watcher.table.state(SLOTS) >> words.SLOT_SHIFT == words.FREE:
        new().membership.join(wait=0)
    twin, own = clone(one), one.membership
    own.beat()
    assert twin("beat") == "Fenced"
    assert twin("rejoin") == "Busy"
    for action in ("begin", "beat", "list"):
        assert twin(action) == "Fenced"
    assert not fates.dead
    assert watcher.table.state(2) == own.own_state[1]


def test_who_is_evicted_has_no_twin(one: Member, watcher: Member, new: New) -> None:
    own = one.membership
    for state in (words.IDLE, words.ACTIVE):
        if state == words.ACTIVE:
            own.begin()
        watcher.table.retire(own.slot, watcher.table.state(own.slot))
        with pytest.raises(Fenced, match="declared this mount gone"):
            own.beat()
        assert not own.twin_seen
        own.rejoin()
    watcher.table.retire(own.slot, watcher.table.state(own.slot))
    late = new()
    late.membership.join(wait=0)
    assert late.membership.slot == own.slot
    with pytest.raises(Fenced):
        own.begin()
    assert not own.twin_seen


def test_a_slot_that_is_left_to_the_twin_says_so_to_its_next_owner(
    one: Member, watcher: Member, new: New, clone: Clone
) -> None:
    """The mark ends with the incarnation."""
    twin = clone(one)
    one.membership.beat()
    assert twin("beat") == "Fenced"
    watcher.table.retire(2, watcher.table.state(2))
    late = new()
    late.membership.join(wait=0)
    assert late.membership.slot == 2
    late.membership.beat()
    assert not late.membership.twin_seen


def test_a_mount_tells_of_it_once(made: TestRegion, caplog: pytest.LogCaptureFixture) -> None:
    fs = made.mount()
    before = fs.peer_id
    assert fs._volume.member is not None
    twin = Twin(fs._volume.member)
    assert twin("beat") == "None"
    fs.tick()
    assert [r.getMessage() for r in caplog.records if "identity" in r.getMessage()]
    caplog.clear()
    fs.tick()
    put(fs, 1, b"file", b"x")
    assert not caplog.records
    assert fs.peer_id != before
    twin.end()
    fs.unmount()
