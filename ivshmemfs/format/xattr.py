"""Extended attributes of one inode, as one string of bytes.

Each entry is an 8-byte header, the name, then the value.  Entries follow each other without gaps,
in ascending order of their names' bytes.  The string is in the inode block if it fits there, else
in blocks of its own (`inode.InodeRecord.xattr_pointer`).
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

from ivshmemfs.format.record import At, Buffer, Layout

NAME_MAX = 255  # bytes of a name, as in Linux
VALUE_MAX = 65536  # bytes of a value, as in Linux
BLOB_MAX = 1 << 18  # bytes of all attributes of one inode; limits the memory of a reader


class XattrRecord(NamedTuple):
    """The header of one entry, before the name and the value."""

    value_size: Annotated[int, At(0, "I", "bytes of the value")]
    name_size: Annotated[int, At(4, "B", "bytes of the name, 1 to 255")]
    zero: Annotated[bytes, At(5, "3s", "zeros")]


XATTR = Layout(XattrRecord, 8)
_ZERO = bytes(3)
_HEADER, _unpack = XATTR.size, XATTR.unpack_values


def _check(name: bytes, value_size: int) -> None:
    if not 1 <= len(name) <= NAME_MAX or b"\0" in name:
        raise ValueError(f"extended attribute name {name[:40]!r} of {len(name)} bytes")
    if value_size > VALUE_MAX:
        raise ValueError(f"extended attribute {name[:40]!r} has a value of {value_size} bytes")


def encode_one(name: bytes, value: bytes) -> bytes:
    """Return one entry of the string; ValueError when it is too large."""
    _check(name, len(value))
    return XATTR.pack(XattrRecord(len(value), len(name), _ZERO)) + name + value


def encode(attributes: Mapping[bytes, bytes]) -> bytes:
    """Return the string of all `attributes`; ValueError if one, or their sum, is too large."""
    blob = b"".join([encode_one(name, bytes(attributes[name])) for name in sorted(attributes)])
    if len(blob) > BLOB_MAX:
        raise ValueError(f"extended attributes of {len(blob)} bytes; {BLOB_MAX} fit")
    return blob


def split(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (name, entry with its header) of all attributes, in order.

    Raises ValueError, with the contradiction in the bytes.
    """
    length = len(raw)
    if length > BLOB_MAX:
        raise ValueError(f"extended attributes of {length} bytes; {BLOB_MAX} fit")
    at, last = 0, b""
    while at < length:
        start = at + _HEADER
        if start > length:
            raise ValueError(f"extended attribute at byte {at} is cut off")
        value_size, name_size, zero = _unpack(raw, at)
        middle = start + name_size
        end = middle + value_size
        if end > length or zero != _ZERO:
            raise ValueError(f"extended attribute at byte {at} runs to {end} of {length}")
        name = raw[start:middle]
        if not name_size or value_size > VALUE_MAX or b"\0" in name:
            _check(name, value_size)
        if name <= last:
            raise ValueError(f"extended attributes are not in order at {name[:40]!r}")
        yield name, raw[at:end]
        at, last = end, name


def value_of(name: bytes, entry: bytes) -> bytes:
    """Return the value in an entry of that name."""
    return entry[XATTR.size + len(name) :]


def decode(raw: Buffer) -> dict[bytes, bytes]:
    """Return the attributes by name, in order.  Raises ValueError, with the contradiction."""
    return {name: value_of(name, entry) for name, entry in split(bytes(raw))}
