"""`get`, `put` and the lock on damaged regions: they end, and touch nothing outside of DEST."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from ivshmemfs.cli import transfer
from ivshmemfs.cli.attach import paths
from ivshmemfs.cli.attach.paths import Place, resolve
from ivshmemfs.cli.attach.peer import patiently
from ivshmemfs.cli.transfer.get import Getter, Wishes
from ivshmemfs.cli.transfer.local import Folder
from ivshmemfs.cli.transfer.meter import Meter
from ivshmemfs.cli.transfer.put import Putter
from ivshmemfs.engine import FileLock, Filesystem
from ivshmemfs.errors import Busy, FormatError, IvshmemfsError
from tests.support import wounds
from tests.support.damage import Knife, Names, sample
from tests.support.exercise import SLOWEST
from tests.support.regions import TestRegion, new_region

EVERY = {"pointers": 4, "inodes": 4, "control": 8}  # one of so many in a short run
FAMILIES: dict[str, Callable[[], Iterator[tuple[str, wounds.Damage]]]] = {
    "pointers": wounds.pointers,
    "ladders": wounds.ladders,
    "names": wounds.names,
    "inodes": wounds.inodes,
    "control": wounds.control,
}


@pytest.fixture(scope="module")
def made() -> Iterator[TestRegion]:
    with new_region(len(sample())) as region:
        yield region


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A directory with DEST in it, and a tree to put."""
    (tmp_path / "dest").mkdir()
    (tmp_path / "tree" / "folder").mkdir(parents=True)
    (tmp_path / "tree" / "folder" / "big").write_bytes(b"x" * 20_000)
    (tmp_path / "tree" / "link").symlink_to("folder")
    return tmp_path


def fetched(fs: Filesystem, local: Path) -> None:
    wishes = Wishes(recursive=True, force=True, devices=False, special=False)
    with Folder(bytes(local / "dest")) as folder:
        Getter(fs, Meter(quiet=True), wishes).copy(resolve(fs, b"/"), folder, b"got")


def stored(fs: Filesystem, local: Path) -> None:
    putter = Putter(fs, Meter(quiet=True), recursive=True, force=True)
    putter.copy(bytes(local / "tree" / "folder"), Place(1, b"folder", b"/"))
    putter.copy(bytes(local / "tree" / "link"), Place(Names.inner, b"link", b"/folder/inner"))


def locked(fs: Filesystem, _local: Path) -> None:
    for ino in (Names.small, Names.far, Names.crowd, 999):
        lock = FileLock(fs, fs.locks, ino)
        if lock.holder() is None and lock.acquire(lock.gone()):
            lock.keep()
            lock.release()


def attempted(
    made: TestRegion, damage: wounds.Damage, call: Callable[[Filesystem, Path], None], local: Path
) -> bool:
    """Whether a call succeeds on a damaged region; it may fail as a command can tell."""
    region = made.region()
    try:
        region.memory.write(0, sample())
        damage(Knife(region.memory))
        fs = Filesystem.mount(region, readonly=call is fetched)
        call(fs, local)
        fs.unmount()
    except (OSError, IvshmemfsError, FormatError, Busy):
        return False
    finally:
        region.close()
    return True


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_locks_end(
    family: str,
    made: TestRegion,
    local: Path,
    long_run: bool,
    only_case: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for module in (transfer.get, paths, transfer.put):
        monkeypatch.setattr(module, "patiently", partial(patiently, seconds=0.2))
    step = 1 if long_run or only_case else EVERY.get(family, 1)
    outcomes = set()
    for name, damage in list(FAMILIES[family]())[::step]:
        if only_case not in (None, name):
            continue
        for call in (fetched, stored, locked):
            began = time.thread_time()
            outcomes.add(attempted(made, damage, call, local))
            taken = time.thread_time() - began
            assert taken < SLOWEST, f"--case {name!r}: {call.__name__} computed for {taken:.1f} s"
        assert sorted(os.listdir(local)) == ["dest", "tree"], f"--case {name!r}"
        assert set(os.listdir(local / "dest")) <= {"got"}, f"--case {name!r}"
        shutil.rmtree(local / "dest" / "got", ignore_errors=True)
    assert only_case or outcomes == {True, False}
    assert all(line.isprintable() for line in capfd.readouterr().err.split("\n"))
