"""Mounts for the tests: every one is unmounted and every daemon ended, also when a test fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuse.fake_kernel import Kernel
from tests.fuse.fake_mount import FakeMount


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., FakeMount]]:
    """Makes mounts of the test double; arguments are added to its command line and environment."""
    made: list[FakeMount] = []

    def make(*words: str, **environment: str) -> FakeMount:
        directory = tmp_path / f"mount{len(made)}"
        directory.mkdir()
        made.append(FakeMount(directory, *words, **environment))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.end()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeMount]:
    """One mount for all tests of a module that each work in a directory of their own."""
    one = FakeMount(tmp_path_factory.mktemp("shared"))
    try:
        yield one
    finally:
        one.end()


@pytest.fixture
def mnt(mount: Callable[..., FakeMount]) -> FakeMount:
    """One mount of the test double with default options."""
    return mount()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """The descriptor's front end, with a socket that plays the kernel."""
    made = Kernel()
    try:
        yield made
    finally:
        made.close()
