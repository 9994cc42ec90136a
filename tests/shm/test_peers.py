"""The peer table: joining, leaving, being declared gone, and waking up afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import Fenced, TooManyPeers
from ivshmemfs.format import peer, words
from ivshmemfs.format.node import HEADER_SIZE, ROOT_RECORD
from ivshmemfs.shm import watch
from tests.shm.conftest import SLOTS, Member
from tests.support.laboratory import Death, Fates
from tests.support.regions import TestRegion, put

New = Callable[[], Member]
Watching = Member | Filesystem


def joined(new: New) -> Member:
    member = new()
    member.membership.join(wait=0.01)
    return member


def states(member: Member) -> list[int]:
    return [member.table.state(s) >> words.SLOT_SHIFT for s in range(1, SLOTS + 1)]


def test_slots_are_taken_and_given_back(new: New) -> None:
    one, two = joined(new), joined(new)
    assert (one.membership.slot, two.membership.slot) == (1, 2)
    assert states(one) == [words.IDLE, words.IDLE, words.FREE]
    assert [p.identity_valid for p in one.table.peers()] == [True, True]
    before = words.split_state(one.table.state(1))[1]
    one.membership.leave()
    assert states(two) == [words.FREE, words.IDLE, words.FREE]
    again = joined(new)
    assert again.membership.slot == 1
    assert again.membership.incarnation == (before + 1) & words.INCARNATION_MASK


def test_the_last_slot_is_taken(new: New) -> None:
    members = [joined(new) for _ in range(SLOTS)]
    for member in members:
        member.membership.begin()
    with pytest.raises(TooManyPeers, match="evict"):
        new().membership.join(wait=0.02)
    members[1].membership.end()
    members[1].membership.leave()
    assert joined(new).membership.slot == 2


def test_a_newcomer_waits_for_a_slot_to_fall_free(new: New) -> None:
    members = [joined(new) for _ in range(SLOTS)]
    for member in members:
        member.membership.begin()
    late = new()
    slept = []

    def leave(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            members[2].membership.end()
            members[2].membership.leave()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", leave)
        late.membership.join(wait=5)
    assert late.membership.slot == 3
    assert len(slept) == 3


def test_a_silent_idle_peer_makes_room(new: New) -> None:
    """Only when the table is full, and only one that shows no life; it goes on when it wakes."""
    members = [joined(new) for _ in range(SLOTS)]
    members[0].membership.begin()
    members[1].membership.begin()
    late = new()

    def beat(_: float) -> None:
        members[1].membership.beat()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", beat)
        late.membership.join(wait=0.02)
    assert late.membership.slot == 3
    assert late.membership.must_collect  # the former one may have died while it released
    with pytest.raises(Fenced):
        members[2].membership.beat()
    with pytest.raises(Fenced):
        members[2].membership.begin()
    late.membership.begin()
    with pytest.raises(TooManyPeers):
        members[2].membership.join(wait=0)
    late.membership.end()
    late.membership.leave()
    members[2].membership.join(wait=0.01)
    members[2].membership.begin()


def test_tags_never_come_back(new: New) -> None:
    tags = set()
    for _ in range(5):
        member = joined(new)
        for _ in range(5):
            tags.add(member.membership.begin())
            member.membership.end()
        member.membership.leave()
    assert len(tags) == 25


def use_up(member: Member) -> None:
    """As if the member had begun all transactions that an incarnation has."""
    own = member.membership
    own.counter = words.COUNTER_MASK - 1
    own._word = words.make_state(words.IDLE, own.incarnation, own.counter)
    member.memory.store(member.table.offset(own.slot), own._word)


def test_counters_that_are_used_up(new: New) -> None:
    """The member goes on in another slot, and what it holds open is listed throughout."""
    member, watcher = joined(new), joined(new)
    member.membership.list_open(77)
    use_up(member)
    unlisted = []

    def look() -> None:
        unlisted.append(not watcher.membership.listed_elsewhere(77))

    member.memory.trap(2, look)
    tag = member.membership.begin()
    assert unlisted == [False]
    assert words.split_tag(tag)[0] == 3
    assert states(watcher) == [words.FREE, words.IDLE, words.ACTIVE]
    member.membership.end()


def test_counters_that_are_used_up_while_no_slot_is_free(new: New) -> None:
    """The member goes on in its own slot: it never has none."""
    members = [joined(new) for _ in range(SLOTS)]
    member = members[0]
    before = member.membership.incarnation
    member.membership.list_open(77)
    use_up(member)
    tag = member.membership.begin()
    assert words.split_tag(tag)[:2] == (1, (before + 1) & words.INCARNATION_MASK)
    assert members[1].membership.listed_elsewhere(77)
    member.membership.end()
    member.membership.beat()


def test_counters_that_are_used_up_in_a_slot_that_was_taken_away(new: New) -> None:
    members = [joined(new) for _ in range(SLOTS)]
    member = members[0]
    use_up(member)
    members[1].table.retire(1, member.table.state(1))
    late = joined(new)
    assert late.membership.slot == 1
    with pytest.raises(Fenced):
        member.membership.begin()
    assert member.membership.slot == 1
    with pytest.raises(Fenced):
        member.membership.beat()
    with pytest.raises(Fenced):
        member.membership.list_open(77)
    assert not members[1].membership.listed_elsewhere(77)


def test_limits_tell_what_is_settled(new: New) -> None:
    one, two = joined(new), joined(new)

    def settled(tag: int) -> bool:
        limits, (slot, incarnation, counter) = one.table.limits(), words.split_tag(tag)
        _, limit_incarnation, limit = words.split_state(limits[slot])
        return incarnation == limit_incarnation and counter < limit

    tag = two.membership.begin()
    assert not settled(tag)
    two.membership.end()
    assert settled(tag)
    newer = two.membership.begin()
    assert settled(tag)
    assert not settled(newer)
    one.table.retire(2, one.table.state(2))
    assert settled(newer)


@pytest.mark.parametrize("state", [words.IDLE, words.ACTIVE, words.JOINING, words.DEAD])
def test_whoever_is_retired_is_to_be_collected(new: New, state: int) -> None:
    """Also an idle peer: it may have owed the collection of what another had left."""
    one, two = joined(new), joined(new)
    _, incarnation, counter = words.split_state(one.table.state(2))
    word = words.make_state(state, incarnation, counter)
    one.memory.store(one.table.offset(2), word)
    assert one.table.retire(2, word)
    assert states(one)[1] == words.FREE
    assert not one.table.retire(2, one.table.state(2))
    with pytest.raises(Fenced):
        two.membership.begin()


def test_retiring_what_moved_on_does_nothing(new: New) -> None:
    one, two = joined(new), joined(new)
    seen = one.table.state(2)
    two.membership.begin()
    assert not one.table.retire(2, seen)
    seen = one.table.state(2)
    two.membership.end()
    assert not one.table.retire(2, seen)
    two.membership.begin()


def test_retiring_fences_what_was_planned(new: New) -> None:
    one, two = joined(new), joined(new)
    two.membership.begin()
    planned_on = two.commit_word.load()
    one.table.retire(2, one.table.state(2))
    assert one.commit_word.load() != planned_on
    assert not two.commit_word.publish(planned_on, planned_on & words.BLOCK_MASK)
    with pytest.raises(Fenced):
        two.membership.check()
    with pytest.raises(Fenced):
        two.membership.end()


def test_retiring_an_idle_peer_leaves_commits_alone(new: New) -> None:
    one, _ = joined(new), joined(new)
    word = one.commit_word.load()
    one.table.retire(2, one.table.state(2))
    assert one.commit_word.load() == word


# --- surely gone ----------------------------------------------------------------------------


def tick(fs: Filesystem, fates: Fates, times: int) -> None:
    """What a mount does each second."""
    for _ in range(times):
        fates.clock.sleep(1)
        fs.tick()


def look_for(member: Watching, fates: Fates, seconds: float) -> None:
    """Look at all slots for some seconds of the member's own clock."""
    for _ in range(round(seconds / 0.5) + 1):
        member.table.watch.look()
        fates.clock.sleep(0.5)


