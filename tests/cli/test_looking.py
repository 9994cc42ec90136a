"""`list`, `info`, `peers`, `dump`, `evict`: on good regions and on anything else."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from ivshmemfs import __version__
from ivshmemfs.cli.info import listing
from ivshmemfs.cli.mount import the_one_device
from ivshmemfs.errors import RegionError, RegionMissing
from ivshmemfs.format import bell, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.region import Roots, open_region
from tests.cli.conftest import complains, ivshmemfs
from tests.support.regions import ROOT, TestRegion, new_region, put
from tests.support.sysfs import ONE, FakeMachine, hold


def shows(*command: object) -> str:
    """What a command prints; it must succeed and complain about nothing."""
    result = ivshmemfs(*command)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_list_shows_what_is_formatted_and_what_is_not(formatted: TestRegion) -> None:
    plain = Path(f"/dev/shm/ivshmemfs-list-test-{os.getpid()}")
    linked = Path(f"{plain}-formatted")
    try:
        plain.write_bytes(bytes(8192))
        os.link(formatted.path, linked)
        lines = shows("list").splitlines()
        assert lines[0].split() == ["REGION", "WHAT", "LABEL", "UUID", "MOUNTED", "ON"]
        found = {line.split()[0]: line for line in lines[1:]}
        assert "not formatted" in found[str(plain)]
        with open_region(str(formatted.path), readonly=True) as region:
            names = superblock.identify(region.memory.read(0, 512))
        assert names is not None
        assert names[1] in found[str(linked)]
    finally:
        plain.unlink(missing_ok=True)
        linked.unlink(missing_ok=True)


def test_info(formatted: TestRegion) -> None:
    fs = formatted.mount()
    put(fs, 1, b"f", bytes(100_000))
    lines = dict(line.split(maxsplit=1) for line in shows("info", formatted.path).splitlines())
    assert str(formatted.path) in lines["region"]
    assert "read-only" not in lines["region"]  # only this command's own mapping is
    assert lines["format"] == "1.0"
    assert lines["inodes"] == "3"
    assert lines["peers"] == "1 of 16"
    assert "MB/s" in lines["mapping"]
    fs.unmount()


def test_as_json(formatted: TestRegion) -> None:
    linked = Path(f"/dev/shm/ivshmemfs-json-test-{os.getpid()}")
    fs = formatted.mount()
    put(fs, 1, b"f", bytes(100_000))
    try:
        os.link(formatted.path, linked)
        rows = [json.loads(line) for line in shows("list", "--json").splitlines()]
    finally:
        linked.unlink(missing_ok=True)
    (row,) = [row for row in rows if row["region"] == str(linked)]
    info = json.loads(shows("info", "--json", formatted.path))
    assert row["uuid"] == info["uuid"]
    assert (row["label"], row["problem"], row["mounted_on"]) == ("", None, [])
    assert info["size"] == formatted.path.stat().st_size
    assert info["used"] > 100_000
    assert (info["inodes"], info["peers"], info["peers_max"]) == (3, 1, 16)
    (peer,) = [json.loads(line) for line in shows("peers", "--json", formatted.path).splitlines()]
    assert (peer["slot"], peer["pid"], peer["version"]) == (1, os.getpid(), __version__)
    assert (peer["state"], peer["life"]) == ("idle", "silent")
    fs.unmount()
    assert shows("peers", "--json", formatted.path) == ""


def test_looking_changes_nothing(formatted: TestRegion) -> None:
    formatted.path.chmod(0o400)
    before = formatted.path.read_bytes()
    for command in ("info", "peers", "dump"):
        shows(command, formatted.path)
    shows("dump", formatted.path, "all")
    assert formatted.path.read_bytes() == before


def test_peers(formatted: TestRegion) -> None:
    assert shows("peers", formatted.path).startswith("no machine has it mounted for writing")
    fs = formatted.mount()
    lines = shows("peers", formatted.path).splitlines()
    titles = ["SLOT", "HOST", "PID", "SINCE", "DOING", "LIFE", "MEMORY", "VERSION", "MOUNTED", "ON"]
    assert lines[0].split() == titles
    fields = lines[1].split()
    assert fields[0] == "1"
    assert int(fields[2]) == os.getpid()
    assert fields[-5:] == [
        "idle",
        "silent",
        "unknown",
        __version__,
        "-",
    ]  # no test calls tick() here
    fs.unmount()


@pytest.mark.slow
def test_evict(formatted: TestRegion) -> None:
    fs = formatted.mount()
    assert "slot 1 is free" in shows("evict", formatted.path, 1)
    assert shows("peers", formatted.path).startswith("no machine has it mounted for writing")
    fs.mkdir(1, b"d", 0o755, ROOT)  # it rejoins, and nothing is lost
    assert "idle" in shows("peers", formatted.path)
    fs.unmount()
    complains(ivshmemfs("evict", formatted.path, 3), 1, "there is no peer in slot 3")
    complains(ivshmemfs("evict", formatted.path, "x"), 1, "'x'")


def test_dump_has_every_field(formatted: TestRegion) -> None:
    text = shows("dump", formatted.path)
    for field in superblock.SUPERBLOCK.fields:
        line = next(line for line in text.splitlines() if f" {field.name} " in line)
        assert line.split()[0] == str(field.offset)
        assert line.endswith(field.doc)
    assert "as it should be" in text
    assert "superblock at 2048" in shows("dump", formatted.path, "copy")


def test_dump_of_the_parts(formatted: TestRegion) -> None:
    fs = formatted.mount()
    attr = put(fs, 1, b"f", b"some content")
    assert "sequence" in shows("dump", formatted.path, "words")
    assert "heartbeat" in shows("dump", formatted.path, "peers")
    assert "former" in shows("dump", formatted.path, "repair")
    assert "claimed" in shows("dump", formatted.path, "tags")
    assert "next_ino" in shows("dump", formatted.path, "root")
    assert "mtime_ns" in shows("dump", formatted.path, f"inode:{attr.ino}")
    free = fs.superblock.geometry.block_count - 1
    assert "free" in shows("dump", formatted.path, f"block:{free}")
    whole = shows("dump", formatted.path, "all")
    for part in ("superblock at 0", "commit word", "peer slots", "tags at", "next_ino"):
        assert part in whole
    fs.unmount()


def test_dump_for_programs(formatted: TestRegion) -> None:
    fs = formatted.mount()
    fs.name_mount_point(b"/mnt/\x1b")
    fs.region.memory.store(bell.BELLS_OFFSET, 4 << 16)  # a waiter with doorbell 3
    out = shows("dump", "--json", formatted.path, "all")
    parts = [json.loads(line) for line in out.splitlines()]
    names = [
        "superblock", "commit word", "hint word", "bell words", "repair slot", "peer table", "slot",
        "tags",
    ]  # fmt: skip
    assert [part["part"] for part in parts] == [*names, "block"]
    head, word, _, bells, _, table, slot, tags, root = parts
    assert bells["numbers"] == [3]
    assert head["problem"] is None
    assert {field.name for field in superblock.SUPERBLOCK.fields} == set(head["fields"])
    assert head["fields"]["region_size"] == 1 << 20
    assert (table["slots"], slot["state"], slot["slot"]) == (16, "idle", 1)
    assert slot["fields"]["mount_point"] == "/mnt/\\x1b"
    assert (tags["claimed"], tags["claims"][0]["blocks"]) == (3, 3)
    assert (root["block"], root["kind"], root["root"]["used"]) == (word["root_block"], "root", 3)
    assert [pointer["block"] for pointer in root["pointers"]] == [1, 2]
    (found,) = shows("dump", "--json", formatted.path, "inode:1").splitlines()
    assert json.loads(found)["inode"]["nlink"] == 2
    free = fs.superblock.geometry.block_count - 1
    (found,) = shows("dump", "--json", formatted.path, f"block:{free}").splitlines()
    assert json.loads(found)["claim"] is None


@pytest.mark.parametrize("what", ["nothing", "block", "block:x", "inode:-1", "frob:1", "block:"])
def test_dump_of_what_there_is_not(formatted: TestRegion, what: str) -> None:
    complains(ivshmemfs("dump", formatted.path, what), 1, f"'{what}'", "--help")


def test_dump_past_the_end(formatted: TestRegion) -> None:
    complains(ivshmemfs("dump", formatted.path, "block:99999999"), 1, "no block 99999999")
    complains(ivshmemfs("dump", formatted.path, "inode:99999999"), 1, "99999999")


@pytest.mark.parametrize("command", ["info", "peers", "dump"])
def test_regions_that_are_none(command: str, tmp_path: Path) -> None:
    zeros = tmp_path / "zeros"
    zeros.write_bytes(bytes(1 << 16))
    small = tmp_path / "small"
    small.write_bytes(b"x")
    if command != "dump":
        complains(ivshmemfs(command, zeros), 32, "no filesystem")
    assert ivshmemfs(command, small).returncode in (1, 32)
    complains(ivshmemfs(command, tmp_path / "none"), 32, "no such file")
    complains(ivshmemfs(command, tmp_path), 32, "is a directory, and no ivshmemfs is mounted on it")


def test_a_hostile_region_cannot_write_to_the_terminal(formatted: TestRegion) -> None:
    with open_region(str(formatted.path)) as region:
        record = superblock.SUPERBLOCK.unpack(region.memory.read(0, 512))
        region.memory.write(0, superblock.seal(record._replace(label=b"\x1b[2J\x07evil")))
    for command in (["info"], ["dump"]):
        text = shows(*command, formatted.path)
        assert "evil" in text
        assert "\x1b" not in text
        assert "\x07" not in text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_damage_is_reported_and_never_a_bug(seed: int) -> None:
    """Random bytes over everything but the superblock: one line each, or output."""
    chance = random.Random(seed)
    with new_region() as damaged:
        fs = damaged.mount()
        put(fs, 1, b"f", bytes(10_000))
        with open_region(str(damaged.path)) as region:
            if seed % 2:
                region.memory.store(COMMIT_OFFSET, chance.getrandbits(64))
            for _round in range(300):
                at = chance.randrange(1024, region.size - 8)
                region.memory.write(at, chance.randbytes(8))
            root = region.memory.load(COMMIT_OFFSET) & words.BLOCK_MASK
        for command in (
            ["info", damaged.path],
            ["peers", damaged.path],
            *(["dump", damaged.path, what] for what in ("all", "inode:1", f"block:{root}")),
        ):
            result = ivshmemfs(*command)
            if result.returncode:
                complains(result, result.returncode)
                assert result.returncode in (1, 32)


# --- devices that a driver holds ---------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formatted: TestRegion) -> FakeMachine:
    """A formatted device that a driver without a node holds."""
    machine = FakeMachine(tmp_path)
    machine.device(size=formatted.path.stat().st_size)
    for name in ("resource2", "resource2_wc"):
        (machine.place(ONE) / name).unlink()
        (machine.place(ONE) / name).write_bytes(formatted.path.read_bytes())
    machine.bind(ONE, "my_driver")
    hold(monkeypatch)
    return machine


def test_list_says_why_a_device_cannot_be_read(
    held: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    listing(held.roots)
    shown = capsys.readouterr()
    assert "my_driver" in shown.out
    assert "cannot be read" in shown.out
    assert "not formatted" not in shown.out
    assert len(shown.err.splitlines()) == 1
    assert "my_driver holds the device" in shown.err
    assert "mkfs" not in shown.err


def test_list_shows_a_device_with_its_node(
    held: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    held.node("ivshmem0", "240:0", ONE)
    listing(held.roots)
    shown = capsys.readouterr()
    rows = [line for line in shown.out.splitlines() if str(held.roots.dev.parent) in line]
    assert len(rows) == 1  # other mounts on this machine have rows, too
    assert f"{held.roots.dev}/ivshmem0" in rows[0]
    assert "cannot be read" not in shown.out
    assert shown.err == ""


def test_mount_without_a_region_advises_nobody_to_format_what_it_could_not_read(
    held: FakeMachine,
) -> None:
    with pytest.raises(RegionError) as caught:
        the_one_device(held.roots)
    assert "my_driver holds the device" in str(caught.value)
    assert "format" not in str(caught.value)
    held.node("ivshmem0", "240:0", ONE)
    assert the_one_device(held.roots) == f"pci:{ONE}"


def test_mount_without_a_region_and_a_blank_device(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.device()
    with pytest.raises(RegionMissing, match=f"no device here carries a filesystem.*pci:{ONE}"):
        the_one_device(machine.roots)


def test_mount_without_a_region_and_without_sysfs(tmp_path: Path) -> None:
    with pytest.raises(RegionMissing, match="sysfs is not mounted"):
        the_one_device(Roots(sys=tmp_path, dev=tmp_path))
