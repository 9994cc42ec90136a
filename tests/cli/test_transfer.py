"""`get` and `put`: both directions, what they keep, and what they refuse."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checks import assert_sound
from tests.cli.conftest import complains, ivshmemfs
from tests.regions import ROOT, TestRegion, new_region, put, tree

MIB = 1 << 20


def done(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture
def region() -> Iterator[TestRegion]:
    with new_region(8 * MIB) as made:
        yield made
        assert_sound(made.region().memory)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A tree with everything that can be copied."""
    top = tmp_path / "tree"
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "empty").write_bytes(b"")
    (top / "sub" / "file").write_bytes(os.urandom(300_001))
    (top / os.fsdecode(b"not-\xff-utf8")).write_bytes(b"name")
    (top / "link").symlink_to("sub/file")
    (top / "dangling").symlink_to("nowhere")
    os.mkfifo(top / "fifo")
    with (top / "sparse").open("wb") as file:
        file.seek(3 * MIB)
        file.write(b"end")
        file.truncate(20 * MIB)
    (top / "sub" / "file").chmod(0o751)
    for path in (top / "sub" / "file", top / "sub"):
        os.utime(path, ns=(1_000_000_001, 2_000_000_003))
    return top


def described(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        owner = (status.st_uid, status.st_gid)
        found[str(path.relative_to(top))] = (status.st_mode, owner, status.st_mtime_ns, content)
    return found


def test_a_tree_there_and_back(region: TestRegion, local: Path, tmp_path: Path) -> None:
    done(ivshmemfs("put", "-r", region.path, local, "/"))
    done(ivshmemfs("get", "-r", "--devices", region.path, "tree", tmp_path / "back"))
    assert described(tmp_path / "back") == described(local)
    assert (tmp_path / "back" / "sparse").stat().st_blocks * 512 < 2 * MIB


def test_several_sources_and_a_new_name(region: TestRegion, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    done(ivshmemfs("put", region.path, tmp_path / "a", tmp_path / "b", "/"))
    done(ivshmemfs("put", region.path, tmp_path / "a", "/c"))
    assert tree(region.mount(readonly=True)) == {b"a": b"a", b"b": b"b", b"c": b"a"}
    done(ivshmemfs("get", region.path, "/c", tmp_path / "d"))
    assert (tmp_path / "d").read_text() == "a"
    complains(ivshmemfs("get", region.path, "a", "b", tmp_path / "none"), 1, "is no directory")
    complains(ivshmemfs("put", region.path, tmp_path / "a", tmp_path / "b", "/c"), 1, "directory")


def test_nothing_is_overwritten_without_force(region: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    fs = region.mount()
    put(fs, 1, b"old", b"old")
    complains(ivshmemfs("put", region.path, tmp_path / "new", "/old"), 1, "exists", "--force")
    assert tree(fs) == {b"old": b"old"}
    complains(ivshmemfs("get", region.path, "old", tmp_path / "new"), 1, "exists", "--force")
    assert (tmp_path / "new").read_text() == "new"
    assert os.listdir(tmp_path) == ["new"]
    done(ivshmemfs("put", "--force", region.path, tmp_path / "new", "/old"))
    assert tree(fs) == {b"old": b"new"}
    put(fs, 1, b"old", b"newer")
    done(ivshmemfs("get", "--force", region.path, "old", tmp_path / "new"))
    assert (tmp_path / "new").read_text() == "newer"
    fs.unmount()


def test_refusals(region: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "plain").write_bytes(bytes(MIB))
    complains(ivshmemfs("get", region.path, "/no/such", tmp_path / "x"), 2, "/no/such")
    complains(ivshmemfs("put", region.path, tmp_path / "no", "/x"), 2, "No such file")
    complains(ivshmemfs("put", region.path, tmp_path / "file", "/no/such"), 2, "No such file")
    complains(ivshmemfs("put", region.path, tmp_path / "dir", "/"), 1, "--recursive")
    complains(ivshmemfs("get", tmp_path / "plain", "x", tmp_path / "y"), 32)
    assert tree(region.mount(readonly=True)) == {}


def test_a_full_region_keeps_nothing_half_done(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(2 * MIB))
    with new_region(MIB) as made:
        fs = made.mount()
        free = fs.statfs().blocks_free
        complains(ivshmemfs("put", made.path, tmp_path / "big", "/"), 2, "big")
        assert tree(fs) == {}
        fs.collect()
        assert fs.statfs().blocks_free >= free - 1
        fs.unmount()


def test_a_large_file_beside_a_mount(tmp_path: Path) -> None:
    content = os.urandom(MIB) * 70 + b"end"
    (tmp_path / "large").write_bytes(content)
    with new_region(96 * MIB) as made:
        fs = made.mount()
        done(ivshmemfs("put", made.path, tmp_path / "large", "/"))
        assert fs.lookup(1, b"large").size == len(content)
        made.path.chmod(0o400)
        done(ivshmemfs("get", made.path, "large", tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == content
        fs.unmount()


def test_a_file_that_is_replaced_while_it_is_copied(tmp_path: Path) -> None:
    """What arrives is one version or the other in each piece, never torn, and put stays whole."""
    pieces = [bytes([number]) * (3 * MIB) for number in range(1, 6)]
    with new_region(32 * MIB) as made:
        fs = made.mount()
        handle, _ = fs.create(1, b"busy", 0o644, os.O_WRONLY, ROOT)
        fs.write(handle, 0, pieces[0])
        for turn in range(4):
            command = [sys.executable, "-m", "ivshmemfs.cli", "get", str(made.path), "busy"]
            running = subprocess.Popen([*command, str(tmp_path / f"copy{turn}")])
            number = 0
            while running.poll() is None:
                number += 1
                for at in range(0, 3 * MIB, MIB):
                    fs.write(handle, at, pieces[number % 5][at : at + MIB])
            assert running.returncode == 0
            copied = (tmp_path / f"copy{turn}").read_bytes()
            assert len(copied) == 3 * MIB
            for at in range(0, 3 * MIB, MIB):
                assert len(set(copied[at : at + MIB])) == 1
        fs.release(handle)
        fs.unmount()


def test_put_of_what_ends_in_the_middle_of_a_block(region: TestRegion, tmp_path: Path) -> None:
    for size in (4095, 4096, 70_000, 4 * MIB - 1):
        content = os.urandom(size)
        (tmp_path / "odd").write_bytes(content)
        done(ivshmemfs("put", "-f", region.path, tmp_path / "odd", "/odd"))
        done(ivshmemfs("get", "-f", region.path, "/odd", tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_is_said_and_leaves_nothing(region: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(3 * MIB))
    done(ivshmemfs("put", region.path, tmp_path / "big", "/big"))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(small)], check=True)
    try:
        complains(ivshmemfs("get", region.path, "/big", small / "big"), 2, "No space left")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
