"""Programs on three mounts that lock one file at random, while some are stopped and killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fuse.lock_storm import PROGRAMS, SIZE, Oracle
from tests.support.figures import Figures
from tests.support.lab import Lab, needs_fuse, needs_root, new_lab

pytestmark = [needs_fuse, needs_root, pytest.mark.slow]
TOP = Path(__file__).resolve().parents[2]
MOUNTS = 3


class Campaign:
    """The programs, the mounts, and what befalls them."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.chance = random.Random(seed)
        self.file = lab.region.with_name("oracle")
        self.file.write_bytes(bytes(SIZE))
        self.oracle = Oracle(self.file)
        self.on = list(lab.mounts)  # by number: the mount that is there now
        self.programs: list[subprocess.Popen[bytes]] = []
        self.kills = self.stops = self.deaths = 0
        self.stopped: list[tuple[float, int]] = []  # until when, process
        for number in range(PROGRAMS):
            self.programs.append(self._start(number))

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        path = self.on[number % MOUNTS].path / "file"
        words = [path, self.file, number, self.chance.randrange(1 << 30)]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fuse.lock_storm", *map(str, words)],
            cwd=TOP, stdin=subprocess.PIPE,
        )  # fmt: skip

    def rage(self, seconds: float) -> None:
        """Stop, continue and kill."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self.chance.random() * 0.2)
            self.check()
            self._continue(time.monotonic())
            fate = self.chance.random()
            if fate < 0.3:
                self._stop(self.chance.choice(self.programs).pid, 0.5)
            elif fate < 0.4:
                self._stop(self.chance.choice(self.on).process.pid, 2.0)
            elif fate < 0.48:
                self._kill(self.chance.randrange(PROGRAMS))
            elif fate < 0.49:
                self._kill_machine(self.chance.randrange(MOUNTS))
        self._continue(float("inf"))

    def check(self) -> None:
        """No program has ended by itself: it would have found a violation, or waited in vain."""
        ended = [one.poll() for one in self.programs]
        assert ended == [None] * PROGRAMS, f"programs ended: {ended}"

    def _stop(self, pid: int, longest: float) -> None:
        if pid not in [stopped for _, stopped in self.stopped]:
            os.kill(pid, signal.SIGSTOP)
            self.stopped.append((time.monotonic() + self.chance.random() ** 2 * longest, pid))
            self.stops += 1

    def _continue(self, now: float) -> None:
        for until, pid in [one for one in self.stopped if one[0] < now]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self.stopped.remove((until, pid))

    def _kill(self, number: int) -> None:
        self._end(number)
        self.programs[number] = self._start(number)
        self.kills += 1

    def _end(self, number: int) -> None:
        """A program dies; what it held counts no more from before its death on."""
        program = self.programs[number]
        self.oracle.dying(number, True)
        program.kill()
        self._continue(float("inf"))  # a stopped daemon would keep it from ending
        program.wait(60)
        assert program.stdin is not None
        program.stdin.close()
        self.oracle.clear(number)
        self.oracle.dying(number, False)

    def _kill_machine(self, mount: int) -> None:
        """A mount and all its programs die; another machine comes."""
        for number in range(mount, PROGRAMS, MOUNTS):
            self.oracle.dying(number, True)
        self._continue(float("inf"))
        self.lab.kill(self.lab.mounts.index(self.on[mount]))
        for number in range(mount, PROGRAMS, MOUNTS):
            self._end(number)
        self.on[mount] = self.lab.add()
        for number in range(mount, PROGRAMS, MOUNTS):
            self.programs[number] = self._start(number)
        self.deaths += 1

    def calm(self) -> None:
        """Let all programs end; each must do so by itself."""
        for one in self.programs:
            assert one.stdin is not None
            one.stdin.close()
        assert [one.wait(90) for one in self.programs] == [0] * PROGRAMS

    def abandon(self) -> None:
        self._continue(float("inf"))
        for one in self.programs:
            one.kill()
            one.wait(60)


def test_no_two_hold_one_byte(long_run: bool, only_case: str | None, figures: Figures) -> None:
    """Nor does any wait in vain."""
    seconds = 600.0 if long_run else 12.0
    seed = int(only_case) if only_case else int(time.time()) if long_run else 1
    with new_lab(64 << 20, MOUNTS) as lab:
        (lab.paths[0] / "file").write_bytes(bytes(64))
        campaign = Campaign(lab, seed)
        try:
            campaign.rage(seconds)
            campaign.calm()
        except BaseException as error:
            error.add_note(f"--case {seed} (processes: the seed makes it likely, only)")
            raise
        finally:
            campaign.abandon()
        got, deadlocks, refusals = (campaign.oracle.counts(which) for which in range(3))
        campaign.file.unlink()
    assert all(got), got
    figures.add(
        f"lock campaign: {seconds:.0f} s, {sum(got):,} locks, {sum(refusals):,} refusals, "
        f"{sum(deadlocks):,} deadlocks told, {campaign.stops} stops, {campaign.kills} programs and "
        f"{campaign.deaths} machines killed; 0 bytes held twice, 0 waiters lost"
    )
