"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivshmemfs.errors import UsageError
from ivshmemfs.region import exact_size, parse_size, readable_size
from tests.region.conftest import PATIENT


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("4096", 4096), ("0x1000", 4096), ("1K", 1024), ("1k", 1024), ("1M", 1 << 20),
     ("1MiB", 1 << 20), ("1MB", 1 << 20), ("16G", 16 << 30), ("2T", 2 << 40), (" 5M ", 5 << 20),
     ("0x10M", 16 << 20), ("512B", 512)],
)  # fmt: skip
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "M", "-1", "0", "0M", "1.5G", "1X", "1 M", "1MM", "1_000", "0x", "9999999T", "٣", "1e3"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write it like"):
        parse_size(text)


@settings(PATIENT)
@given(st.integers(1, 2**63 - 1))
def test_an_exact_size_is_read_back(size: int) -> None:
    assert parse_size(exact_size(size)) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (700, "700 bytes"),
        (1 << 20, "1 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 44, "16 TiB"),
        (1 << 62, "4 EiB"),
    ],
)
def test_sizes_read_well(size: int, text: str) -> None:
    assert readable_size(size) == text
