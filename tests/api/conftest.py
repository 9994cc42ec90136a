"""Clients of regions; fsck checks each region after its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import ivshmemfs
from tests.support.checks import assert_clean
from tests.support.regions import TestRegion, new_region


@pytest.fixture
def made() -> Iterator[TestRegion]:
    """A region with room for some MiB."""
    with new_region(16 << 20) as region:
        yield region
        assert_clean(region)


@pytest.fixture
def fs(made: TestRegion) -> Iterator[ivshmemfs.Client]:
    """A client of `made` that writes."""
    with ivshmemfs.open(made.path) as client:
        yield client


@pytest.fixture
def other(made: TestRegion) -> Iterator[ivshmemfs.Client]:
    """Another one."""
    with ivshmemfs.open(made.path) as client:
        yield client


@pytest.fixture
def reader(made: TestRegion) -> Iterator[ivshmemfs.Client]:
    """A client of `made` that only reads."""
    with ivshmemfs.open(made.path, readonly=True) as client:
        yield client
