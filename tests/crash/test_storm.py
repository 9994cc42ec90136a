"""Real processes on one region, stopped, continued and killed at random under load."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.shm import watch
from tests.crash.storm import LOG, content_whole, line_whole
from tests.support.checks import assert_sound, unreachable
from tests.support.figures import Figures
from tests.support.regions import ROOT, TestRegion, get, new_region

TOP = Path(__file__).resolve().parents[2]
ROUND = 10.0  # seconds after which everything is looked at, and made anew
WORKERS = 4


class Process:
    """One process of the storm and its journal."""

    def __init__(self, made: TestRegion, name: str, seed: int, readonly: bool = False) -> None:
        self.name = name
        self.journal = made.path.with_name(f"journal-{name}")
        command = [sys.executable, "-m", "tests.crash.storm", str(made.path), str(self.journal)]
        self._process = subprocess.Popen(
            [*command, name, str(seed), str(int(readonly))], cwd=TOP, stdin=subprocess.PIPE
        )

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def end(self) -> None:
        """Let it finish what it does; fails when it does not, or failed itself."""
        self._process.send_signal(signal.SIGCONT)
        self._close()
        try:
            assert self._process.wait(timeout=60) == 0
        except subprocess.TimeoutExpired:
            for _ in range(3):
                self._process.send_signal(signal.SIGUSR1)
                time.sleep(0.5)
            raise

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def notes(self) -> list[list[str]]:
        """The journal; a last line that was cut short does not count."""
        if not self.journal.exists():
            return []
        text = self.journal.read_text()
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def numbers(self, verb: str, noun: str) -> list[int]:
        return [int(n[2]) for n in self.notes() if n[:2] == [verb, noun]]

    def noted(self, verb: str) -> list[str]:
        return [n[1] for n in self.notes() if n[0] == verb]


class Storm:
    """Some processes, and what befalls them."""

    def __init__(self, made: TestRegion, seed: int) -> None:
        self.made = made
        self.chance = random.Random(seed)
        self.alive: list[Process] = []
        self.all: list[Process] = []
        self.stops = self.kills = 0

    def spawn(self, readonly: bool = False) -> None:
        process = Process(self.made, f"w{len(self.all)}", self.chance.randrange(1 << 30), readonly)
        self.alive.append(process)
        self.all.append(process)

    def rage(self, seconds: float) -> None:
        """Stop, continue and kill."""
        until, stopped = time.monotonic() + seconds, list[tuple[float, Process]]()
        while time.monotonic() < until:
            time.sleep(self.chance.random() * 0.05)
            now = time.monotonic()
            for at, process in [entry for entry in stopped if entry[0] < now]:
                process.signal(signal.SIGCONT)
                stopped.remove((at, process))
            process = self.chance.choice(self.alive)
            fate = self.chance.random()
            if fate < 0.35:
                if not any(process is p for _, p in stopped):
                    process.signal(signal.SIGSTOP)
                    stopped.append((now + self.chance.random() ** 3 * 1.5, process))
                    self.stops += 1
            elif fate < 0.37:  # stopped or not; the others must live long enough to miss it
                process.kill()
                self.kills += 1
                stopped = [entry for entry in stopped if entry[1] is not process]
                self.alive.remove(process)
                self.spawn()

    def calm(self) -> None:
        for process in self.alive:
            process.end()
        self.alive.clear()

    def abandon(self) -> None:
        for process in self.alive:
            process.kill()


def check_log(fs: Filesystem, storm: Storm) -> int:
    """No line lost, torn or doubled; returns how many there are."""
    content = get(fs, ROOT_INO, LOG)
    assert not content or content.endswith(b"\n")
    lines = content.splitlines()
    assert all(line_whole(line) for line in lines), "torn lines"
    found: Counter[tuple[str, int]] = Counter()
    order: dict[str, int] = {}
    for line in lines:
        name, number = line.split()[0].decode(), int(line.split()[1])
        found[name, number] += 1
        assert order.get(name, 0) < number, "lines of one process out of order"
        order[name] = number
    assert set(found.values()) <= {1}, "a line stands there twice"
    for process in storm.all:
        done, tried = process.numbers("done", "line"), process.numbers("try", "line")
        assert all((process.name, n) in found for n in done), "a line is lost"
        assert all(n in tried for name, n in found if name == process.name)
    return len(lines)


def check_files(fs: Filesystem, storm: Storm) -> None:
    """Each file is what its writer last said, or what it was about to say."""
    there = {name for name, _, _ in fs.readdir(fs.opendir(ROOT_INO), 0)}
    for process in storm.all:
        name = b"file-" + process.name.encode()
        done, tried = process.numbers("done", "file"), process.numbers("try", "file")
        if name not in there:
            assert not done, "a file that was written is not there"
            continue
        content = get(fs, ROOT_INO, name)
        assert content_whole(content), "a torn file"
        number = int(content.split()[2])
        assert number >= max(done, default=0)
        assert number in tried
    assert not [text for process in storm.all for text in process.noted("torn")]


def hasten(fs: Filesystem) -> None:
    """A tick of a peer with a second that is much shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "SILENCE", watch.SILENCE / 100)
        fs.tick()
    time.sleep(0.01)


