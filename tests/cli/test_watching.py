"""`wait` and `watch`: changes of other machines, with and without a mount."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from ivshmemfs.cli import commits
from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.region import Condition
from ivshmemfs.shm.commit import LOOKS
from tests.cli.conftest import complains, ivshmemfs
from tests.support.lab import ENVIRONMENT, Lab, needs_fuse, new_lab
from tests.support.regions import ROOT, TestRegion, new_region

FILE = stat.S_IFREG | 0o644
PATIENCE = 30.0


@pytest.fixture
def region() -> Iterator[TestRegion]:
    with new_region(32 << 20) as made:
        yield made


@pytest.fixture
def there(region: TestRegion) -> Iterator[Filesystem]:
    fs = region.mount()
    yield fs
    fs.unmount()


_started_commands: list[Running] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """No command and no pipe outlives its test, also a failed one."""
    yield
    while _started_commands:
        _started_commands.pop().close()


class Running:
    """A command that prints as things happen."""

    def __init__(self, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ivshmemfs.cli", *map(str, words)], env=ENVIRONMENT,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        _started_commands.append(self)

    def close(self) -> None:
        """End it and close its pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def end(self, code: int) -> str:
        """Wait for its end; what it still printed."""
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == code, err
        assert "Traceback" not in err
        return out


def _started(there: Filesystem, *words: object) -> Running:
    """A `watch` that is ready: it has told of a first change."""
    running = Running("watch", *words)
    number = 0
    os.set_blocking(running.process.stdout.fileno(), False)  # type: ignore[union-attr]
    while not running.line():
        assert running.process.poll() is None, running.end(0)
        time.sleep(0.005)  # the command still loads; the region must not fill up meanwhile
        there.setattr(ROOT_INO, ROOT, mode=0o755)
        number += 1
        there.mknod(ROOT_INO, b"first%d" % number, FILE, 0, ROOT)
    os.set_blocking(running.process.stdout.fileno(), True)  # type: ignore[union-attr]
    there.mknod(ROOT_INO, b"last", FILE, 0, ROOT)
    while "last" not in running.line():
        pass
    return running


# --- wait -------------------------------------------------------------------------------------


def test_waiting_for_a_name(region: TestRegion, there: Filesystem) -> None:
    waiting = Running("wait", f"{region.path}:/new", "--timeout", PATIENCE)
    there.mknod(ROOT_INO, b"new", FILE, 0, ROOT)
    waiting.end(0)
    assert ivshmemfs("wait", f"{region.path}:/new").returncode == 0, "it exists already"
    waiting = Running("wait", f"{region.path}:/new", "--gone")
    there.unlink(ROOT_INO, b"new", ROOT)
    waiting.end(0)
    assert ivshmemfs("wait", f"{region.path}:/new/below", "--gone").returncode == 0


def test_waiting_for_a_change(region: TestRegion, there: Filesystem) -> None:
    handle, _ = there.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    waiting = Running("wait", "--changed", f"{region.path}:/file")
    offset = 0
    while waiting.process.poll() is None:  # it may not have looked at the first state yet
        there.write(handle, offset, b"x")
        offset += 1
        assert offset < 1_000_000
    waiting.end(0)
    there.release(handle)


def test_the_time_is_over(region: TestRegion, there: Filesystem) -> None:
    result = ivshmemfs("wait", f"{region.path}:/never", "--timeout", "0.05")
    assert (result.returncode, result.stdout, result.stderr) == (124, "", "")


def test_waiting_stores_nothing(region: TestRegion, there: Filesystem) -> None:
    waiting = Running("wait", f"{region.path}:/new")
    assert ivshmemfs("peers", region.path).stdout.count("\n") == 3, "one peer, heading, readers"
    there.mknod(ROOT_INO, b"new", FILE, 0, ROOT)
    waiting.end(0)


def test_what_is_no_path(tmp_path: Path) -> None:
    complains(ivshmemfs("wait", tmp_path / "x"), 1, "not on an ivshmemfs mount", "REGION:/path")
    complains(
        ivshmemfs("wait", "/dev/shm/none-such:/x"), 32, "/dev/shm/none-such", "no such region"
    )
    complains(ivshmemfs("watch", f"{tmp_path}:/x", ":/y"), 1, "no region before the colon")


