"""The doorbell of an ivshmem-doorbell device in a guest: registers to ring, interrupts to be rung.

    registers   BAR0: IVPosition (the own number) and Doorbell (number << 16 | vector), 32 bits
                each.  Through a map of a uio driver, resource0 of sysfs, or VFIO
    interrupts  MSI-X vector 0.  A uio driver counts them (read(2) of /dev/uioN); VFIO signals an
                eventfd.  Without either the device can ring, and cannot be rung

QEMU ignores a number that no machine has.  A device without MSI-X, ivshmem-plain, has no doorbell:
its BAR0 does not ring.  A device that is unplugged reads as ones, and stores to it are lost.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from ivshmemfs.doorbell.messages import LARGEST_ID
from ivshmemfs.native import DEVICE, Memory
from ivshmemfs.region import vfio
from ivshmemfs.region.driver import uio_maps
from ivshmemfs.region.pci import bar_extent
from ivshmemfs.region.roots import HERE, Roots

REGISTER_BAR: Final = 0
REGISTERS: Final = 256  # bytes of BAR0
NUMBER_AT: Final = 8
DOORBELL_AT: Final = 12
VECTOR: Final = 0
_REGISTER: Final = struct.Struct("<I")
_COUNT: Final = struct.Struct("=i")  # what read(2) of a uio node returns

# The configuration space of a PCI device.
_STATUS_AT, _LISTS, _FIRST_AT, _MSIX = 6, 1 << 4, 0x34, 0x11
_COMMAND_AT, _MASTER = 4, 1 << 2
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Registers(Protocol):
    """BAR0 of a device.  Nothing here raises OSError: a device may vanish at any time."""

    def load(self, at: int) -> int:
        """Return a register; all ones when there is no device."""

    def store(self, at: int, value: int) -> None:
        """Store to a register."""

    def close(self) -> None:
        """Give it back."""


class MappedRegisters:
    """Registers in a mapping of `path`, `inside` bytes behind `offset`.  Raises OSError.

    A BAR of 256 bytes may start inside a page, and the kernel maps whole pages.
    """

    def __init__(self, path: Path, offset: int, inside: int = 0) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            length = inside + REGISTERS
            self._memory = Memory(descriptor, length, offset, writable=True, access=DEVICE)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from None
        finally:
            os.close(descriptor)
        self._inside = inside

    def load(self, at: int) -> int:
        """Return a register."""
        with suppress(OSError, ValueError):
            (value,) = _REGISTER.unpack(self._memory.read(self._inside + at, _REGISTER.size))
            return int(value)
        return 0xFFFFFFFF

    def store(self, at: int, value: int) -> None:
        """Store to a register."""
        with suppress(OSError, ValueError):
            self._memory.write(self._inside + at, _REGISTER.pack(value))

    def close(self) -> None:
        """Unmap."""
        self._memory.close()


class VfioRegisters:
    """Registers by pread(2) and pwrite(2) of a VFIO device, whose BAR0 is smaller than a page."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._start = vfio.region_extent(device, REGISTER_BAR)[1]

    def load(self, at: int) -> int:
        """Return a register."""
        with suppress(OSError, struct.error):
            (value,) = _REGISTER.unpack(os.pread(self._device, _REGISTER.size, self._start + at))
            return int(value)
        return 0xFFFFFFFF

    def store(self, at: int, value: int) -> None:
        """Store to a register."""
        with suppress(OSError):
            os.pwrite(self._device, _REGISTER.pack(value), self._start + at)

    def close(self) -> None:
        """Nothing: the descriptor is the region's."""


class Interrupts(Protocol):
    """The interrupts of vector 0.  Nothing here raises OSError."""

    def fileno(self) -> int:
        """Return a descriptor that is readable after an interrupt."""

    def quiet(self) -> None:
        """Forget the interrupts so far."""

    def close(self) -> None:
        """Give them back."""


class UioInterrupts:
    """Interrupts that a uio driver counts, for this opening of `path`.  Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.read(self._file, _COUNT.size)
        except BlockingIOError:
            pass
        except OSError:  # EIO: the driver takes no interrupts
            os.close(self._file)
            raise

    def fileno(self) -> int:
        """Return the node's descriptor."""
        return self._file

    def quiet(self) -> None:
        """Read the count."""
        with suppress(OSError):
            os.read(self._file, _COUNT.size)

    def close(self) -> None:
        """Close the node."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


class VfioInterrupts:
    """Vector 0 of a VFIO device as an eventfd.  Raises OSError."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            _let_master(device)
            vfio.signal_msix(device, VECTOR, self._event)
        except OSError:
            os.close(self._event)
            raise

    def fileno(self) -> int:
        """Return the eventfd."""
        return self._event

    def quiet(self) -> None:
        """Read the eventfd."""
        with suppress(OSError):
            os.eventfd_read(self._event)

    def close(self) -> None:
        """Switch the interrupts off."""
        if self._event >= 0:
            with suppress(OSError):
                vfio.signal_msix(self._device, VECTOR, -1)
            os.close(self._event)
        self._event = -1


