"""Faults that are neither a death nor a pause: wrong clocks, no space, a region that goes away."""

from __future__ import annotations

import errno
import os
import random
import traceback
from collections.abc import Callable
from contextlib import suppress

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.errors import Busy, FsError, IvshmemfsError, TooManyPeers
from ivshmemfs.format import geometry
from ivshmemfs.region import Blocks
from mkfs.initial import Parameters
from mkfs.writer import format_region
from tests.crash import zombies
from tests.crash.cases import (
    act,
    check_aftermath,
    die,
    make_reference,
    set_up,
    settled_state,
)
from tests.crash.workloads import INOS, WORKLOADS, Scene, pattern
from tests.support.checks import assert_empty, assert_sound, detailed_tree, unreachable
from tests.support.figures import Figures
from tests.support.laboratory import BLINK, Laboratory, Peer, recover
from tests.support.regions import ROOT, get, put

# --- clocks ---------------------------------------------------------------------------------

CLOCKS: dict[str, Callable[[float], float]] = {
    "an hour ahead": lambda now: now + 3600,
    "an hour behind": lambda now: now - 3600,
    "ten times too fast": lambda now: now * 10,
    "ten times too slow": lambda now: now / 10,
    "backwards": lambda now: 1e6 - now,
}
TIMED = ("create", "append-map", "rename-over", "unlink-large", "write-many-blocks", "collect")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["victim", "other"])
@pytest.mark.parametrize("clock", CLOCKS)
def test_wrong_clocks(
    clock: str, wrong: str, laboratory: Laboratory, world: bytes, long_run: bool, figures: Figures
) -> None:
    """Deaths and pauses while one clock is wrong: nothing is lost, and no peer waits for long."""
    points = 0
    for name in TIMED:
        reference = make_reference(laboratory, world, [name])
        allowed = zombies.orders(laboratory, world, name, "conflict")
        every = 1 if long_run else 23
        for store in range(random.Random(name + clock).randrange(every), reference.stores, every):
            scene = set_up(laboratory, world, name)
            peer = scene.victim if wrong == "victim" else scene.other
            laboratory.fates.clock.readings[peer.pid] = CLOCKS[clock]
            assert die(scene, [name], store)
            check_aftermath(scene.other, reference, [scene.victim])

            laboratory.fates.dead.clear()
            case = zombies.Case(name, "conflict", store, False)
            zombies.run_case(laboratory, world, allowed, case, {wrong: CLOCKS[clock]})
            points += 2
    figures.count("deaths and pauses under wrong clocks", points, f"{clock}, {wrong}")


def test_times_come_from_whoever_changes(laboratory: Laboratory, world: bytes) -> None:
    laboratory.restore(world)
    one, two = laboratory.mounted(), laboratory.mounted()
    laboratory.fates.clock.readings[two.pid] = lambda now: now - 3600
    new = one.run(lambda fs: put(fs, ROOT_INO, b"new", b"x")).mtime_ns
    old = two.run(lambda fs: put(fs, ROOT_INO, b"old", b"x")).mtime_ns
    assert 3590 < (new - old) / 1e9 < 3610


# --- no space at every allocation -----------------------------------------------------------


class Scarce:
    """Blocks of which claims fail from the n-th on, or only the n-th, or give too few."""

    def __init__(self, blocks: Blocks, first: int, mode: str) -> None:
        self._blocks = blocks
        self._left = first
        self._mode = mode
        self.claims = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._blocks, name)

    def reclaim(self, pointers: bytes, tag: int) -> bytes:
        """Nothing: what was released before is taken by now, and all that is left is `claim`."""
        return b""

    def reclaim_last(self, known: bytearray, count: int, tag: int) -> list[bytes]:
        """The same."""
        return []

    def claim(self, count: int, tag: int, cursor: int) -> tuple[bytes, int]:
        self.claims += 1
        self._left -= 1
        if self._left >= 0 or (self._mode == "once" and self._left < -1):
            return self._blocks.claim(count, tag, cursor)
        if self._mode == "fewer" and count > 1:
            return self._blocks.claim(count // 2, tag, cursor)
        return b"", cursor


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["once", "always", "fewer"])
@pytest.mark.parametrize("name", [n for n, w in WORKLOADS.items() if w.mounted])
def test_no_space_at_every_allocation(
    name: str, mode: str, laboratory: Laboratory, world: bytes, figures: Figures
) -> None:
    """The operation fails whole (or a write becomes shorter), and no block is lost."""
    reference = make_reference(laboratory, world, [name])
    trees = [state.tree for state in reference.states]
    first, reached = 0, True
    while reached:
        scene = set_up(laboratory, world, name)
        fs = scene.victim.fs
        lost = unreachable(fs)
        scarce = Scarce(fs.store.blocks, first, mode)
        fs.store.blocks = scarce  # type: ignore[assignment]
        refused = False
        try:
            WORKLOADS[name].act(scene)
        except FsError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOLCK):
                raise
            refused = True
        reached = scarce.claims > first
        tree = scene.other.run(detailed_tree)
        if refused:
            assert tree == trees[0] or "truncating" in name
        elif not name.startswith(("write", "append", "xattr", "close", "unmount", "tick")):
            assert tree == trees[1]
        assert unreachable(fs) <= lost
        assert_sound(laboratory.memory)
        first += 1
    figures.count("ENOSPC at every allocation", first - 1, name)


