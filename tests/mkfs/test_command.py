"""The command: what it makes, what it refuses, what it says, and its exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs import fsck
from ivshmemfs.format import superblock
from ivshmemfs.region import create_file, open_region
from mkfs.main import main
from tests.regions import TestRegion, get, new_region, put

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "region"


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def make(*arguments: str | Path) -> None:
    """Run the command where it should succeed; it returns then."""
    main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line with which the command refuses."""
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mkfs.ivshmemfs: ")
    assert err.count("\n") == 1
    return err.strip()


def read(path: Path) -> superblock.Superblock:
    raw = path.read_bytes()
    return superblock.decode(raw, len(raw))


# --- what it makes --------------------------------------------------------------------------


def test_size_creates_a_file_that_is_clean(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("--size", "1M", path)
    assert path.stat().st_size == SIZE
    with open_region(str(path), readonly=True) as region:
        assert not fsck.check(region).findings
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 1 MiB formatted as ivshmemfs"
    assert re.fullmatch(r"UUID [0-9a-f-]{36}, up to 16 peers", lines[1])
    assert lines[2] == "1004 blocks of 1024 bytes, 970 KiB usable (95%)"
    assert len(lines) == 3


def test_all_options(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "12345678-1234-5678-1234-567812345678"
    make("--size", "2M", "--label", "scratch", "--uuid", name, "--block-size", "4K",
         "--peers", "3", path)  # fmt: skip
    found = read(path)
    assert (found.label, found.uuid) == ("scratch", uuid.UUID(name).bytes)
    assert (found.geometry.block_size, found.geometry.peer_count) == (4096, 3)
    out = capsys.readouterr().out
    assert "label 'scratch'" in out
    assert name in out


def test_a_file_that_is_there_needs_no_size(path: Path) -> None:
    create_file(path, SIZE)
    make(path)
    assert read(path).geometry.region_size == SIZE


def test_the_right_size_of_an_empty_file_is_no_obstacle(path: Path) -> None:
    create_file(path, SIZE)
    make("--size", "1M", path)
    assert read(path).geometry.region_size == SIZE


def test_the_root_belongs_to_the_caller(path: Path) -> None:
    make("--size", "1M", path)
    with TestRegionAt(path) as made:
        attr = made.mount().getattr(1)
    assert (attr.mode, attr.uid, attr.gid) == (0o040755, os.getuid(), os.getgid())


def test_two_filesystems_are_not_alike(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make("--size", "1M", tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one", "two"))
    assert one[40:56] != two[40:56]  # UUID
    assert one[1024:1032] != two[1024:1032]  # commit word
    assert one[4096:4104] != two[4096:4104]  # incarnation of slot 1


def test_sixteen_gibibytes_take_no_more_than_a_few_blocks(path: Path) -> None:
    make("--size", "16G", path)
    assert path.stat().st_blocks * 512 < 1 << 20
    with open_region(str(path), readonly=True) as region:
        raw = region.memory.read(0, 512)
        assert superblock.decode(raw, region.size).geometry.block_count > 4_000_000


def test_as_a_module(path: Path) -> None:
    command = [sys.executable, "-m", "mkfs", "--size", "1M", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("mkfs.ivshmemfs: ")
    assert done.stderr.count("\n") == 1


# --- what it refuses ------------------------------------------------------------------------


class TestRegionAt:
    """Mounts of a region that stands already."""

    __test__ = False

    def __init__(self, path: Path) -> None:
        self._made = TestRegion.__new__(TestRegion)
        self._made.path, self._made._open = path, []

    def __enter__(self) -> TestRegion:
        return self._made

    def __exit__(self, *_: object) -> None:
        for region in self._made._open:
            region.close()


@pytest.fixture
def made() -> Iterator[TestRegion]:
    with new_region(SIZE) as region:
        yield region


def test_an_existing_filesystem(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    before = made.path.read_bytes()
    message = refused(capsys, made.path)
    assert "already carries an ivshmemfs filesystem" in message
    assert str(uuid.UUID(bytes=read(made.path).uuid)) in message
    assert "--force" in message
    assert made.path.read_bytes() == before


def test_an_existing_filesystem_whose_superblock_is_damaged(
    made: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    made.region().memory.write(0, b"damaged!")
    assert "already carries an ivshmemfs filesystem" in refused(capsys, made.path)


def test_live_peers_are_listed(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    fs, other = made.mount(), made.mount()
    before = made.path.read_bytes()
    message = refused(capsys, made.path)
    assert f"is mounted now by 2 peer(s): slot 1 (idle, pid {os.getpid()} on " in message
    assert "slot 2 (" in message
    assert "unmount it there first" in message
    assert made.path.read_bytes() == before
    fs.unmount()
    other.unmount()
    assert "already carries" in refused(capsys, made.path)


def test_peers_that_are_gone_do_not_count(
    made: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    child = os.fork()
    if child == 0:
        made.mount()
        os._exit(0)
    os.waitpid(child, 0)
    with open_region(str(made.path)) as region:
        assert region.memory.load(4096) >> 56 != 0
    assert "already carries" in refused(capsys, made.path)


def test_something_foreign(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(bytes(4000) + b"my thesis" + bytes(SIZE - 4009))
    before = path.read_bytes()
    message = refused(capsys, path)
    assert "something that is not an ivshmemfs filesystem" in message
    assert "--force" in message
    assert path.read_bytes() == before
    make("--force", path)
    assert read(path).geometry.region_size == SIZE


def test_another_size_than_the_file_has(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_file(path, SIZE)
    message = refused(capsys, "--size", "2M", path)
    assert f"has {SIZE} bytes, not {2 * SIZE}" in message
    assert "--force" in message
    assert path.stat().st_size == SIZE
    make("--force", "--size", "2M", path)
    assert path.stat().st_size == read(path).geometry.region_size == 2 * SIZE


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--size", "20K"), "a region of 20480 bytes cannot be formatted so"),
        (("--size", "1M", "--block-size", "3000"), "block size 3000"),
        (("--size", "1M", "--block-size", "512K"), "block size 524288"),
        (("--size", "1M", "--block-size", "64K"), "blocks"),
        (("--size", "1M", "--label", "x" * 65), "at most 64 bytes; this one has 65"),
        (("--size", "1M", "--peers", "0"), "0 is not in the range"),
        (("--size", "1M", "--peers", "256"), "256 is not in the range"),
        (("--size", "one"), "'one' is not a size"),
        (("--size", "1M", "--uuid", "me"), "'me' is not a UUID"),
        (("--size", "1M", "--colour", "red"), "No such option"),
        ((), "no such file"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(
    arguments: tuple[str, ...], says: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, *arguments, path)
    assert not path.exists()


def test_what_cannot_be_mapped_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """A sparse file can be larger than any address space."""
    path = Path(f"/dev/shm/ivshmemfs-mkfs-test-{os.getpid()}")
    try:
        assert "97.66 PiB" in refused(capsys, "--size", "100000T", path)
        assert not path.exists()
        path.write_bytes(b"kept" * 1024)
        assert "97.66 PiB" in refused(capsys, "--force", "--size", "100000T", path)
        assert path.read_bytes() == b"kept" * 1024
    finally:
        path.unlink(missing_ok=True)


def test_too_small_a_file_stays_as_it_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_file(path, 16384)
    assert "cannot be formatted so" in refused(capsys, path)
    assert path.read_bytes() == bytes(16384)


@pytest.mark.parametrize("spec", ["pci", "pci:0000:00:04.0", "mem:0xfe000000:1M", "label=x"])
def test_size_is_for_files(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "leave out --size" in refused(capsys, "--size", "1M", spec)
    assert not list(tmp_path.iterdir())


def test_no_region(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Missing argument 'REGION'" in refused(capsys)


def test_a_missing_directory(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--size", "1M", path / "in" / "nowhere")
    assert "no such directory" in message


def test_help_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    make("--help")
    assert "Make a new, empty filesystem" in capsys.readouterr().out


# --- force ----------------------------------------------------------------------------------


def test_force_replaces_everything(made: TestRegion) -> None:
    fs = made.mount()
    put(fs, 1, b"file", b"old" * 1000)
    fs.unmount()
    make("--force", "--block-size", "2K", made.path)
    fs = made.mount()
    assert [name for name, _, _ in fs.readdir(fs.opendir(1), 0)] == [b".", b".."]
    put(fs, 1, b"file", b"new")
    assert get(fs, 1, b"file") == b"new"
    fs.unmount()
    assert not fsck.check(made.region(readonly=True)).findings
