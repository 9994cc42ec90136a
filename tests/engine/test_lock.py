"""The lock on a file: one holder, freed by its end however that comes."""

from __future__ import annotations

import errno
import os
import time

import pytest

from ivshmemfs.engine import ROOT_INO, FileLock, Filesystem
from ivshmemfs.engine import locks as engine
from ivshmemfs.errors import FsError, LockLost
from ivshmemfs.format import lock as fmt
from ivshmemfs.shm import identity, watch
from ivshmemfs.shm.identity import Presence
from tests.support.checks import assert_adds_up
from tests.support.regions import ROOT, new_region, put


def lock_of(fs: Filesystem, ino: int) -> FileLock:
    return FileLock(fs, fs.locks, ino)


def holder_of(lock: FileLock) -> tuple[int, int] | None:
    """(slot, incarnation) of the living peer that holds it."""
    found = lock.holder()
    return None if found is None else (found.slot, found.incarnation)


def test_one_holder_at_a_time(fs: Filesystem, other: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"content").ino
    mine, theirs = lock_of(fs, ino), lock_of(other, ino)
    assert holder_of(theirs) is None
    assert mine.acquire()
    assert not theirs.acquire()
    assert holder_of(theirs) == fs.peer_id
    mine.keep()
    mine.release()
    assert holder_of(theirs) is None
    assert theirs.acquire()
    mine.release()  # not ours any more: changes nothing
    theirs.keep()
    theirs.release()
    assert_adds_up(fs)


def test_nobody_sees_the_record(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"content")
    lock = lock_of(fs, attr.ino)
    assert lock.acquire()
    assert fs.listxattr(attr.ino, ROOT) == []
    assert fs.getattr(attr.ino) == attr
    for call in (
        lambda: fs.getxattr(attr.ino, fmt.LOCKS),
        lambda: fs.setxattr(attr.ino, fmt.LOCKS, b"", 0, ROOT),
        lambda: fs.removexattr(attr.ino, fmt.LOCKS, ROOT),
    ):
        with pytest.raises(FsError) as caught:
            call()
        assert caught.value.errno == errno.EOPNOTSUPP
    lock.release()


def test_a_holder_that_left(fs: Filesystem, other: Filesystem) -> None:
    ino = put(other, ROOT_INO, b"file", b"").ino
    assert lock_of(fs, ino).acquire()
    fs.unmount()
    theirs = lock_of(other, ino)
    assert holder_of(theirs) is None
    assert theirs.acquire()


def test_a_holder_that_was_declared_gone(fs: Filesystem, other: Filesystem) -> None:
    """It notices, also when it has joined again meanwhile."""
    ino = put(fs, ROOT_INO, b"file", b"").ino
    mine, theirs = lock_of(fs, ino), lock_of(other, ino)
    assert mine.acquire()
    slot = fs.peer_id[0]
    other.table.retire(slot, other.table.state(slot))
    assert holder_of(theirs) is None
    fs.tick()
    assert holder_of(theirs) is None
    with pytest.raises(LockLost):
        mine.keep()
    assert theirs.acquire()
    with pytest.raises(LockLost):
        mine.keep()
    mine.release()
    theirs.keep()


class Seconds:
    """A clock that is told to go on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(time, "monotonic", lambda: self.now)

    def waits(self, lock: FileLock, seconds: float) -> bool:
        """Whether it is still held for this one after some seconds of looking twice in each."""
        for _ in range(int(seconds * 2)):
            holder_of(lock)
            self.now += 0.5
        return holder_of(lock) is not None


@pytest.mark.parametrize(
    ("presence", "seconds"),
    [
        (Presence.ALIVE, engine.SILENT),
        (Presence.UNKNOWN, engine.SILENT),
        (Presence.GONE, watch.SILENCE),
    ],
)
def test_how_long_a_holder_must_be_silent(
    presence: Presence,
    seconds: float,
    fs: Filesystem,
    other: Filesystem,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that is surely gone need not be waited for as long as one that may be paused."""
    ino = put(fs, ROOT_INO, b"file", b"").ino
    theirs = lock_of(other, ino)
    assert lock_of(fs, ino).acquire()
    monkeypatch.setattr(identity, "presence", lambda *_: presence)
    clock = Seconds(monkeypatch)
    assert clock.waits(theirs, seconds - 1)
    assert theirs.undecided() == (presence is Presence.GONE)
    assert not clock.waits(theirs, 2)


def test_a_holder_that_beats_is_there(
    fs: Filesystem, other: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its process seems absent: its machine may be a copy of another one."""
    ino = put(fs, ROOT_INO, b"file", b"").ino
    mine, theirs = lock_of(fs, ino), lock_of(other, ino)
    assert mine.acquire()
    monkeypatch.setattr(identity, "presence", lambda *_: Presence.GONE)
    clock = Seconds(monkeypatch)
    for _ in range(5):
        assert clock.waits(theirs, 2)
        mine.keep()


def test_a_watcher_that_was_stopped_itself_learns_nothing(
    fs: Filesystem, other: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = put(fs, ROOT_INO, b"file", b"").ino
    theirs = lock_of(other, ino)
    assert lock_of(fs, ino).acquire()
    clock = Seconds(monkeypatch)
    assert clock.waits(theirs, 1)
    clock.now += 3600
    assert clock.waits(theirs, 1)


def test_a_silent_holder(
    fs: Filesystem, other: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as dead only after a peer watched it be silent for long enough."""
    ino = put(fs, ROOT_INO, b"file", b"").ino
    mine, theirs = lock_of(fs, ino), lock_of(other, ino)
    assert mine.acquire()
    clock = Seconds(monkeypatch)
    assert clock.waits(theirs, engine.SILENT - 1)
    mine.keep()
    assert clock.waits(theirs, engine.SILENT - 1)
    assert not clock.waits(theirs, 3)
    assert theirs.acquire()
    with pytest.raises(LockLost, match="taken over"):
        mine.keep()


def test_a_lock_on_what_is_removed(fs: Filesystem, other: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"").ino
    handle = fs.open(ino, os.O_RDONLY, ROOT)
    lock = lock_of(fs, ino)
    assert lock.acquire()
    other.unlink(ROOT_INO, b"file", ROOT)
    lock.keep()
    lock.release()
    fs.release(handle)
    gone = lock_of(fs, ino)
    with pytest.raises(FsError):
        gone.acquire()


def test_losing_the_file(fs: Filesystem, other: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"").ino
    lock = lock_of(fs, ino)
    assert lock.acquire()
    other.unlink(ROOT_INO, b"file", ROOT)
    with pytest.raises(LockLost):
        lock.keep()


def test_a_holder_that_finds_no_slot_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with new_region(peer_count=2) as made:
        fs, other = made.mount(), made.mount()
        ino = put(fs, ROOT_INO, b"file", b"").ino
        mine = lock_of(fs, ino)
        assert mine.acquire()
        assert other.table.retire(fs.peer_id[0], other.table.state(fs.peer_id[0]))
        for mount in (other, made.mount()):
            assert mount._volume.member is not None
            mount._volume.member.begin()  # so that no other peer takes its slot
        clock = Seconds(monkeypatch)
        mine.keep()  # one may still fall free
        clock.now += watch.SILENCE + 1
        with pytest.raises(LockLost, match="slots are taken"):
            mine.keep()
