"""A region that is put back into the same state again and again, and peers with a fate.

Every peer has a mapping of its own, on which a trap counts its stores.  It has a process id of its
own, which the test declares alive or dead.  Everything else is real: `Watch.absent` decides that a
peer is surely gone, and asks whether that process exists.

Time is made up, so a loaded machine changes nothing.  It passes when a peer waits, and each peer
may have a wrong clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import pytest

from ivshmemfs.engine import Filesystem, lifetimes
from ivshmemfs.errors import Busy, Unfinished
from ivshmemfs.format import peer, superblock
from ivshmemfs.region import Memory, Region, open_region
from ivshmemfs.shm import identity
from tests.support.checks import free_blocks, unreachable
from tests.support.regions import TestRegion

T = TypeVar("T")

FIRST_PID = 1 << 40  # far above what Linux hands out
STARTED = 7
BOOT = b"boot of the tests"[:16]
BLINK = 0.1  # seconds for which a dead or paused peer may delay others
RETRY = 0.002  # seconds that a mount waits after a Busy, about
TICK = 1.0  # seconds between two ticks
RECOVERY_TICKS = 60


class Death(BaseException):
    """The peer stores nothing any more; not an Exception, so that no code handles it."""


class Clock:
    """Replaces the functions of the module `time` while a test runs."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.readings: dict[int, Callable[[float], float]] = {}
        self.reader = 0  # process that reads the clock

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.readings.get(self.reader, float)(self.now)

    def monotonic_ns(self) -> int:
        return int(self.monotonic() * 1e9)

    def time_ns(self) -> int:
        return 1_700_000_000_000_000_000 + self.monotonic_ns()

    def clock_gettime_ns(self, _clock: int) -> int:
        return self.time_ns()

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Fates:
    """Which processes are alive.  `acting` is the one that speaks."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.dead: set[int] = set()
        self._next = FIRST_PID
        self.acting = 0
        self._own = identity.current(0)._replace(proofs=peer.ALL_PROOFS, boot=BOOT)
        self._here = identity.surroundings()._replace(
            proofs=peer.BOOT_PROVES | peer.START_PROVES, boot=BOOT
        )
        self._real_exists = identity.process_exists
        self._real_start = identity.start_time

    def new(self) -> int:
        self._next += 1
        return self._next

    def current(self, incarnation: int) -> peer.SlotRecord:
        if not self.acting:
            return self._own._replace(incarnation=incarnation)
        return self._own._replace(incarnation=incarnation, pid=self.acting, pid_start=STARTED)

    def exists(self, pid: int) -> bool | None:
        return pid not in self.dead if pid >= FIRST_PID else self._real_exists(pid)

    def start_time(self, pid: int) -> int:
        return STARTED if pid >= FIRST_PID else int(self._real_start(pid))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(identity, "current", self.current)
        patch.setattr(identity, "process_exists", self.exists)
        patch.setattr(identity, "start_time", self.start_time)
        patch.setattr(identity, "surroundings", lambda: self._here)
        patch.setattr(lifetimes, "CAREFUL", -1.0)  # what was looked up is not kept open
        for reading in ("monotonic", "monotonic_ns", "time_ns", "clock_gettime_ns", "sleep"):
            patch.setattr(time, reading, getattr(self.clock, reading))

    @contextmanager
    def speaking(self, pid: int) -> Iterator[None]:
        before = self.acting
        self.acting = self.clock.reader = pid
        try:
            yield
        finally:
            self.acting = self.clock.reader = before


def _going_on(call: Callable[[], T]) -> Callable[[Filesystem], T]:
    return lambda _fs: call()


class Peer:
    """One process that maps the region, and its mount once it has one."""

    def __init__(self, laboratory: Laboratory, region: Region) -> None:
        self._laboratory = laboratory
        self._fates = laboratory.fates
        self.pid = self._fates.new()
        self.region = region
        self._fs: Filesystem | None = None

    @property
    def memory(self) -> Memory:
        return self.region.memory

    @property
    def fs(self) -> Filesystem:
        assert self._fs is not None
        return self._fs

    def mount(self) -> Filesystem:
        with self._fates.speaking(self.pid):
            self._fs = Filesystem.mount(self.region)
        return self._fs

    def run(self, action: Callable[[Filesystem], T], patience: float = 5.0) -> T:
        """What a mount does: again while it is Busy."""
        clock = self._fates.clock
        until = clock.now + patience
        with self._fates.speaking(self.pid):
            while True:
                try:
                    return action(self.fs)
                except Busy as busy:
                    if isinstance(busy, Unfinished) and busy.go_on is not None:
                        action = _going_on(cast("Callable[[], T]", busy.go_on))
                    if clock.now > until:
                        raise
                clock.sleep(RETRY)

    def quick(self, action: Callable[[Filesystem], T]) -> T:
        """The same; a dead or paused peer must not make it slow."""
        return self.run(action, patience=BLINK)

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self._fates.clock.sleep(TICK)
            self.run(lambda fs: fs.tick())

    def die_at(self, store: int) -> None:
        """Arrange that the peer dies before its `store`-th store from now."""

        def die() -> None:
            raise Death

        self.memory.trap(store, die)

    def pause_at(self, event: int, meanwhile: Callable[[], object], loads: bool = False) -> None:
        """Arrange that others do `meanwhile` before the peer's `event`-th store (or load)."""

        def others() -> None:
            with self._fates.speaking(0):
                meanwhile()

        self.memory.trap(event, others, loads)

    def bury(self) -> None:
        """From now on its peers can prove that it is gone."""
        self._fates.dead.add(self.pid)

    def slot(self) -> int:
        """The peer's slot, found by its process id; 0 if it has none."""
        found = [p.slot for p in self._laboratory.occupants() if p.record.pid == self.pid]
        return found[0] if found else 0


