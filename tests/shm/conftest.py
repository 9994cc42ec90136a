"""A small region, its control words and its peer table, without any filesystem semantics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ivshmemfs.format import superblock
from ivshmemfs.format.superblock import Superblock
from ivshmemfs.region import Memory
from ivshmemfs.shm.commit import CommitWord
from ivshmemfs.shm.membership import Membership
from ivshmemfs.shm.peers import PeerTable
from ivshmemfs.shm.published import Store
from tests.support.checks import assert_sound
from tests.support.laboratory import Fates
from tests.support.regions import TestRegion, new_region

SLOTS = 3


class Member:
    """One peer as this layer knows it."""

    def __init__(self, memory: Memory, found: Superblock) -> None:
        self.memory = memory
        self.store = Store(memory, found)
        self.table = PeerTable(memory, found.geometry, self.store.commit_word)
        self.membership = Membership(self.table)

    @property
    def commit_word(self) -> CommitWord:
        return self.store.commit_word


@pytest.fixture
def made() -> Iterator[TestRegion]:
    with new_region(128 << 10, block_size=1024, peer_count=SLOTS) as region:
        yield region
        with region.region(readonly=True) as look:
            assert_sound(look.memory)


@pytest.fixture
def fates(monkeypatch: pytest.MonkeyPatch) -> Fates:
    """Process ids that are alive until the test says otherwise."""
    fates = Fates()
    fates.install(monkeypatch)
    return fates


@pytest.fixture
def new(made: TestRegion) -> Callable[[], Member]:
    """Makes peers that have not joined yet, each with a mapping of its own."""

    def make() -> Member:
        memory = made.region().memory
        raw = memory.read(0, superblock.SUPERBLOCK.size)
        return Member(memory, superblock.decode(raw))

    return make
