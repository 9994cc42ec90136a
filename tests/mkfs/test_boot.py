"""What a boot needs of mkfs: --if-needed, -n, -q, short options, a warning of a small tmpfs."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.engine import ROOT_INO
from ivshmemfs.format import superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.region import open_region
from ivshmemfs.shm.commit import CommitWord
from mkfs import present
from mkfs.main import main
from tests.support.regions import new_region, put

MIB = 1 << 20
UUID = "12345678-1234-5678-1234-567812345678"


def make(*arguments: str | Path) -> int:
    """Run the command; returns its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "region"


# --- --if-needed ----------------------------------------------------------------------------


def test_a_sound_filesystem_is_left_as_it_is(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--if-needed", "--size", "1M", "-L", "hello", "-U", UUID, path)
    assert make(*wanted) == 0
    first = path.read_bytes()
    assert "formatted as ivshmemfs, label 'hello'" in capsys.readouterr().out
    assert make(*wanted) == 0
    assert capsys.readouterr() == (
        f"{path}: carries ivshmemfs already (1 MiB, label 'hello', UUID {UUID}); left as it is\n",
        "",
    )
    assert make("--if-needed", path) == 0  # also without a size
    assert path.read_bytes() == first


def test_also_after_a_fence(path: Path) -> None:
    """It counts the commit sequence on, and keeps the root."""
    assert make("--size", "1M", path) == 0
    with open_region(str(path)) as region:
        CommitWord(region.memory).fence()
        assert present.problem(region.memory) == ""


def test_also_while_it_is_mounted(capsys: pytest.CaptureFixture[str]) -> None:
    with new_region(MIB) as region:
        peer = region.mount()
        put(peer, ROOT_INO, b"f", b"kept")
        assert make("--if-needed", "--size", "1M", region.path) == 0
        put(peer, ROOT_INO, b"g", b"later")
        assert make("--if-needed", region.path) == 0


def test_an_empty_region_is_formatted(path: Path) -> None:
    path.write_bytes(bytes(MIB))
    assert make("--if-needed", "--size", "1M", path) == 0
    assert superblock.decode(path.read_bytes(), MIB)


def test_an_empty_file_gets_its_size(path: Path) -> None:
    path.touch()
    assert make("--if-needed", "--size", "1M", path) == 0
    assert path.stat().st_size == MIB


def test_another_size_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("--size", "1M", path) == 0
    before = path.read_bytes()
    assert make("--if-needed", "--size", "2M", path) == 1
    assert "exists and has 1048576 bytes, not 2097152" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_something_else_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(b"my diary".ljust(MIB, b"\0"))
    assert make("--if-needed", "--size", "1M", path) == 1
    assert "not an ivshmemfs filesystem" in capsys.readouterr().err
    assert path.read_bytes()[:8] == b"my diary"


def _root_at(raw: bytes | bytearray) -> int:
    word = int.from_bytes(raw[COMMIT_OFFSET : COMMIT_OFFSET + 8], "little")
    geometry = superblock.decode(raw, len(raw)).geometry
    return geometry.data_offset + words.split_commit(word)[1] * geometry.block_size


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("commit", "formatted when that was interrupted"),
        ("mark", "repair was interrupted"),
        ("block", "root block is damaged"),
        ("root", "root block is damaged"),
        ("superblock", "superblock's checksum is wrong"),
    ],
)
def test_a_damaged_filesystem_is_neither_kept_nor_lost(
    damage: str, said: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("--size", "1M", path) == 0
    raw = bytearray(path.read_bytes())
    if damage == "root":
        raw[_root_at(raw) + 40] ^= 1
    elif damage == "superblock":
        raw[100] ^= 1
    else:
        block = {"commit": 0, "mark": words.UNDER_REPAIR, "block": words.BLOCK_MASK - 1}[damage]
        word = words.make_commit(7, block) if block else 0
        raw[COMMIT_OFFSET : COMMIT_OFFSET + 8] = word.to_bytes(8, "little")
    path.write_bytes(raw)
    assert make("--if-needed", path) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert path.read_bytes() == raw
    assert make("--if-needed", "--force", path) == 0
    assert path.read_bytes() != raw


def test_a_root_that_is_replaced_meanwhile_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with new_region(MIB) as region:
        peer, calls = region.mount(), list[int]()

        def overtaken(*_arguments: object) -> str:
            calls.append(len(calls))
            if len(calls) < 3:
                put(peer, ROOT_INO, b"f%d" % len(calls), b"x")
                return "damaged"
            return ""

        monkeypatch.setattr(present, "_root_problem", overtaken)
        assert make("--if-needed", region.path) == 0
        assert len(calls) == 3


# --- -n, -q -----------------------------------------------------------------------------------


def test_a_rehearsal_makes_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("-n", "--size", "1M", path) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"{path}: 1 MiB would be made and formatted as ivshmemfs; nothing was changed"
    )
    assert out[1].startswith("996 blocks of 1024 bytes")
    assert not path.exists()


