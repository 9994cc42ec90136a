"""The sample filesystem, as a region of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.damage import sample
from tests.support.regions import TestRegion, new_region


@pytest.fixture
def made() -> Iterator[TestRegion]:
    image = sample()
    with new_region(len(image)) as region:
        region.path.write_bytes(image)
        yield region
