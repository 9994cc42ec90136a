"""Three mounts of one region for each file of tests, and users to act as."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.posix.actor import Actor
from tests.support.lab import EVERYTHING, Lab, new_lab

#: Numbers that no account needs to exist for.
USER, OTHER, GROUP, SECOND_GROUP = 65533, 65532, 65531, 65530

#: Options of a mount whose requests come in so: read from the FUSE descriptor, or by pyfuse3.
FRONT_ENDS = {"descriptor": EVERYTHING, "pyfuse3": f"{EVERYTHING},loop=trio"}
#: What runs through both; all else runs through the first one.
BOTH = ("test_data", "test_errors", "test_handles", "test_names", "test_permissions", "test_times")

#: What pyfuse3 cannot do, and why.
NOT_THROUGH_PYFUSE3 = {
    "test_time_does_not_run_backwards": "pyfuse3 does not hand on that a time is the present",
}

_numbers = itertools.count()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the modules in BOTH once for each front end."""
    if "lab" in metafunc.fixturenames and metafunc.module.__name__.endswith(BOTH):
        ways = list(FRONT_ENDS)[: 1 if metafunc.function.__name__ in NOT_THROUGH_PYFUSE3 else None]
        metafunc.parametrize("lab", ways, indirect=True, scope="module")


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A region with three mounts."""
    options = FRONT_ENDS[getattr(request, "param", "descriptor")]
    with new_lab(128 << 20, 3, options) as made:
        yield made


@pytest.fixture
def places(lab: Lab) -> list[Path]:
    """One new directory, which all users may use, on all mounts."""
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
