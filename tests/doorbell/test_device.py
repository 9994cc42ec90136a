"""The doorbell of a device in a guest, on a machine of plain files.

`tests/guest/test_doorbell.py` has a real device, interrupts and VFIO.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest

from ivshmemfs.doorbell import device as device_module
from ivshmemfs.doorbell.device import (
    DOORBELL_AT,
    NUMBER_AT,
    DeviceBell,
    bell_of_device,
    bell_of_vfio,
    has_doorbell,
)
from ivshmemfs.doorbell.finding import doorbell_of
from ivshmemfs.region import open_region, vfio
from tests.support.sysfs import ONE, REGISTERS, SIZE, START, FakeMachine

NUMBER = 5
MSIX_AT = 0x40


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    made = FakeMachine(tmp_path)
    made.device()
    registers = bytearray(4096)
    struct.pack_into("<I", registers, NUMBER_AT, NUMBER)
    (made.place(ONE) / "resource0").write_bytes(registers)
    give_msix(made.place(ONE))
    return made


def give_msix(
    directory: Path, chain: tuple[tuple[int, int, int], ...] = ((MSIX_AT, 17, 0),)
) -> None:
    """Write a configuration space with capabilities (place, kind, next place)."""
    config = bytearray(256)
    config[6] = 1 << 4
    config[0x34] = chain[0][0] if chain else 0
    for place, kind, following in chain:
        config[place : place + 2] = bytes((kind, following))
    (directory / "config").write_bytes(config)


def rings(path: Path) -> int:
    (found,) = struct.unpack_from("<I", path.read_bytes(), DOORBELL_AT)
    return int(found)


def bell_of(machine: FakeMachine) -> DeviceBell | None:
    return bell_of_device(machine.place(ONE), machine.roots)


def test_a_device_with_registers_alone_rings_and_is_not_rung(machine: FakeMachine) -> None:
    bell = bell_of(machine)
    assert bell is not None
    assert bell.keep()
    assert (bell.number, bell.fileno()) == (-1, -1)
    bell.quiet()
    for number in (0, 9, 65535):
        bell.ring([number])
        assert rings(machine.place(ONE) / "resource0") == number << 16
    bell.ring([-1, 65536, 1 << 70])
    assert rings(machine.place(ONE) / "resource0") == 65535 << 16, "these are no numbers"
    before = (machine.place(ONE) / "resource0").read_bytes()
    assert before[:DOORBELL_AT] == bytes(NUMBER_AT) + struct.pack("<I", NUMBER)
    bell.close()
    bell.close()


def uio(machine: FakeMachine, *maps: tuple[int, int]) -> Path:
    """Bind a uio driver whose node holds the registers in its first page."""
    machine.bind(ONE, "uio_ivshmem")
    node = machine.uio("249:0", ONE, list(maps))
    with node.open("r+b") as file:
        file.write(bytes(NUMBER_AT) + struct.pack("<I", NUMBER))
    return node


def test_a_uio_node_gives_registers_and_interrupts(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = uio(machine, (REGISTERS, 256), (START, SIZE))
    (machine.place(ONE) / "resource0").unlink()
    counts: list[int] = []
    real = os.read

    def read(descriptor: int, size: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") != str(node):
            return real(descriptor, size)
        assert size == 4, "a uio node refuses any other size"
        if not counts:
            raise BlockingIOError
        return struct.pack("=i", counts.pop())

    monkeypatch.setattr(os, "read", read)
    bell = bell_of(machine)
    assert bell is not None
    assert bell.number == NUMBER
    assert os.readlink(f"/proc/self/fd/{bell.fileno()}") == str(node)
    counts.append(1)
    bell.quiet()
    assert counts == [], "the count was read"
    bell.ring([3])
    assert rings(node) == 3 << 16
    bell.close()
    assert bell.number == -1


def test_a_uio_driver_without_interrupts_leaves_the_ringing(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    uio(machine, (START, SIZE))

    def no_interrupts(_descriptor: int, _size: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", no_interrupts)
    before = len(os.listdir("/proc/self/fd"))
    bell = bell_of(machine)
    assert bell is not None
    assert bell.number == -1
    bell.ring([3])
    assert rings(machine.place(ONE) / "resource0") == 3 << 16, "no map has the registers"
    bell.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "chain",
    [
        (),
        ((0x40, 1, 0),),
        ((0x40, 1, 0x50), (0x50, 5, 0x40)),  # a ring
        ((0x40, 1, 0x10),),  # out of the list
    ],
    ids=["none", "another", "ring", "astray"],
)
def test_a_plain_device_has_no_doorbell(
    machine: FakeMachine, chain: tuple[tuple[int, int, int], ...]
) -> None:
    give_msix(machine.place(ONE), chain)
    assert not has_doorbell(machine.place(ONE))
    assert bell_of(machine) is None


def test_a_capability_later_in_the_list_counts(machine: FakeMachine) -> None:
    give_msix(machine.place(ONE), ((0x40, 1, 0x50), (0x50, 5, 0x60), (0x60, 17, 0)))
    assert has_doorbell(machine.place(ONE))


def test_what_this_user_may_not_read_is_no_doorbell(machine: FakeMachine) -> None:
    directory = machine.place(ONE)
    (directory / "config").write_bytes((directory / "config").read_bytes()[:64])
    assert bell_of(machine) is None, "other users than root see 64 bytes"
    give_msix(directory)
    (directory / "resource0").unlink()
    assert bell_of(machine) is None


def test_a_device_that_vanished_rings_nobody(machine: FakeMachine) -> None:
    registers = machine.place(ONE) / "resource0"
    bell = bell_of(machine)
    assert bell is not None
    os.truncate(registers, 0)  # an access is a SIGBUS now, as after an unplugging
    assert not bell.keep()
    assert bell.number == -1
    bell.ring([3])
    os.truncate(registers, 4096)
    with registers.open("r+b") as file:
        file.write(b"\xff" * 256)  # as a device that is switched off reads
    assert not bell.keep()
    bell.close()


@pytest.mark.parametrize("spec", ["pci", "resource", "node"])
def test_a_region_finds_the_doorbell_of_its_device(machine: FakeMachine, spec: str) -> None:
    specs = {"pci": f"pci:{ONE}", "resource": str(machine.place(ONE) / "resource2")}
    if spec == "node":
        machine.bind(ONE, "some_driver")
        specs["node"] = str(machine.node("ivshmem0", "240:0", ONE))
    with open_region(specs[spec], roots=machine.roots) as region:
        bell = doorbell_of(region, roots=machine.roots)
        assert isinstance(bell, DeviceBell)
        bell.ring([4])
        assert rings(machine.place(ONE) / "resource0") == 4 << 16
        bell.close()
        assert doorbell_of(region, "off", roots=machine.roots) is None


# --- VFIO -----------------------------------------------------------------------------------------


class FakeVfioDevice:
    """A file in place of the device: BAR0 at one page, the configuration space at the next."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, vectors: int = 1) -> None:
        path.write_bytes(bytes(3 * 4096))
        self.path, self.vectors = path, vectors
        self.descriptor = os.open(path, os.O_RDWR)
        os.pwrite(self.descriptor, struct.pack("<I", NUMBER), 4096 + NUMBER_AT)
        os.pwrite(self.descriptor, struct.pack("<H", 2), 8192 + 4)
        self.event = -1
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> int:
        assert descriptor == self.descriptor
        if request == vfio.DEVICE_GET_REGION_INFO:
            (index,) = struct.unpack_from("=I", argument, 8)
            offset = {device_module.REGISTER_BAR: 4096, vfio.CONFIG_REGION: 8192}[index]
            struct.pack_into("=QQ", argument, 16, 256, offset)
        elif request == vfio.DEVICE_GET_IRQ_INFO:
            size, _, index = struct.unpack_from("=III", argument)
            assert (size, index) == (16, vfio.MSIX)
            struct.pack_into("=I", argument, 12, self.vectors)
        else:
            assert request == vfio.DEVICE_SET_IRQS
            size, flags, index, start, count, event = struct.unpack("=IIIIIi", argument)
            assert (size, flags, index, start, count) == (24, 0b100100, vfio.MSIX, 0, 1)
            assert os.pread(descriptor, 1, 8192 + 4)[0] & 4, "the device may send"
            self.event = event
        return 0


def test_a_vfio_device_rings_and_is_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVfioDevice(tmp_path / "device", monkeypatch)
    bell = bell_of_vfio(fake.descriptor)
    assert bell is not None
    assert bell.number == NUMBER
    assert bell.fileno() == fake.event
    os.eventfd_write(fake.event, 1)
    bell.quiet()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fake.event)
    bell.ring([6])
    assert os.pread(fake.descriptor, 4, 4096 + DOORBELL_AT) == struct.pack("<I", 6 << 16)
    bell.close()
    assert fake.event == -1, "switched off"
    os.close(fake.descriptor)


def test_a_plain_vfio_device_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVfioDevice(tmp_path / "device", monkeypatch, vectors=0)
    assert bell_of_vfio(fake.descriptor) is None
    os.close(fake.descriptor)