def test_gone_means_that_the_process_ended_and_silence(new: New, fates: Fates) -> None:
    pid = fates.new()
    with fates.speaking(pid):
        two = joined(new)
    one = joined(new)
    two.membership.begin()
    look_for(one, fates, watch.SILENCE)
    assert not one.table.retire_gone()
    fates.dead.add(pid)
    assert one.table.watch.absent(one.table.peer(1))
    three = new()
    look_for(three, fates, watch.SILENCE - 1)
    assert three.table.watch.vanished(three.table.peer(1))
    assert not three.table.watch.absent(three.table.peer(1))
    assert one.table.retire_gone()
    assert states(one)[0] == words.FREE


def test_an_identity_of_before_proves_nothing(new: New, fates: Fates) -> None:
    """A newcomer that died before it stored its identity is not judged by the one before it."""
    one = joined(new)
    pid = fates.new()
    with fates.speaking(pid):
        before = joined(new)
        before.membership.leave()
    fates.dead.add(pid)
    late = new()

    def die() -> None:
        raise Death

    late.memory.trap(1, die)
    with pytest.raises(Death):
        late.membership.join(wait=0)
    look_for(one, fates, watch.SILENCE)
    assert states(one)[1] == words.JOINING
    assert not one.table.watch.absent(one.table.peer(2))


