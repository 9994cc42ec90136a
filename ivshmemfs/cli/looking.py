"""`list` and `info`: what there is, and what it carries."""

from __future__ import annotations

import time
from contextlib import suppress

import click

from ivshmemfs.cli.naming import region_of, shown
from ivshmemfs.cli.output import table
from ivshmemfs.errors import IvshmemfsError, MountError, RegionDenied
from ivshmemfs.format import superblock
from ivshmemfs.format.peer import printable
from ivshmemfs.fuse.mountpoint import ours
from ivshmemfs.region import Candidate, discover, open_region, probe, readable_size

FIRST_PAGE = 4096


@click.command("list")
def list_command() -> None:
    """List the devices and files that are, or could be, regions, and where they are mounted.

    In parentheses behind a mount point: what happened to its region or its daemon.
    """
    candidates, mounts = discover(), _mounts()
    if not candidates and not mounts:
        click.echo(
            "no ivshmem device here, and nothing in /dev/shm; make a region with: "
            "mkfs.ivshmemfs --size 64M /dev/shm/NAME",
            err=True,
        )
        return
    rows = [("REGION", "WHAT", "LABEL", "UUID", "MOUNTED ON")]
    for candidate in candidates:
        rows.append((*_row(candidate), mounts.pop(candidate.spec, "-")))
    rows += [(printable(spec), "-", "-", "-", on) for spec, on in mounts.items()]
    click.echo(table(rows))


def _mounts() -> dict[str, str]:
    """The mount points on this machine, and what is wrong there, by region."""
    found: dict[str, list[str]] = {}
    with suppress(MountError):
        for entry in ours():
            found.setdefault(entry.source, []).append(printable(shown(entry)))
    return {spec: ", ".join(places) for spec, places in found.items()}


def _row(candidate: Candidate) -> tuple[str, str, str, str]:
    spec, what = printable(candidate.spec), candidate.description
    try:
        with open_region(candidate.spec, readonly=True) as region:
            names = superblock.identify(region.memory.read(0, min(FIRST_PAGE, region.size)))
            if not candidate.size:
                what = f"device, {readable_size(region.size)}"
    except RegionDenied:
        return spec, what, "-", "no permission to read it"
    except (IvshmemfsError, OSError):
        return spec, what, "-", "cannot be read"
    if names is None:
        return spec, what, "-", "not formatted"
    return spec, what, printable(names[0]) or "-", names[1]


@click.command("info")
@click.argument("region")
def info_command(region: str) -> None:
    """Show what the filesystem on REGION is and how full it is."""
    from ivshmemfs.engine import Filesystem

    with open_region(region_of(region), readonly=True, identify=superblock.identify) as opened:
        raw = opened.memory.read(0, superblock.SUPERBLOCK.size)
        checked = superblock.decode(raw, opened.size)
        record = superblock.SUPERBLOCK.unpack(raw)
        fs = Filesystem.mount(opened, readonly=True)
        stats, word = fs.statfs(), fs.view().word
        peers = sum(1 for _peer in fs.table.peers())
        measured = probe(opened.memory)
    geometry = checked.geometry
    size = stats.block_size
    free = readable_size(stats.blocks_avail * size)
    rows = [
        ("region", f"{printable(opened.spec)} ({opened.description})"),
        ("label", printable(checked.label) or "-"),
        ("uuid", superblock.identify(raw)[1]),  # type: ignore[index]  # decode has checked it
        ("format", f"{record.major}.{record.minor}"),
        ("created", _when(checked.created_ns)),
        ("blocks", f"{geometry.block_count} of {size} bytes each, {geometry.reserve} in reserve"),
        ("used", readable_size((stats.blocks - stats.blocks_free) * size)),
        ("free", f"{free} for data"),
        ("inodes", str(stats.files - stats.files_free)),
        ("commit", f"{word >> 28} at block {word & (1 << 28) - 1}"),
        ("peers", f"{peers} of {geometry.peer_count}"),
        ("mapping", measured.describe()),
    ]
    click.echo(table(rows))
    if warning := measured.warning():
        click.echo(f"ivshmemfs: {warning}", err=True)


def _when(ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return f"{ns} ns since 1970"