# --- the table of peers ---------------------------------------------------------------------


def test_all_peers_are_killed(laboratory: Laboratory, world: bytes, long_run: bool) -> None:
    """Every slot is taken by a peer that died in the middle of something."""
    chance = random.Random(3)
    names = [n for n, w in WORKLOADS.items() if w.plain]
    for _ in range(100 if long_run else 10):
        laboratory.restore(world)
        victims = []
        for _ in range(6):
            victim = laboratory.mounted()
            victims.append(victim)
            scene, name = Scene(laboratory, victim, victim), chance.choice(names)
            with suppress(FsError):  # what it is about may be gone
                WORKLOADS[name].prepare(scene)
                die(scene, [name], chance.randrange(40))
        for victim in victims:
            victim.bury()
        survivor = laboratory.mounted()
        recover(survivor)
        report = assert_sound(laboratory.memory)
        assert not report.findings, str(report)
        survivor.quick(lambda fs: put(fs, ROOT_INO, b"afterwards", pattern(9000)))
        survivor.run(lambda fs: fs.unmount())


def test_the_last_slot(laboratory: Laboratory, world: bytes) -> None:
    laboratory.restore(world)
    peers = [laboratory.mounted() for _ in range(6)]
    for peer in peers[1:]:
        peer.pause_at(12, lambda: None)
        assert peer.fs._volume.member is not None
        peer.fs._volume.member.begin()  # at work, and silent
    peers[0].run(lambda fs: fs.unmount())
    last = laboratory.mounted()
    assert last.slot() == 1
    assert last.fs._volume.member is not None
    last.fs._volume.member.begin()
    with pytest.raises(TooManyPeers, match="evict"):
        laboratory.mounted()
    peers[3].bury()
    assert laboratory.mounted().slot() == 4


def test_a_mount_that_finds_no_slot_again_delays_nobody(
    laboratory: Laboratory, world: bytes
) -> None:
    """It was declared gone, and others fill the table: each call answers at once, until it fits."""
    laboratory.restore(world)
    one = laboratory.mounted()
    handle = one.run(lambda fs: fs.open(INOS[b"a"], os.O_RDWR, ROOT))
    slot = one.slot()
    assert one.fs.table.retire(slot, one.fs.table.state(slot))
    others = [laboratory.mounted() for _ in range(6)]
    for other in others:
        assert other.fs._volume.member is not None
        other.fs._volume.member.begin()  # none of them can be taken over
    told, now = set(), laboratory.fates.clock.now
    actions: list[Callable[[Filesystem], object]] = [
        lambda fs: fs.mkdir(ROOT_INO, b"new", 0o755, ROOT),
        lambda fs: fs.write(handle, 0, b"x"),
        lambda fs: fs.open(INOS[b"b"], os.O_RDONLY, ROOT),
        lambda fs: fs.create(ROOT_INO, b"newer", 0o600, os.O_RDWR, ROOT),
        lambda fs: fs.tick(),
    ]
    with laboratory.fates.speaking(one.pid):
        for _ in range(9):
            laboratory.fates.clock.sleep(0.5)
            now = laboratory.fates.clock.now
            for action in actions:
                with pytest.raises((Busy, TooManyPeers)) as caught:
                    action(one.fs)
                told.add(type(caught.value))
                assert one.fs.getattr(ROOT_INO).ino == ROOT_INO  # looking needs no slot
            assert laboratory.fates.clock.now - now < BLINK
    assert told == {Busy, TooManyPeers}
    others[2].bury()
    one.quick(actions[0])
    assert one.slot() == 3
    one.run(lambda fs: fs.write(handle, 0, b"x"))
    one.run(lambda fs: fs.release(handle))
    assert not one.fs._openfiles.counts


def test_who_was_declared_gone_in_the_middle_has_one_slot(
    laboratory: Laboratory, world: bytes
) -> None:
    laboratory.restore(world)
    one, other = laboratory.mounted(), laboratory.mounted()
    for store in range(3, 12):

        def evict() -> None:
            assert other.fs.table.retire(one.slot(), other.fs.table.state(one.slot()))

        one.memory.trap(store, evict)
        one.run(lambda fs: put(fs, ROOT_INO, b"new", pattern(3000)))
        assert [peer.record.pid for peer in laboratory.occupants()].count(one.pid) == 1
        one.tick(5)
        assert unreachable(other.fs) == 0


