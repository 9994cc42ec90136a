"""What a scribbler stores on a region, and on which areas of it."""

from __future__ import annotations

import random
from collections.abc import Callable

from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET, Geometry

WORD = 8

AREAS: dict[str, Callable[[Geometry], tuple[int, int]]] = {
    "superblock": lambda g: (0, 512),
    "commit word": lambda g: (COMMIT_OFFSET, COMMIT_OFFSET + WORD),
    "hint": lambda g: (HINT_OFFSET, HINT_OFFSET + WORD),
    "peer table": lambda g: (g.peers_offset, g.tags_offset),
    "tags": lambda g: (g.tags_offset, g.tags_offset + WORD * g.block_count),
    "blocks": lambda g: (g.data_offset, g.region_size),
}


def scribbled(value: int, chance: random.Random) -> int:
    """The bytes that are there, somewhat changed, or random ones."""
    kind = chance.randrange(4)
    if kind == 0:
        return value ^ 1 << chance.randrange(64)
    if kind == 1:
        return (value + chance.choice((-1, 1))) % (1 << 64)
    return 0 if kind == 2 else chance.getrandbits(64)
