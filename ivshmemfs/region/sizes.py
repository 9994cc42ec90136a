"""Sizes as people write them: 4096, 0x1000, 64K, 1M, 16GiB."""

from __future__ import annotations

import re

from ivshmemfs.errors import UsageError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_READABLE = {"E": 1 << 60, "P": 1 << 50, "T": 1 << 40, "G": 1 << 30, "M": 1 << 20, "K": 1 << 10}
_SIZE = re.compile(r"(0x[0-9a-f]+|[0-9]+)(?:([KMGT]?)(?:i?B)?)", re.IGNORECASE | re.ASCII)
MAX_SIZE = (1 << 63) - 1


def parse_number(text: str) -> int:
    """Parse a decimal or 0x-hexadecimal number; raises UsageError."""
    try:
        return int(text, 16 if text.lower().startswith("0x") else 10)
    except ValueError:
        raise UsageError(f"{text!r} is not a number; write it like 4096 or 0x1000") from None


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``1M``, at least 1; raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size; write it like 4096, 64K, 1M or 16G")
    number, unit = match.groups()
    size = parse_number(number) * _UNITS[unit.upper()]
    if not 0 < size <= MAX_SIZE:
        raise UsageError(f"{text!r} is not a possible size; write it like 4096, 64K, 1M or 16G")
    return size


def exact_size(size: int) -> str:
    """Return the shortest text that parse_size() turns back into `size`."""
    for unit in ("T", "G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def readable_size(size: int) -> str:
    """Return a rounded size for messages: 1 MiB, 1.5 GiB, 700 bytes."""
    for unit, bytes_of in _READABLE.items():
        if size >= bytes_of:
            return f"{size / bytes_of:.4g} {unit}iB"
    return f"{size} bytes"
