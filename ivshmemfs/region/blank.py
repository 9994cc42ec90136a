"""Tell whether a region holds any data, without allocating memory for it.

The search asks a file for its stored ranges (SEEK_DATA) and reads them through a descriptor.  A
load through a mapping of a tmpfs would allocate the holes.  It reads devices whole.  After
`SECONDS` it only samples: one page of each `SAMPLES`th part of the region.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from ivshmemfs.region.mapped import Region

SECONDS = 3.0  # time for reading all of a region, before the search samples
SAMPLES = 1024  # parts of a region of which the search samples one page each
PIECE = 1 << 20  # bytes of one read
PAGE = 4096
_ZEROS = bytes(PIECE)


class Found(NamedTuple):
    """What `find_data` found."""

    offset: int | None  # start of a piece with a byte that is not zero; None: all are zero
    whole: bool  # whether the search read everything


def find_data(region: Region) -> Found:
    """Search for a byte that is not zero.  Raises OSError."""
    if region.kind != "file":
        return _search(region, [(0, region.size)], None)
    descriptor = os.open(region.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _search(region, _stored(descriptor, region.size), descriptor)
    finally:
        os.close(descriptor)


def _stored(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of a file's stored ranges; all of it if the file system cannot tell."""
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: no more ranges
                yield at, size
            return
        yield start, min(at, size)


def _search(
    region: Region, parts: Iterator[tuple[int, int]] | list[tuple[int, int]], file: int | None
) -> Found:
    until, whole = time.monotonic() + SECONDS, True
    for start, stop in parts:
        at = start
        while at < stop:
            whole = whole and time.monotonic() <= until
            if whole:
                length = step = min(PIECE, stop - at)
            else:
                length = min(PAGE, stop - at)
                step = max(region.size // SAMPLES, length)
            if not _is_zero(region, at, length, file):
                return Found(at, whole)
            at += step
    return Found(None, whole)


def _is_zero(region: Region, at: int, length: int, file: int | None) -> bool:
    if file is None:
        return region.memory.is_zero(at, length)
    piece = os.pread(file, length, at)
    return piece == _ZEROS[: len(piece)]
