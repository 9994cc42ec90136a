"""Regions for engine tests; fsck checks each one after its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ivshmemfs.engine import Filesystem
from tests.support.checks import assert_clean
from tests.support.regions import TestRegion, new_region

SMALLEST = 80 << 10


@pytest.fixture(params=["smallest", "small", "default"])
def made(request: pytest.FixtureRequest) -> Iterator[TestRegion]:
    """A region of each kind: 80 KiB in all, 1 KiB blocks, 4 KiB blocks."""
    size, plan = {
        "smallest": (SMALLEST, {"block_size": 1024, "peer_count": 4}),
        "small": (2 << 20, {}),
        "default": (16 << 20, {}),
    }[request.param]
    with new_region(size, **plan) as region:
        yield region
        assert_clean(region)


@pytest.fixture
def roomy() -> Iterator[TestRegion]:
    """A region of 1 KiB blocks with room for thousands of files."""
    with new_region(8 << 20) as region:
        yield region
        assert_clean(region)


@pytest.fixture
def fs(made: TestRegion) -> Filesystem:
    """A mount of `made`."""
    return made.mount()


@pytest.fixture
def other(made: TestRegion, fs: Filesystem) -> Filesystem:
    """A second mount of `made`."""
    return made.mount()