def check_region(fs: Filesystem, made: TestRegion) -> None:
    """The dead are gone, and so is all that they held."""
    for _ in range(200):
        hasten(fs)
        left = len(list(fs.table.peers()))
        if left == 1 and not fs.view().root.record.orphans and not unreachable(fs):
            break
    assert unreachable(fs) == 0
    assert fs.view().root.record.orphans == 0
    assert [p.slot for p in fs.table.peers()] == [
        fs._volume.member.slot if fs._volume.member else 0
    ]
    report = assert_sound(made.region().memory)
    assert not report.findings, str(report)


def run_storm(seed: int, seconds: float) -> tuple[int, int, int]:
    """One region from beginning to end: lines, stops, kills."""
    with new_region(64 << 20) as made:
        storm = Storm(made, seed)
        try:
            for _ in range(WORKERS):
                storm.spawn()
            storm.rage(seconds)
            storm.calm()
        finally:
            storm.abandon()
        fs = made.mount()
        lines = check_log(fs, storm)
        check_files(fs, storm)
        check_region(fs, made)
        assert lines
        return lines, storm.stops, storm.kills


@pytest.mark.slow
def test_storm(long_run: bool, figures: Figures) -> None:
    seconds, seed = (600.0, int(time.time())) if long_run else (20.0, 1)
    total = [0, 0, 0]
    for turn in range(int(seconds / ROUND)):
        try:
            got = run_storm(seed + turn, ROUND)
        except BaseException as error:
            error.add_note(f"storm seed {seed + turn} (processes: the seed makes it likely, only)")
            raise
        total = [a + b for a, b in zip(total, got, strict=True)]
    figures.add(
        f"storm of processes: {seconds:.0f} s, {total[0]:,} lines appended, {total[1]:,} stops, "
        f"{total[2]:,} kills; 0 lost, 0 torn, fsck clean after each {ROUND:.0f} s"
    )


def run_read_only(seed: int, seconds: float) -> int:
    """Two writers and two read-only mounts: how many files these read."""
    with new_region(64 << 20) as made:
        storm = Storm(made, seed)
        try:
            for readonly in (False, False, True, True):
                storm.spawn(readonly)
            time.sleep(seconds)
            storm.calm()
        finally:
            storm.abandon()
        readers = storm.all[2:]
        assert [reader.noted("stores") for reader in readers] == [["0"], ["0"]]
        fs = made.mount()
        check_log(fs, storm)
        check_files(fs, storm)
        check_region(fs, made)
        return sum(len(reader.numbers("done", "look")) for reader in readers)


@pytest.mark.slow
def test_read_only_mounts_beside_writers(long_run: bool, figures: Figures) -> None:
    """On a mapping without write permission: no torn read, no store."""
    rounds = 12 if long_run else 1  # each in a region of its own, which the log would fill
    reads = sum(run_read_only(2 + turn, ROUND) for turn in range(rounds))
    assert reads
    figures.add(
        f"read-only mounts beside writers: {rounds * ROUND:.0f} s, {reads:,} files read, "
        "0 torn, 0 stores"
    )


def test_a_killed_process_gives_back_what_it_held_open() -> None:
    """The real thing: nothing about its identity is made up."""
    with new_region(1 << 20) as made:
        fs = made.mount()
        script = (
            "import os, sys, time\n"
            "from ivshmemfs.engine import Filesystem\n"
            "from ivshmemfs.region import open_region\n"
            "from tests.support.regions import ROOT\n"
            "fs = Filesystem.mount(open_region(sys.argv[1]))\n"
            "handle, _ = fs.create(1, b'open', 0o600, os.O_RDWR, ROOT)\n"
            "fs.write(handle, 0, b'x' * 50_000)\n"
            "print('open', flush=True)\n"
            "time.sleep(60)\n"
        )
        command = [sys.executable, "-c", script, str(made.path)]
        with subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            fs.unlink(ROOT_INO, b"open", ROOT)
            for _ in range(12):
                hasten(fs)
            assert fs.view().root.record.orphans == 1
            os.kill(process.pid, signal.SIGKILL)
        check_region(fs, made)
