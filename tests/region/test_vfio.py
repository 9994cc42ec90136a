"""Devices that vfio-pci holds, with a faked ioctl(2) that keeps VFIO's order of calls.

`tests/guest/test_vfio.py` has the kernel's own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ivshmemfs.errors import RegionDenied, RegionError, RegionHeld, RegionMissing, RegionSize
from ivshmemfs.region import WRITE_COMBINING, open_region, vfio
from tests.support.sysfs import ONE, SIZE, FakeMachine

OFFSET = 4096  # of the memory in the file that is the device's descriptor
GROUP = "7"


class FakeVfio:
    """The kernel's side; each attribute is something that may be wrong."""

    def __init__(self, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine = machine
        self.version, self.viable, self.extensions = 0, 1, {1}
        self.size, self.flags = SIZE, 7
        self.errors: dict[int, int] = {}
        self.calls: list[int] = []
        self.memory = machine.roots.sys / "memory"
        self.memory.write_bytes(bytes(OFFSET + SIZE))
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def group(self) -> None:
        machine = self.machine
        group = machine.roots.sys / f"kernel/iommu_groups/{GROUP}"
        group.mkdir(parents=True)
        (machine.place(ONE) / "iommu_group").symlink_to(group)
        (machine.roots.dev / "vfio").mkdir()
        for name in ("vfio", GROUP):
            (machine.roots.dev / "vfio" / name).write_text("")

    def cdev(self) -> None:
        (self.machine.place(ONE) / "vfio-dev/vfio3").mkdir(parents=True)
        (self.machine.roots.dev / "vfio/devices").mkdir(parents=True)
        os.link(self.memory, self.machine.roots.dev / "vfio/devices/vfio3")
        (self.machine.roots.dev / "iommu").write_text("")

    def ioctl(self, descriptor: int, request: int, argument: object = 0) -> object:
        self.calls.append(request)
        if request in self.errors:
            raise OSError(self.errors[request], os.strerror(self.errors[request]))
        if request == vfio.GET_API_VERSION:
            return self.version
        if request == vfio.CHECK_EXTENSION:
            return int(argument in self.extensions)
        if request == vfio.GROUP_GET_DEVICE_FD:
            assert argument == ONE.encode() + b"\0"
            assert isinstance(argument, bytearray), "ioctl(2)'s result is lost otherwise"
            assert self.calls[-2] == vfio.SET_IOMMU
            return os.open(self.memory, os.O_RDWR)
        if request == vfio.GROUP_GET_STATUS:
            assert isinstance(argument, bytearray)
            argument[4:8] = struct.pack("=I", self.viable)
        if request == vfio.DEVICE_GET_REGION_INFO:
            assert isinstance(argument, bytearray)
            assert struct.unpack_from("=III", argument) == (32, 0, 2)
            struct.pack_into("=I", argument, 4, self.flags)
            struct.pack_into("=QQ", argument, 16, self.size, OFFSET)
        return 0


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    made = FakeMachine(tmp_path)
    made.device()
    made.bind(ONE, "vfio-pci")
    return made


@pytest.fixture
def kernel(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> FakeVfio:
    return FakeVfio(machine, monkeypatch)


def test_the_numbers_are_those_of_the_header() -> None:
    assert (vfio.GET_API_VERSION, vfio.DEVICE_GET_REGION_INFO) == (0x3B64, 0x3B6C)
    assert (vfio.GROUP_GET_DEVICE_FD, vfio.DEVICE_BIND_IOMMUFD) == (0x3B6A, 0x3B76)
    assert (vfio.DEVICE_GET_IRQ_INFO, vfio.DEVICE_SET_IRQS) == (0x3B6D, 0x3B6E)


@pytest.mark.parametrize("interface", ["group", "cdev"])
def test_bar2_is_mapped(interface: str, machine: FakeMachine, kernel: FakeVfio) -> None:
    getattr(kernel, interface)()
    before = len(os.listdir("/proc/self/fd"))
    with open_region(f"vfio:{ONE}", roots=machine.roots) as region:
        assert (region.size, region.memory.access) == (SIZE, WRITE_COMBINING)
        assert region.spec == f"vfio:{ONE}"
        region.memory.store(64, 42)
        assert kernel.memory.read_bytes()[OFFSET + 64] == 42
        assert len(os.listdir("/proc/self/fd")) == before + 1, "the device, for its doorbell"
    assert len(os.listdir("/proc/self/fd")) == before
    bound = vfio.DEVICE_BIND_IOMMUFD in kernel.calls
    assert bound == (interface == "cdev")
    with open_region(f"vfio:{ONE}", readonly=True, roots=machine.roots) as region:
        assert region.readonly
        assert region.memory.load(64) == 42


def test_a_device_is_opened_through_vfio_where_sysfs_is_closed(
    machine: FakeMachine, kernel: FakeVfio
) -> None:
    kernel.group()
    for name in ("resource2", "resource2_wc"):
        (machine.place(ONE) / name).unlink()
    with open_region(f"pci:{ONE}", roots=machine.roots) as region:
        assert region.spec == f"pci:{ONE}"
        assert "vfio-pci" in region.kind


def wrong_version(kernel: FakeVfio) -> None:
    kernel.version = 1


def shared_group(kernel: FakeVfio) -> None:
    kernel.viable = 0


def no_iommu(kernel: FakeVfio) -> None:
    kernel.extensions = set()


def no_memory(kernel: FakeVfio) -> None:
    kernel.size = 0


def not_mappable(kernel: FakeVfio) -> None:
    kernel.flags = 3


def used_elsewhere(kernel: FakeVfio) -> None:
    kernel.errors[vfio.GROUP_SET_CONTAINER] = errno.EBUSY


def forbidden(kernel: FakeVfio) -> None:
    kernel.errors[vfio.SET_IOMMU] = errno.EPERM


def gone(kernel: FakeVfio) -> None:
    kernel.errors[vfio.DEVICE_GET_REGION_INFO] = errno.ENODEV


@pytest.mark.parametrize(
    ("trouble", "kind", "said"),
    [
        (wrong_version, RegionError, "another version"),
        (shared_group, RegionHeld, "bind all of them"),
        (no_iommu, RegionError, "vfio_iommu_type1"),
        (no_memory, RegionSize, "no shared memory"),
        (not_mappable, RegionError, "not let its memory be mapped"),
        (used_elsewhere, RegionHeld, "another process"),
        (forbidden, RegionDenied, "permission denied"),
        (gone, RegionError, "dev"),
    ],
)
def test_what_goes_wrong_is_told_and_nothing_stays_open(
    trouble: Callable[[FakeVfio], None],
    kind: type[RegionError],
    said: str,
    machine: FakeMachine,
    kernel: FakeVfio,
) -> None:
    kernel.group()
    trouble(kernel)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind, match=said) as caught:
        open_region(f"vfio:{ONE}", roots=machine.roots).close()
    assert str(caught.value).isprintable()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_device_without_the_driver_or_without_an_iommu(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.device()
    with pytest.raises(RegionMissing, match="driver_override"):
        open_region(f"vfio:{ONE}", roots=machine.roots)
    machine.bind(ONE, "vfio-pci")
    with pytest.raises(RegionMissing, match="intel-iommu"):
        open_region(f"vfio:{ONE}", roots=machine.roots)
    with pytest.raises(RegionMissing, match="no PCI device"):
        open_region("vfio:0000:00:1f.0", roots=machine.roots)
