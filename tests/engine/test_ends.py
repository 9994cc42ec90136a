"""How a change begins and ends when a word of the protocol is not the one that it expects."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem, names
from ivshmemfs.engine.inode import Context
from ivshmemfs.engine.transaction import Transaction
from ivshmemfs.errors import Busy
from ivshmemfs.format import peer, words
from ivshmemfs.format.geometry import HINT_OFFSET, REPAIR_OFFSET
from ivshmemfs.format.words import NULL
from tests.support.checks import assert_adds_up, assert_sound

ME = Context(0, 0)


def own_state(fs: Filesystem) -> int:
    return fs.table.state(fs.peer_id[0])


def is_at_rest(fs: Filesystem) -> bool:
    """Whether no transaction of this mount is under way, and the hint is free."""
    return own_state(fs) >> words.SLOT_SHIFT == words.IDLE and not fs.is_committing


def repaired(fs: Filesystem) -> None:
    """Change the repair slot's state word as a whole repair does."""
    before = fs.store.memory.load(REPAIR_OFFSET)
    state, incarnation, counter = words.split_state(before)
    after = words.make_state(state, incarnation, counter + 1)
    assert fs.store.memory.cas(REPAIR_OFFSET, before, after) == before


def test_after_a_change_all_is_at_rest(fs: Filesystem) -> None:
    counter = words.split_state(own_state(fs))[2]
    fs.mkdir(ROOT_INO, b"one", 0o755, ME)
    assert is_at_rest(fs)
    assert words.split_state(own_state(fs))[2] == counter + 1
    assert fs._volume.supply.lacking(fs.view().root.record.used) is False


def test_a_hint_of_another_peer_is_left_alone(fs: Filesystem) -> None:
    theirs = words.make_hint(2, 0, 77)
    assert fs.store.memory.cas(HINT_OFFSET, 0, theirs) == 0
    before = own_state(fs)
    with pytest.raises(Busy):
        fs.mkdir(ROOT_INO, b"one", 0o755, ME)
    assert own_state(fs) == before
    assert fs.store.memory.cas(HINT_OFFSET, theirs, 0) == theirs
    fs.mkdir(ROOT_INO, b"one", 0o755, ME)


def test_a_hint_that_was_taken_over_is_not_given_back(fs: Filesystem) -> None:
    theirs = words.make_hint(2, 0, 77)

    def plan(tx: Transaction) -> None:
        mine = fs.store.memory.load(HINT_OFFSET)
        assert fs.store.memory.cas(HINT_OFFSET, mine, theirs) == mine
        tx.touch(ROOT_INO)

    fs.change(plan)
    assert fs.store.memory.load(HINT_OFFSET) == theirs
    assert own_state(fs) >> words.SLOT_SHIFT == words.IDLE
    fs.store.memory.cas(HINT_OFFSET, theirs, 0)


def test_a_repair_between_two_changes(fs: Filesystem) -> None:
    fs.mkdir(ROOT_INO, b"one", 0o755, ME)
    repaired(fs)
    fs.mkdir(ROOT_INO, b"two", 0o755, ME)
    assert is_at_rest(fs)
    assert not fs._volume.supply.owed


def test_a_repair_during_a_change_keeps_what_was_replaced(fs: Filesystem) -> None:
    """The repair may have found a use for it."""
    free = fs.store.blocks.free_count()

    def plan(tx: Transaction) -> None:
        repaired(fs)
        tx.touch(ROOT_INO)

    fs.change(plan)
    assert is_at_rest(fs)
    assert fs._volume.supply.owed
    assert fs.store.blocks.free_count() < free
    assert fs.collect()
    assert fs.store.blocks.free_count() == free


def test_a_nonce_of_another_process(fs: Filesystem) -> None:
    """The mount leaves the slot to it before it claims anything, and takes another."""
    slot = fs.peer_id[0]
    fs.store.memory.store(fs.table.offset(slot, peer.NONCE_OFFSET), 12345)
    fs.mkdir(ROOT_INO, b"one", 0o755, ME)
    assert fs.peer_id[0] != slot
    assert is_at_rest(fs)
    assert fs.table.state(slot) >> words.SLOT_SHIFT == words.IDLE
    assert fs.table.peer(slot).record.nonce == peer.TWIN_MARK


def test_a_slot_that_another_peer_freed(fs: Filesystem) -> None:
    slot, incarnation = fs.peer_id
    assert fs.table.retire(slot, own_state(fs))
    fs.mkdir(ROOT_INO, b"one", 0o755, ME)
    assert fs.peer_id != (slot, incarnation)
    assert is_at_rest(fs)


def test_an_error_right_after_the_commit_frees_nothing_in_use(fs: Filesystem) -> None:
    """As when the note of the new nodes finds no memory."""

    def plan(tx: Transaction) -> None:
        names.mkdir(tx, ROOT_INO, b"one", 0o755, ME)
        tx.space._replaced.append(bytearray(NULL))  # type: ignore[arg-type]

    with pytest.raises(TypeError):
        fs.change(plan)
    assert is_at_rest(fs)
    assert_adds_up(fs)
    assert fs.lookup(ROOT_INO, b"one").nlink == 2
    fs.rmdir(ROOT_INO, b"one", ME)


class Cut(Exception):
    """What the handler of a signal raises."""


@pytest.fixture
def handled() -> Iterator[None]:
    """A handler of SIGUSR1 that raises."""

    def cut(_number: int, _frame: object) -> None:
        raise Cut

    before = signal.signal(signal.SIGUSR1, cut)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("handled")
def test_a_signal_during_any_store(fs: Filesystem) -> None:
    """Its handler runs when the native call returns, and raises before that call is noted."""
    memory, slot = fs.store.memory, fs.peer_id
    # Unlike the functions of Python, this one does not run the handler itself.
    strike = partial(getattr(ctypes.CDLL(None), "raise"), int(signal.SIGUSR1))
    strikes, passed = 0, False
    while not passed:
        before = memory.stores
        memory.trap(strikes, strike)
        with suppress(Cut):
            fs.mkdir(ROOT_INO, b"one", 0o755, ME)
        memory.trap(0, None)
        passed = memory.stores - before <= strikes
        strikes += 1
        assert is_at_rest(fs)
        assert_sound(memory)
        if fs.find(ROOT_INO, b"one"):
            fs.rmdir(ROOT_INO, b"one", ME)
    assert strikes > 10
    assert fs.peer_id == slot
    fs.collect()
    assert_adds_up(fs)
