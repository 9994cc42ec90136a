"""Bells with doorbells that note what they ring: announcing, ringing, and all that is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.errors import FsError
from ivshmemfs.format import bell
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.region import Memory
from ivshmemfs.shm import bells as bells_module
from ivshmemfs.shm.bells import Bells
from tests.support.regions import ROOT, TestRegion, put

EVERY = bell.BELL_WORDS * bell.LANES


class FakeDoorbell:
    """Rings the others of its `street` by eventfds, as the server's clients do."""

    def __init__(self, street: dict[int, FakeDoorbell], number: int) -> None:
        self.number = number
        self.reaches = True
        self.rung: list[int] = []
        self._street = street
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        street[number] = self

    def keep(self) -> bool:
        return self.reaches

    def ring(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.rung.append(number)
            if number in self._street:
                os.eventfd_write(self._street[number]._event, 1)

    def fileno(self) -> int:
        return self._event

    def quiet(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def close(self) -> None:
        os.close(self._event)


@pytest.fixture
def street() -> Iterator[dict[int, FakeDoorbell]]:
    made: dict[int, FakeDoorbell] = {}
    yield made
    for one in made.values():
        one.close()


Join = Callable[..., tuple[Filesystem, Bells, FakeDoorbell]]


@pytest.fixture
def join(made: TestRegion, street: dict[int, FakeDoorbell]) -> Iterator[Join]:
    """Mounts with a doorbell of a number."""
    mounted: list[Filesystem] = []

    def mount(number: int, readonly: bool = False) -> tuple[Filesystem, Bells, FakeDoorbell]:
        doorbell = FakeDoorbell(street, number)
        fs = Filesystem.mount(made.region(), readonly=readonly, doorbell=doorbell)
        mounted.append(fs)
        assert fs.bells is not None
        return fs, fs.bells, doorbell

    yield mount
    for fs in mounted:
        fs.unmount()


def words_of(memory: Memory) -> list[int]:
    return [memory.load(at) for at in bell.BELL_OFFSETS]


def change(fs: Filesystem) -> None:
    put(fs, ROOT_INO, b"file", b"x")


def naps(bells: Bells, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sleeps of `bells`: each returns at once, as if it had ended without a ring."""
    slept: list[float] = []

    def sleep(seconds: float) -> bool:
        slept.append(seconds)
        return False

    monkeypatch.setattr(bells, "await_ring", sleep)
    return slept


def test_a_commit_rings_who_announced_itself_once(join: Join) -> None:
    fs, bells, _ = join(3)
    writer, _, doorbell = join(5)
    word = fs.commit_word()
    assert bells.announce()
    change(writer)
    assert doorbell.rung == [3]
    assert bells.await_ring(20.0)
    assert fs.commit_word() != word
    change(writer)
    assert doorbell.rung == [3], "nobody has announced itself since"


def test_a_commit_does_nothing_about_bells_while_nobody_waits(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at one word, in the cache line that its swap has just taken."""
    writer, bells, doorbell = join(5)

    def ring() -> None:
        raise AssertionError("nobody waits")

    monkeypatch.setattr(bells, "ring", ring)
    change(writer)
    assert doorbell.rung == []
    assert bell.BELLS_OFFSET // 64 == COMMIT_OFFSET // 64


def test_a_look_and_a_failed_change_ring_nobody(join: Join) -> None:
    _, bells, _ = join(3)
    writer, _, doorbell = join(5)
    assert bells.announce()
    with pytest.raises(FsError):
        writer.lookup(ROOT_INO, b"missing")
    with pytest.raises(FsError):
        writer.rmdir(ROOT_INO, b"missing", ROOT)
    assert doorbell.rung == []
    change(writer)
    assert doorbell.rung == [3]


def test_a_commit_between_announcement_and_sleep_is_seen(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lost wake-up: the waiter looks again after it has announced itself."""
    fs, bells, _ = join(3)
    writer, _, doorbell = join(5)
    word, prepare = fs.commit_word(), bells.prepare

    def prepare_late() -> bool:
        change(writer)  # it finds no announcement
        return prepare()

    monkeypatch.setattr(bells, "prepare", prepare_late)
    slept = naps(bells, monkeypatch)
    assert bells.sleep(word, 5.0)
    assert doorbell.rung == []
    assert slept == []


def test_a_ring_of_before_ends_no_sleep(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, bells, doorbell = join(3)
    doorbell.ring([3])
    monkeypatch.setattr(bells_module, "SAFETY", 0.01)
    assert bells.sleep(fs.commit_word(), 5.0)
    assert not bells._distrusted, "it was no ring that ended the sleep"


def test_no_sleep_is_longer_than_the_safety_net(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, bells, _ = join(3)
    monkeypatch.setattr(bells_module, "SAFETY", 0.01)
    assert bells.sleep(fs.commit_word(), 1e9)  # it would not return in this test


def test_a_ring_without_a_commit_costs_no_more_than_a_nap(join: Join) -> None:
    fs, bells, _ = join(3)
    _, _, hostile = join(5)
    rings, naps_taken, word = 0, 0, fs.commit_word()
    for _ in range(50):
        prepared = bells.prepare()
        hostile.ring([3])
        if not prepared:
            naps_taken += 1
            continue
        bells.judge(word, bells.await_ring(1.0))
        rings += 1
    assert naps_taken >= rings - 1


def test_nobody_sleeps_beside_a_peer_that_does_not_ring(join: Join, made: TestRegion) -> None:
    fs, bells, _ = join(3, readonly=True)
    assert bells.prepare(), "no peer is there"
    silent = made.mount()
    assert not bells.prepare()
    silent.unmount()
    bells._deaf_until = 0.0  # a second later
    assert bells.prepare()
    assert fs.bells is bells


def test_a_lost_doorbell_is_stated_at_the_next_tick(join: Join) -> None:
    _, bells, _ = join(3, readonly=True)
    writer, _, doorbell = join(5)
    assert bells.prepare()
    doorbell.reaches = False
    writer.tick()
    (slot,) = [other for other in writer.table.peers() if other.slot == writer.peer_id[0]]
    assert not bells_module.rings(slot)
    bells._ringing.clear()
    assert not bells.prepare()


def test_a_waiter_that_cannot_be_rung_stores_nothing(join: Join, made: TestRegion) -> None:
    for number in (-1, bell.LARGEST_NUMBER + 1, 1 << 40):
        _, bells, _ = join(number)
        assert not bells.announce()
    memory = made.region(readonly=True).memory
    assert words_of(memory) == [0] * bell.BELL_WORDS
    fs = Filesystem.mount(made.region(readonly=True), readonly=True, doorbell=FakeDoorbell({}, 7))
    assert fs.bells is not None
    assert not fs.bells.announce()


def test_as_many_wait_as_there_are_lanes(join: Join) -> None:
    writer, _, doorbell = join(0, readonly=False)
    waiters = [join(number, readonly=True)[1] for number in range(1, EVERY + 2)]
    assert [one.announce() for one in waiters] == [True] * EVERY + [False]
    assert all(one.announce() for one in waiters[:-1]), "who is announced stays so"
    change(writer)
    assert sorted(doorbell.rung) == list(range(1, EVERY + 1))
    assert waiters[-1].announce(), "there is room again"


@pytest.mark.parametrize("garbage", [0xFFFF_FFFF_FFFF_FFFF, 0x0005_0005_0005_0005, 0xFFFF, 7 << 48])
def test_hostile_words_ring_a_bounded_number(join: Join, garbage: int) -> None:
    writer, _, doorbell = join(5)
    memory = writer.region.memory
    for at in bell.BELL_OFFSETS:
        memory.store(at, garbage)
    change(writer)
    assert len(doorbell.rung) <= EVERY
    assert all(0 <= number <= bell.LANE_MASK - 1 for number in doorbell.rung)
    assert memory.load(bell.BELLS_OFFSET) == 0


def test_a_word_that_changes_all_the_time_holds_nobody_up(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, bells, doorbell = join(5)
    memory, swaps = writer.region.memory, []

    class Restless:
        writable = True

        def load(self, offset: int) -> int:
            memory.store(offset, memory.load(offset) + 1 & 0xFFFF | 1)
            return memory.load(offset) ^ 2

        def cas(self, offset: int, expected: int, new: int) -> int:
            swaps.append(offset)
            return memory.cas(offset, expected, new)

    monkeypatch.setattr(bells, "_memory", Restless())
    change(writer)
    assert not bells.announce()
    assert doorbell.rung == []
    assert len(swaps) <= bells_module.ATTEMPTS * (2 + bell.BELL_WORDS) * 3


def test_a_fault_of_the_region_after_a_commit_is_no_fault_of_the_commit(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, bells, _ = join(5)

    def broken() -> None:
        raise OSError(5, "the region was cut")

    monkeypatch.setattr(bells, "ring", broken)
    change(writer)
    assert writer.lookup(ROOT_INO, b"file").size == 1


def test_lanes() -> None:
    word = 0
    for number in (0, 65534, 7, 300):
        grown = bell.added(word, number)
        assert grown is not None
        assert bell.added(grown, number) == grown
        word = grown
    assert list(bell.numbers(word)) == [0, 65534, 7, 300]
    assert bell.is_full(word)
    assert bell.added(word, 8) is None
    assert bell.added(word, 7) == word