def test_a_rehearsal_changes_nothing(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(bytes(MIB))
    assert make("-n", path) == 0
    assert "1 MiB would be formatted" in capsys.readouterr().out
    assert make("-n", "--size", "2M", "--force", path) == 0
    assert "2 MiB would be made larger and formatted" in capsys.readouterr().out
    assert path.read_bytes() == bytes(MIB)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "3M"), "QEMU refuses a device of 3 MiB"),
        (("--size", "4K"), "1 MiB or more"),
        (("--size", "64T"), "do not fit there"),
    ],
)
def test_a_rehearsal_refuses_what_mkfs_refuses(
    words: tuple[str, ...], said: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("-n", *words, path) == 1
    assert said in capsys.readouterr().err
    assert not path.exists()


def test_a_rehearsal_looks_at_the_directory(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("-n", "--size", "1M", path / "none") == 1
    assert "no such directory" in capsys.readouterr().err


def test_a_rehearsal_refuses_a_used_region(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("--size", "1M", path) == 0
    assert make("-n", path) == 1
    assert "already carries an ivshmemfs filesystem" in capsys.readouterr().err
    assert make("-n", "--if-needed", path) == 0
    assert "left as it is" in capsys.readouterr().out


def test_quiet(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("-q", "-n", "--size", "1M", path) == 0
    assert make("-q", "--size", "1M", path) == 0
    assert make("-q", "--if-needed", path) == 0
    assert capsys.readouterr() == ("", "")
    assert make("-q", path) == 1
    assert capsys.readouterr().err


def test_the_form_for_fstab(path: Path) -> None:
    assert make("-q", "--size", "1M", f"file:{path}") == 0
    assert path.stat().st_size == MIB


# --- a small tmpfs ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_tmpfs_that_is_smaller_than_the_region(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small / "region"
    assert make("-q", "--sparse", "--size", "4M", path) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{path} has 4 MiB, and its file system has only 2 MiB: writes fail" in err
    told = re.search(r"'(mount -o remount,size=8M [^']*)'", err)
    assert told is not None
    subprocess.run(told[1].split(), check=True)  # what it says to do helps
    assert make("--if-needed", path) == 0
    assert capsys.readouterr().err == ""


def test_it_is_told_each_time(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small / "region"
    assert make("-q", "--sparse", "--size", "4M", path) == 0
    capsys.readouterr()
    assert make("-q", "--if-needed", path) == 0
    assert "only 2 MiB" in capsys.readouterr().err


def test_a_file_system_that_is_large_enough(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("-q", "--sparse", "--size", "1M", small / "region") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("size", ["8M", "16M"])
def test_of_any_block_size(size: str, path: Path) -> None:
    for block_size in ("1K", "4K", "64K"):
        assert make("-q", "--force", "--size", size, "--block-size", block_size, path) == 0
        assert make("-q", "--if-needed", path) == 0
