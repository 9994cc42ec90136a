"""Any word of the metadata × any verb: the engine survives, before and during use; fsck repairs.

Each case is one seed; a failure prints the command that repeats it.
"""

from __future__ import annotations

import random
import resource
from collections import Counter
from collections.abc import Iterator

import pytest

from ivshmemfs.engine import Filesystem
from ivshmemfs.format import node, peer, superblock
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET
from tests.support.attacks import VERBS, targets
from tests.support.damage import Knife, sample
from tests.support.exercise import MOST_MEMORY, Ledger, joined, repaired, use
from tests.support.figures import Figures
from tests.support.regions import TestRegion, new_region

SHORT, LONG = 200, 20_000
WORD, MASK = 8, (1 << 64) - 1
HERE = "tests/hostile/test_seeded.py::test_any_word"


@pytest.fixture(scope="module")
def made() -> Iterator[TestRegion]:
    with new_region(len(sample())) as region:
        yield region


#: Kinds of places that have words of metadata, and how often each is chosen.
PLACES = {"superblock": 5, "control": 1, "slot": 4, "tag": 6, "block": 24}


def wound(k: Knife, seed: int) -> str:
    """Change one word as `seed` says; returns what kind of place it was in, and the verb."""
    chance = random.Random(seed)
    verb = chance.choice(list(VERBS))

    def changed(value: int) -> int:
        return VERBS[verb](value, 64, chance) & MASK

    kind = chance.choices(list(PLACES), list(PLACES.values()))[0]
    if kind == "superblock":
        at = superblock.OFFSET + WORD * chance.randrange(superblock.SUPERBLOCK.size // WORD)
        k.memory.store(at, changed(k.memory.load(at)))
        if chance.random() < 0.8:
            k.edit_superblock()
    elif kind == "block":
        block = chance.choice(targets().metadata)
        used = max(node.HEADER_SIZE, min(node.HEADER.unpack(k.read(block)).used, k.block_size))
        offset = WORD * chance.randrange(used // WORD)
        old = int.from_bytes(k.read(block)[offset : offset + WORD], "little")
        sealed = chance.random() < 0.9
        k.edit(block, offset, changed(old).to_bytes(WORD, "little"), seal=sealed)
    else:
        slot = k.geometry.peers_offset + peer.SLOT_SIZE * chance.randrange(k.geometry.peer_count)
        at = {
            "control": chance.choice((COMMIT_OFFSET, HINT_OFFSET)),
            "slot": slot + WORD * chance.randrange(peer.SLOT_SIZE // WORD),
            "tag": k.geometry.tags_offset + WORD * chance.choice(targets().claimed),
        }[kind]
        k.memory.store(at, changed(k.memory.load(at)))
    return f"{kind} × {verb}"


def one_case(made: TestRegion, seed: int, ledger: Ledger) -> str:
    """A mount that was there before the damage, or one that comes after it; then fsck."""
    region = made.region()
    try:
        region.memory.write(0, sample())
        fs: Filesystem | None = None
        if seed % 2:
            fs = Filesystem.mount(region)
            fs.statfs()
        done = wound(Knife(region.memory), seed)
        if fs is None:
            fs = joined(region, ledger)
        if fs is not None:
            use(fs, ledger)
        repaired(region)
        region.memory.write(0, sample())
        wound(Knife(region.memory), seed)
        repaired(region)
    finally:
        region.close()
    return done


@pytest.mark.slow
def test_any_word(
    made: TestRegion, long_run: bool, figures: Figures, only_case: str | None
) -> None:
    ledger, kinds = Ledger(), Counter[str]()
    seeds = range(LONG if long_run else SHORT) if only_case is None else (int(only_case),)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        try:
            kinds[one_case(made, seed, ledger)] += 1
        except BaseException as error:
            error.add_note(f"replay: .venv/bin/python -m pytest {HERE} --case {seed}")
            raise
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_MEMORY, f"{grown} KiB more memory"
    assert len(kinds) == len(PLACES) * len(VERBS) or not long_run, (
        "not every kind of place met every verb"
    )
    figures.add(f"hostile words: {len(seeds):,} seeded cases, {ledger.done:,} operations done, "
                f"{ledger.refused:,} refused, slowest {ledger.slowest:.2f} s")  # fmt: skip
