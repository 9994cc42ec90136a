"""What attacks on a region are made of, and the use that a repaired region must be of."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import Busy
from ivshmemfs.format import node
from ivshmemfs.region import Region
from tests.support.damage import Knife, Names, metadata_blocks, sample
from tests.support.regions import ROOT, new_region

VERBS: dict[str, Callable[[int, int, random.Random], int]] = {
    "zeroes": lambda value, bits, chance: 0,
    "ones": lambda value, bits, chance: (1 << bits) - 1,
    "first bit": lambda value, bits, chance: value ^ 1,
    "middle bit": lambda value, bits, chance: value ^ 1 << bits // 2,
    "last bit": lambda value, bits, chance: value ^ 1 << bits - 1,
    "random": lambda value, bits, chance: chance.getrandbits(bits),
    "plus one": lambda value, bits, chance: value + 1,
    "minus one": lambda value, bits, chance: value - 1,
}


class Targets(NamedTuple):
    """Where things are while nothing is damaged yet."""

    root: int
    metadata: list[int]
    claimed: list[int]
    free: list[int]
    inodes: list[int]  # blocks
    roots: list[int]  # those that were replaced too


@cache
def targets() -> Targets:
    image = sample()
    with new_region(len(image)) as made:
        made.path.write_bytes(image)
        k = Knife(made.region().memory)
        numbers = [1, 2, *(n for n in vars(Names).values() if isinstance(n, int))]
        blocks = range(k.geometry.block_count)
        return Targets(
            k.root,
            metadata_blocks(k),
            [b for b in blocks if k.tag(b)],
            [b for b in blocks if not k.tag(b)],
            [k.block_of(ino) for ino in numbers],
            [b for b in blocks if node.HEADER.unpack(k.read(b)).kind == node.ROOT],
        )


def of_use(region: Region) -> None:
    """The filesystem mounts, can be read and changed."""
    fs = Filesystem.mount(region)
    for _, attr, _ in fs.readdir(fs.opendir(1), 0):
        assert fs.getattr(attr.ino).ino == attr.ino
    for _ in range(200):
        try:
            fs.mkdir(1, b"made by the test", 0o755, ROOT)
            break
        except Busy:
            time.sleep(0.002)  # the hint word is held by a peer that shows no progress
    fs.rmdir(1, b"made by the test", ROOT)
    fs.unmount()
