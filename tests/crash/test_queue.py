"""Queues: a peer dies or is paused before every single store (or load) of a put or a take.

Others go on at once.  No record is torn, none is taken twice, and none that was put is lost.  What
the death left claimed is found again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem, fixed, names
from ivshmemfs.engine.messages import Messages
from ivshmemfs.errors import StaleHandle
from ivshmemfs.format import queue as fmt
from tests.support.checks import assert_sound
from tests.support.laboratory import Death, Fates, Laboratory, Peer
from tests.support.regions import ROOT, new_region, put

CELLS = 4
RECORD = 200
BUFFERS = CELLS + fmt.SPARE
KINDS = {"work": fmt.WORK, "broadcast": fmt.BROADCAST}


def record(number: int) -> bytes:
    """A record that shows when it is torn."""
    body = b"%04d" % number * (1 + number % 40)
    return zlib.crc32(body).to_bytes(4, "little") + body


def number_of(content: bytes) -> int:
    """The number of an intact record."""
    assert zlib.crc32(content[4:]) == int.from_bytes(content[:4], "little"), "torn"
    return int(content[4:8])


def make(fs: Filesystem, name: bytes, kind: int) -> None:
    """Make a queue."""
    plan = fmt.plan(kind, RECORD, CELLS)
    size, head = fixed.whole_pages(plan.size), fmt.encode(plan)
    fs.change(lambda tx: names.make_fixed(tx, ROOT_INO, name, 0o600, size, ROOT, head))


@pytest.fixture
def laboratory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Laboratory]:
    """A region with a queue of each kind."""
    fates = Fates()
    fates.install(monkeypatch)
    with new_region(256 << 10, block_size=1024, peer_count=4) as made:
        fs = made.mount()
        for name, kind in KINDS.items():
            make(fs, name.encode(), kind)
        fs.unmount()
        yield Laboratory(made, fates)


def opened(fs: Filesystem, kind: str) -> Messages:
    """The queue of a kind as a mount has it."""
    return fs.messages(fs.lookup(ROOT_INO, kind.encode()).ino)


class Side(NamedTuple):
    """A peer and its queue."""

    peer: Peer
    messages: Messages

    def put(self, number: int) -> bool:
        return self.peer.quick(lambda _fs: self.messages.put(record(number)))

    def take(self) -> int | None:
        got = self.peer.quick(lambda _fs: self.messages.take())
        return None if got is None else number_of(got)

    def take_all(self) -> list[int]:
        found = []
        while (number := self.take()) is not None:
            found.append(number)
        return found

    def see_all(self) -> list[int]:
        """All records of a broadcast that are there."""
        found = list[int]()
        start = max(self.messages.ring.tail - CELLS, 0)
        while True:
            got, at = self.peer.quick(lambda _fs, at=start: self.messages.peek(at))  # type: ignore[misc]
            if got is None:
                return found
            found.append(number_of(got))
            start = at + 1


def sides(laboratory: Laboratory, world: bytes, kind: str) -> tuple[Side, Side]:
    """A victim and another peer."""
    laboratory.restore(world)
    peers = [laboratory.mounted() for _ in range(2)]
    victim, other = (Side(peer, opened(peer.fs, kind)) for peer in peers)
    return victim, other


class Scene(NamedTuple):
    """What was put before, and what the victim does."""

    kind: str
    before: int  # records 0 and on
    act: Callable[[Side], object]


SCENES = {
    "put": Scene("work", 0, lambda side: side.put(500)),
    "put-behind-others": Scene("work", 3, lambda side: side.put(500)),
    "put-into-a-full-one": Scene("work", CELLS, lambda side: side.put(500)),
    "take": Scene("work", 1, lambda side: side.take()),
    "take-from-a-full-one": Scene("work", CELLS, lambda side: side.take()),
    "broadcast": Scene("broadcast", 0, lambda side: side.put(500)),
    "broadcast-over-the-oldest": Scene("broadcast", CELLS + 2, lambda side: side.put(500)),
}


def events(laboratory: Laboratory, world: bytes, scene: Scene, *, loads: bool) -> int:
    """How many stores, or accesses, the victim's part takes."""
    victim, _ = sides(laboratory, world, scene.kind)
    for number in range(scene.before):
        assert victim.put(number)
    if not loads:
        before = victim.peer.memory.stores
        scene.act(victim)
        return victim.peer.memory.stores - before
    count = 0
    while True:
        victim, _ = sides(laboratory, world, scene.kind)
        for number in range(scene.before):
            victim.put(number)
        reached = False

        def note() -> None:
            nonlocal reached
            reached = True

        victim.peer.pause_at(count, note, loads=True)
        scene.act(victim)
        if not reached:
            return count
        count += 1


