"""mkfs.ivshmemfs: the command.  Exit codes as in mkfs(8): 0 done, 1 not done."""

from __future__ import annotations

import os
import sys
import time
import uuid as _uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click

from ivshmemfs import __version__
from ivshmemfs import command as shared
from ivshmemfs.completion import complete_region
from ivshmemfs.errors import InUse, RegionMissing, RegionSize, UsageError
from ivshmemfs.format import geometry as geo
from ivshmemfs.format.geometry import Geometry
from ivshmemfs.format.superblock import identify
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say
from ivshmemfs.region import (
    Region,
    cramped,
    create_file,
    exact_size,
    open_region,
    parse_size,
    readable_size,
    refuse_hung,
    refuse_tight,
    reserve,
)
from mkfs import present
from mkfs.initial import Parameters
from mkfs.writer import (
    Existing,
    describe_identity,
    examine,
    format_region,
    identity_of,
    refuse_used,
)

NOT_FILES = ("pci", "mem:", "label=", "uuid=", "LABEL=", "UUID=")  # what --size cannot create
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


def _plan(region_size: int, block_size: int | None, peers: int) -> Geometry:
    try:
        return geo.plan(region_size, block_size, peers)
    except ValueError as error:
        raise RegionSize(
            f"{error}; it takes 1 MiB or more, and blocks of 1K to 64K (a power of two)"
        ) from None


def _report(region: Region, geometry: Geometry, parameters: Parameters) -> None:
    label = f", label {parameters.label!r}" if parameters.label else ""
    say(f"{region.spec}: {readable_size(geometry.region_size)} formatted as ivshmemfs{label}")
    say(f"UUID {_uuid.UUID(bytes=parameters.uuid)}, up to {geometry.peer_count} peers")
    say(_blocks(geometry))


def _blocks(geometry: Geometry) -> str:
    usable = (geometry.block_count - geometry.reserve - 3) * geometry.block_size
    return (
        f"{geometry.block_count} blocks of {geometry.block_size} bytes, "
        f"{readable_size(usable)} usable ({usable / geometry.region_size:.0%})"
    )


def _refuse_odd(spec: str, size: int) -> None:
    """Raise RegionSize unless `size` is a power of two, which QEMU needs for a device."""
    if size & (size - 1):
        below = 1 << size.bit_length() - 1
        raise RegionSize(
            f"{spec}: QEMU refuses a device of {readable_size(size)}; use {exact_size(below)} or "
            f"{exact_size(2 * below)}, or --any-size for a region that no guest gets"
        )


class Options(NamedTuple):
    """The options and the argument of one run."""

    spec: str
    size: int | None  # of a file that mkfs creates or enlarges
    block_size: int | None
    peers: int
    force: int  # how often the user gave --force
    sparse: bool
    any_size: bool
    if_needed: bool = False
    quiet: bool = False


def _check(options: Options) -> None:
    """Refuse what needs no look at the region."""
    spec, size = options.spec, options.size
    if size is not None:
        # Before mkfs creates a file that it cannot format.
        _plan(size, options.block_size, options.peers)
        if not options.any_size:
            _refuse_odd(spec, size)
        if spec.startswith(NOT_FILES) and not os.path.lexists(spec):
            raise UsageError(
                f"--size creates a file; {spec} has a size of its own: leave out --size"
            )


def _left_alone(options: Options) -> bool:
    """Whether --if-needed has nothing to do; raises InUse for a filesystem that is not sound."""
    if not options.if_needed:
        return False
    try:
        with open_region(options.spec, readonly=True, identify=identify) as region:
            if options.size not in (None, region.size):
                return False
            with _explained(region):
                identity = identity_of(region.memory)
                if identity is None:
                    return False
                wrong = present.problem(region.memory)
            named = describe_identity(*identity)
            if wrong and not options.force:
                raise InUse(
                    f"{options.spec} carries an ivshmemfs filesystem ({named}) that cannot be "
                    f"used: {wrong} (--force overwrites it)"
                )
            if wrong:
                return False
            if not options.quiet:
                size = readable_size(region.size)
                say(f"{region.spec}: carries ivshmemfs already ({size}, {named}); left as it is")
            _warn(region)
            return True
    except (RegionMissing, RegionSize):  # an empty file is made larger
        return False


