"""The inputs that the repository keeps: one file per reader, one input per line, in hex."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent / "inputs"
LARGEST = 6 << 10  # bytes of a file
MUTATIONS = 4


def load(reader: str) -> list[bytes]:
    """What is kept for a reader."""
    path = HERE / f"{reader}.hex"
    return [bytes.fromhex(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(reader: str, inputs: list[bytes]) -> int:
    """Keep the shortest inputs, as many as fit; returns how many."""
    lines: list[str] = []
    for data in sorted(set(inputs), key=lambda d: (len(d), d)):
        if sum(len(line) + 1 for line in lines) + 2 * len(data) < LARGEST:
            lines.append(data.hex())
    (HERE / f"{reader}.hex").write_text("".join(line + "\n" for line in lines))
    return len(lines)


def mutated(inputs: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` inputs made from these, the same every time."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(inputs))
        for _ in range(chance.randrange(1, MUTATIONS)):
            at = chance.randrange(len(data) + 1)
            kind = chance.randrange(4)
            if kind == 0:
                data[at:at] = chance.randbytes(chance.choice((1, 2, 8)))
            elif kind == 1:
                del data[at : at + chance.choice((1, 2, 8))]
            elif kind == 2:
                data[at : at + 8] = chance.choice((bytes(8), b"\xff" * 8, chance.randbytes(8)))
            elif data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
        yield bytes(data)
