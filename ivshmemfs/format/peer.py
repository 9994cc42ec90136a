"""A peer's slot: one per mount, stored to by its owner alone.

The first line is hot (state, heartbeat, intent), the identity is written once after joining, and
the open filter changes when files are opened and closed.  `shm/peers.py` says in which order.
"""

from collections.abc import Iterator
from typing import Annotated, Final, NamedTuple

from ivshmemfs.format import words
from ivshmemfs.format.record import At, Buffer, Layout
from ivshmemfs.native import crc32c

SLOT_SIZE: Final = 512
STATE_OFFSET: Final = 0
HEARTBEAT_OFFSET: Final = 8
INTENT_OFFSET: Final = 16
IDENTITY_OFFSET: Final = 64
FILTER_OFFSET: Final = 256
FILTER_WORDS: Final = 32
HOST_SIZE: Final = 64


class SlotRecord(NamedTuple):
    """One slot of the peer table; the open filter's 32 words follow at byte 256."""

    state: Annotated[int, At(0, "Q", "state word: state, incarnation, counter")]
    heartbeat: Annotated[int, At(8, "Q", "grows while the mount lives; its pace means nothing")]
    intent: Annotated[int, At(16, "Q", "inode that the owner is about to free, or 0")]
    incarnation: Annotated[int, At(64, "Q", "incarnation that the identity below speaks of")]
    pid: Annotated[int, At(72, "Q", "process id of the daemon in its pid namespace")]
    pid_start: Annotated[int, At(80, "Q", "start time of that process in ticks since boot")]
    pid_namespace: Annotated[int, At(88, "Q", "inode number of its pid namespace")]
    machine: Annotated[bytes, At(96, "16s", "hardware UUID of the machine, or zeros if unknown")]
    boot: Annotated[bytes, At(112, "16s", "boot id of the kernel that it runs under")]
    host: Annotated[bytes, At(128, "64s", "host name, zero-padded")]
    joined_ns: Annotated[int, At(192, "q", "when it joined, ns since 1970 by its own clock")]
    capabilities: Annotated[int, At(200, "Q", "what this peer can do (none defined yet)")]
    version: Annotated[bytes, At(208, "16s", "version of the program, zero-padded")]
    crc: Annotated[int, At(252, "I", "CRC32C of bytes 64 to 251")]


SLOT = Layout(SlotRecord, SLOT_SIZE)


def encode_identity(record: SlotRecord) -> bytes:
    """Bytes 64 to 255 of a slot, checksum included."""
    raw = SLOT.pack(record)[IDENTITY_OFFSET : SLOT.offset("crc")]
    return raw + crc32c(raw).to_bytes(4, "little")


def identity_valid(raw: Buffer) -> bool:
    """Whether the identity in a slot's 512 bytes is whole."""
    crc_at = SLOT.offset("crc")
    stored = int.from_bytes(raw[crc_at : crc_at + 4], "little")
    return crc32c(bytes(raw[IDENTITY_OFFSET:crc_at])) == stored


class Occupant(NamedTuple):
    """A slot that is not free, as it stands in a copy of the peer table."""

    slot: int  # from 1
    state: int
    incarnation: int
    counter: int
    record: SlotRecord
    identity_valid: bool  # whole, and of the present incarnation

    def describe(self) -> str:
        """One phrase for a message; nothing in it is taken on trust but the slot number."""
        state = words.STATE_NAMES[self.state] if self.state < len(words.STATE_NAMES) else "?"
        if not self.identity_valid:
            return f"slot {self.slot} ({state}, identity unknown)"
        host = self.record.host.rstrip(b"\0").decode(errors="backslashreplace")
        return f"slot {self.slot} ({state}, pid {self.record.pid} on {printable(host)})"


def printable(text: str) -> str:
    """`text` with control characters escaped, so that a hostile region cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def occupants(table: Buffer, count: int) -> Iterator[Occupant]:
    """All slots in use among the first `count` of a copy of the peer table."""
    view = memoryview(table)
    for index in range(count):
        raw = view[index * SLOT_SIZE : (index + 1) * SLOT_SIZE]
        record = SLOT.unpack(raw)
        state, incarnation, counter = words.split_state(record.state)
        if state != words.FREE:
            valid = identity_valid(raw) and record.incarnation == incarnation
            yield Occupant(index + 1, state, incarnation, counter, record, valid)
