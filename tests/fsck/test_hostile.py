"""Hostile bytes: fsck survives any contents of a region, and -y leaves a filesystem that mounts.

Each case is one seed; a failure prints it, and IVSHMEMFS_SEED=N repeats that one case.
"""

from __future__ import annotations

import os
import random
import resource
import struct
import time
from collections.abc import Iterator

import pytest

from ivshmemfs import fsck
from ivshmemfs.errors import Corrupt, FormatError
from ivshmemfs.format import inode, node, peer, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET
from ivshmemfs.format.record import Field
from ivshmemfs.region import Region
from tests.support.attacks import VERBS, of_use, targets
from tests.support.damage import Knife, Names, sample
from tests.support.figures import Figures
from tests.support.regions import TestRegion, new_region

WORD = (1 << 64) - 1
SLOWEST = 5.0  # seconds that one check and repair may take
SHORT, LONG = 150, 20_000


@pytest.fixture(scope="module")
def made() -> Iterator[TestRegion]:
    image = sample()
    with new_region(len(image)) as region:
        region.path.write_bytes(image)
        yield region


@pytest.fixture(scope="module")
def region(made: TestRegion) -> Region:
    return made.region()


@pytest.fixture(scope="module")
def knife(region: Region) -> Knife:
    return Knife(region.memory)


# --- what is done to a region ---------------------------------------------------------------


