"""Character devices whose mmap gives the shared memory: uio, kvmfr, device-dax, any driver.

Each driver tells its size in another way, or not at all; then the user gives it, as PATH:SIZE or
PATH:OFFSET:SIZE.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import NamedTuple

from ivshmemfs.errors import RegionError, RegionSize
from ivshmemfs.native import DEVICE, NORMAL, WRITE_COMBINING
from ivshmemfs.region.mapped import Region, look_at, map_descriptor, open_descriptor, shown
from ivshmemfs.region.pci import bar_size
from ivshmemfs.region.roots import HERE, Roots
from ivshmemfs.region.sizes import exact_size

PAGE = os.sysconf("SC_PAGE_SIZE")
KVMFR_GETSIZE = 0x7544  # _IO('u', 0x44); answers with the size


class Extent(NamedTuple):
    """The part of a device to map: bytes."""

    offset: int
    size: int


def sysfs_directory(number: int, roots: Roots = HERE) -> Path:
    """Where sysfs describes the character device with this device number."""
    return roots.sys / f"dev/char/{os.major(number)}:{os.minor(number)}"


def _value(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii").strip(), 0)
    except (OSError, ValueError):
        return 0


def uio_extent(directory: Path) -> Extent | None:
    """The largest map of a uio device: shared memory is larger than a set of registers."""
    best: Extent | None = None
    for entry in (directory / "maps").glob("map*"):
        if not entry.name[3:].isdecimal():
            continue
        size = _value(entry / "size") - _value(entry / "offset")
        if size > 0 and (best is None or size > best.size):
            best = Extent(int(entry.name[3:]) * PAGE, size)
    return best


def described_extent(directory: Path) -> Extent | None:
    """What sysfs tells without opening the device: uio maps, a size, or its PCI device's BAR2."""
    if extent := uio_extent(directory):
        return extent
    size = _value(directory / "size") or bar_size(directory / "device")
    return Extent(0, size) if size else None


def _asked_size(descriptor: int, name: str) -> int:
    """What the device itself answers, 0 if nothing."""
    if name.startswith("kvmfr"):
        try:
            return fcntl.ioctl(descriptor, KVMFR_GETSIZE) & 0xFFFFFFFF
        except OSError:
            return 0
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    except OSError:
        return 0


def _find_extent(descriptor: int, path: Path, directory: Path) -> Extent:
    extent = described_extent(directory)
    if extent is None and (size := _asked_size(descriptor, path.name)):
        extent = Extent(0, size)
    if extent is None:
        raise RegionSize(
            f"{shown(path)}: does not tell its size; give it as {shown(path)}:SIZE, "
            f"for example {shown(path)}:1M"
        )
    return extent


def _access(name: str, roots: Roots) -> int:
    """Device-dax is ordinary cached memory; what another driver maps is taken for the worst."""
    if name.startswith("dax"):
        return NORMAL
    return WRITE_COMBINING if roots.x86 else DEVICE


def _narrowed(found: Extent | None, given: int, path: Path) -> Extent:
    if found is not None and given > found.size:
        raise RegionSize(
            f"{shown(path)}: has only {exact_size(found.size)}, not {exact_size(given)}; "
            "leave out the size"
        )
    return Extent(found.offset if found else 0, given)


def is_character_device(mode: int) -> bool:
    """As stat.S_ISCHR, by a name that tests can replace."""
    return stat.S_ISCHR(mode)


def open_chardev(
    path: Path,
    *,
    offset: int | None = None,
    size: int | None = None,
    readonly: bool = False,
    roots: Roots = HERE,
) -> Region:
    """Map a character device; raises a RegionError.

    Without `size` the device or sysfs must tell it; without `offset` it is where the driver puts
    its (largest) memory.
    """
    status = look_at(path)
    if not is_character_device(status.st_mode):
        raise RegionError(f"{shown(path)}: is not a character device; leave out offset and size")
    directory = sysfs_directory(status.st_rdev, roots)
    descriptor = open_descriptor(path, readonly=readonly)
    try:
        if size is None:
            extent = _find_extent(descriptor, path, directory)
        elif offset is None:
            extent = _narrowed(described_extent(directory), size, path)
        else:
            extent = Extent(offset, size)
    except RegionError:
        os.close(descriptor)
        raise
    whole = path.absolute()
    memory = map_descriptor(
        descriptor,
        extent.size,
        extent.offset,
        path=whole,
        readonly=readonly,
        access=_access(path.name, roots),
    )
    return Region(memory=memory, spec=_spec(whole, offset, size), path=whole, kind="device")


def _spec(path: Path, offset: int | None, size: int | None) -> str:
    parts = [str(path)]
    if offset is not None:
        parts.append(hex(offset))
    if size is not None:
        parts.append(exact_size(size))
    return ":".join(parts)