def test_a_newcomer_that_dies_while_it_joins_leaves_no_slot_behind(
    made: TestRegion, new: New, fates: Fates
) -> None:
    watcher = new()
    fs = made.mount()
    late, point = new(), 0

    def die() -> None:
        raise Death

    while True:
        late = new()
        late.memory.trap(point, die)
        try:
            late.membership.join(wait=0)
        except Death:
            point += 1
        else:
            break
        tick(fs, fates, 9)
        assert states(watcher)[1] == words.FREE
    assert point > 20


def test_a_newcomer_that_sleeps_while_it_joins_harms_nobody(new: New) -> None:
    """Its slot is given to another meanwhile, and it starts again when it wakes up."""
    watcher, point, slept = joined(new), 0, True
    while slept:
        sleeper, second = new(), new()
        slept = False

        def meanwhile() -> None:
            nonlocal slept
            slept = True
            slot = sleeper.membership.slot or 2  # noqa: B023
            watcher.table.retire(slot, watcher.table.state(slot))
            second.membership.join(wait=0)  # noqa: B023
            second.membership.list_open(77)  # noqa: B023
            second.membership.intend(78)  # noqa: B023

        sleeper.memory.trap(point, meanwhile)
        sleeper.membership.join(wait=0)
        sleeper.memory.trap(0, None)
        if slept:
            assert sleeper.membership.slot != second.membership.slot
            assert watcher.membership.listed_elsewhere(77)
            assert watcher.membership.intended_elsewhere(78)
            second.membership.beat()
            sleeper.membership.beat()
            for slot in (second.membership.slot, sleeper.membership.slot):
                assert watcher.table.peer(slot).identity_valid
            second.membership.unlist_open(77)
            second.membership.withdraw()
            second.membership.begin()
            second.membership.end()
            second.membership.leave()
        sleeper.membership.begin()
        sleeper.membership.end()
        sleeper.membership.leave()
        point += 1
    assert point > 20


# --- open files -----------------------------------------------------------------------------


def test_the_open_filter(new: New) -> None:
    one, two = joined(new), joined(new)
    for ino in range(3, 300):
        assert not two.membership.listed_elsewhere(ino)
        one.membership.list_open(ino)
        one.membership.list_open(ino)
        assert two.membership.listed_elsewhere(ino)
        assert not one.membership.listed_elsewhere(ino)
        one.membership.unlist_open(ino)
        assert two.membership.listed_elsewhere(ino)
        one.membership.unlist_open(ino)
        assert not two.membership.listed_elsewhere(ino)