def check_free(laboratory: Laboratory, side: Side, kept: int) -> None:
    """All buffers but `kept` are free, after a collection."""
    side.peer.run(lambda fs: side.messages.ring.collect(fs.table.limits()))
    ring = side.messages.ring
    free = ring._blocks.free_count()
    assert free == BUFFERS - kept, f"{free} of {BUFFERS} buffers are free, {kept} hold records"
    assert_sound(laboratory.memory)


@pytest.mark.parametrize("name", SCENES)
def test_a_death_holds_up_nobody(laboratory: Laboratory, name: str) -> None:
    world, scene = laboratory.save(), SCENES[name]
    for event in range(events(laboratory, world, scene, loads=False)):
        victim, other = sides(laboratory, world, scene.kind)
        for number in range(scene.before):
            assert victim.put(number)
        victim.peer.die_at(event)
        with pytest.raises(Death):
            scene.act(victim)
        if scene.kind == "work":
            found = other.take_all()
            expected = set(range(scene.before))
            assert sorted(found) == found
            assert set(found) <= expected | {500}
            assert len(expected - set(found)) <= name.startswith("take")
            for number in range(CELLS):  # its place is not lost
                assert other.put(number)
            assert not other.put(99)
            assert other.take_all() == list(range(CELLS))
            kept = 0
        else:
            seen = other.see_all()
            after = [*range(scene.before), 500]
            assert any(seen == all_of[len(all_of) - len(seen) :] for all_of in (after, after[:-1]))
            assert len(seen) >= min(scene.before, CELLS - 1)
            for number in range(2 * CELLS):
                assert other.put(100 + number)
            assert other.see_all() == [100 + n for n in range(CELLS, 2 * CELLS)]
            kept = CELLS
        victim.peer.bury()
        for _ in range(12):
            other.peer.tick()
        assert not victim.peer.slot()
        check_free(laboratory, other, kept)