def _warn(region: Region) -> None:
    if warning := cramped(region):
        say(f"mkfs.ivshmemfs: {warning}", err=True)


def _rehearse(options: Options) -> None:
    """Say what `_make` would do; refuse what it would refuse."""
    if _left_alone(options):
        return
    spec, size = options.spec, options.size
    if size is not None and not (os.path.lexists(spec) and os.stat(spec).st_size):
        folder = Path(spec).absolute().parent
        if not folder.is_dir():
            raise RegionMissing(f"{folder}: no such directory; create it first")
        if not options.sparse:
            refuse_tight(os.statvfs(folder), Path(spec), size)
        shape, doing = _plan(size, options.block_size, options.peers), "made and formatted"
    else:
        with open_region(spec, readonly=True, identify=identify) as region:
            _refuse_size(region, options)
            with _explained(region):
                refuse_used(examine(region), spec, options.force)
            shape = _plan(size or region.size, options.block_size, options.peers)
            if region.kind == "file" and not options.any_size:
                _refuse_odd(spec, shape.region_size)
            grown = "made larger and " if shape.region_size != region.size else ""
            doing = f"{grown}formatted"
    if not options.quiet:
        size_text = readable_size(shape.region_size)
        say(f"{spec}: {size_text} would be {doing} as ivshmemfs; nothing was changed")
        say(_blocks(shape))


def _make(options: Options, new: Parameters) -> None:
    if _left_alone(options):
        return
    spec = options.spec
    with _prepared(options) as (region, existing):
        geometry = _plan(region.size, options.block_size, options.peers)
        if region.kind == "file":
            if not options.any_size:
                _refuse_odd(spec, region.size)
            if not options.sparse:
                reserve(region)
        with _explained(region):
            format_region(region.memory, geometry, new, fresh=existing is None)
    # The region has a filesystem now; it keeps it even if a line below fails.
    _warn(region)
    if not options.quiet:
        _report(region, geometry, new)
    if existing is not None:
        _tell_harm(existing)


def _tell_harm(existing: Existing) -> None:
    """Tell what formatting did to peers."""
    if existing.repair:
        say("the repair that was under way there ends without effect")
    for occupant in existing.live:
        say(f"{occupant.describe()} had it mounted: all calls there fail now (ESTALE); unmount it")
    if not existing.data.whole:
        say("it is so large that only samples of it were searched for other data")


@contextmanager
def _explained(region: Region) -> Iterator[None]:
    """Replace a failed access to a region that is too short by the true cause."""
    try:
        yield
    except OSError as error:
        short = region.shortage()
        if not short:
            raise
        raise RegionSize(short) from error


@contextmanager
def _prepared(options: Options) -> Iterator[tuple[Region, Existing | None]]:
    """Return the region, in its wanted size, and what it has; None if mkfs just created it.

    If the caller fails, this undoes what it did to a file.
    """
    spec, size = options.spec, options.size
    before = os.stat(spec).st_size if size is not None and os.path.lexists(spec) else None
    existing: Existing | None = None
    if size is None or before:
        with open_region(spec, identify=identify) as region:
            _refuse_size(region, options)
            with _explained(region):
                existing = examine(region)
            refuse_used(existing, spec, options.force)
            if size is None or size == region.size:
                yield region, existing
                return
    assert size is not None
    create_file(spec, size, exist_ok=before is not None)
    try:
        with open_region(spec) as region:
            yield region, existing
    except BaseException:
        _take_back(spec, before, size)
        raise


