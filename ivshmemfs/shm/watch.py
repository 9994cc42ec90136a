"""Which peers show life, which are silent, and which are surely gone, for every layer.

A slot shows life when its state word, its heartbeat or its nonce changes.  The watcher measures
silence with its own clock.  At most `LOOK` seconds count between two looks: a watcher that was
itself stopped has learnt nothing.

`Watch.absent` is the one rule that declares a peer dead: its process is gone
(`identity.presence`), *and* it has been silent for `SILENCE`.  A mount applies the rule at its
ticks.  A command waits until the rule decides (`living`), if a peer's process is gone.
"""

from __future__ import annotations

import time
import uuid as _uuid

from ivshmemfs.format import peer, words
from ivshmemfs.format.geometry import Geometry
from ivshmemfs.format.peer import MACHINE_PROVES, Occupant
from ivshmemfs.region import Memory
from ivshmemfs.shm import identity
from ivshmemfs.shm.identity import Presence, Surroundings

SILENCE = 3.0  # seconds without a sign of life; a living mount shows one each second
LOOK = 1.0  # most seconds that count between two looks
MACHINES = 1024  # most hardware UUIDs that a watcher remembers
BOOTS = 4  # most boot ids remembered for each UUID
POLL = 0.05  # seconds between two looks of a watcher that waits

Sign = tuple[int, int, int]  # state word, heartbeat, nonce


class Machines:
    """Hardware UUIDs that were seen on two machines at once; these prove nothing.

    A kernel's boot id never comes back.  So two kernels are running if signs of life come from one
    boot id, then from another, then from the first again.
    """

    def __init__(self) -> None:
        self.shared: set[bytes] = set()
        self._boots: dict[bytes, list[bytes]] = {}

    def alive(self, machine: bytes, boot: bytes) -> None:
        """Note a sign of life from this machine and boot id."""
        boots = self._boots.setdefault(machine, [])
        if boot in boots[:-1] and len(self.shared) < MACHINES:
            self.shared.add(machine)
        elif boot not in boots:
            boots.append(boot)
            del boots[:-BOOTS]
        while len(self._boots) > MACHINES:  # a damaged region may name any number
            del self._boots[next(iter(self._boots))]

    @staticmethod
    def name(machine: bytes) -> str:
        """Return a hardware UUID as text."""
        return str(_uuid.UUID(bytes=machine))