def test_a_region_that_goes(region: TestRegion, there: Filesystem) -> None:
    waiting = Running("wait", f"{region.path}:/never", "--timeout", PATIENCE)
    there.mknod(ROOT_INO, b"other", FILE, 0, ROOT)
    saved = region.path.with_name("saved")
    os.link(region.path, saved)
    region.path.unlink()
    region.path.write_bytes(bytes(4096))
    out, err = waiting.process.communicate(timeout=PATIENCE)
    assert waiting.process.returncode == 32, (out, err)
    assert err.count("\n") == 1
    saved.rename(region.path)


# --- watch ------------------------------------------------------------------------------------


def test_watching_a_tree_without_a_mount(region: TestRegion, there: Filesystem) -> None:
    name = f"{region.path}:/"
    watching = _started(there, "-r", name)
    folder = there.mkdir(ROOT_INO, b"dir", 0o755, ROOT).ino
    lines = [watching.line()]
    while not lines[-1].endswith("dir"):
        lines.append(watching.line())
    assert lines[-1] == f"created {name}dir"
    file = there.mknod(folder, b"new\nline", FILE, 0, ROOT).ino
    assert watching.line() == f"created {name}dir/new\\nline"
    there.setattr(file, ROOT, mode=0o600)
    assert watching.line() == f"attributes {name}dir/new\\nline"
    there.rename(folder, b"new\nline", ROOT_INO, b"a", 0, ROOT)
    assert watching.line() == f"moved {name}dir/new\\nline -> {name}a"
    there.rename(ROOT_INO, b"dir", ROOT_INO, b"other", 0, ROOT)
    assert watching.line() == f"moved {name}dir -> {name}other"
    there.mknod(folder, b"b", FILE, 0, ROOT)
    assert watching.line() == f"created {name}other/b"
    watching.process.terminate()
    watching.end(8)


def test_formats(region: TestRegion, there: Filesystem) -> None:
    watching = _started(there, "--json", f"{region.path}:/")
    file = there.mknod(ROOT_INO, b"named \xff", FILE, 0, ROOT).ino
    found: dict[str, object] = {}
    while found.get("inode") != file:
        found = json.loads(watching.line())
    assert found == {
        "event": "created", "path": f"{region.path}:/named \udcff", "inode": file,
        "directory": False,
    }  # fmt: skip
    watching.process.terminate()
    watching.end(8)
    bad = ivshmemfs("watch", "--format", "%e %q", f"{region.path}:/")
    complains(bad, 1, "%q is not known")


def test_watching_one_file(region: TestRegion, there: Filesystem) -> None:
    handle, _ = there.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    there.mknod(ROOT_INO, b"other", FILE, 0, ROOT)
    watching = Running("watch", "--format", "%e %i%%", f"{region.path}:/file")
    os.set_blocking(watching.process.stdout.fileno(), False)  # type: ignore[union-attr]
    offset = 0
    while not (line := watching.line()):
        assert watching.process.poll() is None
        there.write(handle, offset, b"x")
        there.setattr(there.lookup(ROOT_INO, b"other").ino, ROOT, mode=0o600 + offset % 8)
        offset += 1
    assert line == f"changed {handle.ino}%"
    there.release(handle)
    there.unlink(ROOT_INO, b"file", ROOT)
    os.set_blocking(watching.process.stdout.fileno(), True)  # type: ignore[union-attr]
    while line.startswith("changed"):
        line = watching.line()
    assert line == f"removed {handle.ino}%"
    watching.process.terminate()
    watching.end(8)


def test_a_watched_directory_that_is_removed(region: TestRegion, there: Filesystem) -> None:
    there.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    watching = Running("watch", f"{region.path}:/dir")
    there.mkdir(ROOT_INO, b"later", 0o755, ROOT)
    assert watching.process.poll() is None
    result = ivshmemfs("wait", "--exists", f"{region.path}:/dir")
    assert result.returncode == 0
    there.rmdir(ROOT_INO, b"dir", ROOT)
    out, err = watching.process.communicate(timeout=PATIENCE)
    assert watching.process.returncode in (0, 2), (out, err)  # 2: removed before the first look