def metadata_word(k: Knife, chance: random.Random) -> None:
    """Any word of any metadata block, its checksum made good (or not)."""
    block = chance.choice(targets().metadata)
    used = max(40, min(node.HEADER.unpack(k.read(block)).used, k.block_size))
    width = chance.choice((1, 2, 4, 8))
    offset = chance.randrange(4 // min(width, 4), used // width) * width
    old = int.from_bytes(k.read(block)[offset : offset + width], "little")
    verb = chance.choice(list(VERBS.values()))
    new = verb(old, 8 * width, chance) & (1 << 8 * width) - 1
    k.edit(block, offset, new.to_bytes(width, "little"), seal=chance.random() < 0.8)


def inode_field(k: Knife, chance: random.Random) -> None:
    """A field of an inode's record."""
    block, field = chance.choice(targets().inodes), chance.choice(inode.INODE.fields)
    old = int.from_bytes(k.read(block)[32 + field.offset :][: field.width], "little")
    verb = chance.choice(list(VERBS.values()))
    new = verb(old, 8 * field.width, chance) & (1 << 8 * field.width) - 1
    k.edit(block, 32 + field.offset, new.to_bytes(field.width, "little"))


def pointer(k: Knife, chance: random.Random) -> None:
    """A pointer that leads elsewhere: to itself, the root, freed, wrong and wild blocks."""
    block = chance.choice(targets().metadata)
    used = min(node.HEADER.unpack(k.read(block)).used, k.block_size)
    offset = chance.randrange(4, max(5, used // 8 - 1)) * 8
    target = chance.choice(
        [block, targets().root, chance.choice(targets().free), chance.choice(targets().metadata),
         k.geometry.block_count, (1 << 32) - 1, chance.randrange(k.geometry.block_count)]
    )  # fmt: skip
    tag = k.tag(target) if target < k.geometry.block_count else chance.getrandbits(64)
    raw = words.POINTER.pack(target, chance.choice((0, 1, 2, 999)), chance.choice((tag, tag, 1, 0)))
    k.edit(block, offset, raw)


def tags(k: Knife, chance: random.Random) -> None:
    """Entries of the tag table."""
    for _ in range(chance.choice((1, 3, 50, 500))):
        block = chance.randrange(k.geometry.block_count)
        verb = chance.choice(list(VERBS.values()))
        k.set_tag(block, verb(k.tag(block), 64, chance) & WORD)


def control_words(k: Knife, chance: random.Random) -> None:
    """Commit word, hint word, peer slots."""
    table = k.geometry.peers_offset
    for _ in range(chance.choice((1, 2, 20))):
        slot = table + chance.randrange(k.geometry.peer_count) * peer.SLOT_SIZE
        at = chance.choice((COMMIT_OFFSET, HINT_OFFSET, slot, slot + 8 * chance.randrange(64)))
        verb = chance.choice(list(VERBS.values()))
        k.memory.store(at, verb(k.memory.load(at), 64, chance) & WORD)


def header_field(k: Knife, chance: random.Random) -> None:
    """A field of a superblock or of its copy."""
    offset = chance.choice((superblock.OFFSET, superblock.COPY_OFFSET))
    field = chance.choice(superblock.SUPERBLOCK.fields)
    at = offset + field.offset
    old = int.from_bytes(k.memory.read(at, field.width), "little")
    verb = chance.choice(list(VERBS.values()))
    new = verb(old, 8 * field.width, chance) & (1 << 8 * field.width) - 1
    k.memory.write(at, new.to_bytes(field.width, "little"))
    if chance.random() < 0.7:
        k.edit_superblock(offset)


def garbage(k: Knife, chance: random.Random) -> None:
    """Runs of random bytes or zeros anywhere in claimed blocks."""
    for _ in range(chance.choice((1, 4, 30))):
        length = chance.choice((8, 64, k.block_size))
        at = k.at(
            chance.choice(targets().claimed), chance.randrange(0, k.block_size - length + 1, 8)
        )
        k.memory.write(at, chance.randbytes(length) if chance.random() < 0.7 else bytes(length))


def old_root(k: Knife, chance: random.Random) -> None:
    """A root that was replaced long ago, published again."""
    block, sequence = (
        chance.choice(targets().roots),
        words.split_commit(k.memory.load(COMMIT_OFFSET))[0],
    )
    k.memory.store(COMMIT_OFFSET, words.make_commit(sequence + 1, block))
    if chance.random() < 0.5:
        k.set_tag(block, node.HEADER.unpack(k.read(block)).tag)


ATTACKS = (
    metadata_word, metadata_word, metadata_word, inode_field, pointer, tags, control_words,
    header_field, garbage, old_root,
)  # fmt: skip


def attack(k: Knife, seed: int) -> list[str]:
    """Damage the region as `seed` says; returns what was done."""
    chance, done = random.Random(seed), []
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        do = chance.choice(ATTACKS)
        do(k, chance)
        done.append(do.__name__)
    return done


# --- what must hold afterwards --------------------------------------------------------------


def survives(region: Region, seed: int) -> str:
    """One case; returns how it ended."""
    region.memory.write(0, sample())
    done: list[str] = []
    began = time.monotonic()
    try:
        knife = Knife(region.memory)
        done = attack(knife, seed)
        try:
            before = fsck.check(region)
            after = fsck.repair(region, force=True)
        except (FormatError, Corrupt):
            return "refused"  # both superblocks are damaged, or one and the other is of tomorrow
        assert time.monotonic() - began < SLOWEST
        assert not after.findings, f"left:\n{after}\nwas:\n{before}\ndone:\n{after.repairs}"
        of_use(region)
        final = fsck.check(region)
        assert not final.findings, f"after use:\n{final}"
    except BaseException as error:
        error.add_note(f"seed {seed}: {done}")
        raise
    return "clean" if before.clean else "repaired"


@pytest.mark.slow
def test_seeded_attacks(region: Region, long_run: bool, figures: Figures) -> None:
    count = LONG if long_run else SHORT
    ends: dict[str, int] = {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    only = os.environ.get("IVSHMEMFS_SEED")
    if only is not None:
        survives(region, int(only))
        return
    for seed in range(count):
        end = survives(region, seed)
        ends[end] = ends.get(end, 0) + 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert ends["repaired"] > count // 2
    assert ends.get("refused", 0) < count // 50
    assert grown < 200 << 10, f"{grown} KiB more memory"
    figures.add(f"fsck: {count} hostile regions, {ends['repaired']} repaired, all mount and pass")


VALUES = (0, 1, 2, 255, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, 1 << 63, WORD)


@pytest.mark.slow
@pytest.mark.parametrize("field", superblock.SUPERBLOCK.fields, ids=lambda field: field.name)
@pytest.mark.parametrize("sealed", [False, True])
def test_every_superblock_field(field: Field, sealed: bool, region: Region) -> None:
    for value in VALUES:
        region.memory.write(0, sample())
        raw = (value & (1 << 8 * min(field.width, 8)) - 1).to_bytes(field.width, "little")
        region.memory.write(field.offset, raw)
        if sealed and field.name != "crc":
            Knife(region.memory).edit_superblock()
        report = fsck.check(region)  # the copy is whole
        after = fsck.repair(region)
        assert not after.findings, str(after)
        assert report.clean or after.repairs
    of_use(region)


def test_random_bytes_after_a_whole_superblock(region: Region) -> None:
    for seed in range(10):
        chance = random.Random(seed)
        raw = sample()
        region.memory.write(0, raw[:4096] + chance.randbytes(len(raw) - 4096))
        assert not fsck.check(region).clean
        after = fsck.repair(region, force=True)
        assert not after.findings, str(after)
        of_use(region)


def test_all_ones_and_all_zeros(region: Region) -> None:
    for filling in (b"\xff", b"\0"):
        raw = sample()
        region.memory.write(0, raw[:4096] + filling * (len(raw) - 4096))
        after = fsck.repair(region, force=True)
        assert not after.findings, str(after)
        of_use(region)


def test_findings_are_bounded(knife: Knife, region: Region) -> None:
    region.memory.write(0, sample())
    for block in range(knife.geometry.block_count):
        knife.set_tag(block, words.make_tag(255, 1, 1))
    report = fsck.check(region)
    assert report.counts[28] == knife.geometry.block_count
    assert len(report.findings) < 60
    assert "more of the same kind" in str(report)
    after = fsck.repair(region)
    assert not after.findings, str(after)


def test_a_directory_of_cycles_is_read_once(knife: Knife, region: Region) -> None:
    """Interior nodes that lead to each other would be read for ever."""
    region.memory.write(0, sample())
    interior = knife.interior_of(Names.crowd)
    count = node.HEADER.unpack(knife.read(interior)).count
    own = words.POINTER.pack(interior, 1, knife.tag(interior))
    knife.edit(interior, 32 + 8 * count, own * count)
    began = time.monotonic()
    assert not fsck.check(region).clean
    after = fsck.repair(region)
    assert not after.findings, str(after)
    assert time.monotonic() - began < SLOWEST


def test_a_name_that_drives_a_terminal_is_shown_harmlessly(knife: Knife, region: Region) -> None:
    region.memory.write(0, sample())
    entries = knife.entries(1)
    key, _, _ = entries[0]
    knife.set_entries(1, [(key, 8 << 56 | 4711, b"\x1b[2J\n\xff"), *entries[1:]])
    report = fsck.check(region)
    after = fsck.repair(region)
    for line in (*str(report).splitlines(), *after.repairs):
        assert line.isprintable(), line
        assert line.isascii(), line
    assert struct.calcsize("P") == 8
