"""What `top` and `metrics` read of a region: its root, its slots, and what changed meanwhile.

A peer publishes its statistics once a second, with its heartbeat.  So a rate is taken between two
heartbeats: the moments at which the watcher saw them.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from ivshmemfs.errors import Busy, Corrupt
from ivshmemfs.format import node, superblock, words
from ivshmemfs.format.node import RootRecord
from ivshmemfs.format.peer import Occupant
from ivshmemfs.format.superblock import Superblock
from ivshmemfs.region import Region
from ivshmemfs.shm.peers import PeerTable
from ivshmemfs.shm.published import Store

LOOKS: Final = 0.1  # seconds between two looks at heartbeats
WORD: Final = 1 << 64


class Rates(NamedTuple):
    """What one peer did, per second."""

    operations: float
    bytes_read: float
    bytes_written: float
    retries: float


IDLE: Final = Rates(0.0, 0.0, 0.0, 0.0)


class Reading(NamedTuple):
    """One look at a region."""

    commit: int  # the commit word
    root: RootRecord | None  # None: a repair, or damage, hides it
    peers: tuple[Occupant, ...]


class Readings:
    """Looks at one region, one after the other.  Stores nothing in it."""

    def __init__(self, region: Region) -> None:
        raw = region.memory.read(superblock.OFFSET, superblock.SUPERBLOCK.size)
        self.superblock: Final[Superblock] = superblock.decode(raw, region.size)
        self._store = Store(region.memory, self.superblock)
        self._table = PeerTable(region.memory, self.superblock.geometry, self._store.commit_word)
        self._beats: dict[int, tuple[int, int]] = {}  # state word and heartbeat, by slot
        self._moments: dict[int, float] = {}  # when that heartbeat was seen first
        self._before: dict[int, tuple[Occupant, float]] = {}  # of the last rates
        self._rates: dict[int, Rates] = {}

    def read(self) -> Reading:
        """Return what the region has now.  Raises StaleHandle when it was formatted anew."""
        root: RootRecord | None = None
        try:
            word, found = self._store.snapshot()
            root = node.ROOT_RECORD.unpack(found.data, node.HEADER_SIZE)
        except (Busy, Corrupt):
            word = self._store.commit_word.load()
        self._look()
        return Reading(word, root, tuple(self._table.peers()))

    def wait(self, seconds: float) -> None:
        """Let time pass, and note heartbeats."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOKS))
            self._look()

    def _look(self) -> None:
        self._table.watch.look()
        now, beats = time.monotonic(), self._table.heartbeats()
        for slot, seen in beats.items():
            before = self._beats.get(slot)
            if before is None or before[1] != seen[1]:
                self._moments[slot] = now
        self._beats = beats

    def silence(self, peer: Occupant) -> float:
        """Return the seconds for which a peer was seen to show no life."""
        return self._table.watch.silence(peer.slot, peer.word)

    def rates(self, peer: Occupant) -> Rates:
        """Return what a peer of the last reading did since the call before.

        A peer that has not beaten since keeps its rates, until it is silent.
        """
        moment = self._moments.get(peer.slot, 0.0)
        before, at = self._before.get(peer.slot, (None, 0.0))
        if before is None or before.incarnation != peer.incarnation:
            self._before[peer.slot] = peer, moment
            self._rates[peer.slot] = IDLE
        elif moment > at:
            self._before[peer.slot] = peer, moment
            self._rates[peer.slot] = _between(before, peer, moment - at)
        elif self._table.watch.silent(peer.slot, peer.word):
            self._rates[peer.slot] = IDLE
        return self._rates[peer.slot]


def commits(before: int, now: int) -> int:
    """Return how many commits are between two commit words."""
    return (words.split_commit(now)[0] - words.split_commit(before)[0]) & words.SEQUENCE_MASK


def _between(before: Occupant, now: Occupant, seconds: float) -> Rates:
    old, new = before.record, now.record
    return Rates(
        (new.operations - old.operations) % WORD / seconds,
        (new.bytes_read - old.bytes_read) % WORD / seconds,
        (new.bytes_written - old.bytes_written) % WORD / seconds,
        (new.retries - old.retries) % WORD / seconds,
    )
