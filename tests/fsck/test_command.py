"""The command: exit codes, what it says, and when it refuses."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ivshmemfs import __version__
from ivshmemfs.format import words
from ivshmemfs.format.geometry import COMMIT_OFFSET, REPAIR_OFFSET
from ivshmemfs.format.repair import FORMER_OFFSET
from ivshmemfs.fsck.image import Overtaken, read_superblocks
from ivshmemfs.fsck.main import main
from ivshmemfs.region import open_region
from ivshmemfs.shm.repair import RepairSession
from tests.support.damage import Knife, Names
from tests.support.regions import TestRegion, get, put

CHECK = importlib.import_module("ivshmemfs.fsck.check")  # the package exports `check` itself


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def damage(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        Knife(region.memory).edit_inode(Names.small, nlink=9)


@pytest.mark.parametrize("options", [(), ("-n",), ("-y",), ("-p",), ("-a",), ("-f", "-y")])
def test_clean_is_0(
    options: tuple[str, ...], made: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options, made.path) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{made.path}: clean; ")
    assert "inodes" in line


def test_a_report_for_programs(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    def said(code: int, *options: str) -> dict[str, Any]:
        assert run("--json", *options, made.path) == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert said(0)["clean"]
    damage(made)
    found = said(4)
    assert (found["region"], found["clean"], found["errors"]) == (str(made.path), False, 1)
    assert found["counts"] == {"I24": 1}
    (finding,) = found["findings"]
    assert (finding["invariant"], finding["inode"], finding["slot"]) == (24, Names.small, None)
    assert finding["text"] == "its link count is 9; it should be 171"
    assert (found["repairs"], found["before"]) == ([], None)
    found = said(1, "-y")
    assert (found["clean"], found["findings"], found["before"]["errors"]) == (True, [], 1)
    assert found["repairs"]


def test_damage_is_4_and_stays(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    damage(made)
    before = made.path.read_bytes()
    assert run("-n", made.path) == 4
    assert made.path.read_bytes() == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"I24 inode {Names.small}, block ")
    assert lines[0].endswith(": its link count is 9; it should be 171")
    assert lines[-1].startswith(f"{made.path}: 1 contradiction; ")


def test_repaired_is_1_and_then_0(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    damage(made)
    assert run("-y", made.path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("I24 inode ")
    assert f"repaired: inode {Names.small}: nlink 9 becomes 171" in lines
    assert lines[-1].startswith(f"{made.path}: clean; ")
    assert run("-n", made.path) == 0


def test_a_leak_is_a_note(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.set_tag(knife.free_block(), knife.tag(knife.root))
    assert run("-n", made.path) == 0
    out = capsys.readouterr().out
    assert out.startswith("note: I29 1 claimed blocks cannot be reached from the root\n")
    assert run("-y", made.path) == 1
    assert "1 claimed blocks that no root reached are free again" in capsys.readouterr().out
    assert run("-y", made.path) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bytes(1 << 16), "no filesystem on the region"),
        (b"\x7fELF" * 5000, "something else than an ivshmemfs filesystem"),
    ],
)
def test_no_filesystem_is_8(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "region"
    path.write_bytes(content)
    for option in ("-n", "-y"):
        assert run(option, path) == 8
        assert says in capsys.readouterr().err
    assert path.read_bytes() == content


def test_both_superblocks_damaged_is_8(
    made: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_region(str(made.path)) as region:
        region.memory.write(100, b"\xff")
        region.memory.write(2148, b"\xff")
    assert run("-y", made.path) == 8
    assert "both damaged" in capsys.readouterr().err


def test_a_newer_version_is_8(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        for offset in (0, 2048):
            knife.edit_superblock(offset, incompat=1 << 5)
    assert run("-y", made.path) == 8
    assert "use a newer version" in capsys.readouterr().err


def test_features_that_forbid_writing(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        for offset in (0, 2048):
            knife.edit_superblock(offset, ro_compat=1 << 5)
    assert run("-n", made.path) == 0
    assert run("-y", made.path) == 8
    assert "may not write" in capsys.readouterr().err


def test_a_truncated_region_is_8(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    with made.path.open("r+b") as file:
        file.truncate(256 << 10)
    assert run("-y", made.path) == 8
    assert "smaller than the" in capsys.readouterr().err


def test_nothing_there_is_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nothing") == 8
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("-x", "r"), ("-n", "-y", "r"), ("one", "two"), ("",)])
def test_wrong_use_is_16(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 16
    said = capsys.readouterr().err
    assert said.startswith("fsck.ivshmemfs: ")
    assert said.count("\n") == 1


def test_live_peers_are_not_repaired_under(
    made: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    fs = made.mount()
    damage(made)
    before = made.path.read_bytes()
    assert run("-y", made.path) == 8
    message = capsys.readouterr().err
    assert "in use by 1 peer(s): slot 1 (idle, pid " in message
    assert "--force" in message
    assert made.path.read_bytes() == before
    assert run("-n", made.path) == 4
    assert run("-y", "--force", made.path) == 1
    assert "peer slot 1" not in capsys.readouterr().out
    assert run("-n", made.path) == 0
    place = fs.peer_id
    put(fs, 1, b"after", b"the mount goes on")
    assert get(fs, 1, b"after") == b"the mount goes on"
    assert fs.peer_id == place
    fs.unmount()
    assert run("-n", made.path) == 0


def test_dead_peers_are_let_go_of(made: TestRegion, capsys: pytest.CaptureFixture[str]) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        _, incarnation, counter = words.split_state(knife.slot(1))
        knife.set_slot(1, words.make_state(words.DEAD, incarnation, counter))
    assert run("-n", made.path) == 0
    assert run("-y", "--force", made.path) == 1
    assert "peer slot 1 is free again" in capsys.readouterr().out


def test_commits_during_the_check_are_8_when_they_do_not_end(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def always(*_: object) -> None:
        raise Overtaken

    damage(made)
    monkeypatch.setattr(CHECK, "check_once", always)
    assert run("-n", made.path) == 8
    said = capsys.readouterr().err
    assert "changes faster than it can be checked" in said
    assert said.count("\n") == 1
    assert run("-y", made.path) == 1  # which shuts all others out
    assert "nlink 9 becomes 171" in capsys.readouterr().out


def test_a_bug_is_8(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CHECK, "check_once", lambda *_: 1 // 0)
    assert run("-n", made.path) == 8
    said = capsys.readouterr().err
    assert said.startswith("fsck.ivshmemfs: internal error, please report it: ZeroDivisionError")
    assert said.count("\n") == 1


def test_a_region_that_another_repairs_is_8(
    made: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(made)
    memory = made.region().memory
    turn = RepairSession(memory, read_superblocks(memory).usable.geometry)
    turn.take(force=False)
    for option in ("-n", "-y"):
        assert run(option, made.path) == 8
        said = capsys.readouterr().err
        assert f"is being repaired by pid {os.getpid()} on " in said
        assert said.count("\n") == 1
    assert run("-y", "--force", made.path) == 1
    assert run("-n", made.path) == 0


def hostile_former(k: Knife) -> None:
    k.memory.store(REPAIR_OFFSET + FORMER_OFFSET, 0x1234567 << 28 | 99)


def hostile_owner(k: Knife) -> None:
    k.memory.write(REPAIR_OFFSET, os.urandom(512))
    k.memory.store(REPAIR_OFFSET, words.make_state(words.ACTIVE, 77, 1))


def hostile_state(k: Knife) -> None:
    k.memory.store(REPAIR_OFFSET, words.make_state(200, 5, 9))


@pytest.mark.parametrize("do", [hostile_former, hostile_owner, hostile_state])
def test_a_hostile_repair_record_is_repaired(
    do: Callable[[Knife], None], made: TestRegion, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        tree = knife.root_record()
        do(knife)
        word = region.memory.load(COMMIT_OFFSET)
        region.memory.store(COMMIT_OFFSET, word | words.UNDER_REPAIR)
        if do is hostile_owner:  # no proof whether that one lives
            assert run("-y", made.path) == 8
            assert "use --force" in capsys.readouterr().err
        assert run("-y", "--force", made.path) == 1
        assert run("-n", made.path) == 0
        assert Knife(region.memory).root_record().inodes == tree.inodes


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-V", "--version"):
        assert run(option) == 0
        assert capsys.readouterr().out == f"fsck.ivshmemfs, version {__version__}\n"


def test_as_a_module(made: TestRegion) -> None:
    command = [sys.executable, "-m", "ivshmemfs.fsck", "-n", str(made.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "clean" in done.stdout
