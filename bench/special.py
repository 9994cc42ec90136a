"""What is not one client on one mount: several mounts, start, idling, memory, large directories.

Every function returns figures by name.  Where they are ratios, both sides were measured in turns.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from bench.peers import (
    ENVIRONMENT,
    IVSHMEMFS,
    MKFS,
    TOP,
    Peer,
    available_cpus,
    cpu_seconds,
    make_region,
    ours,
    unmount,
)
from bench.runner import LocalClient, Sample, Table, interleave
from ivshmemfs.cli.attach.paths import Place
from ivshmemfs.cli.attach.peer import peer
from ivshmemfs.cli.transfer.get import Getter, Wishes
from ivshmemfs.cli.transfer.local import Folder
from ivshmemfs.cli.transfer.meter import Meter
from ivshmemfs.cli.transfer.put import Putter
from ivshmemfs.engine import ROOT_INO
from ivshmemfs.region import open_region

Figures = dict[str, float]


@contextmanager
def mounts(region: Path, work: Path, count: int) -> Iterator[list[Peer]]:
    """Several mounts of one region on all CPUs."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                ours(region, work / f"{region.name}-{n}", available_cpus(), name=f"mount {n}")
            )
            for n in range(count)
        ]


# --- several mounts ---------------------------------------------------------------------------


def visibility(client: LocalClient, shm: Path, work: Path, *, rounds: int, count: int) -> Figures:
    """How long a change takes to be seen through another mount, against tmpfs.

    Seconds from the start of the write until a reader of the other mount has it.  That one reads
    all the time.  Also how many changes were not there after the write had returned.
    """
    table: Table = {}
    region = make_region(shm / "seen", "16M")
    plain = shm / "seen-tmpfs"
    plain.mkdir()
    with mounts(region, work, 2) as (one, two):
        pairs = {"tmpfs": (plain, plain), "ivshmemfs": (one.path, two.path)}

        def measure(peer: Peer) -> dict[str, Sample]:
            here, there = (folder / "stamp" for folder in pairs[peer.name])
            seen = client.run(work, "see", here, there, count)
            return seen | client.run(work, "coherent", here, there, count)

        interleave([Peer(name, plain) for name in pairs], rounds, measure, table)
    figures = {
        f"{peer}: {what}": median(sample.p50 for sample in table[what][peer])
        for what in ("seen", "write-then-read")
        for peer in pairs
    }
    missed = sum(sample.operations for sample in table["missed"]["ivshmemfs"])
    return figures | {"changes missed": float(missed)}


# --- size of directory and region -------------------------------------------------------------


def directories(
    client: LocalClient, shm: Path, work: Path, *, rounds: int, large: int, times: int
) -> Table:
    """Lookup, create, unlink in a small and a large directory, through one mount and two.

    Named "OPERATION" by "100", "LARGE", "100 by two", "LARGE by two".
    """
    region = make_region(shm / "directories", "1G")
    table: Table = {}
    with mounts(region, work, 2) as (one, two):
        folders = {}
        for count in (100, large):
            (one.path / str(count)).mkdir()
            client.run(one.path / str(count), "fill", count, 0)
            folders[f"{count}"] = (count, [one.path / str(count)])
            folders[f"{count} by two"] = (count, [one.path / str(count), two.path / str(count)])

        def measure(peer: Peer) -> dict[str, Sample]:
            count, paths = folders[peer.name]
            return client.run(work, "crowd", count, times, *paths)

        interleave([Peer(name, work) for name in folders], rounds, measure, table)
    return table


