"""`list` and `info`: what there is, and what it carries."""

from __future__ import annotations

import time

import click

from ivshmemfs.cli.output import table
from ivshmemfs.errors import IvshmemfsError, RegionDenied
from ivshmemfs.format import superblock
from ivshmemfs.format.peer import printable
from ivshmemfs.region import (
    Candidate,
    Roots,
    discover,
    first_page,
    open_region,
    probe,
    readable_size,
)
from ivshmemfs.region.roots import HERE


@click.command("list")
def list_command() -> None:
    """List the devices and files that are, or could be, regions."""
    listing()


def listing(roots: Roots = HERE) -> None:
    """Print a row for each candidate, and on stderr why a device cannot be read."""
    candidates = discover(roots)
    if not candidates:
        click.echo(
            "no ivshmem device here, and nothing in /dev/shm; make a region with: "
            "mkfs.ivshmemfs --size 64M /dev/shm/NAME",
            err=True,
        )
        return
    rows, reasons = [("REGION", "WHAT", "LABEL", "UUID")], []
    for candidate in candidates:
        row, error = _row(candidate, roots)
        rows.append(row)
        if error is not None and candidate.device:
            reasons.append(printable(str(error)))
    click.echo(table(rows))
    for reason in reasons:
        click.echo(f"ivshmemfs: {reason}", err=True)


Row = tuple[str, str, str, str]


def _row(candidate: Candidate, roots: Roots) -> tuple[Row, IvshmemfsError | OSError | None]:
    spec, what = printable(candidate.spec), candidate.description
    try:
        with open_region(candidate.spec, readonly=True, roots=roots) as region:
            names = superblock.identify(first_page(region))
            if not candidate.size:
                what = f"device, {readable_size(region.size)}"
    except RegionDenied as error:
        return (spec, what, "-", "no permission to read it"), error
    except (IvshmemfsError, OSError) as error:
        return (spec, what, "-", "cannot be read"), error
    if names is None:
        return (spec, what, "-", "not formatted"), None
    return (spec, what, printable(names[0]) or "-", names[1]), None


@click.command("info")
@click.argument("region")
def info_command(region: str) -> None:
    """Show what the filesystem on REGION is and how full it is."""
    from ivshmemfs.engine import Filesystem

    with open_region(region, readonly=True, identify=superblock.identify) as opened:
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
