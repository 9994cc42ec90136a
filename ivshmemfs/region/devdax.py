"""Device-dax nodes, `/dev/daxX.Y`: persistent or CXL memory that is mapped as it is, cached.

sysfs tells the size, and the alignment: the kernel maps whole units of 4 KiB, 2 MiB or 1 GiB.  Any
other offset or size is EINVAL.  A device that the driver kmem holds is the kernel's own memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ivshmemfs.errors import RegionSize
from ivshmemfs.region.mapped import shown
from ivshmemfs.region.roots import HERE, Roots
from ivshmemfs.region.sizes import exact_size

DRIVER = "device_dax"


class DaxDevice(NamedTuple):
    """A device-dax node; `size` and `align` in bytes."""

    path: Path
    size: int
    align: int


def is_devdax(name: str) -> bool:
    """Return whether a node of that name is one of device-dax."""
    return name.startswith("dax")


def number_in(path: Path) -> int:
    """Return the number in a file of sysfs, 0 if there is none."""
    try:
        return int(path.read_text(encoding="ascii").strip(), 0)
    except (OSError, ValueError):
        return 0


def find_dax(roots: Roots = HERE) -> Iterator[DaxDevice]:
    """Yield the devices that may be mapped, by name."""
    try:
        directories = sorted((roots.sys / "bus/dax/devices").iterdir())
    except OSError:
        return
    for directory in directories:
        size = number_in(directory / "size")
        if size and (directory / "driver").resolve().name == DRIVER:
            path = roots.dev / directory.name
            yield DaxDevice(path, size, number_in(directory / "align"))


def refuse_unaligned(path: Path, directory: Path, offset: int, size: int) -> None:
    """Raise RegionSize unless the kernel maps that part; `directory` is the device's in sysfs."""
    align = number_in(directory / "align")
    if not align or not (offset % align or size % align):
        return
    if offset % align or size < align:
        what, use = ("offset", offset - offset % align) if offset % align else ("size", align)
    else:
        what, use = "size", size - size % align
    raise RegionSize(
        f"{shown(path)}: this device maps multiples of {exact_size(align)} only; use the "
        f"{what} {exact_size(use) if use else 0}"
    )
