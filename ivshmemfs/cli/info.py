"""`list` and `info`: what there is, and what it carries."""

from __future__ import annotations

import time
from contextlib import suppress

import click

from ivshmemfs.cli.attach.names import region_of, shown
from ivshmemfs.cli.attach.peer import enter
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.output import show
from ivshmemfs.errors import IvshmemfsError, MountError, RegionDenied
from ivshmemfs.format import superblock, words
from ivshmemfs.fuse.mountpoint import ours
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say
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
from ivshmemfs.shm.repair import repairing

Row = tuple[str, str, str, str]


LIST = Manual(
    examples=(Example("ivshmemfs list", "Show regions, and where they are mounted."),),
    exits=exits({0: "done, also if there is none"}),
)
INFO = Manual(
    examples=(
        Example("ivshmemfs info /dev/shm/hello", "Show label, UUID, size and free space."),
        Example("ivshmemfs info /mnt/shared", "The same for the region that is mounted there."),
    ),
    exits=exits(),
)


@click.command("list", cls=Command, manual=LIST)
def list_command() -> None:
    """List the devices and files that are, or could be, regions, and where they are mounted.

    In parentheses behind a mount point: what happened to its region or its daemon.
    """
    listing()


def listing(roots: Roots = HERE) -> None:
    """Print a row for each candidate and mount, and on stderr why a device cannot be read."""
    candidates, mounts = discover(roots), _mounts()
    if not candidates and not mounts:
        say(
            "no ivshmem device here, and nothing in /dev/shm; make a region with: "
            "mkfs.ivshmemfs --size 64M /dev/shm/NAME",
            err=True,
        )
        return
    rows, reasons = [("REGION", "WHAT", "LABEL", "UUID", "MOUNTED ON")], []
    for candidate in candidates:
        row, error = _row(candidate, roots)
        rows.append((*row, mounts.pop(candidate.spec, "-")))
        if error is not None and candidate.device:
            reasons.append(str(error))
    rows += [(spec, "-", "-", "-", on) for spec, on in mounts.items()]
    show(rows)
    for reason in reasons:
        say(f"ivshmemfs: {reason}", err=True)


def _mounts() -> dict[str, str]:
    """The mount points on this machine, and what is wrong there, by region."""
    found: dict[str, list[str]] = {}
    with suppress(MountError):
        for entry in ours():
            found.setdefault(entry.source, []).append(shown(entry))
    return {spec: ", ".join(places) for spec, places in found.items()}


def _row(candidate: Candidate, roots: Roots) -> tuple[Row, IvshmemfsError | OSError | None]:
    spec, what = candidate.spec, candidate.description
    try:
        with open_region(candidate.spec, readonly=True, roots=roots) as region:
            page = first_page(region)
            names = superblock.identify(page)
            busy = ", being repaired" if names is not None and repairing(page) else ""
            if not candidate.size:
                what = f"device, {readable_size(region.size)}"
    except RegionDenied as error:
        return (spec, what, "-", "no permission to read it"), error
    except (IvshmemfsError, OSError) as error:
        return (spec, what, "-", "cannot be read"), error
    if names is None:
        return (spec, what, "-", "not formatted"), None
    return (spec, what + busy, names[0] or "-", names[1]), None


@click.command("info", cls=Command, manual=INFO)
@click.argument("region")
def info_command(region: str) -> None:
    """Show what the filesystem on REGION is and how full it is."""
    with open_region(region_of(region), readonly=True, identify=superblock.identify) as opened:
        raw = opened.memory.read(0, superblock.SUPERBLOCK.size)
        checked = superblock.decode(raw, opened.size)
        record = superblock.SUPERBLOCK.unpack(raw)
        fs = enter(opened, readonly=True)
        stats, word = fs.statfs(), fs.view().word
        peers = sum(1 for _peer in fs.table.peers())
        measured = probe(opened.memory)
    geometry = checked.geometry
    size = stats.block_size
    free = readable_size(stats.blocks_avail * size)
    rows = [
        # This command opens it read-only; that says nothing of the region.
        ("region", f"{opened.spec} ({opened.description.removesuffix(', read-only')})"),
        ("label", checked.label or "-"),
        ("uuid", superblock.identify(raw)[1]),  # type: ignore[index]  # decode has checked it
        ("format", f"{record.major}.{record.minor}"),
        ("created", _when(checked.created_ns)),
        ("blocks", f"{geometry.block_count} of {size} bytes each, {geometry.reserve} in reserve"),
        ("used", readable_size((stats.blocks - stats.blocks_free) * size)),
        ("free", f"{free} for data"),
        ("inodes", str(stats.files - stats.files_free)),
        ("commit", "{} at block {}".format(*words.split_commit(word))),
        ("peers", f"{peers} of {geometry.peer_count}"),
        ("mapping", measured.describe()),
    ]
    show(rows)
    if warning := measured.warning():
        say(f"ivshmemfs: {warning}", err=True)


def _when(ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return f"{ns} ns since 1970"
