"""Character devices whose mmap gives the shared memory: uio, kvmfr, device-dax, any driver.

If the driver of an ivshmem device made the node, the size is that of the device's BAR2.  Other
drivers each tell the size in another way, or not at all.  Then the user gives it, as PATH:SIZE or
PATH:OFFSET:SIZE.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import NamedTuple

from ivshmemfs.errors import RegionError, RegionSize
from ivshmemfs.native import DEVICE, NORMAL, WRITE_COMBINING
from ivshmemfs.region.devdax import is_devdax, number_in, refuse_unaligned
from ivshmemfs.region.driver import DriverSurvey, shared_map, survey, sysfs_directory, uio_maps
from ivshmemfs.region.mapped import Region, look_at, map_descriptor, open_descriptor, shown
from ivshmemfs.region.roots import HERE, Roots
from ivshmemfs.region.sizes import exact_size

PAGE = os.sysconf("SC_PAGE_SIZE")
KVMFR_GETSIZE = 0x7544  # _IO('u', 0x44); answers with the size, as a C int


class Extent(NamedTuple):
    """The part of a device to map, in bytes."""

    offset: int
    size: int


def _uio_extent(path: Path, directory: Path, found: DriverSurvey) -> Extent | None:
    """Return the uio map that is shared memory; raises RegionError if all maps are registers.

    An ivshmem device has registers besides its memory; another PCI device may have registers only.
    For a device that is not on the PCI bus this is the largest map.
    """
    parent = (directory / "device").resolve()
    held = found.at(parent.name)
    if held is not None:
        shared = shared_map(directory, held.device)
        if shared is None:
            raise RegionError(
                f"{shown(path)}: gives registers, not the shared memory (BAR2) of its device; use "
                f"{held.device.spec}, or another driver"
            )
        return Extent(shared[0] * PAGE, shared[1])
    if (parent / "vendor").exists():
        raise RegionError(
            f"{shown(path)}: belongs to PCI device {parent.name}, which is not an ivshmem device; "
            f"if it is shared memory all the same, name its place: {shown(path)}:OFFSET:SIZE"
        )
    largest = max(uio_maps(directory), key=lambda one: one[2], default=(0, 0, 0))
    return Extent(largest[0] * PAGE, largest[2]) if largest[2] > 0 else None


def _known_extent(path: Path, number: str, roots: Roots) -> Extent | None:
    """Return the extent that sysfs tells: of a uio map, of the PCI device's BAR2, or a size."""
    directory, found = sysfs_directory(number, roots), survey(roots)
    if (directory / "maps").is_dir():
        return _uio_extent(path, directory, found)
    sizes = {device.size for device in found.behind(number)}
    size = sizes.pop() if len(sizes) == 1 else number_in(directory / "size")
    return Extent(0, size) if size else None


def _asked_size(descriptor: int, name: str) -> int:
    """Return the size that the device itself answers; 0 if it does not answer."""
    if name.startswith("kvmfr"):
        try:
            # The driver answers 0 for 4 GiB, and a negative number (an OSError) for 2 GiB.
            return max(0, fcntl.ioctl(descriptor, KVMFR_GETSIZE))
        except OSError:
            return 0
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    except OSError:
        return 0


def _find_extent(descriptor: int, path: Path, number: str, roots: Roots) -> Extent:
    extent = _known_extent(path, number, roots)
    if extent is None and (size := _asked_size(descriptor, path.name)):
        extent = Extent(0, size)
    if extent is None:
        raise RegionSize(
            f"{shown(path)}: does not tell its size; give it as {shown(path)}:SIZE, "
            f"for example {shown(path)}:1M"
        )
    return extent


def _access(name: str, roots: Roots) -> int:
    """Return the kind of access: device-dax is cached memory; assume the worst of other drivers."""
    if is_devdax(name):
        return NORMAL
    return WRITE_COMBINING if roots.x86 else DEVICE


def _narrowed(found: Extent | None, given: int, path: Path) -> Extent:
    if found is not None and given > found.size:
        raise RegionSize(
            f"{shown(path)}: has only {exact_size(found.size)}, not {exact_size(given)}; "
            "leave out the size"
        )
    return Extent(found.offset if found else 0, given)


def open_chardev(
    path: Path,
    *,
    offset: int | None = None,
    size: int | None = None,
    readonly: bool = False,
    roots: Roots = HERE,
) -> Region:
    """Map a character device; raises a RegionError.

    `size` defaults to the size that sysfs or the device tells.  `offset` defaults to the place
    where the driver puts the shared memory.
    """
    look_at(path)
    number = roots.device_number(path)
    if number is None:
        raise RegionError(f"{shown(path)}: is not a character device; leave out offset and size")
    descriptor = open_descriptor(path, readonly=readonly)
    try:
        if size is None:
            extent = _find_extent(descriptor, path, number, roots)
        elif offset is None:
            extent = _narrowed(_known_extent(path, number, roots), size, path)
        else:
            extent = Extent(offset, size)
        if is_devdax(path.name):
            refuse_unaligned(path, sysfs_directory(number, roots), *extent)
    except RegionError:
        os.close(descriptor)
        raise
    whole = path.absolute()
    memory, anchor = map_descriptor(
        descriptor,
        extent.size,
        extent.offset,
        path=whole,
        readonly=readonly,
        access=_access(path.name, roots),
    )
    spec = _spec(whole, offset, size)
    kind = "device-dax" if is_devdax(path.name) else "device"
    return Region(
        memory=memory, spec=spec, path=whole, kind=kind, anchor=anchor, start=extent.offset
    )


def _spec(path: Path, offset: int | None, size: int | None) -> str:
    parts = [str(path)]
    if offset is not None:
        parts.append(hex(offset))
    if size is not None:
        parts.append(exact_size(size))
    return ":".join(parts)