def test_a_reader_that_goes_ends_it_quietly(region: TestRegion, there: Filesystem) -> None:
    watching = _started(there, f"{region.path}:/")
    watching.process.stdout.close()  # type: ignore[union-attr]
    number = 0
    while watching.process.poll() is None:
        number += 1
        time.sleep(0.005)
        there.mknod(ROOT_INO, b"n%d" % number, FILE, 0, ROOT)
        assert number < 2000
    with watching.process.stderr as err:  # type: ignore[union-attr]
        assert "Traceback" not in err.read()


@needs_fuse
def test_paths_on_a_mount(tmp_path: Path) -> None:
    with new_lab(8 << 20, 2) as lab:
        _on_mounts(lab)


def _on_mounts(lab: Lab) -> None:
    one, two = lab.paths
    waiting = Running("wait", one / "result")
    (two / "result").write_text("done")
    waiting.end(0)
    assert ivshmemfs("wait", "--timeout", "0.05", one / "none").returncode == 124
    (two / "dir").mkdir()
    watching = Running("watch", "-r", one)
    os.set_blocking(watching.process.stdout.fileno(), False)  # type: ignore[union-attr]
    number = 0
    while not watching.line():
        assert watching.process.poll() is None
        number += 1
        (two / f"f{number}").touch()
    os.set_blocking(watching.process.stdout.fileno(), True)  # type: ignore[union-attr]
    (two / "dir" / "last").touch()
    while (line := watching.line()) != f"created {one}/dir/last":
        assert line.split()[0] in ("created", "changed", "attributes"), line
    watching.process.terminate()
    watching.end(8)


class _Quiet:
    """A region whose commit word changes at a given second; its clock runs while one waits.

    A nap takes `slowness` times as long as it should.
    """

    def __init__(self, commit_at: float, slowness: float = 1.0) -> None:
        self.now, self.commit_at = 100.0, 100.0 + commit_at
        self.slowness = slowness
        self.naps: list[tuple[float, float]] = []  # when, and how long each nap is
        self.store = SimpleNamespace(commit_word=self)
        self.bells = None

    def condition(self) -> Condition:
        return Condition.SOUND

    def load(self) -> int:
        return 2 if self.now >= self.commit_at else 1

    def await_other(self, word: int, nap: float, naps: int) -> int:
        assert word == self.load()
        self.naps.append((self.now - 100.0, nap))
        left = self.commit_at - self.now
        taken = nap * naps * self.slowness
        self.now += min(taken, left if left > 0 else taken)
        return self.load()


def test_waiting_gets_quieter_and_wakes_up_by_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    region = _Quiet(commit_at=30.0)
    monkeypatch.setattr(commits, "time", SimpleNamespace(monotonic=lambda: region.now))
    seen = [region.now for _ in commits.commits(cast("Filesystem", region), 160.0)]
    assert seen == [100.0, 130.0]
    assert region.now == pytest.approx(160.0, abs=0.1)

    def naps(start: float, end: float) -> set[float]:
        return {nap for at, nap in region.naps if start <= at < end}

    assert naps(0.0, 0.015) == naps(30.0, 30.015) == {commits.SHORT_NAP}
    assert naps(0.03, 9.9) == naps(30.03, 39.9) == {commits.NAP}
    assert naps(10.1, 29.9) == naps(40.1, 60.0) == {commits.LONG_NAP}
    assert len(region.naps) < 1500  # the interpreter rests while nothing happens


def test_a_wait_ends_in_time_where_naps_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (0.01, 0.7, 1.3, 5.0, 12.3):
        region = _Quiet(commit_at=1e9, slowness=3.0)
        monkeypatch.setattr(commits, "time", SimpleNamespace(monotonic=lambda r=region: r.now))
        end = region.now + seconds
        assert len(list(commits.commits(cast("Filesystem", region), end))) == 1
        longest = region.naps[-1][1] * 3 * LOOKS
        assert end <= region.now < end + longest
