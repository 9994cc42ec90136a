"""Physical memory through /dev/mem, for guests whose BAR2 no other way reaches."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from ivshmemfs.errors import (
    RegionDenied,
    RegionError,
    RegionHeld,
    RegionMissing,
    RegionSize,
    UsageError,
)
from ivshmemfs.native import DEVICE, WRITE_COMBINING, Memory
from ivshmemfs.region.driver import DriverSurvey, Holding, named_nodes, survey
from ivshmemfs.region.lockdown import locked_down
from ivshmemfs.region.mapped import Region, open_descriptor, refuse_small, translate
from ivshmemfs.region.roots import HERE, Roots
from ivshmemfs.region.sizes import exact_size, parse_size

PAGE = os.sysconf("SC_PAGE_SIZE")
_HEXADECIMAL = re.compile(r"(?:0x)?([0-9a-f]{1,16})", re.IGNORECASE | re.ASCII)
_LINE = re.compile(r"\s*([0-9a-f]+)-([0-9a-f]+) : (.*)")


def _parse_address(text: str) -> int:
    """Parse a physical address: hexadecimal, with or without 0x, as lspci prints it."""
    if re.fullmatch(r"[0-9]+", text, re.ASCII):
        raise UsageError(
            f"mem:{text}: the address may be decimal or hexadecimal; write 0x{text} for what lspci "
            f"prints, or {int(text):#x} for the decimal number"
        )
    match = _HEXADECIMAL.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not an address; write it like 0xfe000000 or fe000000")
    return int(match[1], 16)


def parse_place(text: str) -> tuple[int, int]:
    """Return (address, size) from ``ADDRESS:SIZE``; raises UsageError."""
    address_text, colon, size_text = text.partition(":")
    if not colon:
        raise UsageError(f"'mem:{text}' lacks a size; write it like mem:0xfe000000:1M")
    address, size = _parse_address(address_text), parse_size(size_text)
    if address % PAGE or address + size > 1 << 63:
        raise UsageError(f"{address_text} is not the address of a page ({PAGE} bytes)")
    return address, size


def _ram(roots: Roots) -> Iterator[tuple[int, int]]:
    """Yield [start, end] of the kernel's own memory; all zero when the kernel hides addresses."""
    try:
        lines = (roots.proc / "iomem").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        match = _LINE.fullmatch(line)
        if match and match[3] == "System RAM":
            yield int(match[1], 16), int(match[2], 16)


def _refuse_ram(address: int, size: int, roots: Roots) -> None:
    for start, end in _ram(roots):
        if end and address <= end and start < address + size:
            raise RegionError(
                f"mem:{address:#x} is memory that this kernel uses itself; give the address of "
                "the device's BAR2 (lspci -v)"
            )


def _holding(address: int, size: int, found: DriverSurvey) -> Holding | None:
    """Return the ivshmem device whose shared memory overlaps the range, or None."""
    for held in found.holdings:
        start, end = held.device.start, held.device.start + held.device.size
        if address < end and start < address + size:
            return held
    return None


def _refuse_beyond(address: int, size: int, held: Holding | None) -> None:
    """Raise RegionSize when the range exceeds the device's memory (registers, another BAR)."""
    if held is None:
        return
    start, end = held.device.start, held.device.start + held.device.size
    if address < start or address + size > end:
        raise RegionSize(
            f"mem:{address:#x}:{exact_size(size)} is more than the shared memory of "
            f"{held.device.spec}; that is mem:{start:#x}:{exact_size(end - start)}"
        )


def open_devmem(place: str, *, readonly: bool = False, roots: Roots = HERE) -> Region:
    """Map a physical range, ``ADDRESS:SIZE``; raises a RegionError or UsageError."""
    address, size = parse_place(place)
    spec = f"mem:{address:#x}:{exact_size(size)}"
    path = roots.dev / "mem"
    refuse_small(size, spec)
    _refuse_ram(address, size, roots)
    held = _holding(address, size, survey(roots))
    _refuse_beyond(address, size, held)
    try:
        descriptor = open_descriptor(path, readonly=readonly, extra_flags=os.O_SYNC)
    except RegionMissing:
        raise RegionMissing(
            f"{spec}: this kernel has no /dev/mem; use pci or a character device instead"
        ) from None
    except RegionDenied:
        if os.geteuid() != 0:
            raise
        raise locked_down(spec, roots) from None
    access = WRITE_COMBINING if roots.x86 else DEVICE
    try:
        memory = Memory(descriptor, size, address, writable=not readonly, access=access)
    except OSError as error:
        raise _cannot_map(error, spec, held) from None
    finally:
        os.close(descriptor)
    return Region(memory=memory, spec=spec, path=path, kind="physical memory", start=address)


def _cannot_map(error: OSError, spec: str, held: Holding | None) -> RegionError:
    if error.errno in (errno.EPERM, errno.EACCES):
        if held is not None and held.driver:
            return RegionHeld(
                f"{spec}: driver {held.driver} holds {held.device.spec}, and this kernel lets "
                f"only the driver map it; use {named_nodes(held)}"
            )
        return RegionDenied(
            f"{spec}: this kernel keeps the range from /dev/mem (strict devmem, or a driver has "
            "it); use pci or that driver's character device instead"
        )
    if error.errno in (errno.EINVAL, errno.ENXIO, errno.EFAULT):
        return RegionSize(f"{spec}: there is no such physical range; check address and size")
    return translate(error, spec)