def test_open_files_move_to_the_next_incarnation(new: New) -> None:
    one, two = joined(new), joined(new)
    one.membership.list_open(77)
    two.table.retire(1, two.table.state(1))
    assert not two.membership.listed_elsewhere(77)
    one.membership.join(wait=0)
    assert two.membership.listed_elsewhere(77)
    one.membership.unlist_open(77)
    assert not two.membership.listed_elsewhere(77)


def test_who_leaves_holds_nothing_open(new: New) -> None:
    one, two = joined(new), joined(new)
    one.membership.list_open(77)
    one.membership.leave()
    assert not two.membership.listed_elsewhere(77)
    joined(new)
    assert not two.membership.listed_elsewhere(77)


def test_intents(new: New) -> None:
    one, two = joined(new), joined(new)
    one.membership.intend(77)
    assert two.membership.intended_elsewhere(77)
    assert not one.membership.intended_elsewhere(77)
    one.membership.intend(78)
    assert not two.membership.intended_elsewhere(77)
    one.membership.withdraw()
    assert not two.membership.intended_elsewhere(78)


# --- owing a collection ---------------------------------------------------------------------


def leak_by_death(made: TestRegion, fates: Fates) -> int:
    """A peer dies amid a write; returns how many blocks its claims hold."""
    pid = fates.new()
    with fates.speaking(pid):
        fs = made.mount()

    def die() -> None:
        raise Death

    free = fs.store.blocks.free_count()
    fs.region.memory.trap(30, die)
    with pytest.raises(Death):
        put(fs, 1, b"file", b"x" * 20_000)
    fates.dead.add(pid)
    return free - fs.store.blocks.free_count()


def whole(member: Member) -> bool:
    root = ROOT_RECORD.unpack(member.store.snapshot()[1].data, HEADER_SIZE)
    return member.store.blocks.free_count() + root.used == member.store.geometry.block_count


def test_who_retires_and_leaves_collects_first(made: TestRegion, new: New, fates: Fates) -> None:
    leak_by_death(made, fates)
    watcher = new()
    assert not whole(watcher)
    fs = made.mount()
    look_for(fs, fates, watch.SILENCE)
    assert fs._volume.member is not None
    fs._volume.member.must_collect |= fs.table.retire_gone(fs.peer_id[0])
    assert not whole(watcher)
    fs.unmount()
    assert whole(watcher)


def test_who_retires_and_dies_leaves_the_debt_to_others(
    made: TestRegion, new: New, fates: Fates
) -> None:
    fs = made.mount()
    leak_by_death(made, fates)
    watcher = new()
    pid = fates.new()
    with fates.speaking(pid):
        second = made.mount()
        look_for(second, fates, watch.SILENCE)
        second.table.retire_gone()
    assert states(watcher) == [words.IDLE, words.FREE, words.IDLE]
    assert not whole(watcher)
    fates.dead.add(pid)
    tick(fs, fates, 12)
    assert whole(watcher)


def test_a_leak_that_nobody_owes_is_collected_by_a_newcomer(
    made: TestRegion, new: New, fates: Fates
) -> None:
    leak_by_death(made, fates)
    watcher = new()
    look_for(watcher, fates, watch.SILENCE)
    assert watcher.table.retire_gone()  # as `ivshmemfs evict` does
    assert not whole(watcher)
    fs = made.mount()
    fs.tick()
    assert whole(watcher)


def test_a_heartbeat_that_wraps(new: New) -> None:
    """No matter which peer stored it."""
    member = joined(new)
    at = member.table.offset(1, peer.HEARTBEAT_OFFSET)
    member.memory.store(at, (1 << 64) - 1)
    for _ in range(2):
        member.membership.beat()
    assert member.memory.load(at) == 0
    member.membership.beat()
    assert member.memory.load(at) == 1


def test_a_mount_that_joined_again_ended_no_transaction(new: New) -> None:
    """What it claimed before may have been published by then, where a machine was put back."""
    one, two = joined(new), joined(new)
    one.membership.begin()
    assert two.table.retire(1, two.table.state(1))
    one.membership.rejoin()
    assert one.membership.owns_slot
    for step in (one.membership.check, one.membership.end):
        with pytest.raises(Fenced):
            step()
