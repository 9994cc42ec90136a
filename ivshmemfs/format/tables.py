"""The field tables of docs/format.md, from the one declaration."""

from __future__ import annotations

from typing import Any

from ivshmemfs.format import (
    coherence,
    inode,
    lock,
    node,
    peer,
    queue,
    repair,
    superblock,
    words,
    xattr,
)
from ivshmemfs.format.record import Layout

LAYOUTS: dict[str, Layout[Any]] = {
    "superblock": superblock.SUPERBLOCK,
    "slot": peer.SLOT,
    "coherence": coherence.COHERENCE,
    "repair": repair.REPAIR,
    "pointer": words.POINTER_LAYOUT,
    "header": node.HEADER,
    "root": node.ROOT_RECORD,
    "inode": inode.INODE,
    "xattr": xattr.XATTR,
    "lock": lock.LOCK,
    "wait": lock.WAIT,
    "lock_header": lock.HEADER,
    "queue": queue.QUEUE,
}

_SIGNED = "qih"
_BYTES = "s"


def type_name(code: str, width: int) -> str:
    """Return a struct code as the tables show it: u64, i64, 16 bytes."""
    if code[-1] in _BYTES:
        return f"{width} bytes"
    return f"{'i' if code in _SIGNED else 'u'}{8 * width}"


def table(layout: Layout[Any]) -> list[str]:
    """Return the fields of a record as lines of a Markdown table."""
    lines = [
        "| Offset | Size | Type | Field | Description |",
        "|---:|---:|---|---|---|",
    ]
    lines += [
        f"| {f.offset} | {f.width} | {type_name(f.code, f.width)} | `{f.name}` | {f.doc} |"
        for f in layout.fields
    ]
    return [*lines, "", f"{layout.size} bytes; what no field covers is zero."]