@pytest.mark.parametrize("loads", [False, True], ids=["stores", "loads"])
@pytest.mark.parametrize("name", SCENES)
def test_a_sleeper_tears_nothing(laboratory: Laboratory, name: str, loads: bool) -> None:
    """It is paused, others use every buffer, and it goes on."""
    world, scene = laboratory.save(), SCENES[name]
    step = 1 if not loads else 3
    for event in range(0, events(laboratory, world, scene, loads=loads), step):
        victim, other = sides(laboratory, world, scene.kind)
        for number in range(scene.before):
            assert victim.put(number)
        put, taken = list(range(scene.before)), list[int]()

        def meanwhile(other: Side = other, put: list[int] = put, taken: list[int] = taken) -> None:
            for number in range(1000, 1000 + 2 * BUFFERS):
                if scene.kind == "work":
                    got = other.take()
                    taken.extend([] if got is None else [got])
                if other.put(number):
                    put.append(number)

        victim.peer.pause_at(event, meanwhile, loads=loads)
        result = scene.act(victim)
        if result is True:
            put.append(500)
        elif isinstance(result, int) and not isinstance(result, bool):
            taken.append(result)
        if scene.kind == "work":
            taken += other.take_all()
            assert sorted(taken) == sorted(put), f"event {event}"
            check_free(laboratory, other, 0)
        else:
            assert set(other.see_all()) <= set(put)
            assert len(other.see_all()) == CELLS
            check_free(laboratory, other, CELLS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_of_a_silent_peer_is_kept_until_it_is_evicted(
    laboratory: Laboratory, kind: str
) -> None:
    """A writer sleeps with a claimed buffer; no other peer gets it meanwhile."""
    victim, other = sides(laboratory, laboratory.save(), kind)
    taken = list[int]()

    def meanwhile() -> None:
        member = other.peer.fs._volume.joined()
        other.messages.ring._blocks.claim(BUFFERS, member.begin(), 0)  # lost, as by deaths
        member.end()
        for number in range(1000, 1000 + 3 * BUFFERS):
            assert other.put(number)
            if kind == "work":
                got = other.take()
                if got in (1, 500):
                    taken.append(got)
                    got = other.take()
                assert got == number
        for _ in range(20):
            other.peer.tick()

    memory = victim.peer.memory
    before = memory.stores
    victim.put(1)
    stores = memory.stores - before
    victim.peer.pause_at(stores // 2, meanwhile)
    assert victim.put(500)
    if kind == "work":
        assert sorted([*other.take_all(), *taken]) == [1, 500]
    else:
        assert other.see_all()[-1] == 500


@pytest.mark.parametrize("loads", [False, True], ids=["stores", "loads"])
@pytest.mark.parametrize("name", SCENES)
def test_an_evicted_sleeper_tears_nothing(laboratory: Laboratory, name: str, loads: bool) -> None:
    """It is paused and evicted, its buffer is collected and used again, and it goes on."""
    world, scene = laboratory.save(), SCENES[name]
    step = 1 if not loads else 3
    for event in range(0, events(laboratory, world, scene, loads=loads), step):
        victim, other = sides(laboratory, world, scene.kind)
        for number in range(scene.before):
            assert victim.put(number)
        put, taken = list(range(scene.before)), list[int]()

        def meanwhile(
            victim: Side = victim,
            other: Side = other,
            put: list[int] = put,
            taken: list[int] = taken,
        ) -> None:
            member = victim.peer.fs._volume.joined()
            table = other.peer.fs.table
            assert table.retire(member.slot, table.state(member.slot))
            other.peer.run(lambda fs: other.messages.ring.collect(fs.table.limits()))
            for number in range(1000, 1000 + 2 * BUFFERS):
                if scene.kind == "work":
                    got = other.take()
                    taken.extend([] if got is None else [got])
                if other.put(number):
                    put.append(number)

        victim.peer.pause_at(event, meanwhile, loads=loads)
        result = scene.act(victim)
        if result is True:
            put.append(500)
        elif isinstance(result, int) and not isinstance(result, bool):
            taken.append(result)
        if scene.kind == "work":
            taken += other.take_all()
            assert sorted(taken) == sorted(put), f"event {event}"
        else:
            assert set(other.see_all()) <= set(put)
            assert len(other.see_all()) == CELLS


@pytest.mark.parametrize("kind", KINDS)
def test_a_sleeper_leaves_a_file_alone_that_was_released(laboratory: Laboratory, kind: str) -> None:
    """It slept, was evicted, and its queue's blocks became another file's."""
    victim, other = sides(laboratory, laboratory.save(), kind)
    assert victim.put(1)
    member = victim.peer.fs._volume.joined()
    table = other.peer.fs.table
    table.retire(member.slot, table.state(member.slot))

    def replace(fs: Filesystem) -> None:
        ino = fs.lookup(ROOT_INO, kind.encode()).ino
        fs.change(lambda tx: fixed.release(tx, ino))
        fs.unlink(ROOT_INO, kind.encode(), ROOT)

    other.peer.run(replace)
    content = bytes(other.peer.fs.statfs().blocks_avail * 1024 * 9 // 10)
    other.peer.run(lambda fs: put(fs, ROOT_INO, b"zeros", content))
    before = laboratory.memory.read(other.messages._place.offset, other.messages._place.size)
    for act in (lambda: victim.put(2), victim.take):
        with pytest.raises(StaleHandle, match="released"):
            act()
    assert laboratory.memory.read(other.messages._place.offset, len(before)) == before
