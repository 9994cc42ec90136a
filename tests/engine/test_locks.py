"""The lock table: against a model, between several engines, and under damage."""

from __future__ import annotations

import errno
import itertools
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import ROOT_INO, Filesystem, Handle, locks, xattr
from ivshmemfs.engine.deadlock import MOST_RECORDS, closes_ring
from ivshmemfs.engine.filesystem import KEEP_SIZE, PUNCH_HOLE
from ivshmemfs.engine.lock_table import Lock, Range, changed_ranges
from ivshmemfs.engine.locks import Guard, Wait
from ivshmemfs.engine.transaction import Transaction, View
from ivshmemfs.errors import Busy, LockLost
from ivshmemfs.format import lock as fmt
from ivshmemfs.format import words
from ivshmemfs.format.inode import ORPHANS_INO
from ivshmemfs.format.lock import END, FCNTL, FLOCK, READ, WRITE, LockRecord
from tests.engine.asking import fails
from tests.support.regions import ROOT, TestRegion, put

BYTES = 24  # of the file, in the model; the last one means all that follow


class Time:
    """A clock that is told to go on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


@pytest.fixture
def ino(fs: Filesystem) -> int:
    return put(fs, ROOT_INO, b"file", b"content").ino


def guard(fs: Filesystem, ino: int) -> Guard:
    return Guard(fs.locks, ino)


def table(fs: Filesystem, ino: int) -> list[LockRecord]:
    """The records of an inode."""

    def read(view: View) -> list[LockRecord]:
        inode = view.inode(ino)
        return fmt.decode_locks(xattr.table(view, inode).get(fmt.LOCKS) or b"")

    return fs.look(read)


def waits(fs: Filesystem) -> list[fmt.WaitRecord]:
    def read(view: View) -> list[fmt.WaitRecord]:
        inode = view.inode(ORPHANS_INO)
        return fmt.decode_waits(xattr.table(view, inode).get(fmt.WAITS) or b"")

    return fs.look(read)


def exclusive(owner: int = 1, start: int = 0, end: int = END) -> Lock:
    return Lock(FCNTL, WRITE, owner, start, end)


def shared(owner: int = 1, start: int = 0, end: int = END) -> Lock:
    return Lock(FCNTL, READ, owner, start, end)


def whole(type: int, owner: int = 1) -> Lock:
    return Lock(FLOCK, type, owner)


# --- the model ----------------------------------------------------------------------------------


class Model:
    """Which owner holds which byte how, byte by byte."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int, int], list[int | None]] = {}

    def bytes_of(self, mount: int, kind: int, owner: int) -> list[int | None]:
        return self.held.setdefault((mount, kind, owner), [None] * BYTES)

    def take(self, mount: int, lock: Lock, last: int) -> bool:
        mine = self.bytes_of(mount, lock.kind, lock.owner)
        if lock.kind == FLOCK and mine[0] not in (None, lock.type):
            mine[:] = [None] * BYTES
        for (at, kind, owner), theirs in self.held.items():
            if kind != lock.kind or (at, owner) == (mount, lock.owner):
                continue
            for one in theirs[lock.start : last + 1]:
                if one is not None and WRITE in (one, lock.type):
                    return False
        mine[lock.start : last + 1] = [lock.type] * (last + 1 - lock.start)
        return True

    def give(self, mount: int, kind: int, owner: int, start: int, last: int) -> None:
        mine = self.bytes_of(mount, kind, owner)
        mine[start : last + 1] = [None] * (last + 1 - start)

    def runs(self) -> set[tuple[int, int, int, int, int, int]]:
        """(mount, kind, owner, start, last, type) of all that is held."""
        found = set()
        for (mount, kind, owner), mine in self.held.items():
            start = 0
            for at in range(1, BYTES + 1):
                if at == BYTES or mine[at] != mine[start]:
                    held = mine[start]
                    if held is not None:
                        found.add((mount, kind, owner, start, at - 1, held))
                    start = at
        return found


def shown(mounts: list[Filesystem], ino: int) -> set[tuple[int, int, int, int, int, int]]:
    """The table in the same terms."""
    places = [fs.peer_id for fs in mounts]
    found = set()
    for one in table(mounts[0], ino):
        last = BYTES - 1 if one.end == END else one.end
        mount = places.index((one.slot, one.incarnation))
        assert one.state == fmt.HELD
        found.add((mount, one.kind, one.owner, one.start, last, one.type))
    return found