def test_what_was_committed_is_told_even_when_no_slot_is_left(
    laboratory: Laboratory, world: bytes
) -> None:
    """Declared gone right after its commit: the caller must not do it once more."""
    laboratory.restore(world)
    one, others = laboratory.mounted(), [laboratory.mounted() for _ in range(5)]

    def evict_and_fill() -> None:
        table = others[0].fs.table
        assert table.retire(one.slot(), table.state(one.slot()))
        for other in (*others, laboratory.mounted()):
            assert other.fs._volume.member is not None
            other.fs._volume.member.begin()

    with laboratory.fates.speaking(one.pid):
        handle = one.fs.open(INOS[b"a"], os.O_WRONLY | os.O_APPEND, ROOT)
        stores = one.memory.stores
        one.fs.write(handle, 0, b"first")
        taken = one.memory.stores - stores
        one.memory.trap(taken - 2, evict_and_fill)  # left: ending the transaction, and the hint
        assert one.fs.write(handle, 0, b"second") == 6
    content = others[0].run(lambda fs: get(fs, ROOT_INO, b"a"))
    assert content.endswith(b"firstsecond")
    assert content.count(b"second") == 1


def test_open_files_of_the_dead_are_given_back(laboratory: Laboratory, world: bytes) -> None:
    laboratory.restore(world)
    one, two = laboratory.mounted(), laboratory.mounted()
    before = settled_state(two)
    for n in range(5):
        handle, _ = one.run(
            lambda fs: fs.create(ROOT_INO, b"open%d" % n, 0o600, os.O_RDWR, ROOT)  # noqa: B023
        )
        one.run(lambda fs: fs.write(handle, 0, pattern(5000, n)))  # noqa: B023
        two.run(lambda fs: fs.unlink(ROOT_INO, b"open%d" % n, ROOT))  # noqa: B023
    two.tick(12)
    assert two.fs.view().root.record.orphans == 5
    one.bury()
    recover(two)
    assert settled_state(two) == before


# --- the region goes away -------------------------------------------------------------------

ACTIONS: dict[str, Callable[[Filesystem], object]] = {
    "getattr": lambda fs: fs.getattr(ROOT_INO),
    "lookup": lambda fs: fs.lookup(ROOT_INO, b"c"),
    "readdir": lambda fs: list(fs.readdir(fs.opendir(ROOT_INO), 0)),
    "read": lambda fs: get(fs, ROOT_INO, b"c"),
    "write": lambda fs: put(fs, ROOT_INO, b"c", pattern(3000)),
    "create": lambda fs: put(fs, ROOT_INO, b"new", b"new"),
    "unlink": lambda fs: fs.unlink(ROOT_INO, b"b", ROOT),
    "statfs": lambda fs: fs.statfs(),
    "tick": lambda fs: fs.tick(),
    "collect": lambda fs: fs.collect(),
}


def complaints(peer: Peer) -> set[int]:
    """What each action is answered; 0 for success."""
    found = set()
    for action in ACTIONS.values():
        try:
            peer.quick(action)
            found.add(0)
        except (IvshmemfsError, OSError) as error:
            found.add(error.errno or 0)
    return found


@pytest.mark.parametrize("kept", [0, 4096, 60_000, 200_000])
def test_a_truncated_region(laboratory: Laboratory, world: bytes, kept: int) -> None:
    laboratory.restore(world)
    one, two = laboratory.mounted(), laboratory.mounted()
    size = laboratory.path.stat().st_size
    try:
        one.run(lambda fs: get(fs, ROOT_INO, b"a"))
        os.truncate(laboratory.path, kept)
        for peer in (one, two):
            assert complaints(peer) <= {0, errno.EIO, errno.ESTALE, errno.ENOENT}
        with suppress(IvshmemfsError, OSError):
            one.fs.unmount()
        os.truncate(laboratory.path, size)
        for peer in (one, two):  # zeros now
            left = {errno.EROFS} if peer is one else set()
            assert complaints(peer) <= {0, errno.EUCLEAN, errno.ESTALE, errno.ENOENT} | left
        assert not any(laboratory.memory.read(kept, size - kept)) or kept
    finally:
        os.truncate(laboratory.path, size)


