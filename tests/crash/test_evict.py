"""A silent peer keeps what it claimed until another knows, or is told, that it is gone."""

from __future__ import annotations

from contextlib import suppress

import pytest

from ivshmemfs.engine import ROOT_INO
from ivshmemfs.engine.collect import evict
from ivshmemfs.errors import InUse
from ivshmemfs.format import superblock, words
from ivshmemfs.shm.peers import PeerTable
from ivshmemfs.shm.published import Store
from tests.crash.cases import claims
from tests.crash.workloads import pattern
from tests.support.checks import assert_sound, unreachable
from tests.support.laboratory import Death, Laboratory, Peer, settled
from tests.support.regions import get, put


def silent_writer(laboratory: Laboratory) -> Peer:
    """A peer that stops in the middle of a write."""
    peer = laboratory.mounted()
    peer.die_at(60)
    with suppress(Death):
        peer.run(lambda fs: put(fs, ROOT_INO, b"new", pattern(20_000)))
    return peer


def test_silence_alone_frees_nothing(laboratory: Laboratory, world: bytes) -> None:
    laboratory.restore(world)
    watcher, silent = laboratory.mounted(), silent_writer(laboratory)
    slot = silent.slot()
    word = watcher.fs.table.state(slot)
    held = claims(watcher, slot, word)
    assert held
    watcher.tick(100)
    watcher.run(lambda fs: fs.collect())
    assert watcher.fs.table.state(slot) == word
    assert claims(watcher, slot, word) == held
    silent.bury()
    watcher.tick(12)
    assert settled(watcher.fs)


def test_an_administrator_evicts(laboratory: Laboratory, world: bytes) -> None:
    """Without being a peer; all that was lost comes back at once."""
    laboratory.restore(world)
    watcher, silent = laboratory.mounted(), silent_writer(laboratory)
    slot, lost = silent.slot(), unreachable(watcher.fs)
    region = laboratory.newcomer().region
    found = superblock.decode(region.memory.read(0, superblock.SUPERBLOCK.size), region.size)
    store = Store(region.memory, found)
    table = PeerTable(region.memory, found.geometry, store.commit_word)
    seen = table.state(slot)
    assert evict(store, table, slot, seen) == lost > 0
    assert table.state(slot) >> words.SLOT_SHIFT == words.FREE
    with pytest.raises(InUse):
        evict(store, table, slot, seen)
    assert settled(watcher.fs)
    assert not assert_sound(laboratory.memory).findings


def test_an_idle_peer_that_was_evicted_goes_on(laboratory: Laboratory, world: bytes) -> None:
    laboratory.restore(world)
    watcher, peer = laboratory.mounted(), laboratory.mounted()
    for _ in range(3):
        fs = watcher.fs
        evict(fs.store, fs.table, peer.slot(), fs.table.state(peer.slot()))
        assert peer.slot() == 0
        peer.quick(lambda fs: put(fs, ROOT_INO, b"new", pattern(5000)))
        assert peer.slot()
        assert watcher.quick(lambda fs: get(fs, ROOT_INO, b"new")) == pattern(5000)
    assert unreachable(watcher.fs) == 0
