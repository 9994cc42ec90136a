"""Silence, and what is concluded from it together with an identity."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ivshmemfs.format import peer, superblock, words
from ivshmemfs.shm import identity, watch
from ivshmemfs.shm.identity import Presence
from ivshmemfs.shm.watch import Machines, Watch, living
from tests.shm.conftest import Member
from tests.support.laboratory import Fates
from tests.support.regions import TestRegion

New = Callable[[], Member]
TOP = Path(__file__).resolve().parents[2]
MACHINE = b"machine of tests"
BOOTS = (b"boot of machine1", b"boot of machine2")


@pytest.fixture
def joined(new: New, fates: Fates) -> Callable[[], tuple[Member, int]]:
    """Makes peers that have joined, each in a process of its own."""

    def make() -> tuple[Member, int]:
        member, pid = new(), fates.new()
        with fates.speaking(pid):
            member.membership.join(wait=0)
        return member, pid

    return make


Joined = Callable[[], tuple[Member, int]]


def look(watching: Watch, fates: Fates, seconds: float) -> None:
    """Once a second."""
    for _ in range(int(seconds)):
        fates.clock.sleep(1)
        watching.look()


def test_silence_counts_from_the_first_look(joined: Joined, fates: Fates) -> None:
    watcher, _ = joined()
    other, _ = joined()
    watching, word = watcher.table.watch, other.table.state(2)
    fates.clock.sleep(100)
    watching.look()
    assert watching.silence(2, word) == 0
    look(watching, fates, 2)
    assert 2 <= watching.silence(2, word) < watch.SILENCE
    assert not watching.silent(2, word)
    look(watching, fates, 1)
    assert watching.silent(2, word)
    assert not watching.silent(2, word + 1)


def test_a_look_counts_for_a_second_at_most(joined: Joined, fates: Fates) -> None:
    """A watcher that was stopped itself, with its whole machine, takes no peer for dead."""
    watcher, _ = joined()
    other, _ = joined()
    watching, word = watcher.table.watch, other.table.state(2)
    watching.look()
    fates.clock.sleep(3600)
    watching.look()
    assert watching.silence(2, word) == watch.LOOK


@pytest.mark.parametrize("sign", ["beat", "begin"])
def test_every_sign_of_life_ends_silence(sign: str, joined: Joined, fates: Fates) -> None:
    watcher, _ = joined()
    other, _ = joined()
    watching = watcher.table.watch
    watching.look()
    look(watching, fates, 5)
    assert watching.silent(2, watcher.table.state(2))
    assert not watching.beats(2)
    getattr(other.membership, sign)()
    watching.look()
    assert watching.silence(2, watcher.table.state(2)) == 0
    assert watching.beats(2)


def test_a_newcomer_in_a_slot_is_somebody_else(joined: Joined, fates: Fates) -> None:
    watcher, _ = joined()
    other, _ = joined()
    watching = watcher.table.watch
    watching.look()
    other.membership.beat()
    watching.look()
    assert watching.beats(2)
    other.membership.leave()
    joined()
    watching.look()
    assert not watching.beats(2)


@pytest.mark.parametrize("presence", list(Presence))
@pytest.mark.parametrize("seconds", [1, 4])
@pytest.mark.parametrize("state", [words.IDLE, words.ACTIVE])
def test_absent_is_gone_and_silent(
    presence: Presence,
    seconds: int,
    state: int,
    joined: Joined,
    fates: Fates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watcher, _ = joined()
    other, _ = joined()
    if state == words.ACTIVE:
        other.membership.begin()
    monkeypatch.setattr(identity, "presence", lambda *_: presence)
    watching = watcher.table.watch
    watching.look()
    look(watching, fates, seconds)
    dead = presence is Presence.GONE and seconds > watch.SILENCE
    assert watching.absent(watcher.table.peer(2)) == dead
    assert watcher.table.retire_gone(1) == dead


def test_nobody_decides_by_another_rule() -> None:
    """Only the watch asks for the presence of a process, and only identity.py for processes."""
    asking = re.compile(r"\bpresence\(|\bprocess_exists\(|\bstart_time\(|/proc/\{")
    askers = {
        path.name
        for folder in ("shm", "engine", "fsck")
        for path in (TOP / "ivshmemfs" / folder).glob("*.py")
        if asking.search(path.read_text())
    }
    askers |= {p.name for p in (TOP / "mkfs").glob("*.py") if asking.search(p.read_text())}
    assert askers == {"identity.py", "watch.py"}


# --- for commands ---------------------------------------------------------------------------


def read_living(member: Member) -> list[int]:
    raw = member.memory.read(0, superblock.SUPERBLOCK.size)
    return [other.slot for other in living(member.memory, superblock.decode(raw).geometry)]


def test_a_command_waits_only_for_who_seems_to_be_gone(joined: Joined, fates: Fates) -> None:
    watcher, _ = joined()
    _, pid = joined()
    before = fates.clock.now
    assert read_living(watcher) == [1, 2]
    assert fates.clock.now - before < watch.POLL
    fates.dead.add(pid)
    assert read_living(watcher) == [1]
    assert watch.SILENCE <= fates.clock.now - before < watch.SILENCE + 1


def test_who_seems_to_be_gone_and_shows_life_lives(
    joined: Joined, fates: Fates, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher, _ = joined()
    other, pid = joined()
    fates.dead.add(pid)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        fates.clock.sleep(seconds)
        if len(slept) == 5:
            other.membership.beat()

    monkeypatch.setattr(time, "sleep", sleep)
    assert read_living(watcher) == [1, 2]
    assert len(slept) == 5


def test_nobody_there(new: New, made: TestRegion) -> None:
    assert read_living(new()) == []


# --- hardware UUIDs -------------------------------------------------------------------------


def test_boots_that_follow_each_other_are_of_one_machine() -> None:
    machines = Machines()
    for boot in (b"1", b"1", b"2", b"2", b"3"):
        machines.alive(MACHINE, boot)
        machines.alive(b"another", b"4")
    assert not machines.shared
    machines.alive(MACHINE, b"2")
    assert machines.shared == {MACHINE}


def test_what_is_remembered_is_bounded() -> None:
    """A hostile region may name another machine each second."""
    machines = Machines()
    for number in range(5000):
        for boot in (b"1", b"2", b"1"):
            machines.alive(number.to_bytes(16, "little"), boot)
    assert len(machines._boots) <= watch.MACHINES
    assert len(machines.shared) <= watch.MACHINES


def on_machines(fates: Fates, patch: pytest.MonkeyPatch) -> None:
    """Each odd process runs on one machine, each even one on another with the same UUID."""

    def current(incarnation: int) -> peer.SlotRecord:
        boot = BOOTS[fates.acting % 2]
        return fates.current(incarnation)._replace(machine=MACHINE, boot=boot)

    def surroundings() -> identity.Surroundings:
        boot = BOOTS[fates.acting % 2]
        return identity.Surroundings(boot, MACHINE, 1, 1, peer.ALL_PROOFS)

    patch.setattr(identity, "current", current)
    patch.setattr(identity, "surroundings", surroundings)


def test_two_machines_with_one_uuid(
    made: TestRegion,
    fates: Fates,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Found out while both live; from then on neither is judged by it, also by newcomers."""
    on_machines(fates, monkeypatch)
    one, two = fates.new(), fates.new()
    with fates.speaking(one):
        first = made.mount()
    with fates.speaking(two):
        second = made.mount()
        place = second.peer_id[0]
    for _ in range(3):
        fates.clock.sleep(1)
        for pid, fs in ((one, first), (two, second)):
            with fates.speaking(pid):
                fs.tick()
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "6d616368-696e-6520-6f66-207465737473" in text]) == 2
    with fates.speaking(one):
        found = first.table.peer(place)
        assert not found.record.proofs & peer.MACHINE_PROVES
        assert identity.presence(found.record) is Presence.UNKNOWN
        for _ in range(8):  # the second is paused
            fates.clock.sleep(1)
            first.tick()
        assert first.table.state(place) >> words.SLOT_SHIFT == words.IDLE


def test_a_machine_that_was_started_anew(
    made: TestRegion, fates: Fates, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machines(fates, monkeypatch)
    before, now = fates.new(), fates.new()
    with fates.speaking(before):
        first = made.mount()
        place = first.peer_id[0]
    with fates.speaking(now):
        second = made.mount()
        assert second.table.state(place) >> words.SLOT_SHIFT == words.IDLE
        for _ in range(8):
            fates.clock.sleep(1)
            second.tick()
        assert second.table.state(place) >> words.SLOT_SHIFT == words.FREE
