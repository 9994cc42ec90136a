"""The world that all campaigns start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.workloads import PLAN, SIZE, build_world
from tests.support.laboratory import Fates, Laboratory
from tests.support.regions import new_region


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    """A laboratory whose region holds the world, with no peer mounted."""
    with pytest.MonkeyPatch.context() as patch, new_region(SIZE, **PLAN) as made:
        fates = Fates()
        fates.install(patch)
        fs = made.mount()
        build_world(fs)
        fs.unmount()
        yield Laboratory(made, fates)


@pytest.fixture(scope="module")
def world(laboratory: Laboratory) -> bytes:
    """The region with the world on it."""
    return laboratory.save()
