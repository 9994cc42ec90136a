"""`Client.watch`: what another process changes is told, by path and kind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

import ivshmemfs
from ivshmemfs.engine import diff
from tests.support.mounts import ENVIRONMENT
from tests.support.regions import TestRegion

PATIENCE = 20.0
CHILD = """
import sys
import ivshmemfs
with ivshmemfs.open(sys.argv[1]) as fs:
    for line in sys.stdin:
        eval(line, {"fs": fs})
        print("done", flush=True)
"""


class Other:
    """Another process with a client of its own, which does what it is told."""

    def __init__(self, made: TestRegion) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, made.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip

    def do(self, code: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(code, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "done\n"

    def end(self) -> None:
        self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0


@pytest.fixture
def there(made: TestRegion, reader: ivshmemfs.Client) -> Other:
    return Other(made)


def seen(watch: ivshmemfs.Watch) -> list[tuple[str, str]]:
    return [(change.kind, change.path) for change in watch.poll(PATIENCE)]


def test_another_process_changes_a_tree(reader: ivshmemfs.Client, there: Other) -> None:
    there.do("fs.makedirs('/in/below')")
    watch = reader.watch("/in", recursive=True)
    assert watch.poll() == []
    there.do("fs.write_bytes('/in/below/a', b'one')")
    (change,) = watch.poll(PATIENCE)
    assert (change.kind, change.path, change.is_dir) == ("created", "/in/below/a", False)
    assert change.inode == reader.stat("/in/below/a").st_ino
    there.do("fs.write_bytes('/in/below/a', b'other')")
    assert seen(watch) == [("changed", "/in/below/a")]
    there.do("fs.chmod('/in/below/a', 0o600)")
    assert seen(watch) == [("attributes", "/in/below/a")]
    there.do("fs.rename('/in/below', '/in/beside')")
    moved = watch.poll(PATIENCE)[0]
    assert (moved.kind, moved.path, moved.target) == ("moved", "/in/below", "/in/beside")
    there.do("fs.remove('/in/beside/a')")
    assert seen(watch) == [("removed", "/in/beside/a")]
    there.do("fs.write_bytes('/elsewhere', b'')")
    assert watch.poll(0.05) == []
    there.end()


def test_one_file_under_its_own_name(reader: ivshmemfs.Client, there: Other) -> None:
    there.do("fs.makedirs('in')")
    there.do("fs.write_bytes('in/a', b'one')")
    watch = reader.watch("in/a")
    there.do("fs.write_bytes('in/b', b'not watched')")
    there.do("fs.write_bytes('in/a', b'other')")
    assert seen(watch) == [("changed", "in/a")]
    there.do("fs.rename('in/a', 'in/c')")
    (change,) = watch.poll(PATIENCE)
    assert (change.kind, change.path, change.target) == ("moved", "in/a", "in/c")
    there.end()


def test_an_iteration_ends_with_the_directory(reader: ivshmemfs.Client, there: Other) -> None:
    there.do("fs.mkdir('/in')")
    watch = reader.watch("/in")
    found: list[ivshmemfs.Change] = []
    thread = threading.Thread(target=lambda: found.extend(watch))
    thread.start()
    there.do("fs.write_bytes('/in/a', b'')")
    while not found:
        time.sleep(0.01)
    there.do("fs.rmtree('/in')")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert found[0].kind == "created"
    assert watch.poll(None) == []
    there.end()


def test_the_root_and_links_lead_there(fs: ivshmemfs.Client, other: ivshmemfs.Client) -> None:
    fs.mkdir("/in")
    fs.symlink("in", "/link")
    top, linked = fs.watch(), fs.watch("/link")
    other.write_bytes("/in/a", b"")
    assert seen(linked) == [("created", "/link/a")]
    other.write_bytes("/b", b"")
    assert ("created", "/b") in seen(top)


def test_what_is_not_there(fs: ivshmemfs.Client) -> None:
    with pytest.raises(FileNotFoundError):
        fs.watch("/no/such")


def test_a_region_that_goes(made: TestRegion, reader: ivshmemfs.Client) -> None:
    watch = reader.watch("/")
    os.rename(made.path, made.path.with_suffix(".old"))
    made.path.write_bytes(b"")
    try:
        with pytest.raises(OSError, match="region"):
            watch.poll(PATIENCE)
    finally:
        os.rename(made.path.with_suffix(".old"), made.path)


def test_an_overflow_is_told_and_it_goes_on(
    fs: ivshmemfs.Client, other: ivshmemfs.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs.mkdir("/in")
    watch = fs.watch("/in")
    with monkeypatch.context() as patch:
        patch.setattr(diff, "NAMES_MAX", 3)
        for number in range(6):
            other.write_bytes(f"/in/{number}", b"")
        assert seen(watch) == [("overflow", "/in")]
    assert watch.poll() == []
    other.write_bytes("/in/after", b"")
    assert seen(watch) == [("created", "/in/after")]


def test_a_closed_client_ends_it(fs: ivshmemfs.Client) -> None:
    watch = fs.watch("/")
    threading.Timer(0.2, fs.close).start()
    with pytest.raises(ValueError, match="closed"):
        watch.poll(None)
