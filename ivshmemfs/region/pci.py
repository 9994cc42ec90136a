"""ivshmem devices on the PCI bus of a guest, mapped through sysfs.

The shared memory is BAR2.  It is RAM of the host, so the kernel's usual uncached mapping
(`resource2`) is slow without a benefit; `resource2_wc` asks for write-combining instead.  On ARM64
`resource2` is device memory, which faults on unaligned accesses, and `resource2_wc` is normal
memory.  A hypervisor may change either, so the probe measures the result.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ivshmemfs.errors import (
    RegionDenied,
    RegionError,
    RegionHeld,
    RegionMissing,
    RegionSize,
    UsageError,
)
from ivshmemfs.native import DEVICE, WRITE_COMBINING
from ivshmemfs.region.lockdown import locked_down
from ivshmemfs.region.mapped import (
    Region,
    map_descriptor,
    open_descriptor,
    refuse_small,
    shown,
    translate,
)
from ivshmemfs.region.roots import HERE, Roots

VENDOR = 0x1AF4
DEVICE_ID = 0x1110
SHARED_BAR = 2
PLAIN, COMBINING = f"resource{SHARED_BAR}", f"resource{SHARED_BAR}_wc"
UNSET = 0x20000000  # IORESOURCE_UNSET: the kernel found no address for the BAR
CONFIG_BAR = 0x10 + 4 * SHARED_BAR  # offset of the BAR's register in the configuration space
BRIDGE = 0x0604  # class and subclass of a bridge between two PCI buses
_ADDRESS = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE | re.ASCII
)


@dataclass(frozen=True)
class PciDevice:
    """An ivshmem device; `start` and `size` place its shared memory, both 0 without an address."""

    address: str
    directory: Path
    start: int
    size: int

    @property
    def spec(self) -> str:
        """Canonical text that opens it."""
        return f"pci:{self.address}"


def normal_address(text: str) -> str:
    """``00:04.0`` or ``0000:00:04.0`` in the form sysfs uses; raises UsageError."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a PCI address; write it like pci:0000:00:04.0")
    domain, bus, slot, function = match.groups()
    return f"{domain or '0000'}:{bus}:{slot}.{function}".lower()


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii").strip(), 16)
    except (OSError, ValueError):
        return None


def bar_extent(directory: Path, bar: int = SHARED_BAR) -> tuple[int, int]:
    """Return (physical address, bytes) of a PCI device's BAR; (0, 0) if it has no address."""
    try:
        line = (directory / "resource").read_text(encoding="ascii").splitlines()[bar]
        start, end, flags = (int(word, 16) for word in line.split())
    except (OSError, ValueError, IndexError):
        return 0, 0
    if start == 0 or end <= start or flags & UNSET:
        return 0, 0
    return start, end - start + 1


def is_ivshmem(directory: Path) -> bool:
    """Return whether a device directory of sysfs is an ivshmem device."""
    return _number(directory / "vendor") == VENDOR and _number(directory / "device") == DEVICE_ID


def find_devices(roots: Roots = HERE) -> Iterator[PciDevice]:
    """Yield all ivshmem devices, by address."""
    bus = roots.sys / "bus/pci/devices"
    try:
        directories = sorted(bus.iterdir())
    except OSError:
        return
    for directory in directories:
        if is_ivshmem(directory):
            yield PciDevice(directory.name, directory, *bar_extent(directory))


def no_device(roots: Roots = HERE) -> RegionMissing:
    """Return the error for a machine without ivshmem devices."""
    if not roots.has_sysfs:
        return RegionMissing(
            f"no ivshmem device is known: sysfs is not mounted on {roots.sys}; mount it, or name "
            "a driver's character device, or mem:ADDRESS:SIZE"
        )
    return RegionMissing(
        "no ivshmem device (PCI 1af4:1110) here; in a guest, give QEMU one (see README); on "
        "the host, name the file in /dev/shm"
    )


def _refuse_missing(directory: Path, address: str) -> None:
    if not directory.exists():
        raise RegionMissing(f"there is no PCI device {address}; see: ivshmemfs list")
    if not is_ivshmem(directory):
        raise RegionError(
            f"PCI device {address} is not an ivshmem device (1af4:1110); see: ivshmemfs list"
        )