def run_model(mounts: list[Filesystem], ino: int, seed: int, steps: int) -> None:
    chance, model = random.Random(seed), Model()
    guards = [{owner: guard(fs, ino) for owner in (1, 2, 3)} for fs in mounts]
    for _ in range(steps):
        mount, owner = chance.randrange(len(mounts)), chance.randint(1, 3)
        kind = FLOCK if chance.random() < 0.25 else FCNTL
        start = 0 if kind == FLOCK else chance.randrange(BYTES)
        last = BYTES - 1 if kind == FLOCK else chance.randrange(start, BYTES)
        end = END if last == BYTES - 1 else last
        fs, mine = mounts[mount], guards[mount][owner]
        verb = chance.random()
        if verb < 0.55:
            lock = Lock(kind, chance.choice((READ, WRITE)), owner, start, end)
            free = fs.locks.test(ino, lock) is None
            took = fs.locks.take(mine, lock)
            assert took == free == model.take(mount, lock, last)
        elif verb < 0.95:
            fs.locks.give(ino, kind, owner, start, end)
            model.give(mount, kind, owner, start, last)
        else:
            fs.locks.close(mine)
            for one in (FCNTL, FLOCK):
                model.give(mount, one, owner, 0, BYTES - 1)
        assert shown(mounts, ino) == model.runs()
        for each in guards[mount].values():
            fs.locks.verify(each)
    for fs in mounts:
        fs.locks.leave()
    assert table(mounts[0], ino) == []


def test_mounts_match_a_model(made: TestRegion, long_run: bool, only_case: str | None) -> None:
    """Ranges, owners and kinds at random on three mounts, compared byte by byte."""
    mounts = [made.mount() for _ in range(3)]
    ino = put(mounts[0], ROOT_INO, b"file", b"content").ino
    seeds = [int(only_case)] if only_case else range(200 if long_run else 4)
    for seed in seeds:
        try:
            run_model(mounts, ino, seed, 300)
        except BaseException as error:
            error.add_note(f"--case {seed}")
            raise


def test_ranges_split_and_merge() -> None:
    def of(*pairs: tuple[int, int, int]) -> list[Range]:
        return [Range(start, end, type, 7) for start, end, type in pairs]

    held = of((0, 9, WRITE), (10, 19, READ))
    assert changed_ranges(held, 3, 5) == of((0, 2, WRITE), (6, 9, WRITE), (10, 19, READ))
    assert changed_ranges(held, 0, END) == []
    assert changed_ranges(held, 20, END) == held
    for new, expected in (
        (Range(0, 9, READ, 7), of((0, 19, READ))),
        (Range(5, 14, WRITE, 7), of((0, 14, WRITE), (15, 19, READ))),
        (Range(20, END, READ, 7), of((0, 9, WRITE), (10, END, READ))),
        (Range(21, END, READ, 7), of((0, 9, WRITE), (10, 19, READ), (21, END, READ))),
    ):
        assert changed_ranges(held, new.start, new.end, new) == expected


# --- what a lock does not change ----------------------------------------------------------------


def test_a_lock_shows_nowhere(fs: Filesystem, ino: int) -> None:
    before = fs.getattr(ino)
    assert fs.locks.take(guard(fs, ino), exclusive())
    assert fs.getattr(ino) == before
    assert fs.listxattr(ino, ROOT) == []
    fs.setxattr(ino, b"user.x", b"y", 0, ROOT)
    fs.removexattr(ino, b"user.x", ROOT)
    assert len(table(fs, ino)) == 1


def test_a_lock_outlives_other_attributes(fs: Filesystem, other: Filesystem, ino: int) -> None:
    fs.setxattr(ino, b"user.big", b"x" * 3000, 0, ROOT)
    assert fs.locks.take(guard(fs, ino), exclusive())
    other.setxattr(ino, b"user.big", b"y" * 4000, 0, ROOT)
    assert not other.locks.take(guard(other, ino), exclusive())
    other.removexattr(ino, b"user.big", ROOT)
    fs.locks.leave()
    assert other.locks.take(guard(other, ino), exclusive())


def test_a_lock_that_is_not_had_changes_nothing(
    fs: Filesystem, other: Filesystem, ino: int
) -> None:
    assert fs.locks.take(guard(fs, ino), exclusive())
    word = fs.view().word
    assert not other.locks.take(guard(other, ino), exclusive())
    assert other.locks.test(ino, shared()) is not None
    other.locks.give(ino, FCNTL, 1)
    assert fs.view().word == word


def events(fs: Filesystem, call: Callable[[], object], most: int = 1000) -> int:
    """How many loads and stores a call makes, if less than `most`."""
    memory = fs.store.memory
    for count in range(most):
        reached: list[bool] = []
        memory.trap(count, lambda: reached.append(True), True)  # noqa: B023
        call()
        memory.trap(0, None)
        if not reached:
            return count
    raise AssertionError(f"{most} loads and stores, or more")


