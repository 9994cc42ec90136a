"""Zombies: a peer is stopped before every single store (or load) and resumes after others have
committed, freed, reused and collected.  Its operation takes effect completely or not at all, at
some moment between its beginning and its end.  The data of others does not change.
"""

from __future__ import annotations

import random
import zlib

import pytest

from tests.crash.cases import replayable, set_up
from tests.crash.workloads import WORKLOADS
from tests.crash.zombies import SCRIPTS, Case, errno_of, orders, run_case
from tests.support.figures import Figures
from tests.support.laboratory import Laboratory

HERE = "tests/crash/test_zombies.py"
SHORT = 3  # points per operation and script in the short form


def parse(text: str) -> Case:
    rest, _, event = text.partition("@")
    name, _, script = rest.partition("/")
    return Case(name, script, int(event.rstrip("l")), event.endswith("l"))


def chosen(count: int, seed: str, short: int, long_run: bool) -> list[int]:
    """Which of `count` points to try: all of them, or a few."""
    if long_run or count <= short:
        return list(range(count))
    return sorted(random.Random(zlib.crc32(seed.encode())).sample(range(count), short))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_before_every_store(
    name: str,
    script: str,
    laboratory: Laboratory,
    world: bytes,
    long_run: bool,
    figures: Figures,
) -> None:
    allowed = orders(laboratory, world, name, script)
    scene = set_up(laboratory, world, name)
    before = scene.victim.memory.stores
    errno_of(lambda: WORKLOADS[name].act(scene))
    stores = scene.victim.memory.stores - before
    points = chosen(stores, name + script, SHORT, long_run)
    for event in points:
        case = Case(name, script, event, False)
        replayable(
            HERE + "::test_replay",
            str(case),
            lambda: run_case(laboratory, world, allowed, case),  # noqa: B023
        )
    figures.count("zombies stopped before a store", len(points), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_before_every_load_or_store(
    name: str, laboratory: Laboratory, world: bytes, long_run: bool, figures: Figures
) -> None:
    """Between a look and the store that relies on it."""
    allowed = orders(laboratory, world, name, "conflict")
    step = 5 if long_run else 67
    event, points = zlib.crc32(name.encode()) % step, 0
    while True:
        case = Case(name, "conflict", event, True)
        slept = True

        def run() -> None:
            nonlocal slept
            slept = run_case(laboratory, world, allowed, case)  # noqa: B023

        replayable(HERE + "::test_replay", str(case), run)
        if not slept:
            break
        event, points = event + step, points + 1
    figures.count("zombies stopped before a load or store", points, name)


def test_replay(laboratory: Laboratory, world: bytes, only_case: str | None) -> None:
    if only_case is None:
        pytest.skip("no --case")
    case = parse(only_case)
    assert run_case(laboratory, world, orders(laboratory, world, case.name, case.script), case)