def _refuse_size(region: Region, options: Options) -> None:
    """Raise RegionSize unless an existing file may get the size of --size."""
    if options.size is None or options.size == region.size:
        return
    if options.size < region.size and region.kind == "file":
        raise RegionSize(
            f"{options.spec} has {readable_size(region.size)}, and mkfs makes no file smaller, "
            "because a process that maps it would lose its end: leave out --size, or remove the "
            "file"
        )
    if region.kind != "file" or not options.force:
        raise RegionSize(
            f"{options.spec} exists and has {region.size} bytes, not {options.size}: leave out "
            "--size; 'ivshmemfs resize' makes it larger and keeps its files, --force loses them"
        )


def _take_back(path: str, before: int | None, size: int) -> None:
    """Undo the creation of a file of `size`; `before` is its size before, None: no file."""
    if before is None:
        Path(path).unlink(missing_ok=True)
    elif before < size == os.stat(path).st_size:
        os.truncate(path, before)


MANUAL = Manual(
    examples=(
        Example("mkfs.ivshmemfs --size 64M --label hello /dev/shm/hello", "Make a region."),
        Example("mkfs.ivshmemfs pci", "Format the one ivshmem device, in a guest."),
        Example("mkfs.ivshmemfs --force /dev/shm/hello", "Format it anew; all files are lost."),
    ),
    exits={0: "formatted", FAILURE: "not formatted: the message says why"},
)


@click.command(cls=Command, manual=MANUAL, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--size", callback=_size, metavar="SIZE", help="Make the file, of this size: 1M, 16G."
)
@click.option("-L", "--label", default="", help="Name of the filesystem, up to 64 bytes.")
@click.option("-U", "--uuid", callback=_uuid_bytes, metavar="UUID", help="Default: a random one.")
@click.option(
    "--block-size",
    callback=_size,
    metavar="B",
    help="1K to 64K, a power of two.  Default: by size.",
)
@click.option(
    "--peers", type=click.IntRange(1, geo.MAX_PEERS), default=geo.DEFAULT_PEERS,
    metavar="N", show_default=True, help="How many mounts at once.",
)  # fmt: skip
@click.option("--sparse", is_flag=True, help="Do not reserve the memory of a file.")
@click.option(
    "--any-size", is_flag=True, help="Also a size that is not a power of two; no device has one."
)
@click.option(
    "--force", count=True, help="Overwrite what is there.  Twice: also under living mounts."
)
@click.option(
    "--if-needed", is_flag=True, help="Leave a sound filesystem of that size as it is, and succeed."
)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
@click.version_option(__version__, "-V", "--version", prog_name="mkfs.ivshmemfs")
@click.argument("region", shell_complete=complete_region)
def command(
    size: int | None,
    label: str,
    uuid: bytes,
    block_size: int | None,
    peers: int,
    sparse: bool,
    any_size: bool,
    force: int,
    if_needed: bool,
    dry_run: bool,
    quiet: bool,
    region: str,
) -> None:
    """Make a new, empty filesystem on REGION.

    REGION is a file (also file:PATH), pci, pci:ADDRESS, mem:ADDRESS:SIZE or a character device.
    """
    new = Parameters(uuid, label, os.getuid(), os.getgid(), time.time_ns())
    refuse_hung(region.removeprefix("file:"))
    if not os.path.lexists(region):
        region = region.removeprefix("file:")
    options = Options(region, size, block_size, peers, force, sparse, any_size, if_needed, quiet)
    _check(options)
    if dry_run:
        _rehearse(options)
    else:
        _make(options, new)


def main(args: list[str] | None = None, prog_name: str = "mkfs.ivshmemfs") -> None:
    """Run the command; leaves by SystemExit with an exit code of mkfs(8) unless it is 0."""

    def run() -> None:
        try:
            command.main(args, prog_name=prog_name, standalone_mode=False)
        except ValueError as error:  # a label that is too long
            raise UsageError(str(error)) from None

    if code := shared.run(prog_name, run, EXITS):
        sys.exit(code)
