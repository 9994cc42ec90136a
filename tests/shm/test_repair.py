"""The session of a repair: how it is taken, what others see of it, and what its death leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest

from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import Busy, Corrupt, FsError, InUse, UnderRepair
from ivshmemfs.format import words
from ivshmemfs.format.geometry import COMMIT_OFFSET, REPAIR_OFFSET
from ivshmemfs.format.repair import FORMER_OFFSET
from ivshmemfs.region import Memory
from ivshmemfs.shm import watch
from ivshmemfs.shm.peers import PeerTable
from ivshmemfs.shm.repair import RepairSession
from tests.support.checks import assert_clean
from tests.support.regions import ROOT, TestRegion, get, new_region, put


@pytest.fixture
def made() -> Iterator[TestRegion]:
    with new_region() as region:
        yield region


@pytest.fixture
def fs(made: TestRegion) -> Filesystem:
    return made.mount()


def session_on(made: TestRegion, fs: Filesystem) -> tuple[RepairSession, Memory]:
    memory = made.region().memory
    return RepairSession(memory, fs.superblock.geometry), memory


def test_everybody_else_is_shut_out_until_it_is_over(made: TestRegion, fs: Filesystem) -> None:
    put(fs, 1, b"before", b"here")
    looker = made.mount(readonly=True)
    session, memory = session_on(made, fs)
    word = memory.load(COMMIT_OFFSET)
    session.take(force=False)
    told = rf"is being repaired by pid {os.getpid()} on .* run fsck.ivshmemfs -y again"
    for attempt in (
        lambda: fs.mkdir(1, b"d", 0o755, ROOT),
        lambda: fs.lookup(1, b"before"),
        lambda: looker.lookup(1, b"before"),
        made.mount,
        lambda: made.mount(readonly=True),
        fs.tick,
    ):
        with pytest.raises(UnderRepair, match=told):
            attempt()
    assert [peer.slot for peer in fs.table.peers()] == [1]  # the refused ones left no slot behind
    session.publish(words.split_commit(word)[1])
    sequence, block = words.split_commit(memory.load(COMMIT_OFFSET))
    assert (sequence - words.split_commit(word)[0], block) == (2, words.split_commit(word)[1])
    assert get(looker, 1, b"before") == b"here"
    fs.mkdir(1, b"d", 0o755, ROOT)
    fs.unmount()
    assert_clean(made)


def test_a_mark_without_a_repair_is_damage(made: TestRegion, fs: Filesystem) -> None:
    memory = made.region().memory
    memory.store(COMMIT_OFFSET, fs.store.commit_word.load() | words.UNDER_REPAIR)
    for attempt in (lambda: fs.lookup(1, b"x"), made.mount):
        with pytest.raises(Corrupt, match=r"run fsck\.ivshmemfs -y"):
            attempt()


@pytest.mark.parametrize("readonly", [False, True])
def test_a_mount_says_once_that_it_is_shut_out(
    made: TestRegion, fs: Filesystem, readonly: bool, caplog: pytest.LogCaptureFixture
) -> None:
    session, _ = session_on(made, fs)
    mount = made.mount(readonly=readonly)
    session.take(force=False)
    for _ in range(3):
        with pytest.raises(UnderRepair):
            mount.tick()
    session.give_up()
    for _ in range(3):
        mount.tick()
    first, second = (record.message for record in caplog.records)
    assert first.startswith("the region is being repaired by pid ")
    assert second == "the repair of the region is over"


def test_a_mount_shows_life_during_a_repair(made: TestRegion, fs: Filesystem) -> None:
    """Also while it keeps files from being freed, of which it cannot tell whether it may."""
    fs._openfiles.hold(5)
    fs._lifetimes.pins[5] = 0.0, 1
    fs._lifetimes.pins[6] = float("inf"), 1
    session, _ = session_on(made, fs)
    session.take(force=False)
    before = fs.table.heartbeats()[1]
    with pytest.raises(UnderRepair):
        fs.tick()
    assert fs.table.heartbeats()[1] != before
    session.give_up()


def test_a_mount_leaves_during_a_repair(made: TestRegion, fs: Filesystem) -> None:
    """Although it cannot collect what it should."""
    handle, _ = fs.create(1, b"open", 0o644, os.O_RDWR, ROOT)
    fs.unlink(1, b"open", ROOT)
    assert handle.ino in fs._openfiles.counts
    assert fs._volume.member is not None
    fs._volume.member.must_collect = True
    session, _ = session_on(made, fs)
    session.take(force=False)
    fs.unmount()
    assert list(fs.table.peers()) == []
    session.give_up()
    other = made.mount()
    while other.tick():
        pass
    other.unmount()
    assert_clean(made)


def test_what_was_planned_before_the_mark_is_not_published(
    made: TestRegion, fs: Filesystem
) -> None:
    session, memory = session_on(made, fs)
    planned_on = fs.store.commit_word.load()
    session.take(force=False)
    assert not fs.store.commit_word.publish(planned_on, words.split_commit(planned_on)[1])
    fs.store.commit_word.fence()  # which an eviction does: it returns, and leaves the mark
    assert memory.load(COMMIT_OFFSET) == session.marked
    session.give_up()
    assert not fs.store.commit_word.publish(planned_on, words.split_commit(planned_on)[1])


def test_one_repair_at_a_time(made: TestRegion, fs: Filesystem) -> None:
    one, _ = session_on(made, fs)
    two, memory = session_on(made, fs)
    one.take(force=False)
    with pytest.raises(InUse, match=f"being repaired by pid {os.getpid()} "):
        two.take(force=False)
    two.take(force=True)
    assert two.former == one.former
    assert two.tag != one.tag
    with pytest.raises(InUse, match="took over"):
        one.publish(words.split_commit(one.former)[1])
    one.give_up()  # changes nothing any more
    assert memory.load(COMMIT_OFFSET) == two.marked
    two.give_up()
    assert fs.getattr(1).ino == 1


def test_who_starts_at_the_same_time_does_not_mark_twice(made: TestRegion, fs: Filesystem) -> None:
    """The second takes the slot over before the first has stored its identity."""
    one, memory = session_on(made, fs)
    two, _ = session_on(made, fs)
    memory.trap(1, lambda: two.take(force=False))  # after the first one's compare-and-swap
    with pytest.raises(InUse, match="took over"):
        one.take(force=False)
    assert memory.load(COMMIT_OFFSET) == two.marked
    two.give_up()


def test_a_commit_between_moves_the_former_word(made: TestRegion, fs: Filesystem) -> None:
    session, memory = session_on(made, fs)
    stores: list[int] = []

    def commit() -> None:
        fs.mkdir(1, b"meanwhile", 0o755, ROOT)
        stores.append(fs.store.commit_word.load())

    at = memory.stores
    session.take(force=False)
    needed = memory.stores - at  # the last is the move to ACTIVE, the mark is the one before it
    session.give_up()
    memory.trap(needed - 2, commit)
    session.take(force=False)
    assert stores == [session.former]
    assert memory.load(REPAIR_OFFSET + FORMER_OFFSET) == session.former
    session.give_up()
    assert fs.lookup(1, b"meanwhile").nlink == 2


def test_the_next_one_goes_on_from_where_a_dead_one_began(
    made: TestRegion, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SILENCE", 0.0)
    word = fs.store.commit_word.load()
    child = os.fork()
    if child == 0:
        session_on(made, fs)[0].take(force=False)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(UnderRepair, match=f"by pid {child} on"):
        fs.lookup(1, b"x")
    session, _ = session_on(made, fs)
    session.take(force=False)
    assert session.former == word
    session.give_up()
    assert fs.getattr(1).ino == 1


def test_its_claims_are_settled_when_it_is_over(made: TestRegion, fs: Filesystem) -> None:
    session, memory = session_on(made, fs)
    table = PeerTable(memory, fs.superblock.geometry, fs.store.commit_word)
    session.take(force=False)
    block = fs.superblock.geometry.block_count - 1
    memory.store(fs.superblock.geometry.tags_offset + 8 * block, session.tag)
    limit = words.split_state(table.limits()[0])
    assert limit[1:] == words.split_tag(session.tag)[1:]  # not below it: not settled
    session.give_up()
    assert words.split_state(table.limits()[0])[2] == limit[2] + 1
    assert fs.collect() == 1
    fs.unmount()
    assert_clean(made)


def test_what_a_commit_left_before_a_repair_is_not_released_after_it(
    made: TestRegion, fs: Filesystem
) -> None:
    """The repair may have found a use for it; a collection finds out."""
    put(fs, 1, b"large", b"x" * 100_000)
    session, _ = session_on(made, fs)
    free = fs.store.blocks.free_count()

    def come_between() -> None:
        session.take(force=False)
        session.give_up()

    memory = fs.store.memory
    before = memory.stores
    fs.mkdir(1, b"d", 0o755, ROOT)
    fs.rmdir(1, b"d", ROOT)
    assert fs.store.blocks.free_count() == free
    stores = memory.stores - before
    for after in range(stores // 2, stores):
        memory.trap(after, come_between)
        fs.mkdir(1, b"d", 0o755, ROOT)
        with suppress(Busy):
            fs.rmdir(1, b"d", ROOT)
        memory.trap(1 << 40, lambda: None)
        with suppress(FsError):
            fs.rmdir(1, b"d", ROOT)
        assert fs.store.blocks.free_count() <= free
        while fs.store.blocks.free_count() < free:
            assert fs._upkeep.ticks < 10_000
            fs.tick()
    fs.unmount()
    assert_clean(made)


def test_a_collection_starts_anew_when_a_repair_came_between(
    made: TestRegion, fs: Filesystem
) -> None:
    """A repair may have found a use for what no root reached when the marking began."""
    from ivshmemfs.engine.collect import Collector

    member = fs._volume.member
    assert member is not None
    tag = member.begin()
    pointers, _ = fs.store.blocks.claim(3, tag, 0)
    member.end()
    collector = Collector(fs.store, fs.table)
    collector.step(1)
    session, memory = session_on(made, fs)
    session.take(force=False)
    with pytest.raises(UnderRepair):
        collector.step()
    assert fs.store.blocks.free_count() + 3 <= fs.superblock.geometry.block_count
    for at in range(0, len(pointers), 16):  # the repair keeps them, under a tag of its own
        block = int.from_bytes(pointers[at : at + 4], "little")
        memory.store(fs.superblock.geometry.tags_offset + 8 * block, session.tag)
    session.give_up()
    assert collector.step()
    assert collector.released == 3  # which were unreachable after all, as the second marking shows
    fs.unmount()
    assert_clean(made)


def test_a_collection_that_a_repair_stops_is_not_forgotten(
    made: TestRegion, fs: Filesystem
) -> None:
    from ivshmemfs.engine.collect import Collector

    session, _ = session_on(made, fs)
    fs._garbage.collector = Collector(fs.store, fs.table)
    session.take(force=False)
    with pytest.raises(UnderRepair):
        fs._garbage.collect_piece()
    session.give_up()
    assert fs._garbage.collector is not None
    assert fs._garbage.collector.step()
