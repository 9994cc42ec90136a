"""A machine is put back into an older state, anywhere in the middle of an operation.

A fork of this process is the machine as it went on.  It finishes the operation, works on, and
leaves in one of several ways.  Then others change and reuse everything.  This process is the
machine restored: it resumes the operation where it was, with all that it knew then.

What nothing can prevent: a snapshot taken while a block was being filled.  The rest of it is then
stored over the present contents.  So one block may be harmed, in every second point at most.
Here a block is filled in two halves, and its owner checks its claim before the first.
"""

from __future__ import annotations

import os
import random
import traceback
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import ROOT_INO
from tests.crash.cases import Tree, close_others, replayable, set_up, tags
from tests.crash.workloads import WORKLOADS, Scene, pattern
from tests.crash.zombies import conflict, errno_of, go_on_together
from tests.support.checks import assert_sound, detailed_tree
from tests.support.figures import Figures
from tests.support.laboratory import Laboratory, Peer
from tests.support.regions import put

HERE = "tests/crash/test_restored.py"
SHORT = 3  # points per operation in the short form
LEFT = 60  # free blocks that others leave


class Case(NamedTuple):
    name: str
    store: int

    def __str__(self) -> str:
        return f"{self.name}@{self.store}"


def parse(text: str) -> Case:
    name, _, store = text.partition("@")
    return Case(name, int(store))


def went_on(scene: Scene, leaving: int) -> None:
    """What the machine did after the snapshot, and what others did then: nearly all is reused."""
    victim, other = scene.victim, scene.other
    if victim.slot():
        victim.run(lambda fs: put(fs, ROOT_INO, b"later", pattern(5000, 30)))
        if leaving:
            victim.run(lambda fs: fs.unmount())
        if leaving == 2:
            victim.mount()
    conflict(other)
    free = other.fs.statfs().blocks_avail
    other.run(lambda fs: put(fs, ROOT_INO, b"full", pattern(max(free - LEFT, 8) * 1024, 31)))


def seen(peer: Peer) -> Tree:
    """What is there, but for how large the file was made that takes all that was free."""
    tree = peer.run(detailed_tree)
    content = tree.pop(b"full")[-1]
    assert isinstance(content, bytes)
    assert content == pattern(len(content), 31)
    return tree


def forked(work: Callable[[], object]) -> None:
    """Run `work` in a fork of this process, to its end."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def allowed(laboratory: Laboratory, world: bytes, name: str) -> list[Tree]:
    """What is there when the restored machine does nothing, or its operation (once more)."""
    scene = set_up(laboratory, world, name)

    def original() -> None:
        errno_of(lambda: WORKLOADS[name].act(scene))
        went_on(scene, 0)

    forked(original)
    before = seen(scene.other)
    errno_of(lambda: WORKLOADS[name].act(scene))
    return [before, seen(scene.other)]


class Resumed:
    """Forks when the trap springs; the child returns into the operation as the original."""

    def __init__(self, scene: Scene, leaving: int) -> None:
        self.scene = scene
        self.leaving = leaving
        self.original = False
        self.state = b""
        self.tags: list[int] = []
        self.hurt: list[int] = []  # blocks of others that the store it was doing has changed

    def __call__(self) -> None:
        pid = os.fork()
        if not pid:
            self.original = True
            return
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the original failed"
        self.state = self.scene.laboratory.save()
        self.tags = tags(self.scene.other)
        self.scene.victim.memory.trap(1, self.note_store)

    def note_store(self) -> None:
        """Look at once: the operation may copy a block that it hurt, and release it."""
        self.hurt = self._changed()

    def finish_original(self) -> None:
        status = 1
        try:
            went_on(self.scene, self.leaving)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def harmed(self) -> list[int]:
        """Blocks that a peer had claimed and has still, with other contents."""
        self.scene.victim.memory.trap(0, None)
        return sorted({*self.hurt, *self._changed()})

    def _changed(self) -> list[int]:
        laboratory, geometry = self.scene.laboratory, self.scene.other.fs.superblock.geometry
        now, found = laboratory.save(), []
        for block, (old, new) in enumerate(zip(self.tags, tags(self.scene.other), strict=True)):
            at = geometry.data_offset + block * geometry.block_size
            place = slice(at, at + geometry.block_size)
            if old and old == new and self.state[place] != now[place]:
                found.append(block)
        return found


def run_case(laboratory: Laboratory, world: bytes, trees: list[Tree], case: Case) -> int:
    """How many blocks of others were harmed: at most the one that was just being filled."""
    scene = set_up(laboratory, world, case.name)
    resumed = Resumed(scene, case.store % 3)
    scene.victim.memory.trap(case.store, resumed)
    errno_of(lambda: WORKLOADS[case.name].act(scene))
    if resumed.original:
        resumed.finish_original()
    assert resumed.state, "the operation was over before the store"
    harmed = resumed.harmed()
    if harmed:
        assert len(harmed) == 1
        after = fsck.repair(scene.other.region, force=True)
        assert not after.findings, str(after)
        return 1
    assert seen(scene.other) in trees
    assert_sound(laboratory.memory)
    close_others(scene)
    go_on_together(scene)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_restored_before_every_store(
    name: str, laboratory: Laboratory, world: bytes, long_run: bool, figures: Figures
) -> None:
    trees = allowed(laboratory, world, name)
    scene = set_up(laboratory, world, name)
    before = scene.victim.memory.stores
    errno_of(lambda: WORKLOADS[name].act(scene))
    stores = list(range(scene.victim.memory.stores - before))
    if not long_run and len(stores) > SHORT:
        stores = sorted(random.Random(zlib.crc32(name.encode())).sample(stores, SHORT))
    harmed = []
    for store in stores:
        case = Case(name, store)
        replayable(
            HERE + "::test_replay",
            str(case),
            lambda: harmed.append(run_case(laboratory, world, trees, case)),  # noqa: B023
        )
    assert not any(one and two for one, two in pairwise(harmed)) or not long_run
    figures.count("snapshots restored in the middle of an operation", len(stores), name)
    if any(harmed):
        figures.count(
            "of these: while filling a block that was another's by then", sum(harmed), name
        )


def test_replay(laboratory: Laboratory, world: bytes, only_case: str | None) -> None:
    if only_case is None:
        pytest.skip("no --case")
    case = parse(only_case)
    run_case(laboratory, world, allowed(laboratory, world, case.name), case)