def test_giving_back_nothing_looks_at_nothing(fs: Filesystem, ino: int) -> None:
    """What each close(2) of a file without locks costs."""
    assert events(fs, lambda: fs.locks.give(ino, FCNTL, 1)) == 0
    assert events(fs, lambda: fs.locks.close(guard(fs, ino))) == 0


def test_a_clean_end_leaves_no_record(fs: Filesystem, other: Filesystem, ino: int) -> None:
    assert fs.locks.take(guard(fs, ino), exclusive())
    fs.unmount()
    assert table(other, ino) == []


def test_an_upgrade_keeps_the_read_lock_until_it_succeeds(
    fs: Filesystem, other: Filesystem, ino: int
) -> None:
    mine, theirs = guard(fs, ino), guard(other, ino)
    assert fs.locks.take(mine, shared())
    assert other.locks.take(theirs, shared())
    assert not fs.locks.take(mine, exclusive())
    fs.locks.verify(mine)
    assert not other.locks.take(theirs, exclusive())
    other.locks.give(ino, FCNTL, 1)
    assert fs.locks.take(mine, exclusive())


def test_an_flock_that_is_converted_is_given_back_first(
    fs: Filesystem, other: Filesystem, ino: int
) -> None:
    mine, theirs = guard(fs, ino), guard(other, ino)
    assert fs.locks.take(mine, whole(READ))
    assert other.locks.take(theirs, whole(READ))
    assert not fs.locks.take(mine, whole(WRITE))
    assert other.locks.take(theirs, whole(WRITE)), "the first one gave its read lock back"
    assert not mine.held


def test_locks_that_two_open_files_share(fs: Filesystem, ino: int) -> None:
    """An owner that locks through two files gives back with the last of them."""
    first, second = guard(fs, ino), guard(fs, ino)
    assert fs.locks.take(first, exclusive(1, 0, 9))
    assert fs.locks.take(second, exclusive(1, 20, 29))
    fs.locks.close(first)
    assert len(table(fs, ino)) == 2
    fs.locks.verify(second)
    fs.locks.close(second)
    assert table(fs, ino) == []


def test_the_table_has_room_for_so_many(roomy: TestRegion) -> None:
    fs, other = roomy.mount(), roomy.mount()
    ino = put(fs, ROOT_INO, b"file", b"content").ino
    mine = guard(fs, ino)
    records = [
        LockRecord(FCNTL, WRITE, fmt.HELD, *fs.peer_id, 1, 2 * at, 2 * at, 7, 0)
        for at in range(fmt.MAX_RECORDS)
    ]
    store(fs, ino, fmt.encode_locks(records[:-1]))
    assert other.locks.take(guard(other, ino), exclusive(2, 1, 1))
    fails(errno.ENOLCK, lambda: fs.locks.take(mine, exclusive(3, 3, 3)))
    fails(errno.ENOLCK, lambda: other.locks.take(guard(other, ino), exclusive(2, 5, 5)))
    other.locks.give(ino, FCNTL, 2)
    assert fs.locks.take(mine, exclusive(3, 3, 3))
    other.table.retire(fs.peer_id[0], other.table.state(fs.peer_id[0]))
    assert other.locks.take(guard(other, ino), exclusive(2, 5, 5))
    assert len(table(other, ino)) == 1, "what a dead peer held is gone"


def test_the_middle_of_a_lock_in_a_full_table(roomy: TestRegion) -> None:
    """It cannot be given back; the whole lock can."""
    fs, other = roomy.mount(), roomy.mount()
    ino = put(fs, ROOT_INO, b"file", b"content").ino
    mine = guard(fs, ino)
    assert fs.locks.take(mine, exclusive(1, 0, 100))
    more = [
        LockRecord(FCNTL, WRITE, fmt.HELD, *other.peer_id, 1, 2 * at, 2 * at, 7, 0)
        for at in range(100, 99 + fmt.MOST)
    ]
    store(fs, ino, fmt.encode_locks(sorted([*table(fs, ino), *more])))
    fails(errno.ENOLCK, lambda: fs.locks.give(ino, FCNTL, 1, 50, 60))
    fs.tick()
    fs.locks.verify(mine)
    assert other.locks.test(ino, exclusive(5, 55, 55)) is not None
    fs.locks.give(ino, FCNTL, 1, 0, 10)
    fs.locks.give(ino, FCNTL, 1)
    assert len(table(fs, ino)) == fmt.MOST - 1
    assert other.locks.test(ino, exclusive(5, 55, 55)) is None


