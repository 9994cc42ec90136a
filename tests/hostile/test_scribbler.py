"""A writer scribbles on one area of the region while a mount works on it."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ivshmemfs.format.superblock import decode
from tests.support.damage import sample
from tests.support.exercise import Ledger, joined, repaired, use
from tests.support.figures import Figures
from tests.support.regions import TestRegion, new_region
from tests.support.scribbles import AREAS, WORD, scribbled


@contextmanager
def scribbling(made: TestRegion, area: tuple[int, int], seed: int) -> Iterator[list[int]]:
    """A thread that changes one word after the other; yields how many, as a list of one."""
    memory, chance = made.region().memory, random.Random(seed)
    ended, count = threading.Event(), [0]

    def scribble() -> None:
        while not ended.wait(0.00005):
            at = chance.randrange(area[0], area[1], WORD)
            memory.store(at, scribbled(memory.load(at), chance))
            count[0] += 1

    thread = threading.Thread(target=scribble, daemon=True)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that the scribbler gets between any two steps
    try:
        yield count
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_a_live_scribbler(area: str, long_run: bool, figures: Figures) -> None:
    """Each operation ends in time, with a result or a tolerable error; then fsck repairs."""
    ledger, words = Ledger(), 0
    image = sample()
    where = AREAS[area](decode(image[:512], len(image)).geometry)
    with new_region(len(image)) as made:
        region = made.region()
        for seed in range(400 if long_run else 25):
            region.memory.write(0, image)
            fs = joined(region, ledger)
            assert fs is not None
            with scribbling(made, where, seed) as count:
                use(fs, ledger)
                late = joined(region, ledger)
                if late is not None:
                    use(late, ledger)
            words += count[0]
            repaired(region)
    assert words
    figures.add(
        f"live scribbler on the {area}: {words:,} words, {ledger.done:,} operations done, "
        f"{ledger.refused:,} refused, slowest {ledger.slowest:.2f} s"
    )
