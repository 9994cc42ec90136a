"""Three mounts of one region for each file of tests, and users to act as."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.posix.actor import Actor
from tests.support.lab import Lab, new_lab

#: Numbers that no account needs to exist for.
USER, OTHER, GROUP, SECOND_GROUP = 65533, 65532, 65531, 65530

_numbers = itertools.count()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A region with three mounts."""
    with new_lab(128 << 20, 3) as made:
        yield made


@pytest.fixture
def places(lab: Lab) -> list[Path]:
    """One new directory, which everybody may use, on all mounts."""
    name = f"t{next(_numbers)}"
    (lab.paths[0] / name).mkdir()
    (lab.paths[0] / name).chmod(0o777)
    return [path / name for path in lab.paths]


@pytest.fixture
def here(places: list[Path]) -> Path:
    """The directory of this test on the first mount."""
    return places[0]


@pytest.fixture
def there(places: list[Path]) -> Path:
    """The same on the second mount."""
    return places[1]


@pytest.fixture(scope="session")
def root() -> Iterator[Actor]:
    """Root, without a umask."""
    actor = Actor(0, 0)
    yield actor
    actor.close()


@pytest.fixture(scope="session")
def user() -> Iterator[Actor]:
    """An ordinary user, in two groups."""
    actor = Actor(USER, GROUP, (GROUP, SECOND_GROUP))
    yield actor
    actor.close()


@pytest.fixture(scope="session")
def other() -> Iterator[Actor]:
    """Another one, in one group of the first."""
    actor = Actor(OTHER, SECOND_GROUP, (SECOND_GROUP,))
    yield actor
    actor.close()


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)
