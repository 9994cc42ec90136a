"""`list` and `info`: what there is, and what it carries."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import NamedTuple

import click

from ivshmemfs.cli.attach.complete import complete_any_region
from ivshmemfs.cli.attach.names import region_of, shown
from ivshmemfs.cli.attach.peer import enter
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.output import JSON_HELP, show, show_json
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
    uncached,
)
from ivshmemfs.region.roots import HERE
from ivshmemfs.shm.repair import repairing

LIST = Manual(
    examples=(
        Example("ivshmemfs list", "Show regions, and where they are mounted."),
        Example("ivshmemfs list --json | jq -r .region", "Print the regions for a program."),
    ),
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
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def list_command(as_json: bool) -> None:
    """List the devices and files that are, or could be, regions, and where they are mounted.

    In parentheses behind a mount point: what happened to its region or its daemon.
    """
    listing(as_json=as_json)


def listing(roots: Roots = HERE, *, as_json: bool = False) -> None:
    """Print a row for each candidate and mount, and on stderr why a device cannot be read."""
    candidates, mounts = discover(roots), _mounts()
    if not candidates and not mounts and not as_json:
        say(
            "no ivshmem device here, and nothing in /dev/shm; make a region with: "
            "mkfs.ivshmemfs --size 64M /dev/shm/NAME",
            err=True,
        )
        return
    rows = [_row(candidate, roots, mounts.pop(candidate.spec, [])) for candidate in candidates]
    rows += [Row(spec, "-", None, None, on) for spec, on in mounts.items()]
    if as_json:
        for row in rows:
            show_json(
                {"region": row.region, "what": row.what, "label": row.label, "uuid": row.uuid,
                 "problem": row.problem or None, "mounted_on": row.mounted_on}
            )  # fmt: skip
    else:
        show([("REGION", "WHAT", "LABEL", "UUID", "MOUNTED ON"), *(row.cells() for row in rows)])
    for row in rows:
        if row.reason:
            say(f"ivshmemfs: {row.reason}", err=True)


class Row(NamedTuple):
    """A region or candidate as `list` shows it."""

    region: str
    what: str
    label: str | None
    uuid: str | None  # None: it carries no filesystem, or cannot be read
    mounted_on: list[str]
    problem: str = ""
    reason: str = ""  # why a device cannot be read

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        on = ", ".join(self.mounted_on) or "-"
        return self.region, self.what, self.label or "-", self.uuid or self.problem or "-", on


def _mounts() -> dict[str, list[str]]:
    """The mount points on this machine, and what is wrong there, by region."""
    found: dict[str, list[str]] = {}
    with suppress(MountError):
        for entry in ours():
            found.setdefault(entry.source, []).append(shown(entry))
    return found


def _row(candidate: Candidate, roots: Roots, on: list[str]) -> Row:
    spec, what = candidate.spec, candidate.description
    try:
        with open_region(candidate.spec, readonly=True, roots=roots) as region:
            page = first_page(region)
            names = superblock.identify(page)
            busy = ", being repaired" if names is not None and repairing(page) else ""
            if not candidate.size:
                what = f"device, {readable_size(region.size)}"
    except (IvshmemfsError, OSError) as error:
        denied = isinstance(error, RegionDenied)
        problem = "no permission to read it" if denied else "cannot be read"
        return Row(spec, what, None, None, on, problem, str(error) if candidate.device else "")
    if names is None:
        return Row(spec, what, None, None, on, "not formatted")
    return Row(spec, what + busy, names[0], names[1], on)


@click.command("info", cls=Command, manual=INFO)
@click.argument("region", shell_complete=complete_any_region)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def info_command(region: str, as_json: bool) -> None:
    """Show what the filesystem on REGION is and how full it is."""
    with open_region(region_of(region), readonly=True, identify=superblock.identify) as opened:
        raw = opened.memory.read(0, superblock.SUPERBLOCK.size)
        checked = superblock.decode(raw, opened.size)
        record = superblock.SUPERBLOCK.unpack(raw)
        fs = enter(opened, readonly=True)
        stats, word = fs.statfs(), fs.view().word
        peers = sum(1 for _peer in fs.table.peers())
        measured, warning = probe(opened.memory), uncached(opened)
    geometry = checked.geometry
    size = stats.block_size
    used, free = (stats.blocks - stats.blocks_free) * size, stats.blocks_avail * size
    uuid = superblock.identify(raw)[1]  # type: ignore[index]  # decode has checked it
    inodes = stats.files - stats.files_free
    sequence, root = words.split_commit(word)
    # This command opens it read-only; that says nothing of the region.
    description = opened.description.removesuffix(", read-only")
    if as_json:
        show_json(
            {
                "region": opened.spec, "description": description, "label": checked.label,
                "uuid": uuid, "format": f"{record.major}.{record.minor}",
                "created_ns": checked.created_ns, "size": opened.size, "block_size": size,
                "blocks": geometry.block_count, "reserve": geometry.reserve, "used": used,
                "available": free, "inodes": inodes, "commit": sequence, "root_block": root,
                "peers": peers, "peers_max": geometry.peer_count, "warning": warning,
            }
        )  # fmt: skip
        return
    rows = [
        ("region", f"{opened.spec} ({description})"),
        ("label", checked.label or "-"),
        ("uuid", uuid),
        ("format", f"{record.major}.{record.minor}"),
        ("created", _when(checked.created_ns)),
        ("blocks", f"{geometry.block_count} of {size} bytes each, {geometry.reserve} in reserve"),
        ("used", readable_size(used)),
        ("free", f"{readable_size(free)} for data"),
        ("inodes", str(inodes)),
        ("commit", f"{sequence} at block {root}"),
        ("peers", f"{peers} of {geometry.peer_count}"),
        ("mapping", measured.describe()),
    ]
    show(rows)
    if warning:
        say(f"ivshmemfs: {warning}", err=True)


def _when(ns: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return f"{ns} ns since 1970"
