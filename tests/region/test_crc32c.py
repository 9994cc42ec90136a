"""CRC-32C against known vectors, a bit-by-bit model, and its own table form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivshmemfs.native._native import _crc32c_by_instruction, _crc32c_by_table
from ivshmemfs.region import crc32c
from tests.region.conftest import PATIENT

# RFC 3720, appendix B.4, and the usual check value.
VECTORS = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


def bit_by_bit(data: bytes, seed: int = 0) -> int:
    crc = seed ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("function", [crc32c, _crc32c_by_instruction, _crc32c_by_table])
@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_known_vectors(function: Callable[[bytes], int], data: bytes, expected: int) -> None:
    assert function(data) == expected


@settings(PATIENT)
@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_equals_the_definition(data: bytes, seed: int) -> None:
    expected = bit_by_bit(data, seed)
    assert crc32c(data, seed) == expected
    assert _crc32c_by_instruction(data, seed) == expected
    assert _crc32c_by_table(data, seed) == expected


LENGTHS = [255, 256, 257, 319, 320, 511, 512, 767, 768, 769, 1535, 1536, 4092, 4096, 70_000]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("start", [0, 1, 3, 7])
def test_long_buffers_equal_the_table(length: int, start: int) -> None:
    data = bytes((i * 197 + (i >> 8)) & 0xFF for i in range(length + start))
    view = memoryview(data)[start:]
    for seed in (0, 0x12345678):
        expected = _crc32c_by_table(view, seed)
        assert crc32c(view, seed) == expected
        assert _crc32c_by_instruction(view, seed) == expected


@settings(PATIENT)
@given(st.binary(max_size=2000), st.integers(0, 2000))
def test_a_seed_chains(data: bytes, cut: int) -> None:
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed out of range"):
        crc32c(b"", seed)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError):
        crc32c("text")  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        crc32c(memoryview(b"123456789")[::2])
