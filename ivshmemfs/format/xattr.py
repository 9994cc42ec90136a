"""Extended attributes of one inode, as one string of bytes.

Each entry is an 8-byte header, the name, then the value; entries follow each other without gaps,
in ascending order of their names' bytes.  The string stands in the inode block when it fits
there, else in blocks of its own (`inode.InodeRecord.xattr_pointer`).
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

from ivshmemfs.format.record import At, Buffer, Layout

NAME_MAX = 255  # bytes of a name, as in Linux
VALUE_MAX = 65536  # bytes of a value, as in Linux
BLOB_MAX = 1 << 18  # bytes of all attributes of one inode together; bounds what a reader allocates


class XattrRecord(NamedTuple):
    """What stands before the name and the value of one extended attribute."""

    value_size: Annotated[int, At(0, "I", "bytes of the value")]
    name_size: Annotated[int, At(4, "B", "bytes of the name, 1 to 255")]
    zero: Annotated[bytes, At(5, "3s", "zeros")]


XATTR = Layout(XattrRecord, 8)
_ZERO = bytes(3)


def _check(name: bytes, value_size: int) -> None:
    if not 1 <= len(name) <= NAME_MAX or b"\0" in name:
        raise ValueError(f"extended attribute name {name[:40]!r} of {len(name)} bytes")
    if value_size > VALUE_MAX:
        raise ValueError(f"extended attribute {name[:40]!r} has a value of {value_size} bytes")


def encode(attributes: Mapping[bytes, bytes]) -> bytes:
    """The string of all `attributes`; ValueError when one of them, or their sum, is too large."""
    parts: list[bytes] = []
    for name in sorted(attributes):
        value = attributes[name]
        _check(name, len(value))
        parts += (XATTR.pack(XattrRecord(len(value), len(name), _ZERO)), name, bytes(value))
    blob = b"".join(parts)
    if len(blob) > BLOB_MAX:
        raise ValueError(f"extended attributes of {len(blob)} bytes; {BLOB_MAX} fit")
    return blob


def _entries(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(raw):
        start = at + XATTR.size
        if start > len(raw):
            raise ValueError(f"extended attribute at byte {at} is cut off")
        record = XATTR.unpack(raw, at)
        middle = start + record.name_size
        end = middle + record.value_size
        if end > len(raw) or record.zero != _ZERO:
            raise ValueError(f"extended attribute at byte {at} runs to {end} of {len(raw)}")
        name = raw[start:middle]
        _check(name, record.value_size)
        yield name, raw[middle:end]
        at = end


def decode(raw: Buffer) -> dict[bytes, bytes]:
    """Attributes by name, in order; ValueError says how the bytes contradict themselves."""
    if len(raw) > BLOB_MAX:
        raise ValueError(f"extended attributes of {len(raw)} bytes; {BLOB_MAX} fit")
    attributes: dict[bytes, bytes] = {}
    last = b""
    for name, value in _entries(bytes(raw)):
        if name <= last:
            raise ValueError(f"extended attributes are not in order at {name[:40]!r}")
        attributes[name] = value
        last = name
    return attributes
