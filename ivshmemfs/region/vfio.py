"""ivshmem devices that vfio-pci holds, mapped through VFIO: no root, and under lockdown too.

Two interfaces lead to the device's descriptor (Linux Documentation/driver-api/vfio.rst):

    cdev    /dev/vfio/devices/vfioN, bound to an iommufd; Linux 6.6
    group   /dev/vfio/GROUP in a container, /dev/vfio/vfio; older, and may be opened by one process

Nothing is mapped for DMA, because ivshmem does none.  The mapping keeps the device's file open, and
with it the group and the container.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ivshmemfs.errors import RegionDenied, RegionError, RegionHeld, RegionMissing, RegionSize
from ivshmemfs.native import DEVICE, WRITE_COMBINING
from ivshmemfs.region.mapped import Region, map_descriptor, open_descriptor, shown, translate
from ivshmemfs.region.pci import SHARED_BAR, normal_address
from ivshmemfs.region.roots import HERE, Roots

DRIVER: Final = "vfio-pci"
Opener = Callable[[Path], int]  # opens a node until the end of the caller

# ioctl(2) requests of linux/vfio.h: _IO(';', 100 + n)
_BASE: Final = ord(";") << 8 | 100
GET_API_VERSION: Final = _BASE + 0
CHECK_EXTENSION: Final = _BASE + 1
SET_IOMMU: Final = _BASE + 2
GROUP_GET_STATUS: Final = _BASE + 3
GROUP_SET_CONTAINER: Final = _BASE + 4
GROUP_GET_DEVICE_FD: Final = _BASE + 6
DEVICE_GET_REGION_INFO: Final = _BASE + 8
DEVICE_GET_IRQ_INFO: Final = _BASE + 9
DEVICE_SET_IRQS: Final = _BASE + 10
DEVICE_BIND_IOMMUFD: Final = _BASE + 18

API_VERSION: Final = 0
IOMMUS: Final = (3, 1, 8)  # type 1 version 2, type 1, none
VIABLE: Final = 1  # flag of a group's status: every device in it is VFIO's or unused
MAPPABLE: Final = 4  # flag of a region's information
CONFIG_REGION: Final = 7  # index of the configuration space
MSIX: Final = 2  # index of these interrupts
_SET_BY_EVENTFD: Final = 1 << 2 | 1 << 5  # flags: data is an eventfd, which interrupts trigger

# The structures that these take; the first word is the size in bytes.
_STATUS: Final = struct.Struct("=II")  # size, flags
_REGION: Final = struct.Struct("=IIIIQQ")  # size, flags, index, offset of extensions, bytes, offset
_IRQ: Final = struct.Struct("=IIII")  # size, flags, index, count
_SET_IRQS: Final = struct.Struct("=IIIIIi")  # size, flags, index, first vector, count, eventfd
_BIND: Final = struct.Struct("=IIiI")  # size, flags, iommufd, id of the device (out)


def _ask(descriptor: int, request: int, argument: bytes) -> bytes:
    """Run an ioctl that fills a structure; raises OSError."""
    buffer = bytearray(argument)
    fcntl.ioctl(descriptor, request, buffer)
    return bytes(buffer)


def region_extent(device: int, index: int) -> tuple[int, int, int]:
    """Return (bytes, offset in the device's descriptor, flags) of a region; raises OSError."""
    raw = _REGION.pack(_REGION.size, 0, index, 0, 0, 0)
    _, flags, _, _, size, offset = _REGION.unpack(_ask(device, DEVICE_GET_REGION_INFO, raw))
    return size, offset, flags


def msix_vectors(device: int) -> int:
    """Return the number of MSI-X vectors of a device; raises OSError."""
    raw = _IRQ.pack(_IRQ.size, 0, MSIX, 0)
    count: int = _IRQ.unpack(_ask(device, DEVICE_GET_IRQ_INFO, raw))[3]
    return count


def signal_msix(device: int, vector: int, eventfd: int) -> None:
    """Let an MSI-X vector signal `eventfd`, or nothing for -1; raises OSError."""
    raw = _SET_IRQS.pack(_SET_IRQS.size, _SET_BY_EVENTFD, MSIX, vector, 1, eventfd)
    _ask(device, DEVICE_SET_IRQS, raw)


def open_vfio(address: str, *, readonly: bool = False, roots: Roots = HERE) -> Region:
    """Map BAR2 of the device at `address`; raises a RegionError or UsageError."""
    address = normal_address(address)
    directory = roots.sys / "bus/pci/devices" / address
    if not directory.exists():
        raise RegionMissing(f"there is no PCI device {address}; see: ivshmemfs list")
    if (directory / "driver").resolve().name != DRIVER:
        raise RegionMissing(
            f"vfio:{address}: no VFIO driver has the device; type: "
            f"echo {DRIVER} >{shown(directory)}/driver_override; modprobe {DRIVER}; "
            f"echo {address} >{roots.sys}/bus/pci/drivers_probe"
        )
    with contextlib.ExitStack() as stack:
        device, node = _device(directory, address, roots, stack)
        try:
            size, offset, flags = region_extent(device, SHARED_BAR)
        except OSError as error:
            raise translate(error, node) from None
        if not size:
            raise RegionSize(f"vfio:{address}: has no shared memory (BAR2)")
        if not flags & MAPPABLE:
            raise RegionError(
                f"vfio:{address}: VFIO does not let its memory be mapped; use pci:{address} as root"
            )
        access = WRITE_COMBINING if roots.x86 else DEVICE
        memory, anchor = map_descriptor(
            os.dup(device), size, offset, path=node, readonly=readonly, access=access, device=True
        )
        anchor.close()  # it is a descriptor of the device, not of the node
        return Region(
            memory=memory, spec=f"vfio:{address}", path=node,
            kind=f"PCI device, {node} of {DRIVER}", device=os.dup(device), start=None,
        )  # fmt: skip


def _device(
    directory: Path, address: str, roots: Roots, stack: contextlib.ExitStack
) -> tuple[int, Path]:
    """Return a descriptor of the device, closed with `stack`, and the node that gave it."""

    def opened(path: Path) -> int:
        descriptor = open_descriptor(path, readonly=False)
        stack.callback(os.close, descriptor)
        return descriptor

    names = [path.name for path in (directory / "vfio-dev").glob("vfio*")]
    node = roots.dev / "vfio/devices" / (names[0] if names else "none")
    if names and node.exists() and (roots.dev / "iommu").exists():
        return _by_cdev(node, roots, opened), node
    node = roots.dev / "vfio" / (directory / "iommu_group").resolve().name
    if not (directory / "iommu_group").exists() or not node.exists():
        raise RegionMissing(
            f"vfio:{address}: the device is in no IOMMU group that {roots.dev}/vfio has; give the "
            "guest an IOMMU (-device intel-iommu), or use "
            f"pci:{address} as root"
        )
    return _by_group(node, address, roots, stack, opened), node


def _by_cdev(node: Path, roots: Roots, opened: Opener) -> int:
    device = opened(node)
    raw = _BIND.pack(_BIND.size, 0, opened(roots.dev / "iommu"), 0)
    try:
        _ask(device, DEVICE_BIND_IOMMUFD, raw)
    except OSError as error:
        raise _refused(error, node) from None
    return device


def _by_group(
    node: Path, address: str, roots: Roots, stack: contextlib.ExitStack, opened: Opener
) -> int:
    container = opened(roots.dev / "vfio/vfio")
    try:
        if fcntl.ioctl(container, GET_API_VERSION) != API_VERSION:
            raise RegionError(f"{shown(node)}: this kernel's VFIO has another version; use pci:")
        group = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, group)
        status = _STATUS.unpack(_ask(group, GROUP_GET_STATUS, _STATUS.pack(_STATUS.size, 0)))
        if not status[1] & VIABLE:
            raise RegionHeld(
                f"{shown(node)}: another device of this IOMMU group has another driver; bind all "
                f"of them to {DRIVER}: ls /sys/kernel/iommu_groups/{node.name}/devices"
            )
        fcntl.ioctl(group, GROUP_SET_CONTAINER, struct.pack("=i", container))
        kinds = [kind for kind in IOMMUS if fcntl.ioctl(container, CHECK_EXTENSION, kind) > 0]
        if not kinds:
            raise RegionError(f"{shown(node)}: VFIO knows no IOMMU here; modprobe vfio_iommu_type1")
        fcntl.ioctl(container, SET_IOMMU, kinds[0])
        device: int = fcntl.ioctl(group, GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
    except OSError as error:
        raise _refused(error, node) from None
    stack.callback(os.close, device)
    return device


def _refused(error: OSError, node: Path) -> RegionError:
    if error.errno == errno.EBUSY:
        return RegionHeld(
            f"{shown(node)}: another process has it open, and VFIO allows only one; end that "
            "process, or use the device as root (pci:)"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return RegionDenied(
            f"{shown(node)}: permission denied; run as root, or give this user access to it"
        )
    return translate(error, node)
