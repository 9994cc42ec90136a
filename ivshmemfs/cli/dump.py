"""`dump`: the bytes on a region, field by field, from the one declaration of the format."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import click

from ivshmemfs.cli.attach.names import region_of
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.output import table
from ivshmemfs.errors import IvshmemfsError, UsageError
from ivshmemfs.format import inode, node, peer, repair, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET, REPAIR_OFFSET, Geometry
from ivshmemfs.format.record import Layout
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say, shown
from ivshmemfs.region import Region, open_region

HELP = """Show the bytes on REGION, field by field.

\b
WHAT is one of:
  superblock   (the default)
  copy         the superblock's copy
  words        commit word and hint word
  repair       the repair slot
  peers        the slots that are in use
  tags         how many blocks each incarnation of a slot has claimed
  root         the root block
  inode:N      inode number N
  block:N      block number N
  all          superblock, words, repair, peers, tags, root
"""


MANUAL = Manual(
    examples=(
        Example("ivshmemfs dump /dev/shm/hello", "Show the superblock."),
        Example("ivshmemfs dump /dev/shm/hello inode:1", "Show the root directory's inode."),
        Example("ivshmemfs dump pci all", "Show all records, for a report of a fault."),
    ),
    exits=exits(),
)


@click.command("dump", cls=Command, help=HELP, manual=MANUAL)
@click.argument("region")
@click.argument("what", default="superblock")
def dump_command(region: str, what: str) -> None:
    """Show the bytes on REGION, field by field."""
    name, colon, number = what.partition(":")
    with open_region(region_of(region), readonly=True, identify=superblock.identify) as opened:
        if colon:
            show = _NUMBERED.get(name)
            if show is None or not number.isdecimal():
                raise UsageError(f"nothing is called '{what}': see 'ivshmemfs dump --help'")
            lines = show(opened, int(number))
        else:
            simple = _SIMPLE.get(name)
            if simple is None:
                raise UsageError(f"nothing is called '{what}': see 'ivshmemfs dump --help'")
            lines = simple(opened)
        for line in lines:
            say(line)


# --- the parts --------------------------------------------------------------------------------


def _superblock(region: Region, offset: int = superblock.OFFSET) -> Iterator[str]:
    raw = region.memory.read(offset, superblock.SUPERBLOCK.size)
    yield f"superblock at {offset}"
    yield from _record(superblock.SUPERBLOCK, superblock.SUPERBLOCK.unpack(raw))
    try:
        superblock.decode(raw, region.size)
        yield "  -> as it should be"
    except IvshmemfsError as error:
        yield f"  -> {error}"


def _copy(region: Region) -> Iterator[str]:
    yield from _superblock(region, superblock.COPY_OFFSET)


def _words(region: Region) -> Iterator[str]:
    commit = region.memory.load(COMMIT_OFFSET)
    sequence, block = words.split_commit(commit)
    under = words.under_repair(commit)
    meaning = f"sequence {sequence}, " + ("under repair" if under else f"root block {block}")
    yield f"commit word at {COMMIT_OFFSET}: {commit:#018x} = {meaning}"
    hint = region.memory.load(HINT_OFFSET)
    holder = f"slot {hint >> words.SLOT_SHIFT}" if hint else "no peer"
    yield f"hint word at {HINT_OFFSET}: {hint:#018x} = {holder} is committing"


def _repair(region: Region) -> Iterator[str]:
    raw = region.memory.read(REPAIR_OFFSET, peer.SLOT_SIZE)
    record = repair.REPAIR.unpack(raw)
    yield f"repair slot at {REPAIR_OFFSET}: {_state(record.state)}"
    yield from _record(repair.REPAIR, record)


def _peers(region: Region) -> Iterator[str]:
    geometry = _geometry(region)
    size = geometry.peer_count * peer.SLOT_SIZE
    slots = region.memory.read(geometry.peers_offset, size)
    yield f"{geometry.peer_count} peer slots at {geometry.peers_offset}"
    for occupant in peer.occupants(slots, geometry.peer_count):
        at = geometry.peers_offset + (occupant.slot - 1) * peer.SLOT_SIZE
        whole = "" if occupant.identity_valid else ", its identity is not whole"
        yield f"slot {occupant.slot} at {at}: {_state(occupant.record.state)}{whole}"
        yield from _record(peer.SLOT, occupant.record)


def _tags(region: Region) -> Iterator[str]:
    geometry = _geometry(region)
    raw = region.memory.read(geometry.tags_offset, geometry.block_count * words.WORD)
    claims = Counter(tag >> words.INCARNATION_SHIFT for tag in array("Q", raw) if tag)
    yield f"{geometry.block_count} tags at {geometry.tags_offset}: {claims.total()} claimed"
    rows = []
    for claim, count in sorted(claims.items()):
        slot, incarnation, _counter = words.split_tag(claim << words.INCARNATION_SHIFT)
        rows.append((f"  slot {slot}", f"incarnation {incarnation}", f"{count} blocks"))
    yield from table(rows)


def _root(region: Region) -> Iterator[str]:
    commit = region.memory.load(COMMIT_OFFSET)
    if words.under_repair(commit):
        commit = region.memory.load(REPAIR_OFFSET + repair.FORMER_OFFSET)
    _sequence, block = words.split_commit(commit)
    yield from _block(region, block)


def _inode(region: Region, number: int) -> Iterator[str]:
    from ivshmemfs.cli.attach.peer import enter

    view = enter(region, readonly=True).view()
    view.inode(number)  # or it says why not
    block, _weight, _tag = words.POINTER.unpack(view.pointer_to(number))
    yield from _block(region, block)


def _block(region: Region, block: int) -> Iterator[str]:
    geometry = _geometry(region)
    if block >= geometry.block_count:
        raise UsageError(f"there is no block {block}: the region has {geometry.block_count}")
    at = geometry.data_offset + block * geometry.block_size
    tag = region.memory.load(geometry.tags_offset + block * words.WORD)
    yield f"block {block} at {at}, {_claim(tag)}"
    raw = region.memory.read(at, geometry.block_size)
    header = node.HEADER.unpack(raw)
    if not tag or header.tag != tag or header.kind not in node.KIND_NAMES:
        yield "  file data or free: it has no header of a metadata block"
        return
    yield from _record(node.HEADER, header)
    if header.kind == node.ROOT:
        yield from _record(node.ROOT_RECORD, node.ROOT_RECORD.unpack(raw, node.HEADER_SIZE))
        yield from _pointers(raw[node.ROOT_POINTERS : header.used])
    elif header.kind == node.INODE:
        yield from _record(inode.INODE, inode.INODE.unpack(raw, node.HEADER_SIZE))
    elif header.kind == node.INDEX:
        yield from _pointers(raw[node.HEADER_SIZE : header.used])


def _all(region: Region) -> Iterator[str]:
    for part in (_superblock, _words, _repair, _peers, _tags, _root):
        yield from part(region)


_SIMPLE: dict[str, Callable[[Region], Iterator[str]]] = {
    "superblock": _superblock,
    "copy": _copy,
    "words": _words,
    "repair": _repair,
    "peers": _peers,
    "tags": _tags,
    "root": _root,
    "all": _all,
}
_NUMBERED: dict[str, Callable[[Region, int], Iterator[str]]] = {"inode": _inode, "block": _block}


# --- how values look --------------------------------------------------------------------------


def _geometry(region: Region) -> Geometry:
    raw = region.memory.read(0, superblock.SUPERBLOCK.size)
    return superblock.decode(raw, region.size).geometry


def _record(layout: Layout[Any], record: tuple[Any, ...]) -> Iterator[str]:
    rows = [
        (f"  {field.offset:4}", field.name, _value(field.name, value), field.doc)
        for field, value in zip(layout.fields, record, strict=True)
    ]
    yield from table(rows)


def _value(name: str, value: object) -> str:
    if isinstance(value, bytes):
        stripped = value.rstrip(b"\0")
        if name in ("label", "host", "version", "mount_point"):
            return repr(shown(stripped))
        return stripped.hex() or "0"
    if not isinstance(value, int):
        return str(value)
    if name == "mode":
        return f"{value:#o}"
    if name in ("state", "former", "tag", "crc", "fsid") or name.endswith("signature"):
        return f"{value:#x}"
    return str(value)


def _state(word: int) -> str:
    state, incarnation, counter = words.split_state(word)
    name = words.STATE_NAMES[state] if state < len(words.STATE_NAMES) else f"state {state}"
    return f"{name}, incarnation {incarnation}, counter {counter}"


def _claim(tag: int) -> str:
    if not tag:
        return "free"
    slot, incarnation, counter = words.split_tag(tag)
    return f"claimed by slot {slot}, incarnation {incarnation}, transaction {counter}"


def _pointers(raw: bytes) -> Iterator[str]:
    whole = len(raw) - len(raw) % words.POINTER_SIZE
    for index, (block, weight, tag) in enumerate(words.POINTER.iter_unpack(raw[:whole])):
        if tag:
            yield f"  pointer {index}: block {block}, weight {weight}, tag {tag:#x}"
