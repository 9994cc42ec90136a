"""`dump`: the bytes on a region, field by field, from the one declaration of the format."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import click

from ivshmemfs.cli.attach.complete import complete_any_region
from ivshmemfs.cli.attach.names import region_of
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.output import JSON_HELP, show_json, table
from ivshmemfs.errors import IvshmemfsError, UsageError
from ivshmemfs.format import bell, inode, node, peer, repair, superblock, words
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
  words        commit word, hint word, bell words
  repair       the repair slot
  peers        the slots that are in use
  tags         how many blocks each incarnation of a slot has claimed
  root         the root block
  inode:N      inode number N
  block:N      block number N
  all          superblock, words, repair, peers, tags, root

With --json each part is an object: "part" names it, "at" is its byte.  The other members say what
it means.  "fields", or "header", "root" and "inode", have the fields of format.md.  Bytes are
hexadecimal, without zeros at the end.  Numbers have up to 64 bits.
"""

#: Fields whose bytes are text.
_TEXTS: Final = ("label", "host", "version", "mount_point", "maker")


MANUAL = Manual(
    examples=(
        Example("ivshmemfs dump /dev/shm/hello", "Show the superblock."),
        Example("ivshmemfs dump /dev/shm/hello inode:1", "Show the root directory's inode."),
        Example("ivshmemfs dump pci all", "Show all records, for a report of a fault."),
        Example("ivshmemfs dump --json pci peers", "Print the peer slots for a program."),
    ),
    exits=exits(),
)


class Part(NamedTuple):
    """What `dump` shows of one place: a line, records, and lines about what they mean."""

    name: str
    title: str
    facts: dict[str, object]  # besides the records; members of the JSON object
    records: tuple[tuple[str, Layout[Any], tuple[Any, ...]], ...] = ()
    lines: tuple[str, ...] = ()

    def text(self) -> Iterator[str]:
        """Yield the lines for a reader."""
        yield self.title
        for _, layout, record in self.records:
            yield from _record(layout, record)
        yield from self.lines

    def json(self) -> dict[str, object]:
        """Return the object for a program."""
        fields = {
            name: {
                field.name: _plain(field.name, value)
                for field, value in zip(layout.fields, record, strict=True)
            }
            for name, layout, record in self.records
        }
        return {"part": self.name, **self.facts, **fields}


@click.command("dump", cls=Command, help=HELP, manual=MANUAL)
@click.argument("region", shell_complete=complete_any_region)
@click.argument("what", default="superblock")
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def dump_command(region: str, what: str, as_json: bool) -> None:
    """Show the bytes on REGION, field by field."""
    name, colon, number = what.partition(":")
    with open_region(region_of(region), readonly=True, identify=superblock.identify) as opened:
        if colon:
            show = _NUMBERED.get(name)
            if show is None or not number.isdecimal():
                raise UsageError(f"nothing is called '{what}': see 'ivshmemfs dump --help'")
            parts = show(opened, int(number))
        else:
            simple = _SIMPLE.get(name)
            if simple is None:
                raise UsageError(f"nothing is called '{what}': see 'ivshmemfs dump --help'")
            parts = simple(opened)
        for part in parts:
            if as_json:
                show_json(part.json())
                continue
            for line in part.text():
                say(line)


# --- the parts --------------------------------------------------------------------------------


def _superblock(region: Region, offset: int = superblock.OFFSET) -> Iterator[Part]:
    raw = region.memory.read(offset, superblock.SUPERBLOCK.size)
    problem: str | None = None
    try:
        superblock.decode(raw, region.size)
    except IvshmemfsError as error:
        problem = str(error)
    yield Part(
        "superblock",
        f"superblock at {offset}",
        {"at": offset, "problem": problem},
        (("fields", superblock.SUPERBLOCK, superblock.SUPERBLOCK.unpack(raw)),),
        (f"  -> {problem or 'as it should be'}",),
    )


def _copy(region: Region) -> Iterator[Part]:
    yield from _superblock(region, superblock.COPY_OFFSET)


