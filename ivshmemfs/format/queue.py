"""A queue of records in a fixed file: its header, its cells, its buffers.

    0      header
    512    cells: one word for each place of a record
    ...    tags: one word for each buffer, as the region's block tags
    ...    buffers: a word with the length of the record, then the record

The place of record number n is cell n mod `cells`; its *lap* is n div `cells`.  A cell is 64 bits:

    63     1: FULL, the record of this lap is in a buffer
    24-62  lap
    0-23   number of the buffer; 0 while the cell is empty

A new queue is all zeros behind its header: cell n is EMPTY and waits for lap 0.
"""

from typing import Annotated, Final, NamedTuple

from ivshmemfs.format.record import At, Buffer, Layout
from ivshmemfs.format.words import WORD

MAGIC: Final = b"IVSHMQ\0\1"
WORK: Final = 0
BROADCAST: Final = 1
CELLS_OFFSET: Final = 512
TAIL_OFFSET: Final = 128
HEAD_OFFSET: Final = 256
MAX_CELLS: Final = 1 << 20
MAX_RECORD: Final = 64 << 20  # bytes
#: Buffers beside those in the cells, for claims under way and for what deaths leave claimed.  They
#: are fewer if so many take more than SPARE_BYTES, but at least 4.
SPARE: Final = 32
SPARE_BYTES: Final = 1 << 20
LINE: Final = 64  # bytes; tags and buffers begin at a cache line

_BUFFER_BITS: Final = 24
BUFFER_MASK: Final = (1 << _BUFFER_BITS) - 1
LAP_MASK: Final = (1 << 39) - 1
FULL: Final = 1 << 63


class QueueRecord(NamedTuple):
    """The header of a queue.  Only `tail` and `head` change."""

    magic: Annotated[bytes, At(0, "8s", "names the format")]
    kind: Annotated[int, At(8, "I", "0 work: one reader takes a record; 1 broadcast: all see it")]
    record: Annotated[int, At(12, "I", "most bytes of a record")]
    cells: Annotated[int, At(16, "I", "records that it holds")]
    buffers: Annotated[int, At(20, "I", "buffers")]
    tail: Annotated[int, At(TAIL_OFFSET, "Q", "number of the next record, or of one before it")]
    head: Annotated[int, At(HEAD_OFFSET, "Q", "work: next record to take, or one before it")]


QUEUE: Final = Layout(QueueRecord, CELLS_OFFSET)


class QueueGeometry(NamedTuple):
    """Where things are in a queue; bytes from the start of its file."""

    kind: int
    record: int  # most bytes of a record
    cells: int
    buffers: int

    @property
    def tags_offset(self) -> int:
        """Where the tags begin."""
        return _line(CELLS_OFFSET + self.cells * WORD)

    @property
    def data_offset(self) -> int:
        """Where the buffers begin."""
        return _line(self.tags_offset + self.buffers * WORD)

    @property
    def stride(self) -> int:
        """Bytes of a buffer."""
        return _line(WORD + self.record)

    @property
    def size(self) -> int:
        """Bytes of the whole queue."""
        return self.data_offset + self.buffers * self.stride

    def problem(self, available: int) -> str | None:
        """Return what is impossible about it in a file of `available` bytes, or None.

        The numbers may come from a hostile region.
        """
        if self.kind not in (WORK, BROADCAST):
            return f"it is of kind {self.kind}"
        if not 1 <= self.record <= MAX_RECORD:
            return f"a record has at most {self.record} bytes"
        if not 1 <= self.cells <= MAX_CELLS or not self.cells < self.buffers <= 2 * MAX_CELLS:
            return f"it has {self.cells} cells and {self.buffers} buffers"
        if self.size > available:
            return f"it needs {self.size} bytes, and the file has {available}"
        return None


def _line(value: int) -> int:
    return -(-value // LINE) * LINE


def plan(kind: int, record: int, cells: int) -> QueueGeometry:
    """Return the geometry of a new queue; ValueError says what is wrong."""
    if not 1 <= record <= MAX_RECORD:
        raise ValueError(f"a record has 1 to {MAX_RECORD} bytes at most, not {record}")
    if not 1 <= cells <= MAX_CELLS:
        raise ValueError(f"a queue holds 1 to {MAX_CELLS} records, not {cells}")
    spare = max(min(SPARE, SPARE_BYTES // _line(WORD + record)), 4)
    return QueueGeometry(kind, record, cells, cells + spare)


def encode(geometry: QueueGeometry) -> bytes:
    """Return the first bytes of a new queue; zeros follow."""
    return QUEUE.pack(QueueRecord(MAGIC, *geometry, 0, 0))


def decode(raw: Buffer, available: int) -> QueueGeometry:
    """Return the geometry of a queue; ValueError says why it is none."""
    header = QUEUE.unpack(raw)
    if header.magic != MAGIC:
        raise ValueError("it is no queue")
    geometry = QueueGeometry(header.kind, header.record, header.cells, header.buffers)
    if problem := geometry.problem(available):
        raise ValueError(f"its header is damaged: {problem}")
    return geometry


def empty(lap: int) -> int:
    """Return the cell that waits for the record of a lap."""
    return (lap & LAP_MASK) << _BUFFER_BITS


def full(lap: int, buffer: int) -> int:
    """Return the cell that has the record of a lap in a buffer."""
    return FULL | (lap & LAP_MASK) << _BUFFER_BITS | buffer


def laps_ahead(cell: int, lap: int) -> int:
    """Return by how many laps a cell is ahead of `lap`; negative when it is behind."""
    ahead = ((cell >> _BUFFER_BITS) - lap) & LAP_MASK
    return ahead if ahead <= LAP_MASK >> 1 else ahead - LAP_MASK - 1
