"""Two mounts of one region with room for programs, for each file of tests."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import Lab, new_lab

_numbers = itertools.count()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """At its end, the daemons must be alive, their logs clean, and the region sound."""
    with new_lab(512 << 20, 2) as made:
        yield made


@pytest.fixture
def here(lab: Lab) -> Iterator[Path]:
    """A new directory on the first mount, which all users may use, and which goes with the test."""
    path = lab.paths[0] / f"p{next(_numbers)}"
    path.mkdir()
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def there(lab: Lab, here: Path) -> Path:
    """The same directory on the second mount."""
    return lab.paths[1] / here.name
