"""`top`, `metrics`, and the statistics in the slots that they show."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ivshmemfs.cli import metrics
from ivshmemfs.cli.readings import Readings
from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import StaleHandle
from ivshmemfs.format import geometry, peer
from mkfs.initial import Parameters
from mkfs.writer import format_region
from tests.cli.conftest import complains, ivshmemfs
from tests.support.mounts import needs_fuse
from tests.support.regions import ROOT, TestRegion, get, put

COUNTS = ("operations", "bytes_read", "bytes_written", "retries", "locks", "open_files")


def slot(made: TestRegion, number: int = 1) -> peer.Occupant:
    fs = made.mount(readonly=True)
    return fs.table.peer(number)


def counts(made: TestRegion) -> dict[str, int]:
    record = slot(made).record
    return {name: getattr(record, name) for name in COUNTS}


def scribble(made: TestRegion, field: str, value: bytes) -> None:
    memory, at = made.region().memory, geometry.PEERS_OFFSET + peer.SLOT.offset(field)
    memory.write(at, value)


# --- the slot ---------------------------------------------------------------------------------


def test_a_tick_publishes_what_was_done(formatted: TestRegion) -> None:
    fs = formatted.mount()
    put(fs, 1, b"a", b"x" * 3000)
    get(fs, 1, b"a")
    handle = fs.open(fs.lookup(1, b"a").ino, os.O_RDONLY, ROOT)
    assert counts(formatted) == dict.fromkeys(COUNTS, 0)  # nothing is stored meanwhile
    fs.tick()
    found = counts(formatted)
    assert found["operations"] > 5
    assert (found["bytes_read"], found["bytes_written"], found["open_files"]) == (3000, 3000, 1)
    fs.release(handle)
    fs.tick()
    assert counts(formatted)["open_files"] == 0


def test_a_lost_commit_is_a_retry(formatted: TestRegion) -> None:
    fs, other = formatted.mount(), formatted.mount()
    raced = False

    def plan(tx: object) -> None:
        nonlocal raced
        if not raced:
            raced = True
            other.store.commit_word.fence()
        tx.put(tx.inode(1).evolve(uid=7))  # type: ignore[attr-defined]

    fs.change(plan)
    fs.tick()
    assert counts(formatted)["retries"] == 1


def test_a_newcomer_begins_at_zero(formatted: TestRegion) -> None:
    fs = formatted.mount()
    fs.name_mount_point(b"/mnt/\xc3\xa4" + b"x" * 300)
    put(fs, 1, b"a", b"x")
    fs.tick()
    assert slot(formatted).mount_point == ("/mnt/ä" + "x" * 300).encode()[:256].decode()
    fs.unmount()
    formatted.mount()
    assert counts(formatted) == dict.fromkeys(COUNTS, 0)
    assert slot(formatted).mount_point == ""


def test_a_rejoined_peer_keeps_its_counts(formatted: TestRegion) -> None:
    fs = formatted.mount()
    put(fs, 1, b"a", b"x" * 100)
    fs.name_mount_point(b"/mnt/a")
    fs.tick()
    fs.table.retire(1, fs.table.state(1))
    fs.tick()  # notices, and joins again
    fs.tick()
    assert counts(formatted)["bytes_written"] == 100
    assert slot(formatted).mount_point == "/mnt/a"


# --- top --------------------------------------------------------------------------------------


def test_rates_are_taken_between_two_heartbeats(
    formatted: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 100.0
    monkeypatch.setattr("ivshmemfs.cli.readings.time.monotonic", lambda: clock)
    fs = formatted.mount()
    readings = Readings(formatted.region(readonly=True))
    (found,) = readings.read().peers
    assert readings.rates(found).bytes_written == 0
    put(fs, 1, b"a", b"x" * 5000)
    fs.tick()
    clock += 2
    (found,) = readings.read().peers
    rates = readings.rates(found)
    assert rates.bytes_written == 2500
    assert rates.operations > 0
    clock += 0.5  # no heartbeat since
    (found,) = readings.read().peers
    assert readings.rates(found) == rates


def test_a_region_that_was_formatted_anew_is_told(formatted: TestRegion) -> None:
    readings = Readings(formatted.region(readonly=True))
    memory = formatted.region().memory
    format_region(memory, geometry.plan(memory.length), Parameters(os.urandom(16)))
    with pytest.raises(StaleHandle):
        readings.read()


def frames(fs: Filesystem, *words: object) -> list[str]:
    fs.tick()
    result = ivshmemfs("top", *words)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_frames_below_each_other(formatted: TestRegion) -> None:
    fs = formatted.mount()
    fs.name_mount_point(b"/mnt/shared")
    out = frames(fs, "-n", 2, "-d", 0.1, formatted.path)
    assert len(out) == 10
    assert f"{formatted.path}: 3 KiB of 1 MiB used, 0.0 commits/s, 1 of 16 peers" in out[0]
    assert out[1].split()[:4] == ["SLOT", "HOST", "PID", "OPS/S"]
    assert out[2].split()[0] == "1"
    assert out[2].endswith("/mnt/shared")
    assert "readers leave no trace" in out[3]
    assert out[4] == ""


def test_json_has_an_object_for_each_peer(formatted: TestRegion) -> None:
    fs = formatted.mount()
    formatted.mount()
    out = [json.loads(line) for line in frames(fs, "--json", "-n1", "-d0.1", formatted.path)]
    assert [one["slot"] for one in out] == [1, 2]
    assert set(out[0]) == {
        "time", "region", "commits_per_s", "slot", "host", "pid", "version", "mount_point",
        "operations_per_s", "bytes_read_per_s", "bytes_written_per_s", "retries_per_s", "locks",
        "open_files", "silent_s",
    }  # fmt: skip


def test_hostile_slots_print_as_text(formatted: TestRegion) -> None:
    fs = formatted.mount()
    fs.tick()
    scribble(formatted, "mount_point", b"/\x1b[31m\n\x07".ljust(256, b"\0"))
    scribble(formatted, "operations", b"\xff" * 48)
    for words in (["top", "-n1", "-d0.1"], ["metrics"], ["peers"]):
        result = ivshmemfs(*words, formatted.path)
        assert result.returncode == 0, result.stderr
        assert "\x1b" not in result.stdout + result.stderr
        assert r"/\x1b[31m\n\x07" in result.stdout.replace("\\\\", "\\")


@pytest.mark.parametrize("words", [("-n", 0), ("-d", 0), ("-d", "x")])
def test_wrong_numbers_are_refused(words: tuple[object, ...], formatted: TestRegion) -> None:
    complains(ivshmemfs("top", *words, formatted.path), 1, words[0])  # type: ignore[arg-type]


@needs_fuse
def test_a_mount_names_its_mount_point_and_readers_are_told(
    formatted: TestRegion, places: list[Path]
) -> None:
    assert ivshmemfs("mount", formatted.path, places[0]).returncode == 0
    assert ivshmemfs("mount", "-r", formatted.path, places[1]).returncode == 0
    out = ivshmemfs("peers", places[0]).stdout.splitlines()
    assert out[1].endswith(str(places[0]))
    assert out[-1] == (
        f"readers leave no trace: a read-only mount stores nothing; on this machine: {places[1]}"
    )
    for place in places[:2]:
        assert ivshmemfs("umount", place).returncode == 0


# --- metrics ----------------------------------------------------------------------------------


def test_prometheus_reads_it(formatted: TestRegion) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    fs = formatted.mount()
    hostile = 'a "quoted" \\ back\nline'
    fs.name_mount_point(hostile.encode())
    put(fs, 1, b"a", b"x" * 700)
    fs.tick()
    result = ivshmemfs("metrics", formatted.path)
    assert (result.returncode, result.stderr) == (0, "")
    families = {one.name: one for one in parser.text_string_to_metric_families(result.stdout)}
    known = (*metrics.REGION_METRICS, *metrics.PEER_METRICS)
    assert set(families) == {f"ivshmemfs_{m.name.removesuffix('_total')}" for m in known}
    assert families["ivshmemfs_peers"].samples[0].value == 1
    (written,) = families["ivshmemfs_peer_written_bytes"].samples
    assert (written.name, written.value) == ("ivshmemfs_peer_written_bytes_total", 700)
    assert written.labels["mount_point"] == hostile.replace("\n", "\\n")
    assert written.labels["region"] == str(formatted.path)


def test_a_region_that_cannot_be_read_is_down(formatted: TestRegion, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    result = ivshmemfs("metrics", absent, formatted.path)
    complains(result, 64, str(absent), "no such file")
    lines = result.stdout.splitlines()
    assert f'ivshmemfs_up{{region="{absent}"}} 0' in lines
    assert f'ivshmemfs_up{{region="{formatted.path}"}} 1' in lines
