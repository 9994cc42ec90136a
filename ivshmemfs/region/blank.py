"""Whether there is anything on a region, without giving memory to what has none yet.

A file is asked for what it has stored (SEEK_DATA) and read through a descriptor, because looking
at a hole through a mapping of a tmpfs would allocate it.  Devices are read whole.  After `SECONDS`
only samples are looked at: one page of each `SAMPLES`th part of the region.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from ivshmemfs.region.mapped import Region

SECONDS = 3.0  # for reading all of a region
SAMPLES = 1024
PIECE = 1 << 20  # bytes looked at at once
PAGE = 4096
_ZEROS = bytes(PIECE)


class Found(NamedTuple):
    """What `find_data` found."""

    offset: int | None  # a byte that is not zero is in the piece that starts there; None: none is
    whole: bool  # everything was looked at


def find_data(region: Region) -> Found:
    """Look for anything but zeros.  Raises OSError."""
    if region.kind != "file":
        return _search(region, [(0, region.size)], None)
    descriptor = os.open(region.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _search(region, _stored(descriptor, region.size), descriptor)
    finally:
        os.close(descriptor)


def _stored(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of what a file has stored; all of it where the file system cannot tell."""
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # which means: no more
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
