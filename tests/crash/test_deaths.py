"""Crash points: a peer dies before every single store of every operation."""

from __future__ import annotations

import errno
import random
import zlib
from contextlib import suppress
from typing import NamedTuple

import pytest

from ivshmemfs.errors import FsError, IvshmemfsError
from ivshmemfs.format import superblock
from ivshmemfs.region import Memory
from mkfs.initial import Parameters
from mkfs.writer import format_region
from tests.crash.cases import (
    Reference,
    check_aftermath,
    close_others,
    die,
    make_reference,
    replayable,
    set_up,
)
from tests.crash.workloads import WORKLOADS
from tests.support.checks import assert_empty, assert_sound, detailed_tree
from tests.support.figures import Figures
from tests.support.laboratory import Death, Laboratory, Peer
from tests.support.regions import ROOT

HERE = "tests/crash/test_deaths.py"
SHORT = 6  # points per operation in the short form


class Case(NamedTuple):
    names: list[str]
    store: int

    def __str__(self) -> str:
        return "+".join(self.names) + f"@{self.store}"


def parse(text: str) -> Case:
    names, _, store = text.partition("@")
    return Case(names.split("+"), int(store))


def chosen(count: int, seed: str, long_run: bool) -> list[int]:
    """Which of `count` points to try: all of them, or a few."""
    if long_run or count <= SHORT:
        return list(range(count))
    return sorted(random.Random(zlib.crc32(seed.encode())).sample(range(count), SHORT))


def run_case(laboratory: Laboratory, world: bytes, reference: Reference, case: Case) -> None:
    scene = set_up(laboratory, world, *case.names)
    assert die(scene, case.names, case.store)
    close_others(scene)
    survivor = scene.other
    if case.store % 2:
        survivor = laboratory.mounted()  # a peer that comes later can take over as well
        scene.other.run(lambda fs: fs.unmount())
    check_aftermath(survivor, reference, [scene.victim])


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_single_operations(
    name: str, laboratory: Laboratory, world: bytes, long_run: bool, figures: Figures
) -> None:
    reference = make_reference(laboratory, world, [name])
    scene = set_up(laboratory, world, name)
    assert not die(scene, [name], reference.stores), "one more store than it does was counted"
    stores = chosen(reference.stores, name, long_run)
    for store in stores:
        case = Case([name], store)
        replayable(
            HERE + "::test_replay",
            str(case),
            lambda: run_case(laboratory, world, reference, case),  # noqa: B023
        )
    figures.count("crash points, single operations", len(stores), name)


PLAIN = [name for name, workload in WORKLOADS.items() if workload.plain]


@pytest.mark.parametrize("seed", range(10))
def test_pairs_of_operations(
    seed: int, laboratory: Laboratory, world: bytes, long_run: bool, figures: Figures
) -> None:
    chance, points = random.Random(seed), 0
    while points < (1000 if long_run else 8):
        names = chance.choices(PLAIN, k=2)
        reference = make_reference(laboratory, world, names)
        count = min(reference.stores, 25 if long_run else 2)
        for store in chance.sample(range(reference.stores), count):
            case = Case(names, store)
            replayable(
                HERE + "::test_replay",
                str(case),
                lambda: run_case(laboratory, world, reference, case),  # noqa: B023
            )
            points += 1
        figures.count("crash points, pairs of operations", count, "+".join(names))


# --- a second death -------------------------------------------------------------------------


def run_second_death(
    laboratory: Laboratory, world: bytes, reference: Reference, case: Case, second: int
) -> bool:
    """The peer that recovers dies as well; False when it was through before."""
    scene = set_up(laboratory, world, *case.names)
    assert die(scene, case.names, case.store)
    close_others(scene)
    scene.victim.bury()
    scene.other.die_at(second)
    try:
        scene.other.tick(12)
    except Death:
        check_aftermath(laboratory.mounted(), reference, [scene.victim, scene.other])
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_second_death_during_recovery(
    name: str, laboratory: Laboratory, world: bytes, long_run: bool, figures: Figures
) -> None:
    reference = make_reference(laboratory, world, [name])
    chance, points = random.Random(name), 0
    firsts = chance.sample(range(reference.stores), min(reference.stores, 3 if long_run else 1))
    for first in firsts:
        case, second = Case([name], first), 0 if long_run else chance.randrange(12)
        died = True
        while died:

            def run() -> None:
                nonlocal died
                died = run_second_death(laboratory, world, reference, case, second)  # noqa: B023

            replayable(HERE + "::test_replay", f"{case},{second}", run)
            points += died
            second += 1 if long_run else 17
    figures.count("crash points, second death during recovery", points, name)


# --- formatting -----------------------------------------------------------------------------


def _format(laboratory: Laboratory, memory: Memory) -> None:
    geometry = superblock.decode(memory.read(0, superblock.SUPERBLOCK.size)).geometry
    format_region(memory, geometry, Parameters(b"another filesyst"), chance=random.Random(5))


def _stale(peer: Peer) -> None:
    """An older mount notices with each operation, and leaves the region alone."""
    for action in (
        lambda fs: fs.getattr(1),
        lambda fs: fs.mkdir(1, b"stale", 0o755, ROOT),
        lambda fs: fs.tick(),
    ):
        with pytest.raises(FsError) as caught:
            peer.quick(action)
        assert caught.value.errno == errno.ESTALE


def test_formatting_that_dies(laboratory: Laboratory, world: bytes, figures: Figures) -> None:
    """Before its first store the old filesystem is there; then there is none until the last."""
    geometry = superblock.decode(world).geometry
    point, died = 0, True
    while died:
        laboratory.restore(world)
        mounted, victim = laboratory.mounted(), laboratory.newcomer()
        before = mounted.run(detailed_tree)
        victim.die_at(point)
        try:
            _format(laboratory, victim.memory)
        except Death:
            point += 1
        else:
            died = False
        if point == 1 and died:
            assert mounted.run(detailed_tree) == before
            mounted.run(lambda fs: fs.unmount())
        else:
            _stale(mounted)
            with suppress(IvshmemfsError):
                newcomer = laboratory.mounted()
                assert newcomer.run(detailed_tree) == {}
                assert not died or point > 5
        again = laboratory.newcomer()
        format_region(again.memory, geometry, Parameters(b"and yet another!"))
        fresh = laboratory.mounted()
        if mounted.fs._volume.member is not None:
            _stale(mounted)
            mounted.run(lambda fs: fs.unmount())
        fresh.tick(12)
        assert fresh.run(detailed_tree) == {}
        assert_empty(fresh.fs)
        assert not assert_sound(fresh.memory).findings
    assert point >= 15
    figures.count("crash points, single operations", point, "mkfs --force")


def test_replay(laboratory: Laboratory, world: bytes, only_case: str | None) -> None:
    if only_case is None:
        pytest.skip("no --case")
    text, _, second = only_case.partition(",")
    case = parse(text)
    reference = make_reference(laboratory, world, case.names)
    if second:
        assert run_second_death(laboratory, world, reference, case, int(second))
    else:
        run_case(laboratory, world, reference, case)
