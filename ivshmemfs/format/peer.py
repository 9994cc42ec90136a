"""A peer's slot: one for each mount.

The first cache line is hot: state, heartbeat, intent, nonce.  The owner writes its identity after
it joins, and changes the open filter (`open_filter`) when it opens and closes files.  At each sign
of life it stores its statistics and its mount point; nothing but `peers` and `top` reads them.
`shm/peers.py` gives the order of all stores.
"""

from collections.abc import Iterator
from typing import Annotated, Final, NamedTuple

from ivshmemfs.format import coherence, words
from ivshmemfs.format.record import At, Buffer, Layout
from ivshmemfs.native import crc32c
from ivshmemfs.printing import shown

SLOT_SIZE: Final = 1024
STATE_OFFSET: Final = 0
HEARTBEAT_OFFSET: Final = 8
INTENT_OFFSET: Final = 16
NONCE_OFFSET: Final = 24
IDENTITY_OFFSET: Final = 64
FILTER_OFFSET: Final = 256
HOST_SIZE: Final = 64
STATISTICS_OFFSET: Final = 512
STATISTICS_SIZE: Final = 48
MOUNT_POINT_OFFSET: Final = 768
MOUNT_POINT_SIZE: Final = 256

# The parts of an identity that may prove that its owner is gone (`shm/identity.py` says how).
BOOT_PROVES: Final = 1  # boot id, pid and pid namespace: the boot id is the kernel's own
MACHINE_PROVES: Final = 2  # the hardware UUID: no container's, and not known to be on two machines
START_PROVES: Final = 4  # the start time: read from a /proc of its own pid namespace
ALL_PROOFS: Final = BOOT_PROVES | MACHINE_PROVES | START_PROVES

TWIN_MARK: Final = (1 << 64) - 1  # nonce of a slot that has two owners


class SlotRecord(NamedTuple):
    """One slot of the peer table, without the open filter's 32 words at byte 256."""

    state: Annotated[int, At(0, "Q", "state word: state, incarnation, counter")]
    heartbeat: Annotated[int, At(8, "Q", "grows while the mount lives; its pace means nothing")]
    intent: Annotated[int, At(16, "Q", "inode that the owner is about to free, or 0")]
    nonce: Annotated[int, At(24, "Q", "random; its owner changes it at every sign of life")]
    incarnation: Annotated[int, At(64, "Q", "incarnation that the identity below speaks of")]
    pid: Annotated[int, At(72, "Q", "process id of the daemon in its pid namespace")]
    pid_start: Annotated[int, At(80, "Q", "start time of that process in ticks since boot")]
    pid_namespace: Annotated[int, At(88, "Q", "inode number of its pid namespace")]
    machine: Annotated[bytes, At(96, "16s", "hardware UUID of the machine, or zeros if unknown")]
    boot: Annotated[bytes, At(112, "16s", "boot id of the kernel that it runs under")]
    host: Annotated[bytes, At(128, "64s", "host name, zero-padded")]
    joined_ns: Annotated[int, At(192, "q", "when it joined, ns since 1970 by its own clock")]
    capabilities: Annotated[
        int, At(200, "Q", "1 changes only the superblock, 2 answers challenges, 4 rings")
    ]
    version: Annotated[bytes, At(208, "16s", "version of the program, zero-padded")]
    time_namespace: Annotated[int, At(224, "Q", "inode number of its time namespace, or 0")]
    proofs: Annotated[int, At(232, "Q", "what proves its end: 1 boot, 2 machine, 4 start time")]
    crc: Annotated[int, At(252, "I", "CRC32C of bytes 64 to 251")]
    # The open filter's 32 words are at 256.  From here on nothing is checked: it only informs.
    operations: Annotated[int, At(512, "Q", "looks and changes of this incarnation's owner")]
    bytes_read: Annotated[int, At(520, "Q", "bytes of files that it has read")]
    bytes_written: Annotated[int, At(528, "Q", "bytes of files that it has written")]
    retries: Annotated[int, At(536, "Q", "commits that it lost to another peer and planned again")]
    locks: Annotated[int, At(544, "Q", "locks that its programs hold now")]
    open_files: Annotated[int, At(552, "Q", "inodes that it holds open now")]
    mount_point: Annotated[bytes, At(768, "256s", "where it is mounted, zero-padded; or zeros")]


SLOT = Layout(SlotRecord, SLOT_SIZE)


def encode_identity(record: SlotRecord) -> bytes:
    """Return bytes 64 to 255 of a slot, checksum included."""
    raw = SLOT.pack(record)[IDENTITY_OFFSET : SLOT.offset("crc")]
    return raw + crc32c(raw).to_bytes(4, "little")


def identity_valid(raw: Buffer) -> bool:
    """Return whether the identity in a slot's bytes has the right checksum."""
    crc_at = SLOT.offset("crc")
    stored = int.from_bytes(raw[crc_at : crc_at + 4], "little")
    return crc32c(bytes(raw[IDENTITY_OFFSET:crc_at])) == stored


class Occupant(NamedTuple):
    """The contents of one slot, from a copy of it."""

    slot: int  # from 1
    state: int
    incarnation: int
    counter: int
    record: SlotRecord
    identity_valid: bool  # whole, and of the present incarnation
    coherence: str  # what the owner found: unknown, agrees, or differs from a slot

    @property
    def word(self) -> int:
        """The state word."""
        return self.record.state

    @property
    def version(self) -> str:
        """The version of the program that the owner states; "" without a valid identity."""
        if not self.identity_valid:
            return ""
        return shown(self.record.version.rstrip(b"\0"))

    @property
    def mount_point(self) -> str:
        """Where the owner says it is mounted; "" if nowhere, or without a valid identity."""
        if not self.identity_valid:
            return ""
        return shown(self.record.mount_point.rstrip(b"\0"))

    def describe(self) -> str:
        """Return one phrase for a message.  The slot's contents may be hostile."""
        state = words.STATE_NAMES[self.state] if self.state < len(words.STATE_NAMES) else "?"
        if not self.identity_valid:
            return f"slot {self.slot} ({state}, identity unknown)"
        host = shown(self.record.host.rstrip(b"\0"))
        return f"slot {self.slot} ({state}, pid {self.record.pid} on {host})"


def occupant(slot: int, raw: Buffer) -> Occupant:
    """Return the contents of `slot` (from 1), given its 1024 bytes."""
    record = SLOT.unpack(raw)
    state, incarnation, counter = words.split_state(record.state)
    valid = identity_valid(raw) and record.incarnation == incarnation
    checks = valid and record.capabilities & coherence.CHECKS
    found = coherence.describe(raw) if checks else "unknown"
    return Occupant(slot, state, incarnation, counter, record, valid, found)


def occupants(table: Buffer, count: int) -> Iterator[Occupant]:
    """Yield the slots in use among the first `count` of a copy of the peer table."""
    view = memoryview(table)
    for index in range(count):
        found = occupant(index + 1, view[index * SLOT_SIZE : (index + 1) * SLOT_SIZE])
        if found.state != words.FREE:
            yield found
