"""The time of a change goes backwards only when the machine's clock does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.engine.clock import TRUSTED_NS, Clock
from ivshmemfs.engine.filesystem import KEEP_SIZE, PUNCH_HOLE
from tests.support.regions import ROOT, TestRegion, put


def test_it_is_the_present() -> None:
    clock = Clock()
    for _ in range(1000):
        before = time.time_ns()
        assert before - 20_000_000 < clock.now() <= time.time_ns()


def test_what_the_kernel_called_the_present_is_not_undercut() -> None:
    clock = Clock()
    moment = time.time_ns()
    clock.seen(moment)
    assert clock.now() >= moment
    clock.seen(moment - 10**9)
    assert clock.now() >= moment


def test_moments_in_the_future_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.seen(time.time_ns() + 10**12)
    assert clock.now() <= time.time_ns()
    seen = time.time_ns()
    clock.seen(seen)
    monkeypatch.setattr(time, "time_ns", lambda: seen - 10**12)  # the clock was set back
    monkeypatch.setattr(time, "clock_gettime_ns", lambda _clock: seen - 10**12)
    assert clock.now() == seen - 10**12


def test_a_change_after_a_setting_to_the_present(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"")
    for _ in range(50):
        moment = time.time_ns()
        fs.setattr(attr.ino, ROOT, mtime_ns=moment)
        assert put(fs, ROOT_INO, b"file", b"x").mtime_ns >= moment


def test_contents_that_change_within_a_step_of_the_clock_show_it(fs: Filesystem) -> None:
    """A kernel compares mtimes to find out that its cached pages are stale."""
    ino = put(fs, ROOT_INO, b"file", b"").ino
    handle = fs.open(ino, os.O_RDWR, ROOT)
    steps: list[Callable[[], object]] = [
        lambda: fs.write(handle, 0, b"same length"),
        lambda: fs.write(handle, 0, b"x" * 10_000),
        lambda: fs.setattr(ino, ROOT, size=10_000),
        lambda: fs.setattr(ino, ROOT, size=9_000),
        lambda: fs.fallocate(handle, PUNCH_HOLE | KEEP_SIZE, 0, 5000),
        lambda: fs.fallocate(handle, 0, 0, 9000),
    ]
    seen = [fs.getattr(ino).mtime_ns]
    for step in steps * 20:
        step()
        attr = fs.getattr(ino)
        assert attr.mtime_ns == attr.ctime_ns <= time.time_ns()
        seen.append(attr.mtime_ns)
    assert seen == sorted(set(seen))
    assert put(fs, ROOT_INO, b"next", b"").mtime_ns >= seen[-1]


class Machines:
    """Two mounts whose machines' clocks differ; `now` is the clock of the second machine."""

    def __init__(self, made: TestRegion, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.behind = made.mount()
        self.other = made.mount()
        self.now = time.time_ns()

    def _at(self, moment: int) -> None:
        self._patch.setattr(time, "time_ns", lambda: moment)
        self._patch.setattr(time, "clock_gettime_ns", lambda _clock: moment)

    def on_other(self, name: bytes) -> int:
        """Write on the machine with the right clock; return the file's mtime."""
        self._at(self.now)
        return put(self.other, ROOT_INO, name, b"x").mtime_ns

    def on_behind(self, name: bytes, by: int) -> int:
        """Write on the machine whose clock is so many ns behind; return the file's mtime."""
        self._at(self.now - by)
        return put(self.behind, ROOT_INO, name, b"y").mtime_ns


@pytest.fixture
def machines(made: TestRegion, monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(made, monkeypatch)


def test_an_edit_by_a_clock_that_is_behind_is_newer_all_the_same(machines: Machines) -> None:
    """Otherwise make(1) would take the product for up to date."""
    for by in (1, 2 * 10**9, TRUSTED_NS - 1000):
        product = machines.on_other(b"product")
        source = machines.on_behind(b"source", by)
        assert product <= source <= product + 10
        again = machines.on_behind(b"source", by)
        assert source < again <= source + 10
        assert machines.on_other(b"product") >= again
        machines.now += 10**9


def test_a_clock_that_is_far_ahead_drags_nobody_along(machines: Machines) -> None:
    machines.on_other(b"a")
    far = TRUSTED_NS + 1
    assert 0 <= machines.on_behind(b"b", far) - (machines.now - far) < 10
    for _ in range(100):  # each commit is TRUSTED_NS ahead of the other clock
        machines.now = machines.on_behind(b"b", far) + TRUSTED_NS
        machines.on_other(b"a")
        assert machines.on_behind(b"b", TRUSTED_NS) <= machines.now + 10
    start = machines.now
    for _ in range(100):  # two machines that take over each other's times do not drift ahead
        machines.on_other(b"a")
        machines.on_behind(b"b", 5 * 10**9)
    assert machines.on_other(b"a") <= start + 1000