def _words(region: Region) -> Iterator[Part]:
    commit = region.memory.load(COMMIT_OFFSET)
    sequence, block = words.split_commit(commit)
    under = words.under_repair(commit)
    meaning = f"sequence {sequence}, " + ("under repair" if under else f"root block {block}")
    yield Part(
        "commit word",
        f"commit word at {COMMIT_OFFSET}: {commit:#018x} = {meaning}",
        {
            "at": COMMIT_OFFSET, "word": commit, "sequence": sequence,
            "root_block": None if under else block, "under_repair": under,
        },
    )  # fmt: skip
    hint = region.memory.load(HINT_OFFSET)
    slot = hint >> words.SLOT_SHIFT
    holder = f"slot {slot}" if hint else "no peer"
    yield Part(
        "hint word",
        f"hint word at {HINT_OFFSET}: {hint:#018x} = {holder} is committing",
        {"at": HINT_OFFSET, "word": hint, "slot": slot if hint else None},
    )
    found = [region.memory.load(at) for at in bell.BELL_OFFSETS]
    numbers = [number for word in found for number in bell.numbers(word)]
    listed = ", ".join(map(str, numbers)) or "no doorbell"
    yield Part(
        "bell words",
        f"bell words at {bell.BELLS_OFFSET}: the next commit rings {listed}",
        {"at": bell.BELLS_OFFSET, "words": found, "numbers": numbers},
    )


def _repair(region: Region) -> Iterator[Part]:
    raw = region.memory.read(REPAIR_OFFSET, peer.SLOT_SIZE)
    record = repair.REPAIR.unpack(raw)
    yield Part(
        "repair slot",
        f"repair slot at {REPAIR_OFFSET}: {_state(record.state)}",
        {"at": REPAIR_OFFSET, **_state_facts(record.state)},
        (("fields", repair.REPAIR, record),),
    )


def _peers(region: Region) -> Iterator[Part]:
    geometry = _geometry(region)
    count, offset = geometry.peer_count, geometry.peers_offset
    slots = region.memory.read(offset, count * peer.SLOT_SIZE)
    yield Part("peer table", f"{count} peer slots at {offset}", {"at": offset, "slots": count})
    for occupant in peer.occupants(slots, count):
        at = offset + (occupant.slot - 1) * peer.SLOT_SIZE
        whole = "" if occupant.identity_valid else ", its identity is not whole"
        word = occupant.record.state
        yield Part(
            "slot",
            f"slot {occupant.slot} at {at}: {_state(word)}{whole}",
            {
                "slot": occupant.slot, "at": at, **_state_facts(word),
                "identity_valid": occupant.identity_valid,
            },
            (("fields", peer.SLOT, occupant.record),),
        )  # fmt: skip


def _tags(region: Region) -> Iterator[Part]:
    geometry = _geometry(region)
    raw = region.memory.read(geometry.tags_offset, geometry.block_count * words.WORD)
    claims = Counter(tag >> words.INCARNATION_SHIFT for tag in array("Q", raw) if tag)
    rows, facts = [], []
    for claim, count in sorted(claims.items()):
        slot, incarnation, _counter = words.split_tag(claim << words.INCARNATION_SHIFT)
        rows.append((f"  slot {slot}", f"incarnation {incarnation}", f"{count} blocks"))
        facts.append({"slot": slot, "incarnation": incarnation, "blocks": count})
    yield Part(
        "tags",
        f"{geometry.block_count} tags at {geometry.tags_offset}: {claims.total()} claimed",
        {
            "at": geometry.tags_offset, "tags": geometry.block_count, "claimed": claims.total(),
            "claims": facts,
        },
        lines=tuple(table(rows)),
    )  # fmt: skip


def _root(region: Region) -> Iterator[Part]:
    commit = region.memory.load(COMMIT_OFFSET)
    if words.under_repair(commit):
        commit = region.memory.load(REPAIR_OFFSET + repair.FORMER_OFFSET)
    _sequence, block = words.split_commit(commit)
    yield from _block(region, block)


def _inode(region: Region, number: int) -> Iterator[Part]:
    from ivshmemfs.cli.attach.peer import enter

    view = enter(region, readonly=True).view()
    view.inode(number)  # or it says why not
    block, _weight, _tag = words.POINTER.unpack(view.pointer_to(number))
    yield from _block(region, block)


