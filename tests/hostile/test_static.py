"""Damage that is there before a mount, or appears under it: the engine survives, fsck repairs."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator

import pytest

from ivshmemfs.engine import Filesystem
from tests.support import wounds
from tests.support.damage import Knife, sample
from tests.support.exercise import MOST_MEMORY, Ledger, joined, repaired, use
from tests.support.figures import Figures
from tests.support.regions import TestRegion, new_region

EVERY = {
    "inodes": 5,
    "headers": 4,
    "control": 6,
    "pointers": 2,
    "endless": 3,
}  # one of so many in a short run
FAMILIES: dict[str, Callable[[], Iterator[tuple[str, wounds.Damage]]]] = {
    "pointers": wounds.pointers,
    "ladders": wounds.ladders,
    "endless": wounds.endless,
    "names": wounds.names,
    "inodes": wounds.inodes,
    "headers": wounds.headers,
    "control": wounds.control,
}


@pytest.fixture(scope="module")
def made() -> Iterator[TestRegion]:
    with new_region(len(sample())) as region:
        yield region


def one_case(made: TestRegion, damage: wounds.Damage, ledger: Ledger) -> None:
    """Both mounts survive; then, from the same damage, fsck leaves a filesystem of use."""
    region = made.region()
    try:
        region.memory.write(0, sample())
        early = Filesystem.mount(region)
        early.statfs()
        damage(Knife(region.memory))
        use(early, ledger)
        region.memory.write(0, sample())
        damage(Knife(region.memory))
        late = joined(region, ledger)
        if late is not None:
            use(late, ledger)
        region.memory.write(0, sample())
        damage(Knife(region.memory))
        repaired(region)
    finally:
        region.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_survives(
    family: str, made: TestRegion, long_run: bool, figures: Figures, only_case: str | None
) -> None:
    ledger, count, failed = Ledger(), 0, []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = 1 if long_run or only_case else EVERY.get(family, 1)
    for name, damage in list(FAMILIES[family]())[::step]:
        if only_case not in (None, name):
            continue
        try:
            one_case(made, damage, ledger)
        except Exception as error:
            failed.append((name, error))
        count += 1
    for name, first in failed[:1]:
        first.add_note(f"--case {name!r}; {len(failed)} of {count} failed: "
                       + "; ".join(f"{n}: {e!r:.120}" for n, e in failed[:30]))  # fmt: skip
        raise first
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_MEMORY, f"{grown} KiB more memory"
    assert only_case is not None or (ledger.done and ledger.refused)
    figures.add(f"hostile {family}: {count} cases, {ledger.done:,} operations done, "
                f"{ledger.refused:,} refused, slowest {ledger.slowest:.2f} s, "
                f"most work of a turn {ledger.most_work:,}")  # fmt: skip