class Watch:
    """The signs of life that one process has seen in the slots of one region.  Not thread-safe."""

    def __init__(self, memory: Memory, geometry: Geometry) -> None:
        self.machines = Machines()
        self._memory = memory
        self._base, self._count = geometry.peers_offset, geometry.peer_count
        self._signs: dict[int, Sign] = {}
        self._looked: dict[int, float] = {}
        self._silence: dict[int, float] = {}
        self._beating: set[int] = set()  # slots that showed life in their present incarnation
        self._known: dict[int, tuple[int, bytes, bytes]] = {}  # incarnation, machine, boot
        self._here: Surroundings | None = None

    # --- looking --------------------------------------------------------------------------

    def look(self) -> None:
        """Look at all slots."""
        columns = [
            self._memory.load_column(self._base + at, peer.SLOT_SIZE, self._count)
            for at in (peer.STATE_OFFSET, peer.HEARTBEAT_OFFSET, peer.NONCE_OFFSET)
        ]
        for slot, sign in enumerate(zip(*columns, strict=True), 1):
            self._note(slot, sign)

    def see(self, slot: int) -> None:
        """Look at one slot."""
        at = self._base + (slot - 1) * peer.SLOT_SIZE
        sign = (
            self._memory.load(at + peer.STATE_OFFSET),
            self._memory.load(at + peer.HEARTBEAT_OFFSET),
            self._memory.load(at + peer.NONCE_OFFSET),
        )
        self._note(slot, sign)

    def _note(self, slot: int, sign: Sign) -> None:
        before, now = self._signs.get(slot), time.monotonic()
        if sign != before:
            self._signs[slot], self._silence[slot] = sign, 0.0
            self._note_change(slot, before, sign)
        else:  # abs: the clock may go backwards
            self._silence[slot] += min(abs(now - self._looked[slot]), LOOK)
        self._looked[slot] = now

    def _note_change(self, slot: int, before: Sign | None, now: Sign) -> None:
        state, incarnation, _ = words.split_state(now[0])
        same = before is not None and words.split_state(before[0])[1] == incarnation
        if not same or state not in (words.IDLE, words.ACTIVE):
            self._beating.discard(slot)
            return
        self._beating.add(slot)
        known = self._known.get(slot)
        if known is None or known[0] != incarnation:
            known = self._known[slot] = (incarnation, *self._machine_of(slot, incarnation))
        if known[1]:
            self._note_here()
            self.machines.alive(known[1], known[2])
            self._note_here()

    def _machine_of(self, slot: int, incarnation: int) -> tuple[bytes, bytes]:
        found = self.occupant(slot)
        proves = found.identity_valid and found.record.proofs & MACHINE_PROVES
        if found.incarnation != incarnation or not proves:
            return b"", b""
        return found.record.machine, found.record.boot

    def _note_here(self) -> None:
        """Note this machine too: it shows life by looking."""
        if self._here is None:
            self._here = identity.surroundings()
        if self._here.proofs & MACHINE_PROVES:
            self.machines.alive(self._here.machine, self._here.boot)

    def occupant(self, slot: int) -> Occupant:
        """Return the present contents of a slot."""
        at = self._base + (slot - 1) * peer.SLOT_SIZE
        return peer.occupant(slot, self._memory.read(at, peer.SLOT_SIZE))

    # --- what was seen --------------------------------------------------------------------

    def beats(self, slot: int) -> bool:
        """Return whether this watch has seen the present owner of a slot show life."""
        return slot in self._beating

    def silence(self, slot: int, word: int) -> float:
        """Return the seconds for which a slot was seen unchanged with state word `word`."""
        seen = self._signs.get(slot)
        return self._silence[slot] if seen is not None and seen[0] == word else 0.0

    def silent(self, slot: int, word: int) -> bool:
        """Return whether that is at least `SILENCE`."""
        seen = self._signs.get(slot)
        return seen is not None and seen[0] == word and self._silence[slot] >= SILENCE

    def absent(self, other: Occupant, here: Surroundings | None = None) -> bool:
        """Return whether the owner of a slot is surely gone: the one rule that decides it."""
        if not self.silent(other.slot, other.word) or not self.vanished(other, here):
            return False
        self.see(other.slot)  # it may have marked the slot, because of a twin, before it ended
        return self.silent(other.slot, other.word)

    def vanished(self, other: Occupant, here: Surroundings | None = None) -> bool:
        """Return whether the owner's process is gone; `absent` needs silence besides."""
        if not other.identity_valid:
            return False
        return identity.presence(other.record, here, self.machines.shared) is Presence.GONE

    # --- for commands ---------------------------------------------------------------------

    def decide(self) -> list[Occupant]:
        """Return all slots in use whose owner is not surely gone.

        Waits up to `SILENCE` seconds if a process is gone and the slot's silence is not yet known.
        """
        self.look()
        while True:
            here = identity.surroundings()
            found = [self.occupant(slot) for slot in range(1, self._count + 1)]
            used = [other for other in found if other.state != words.FREE]
            gone = [other for other in used if self.vanished(other, here)]
            absent = [other.slot for other in gone if self.absent(other, here)]
            if len(absent) == len(gone) or all(
                self.beats(other.slot) for other in gone if other.slot not in absent
            ):
                return [other for other in used if other.slot not in absent]
            time.sleep(POLL)
            self.look()


def living(memory: Memory, geometry: Geometry) -> tuple[Occupant, ...]:
    """Return all peers that are not surely gone, for commands; see `Watch.decide`."""
    return tuple(Watch(memory, geometry).decide())