def _let_master(device: int) -> None:
    """Let a VFIO device send: an MSI-X interrupt is a store of the device to memory."""
    at = vfio.region_extent(device, vfio.CONFIG_REGION)[1] + _COMMAND_AT
    (command,) = struct.unpack("<H", os.pread(device, 2, at))
    os.pwrite(device, struct.pack("<H", command | _MASTER), at)


class DeviceBell:
    """The doorbell of a device, for `Bells`; without `interrupts` it has no number."""

    def __init__(self, registers: Registers, interrupts: Interrupts | None) -> None:
        self._registers = registers
        self._interrupts = interrupts

    @property
    def number(self) -> int:
        """The number that the server gave the device; -1 when it cannot be rung."""
        if self._interrupts is None or self._interrupts.fileno() < 0:
            return -1
        found = self._registers.load(NUMBER_AT)
        return found if found <= LARGEST_ID else -1

    def keep(self) -> bool:
        """Return whether the device is there."""
        return self._registers.load(NUMBER_AT) <= LARGEST_ID

    def ring(self, numbers: Iterable[int]) -> None:
        """Ring each number once; QEMU ignores those that no machine has."""
        for number in set(numbers):
            if 0 <= number <= LARGEST_ID:
                self._registers.store(DOORBELL_AT, number << 16 | VECTOR)

    def fileno(self) -> int:
        """Return a descriptor that is readable after a ring; -1 without interrupts."""
        return -1 if self._interrupts is None else self._interrupts.fileno()

    def quiet(self) -> None:
        """Forget the rings so far."""
        if self._interrupts is not None:
            self._interrupts.quiet()

    def close(self) -> None:
        """Give interrupts and registers back."""
        if self._interrupts is not None:
            self._interrupts.close()
        self._registers.close()


# --- what a device has ---------------------------------------------------------------------------


def has_doorbell(directory: Path) -> bool:
    """Return whether a device in sysfs has MSI-X, as ivshmem-doorbell has and -plain has not."""
    try:
        config = (directory / "config").read_bytes()
    except OSError:
        return False
    if len(config) < 256 or not config[_STATUS_AT] & _LISTS:
        return False
    at, seen = config[_FIRST_AT] & ~3, 0
    while at >= 0x40 and seen < 48:  # a list of at most 48; a broken device may make a ring
        if config[at] == _MSIX:
            return True
        at, seen = config[at + 1] & ~3, seen + 1
    return False


def uio_nodes(directory: Path, roots: Roots = HERE) -> Iterator[tuple[Path, Path]]:
    """Yield (node, directory in sysfs) of the uio driver's nodes of a PCI device."""
    for place in sorted((directory / "uio").glob("uio*")):
        yield roots.dev / place.name, place


def bell_of_device(directory: Path, roots: Roots = HERE) -> DeviceBell | None:
    """Return the doorbell of a PCI device in sysfs, or None if it or its registers are missing."""
    if not has_doorbell(directory):
        return None
    interrupts: UioInterrupts | None = None
    registers: MappedRegisters | None = None
    for node, place in uio_nodes(directory, roots):
        with suppress(OSError):
            registers = registers or _uio_registers(node, place, directory)
        with suppress(OSError):
            interrupts = interrupts or UioInterrupts(node)
    if registers is None:
        with suppress(OSError):
            inside = bar_extent(directory, REGISTER_BAR)[0] % _PAGE
            registers = MappedRegisters(directory / f"resource{REGISTER_BAR}", 0, inside)
    if registers is None:
        if interrupts is not None:
            interrupts.close()
        return None
    return DeviceBell(registers, interrupts)


def _uio_registers(node: Path, place: Path, directory: Path) -> MappedRegisters | None:
    """Map BAR0 through the uio map that has its address; raises OSError."""
    start, _size = bar_extent(directory, REGISTER_BAR)
    for number, address, size in uio_maps(place):
        if start and address == start and size >= REGISTERS:
            return MappedRegisters(node, number * _PAGE)
    return None


def bell_of_vfio(device: int) -> DeviceBell | None:
    """Return the doorbell of a VFIO device; None if it has no MSI-X."""
    with suppress(OSError):
        if not vfio.msix_vectors(device):
            return None
        return DeviceBell(VfioRegisters(device), VfioInterrupts(device))
    return None
