"""Measure what a mapping can do.

The same device may be cached, write-combining or uncached, depending on hypervisor, guest kernel
and architecture.  Compare-and-swap does not work on every mapping.  Reading shows most properties;
the others need a few bytes that only the probe uses.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from ivshmemfs.errors import RegionUnfit
from ivshmemfs.native import Memory

SMALLEST_SAMPLE = 4096  # bytes
LARGEST_SAMPLE = 256 * 1024  # bytes
BUDGET = 0.005  # seconds of samples for each direction
_PATTERN = 0x5AA5_C33C_0FF0_9669


class Scratch(NamedTuple):
    """Bytes of the region that only the caller uses; both multiples of 8, at least 8 bytes."""

    offset: int
    length: int


class Probe(NamedTuple):
    """The findings; None where the probe would have to store."""

    unaligned_ok: bool
    cas_ok: bool | None
    read_mbps: float
    write_mbps: float | None

    def describe(self) -> str:
        """Return one line with all findings."""
        parts = [f"reads {self.read_mbps:.0f} MB/s"]
        if self.write_mbps is not None:
            parts.append(f"writes {self.write_mbps:.0f} MB/s")
        if not self.unaligned_ok:
            parts.append("aligned accesses only")
        if self.cas_ok is not None:
            parts.append("compare-and-swap " + ("works" if self.cas_ok else "does not work"))
        return ", ".join(parts)


# Rates use the CPU time of this thread: on a busy machine it may wait longer than any sample takes.
# They are of all samples together: an emulated machine may count that time in whole milliseconds,
# so a single sample may take none.


def read_rate(memory: Memory, budget: float = BUDGET) -> float:
    """Return the MB/s of reading the start of the region, for `budget` seconds or a little more."""
    sample = min(SMALLEST_SAMPLE, memory.length)
    begin, read, taken = time.thread_time(), 0, 0.0
    while taken < budget:
        memory.read(0, sample)
        read += sample
        sample = min(2 * sample, LARGEST_SAMPLE, memory.length)
        taken = time.thread_time() - begin
    return read / taken / 1e6


def write_rate(memory: Memory, scratch: Scratch, budget: float = BUDGET) -> float:
    """Return the MB/s of writing to `scratch`; its contents stay the same."""
    before = memory.read(scratch.offset, scratch.length)
    begin, written, taken = time.thread_time(), 0, 0.0
    while taken < budget:
        memory.write(scratch.offset, before)
        memory.fence()
        written += scratch.length
        taken = time.thread_time() - begin
    return written / taken / 1e6


def cas_works(memory: Memory, offset: int) -> bool:
    """Return whether compare-and-swap stores exactly when it should; the word is restored."""
    try:
        before = memory.load(offset)
        other = before ^ _PATTERN
        swapped = memory.cas(offset, before, other) == before and memory.load(offset) == other
        refused = memory.cas(offset, before, 0) == other and memory.load(offset) == other
        restored = memory.cas(offset, other, before) == other and memory.load(offset) == before
    except OSError:
        return False
    return swapped and refused and restored


def probe(memory: Memory, scratch: Scratch | None = None) -> Probe:
    """Measure a mapping in some milliseconds.

    The probe stores only to `scratch`, and restores it.  Raises OSError when the region cannot be
    read.
    """
    writing = scratch is not None and memory.writable
    return Probe(
        unaligned_ok=memory.unaligned_ok(0),
        cas_ok=cas_works(memory, scratch.offset) if scratch and writing else None,
        read_mbps=read_rate(memory),
        write_mbps=(
            write_rate(memory, scratch)
            if scratch and writing and scratch.length >= SMALLEST_SAMPLE
            else None
        ),
    )


def refuse_unfit(found: Probe, spec: str) -> None:
    """Raise RegionUnfit if compare-and-swap fails: then no mount may write to the mapping."""
    if found.cas_ok is False:
        raise RegionUnfit(
            f"{spec}: compare-and-swap does not work on this mapping, so writing would destroy "
            "data; mount it with -o ro, or map it cached (resource2_wc, a kernel driver)"
        )
