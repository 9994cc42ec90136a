"""The command: what it makes, what it refuses, what it says, and its exit codes."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs import __version__, fsck
from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import FsError, InUse
from ivshmemfs.format import superblock
from ivshmemfs.region import blank, create_file, open_region
from ivshmemfs.shm.repair import RepairSession
from mkfs.main import main
from tests.support.regions import TestRegion, get, new_region, put

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
    assert lines[2] == "996 blocks of 1024 bytes, 962 KiB usable (94%)"
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


def test_sixteen_sparse_gibibytes_take_no_more_than_a_few_blocks(path: Path) -> None:
    make("--sparse", "--size", "16G", path)
    assert path.stat().st_blocks * 512 < 1 << 20
    with open_region(str(path), readonly=True) as region:
        raw = region.memory.read(0, 512)
        assert superblock.decode(raw, region.size).geometry.block_count > 4_000_000


def test_the_memory_is_reserved(path: Path, tmp_path: Path) -> None:
    make("--size", "4M", path)
    assert path.stat().st_blocks * 512 >= 4 << 20
    there = tmp_path / "there"
    create_file(there, 4 << 20)
    make(there)
    assert there.stat().st_blocks * 512 >= 4 << 20
    sparse = tmp_path / "sparse"
    make("--sparse", "--size", "4M", sparse)
    assert sparse.stat().st_blocks * 512 < 1 << 20


def test_any_size(path: Path) -> None:
    make("--any-size", "--size", "3M", path)
    assert path.stat().st_size == read(path).geometry.region_size == 3 << 20


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    make("--version")
    assert capsys.readouterr().out == f"mkfs.ivshmemfs, version {__version__}\n"


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
    """Mounts of a region that exists already."""

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
    assert "is mounted now by 2 peer(s): slot 1" in refused(capsys, "--force", made.path)
    assert "is mounted now by" in refused(capsys, "--force", "--size", "2M", made.path)
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
    assert not fsck.check(open_region(str(path), readonly=True)).findings


@pytest.mark.parametrize("options", [(), ("--force",), ("--force", "--force")])
def test_no_file_is_made_smaller(
    options: tuple[str, ...], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_file(path, 2 * SIZE)
    assert "mkfs makes no file smaller" in refused(capsys, *options, "--size", "1M", path)
    assert path.stat().st_size == 2 * SIZE


@pytest.mark.parametrize(("size", "instead"), [("3M", "2M or 4M"), ("96M", "64M or 128M")])
def test_a_size_that_no_device_can_have(
    size: str, instead: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "--size", size, path)
    assert f"use {instead}, or --any-size" in message
    assert not path.exists()


def test_a_file_of_a_size_that_no_device_can_have(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_file(path, 3 * SIZE)
    assert "--any-size" in refused(capsys, path)
    make("--any-size", path)
    assert read(path).geometry.region_size == 3 * SIZE


@pytest.mark.parametrize("at", [4096, 700_000, SIZE - 1])
def test_foreign_data_anywhere(at: int, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_file(path, SIZE)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"x")
    before = path.read_bytes()
    assert "something that is not an ivshmemfs filesystem" in refused(capsys, path)
    assert path.read_bytes() == before
    make("--force", path)


def test_a_hole_costs_no_memory_when_it_is_looked_at() -> None:
    path = Path(f"/dev/shm/ivshmemfs-mkfs-hole-{os.getpid()}")
    create_file(path, 64 << 20)
    try:
        make("--sparse", path)
        assert path.stat().st_blocks * 512 < 4 << 20
    finally:
        path.unlink()


def test_what_is_too_large_to_be_read_is_sampled(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blank, "SECONDS", -1.0)
    path.write_bytes(bytes(SIZE))
    make(path)
    assert "only samples of it were searched" in capsys.readouterr().out
    path.write_bytes(bytes(SIZE // 2) + b"x" * (SIZE // 2))
    assert "something that is not" in refused(capsys, path)


# --- a full file system ---------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], timeout=60, check=True)


def test_a_region_that_does_not_fit(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small / "region"
    message = refused(capsys, "--size", "8M", path)
    assert "8 MiB do not fit there; the file system has 4 MiB, of which 4 MiB are free" in message
    assert not path.exists()
    (small / "ballast").write_bytes(bytes(3 << 20))
    assert "of which 1 MiB are free" in refused(capsys, "--size", "2M", path)
    assert not path.exists()
    make("--sparse", "--size", "2M", path)
    capsys.readouterr()
    assert "of which" in refused(capsys, "--force", path)  # not all of it is there


def test_mkfs_on_a_full_file_system(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small / "region"
    create_file(path, 2 * SIZE)
    (small / "ballast").write_bytes(bytes(4 << 20))
    message = refused(capsys, "--sparse", path)
    assert f"the file system of {path} is full (4 MiB in all)" in message


def test_a_mount_whose_file_system_is_full(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = small / "region"
    make("--sparse", "--size", "4M", path)
    with open_region(str(path)) as region:
        fs = Filesystem.mount(region)
        put(fs, 1, b"before", b"there")
        ballast = os.statvfs(small).f_bfree * os.statvfs(small).f_frsize
        (small / "ballast").write_bytes(bytes(ballast))
        for _ in range(2):
            with pytest.raises(FsError) as caught:
                put(fs, 1, b"after", b"x" * 1_000_000)
            assert caught.value.errno == errno.ENOSPC
        assert [r.message for r in caplog.records] == [str(caught.value)]
        assert f"the file system of {path} is full" in caplog.records[0].message
        assert get(fs, 1, b"before") == b"there"
        (small / "ballast").unlink()
        put(fs, 1, b"after", b"x" * 1_000_000)
        fs.unmount()
        assert not fsck.check(region).findings


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
        assert "128 PiB" in refused(capsys, "--size", "131072T", path)
        assert "128 PiB" in refused(capsys, "--sparse", "--size", "131072T", path)
        assert not path.exists()
        path.write_bytes(b"kept" * 1024)
        for options in ((), ("--sparse",)):
            message = refused(capsys, *options, "--force", "--size", "131072T", path)
            assert "128 PiB" in message
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


def test_force_given_twice_tells_what_it_did_to_peers(
    made: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    fs = made.mount()
    make("--force", "--force", made.path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"slot 1 (idle, pid {os.getpid()} on ")
    assert "all calls there fail now (ESTALE)" in lines[-1]
    with pytest.raises(FsError) as caught:
        fs.lookup(1, b"x")
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize(
    "change", [{"minor": 7}, {"layout_signature": 1}, {"region_size": 2 * SIZE}]
)
def test_peers_of_another_version_count_as_well(
    change: dict[str, object], made: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    made.mount()
    memory = made.region().memory
    whole = superblock.SUPERBLOCK.unpack(memory.read(0, 512))
    record = superblock.SUPERBLOCK.changed(whole, change)
    for at in (superblock.OFFSET, superblock.COPY_OFFSET):
        memory.write(at, superblock.seal(record))
    assert "is mounted now by 1 peer(s): slot 1" in refused(capsys, "--force", made.path)


def test_a_repair_counts_as_a_peer(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    memory = made.region().memory
    turn = RepairSession(memory, read(made.path).geometry)
    turn.take(force=False)
    for options in ((), ("--force",)):
        assert "is being repaired by pid" in refused(capsys, *options, made.path)
    make("--force", "--force", made.path)
    assert "the repair that was under way there ends" in capsys.readouterr().out
    with pytest.raises(InUse, match="formatted"):
        turn.publish(0)
    turn.give_up()
    assert not fsck.check(made.region(readonly=True)).findings
