"""`label`, `uuid` and `resize`: change what mkfs chose, and keep every file."""

from __future__ import annotations

import os
import uuid as _uuid

import click

from ivshmemfs.cli.attach.complete import complete_any_region
from ivshmemfs.cli.attach.names import region_of
from ivshmemfs.cli.exits import exits
from ivshmemfs.errors import UsageError
from ivshmemfs.format import superblock
from ivshmemfs.format.geometry import Geometry
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say
from ivshmemfs.region import (
    Region,
    create_file,
    exact_size,
    first_page,
    open_region,
    parse_size,
    readable_size,
    reserve,
)
from ivshmemfs.shm import amendment

_REFUSED = {1: "wrong usage, or refused: the region is mounted"}
LABEL = Manual(
    examples=(
        Example("ivshmemfs label /dev/shm/hello", "Print the label."),
        Example("ivshmemfs label /dev/shm/hello build", "Call it build from now on."),
        Example('ivshmemfs label /dev/shm/hello ""', "Take the label away."),
    ),
    exits=exits(_REFUSED),
)
UUID = Manual(
    examples=(
        Example("ivshmemfs uuid /dev/shm/hello", "Print the UUID."),
        Example("ivshmemfs uuid /dev/shm/copy random", "Tell a copied region from its original."),
    ),
    exits=exits(_REFUSED),
)
RESIZE = Manual(
    examples=(
        Example("ivshmemfs resize /dev/shm/hello 128M", "Make file and filesystem larger."),
        Example("ivshmemfs resize pci", "Use all of a device that has become larger."),
        Example("ivshmemfs resize -n /dev/shm/hello 128M", "Say what would be done."),
    ),
    exits=exits(_REFUSED),
)
_FORCE_HELP = "Also under living mounts; they show the former one until they are mounted again."


def _superblock(region: Region) -> superblock.Superblock:
    raw = region.memory.read(superblock.OFFSET, superblock.SUPERBLOCK.size)
    return superblock.decode(raw, region.size)


def _open(spec: str, *, readonly: bool) -> Region:
    return open_region(region_of(spec), readonly=readonly, identify=superblock.identify)


@click.command("label", cls=Command, manual=LABEL)
@click.argument("region", shell_complete=complete_any_region)
@click.argument("new", required=False)
@click.option("--force", is_flag=True, help=_FORCE_HELP)
def label_command(region: str, new: str | None, force: bool) -> None:
    """Print the label of REGION, or change it to NEW (up to 64 bytes).

    A change is refused while the region is mounted anywhere.
    """
    with _open(region, readonly=new is None) as opened:
        if new is None:
            say(_superblock(opened).label)
            return
        try:
            amendment.rename(opened.memory, label=new, force=force)
        except ValueError as error:
            raise UsageError(str(error)) from None


@click.command("uuid", cls=Command, manual=UUID)
@click.argument("region", shell_complete=complete_any_region)
@click.argument("new", required=False)
@click.option("--force", is_flag=True, help=_FORCE_HELP)
def uuid_command(region: str, new: str | None, force: bool) -> None:
    """Print the UUID of REGION, or change it to NEW: a UUID, or the word random.

    A change is refused while the region is mounted anywhere.  The command prints the new UUID.
    """
    wanted = None if new is None else _uuid_of(new)
    with _open(region, readonly=wanted is None) as opened:
        if wanted is None:
            say(str(_uuid.UUID(bytes=_superblock(opened).uuid)))
            return
        amendment.rename(opened.memory, uuid=wanted.bytes, force=force)
    say(str(wanted))


def _uuid_of(text: str) -> _uuid.UUID:
    if text == "random":
        return _uuid.uuid4()
    try:
        return _uuid.UUID(text)
    except ValueError:
        raise UsageError(f"'{text}' is not a UUID, nor the word random") from None


@click.command("resize", cls=Command, manual=RESIZE)
@click.argument("region", shell_complete=complete_any_region)
@click.argument("size", required=False)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--sparse", is_flag=True, help="Do not reserve the memory of a file.")
@click.option(
    "--any-size", is_flag=True, help="Also a size that is not a power of two; no device has one."
)
def resize_command(
    region: str, size: str | None, dry_run: bool, sparse: bool, any_size: bool
) -> None:
    """Make the filesystem on REGION larger, up to SIZE: 128M, 1G.  Every file stays.

    Without SIZE it gets all that its file or device has.  With SIZE a file is made larger first.
    Nothing becomes smaller.  Resizing is refused while the region is mounted anywhere.  If it is
    interrupted, run it again.
    """
    with _open(region, readonly=True) as opened:
        spec, has, kind = opened.spec, opened.size, opened.kind
        wanted = has if size is None else parse_size(size)
        _refuse_size(spec, has, wanted, kind)
        raw = opened.memory.read(superblock.OFFSET, superblock.SUPERBLOCK.size)
        before = superblock.decode(raw).geometry if superblock.crc_valid(raw) else None
        unchanged = before is not None and before.region_size == wanted
        if not any_size and kind == "file" and not unchanged:
            _refuse_odd(spec, wanted)
        if wanted != has or dry_run:
            if before is not None and before.region_size == wanted == has:
                say(_unchanged(spec, has))
                return
            new = amendment.enlarged(opened.memory, wanted)
            amendment.refuse_living(opened.memory, new)
            if dry_run:
                say(f"{spec}: would be {_shape(before, new)}; nothing was changed")
                return
    grown = wanted != has
    if grown:
        create_file(spec, wanted, exist_ok=True)
    try:
        with open_region(spec) as opened:
            if kind == "file" and not sparse:
                reserve(opened)
            old = amendment.enlarge(opened.memory)
            now = _superblock(opened).geometry
    except BaseException:
        if grown:
            _take_back(spec, has, wanted)
        raise
    say(_unchanged(spec, has) if old is None else f"{spec}: {_shape(before, now)}")


def _unchanged(spec: str, has: int) -> str:
    return f"{spec}: the filesystem has all of its {readable_size(has)} already"


def _shape(old: Geometry | None, new: Geometry) -> str:
    former = "" if old is None else f"{readable_size(old.region_size)} -> "
    return (
        f"{former}{readable_size(new.region_size)}, {new.block_count} blocks of "
        f"{new.block_size} bytes"
    )


def _refuse_size(spec: str, has: int, wanted: int, kind: str) -> None:
    if wanted < has:
        raise UsageError(
            f"{spec} has {readable_size(has)}, and nothing becomes smaller: copy the files to a "
            "new region instead"
        )
    if wanted > has and kind != "file":
        raise UsageError(
            f"{spec} has {readable_size(has)}: make the device larger on the host (the size of "
            "its memory-backend), then leave out SIZE"
        )


def _refuse_odd(spec: str, size: int) -> None:
    if size & (size - 1):
        below = 1 << size.bit_length() - 1
        raise UsageError(
            f"{spec}: QEMU refuses a device of {readable_size(size)}; use "
            f"{exact_size(2 * below)}, or --any-size for a region that no guest gets"
        )


def _take_back(path: str, before: int, size: int) -> None:
    """Give a file its size back, unless the filesystem needs the new one."""
    with open_region(path, readonly=True) as region:
        if amendment.needs_size(first_page(region), size):
            return
    if os.stat(path).st_size == size:
        os.truncate(path, before)