def region_sizes(
    client: LocalClient, shm: Path, work: Path, *, rounds: int, count: int, large: str = "16G"
) -> Table:
    """The small operations on a 64 MiB region and on a large one."""
    table: Table = {}
    cpus = available_cpus()
    small_region = make_region(shm / "size-small", "64M", reserve=False)
    large_region = make_region(shm / "size-large", large, reserve=False)
    with (
        ours(small_region, work / "size-small", cpus, name="64M") as small,
        ours(large_region, work / "size-large", cpus, name=large) as big,
    ):

        def measure(peer: Peer) -> dict[str, Sample]:
            found = client.run(peer.path, "look", count)
            found |= client.run(peer.path, "names", count // 2)
            return found | client.run(peer.path, "random", 8, count)

        interleave([small, big], rounds, measure, table)
    large_region.unlink()
    return table


# --- copying without a mount ------------------------------------------------------------------


def transfer(client: LocalClient, shm: Path, work: Path, *, rounds: int, mib: int) -> Figures:
    """The rate of `get` and `put` of one large file, as a part of a single call's that copies it.

    That call is write(2) from a mapping to tmpfs for `get`, and read(2) into a mapping that is in
    memory already for `put`.  "process" compares whole processes, with the start of Python and all
    mapping.  "loop" compares the copying alone, in a process that has all of the region mapped.
    """
    source, region, raw = shm / "source", shm / "transfer", shm / "raw"
    source.write_bytes(bytes(range(256)) * (mib << 12))
    raw.write_bytes(bytes(mib << 20))
    make_region(region, f"{3 * mib}M")
    target = shm / "copy"
    ways = {"put": ("in", source, "/source"), "get": ("out", "/source", target)}
    figures: dict[str, list[float]] = {}
    with _looping(region, source, target) as loops:
        for turn in range(rounds + 2):
            for name, (way, here, there) in ways.items():
                target.unlink(missing_ok=True)
                began = time.perf_counter()
                once = client.run(work, "once", mib, way, raw, source if way == "in" else target)
                process = time.perf_counter() - began
                target.unlink(missing_ok=True)
                ours = _timed([*IVSHMEMFS, name, "--force", str(region), str(here), str(there)])
                target.unlink(missing_ok=True)
                began = time.perf_counter()
                loops[name]()
                loop = time.perf_counter() - began
                if turn >= 2:  # by then all memory of the region has been used
                    figures.setdefault(f"{name}: process", []).append(process / ours)
                    figures.setdefault(f"{name}: loop", []).append(once["once"].seconds / loop)
    for left in (source, region, raw, target):
        left.unlink(missing_ok=True)
    return {name: median(found) for name, found in figures.items()}


@contextmanager
def _looping(region: Path, source: Path, target: Path) -> Iterator[dict[str, Callable[[], None]]]:
    """The copying of `put` and `get`, within this process."""
    with (
        open_region(str(region)) as opened,
        peer(opened, readonly=False) as fs,
        Folder(bytes(target.parent)) as folder,
    ):
        putter = Putter(fs, Meter(quiet=True), recursive=False, force=True)
        wishes = Wishes(recursive=False, force=True, devices=False, special=False)
        getter = Getter(fs, Meter(quiet=True), wishes)
        place, name = Place(ROOT_INO, b"source", b"/"), target.name.encode()
        yield {
            "put": lambda: putter.copy(bytes(source), place),
            "get": lambda: getter.copy(fs.lookup(ROOT_INO, b"source"), folder, name),
        }


# --- start, idling, memory --------------------------------------------------------------------


def start(shm: Path, work: Path, *, rounds: int, size: str = "16G") -> Figures:
    """Seconds for mkfs and for mounting a large region, with everything that has to be loaded."""
    region, path = shm / "start", work / "start"
    path.mkdir()
    making, mounting = [], []
    try:
        for _ in range(rounds):
            region.unlink(missing_ok=True)
            making.append(_timed([*MKFS, "--sparse", "--size", size, str(region)]))
            mounting.append(_timed([*IVSHMEMFS, "mount", str(region), str(path)]))
            _timed([*IVSHMEMFS, "umount", str(path)])
    finally:
        unmount(path)
        region.unlink(missing_ok=True)
    return {f"mkfs {size}": median(making), f"mount {size}": median(mounting)}


def _timed(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT, cwd=TOP)
    return time.perf_counter() - started


def idle(client: LocalClient, shm: Path, work: Path, *, seconds: float) -> Figures:
    """The part of one core that a mount uses while nothing asks for anything."""
    region = make_region(shm / "idle", "64M")
    with ours(region, work / "idle", available_cpus()) as peer:
        client.run(peer.path, "names", 100)
        time.sleep(1.5)
        before, began = cpu_seconds(peer), time.monotonic()
        time.sleep(seconds)
        return {"idle CPU": (cpu_seconds(peer) - before) / (time.monotonic() - began)}


def memory(client: LocalClient, shm: Path, work: Path, *, files: int, size: str = "16G") -> Figures:
    """Resident MiB of a mount's own memory after it made and listed a large tree."""
    region = make_region(shm / "memory", size, reserve=False)
    with ours(region, work / "memory", available_cpus()) as peer:
        at_start = _resident_mib(peer)
        for number in range(files // 1000):
            folder = client.folder(peer.path / f"folder{number}", empty=True)
            client.run(folder, "fill", 1000, 100)
        command = ["find", str(peer.path), "-size", "+1M"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        walked = _resident_mib(peer)
    region.unlink()
    return {"resident MiB at start": at_start, f"resident MiB after {files} files": walked}


def _resident_mib(peer: Peer) -> float:
    """Resident memory without the pages of the region, which are no more than looked at."""
    status = Path(f"/proc/{peer.daemon}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Rss")}
    return (int(found["RssAnon"]) + int(found["RssFile"])) / 1024
