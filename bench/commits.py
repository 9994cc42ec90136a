"""Several mounts that write at once, and what bounds them.

Commits of mounts of one region wait for each other.  Mounts of a region each and C passthroughs of
a folder each wait for no other mount.  So they show what the processor allows.  On one CPU, each
turn of a mount begins with caches full of what the other processes left.
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.peers import Peer, cpu_seconds, make_region, ours, passthrough
from bench.runner import LocalClient, parse

MILLISECONDS = 700
LEAD = 0.3  # seconds for all clients to get ready
ONE_REGION = "mounts"
COUNTS = (1, 2, 4, 8)


class Turn(NamedTuple):
    """What some mounts did within the same interval."""

    done: list[int]  # writes of each
    cpu: float  # seconds of CPU time that daemons and clients used

    @property
    def per_second(self) -> float:
        """Writes per second of all of them."""
        return sum(self.done) * 1000 / MILLISECONDS

    @property
    def cost(self) -> float:
        """Seconds of CPU time for each write."""
        return self.cpu / max(sum(self.done), 1)

    @property
    def least_share(self) -> float:
        """The smallest mount's part of a fair share: 1 is fair."""
        return min(self.done) * len(self.done) / max(sum(self.done), 1)


def commits(
    program: Path,
    c_program: Path | None,
    shm: Path,
    work: Path,
    cpus: Sequence[int],
    *,
    rounds: int,
    counts: Sequence[int] = COUNTS,
) -> dict[str, float]:
    """4 KiB random writes of several mounts at once on `cpus`, with the clients.

    "mounts" share one region, "regions" have one each, "passthroughs" are in C (`c_program`).  "of
    one" is the rate of several by that of one, with everything else that these CPUs did.  "CPU time
    of one" is the CPU time for each write by that of one, which other programs change less.
    """
    client = LocalClient(program, cpus)
    turns: dict[str, dict[int, list[Turn]]] = {}
    with _kinds(c_program, shm, work, cpus, max(counts)) as kinds:
        for turn in range(rounds):
            for count in [*counts[turn % len(counts) :], *counts[: turn % len(counts)]]:
                for kind, peers in kinds.items():
                    found = _pump(client, peers[:count])
                    turns.setdefault(kind, {}).setdefault(count, []).append(found)
    figures = {
        f"{count} mounts: commits/s": median(turn.per_second for turn in found)
        for count, found in turns[ONE_REGION].items()
    }
    for kind, by_count in turns.items():
        for count in counts[1:]:
            figures |= _beside_one(f"{count} {kind}", by_count[count], by_count[counts[0]])
    for count in counts[1:]:
        shares = [turn.least_share for turn in turns[ONE_REGION][count]]
        figures[f"{count} mounts: least share"] = median(shares)
    return figures


def _beside_one(name: str, several: Sequence[Turn], one: Sequence[Turn]) -> dict[str, float]:
    rates = [median(turn.per_second for turn in turns) for turns in (several, one)]
    costs = [median(turn.cost for turn in turns) for turns in (several, one)]
    return {f"{name}: of one": rates[0] / rates[1], f"{name}: CPU time of one": costs[0] / costs[1]}


@contextmanager
def _kinds(
    c_program: Path | None, shm: Path, work: Path, cpus: Sequence[int], most: int
) -> Iterator[dict[str, list[Peer]]]:
    """`most` mounts of each kind."""
    with ExitStack() as stack:
        kinds: dict[str, list[Peer]] = {}

        def mount(kind: str, number: int, region: Path) -> None:
            peer = ours(region, work / f"{kind}-{number}", cpus, name=f"{kind} {number}")
            kinds.setdefault(kind, []).append(stack.enter_context(peer))

        shared = make_region(shm / "commits", "256M")
        for number in range(most):
            mount(ONE_REGION, number, shared)
            mount("regions", number, make_region(shm / f"commits-{number}", "32M"))
            if c_program is not None:
                source, path = shm / f"passthrough-{number}", work / f"passthrough-{number}"
                source.mkdir()
                path.mkdir()
                peer = passthrough(c_program, source, path, cpus)
                kinds.setdefault("passthroughs", []).append(stack.enter_context(peer))
        yield kinds


def _pump(client: LocalClient, peers: Sequence[Peer]) -> Turn:
    """Let a client write through each mount."""
    before = _cpu(peers)
    start = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(LEAD * 1e9)
    running = [
        subprocess.Popen(
            client.command("pump", f"pump{number}", start, MILLISECONDS),
            cwd=peer.path, stdout=subprocess.PIPE, text=True,
        )
        for number, peer in enumerate(peers)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=60)[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("a client failed while several mounts were writing")
    return Turn([parse(output)["pump"].operations for output in outputs], _cpu(peers) - before)


def _cpu(peers: Sequence[Peer]) -> float:
    """CPU time of the daemons, and of all clients that have ended."""
    clients = resource.getrusage(resource.RUSAGE_CHILDREN)
    return clients.ru_utime + clients.ru_stime + sum(map(cpu_seconds, peers))