def _block(region: Region, block: int) -> Iterator[Part]:
    geometry = _geometry(region)
    if block >= geometry.block_count:
        raise UsageError(f"there is no block {block}: the region has {geometry.block_count}")
    at = geometry.data_offset + block * geometry.block_size
    tag = region.memory.load(geometry.tags_offset + block * words.WORD)
    title = f"block {block} at {at}, {_claim(tag)}"
    facts: dict[str, object] = {"block": block, "at": at, "claim": _claim_facts(tag)}
    raw = region.memory.read(at, geometry.block_size)
    header = node.HEADER.unpack(raw)
    if not tag or header.tag != tag or header.kind not in node.KIND_NAMES:
        note = "  file data or free: it has no header of a metadata block"
        yield Part("block", title, {**facts, "kind": None}, lines=(note,))
        return
    records: tuple[tuple[str, Layout[Any], tuple[Any, ...]], ...]
    records = (("header", node.HEADER, header),)
    pointers: list[tuple[int, int, int, int]] = []
    if header.kind == node.ROOT:
        root = node.ROOT_RECORD.unpack(raw, node.HEADER_SIZE)
        records += (("root", node.ROOT_RECORD, root),)
        pointers = _pointers(raw[node.ROOT_POINTERS : header.used])
    elif header.kind == node.INODE:
        records += (("inode", inode.INODE, inode.INODE.unpack(raw, node.HEADER_SIZE)),)
    elif header.kind == node.INDEX:
        pointers = _pointers(raw[node.HEADER_SIZE : header.used])
    facts["kind"] = node.KIND_NAMES[header.kind]
    if header.kind in (node.ROOT, node.INDEX):
        names = ("index", "block", "weight", "tag")
        facts["pointers"] = [dict(zip(names, pointer, strict=True)) for pointer in pointers]
    lines = tuple(
        f"  pointer {index}: block {to}, weight {weight}, tag {tag:#x}"
        for index, to, weight, tag in pointers
    )
    yield Part("block", title, facts, records, lines)


def _all(region: Region) -> Iterator[Part]:
    for part in (_superblock, _words, _repair, _peers, _tags, _root):
        yield from part(region)


_SIMPLE: dict[str, Callable[[Region], Iterator[Part]]] = {
    "superblock": _superblock,
    "copy": _copy,
    "words": _words,
    "repair": _repair,
    "peers": _peers,
    "tags": _tags,
    "root": _root,
    "all": _all,
}
_NUMBERED: dict[str, Callable[[Region, int], Iterator[Part]]] = {"inode": _inode, "block": _block}


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
    plain = _plain(name, value)
    if isinstance(plain, str):
        return repr(plain) if name in _TEXTS else plain or "0"
    if name == "mode":
        return f"{plain:#o}"
    if name in ("state", "former", "tag", "crc", "fsid") or name.endswith("signature"):
        return f"{plain:#x}"
    return str(plain)


def _plain(name: str, value: object) -> int | str:
    """Return a field as JSON has it: a number, text, or bytes in hexadecimal without zeros."""
    if isinstance(value, bytes):
        stripped = value.rstrip(b"\0")
        return shown(stripped) if name in _TEXTS else stripped.hex()
    assert isinstance(value, int)
    return value


def _state(word: int) -> str:
    facts = _state_facts(word)
    return "{state}, incarnation {incarnation}, counter {counter}".format_map(facts)


def _state_facts(word: int) -> dict[str, object]:
    state, incarnation, counter = words.split_state(word)
    name = words.STATE_NAMES[state] if state < len(words.STATE_NAMES) else f"state {state}"
    return {"state": name, "incarnation": incarnation, "counter": counter}


def _claim(tag: int) -> str:
    facts = _claim_facts(tag)
    if facts is None:
        return "free"
    text = "claimed by slot {slot}, incarnation {incarnation}, transaction {transaction}"
    return text.format_map(facts)


def _claim_facts(tag: int) -> dict[str, int] | None:
    if not tag:
        return None
    slot, incarnation, counter = words.split_tag(tag)
    return {"slot": slot, "incarnation": incarnation, "transaction": counter}


def _pointers(raw: bytes) -> list[tuple[int, int, int, int]]:
    """Return (index, block, weight, tag) of all pointers that are not null."""
    whole = len(raw) - len(raw) % words.POINTER_SIZE
    found = enumerate(words.POINTER.iter_unpack(raw[:whole]))
    return [(index, block, weight, tag) for index, (block, weight, tag) in found if tag]