@pytest.mark.parametrize(
    "plan",
    [
        {"block_size": 1024, "peer_count": 6},
        {"block_size": 1024, "peer_count": 1},
        {"block_size": 4096, "peer_count": 16},
        {"block_size": 2048, "peer_count": 3},
    ],
)
def test_a_region_formatted_anew_under_mounts(
    laboratory: Laboratory, world: bytes, plan: dict[str, int]
) -> None:
    """The old mounts get ESTALE for every call, and the new filesystem stays as it was."""
    laboratory.restore(world)
    old = [laboratory.mounted() for _ in range(4)]
    handles = [p.run(lambda fs: fs.create(1, b"f", 0o600, os.O_RDWR, ROOT))[0] for p in old]
    size = laboratory.path.stat().st_size
    formatter = laboratory.newcomer()
    with laboratory.fates.speaking(formatter.pid):
        format_region(formatter.memory, geometry.plan(size, **plan), Parameters(os.urandom(16)))
    new = laboratory.mounted()
    new.run(lambda fs: put(fs, ROOT_INO, b"new", pattern(9000)))
    before = laboratory.save()
    for peer, handle in zip(old, handles, strict=True):
        answers = complaints(peer)
        assert answers == {errno.ESTALE}
        for action in (
            lambda fs: fs.read(handle, 0, 10),  # noqa: B023
            lambda fs: fs.write(handle, 0, b"x" * 5000),  # noqa: B023
        ):
            with pytest.raises(FsError) as caught:
                peer.quick(action)
            assert caught.value.errno == errno.ESTALE
        with suppress(IvshmemfsError):
            peer.fs.release(handle)
        peer.fs.unmount()
    assert laboratory.save() == before
    assert new.run(lambda fs: get(fs, ROOT_INO, b"new")) == pattern(9000)
    new.run(lambda fs: fs.unlink(ROOT_INO, b"new", ROOT))
    assert_empty(new.fs)
    assert not assert_sound(laboratory.memory).findings


def test_a_region_file_that_is_made_again(laboratory: Laboratory, world: bytes) -> None:
    """Old mounts keep the old memory; they neither crash nor touch the new file."""
    laboratory.restore(world)
    old = laboratory.mounted()
    kept = laboratory.path.read_bytes()
    away = laboratory.path.with_name("away")
    laboratory.path.rename(away)
    try:
        laboratory.path.write_bytes(world)
        assert complaints(old) == {0}
        assert laboratory.path.read_bytes() == world
    finally:
        away.replace(laboratory.path)
        laboratory.memory.write(0, kept)


# --- a machine is put back into an older state ----------------------------------------------


def _in_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process; its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
    raise AssertionError


def test_a_snapshot_restored_between_operations(
    laboratory: Laboratory, world: bytes, figures: Figures
) -> None:
    """All that the machine knows is old: caches, counters, its slot; it notices and goes on.

    The child goes on with the region and is then no more; this process is the restored machine.
    """
    chance = random.Random(4)
    names = [n for n, w in WORKLOADS.items() if w.plain]
    rounds = 12
    for _ in range(rounds):
        laboratory.restore(world)
        machine, other = laboratory.mounted(), laboratory.mounted()
        machine.run(lambda fs: put(fs, ROOT_INO, b"before", pattern(4000)))
        handle = machine.run(lambda fs: fs.open(fs.lookup(ROOT_INO, b"suid").ino, os.O_RDWR, ROOT))
        machine.run(detailed_tree)
        chosen = chance.choices(names, k=4)

        def go_on() -> None:
            """What the machine did after the snapshot, and others then."""
            for name in chosen:  # noqa: B023
                scene = Scene(laboratory, machine, other)  # noqa: B023
                with suppress(FsError):  # what it is about may be gone
                    WORKLOADS[name].prepare(scene)
                    act(scene, [name])
            machine.run(lambda fs: fs.unmount())  # noqa: B023
            machine.mount()  # noqa: B023
            machine.run(lambda fs: fs.unlink(ROOT_INO, b"before", ROOT))  # noqa: B023
            zombies.SCRIPTS["churn"](other)  # noqa: B023

        assert _in_child(go_on) == 0
        expected = other.run(detailed_tree)
        assert machine.run(detailed_tree) == expected
        new = machine.run(lambda fs: put(fs, ROOT_INO, b"restored", pattern(7000)))
        assert new.size == 7000
        machine.run(lambda fs: fs.write(handle, 0, b"restored"))  # noqa: B023
        machine.run(lambda fs: fs.release(handle))  # noqa: B023
        machine.run(lambda fs: fs.unlink(ROOT_INO, b"restored", ROOT))
        found = machine.run(detailed_tree)
        found.pop(b"suid"), expected.pop(b"suid")  # written to just now
        assert found == expected
        machine.run(lambda fs: fs.unmount())
        for lost in laboratory.occupants():  # as which it went on: an administrator says so
            if lost.record.pid == machine.pid:
                assert other.fs.table.retire(lost.slot, lost.record.state)
        recover(other)
        assert not assert_sound(laboratory.memory).findings
    figures.count("snapshots restored between operations", rounds, "seeded")
