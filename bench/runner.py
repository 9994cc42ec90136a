"""Runs the client, round after round, and keeps the samples."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from bench.peers import Peer, pinned

#: Seconds that one run of the client may take.
PATIENCE = 600.0


class Sample(NamedTuple):
    """One result of one run of the client; times in seconds."""

    operations: int
    seconds: float
    p50: float
    p99: float
    bytes: int


class Client(Protocol):
    """Runs groups of measurements, on this machine or another."""

    def run(self, folder: Path, *words: object) -> dict[str, Sample]:
        """Run one group in *folder*."""
        ...

    def folder(self, path: Path, *, empty: bool = False) -> Path:
        """*path*, a folder that exists, perhaps newly made."""
        ...


class LocalClient:
    """The compiled client on this machine, pinned to some CPUs."""

    def __init__(self, program: Path, cpus: Sequence[int]) -> None:
        self._program = program
        self._cpus = cpus

    def command(self, *words: object) -> list[str]:
        """What to execute for one group of measurements."""
        return pinned(self._cpus, [str(self._program), *map(str, words)])

    def run(self, folder: Path, *words: object) -> dict[str, Sample]:
        """Run one group in *folder*."""
        done = subprocess.run(
            self.command(*words), cwd=folder, capture_output=True, text=True, timeout=PATIENCE,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{folder}: {' '.join(map(str, words))}: {done.stderr.strip()}")
        return parse(done.stdout)

    def folder(self, path: Path, *, empty: bool = False) -> Path:
        """*path*, a folder that exists, perhaps newly made."""
        if empty:
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(exist_ok=True)
        return path


def parse(text: str) -> dict[str, Sample]:
    """What the client printed."""
    found = json.loads(text)
    return {
        name: Sample(one["count"], one["seconds"], one["p50"] / 1e9, one["p99"] / 1e9, one["bytes"])
        for name, one in found.items()
    }


class Summary(NamedTuple):
    """Medians over rounds; times in seconds."""

    rounds: int
    p50: float
    p99: float
    per_second: float  # operations, from the time that they took together
    low: float  # the smallest and the largest p50 of a round
    high: float


def summary(samples: Sequence[Sample]) -> Summary:
    """The medians of several runs."""
    middle = [sample.p50 for sample in samples]
    return Summary(
        len(samples),
        statistics.median(middle),
        statistics.median(sample.p99 for sample in samples),
        statistics.median(sample.operations / sample.seconds for sample in samples),
        min(middle),
        max(middle),
    )


#: Results by workload, then by peer.
Table = dict[str, dict[str, list[Sample]]]


def interleave(
    peers: Sequence[Peer],
    rounds: int,
    measure: Callable[[Peer], dict[str, Sample]],
    table: Table,
    on_run: Callable[[], None] = lambda: None,
) -> None:
    """Measure every peer in every round, each round beginning with another one."""
    for turn in range(rounds):
        start = turn % len(peers)
        for peer in [*peers[start:], *peers[:start]]:
            for name, sample in measure(peer).items():
                table.setdefault(name, {}).setdefault(peer.name, []).append(sample)
            on_run()
