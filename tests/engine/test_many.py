"""One of many costs what one of few does: open files, attributes, and listings beside them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from ivshmemfs.engine import Filesystem
from ivshmemfs.format.inode import ROOT_INO
from tests.support.regions import ROOT, TestRegion, put

FEW, MANY = 3, 3000


def steps(fs: Filesystem, act: Callable[[], object]) -> tuple[int, int]:
    """Return (nodes visited and read, calls of Python and C functions) of `act`.

    Compiled modules make no calls that Python counts.
    """
    calls = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    act()  # the first time fills the caches
    before = fs.store.work
    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return fs.store.work - before, calls


def look_around(fs: Filesystem, folder: int, ino: int) -> dict[str, tuple[int, int]]:
    """Return the steps of each operation that must not depend on what else is there."""

    def open_and_close() -> None:
        fs.release(fs.open(ino, os.O_RDONLY, ROOT))

    def make_and_remove() -> None:
        fs.release(fs.create(folder, b"new", 0o644, os.O_RDWR, ROOT)[0])
        fs.unlink(folder, b"new", ROOT)

    def listing() -> list[bytes]:
        return [name for name, _, _ in fs.readdir(fs.opendir(folder), 0)]

    return {
        "open": steps(fs, open_and_close),
        "list": steps(fs, listing),
        "look up": steps(fs, lambda: fs.lookup(folder, b"one")),
        "make and remove": steps(fs, make_and_remove),
        "get": steps(fs, lambda: fs.getxattr(ino, b"user.00000")),
    }


@pytest.fixture
def found(roomy: TestRegion) -> dict[int, dict[str, tuple[int, int]]]:
    """The steps with a few files open and a few attributes, and with many."""
    fs = roomy.mount()
    folder = fs.mkdir(ROOT_INO, b"folder", 0o755, ROOT).ino
    ino = put(fs, folder, b"one", b"content").ino
    result, opened = {}, 0
    put(fs, ROOT_INO, b"other", b"content")
    for wanted in (FEW, MANY):
        for number in range(opened, wanted):
            fs.create(ROOT_INO, b"%d" % number, 0o644, os.O_RDWR, ROOT)
            fs.setxattr(ino, b"user.%05d" % number, b"%d" % number, 0, ROOT)
        opened = wanted
        result[wanted] = look_around(fs, folder, ino)
    return result


def test_one_of_many_takes_the_steps_of_one_of_few(
    found: dict[int, dict[str, tuple[int, int]]],
) -> None:
    few, many = found[FEW], found[MANY]
    for name, (work, calls) in many.items():
        # A higher inode table and attribute tree have some nodes more on each path.
        assert work <= few[name][0] + 4, (name, few[name], many[name])
        assert calls <= 1.25 * few[name][1] + 16, (name, few[name], many[name])
