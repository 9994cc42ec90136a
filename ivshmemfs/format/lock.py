"""Locks of one inode, and which owners wait: two hidden extended attributes.

`LOCKS` is an attribute of the locked inode: a header, then one `LockRecord` for each held range and
each waiting request.  `WAITS` is an attribute of the hidden directory of orphans: a header, then
one `WaitRecord` for each waiting fcntl(2) request of the whole region.  Users see neither, because
their names are in no namespace of users.

A region may say anything.  A value of an impossible size or version is a ValueError.  A record with
an impossible field is left out: it locks nothing.  `problem` names both for fsck.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple

from ivshmemfs.format.inode import MAX_INO
from ivshmemfs.format.record import At, Layout

LOCKS: Final = b"ivshmemfs.locks"
WAITS: Final = b"ivshmemfs.waits"
VERSION: Final = 1

FCNTL: Final = 0
FLOCK: Final = 1
READ: Final = 0
WRITE: Final = 1
HELD: Final = 0
WAITING: Final = 1
END: Final = (1 << 63) - 1  # the last byte of a file, and so the end of a lock to its end

MAX_RECORDS: Final = 1000  # of one inode, before a new lock is refused
MAX_WAITS: Final = 1000  # of one region, before a new one is not listed
#: Records that a value may have: giving back the middle of a lock makes two of one.
MOST: Final = 1300


class TableHeader(NamedTuple):
    """What precedes the records of either attribute."""

    version: Annotated[int, At(0, "B", "version of the records; another one is refused")]


class LockRecord(NamedTuple):
    """One held range, or one request that waits."""

    kind: Annotated[int, At(0, "B", "0 fcntl(2), 1 flock(2)")]
    type: Annotated[int, At(1, "B", "0 read (shared), 1 write (exclusive)")]
    state: Annotated[int, At(2, "B", "0 held, 1 waiting")]
    slot: Annotated[int, At(3, "B", "slot of the peer that holds it or waits, from 1")]
    incarnation: Annotated[int, At(4, "I", "incarnation of that slot")]
    owner: Annotated[int, At(8, "Q", "the kernel's number of the lock owner, within that peer")]
    start: Annotated[int, At(16, "Q", "first byte")]
    end: Annotated[int, At(24, "Q", "last byte; 2^63 - 1: to the end of the file")]
    pid: Annotated[int, At(32, "I", "process that asked, in the namespace of that peer; or 0")]
    ticket: Annotated[int, At(40, "Q", "waiting: sequence of the commit that added it; held: 0")]


class WaitRecord(NamedTuple):
    """One owner that waits for a lock of one inode."""

    owner: Annotated[int, At(0, "Q", "the kernel's number of the lock owner")]
    ino: Annotated[int, At(8, "Q", "inode whose lock it waits for")]
    ticket: Annotated[int, At(16, "Q", "ticket of its waiting record there")]
    incarnation: Annotated[int, At(24, "I", "incarnation of the slot")]
    slot: Annotated[int, At(28, "B", "slot of the peer that waits, from 1")]


HEADER = Layout(TableHeader, 8)
LOCK = Layout(LockRecord, 48)
WAIT = Layout(WaitRecord, 32)


def _possible_lock(record: LockRecord) -> bool:
    return (
        record.kind <= FLOCK
        and record.type <= WRITE
        and record.state <= WAITING
        and record.slot > 0
        and record.start <= record.end <= END
        and (record.state == WAITING) == (record.ticket > 0)
    )


def _possible_wait(record: WaitRecord) -> bool:
    return record.slot > 0 and 0 < record.ino <= MAX_INO


def _check(raw: bytes, layout: Layout[Any]) -> None:
    if not raw:
        return
    size = len(raw) - HEADER.size
    if size < 0 or size % layout.size or size > MOST * layout.size:
        raise ValueError(f"a table of {layout.name} has {len(raw)} bytes")
    version = HEADER.unpack(raw).version
    if version != VERSION:
        raise ValueError(f"a table of {layout.name} has version {version}, not {VERSION}")


def decode_locks(raw: bytes) -> list[LockRecord]:
    """The possible records of a value; none of an empty one.  ValueError: size or version."""
    _check(raw, LOCK)
    found = [LOCK.unpack(raw, at) for at in range(HEADER.size, len(raw), LOCK.size)]
    return [record for record in found if _possible_lock(record)]


def encode_locks(records: list[LockRecord]) -> bytes:
    """The value of these records; ValueError when there are more than `MOST`."""
    return _encoded(LOCK, records)


def decode_waits(raw: bytes) -> list[WaitRecord]:
    """The possible records of a value; none of an empty one.  ValueError: size or version."""
    _check(raw, WAIT)
    found = [WAIT.unpack(raw, at) for at in range(HEADER.size, len(raw), WAIT.size)]
    return [record for record in found if _possible_wait(record)]


def encode_waits(records: list[WaitRecord]) -> bytes:
    """The value of these records; ValueError when there are more than `MOST`."""
    return _encoded(WAIT, records)


def _encoded(layout: Layout[Any], records: list[Any]) -> bytes:
    if len(records) > MOST:
        raise ValueError(f"{len(records)} of {layout.name}; {MOST} fit")
    return HEADER.pack(TableHeader(VERSION)) + b"".join([layout.pack(one) for one in records])


def problem(name: bytes, raw: bytes) -> str | None:
    """How the value of attribute `name` contradicts itself; None for sound and for other ones."""
    if name == LOCKS:
        return _problem(raw, LOCK, decode_locks)
    if name == WAITS:
        return _problem(raw, WAIT, decode_waits)
    return None


def _problem(raw: bytes, layout: Layout[Any], decode: Callable[[bytes], list[Any]]) -> str | None:
    try:
        sound = len(decode(raw))
    except ValueError as error:
        return str(error)
    count = max(len(raw) - HEADER.size, 0) // layout.size
    return f"{count - sound} impossible {layout.name} of {count}" if sound != count else None