class Laboratory:
    """One region file and its saved states."""

    def __init__(self, made: TestRegion, fates: Fates) -> None:
        self.made = made
        self.fates = fates
        self.memory = made.region().memory
        self._open: list[Region] = []

    @property
    def path(self) -> Path:
        return self.made.path

    def save(self) -> bytes:
        """The bytes of the region."""
        return self.memory.read(0, self.memory.length)

    def close(self) -> None:
        """Close what the peers have mapped, which holds descriptors; they are over."""
        for region in self._open:
            region.close()
        self._open.clear()

    def restore(self, state: bytes) -> None:
        """Put the region back; all peers of before are over."""
        self.close()
        self.fates.dead.clear()
        self.fates.clock.readings.clear()
        self.memory.write(0, state)

    def newcomer(self) -> Peer:
        """A process that has mapped the region and not mounted it."""
        region = open_region(str(self.path))
        self._open.append(region)
        return Peer(self, region)

    def mounted(self) -> Peer:
        """A process that has the region mounted."""
        made = self.newcomer()
        made.mount()
        return made

    def occupants(self) -> list[peer.Occupant]:
        """All slots in use."""
        raw = self.memory.read(0, superblock.SUPERBLOCK.size)
        geometry = superblock.decode(raw).geometry
        table = self.memory.read(geometry.peers_offset, geometry.peer_count * peer.SLOT_SIZE)
        return list(peer.occupants(table, geometry.peer_count))


def settled(fs: Filesystem) -> bool:
    """Whether nothing is left of the dead: no slot, no orphan, no leak."""
    record = fs.view().root.record
    if record.orphans or unreachable(fs):
        return False
    return sum(1 for _ in fs.table.peers()) == 1


def recover(peer: Peer) -> None:
    """Let housekeeping do its work, without other calls."""
    for _ in range(RECOVERY_TICKS):
        if settled(peer.fs):
            return
        peer.tick()
    record = peer.fs.view().root.record
    raise AssertionError(
        f"after {RECOVERY_TICKS} ticks {free_blocks(peer.fs)} blocks are free, {record.used} used, "
        f"{record.orphans} orphans, peers {list(peer.fs.table.peers())}"
    )
