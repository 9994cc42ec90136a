"""Zombies: a peer that is stopped before a store (or load) and resumes after others have
committed, freed, reused and collected.  Its operation takes effect completely or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import NamedTuple

from ivshmemfs.engine import RENAME_EXCHANGE, ROOT_INO, Filesystem
from ivshmemfs.errors import FsError, LockLost
from tests.crash.cases import Tree, check_quarantine, close_others, set_up
from tests.crash.workloads import WORKLOADS, Scene, ino, pattern
from tests.support.checks import assert_sound, detailed_tree, unreachable
from tests.support.laboratory import Laboratory, Peer
from tests.support.regions import ROOT, get, put

LEFT = 90  # free blocks that others leave to the sleeper

Outcome = tuple[Tree, int]  # what is there in the end, errno of the sleeper's operation


# --- what others do meanwhile ---------------------------------------------------------------


def churn(peer: Peer) -> None:
    """Commit, free, reuse and collect until every free block has been through many hands."""
    for turn in range(3):
        free = peer.fs.statfs().blocks_avail
        content = pattern(max(free - LEFT, 8) * 1024, 200 + turn)
        peer.quick(lambda fs: put(fs, ROOT_INO, b"churn", content))  # noqa: B023
        assert peer.quick(lambda fs: get(fs, ROOT_INO, b"churn")) == content
        check_quarantine(peer)
        peer.tick(5)
        peer.quick(lambda fs: fs.unlink(ROOT_INO, b"churn", ROOT))
    for n in range(12):
        peer.quick(lambda fs: put(fs, ROOT_INO, b"other%d" % n, pattern(700 * n, n)))  # noqa: B023
    for n in range(0, 12, 2):
        peer.quick(lambda fs: fs.unlink(ROOT_INO, b"other%d" % n, ROOT))  # noqa: B023


def conflict(peer: Peer) -> None:
    """Change the very things that operations are about."""
    steps: list[Callable[[Filesystem], object]] = [
        lambda fs: fs.rename(ROOT_INO, b"e", ROOT_INO, b"e was here", 0, ROOT),
        lambda fs: fs.rename(ROOT_INO, b"a", ROOT_INO, b"b", RENAME_EXCHANGE, ROOT),
        lambda fs: fs.unlink(ROOT_INO, b"q", ROOT),
        lambda fs: fs.setattr(ino(fs, b"c"), ROOT, size=20_000),
        lambda fs: fs.setattr(ino(fs, b"x"), ROOT, size=0, mode=0o444),
        lambda fs: fs.setxattr(ino(fs, b"y"), b"user.more", b"more", 0, ROOT),
        lambda fs: fs.mkdir(ino(fs, b"d"), b"not empty", 0o755, ROOT),
        lambda fs: put(fs, ino(fs, b"t"), b"more in the tree", b"more"),
        lambda fs: fs.unlink(ino(fs, b"t"), b"name-%016d" % 3, ROOT),
        lambda fs: fs.unlink(ROOT_INO, b"h2", ROOT),
        lambda fs: put(fs, ROOT_INO, b"s", pattern(2000, 3)),
        lambda fs: put(fs, ino(fs, b"brim"), b"one more", b""),
    ]
    for step in steps:
        with suppress(FsError):
            peer.quick(step)
    churn(peer)


SCRIPTS: dict[str, Callable[[Peer], None]] = {"churn": churn, "conflict": conflict}


# --- one case -------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    script: str
    event: int
    loads: bool

    def __str__(self) -> str:
        return f"{self.name}/{self.script}@{self.event}{'l' if self.loads else ''}"


def errno_of(step: Callable[[], object]) -> int:
    try:
        step()
    except (FsError, LockLost) as error:
        return error.errno
    return 0


def outcome(scene: Scene, code: int) -> Outcome:
    return scene.other.run(detailed_tree), code


def orders(laboratory: Laboratory, world: bytes, name: str, script: str) -> list[Outcome]:
    """What comes of the operation before the others', and after them."""
    found = []
    for first in (True, False):
        scene = set_up(laboratory, world, name)
        code = 0
        if first:
            code = errno_of(lambda: WORKLOADS[name].act(scene))  # noqa: B023
        SCRIPTS[script](scene.other)
        if not first:
            code = errno_of(lambda: WORKLOADS[name].act(scene))  # noqa: B023
        found.append(outcome(scene, code))
    return found


def run_case(
    laboratory: Laboratory,
    world: bytes,
    allowed: list[Outcome],
    case: Case,
    clocks: Mapping[str, Callable[[float], float]] = MappingProxyType({}),
) -> bool:
    """False when the operation was over before the event; `clocks` are those that are wrong."""
    scene = set_up(laboratory, world, case.name)
    for who, reading in clocks.items():
        peer = scene.victim if who == "victim" else scene.other
        laboratory.fates.clock.readings[peer.pid] = reading
    slept = []

    def meanwhile() -> None:
        slept.append(True)
        SCRIPTS[case.script](scene.other)

    scene.victim.pause_at(case.event, meanwhile, case.loads)
    code = errno_of(lambda: WORKLOADS[case.name].act(scene))
    scene.victim.memory.trap(0, None)
    if not slept:
        return False
    assert outcome(scene, code) in allowed
    assert_sound(laboratory.memory)
    close_others(scene)
    go_on_together(scene)
    return True


def go_on_together(scene: Scene) -> None:
    """Both work on as if nothing had been, and no block is lost in the end."""
    peers = [scene.other]
    if scene.victim.slot():
        peers.append(scene.victim)
    for turn in range(2):
        for peer in peers:
            name, content = b"together%d" % peer.pid, pattern(3000, turn)
            peer.run(lambda fs: put(fs, ROOT_INO, name, content))  # noqa: B023
            for reader in peers:
                assert reader.run(lambda fs: get(fs, ROOT_INO, name)) == content  # noqa: B023
    for peer in peers:
        peer.run(lambda fs: fs.unlink(ROOT_INO, b"together%d" % peer.pid, ROOT))  # noqa: B023
        peer.tick(12)
    scene.other.run(lambda fs: fs.collect())
    assert unreachable(scene.other.fs) == 0
    report = assert_sound(scene.laboratory.memory)
    assert not report.findings, str(report)
