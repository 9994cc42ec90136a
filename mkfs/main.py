"""mkfs.ivshmemfs: the command.  Exit codes as in mkfs(8): 0 done, 1 not done."""

from __future__ import annotations

import os
import sys
import time
import uuid as _uuid
from pathlib import Path

import click

from ivshmemfs import command as shared
from ivshmemfs.errors import IvshmemfsError, RegionSize, UsageError
from ivshmemfs.format import geometry as geo
from ivshmemfs.format.geometry import Geometry
from ivshmemfs.format.peer import printable
from ivshmemfs.format.superblock import identify
from ivshmemfs.region import Region, create_file, open_region, parse_size, readable_size
from mkfs.image import Parameters
from mkfs.writer import examine, format_region, refuse_used

NOT_FILES = ("pci", "mem:", "label=", "uuid=")  # what --size cannot create
FAILURE = 1  # the one exit code for everything that went wrong, wrong usage included
EXITS = shared.Exits(usage=FAILURE, system=FAILURE, interrupted=FAILURE, internal=FAILURE)


def _size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return parse_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from None


def _uuid_bytes(_: click.Context, __: click.Parameter, value: str | None) -> bytes:
    if value is None:
        return _uuid.uuid4().bytes
    try:
        return _uuid.UUID(value).bytes
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a UUID") from None


def _open(spec: str, size: int | None, force: bool) -> tuple[Region, bool]:
    """The region, and whether it was created now (so that all of it is zero)."""
    if size is None:
        return open_region(spec, identify=identify), False
    fresh = not os.path.lexists(spec)
    if fresh and spec.startswith(NOT_FILES):
        raise UsageError(f"--size creates a file; {spec} has a size of its own: leave out --size")
    before = None if fresh else os.stat(spec).st_size
    if fresh or force:
        create_file(spec, size, exist_ok=force)
    try:
        region = open_region(spec)
    except IvshmemfsError:
        _take_back(spec, before, size)
        raise
    if region.size != size:
        region.close()
        raise RegionSize(
            f"{spec} exists and has {region.size} bytes, not {size}: leave out --size, or "
            "change its size with --force"
        )
    return region, fresh


def _take_back(path: str, before: int | None, size: int) -> None:
    """Undo what making a file of `size` did, after it could not be used; None: it was not there."""
    if before is None:
        Path(path).unlink(missing_ok=True)
    elif before < size == os.stat(path).st_size:
        os.truncate(path, before)


def _plan(region_size: int, block_size: int | None, peers: int) -> Geometry:
    try:
        return geo.plan(region_size, block_size, peers)
    except ValueError as error:
        raise RegionSize(
            f"{error}; it takes 1 MiB or more, and blocks of 1K to 64K (a power of two)"
        ) from None


def _report(region: Region, geometry: Geometry, parameters: Parameters) -> None:
    usable = (geometry.block_count - geometry.reserve - 3) * geometry.block_size
    label = f", label {printable(parameters.label)!r}" if parameters.label else ""
    click.echo(
        f"{region.spec}: {readable_size(geometry.region_size)} formatted as ivshmemfs{label}"
    )
    click.echo(f"UUID {_uuid.UUID(bytes=parameters.uuid)}, up to {geometry.peer_count} peers")
    click.echo(
        f"{geometry.block_count} blocks of {geometry.block_size} bytes, "
        f"{readable_size(usable)} usable ({usable / geometry.region_size:.0%})"
    )


def _make(
    spec: str, size: int | None, block_size: int | None, peers: int, force: bool, new: Parameters
) -> None:
    if size is not None:
        _plan(size, block_size, peers)  # before a file is made that cannot be formatted
    region, fresh = _open(spec, size, force)
    try:
        with region:
            geometry = _plan(region.size, block_size, peers)
            if not force:
                refuse_used(examine(region.memory), spec)
            format_region(region.memory, geometry, new, fresh=fresh)
            fresh = False  # it carries a filesystem now; whatever fails from here on, it stays
            _report(region, geometry, new)
    except BaseException:
        if fresh:
            Path(spec).unlink(missing_ok=True)
        raise


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", callback=_size, metavar="SIZE", help="Create the file, e.g. 1M or 16G.")
@click.option("--label", default="", help="Name of the filesystem, up to 64 bytes.")
@click.option("--uuid", callback=_uuid_bytes, metavar="UUID", help="Default: a random one.")
@click.option("--block-size", callback=_size, metavar="B", help="1K to 64K, a power of two.")
@click.option(
    "--peers", type=click.IntRange(1, geo.MAX_PEERS), default=geo.DEFAULT_PEERS,
    show_default=True, help="How many mounts at once.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite whatever is there.")
@click.argument("region")
def command(
    size: int | None,
    label: str,
    uuid: bytes,
    block_size: int | None,
    peers: int,
    force: bool,
    region: str,
) -> None:
    """Make a new, empty filesystem on REGION.

    REGION is a file, pci, pci:ADDRESS, mem:ADDRESS:SIZE or a character device.
    """
    new = Parameters(uuid, label, os.getuid(), os.getgid(), time.time_ns())
    _make(region, size, block_size, peers, force, new)


def main(args: list[str] | None = None, prog_name: str = "mkfs.ivshmemfs") -> None:
    """Run the command; leaves by SystemExit with an exit code of mkfs(8) unless it is 0."""

    def run() -> None:
        try:
            command.main(args, prog_name=prog_name, standalone_mode=False)
        except ValueError as error:  # a label that is too long
            raise UsageError(str(error)) from None

    if code := shared.run(prog_name, run, EXITS):
        sys.exit(code)