def test_how_many_are_before_a_waiter(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    assert fs.locks.take(guard(fs, ino), exclusive())
    waiters = [queued(other, ino, exclusive(owner), clock) for owner in range(2, 6)]
    for wait in waiters:
        assert not wait.attempt()
    assert [wait.before for wait in waiters] == [0, 1, 2, 3]
    for wait in waiters:
        wait.leave()


# --- hostile tables -----------------------------------------------------------------------------


def store(fs: Filesystem, ino: int, value: bytes, name: bytes = fmt.LOCKS) -> None:
    fs.change(lambda tx: tx.put(xattr.set_hidden(tx, tx.inode(ino), name, value)))


def test_a_table_of_an_impossible_shape_locks_nothing(
    fs: Filesystem, ino: int, made: TestRegion, caplog: pytest.LogCaptureFixture
) -> None:
    """fsck tells of it; whose records were in it is fenced; the next lock replaces it."""
    sound = fmt.encode_locks([LockRecord(FCNTL, WRITE, fmt.HELD, *fs.peer_id, 9, 0, END, 7, 0)])
    for value in (b"x", sound[:-1], sound + b"x", b"\xff" * len(sound), b"\x02" + sound[1:]):
        held, free = guard(fs, ino), guard(fs, ino)
        assert fs.locks.take(held, exclusive(8))
        store(fs, ino, value)
        report = fsck.check(made.region(readonly=True))
        assert report.clean
        assert any("LockRecord" in str(finding) for finding in report.findings), str(report)
        with pytest.raises(LockLost):
            fs.locks.verify(held)
        assert fs.locks.test(ino, exclusive()) is None
        fs.locks.give(ino, FCNTL, 1)
        assert fs.locks.take(free, exclusive())
        assert len(table(fs, ino)) == 1
        fs.locks.close(free)
    assert "damaged and hold nothing" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": 2}, {"type": 7}, {"state": 3}, {"slot": 0}, {"slot": 255}, {"start": 1, "end": 0},
        {"end": END + 1}, {"incarnation": 1 << 31}, {"ticket": 5},
        {"state": fmt.WAITING, "ticket": 0},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_record_locks_nothing(
    fs: Filesystem, other: Filesystem, ino: int, changes: dict[str, int]
) -> None:
    record = LockRecord(FCNTL, WRITE, fmt.HELD, *other.peer_id, 9, 0, END, 7, 0)
    raw = fmt.HEADER.pack(fmt.TableHeader(fmt.VERSION)) + fmt.LOCK.pack(record._replace(**changes))
    store(fs, ino, raw)
    mine = guard(fs, ino)
    assert fs.locks.test(ino, exclusive()) is None
    assert fs.locks.take(mine, exclusive())
    assert len(table(fs, ino)) == 1
    fs.locks.close(mine)


def test_a_hostile_list_of_waiters_is_no_deadlock(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    second = put(fs, ROOT_INO, b"second", b"").ino
    assert other.locks.take(guard(other, ino), exclusive())
    assert fs.locks.take(guard(fs, second), exclusive())
    ring = [
        fmt.WaitRecord(1, at, 5, other.peer_id[1], other.peer_id[0]) for at in (ino, second, 999)
    ]
    for value in (b"\xff" * 99, fmt.encode_waits(ring * 100)):
        store(fs, ORPHANS_INO, value, fmt.WAITS)
        wait = Wait(fs.locks, guard(fs, ino), exclusive(), blocking=True, detect=True)
        assert not wait.attempt()
        clock.now += locks.QUEUE_AFTER
        assert not wait.attempt()
        assert wait.ticket
        wait.leave()
    store(fs, ORPHANS_INO, b"", fmt.WAITS)
    fs.locks.leave()
    other.locks.leave()


# --- the fence ----------------------------------------------------------------------------------


def opened(fs: Filesystem, ino: int) -> Handle:
    handle = fs.open(ino, os.O_RDWR, ROOT)
    handle.guard = guard(fs, ino)
    return handle


def changes_through(fs: Filesystem, handle: Handle) -> list[Callable[[], object]]:
    """Every way to change what an open file holds."""
    hole = PUNCH_HOLE | KEEP_SIZE
    return [
        lambda: fs.write(handle, 0, b"x"),
        lambda: fs.write(handle, 0, b"x", append=True),
        lambda: fs.fallocate(handle, 0, 0, 10),
        lambda: fs.fallocate(handle, hole, 0, 1),
        lambda: fs.setattr(handle.ino, ROOT, handle.guard, size=3),
        lambda: fs.setattr(handle.ino, ROOT, handle.guard, size=10_000),
    ]


def expect_fenced(fs: Filesystem, handle: Handle, log: pytest.LogCaptureFixture) -> None:
    before = fs.getattr(handle.ino)
    for change in changes_through(fs, handle):
        with pytest.raises(LockLost) as caught:
            change()
        assert caught.value.errno == errno.EIO
    assert handle.guard is not None
    with pytest.raises(LockLost):
        fs.locks.take(handle.guard, exclusive(5, 70, 80))
    assert fs.getattr(handle.ino) == before
    said = [one for one in log.records if "fail until it is closed" in one.getMessage()]
    assert len(said) == 1, "one line of the log for each open file"
    log.clear()


def test_a_write_under_a_lock_that_is_held(fs: Filesystem, ino: int) -> None:
    handle = opened(fs, ino)
    assert handle.guard is not None
    assert fs.locks.take(handle.guard, exclusive())
    for change in changes_through(fs, handle):
        change()
    fs.locks.give(ino, FCNTL, 1, 0, 9)
    for change in changes_through(fs, handle):
        change()
    fs.locks.give(ino, FCNTL, 1)
    for change in changes_through(fs, handle):
        change()
    fs.release(handle)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("kind", [FCNTL, FLOCK])
def test_a_mount_that_was_declared_gone_is_fenced(
    fs: Filesystem,
    other: Filesystem,
    ino: int,
    kind: int,
    taken: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also when no one has taken the lock since."""
    handle, unlocked = opened(fs, ino), opened(fs, ino)
    assert handle.guard is not None
    assert fs.locks.take(handle.guard, Lock(kind, WRITE, 1))
    fs.write(handle, 0, b"before")
    other.table.retire(fs.peer_id[0], other.table.state(fs.peer_id[0]))
    if taken:
        assert other.locks.take(guard(other, ino), Lock(kind, WRITE, 1))
    fs.tick()  # joins again
    expect_fenced(fs, handle, caplog)
    fs.write(unlocked, 0, b"y")
    fs.locks.give(ino, kind, 1)
    expect_nothing_healed(fs, handle)
    fs.locks.close(handle.guard)
    for one in (handle, unlocked):
        fs.release(one)
    fresh = opened(fs, ino)
    assert fresh.guard is not None
    assert fs.locks.take(fresh.guard, Lock(kind, WRITE, 1)) == (not taken)
    fs.locks.close(fresh.guard)
    fs.release(fresh)
    other.locks.leave()


def expect_nothing_healed(fs: Filesystem, handle: Handle) -> None:
    """Giving the lost lock back does not open the file for writing again."""
    with pytest.raises(LockLost):
        fs.write(handle, 0, b"x")


def test_a_lock_that_was_taken_after_silence(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time, caplog: pytest.LogCaptureFixture
) -> None:
    """The mount is still the same incarnation, and its records are gone."""
    handle = opened(fs, ino)
    assert handle.guard is not None
    assert fs.locks.take(handle.guard, exclusive(1, 0, 9))
    assert fs.locks.take(handle.guard, shared(2, 30, 39))
    theirs = guard(other, ino)
    for _ in range(int(locks.SILENT / locks.LIVENESS) + 2):
        assert other.locks.test(ino, exclusive(1, 0, 0)) is not None or clock.now > 1009
        clock.now += locks.LIVENESS
    assert other.locks.take(theirs, exclusive(1, 100, 100)), (
        "a change of the table removes the dead"
    )
    assert [one.start for one in table(fs, ino)] == [100]
    expect_fenced(fs, handle, caplog)
    fs.locks.close(handle.guard)
    fs.release(handle)
    other.locks.leave()


def test_a_write_that_was_planned_before_the_lock_was_lost(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    """The commit's compare-and-swap makes the check and the write one."""
    handle = opened(fs, ino)
    assert handle.guard is not None
    assert fs.locks.take(handle.guard, exclusive())
    done: list[bool] = []

    def meanwhile() -> None:
        if not done:
            done.append(True)
            fs.store.memory.trap(0, None)
            while table(other, ino):
                with suppress(Busy):  # until it has waited for long enough
                    store(other, ino, b"")
                clock.now += 0.1

    lost = written = 0
    for event in itertools.count():
        done.clear()
        before = fs.getattr(ino)
        fs.store.memory.trap(event, meanwhile)
        try:
            fs.write(handle, 0, b"x" * (event + 1))
        except LockLost:
            lost += 1
            assert fs.getattr(ino) == before
        else:
            written += 1
        fs.store.memory.trap(0, None)
        fs.locks.leave()
        fs.release(handle)
        if not done:
            break
        handle = opened(fs, ino)
        assert handle.guard is not None
        assert fs.locks.take(handle.guard, exclusive())
    assert lost, "before the commit"
    assert written > 1, "after it, and at last undisturbed"


def test_a_lock_on_what_was_removed(fs: Filesystem, other: Filesystem, ino: int) -> None:
    handle = opened(fs, ino)
    assert handle.guard is not None
    assert fs.locks.take(handle.guard, exclusive())
    other.unlink(ROOT_INO, b"file", ROOT)
    fs.write(handle, 0, b"still there")
    fs.locks.close(handle.guard)
    fs.release(handle)
    fails(errno.ESTALE, lambda: fs.locks.take(guard(fs, ino), exclusive()))
    fs.locks.give(ino, FCNTL, 1)


# --- waiting ------------------------------------------------------------------------------------


def waiting(fs: Filesystem, ino: int, lock: Lock, *, detect: bool = False) -> Wait:
    return Wait(fs.locks, guard(fs, ino), lock, blocking=True, detect=detect)


def queued(fs: Filesystem, ino: int, lock: Lock, clock: Time, *, detect: bool = False) -> Wait:
    """A request that waits, and has a ticket."""
    wait = waiting(fs, ino, lock, detect=detect)
    assert not wait.attempt()
    clock.now += locks.QUEUE_AFTER
    assert not wait.attempt()
    assert wait.ticket
    return wait


def test_a_waiter_reads_nothing_while_nobody_commits(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    """But for the commit word."""
    assert fs.locks.take(guard(fs, ino), exclusive())
    wait = queued(other, ino, exclusive(), clock)
    assert not wait.attempt(), "its own ticket was a commit"
    assert events(other, wait.attempt) == 1
    fs.locks.give(ino, FCNTL, 1)
    assert wait.attempt()
    assert [one.state for one in table(fs, ino)] == [fmt.HELD]
    other.locks.leave()


def test_a_waiter_without_room_for_a_ticket_waits_as_quietly(
    roomy: TestRegion, clock: Time
) -> None:
    fs, other = roomy.mount(), roomy.mount()
    ino = put(fs, ROOT_INO, b"file", b"content").ino
    full = [
        LockRecord(FCNTL, READ, fmt.HELD, *fs.peer_id, 10 + at, 0, END, 7, 0)
        for at in range(fmt.MAX_RECORDS)
    ]
    store(fs, ino, fmt.encode_locks(full))
    wait = waiting(other, ino, exclusive())
    assert not wait.attempt()
    clock.now += locks.QUEUE_AFTER
    assert wait.is_due
    assert not wait.attempt()
    assert not wait.ticket
    clock.now += locks.QUEUE_AFTER
    assert not wait.is_due
    assert events(other, wait.attempt) == 1
    clock.now += locks.LIVENESS
    assert wait.is_due
    store(fs, ino, b"")
    assert wait.attempt()
    other.locks.leave()


def test_a_ticket_is_taken_back(fs: Filesystem, other: Filesystem, ino: int, clock: Time) -> None:
    assert fs.locks.take(guard(fs, ino), exclusive())
    wait = queued(other, ino, exclusive(), clock, detect=True)
    assert len(waits(fs)) == 1
    assert len(table(fs, ino)) == 2
    wait.leave()
    assert waits(fs) == []
    assert len(table(fs, ino)) == 1


def test_a_ticket_that_cannot_be_taken_back_at_once(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    assert fs.locks.take(guard(fs, ino), exclusive())
    wait = queued(other, ino, exclusive(), clock)
    assert fs._committer.hint.take(fs.peer_id[0])
    wait.leave()
    assert len(table(fs, ino)) == 2
    fs._committer.hint.give()
    other.tick()
    assert len(table(fs, ino)) == 1


def test_a_lock_that_cannot_be_given_back_at_once(
    fs: Filesystem, other: Filesystem, ino: int
) -> None:
    """Nor does that harm what the same owner takes next."""
    mine = guard(other, ino)
    assert other.locks.take(mine, exclusive(1, 0, 9))
    assert fs._committer.hint.take(fs.peer_id[0])
    with pytest.raises(Exception, match="committing"):
        other.locks.give(ino, FCNTL, 1)
    fs._committer.hint.give()
    assert other.locks.take(mine, exclusive(1, 20, 29))
    other.tick()
    assert [(one.start, one.end) for one in table(fs, ino)] == [(20, 29)]
    assert fs._committer.hint.take(fs.peer_id[0])
    with pytest.raises(Exception, match="committing"):
        other.locks.give(ino, FCNTL, 1)
    fs._committer.hint.give()
    other.tick()
    assert table(fs, ino) == []


def test_a_newcomer_that_may_wait_comes_after_a_ticket(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    holder = guard(fs, ino)
    assert fs.locks.take(holder, exclusive())
    first = queued(other, ino, exclusive(2), clock)
    fs.locks.give(ino, FCNTL, 1)
    newcomer = waiting(fs, ino, exclusive(1))
    assert not newcomer.attempt()
    assert first.attempt()
    other.locks.give(ino, FCNTL, 2)
    assert newcomer.attempt()
    fs.locks.give(ino, FCNTL, 1)
    fs.locks.leave()


def test_a_request_that_does_not_wait_ignores_tickets(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    holder = guard(fs, ino)
    assert fs.locks.take(holder, exclusive())
    wait = queued(other, ino, exclusive(2), clock)
    fs.locks.give(ino, FCNTL, 1)
    assert fs.locks.take(holder, exclusive())
    fs.locks.give(ino, FCNTL, 1)
    wait.leave()


def test_a_slow_waiter_holds_nobody_up(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    holder = guard(fs, ino)
    assert fs.locks.take(holder, exclusive())
    slow = queued(other, ino, exclusive(2), clock)
    fs.locks.give(ino, FCNTL, 1)
    newcomer = waiting(fs, ino, exclusive(1))
    assert not newcomer.attempt()
    clock.now += locks.SLOW * 1.1
    assert newcomer.attempt()
    fs.locks.give(ino, FCNTL, 1)
    again = waiting(fs, ino, exclusive(1))
    assert again.attempt(), "it is known to be slow"
    assert not slow.attempt()
    fs.locks.give(ino, FCNTL, 1)
    assert slow.attempt()
    other.locks.leave()


def test_a_waiter_of_a_dead_peer_holds_nobody_up(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    holder = guard(fs, ino)
    assert fs.locks.take(holder, exclusive())
    queued(other, ino, exclusive(2), clock, detect=True)
    fs.table.retire(other.peer_id[0], fs.table.state(other.peer_id[0]))
    fs.locks.give(ino, FCNTL, 1)
    assert table(fs, ino) == []
    assert waiting(fs, ino, exclusive(1)).attempt()
    fs.locks.leave()
    store(fs, ORPHANS_INO, b"", fmt.WAITS)


def test_an_upgrade_does_not_wait_for_whom_it_blocks(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    """A strict queue would be a deadlock here."""
    holder = guard(fs, ino)
    assert fs.locks.take(holder, shared())
    behind = queued(other, ino, exclusive(2), clock)
    upgrade = Wait(fs.locks, holder, exclusive(), blocking=True)
    assert upgrade.attempt()
    fs.locks.leave()
    assert behind.attempt()
    other.locks.leave()


def test_readers_let_a_writer_in(
    made: TestRegion, fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    """For a while: else a reader that the first one waits for elsewhere would wait for ever."""
    assert fs.locks.take(guard(fs, ino), shared(1))
    writer = queued(other, ino, exclusive(2), clock)
    third = made.mount()
    reader = waiting(third, ino, shared(3))
    assert not reader.attempt()
    clock.now += locks.YIELD / 2
    assert not reader.attempt()
    clock.now += locks.YIELD
    assert reader.attempt()
    fs.locks.leave()
    third.locks.leave()
    assert writer.attempt()
    other.locks.leave()


def test_a_mount_that_joins_again_takes_another_ticket(
    fs: Filesystem, other: Filesystem, ino: int, clock: Time
) -> None:
    assert fs.locks.take(guard(fs, ino), exclusive())
    wait = queued(other, ino, exclusive(2), clock)
    before = wait.ticket
    fs.table.retire(other.peer_id[0], fs.table.state(other.peer_id[0]))
    other.tick()
    clock.now += locks.LIVENESS
    assert not wait.attempt()
    assert wait.ticket > before
    fs.locks.leave()
    assert wait.attempt()
    assert len(table(fs, ino)) == 1
    other.locks.leave()


# --- deadlocks ----------------------------------------------------------------------------------


@pytest.fixture
def files(fs: Filesystem) -> list[int]:
    return [put(fs, ROOT_INO, b"f%d" % at, b"").ino for at in range(4)]


def test_a_ring_of_waiters(
    made: TestRegion, fs: Filesystem, other: Filesystem, files: list[int], clock: Time
) -> None:
    """Between three mounts, over three files; the one that closes the ring is told."""
    mounts = [fs, other, made.mount()]
    for at, mount in enumerate(mounts):
        assert mount.locks.take(guard(mount, files[at]), exclusive(at + 1))
    open_ring = [
        queued(mounts[at], files[at + 1], exclusive(at + 1), clock, detect=True) for at in (0, 1)
    ]
    last = waiting(mounts[2], files[0], exclusive(3), detect=True)
    assert not last.attempt()
    clock.now += locks.QUEUE_AFTER
    fails(errno.EDEADLK, last.attempt)
    assert len(waits(fs)) == 2
    mounts[2].locks.give(files[2], FCNTL, 3)
    assert open_ring[1].attempt()
    mounts[1].locks.leave()
    assert open_ring[0].attempt()
    for mount in mounts:
        mount.locks.leave()
    assert waits(fs) == []


def test_a_hostile_ring_is_not_read_for_ever() -> None:
    """One owner that waits for many files, whose tables are full; the caller gets no deadlock."""
    place = (1, 5)
    held = [LockRecord(FCNTL, WRITE, fmt.HELD, *place, 9, 0, END, 0, 0)]
    listed = [fmt.WaitRecord(9, at, 1, place[1], place[0]) for at in range(2, 2 + fmt.MAX_WAITS)]
    asked: list[int] = []

    def table_of(ino: int) -> tuple[list[LockRecord], int]:
        asked.append(ino)
        return (held if ino == 1 else []), fmt.MOST

    assert not closes_ring(1, exclusive(7), (2, 2, 7), listed, table_of)
    assert len(asked) * fmt.MOST <= MOST_RECORDS + fmt.MOST


def test_a_ring_within_one_file(fs: Filesystem, other: Filesystem, ino: int, clock: Time) -> None:
    assert fs.locks.take(guard(fs, ino), exclusive(1, 0, 0))
    assert other.locks.take(guard(other, ino), exclusive(2, 1, 1))
    first = queued(fs, ino, exclusive(1, 1, 1), clock, detect=True)
    second = waiting(other, ino, exclusive(2, 0, 0), detect=True)
    clock.now += locks.QUEUE_AFTER
    fails(errno.EDEADLK, second.attempt)
    first.leave()
    fs.locks.leave()
    other.locks.leave()


def test_a_chain_is_no_deadlock(
    made: TestRegion, fs: Filesystem, other: Filesystem, files: list[int], clock: Time
) -> None:
    third = made.mount()
    assert fs.locks.take(guard(fs, files[0]), exclusive(1))
    assert other.locks.take(guard(other, files[1]), exclusive(2))
    one = queued(other, files[0], exclusive(2), clock, detect=True)
    two = queued(third, files[1], exclusive(3), clock, detect=True)
    for wait in (two, one):
        wait.leave()
    for mount in (fs, other, third):
        mount.locks.leave()


def test_a_dead_peer_closes_no_ring(
    fs: Filesystem, other: Filesystem, files: list[int], clock: Time
) -> None:
    assert fs.locks.take(guard(fs, files[0]), exclusive(1))
    assert other.locks.take(guard(other, files[1]), exclusive(2))
    queued(other, files[0], exclusive(2), clock, detect=True)
    fs.table.retire(other.peer_id[0], fs.table.state(other.peer_id[0]))
    wait = waiting(fs, files[1], exclusive(1), detect=True)
    assert wait.attempt()
    fs.locks.leave()
    store(fs, ORPHANS_INO, b"", fmt.WAITS)


def test_a_deadlock_that_is_not_asked_for_is_not_told(
    fs: Filesystem, other: Filesystem, files: list[int], clock: Time
) -> None:
    """As for flock(2), and for locks of open files."""
    assert fs.locks.take(guard(fs, files[0]), exclusive(1))
    assert other.locks.take(guard(other, files[1]), exclusive(2))
    one = queued(other, files[0], exclusive(2), clock)
    two = queued(fs, files[1], exclusive(1), clock)
    assert waits(fs) == []
    for wait in (one, two):
        wait.leave()
    for mount in (fs, other):
        mount.locks.leave()


# --- full regions -------------------------------------------------------------------------------


def test_a_full_region(made: TestRegion, fs: Filesystem, ino: int) -> None:
    """A lock is had, or it is ENOLCK; giving back always succeeds."""
    mine = guard(fs, ino)
    assert fs.locks.take(mine, exclusive(1, 10, 90))
    handle, _ = fs.create(ROOT_INO, b"filler", 0o600, os.O_WRONLY, ROOT)

    def fill() -> None:
        for at in itertools.count():
            fs.write(handle, at * 1024, b"x" * 1024)

    def lock_more() -> None:
        for start in itertools.count(100, 2):
            fs.locks.take(mine, exclusive(2, start, start))

    fails(errno.ENOSPC, fill)
    fails(errno.ENOLCK, lock_more)
    fs.locks.give(ino, FCNTL, 1, 20, 30)
    fs.locks.give(ino, FCNTL, 1)
    fs.locks.close(mine)
    assert table(fs, ino) == []
    fs.release(handle)


def test_a_transaction_numbers_its_ticket(fs: Filesystem) -> None:
    """A ticket is the sequence of the commit that adds it, so no two are equal."""
    seen: list[int] = []

    def plan(tx: Transaction) -> None:
        seen.append(words.next_sequence(words.split_commit(tx.word)[0]))
        tx.touch(ROOT_INO)

    fs.change(plan)
    fs.change(plan)
    assert seen[0] < seen[1]
    assert seen[1] == words.split_commit(fs.view().word)[0]