def _enable(directory: Path, address: str) -> None:
    """Switch on memory decoding, as a driver would; without it every load gives ones."""
    switch = directory / "enable"
    try:
        if switch.read_text(encoding="ascii").strip() == "0":
            switch.write_text("1", encoding="ascii")
    except FileNotFoundError:
        return
    except PermissionError:
        raise RegionDenied(
            f"PCI device {address} is switched off and only root may enable it; run as root"
        ) from None
    except OSError as error:
        if error.errno == errno.EROFS:
            raise RegionDenied(
                f"PCI device {address} is switched off and /sys is read-only here; enable it "
                f"outside of this container: echo 1 >{shown(switch)}"
            ) from None
        raise translate(error, switch) from None


def _has_no_address(directory: Path, address: str) -> RegionSize:
    """Return the error for a device without a BAR2 in sysfs."""
    try:
        register = (directory / "config").read_bytes()[CONFIG_BAR : CONFIG_BAR + 4]
    except OSError:
        register = b""
    if not any(register):  # an existing BAR has its kind there, also without an address
        return RegionSize(
            f"PCI device {address} has no shared memory (BAR2); start QEMU with ivshmem-plain "
            "and a memory backend with share=on"
        )
    above = directory.resolve().parent
    if (_number(above / "class") or 0) >> 8 == BRIDGE:
        return RegionSize(
            f"the shared memory (BAR2) of PCI device {address} got no address: the port above it, "
            f"{above.name}, has too little room; in QEMU, give that port "
            "pref64-reserve=SIZE with at least the size of the memory"
        )
    return RegionSize(
        f"the shared memory (BAR2) of PCI device {address} got no address: no room on its bus; "
        "restart the guest with the device in place"
    )


def _shared_memory(directory: Path, address: str) -> int:
    """Switch the device's shared memory on; return its size in bytes.  Raises a RegionError."""
    _refuse_missing(directory, address)
    _start, size = bar_extent(directory)
    if size == 0:
        raise _has_no_address(directory, address)
    _enable(directory, address)
    return size


def _map(path: Path, size: int, *, readonly: bool, access: int, spec: str, roots: Roots) -> Region:
    refuse_small(size, spec)
    descriptor = open_descriptor(path, readonly=readonly)
    available = os.fstat(descriptor).st_size
    if available < size:
        os.close(descriptor)
        raise RegionSize(
            f"{shown(path)}: has {available} bytes where the device claims {size}; restart the "
            "guest if the device was replugged"
        )
    try:
        memory, anchor = map_descriptor(
            descriptor, size, 0, path=path, readonly=readonly, access=access, device=True
        )
    except RegionSize:  # EINVAL, although the size is right: CONFIG_IO_STRICT_DEVMEM
        raise RegionHeld(
            f"{spec}: a driver holds the device, and this kernel lets only the driver map it; use "
            "that driver's character device"
        ) from None
    except RegionDenied:  # EPERM, although opening was allowed
        raise locked_down(spec, roots) from None
    kind = f"PCI device, {path.name}"
    return Region(memory=memory, spec=spec, path=path, kind=kind, anchor=anchor)


def open_pci(address: str, *, readonly: bool = False, roots: Roots = HERE) -> Region:
    """Map the shared memory of the device at `address`; raises a RegionError or UsageError."""
    address = normal_address(address)
    directory = roots.sys / "bus/pci/devices" / address
    if not roots.has_sysfs:
        raise no_device(roots)
    size = _shared_memory(directory, address)
    spec = f"pci:{address}"
    combining = directory / COMBINING
    if combining.exists():
        try:
            return _map(
                combining, size, readonly=readonly, access=WRITE_COMBINING, spec=spec, roots=roots
            )
        except RegionError:
            pass  # the plain resource works, or its error is shown
    access = _plain_access(roots)
    return _map(directory / PLAIN, size, readonly=readonly, access=access, spec=spec, roots=roots)


def is_resource(path: Path) -> bool:
    """Return whether a path is the sysfs file of an ivshmem device's shared memory."""
    return path.name in (PLAIN, COMBINING) and is_ivshmem(path.parent)


def open_resource(path: Path, *, readonly: bool = False, roots: Roots = HERE) -> Region:
    """Map a device by the named sysfs file only; raises a RegionError."""
    whole = path.absolute()
    size = _shared_memory(whole.parent, whole.parent.resolve().name)
    access = WRITE_COMBINING if whole.name == COMBINING else _plain_access(roots)
    return _map(whole, size, readonly=readonly, access=access, spec=str(whole), roots=roots)


def _plain_access(roots: Roots) -> int:
    return WRITE_COMBINING if roots.x86 else DEVICE
