"""No argument crashes the process: it works or raises a documented exception."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivshmemfs.region import Blocks, Memory, crc32c
from tests.region.conftest import BLOCK, COUNT, DATA, PATIENT, TAGS, Place

pytestmark = pytest.mark.slow

EXPECTED = (ValueError, TypeError, BufferError, OSError, MemoryError, OverflowError)

numbers = st.one_of(
    st.integers(-2, 70),
    st.integers(),
    st.sampled_from([2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1, 2**64]),
    st.sampled_from([TAGS, DATA, BLOCK, COUNT, 4096, 256 * 1024 - 8]),
)
buffers = st.one_of(
    st.binary(max_size=600),
    st.binary(max_size=600).map(bytearray),
    st.sampled_from([8 * COUNT, 2048]).map(bytearray),
    st.binary(min_size=2, max_size=40).map(lambda raw: memoryview(raw)[::2]),
)
anything = st.one_of(
    numbers, buffers, st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.just([])
)
arguments = st.lists(anything, max_size=6)
names = st.sampled_from(["offset", "length", "pointers", "into", "at", "count", "tag", "seed", "x"])
keywords = st.dictionaries(names, anything, max_size=2)

METHODS = [
    *(f"memory.{n}" for n in dir(Memory) if not n.startswith("_") and n not in ("close", "trap")),
    *(f"blocks.{n}" for n in dir(Blocks) if not n.startswith("_")),
]


def explained(error: BaseException) -> None:
    """An expected refusal must say what was wrong."""
    assert str(error)


def call(target: Any, given_arguments: list[Any], named: dict[str, Any]) -> None:
    if not callable(target):
        return
    try:
        target(*given_arguments, **named)
    except EXPECTED as error:
        explained(error)


@pytest.mark.parametrize("method", METHODS)
@settings(PATIENT, max_examples=150)
@given(given_arguments=arguments, named=keywords)
def test_methods(
    place: Place, method: str, given_arguments: list[Any], named: dict[str, Any]
) -> None:
    memory = place.map()
    blocks = Blocks(memory, TAGS, DATA, BLOCK, COUNT)
    owner, name = method.split(".")
    call(getattr(memory if owner == "memory" else blocks, name), given_arguments, named)
    assert memory.read(0, 8) is not None
    memory.close()


@settings(PATIENT, max_examples=300)
@given(given_arguments=arguments, named=keywords)
def test_crc32c(given_arguments: list[Any], named: dict[str, Any]) -> None:
    call(crc32c, given_arguments, named)


@settings(PATIENT, max_examples=300)
@given(st.lists(numbers, min_size=1, max_size=3), st.integers(-1, 4))
def test_mappings(place: Place, numbers_given: list[int], access: int) -> None:
    descriptor = os.open(place.path, os.O_RDWR)
    try:
        memory = Memory(descriptor, *numbers_given[1:], access=access)
        memory.close()
    except EXPECTED as error:
        explained(error)
    finally:
        os.close(descriptor)


@settings(PATIENT, max_examples=500)
@given(st.tuples(numbers, numbers, numbers, numbers))
def test_tables(place: Place, given_numbers: tuple[int, int, int, int]) -> None:
    memory = place.map()
    try:
        blocks = Blocks(memory, *given_numbers)
    except EXPECTED as error:
        explained(error)
    else:
        last = blocks.block_count - 1
        pointers, _ = blocks.claim(1, 5, last)
        into = bytearray(blocks.block_size)
        assert blocks.gather(pointers, 0, blocks.block_size, into) or not pointers
    finally:
        memory.close()
