"""What the tests of mappings share: small memories on a file, and blocks in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from ivshmemfs.region import DEVICE, NORMAL, WRITE_COMBINING, Blocks, Memory

SIZE = 256 * 1024
TAGS = 4096
DATA = 64 * 1024
BLOCK = 512
COUNT = 64

# Examples may be slow: the machine may be loaded, or emulated.
PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck))

MakeMemory = Callable[..., Memory]


class Place(NamedTuple):
    """A file to map, and a way to map it."""

    path: Path
    map: MakeMemory


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    path = tmp_path / "region"
    path.write_bytes(bytes(SIZE))
    made: list[Memory] = []

    def make(length: int = SIZE, offset: int = 0, **how: int) -> Memory:
        descriptor = os.open(path, os.O_RDWR if how.get("writable", True) else os.O_RDONLY)
        try:
            memory = Memory(descriptor, length, offset, **how)  # type: ignore[arg-type]
        finally:
            os.close(descriptor)
        made.append(memory)
        return memory

    yield Place(path, make)
    for memory in made:
        memory.close()


@pytest.fixture(
    params=[NORMAL, DEVICE, WRITE_COMBINING], ids=["normal", "device", "write-combining"]
)
def memory(request: pytest.FixtureRequest, place: Place) -> Memory:
    return place.map(access=request.param)


@pytest.fixture
def blocks(memory: Memory) -> Blocks:
    return Blocks(memory, TAGS, DATA, BLOCK, COUNT)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)
