"""A driver holds the device: its character devices are found, and nothing else is taken for one."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ivshmemfs.errors import (
    IvshmemfsError,
    RegionAmbiguous,
    RegionDenied,
    RegionError,
    RegionHeld,
    RegionMissing,
    RegionSize,
    RegionUnfit,
    UsageError,
)
from ivshmemfs.region import DEVICE, Roots, discover, identified, open_region
from tests.support.sysfs import ONE, REGISTERS, SIZE, START, TWO, FakeMachine, hold

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    made = FakeMachine(tmp_path)
    made.device()
    return made


def refused(spec: str, kind: type[IvshmemfsError], roots: Roots, *words: str) -> str:
    """Open, and expect that error, in one line with these words that does not advise to format."""
    with pytest.raises(IvshmemfsError) as caught:
        open_region(spec, roots=roots).close()
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.isprintable()
    assert "mkfs" not in message
    for word in words:
        assert word in message
    return message


def identify(page: bytes) -> tuple[str, str] | None:
    """Pretends that a filesystem starts with MAGIC."""
    return ("label", "uuid") if page.startswith(b"MAGIC") else None


def stamp(machine: FakeMachine, address: str) -> None:
    with (machine.place(address) / "resource2").open("r+b") as file:
        file.write(b"MAGIC")


def rows(machine: FakeMachine) -> list[tuple[str, str]]:
    return [(candidate.spec, candidate.description) for candidate in discover(machine.roots)]


def opened_by(machine: FakeMachine, spec: str = f"pci:{ONE}") -> tuple[Path, int]:
    """What is mapped when this is opened, and how much of it."""
    with open_region(spec, roots=machine.roots) as region:
        assert region.spec == spec
        return region.path, region.size


# --- whose node it is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("ivshmem0", "ivshmem"), ("shared", "misc"), ("shm_3", "any_class")]
)
def test_a_node_below_the_device_is_its_node(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    machine.bind(ONE, "my_driver")
    node = machine.node(name, "240:0", ONE, kind)
    hold(monkeypatch)
    assert rows(machine) == [(f"pci:{ONE}", f"PCI device, 2 MiB, driver my_driver, {node}")]
    assert opened_by(machine) == (node, SIZE)
    assert opened_by(machine, str(node)) == (node, SIZE)
    with open_region("pci", roots=machine.roots) as region:
        assert (
            region.description == f"PCI device, {node} of driver my_driver, 2 MiB, write-combining"
        )


def test_sysfs_is_preferred_where_the_kernel_lets_both(machine: FakeMachine) -> None:
    machine.bind(ONE, "my_driver")
    machine.node("ivshmem0", "240:0", ONE)
    assert opened_by(machine)[0].name == "resource2_wc"


def by_driver(machine: FakeMachine) -> str:
    machine.bind(ONE, "my-driver")
    machine.described("my_driver7", "240:0", kind="misc")
    return "my_driver7"


def by_module(machine: FakeMachine) -> str:
    machine.bind(ONE, "something", module="my_module")
    machine.described("my_module0", "240:0", kind="a_class")
    return "my_module0"


def by_class(machine: FakeMachine) -> str:
    machine.bind(ONE, "my_driver")
    machine.described("shared0", "240:0", kind="my_driver")
    return "shared0"


def by_major(machine: FakeMachine) -> str:
    machine.bind(ONE, "my_driver")
    machine.described("shared0", "240:0", kind="a_class")
    machine.majors({240: "my_driver", 241: "another"})
    return "shared0"


def by_name_alone(machine: FakeMachine) -> str:
    machine.bind(ONE, "some_driver")
    machine.described("ivshmem0", "240:0", kind="a_class")
    return "ivshmem0"


def by_part_of_its_name(machine: FakeMachine) -> str:
    machine.bind(ONE, "some_driver")
    machine.described("my_ivshmem-0", "240:0", kind="misc")
    return "my_ivshmem-0"


def made_by_hand(machine: FakeMachine) -> str:
    """As mknod(1) after register_chrdev(), of which sysfs knows nothing."""
    machine.bind(ONE, "kvm_ivshmem")
    return "ivshmem_by_hand"


@pytest.mark.parametrize(
    "make",
    [by_driver, by_module, by_class, by_major, by_name_alone, by_part_of_its_name, made_by_hand],
)
def test_a_node_without_a_parent_is_told_by_its_names(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, make: Callable[[FakeMachine], str]
) -> None:
    name = make(machine)
    node = machine.in_dev(name, "240:0", ONE)
    machine.majors({240: "ivshmem"} if name == "ivshmem_by_hand" else {240: "my_driver"})
    hold(monkeypatch)
    assert opened_by(machine) == (node, SIZE)
    assert [spec for spec, _ in rows(machine)] == [f"pci:{ONE}"]


def test_nodes_of_others_are_not_taken(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.bind(ONE, "my_driver")
    machine.device(TWO, kind=0x1000)
    machine.bind(TWO, "my_driver")
    machine.node("shared0", "240:0", TWO)  # of another PCI device
    machine.described("tty7", "4:7", kind="tty")
    machine.in_dev("tty7", "4:7")
    hold(monkeypatch)
    refused(f"pci:{ONE}", RegionHeld, machine.roots, "my_driver")
    assert len(rows(machine)) == 1


def test_a_node_that_another_device_made_is_not_the_drivers(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.bind(ONE, "my_driver")
    place = machine.roots.sys / "devices/platform/reserved/ivshmem/ivshmem0"
    place.mkdir(parents=True)
    (machine.roots.sys / "dev/char/240:0").symlink_to(place)
    node = machine.in_dev("ivshmem0", "240:0", ONE)
    hold(monkeypatch)
    refused(f"pci:{ONE}", RegionHeld, machine.roots)
    assert [spec for spec, _ in rows(machine)] == [f"pci:{ONE}", str(node)]


def test_of_two_devices_one_is_bound(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.device(TWO, start=START + (64 << 20), size=2 * SIZE)
    machine.bind(TWO, "kvmfr")
    machine.described("kvmfr0", "240:0", kind="kvmfr")
    node = machine.in_dev("kvmfr0", "240:0", TWO)
    assert opened_by(machine)[1] == SIZE
    assert opened_by(machine, f"pci:{TWO}")[1] == 2 * SIZE
    hold(monkeypatch)
    assert opened_by(machine, f"pci:{TWO}") == (node, 2 * SIZE)
    assert [spec for spec, _ in rows(machine)] == [f"pci:{ONE}", f"pci:{TWO}"]


def test_where_it_is_open_whose_node_it_is_nothing_is_guessed(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kvmfr makes nodes without a parent: of two devices either may be behind /dev/kvmfr0."""
    machine.device(TWO, start=START + (64 << 20))
    stamp(machine, TWO)
    for number, address in enumerate((ONE, TWO)):
        machine.bind(address, "kvmfr")
        machine.described(f"kvmfr{number}", f"240:{number}", kind="kvmfr")
        machine.in_dev(f"kvmfr{number}", f"240:{number}", address)
    hold(monkeypatch)
    which = f"device, 2 MiB, pci:{ONE} or pci:{TWO}"
    nodes = [str(machine.roots.dev / f"kvmfr{number}") for number in (0, 1)]
    assert rows(machine) == [(node, which) for node in nodes]
    refused(f"pci:{ONE}", RegionHeld, machine.roots, "driver kvmfr", f"{nodes[0]} or {nodes[1]}")
    with open_region("label=label", identify=identify, roots=machine.roots) as region:
        assert region.spec == nodes[1]
        assert region.size == SIZE


def test_devices_of_different_sizes_behind_nodes_without_a_parent(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.device(TWO, start=START + (64 << 20), size=2 * SIZE)
    for number, address in enumerate((ONE, TWO)):
        machine.bind(address, "kvmfr")
        machine.in_dev(f"kvmfr{number}", f"240:{number}", address)
    answers = [SIZE]
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: answers[0])
    assert opened_by(machine, f"{machine.roots.dev}/kvmfr0")[1] == SIZE
    answers[0] = 0  # as at 4 GiB
    path = f"{machine.roots.dev}/kvmfr1"
    refused(path, RegionSize, machine.roots, f"{path}:SIZE")
    assert opened_by(machine, f"{path}:4M")[1] == 2 * SIZE


def test_a_container_without_the_node(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.bind(ONE, "my_driver")
    machine.described("ivshmem0", "240:3", ONE)
    hold(monkeypatch)
    refused(f"pci:{ONE}", RegionMissing, machine.roots, "my_driver", "mknod", "ivshmem0 c 240 3")
    elsewhere = machine.in_dev("by-another-name", "240:3", ONE)
    assert opened_by(machine) == (elsewhere, SIZE)


def test_vfio_gives_no_memory(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.bind(ONE, "vfio-pci")
    machine.node("vfio0", "511:0", ONE, "vfio-dev")
    stray = machine.in_dev("ivshmem0", "240:0")
    hold(monkeypatch)
    message = refused(f"pci:{ONE}", RegionHeld, machine.roots, "vfio-pci", "unbind")
    assert "vfio0" not in message
    assert [spec for spec, _ in rows(machine)] == [f"pci:{ONE}", str(stray)]


def test_without_sysfs_the_names_in_dev_remain(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "a")
    node = machine.in_dev("ivshmem0", "240:0")
    assert rows(machine) == [(str(node), "device, size unknown")]
    assert opened_by(machine, str(node)) == (node, SIZE)  # it answers lseek(2)


# --- how much of it ---------------------------------------------------------------------------


def test_a_size_of_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kvmfr answers is an int, 0 at 4 GiB; the BAR tells."""
    machine = FakeMachine(tmp_path)
    machine.device(start=0x40_0000_0000, size=4 << 30)
    machine.bind(ONE, "kvmfr")
    machine.described("kvmfr0", "240:0", kind="kvmfr")
    node = machine.in_dev("kvmfr0", "240:0", ONE)
    hold(monkeypatch)
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    assert opened_by(machine) == (node, 4 << 30)
    assert opened_by(machine, str(node)) == (node, 4 << 30)


def test_more_than_the_device_has(machine: FakeMachine) -> None:
    machine.bind(ONE, "my_driver")
    node = machine.node("ivshmem0", "240:0", ONE)
    refused(f"{node}:4M", RegionSize, machine.roots, "has only 2M")
    assert opened_by(machine, f"{node}:1M") == (node, 1 << 20)


@pytest.mark.parametrize("flip", [False, True])
def test_the_map_of_a_uio_device_is_that_of_bar2(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, flip: bool
) -> None:
    machine.bind(ONE, "uio_ivshmem")
    maps = [(REGISTERS & ~0xFFF, 4 * SIZE), (START, SIZE)]
    node = machine.uio("245:0", ONE, maps[::-1] if flip else maps)
    hold(monkeypatch)
    assert opened_by(machine) == (node, SIZE)
    with node.open("r+b") as file:  # whose map number is the page where mmap(2) finds it
        file.seek(0 if flip else PAGE)
        file.write(b"MAGIC")
    with open_region("label=label", identify=identify, roots=machine.roots) as region:
        assert region.path == node


def test_registers_are_never_a_region(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uio_pci_generic maps BAR0 alone, and does not keep others from BAR2."""
    machine.bind(ONE, "uio_pci_generic")
    node = machine.uio("245:0", ONE, [(REGISTERS, 8192)])
    refused(str(node), RegionError, machine.roots, "registers", f"pci:{ONE}")
    refused(f"{node}:8K", RegionError, machine.roots, "registers")
    assert rows(machine) == [(f"pci:{ONE}", "PCI device, 2 MiB, driver uio_pci_generic")]
    assert opened_by(machine)[0].name == "resource2_wc"
    hold(monkeypatch)
    refused(f"pci:{ONE}", RegionHeld, machine.roots, "uio_pci_generic")


def test_a_uio_device_of_something_else(machine: FakeMachine) -> None:
    machine.device(TWO, kind=0x1000)
    machine.bind(TWO, "uio_something")
    node = machine.uio("245:0", TWO, [(START + (64 << 20), SIZE)])
    refused(str(node), RegionError, machine.roots, "is not an ivshmem device")
    assert [spec for spec, _ in rows(machine)] == [f"pci:{ONE}"]
    assert opened_by(machine, f"{node}:0x0:1M") == (node, 1 << 20)


def test_device_memory_of_a_driver_is_taken_for_the_worst(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, "aarch64")
    machine.device()
    machine.bind(ONE, "my_driver")
    node = machine.node("ivshmem0", "240:0", ONE)
    with open_region(str(node), roots=machine.roots) as region:
        assert region.memory.access == DEVICE


# --- what is refused ---------------------------------------------------------------------------


def test_a_driver_without_a_node_is_named(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.bind(ONE, "my_driver")
    hold(monkeypatch)
    refused(f"pci:{ONE}", RegionHeld, machine.roots, "my_driver", f"{ONE} >", "/unbind")
    refused("pci", RegionHeld, machine.roots, "my_driver")
    path = f"{machine.place(ONE)}/resource2"
    refused(path, RegionHeld, machine.roots, "my_driver", "character device")


def test_the_file_that_is_named_is_refused_with_the_node(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was named to choose the mapping; so nothing else is taken in its place."""
    machine.bind(ONE, "my_driver")
    node = machine.node("ivshmem0", "240:0", ONE)
    hold(monkeypatch)
    refused(f"{machine.place(ONE)}/resource2", RegionHeld, machine.roots, f"use {node}")


def test_what_cannot_be_read_is_not_called_unformatted(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.device(TWO, start=START + (64 << 20))
    machine.bind(ONE, "my_driver")
    hold(monkeypatch)
    found, unreadable = identified(discover(machine.roots), identify, machine.roots)
    assert found == []
    assert [one.candidate.device for one in unreadable] == [ONE, TWO]
    for spec in ("pci", "label=label"):
        with pytest.raises(RegionError, match="my_driver") as caught:
            open_region(spec, identify=identify, roots=machine.roots)
        assert "format " not in str(caught.value)


def test_a_device_that_gives_only_ones_is_not_called_unformatted(machine: FakeMachine) -> None:
    with (machine.place(ONE) / "resource2").open("r+b") as file:
        file.write(b"\xff" * SIZE)
    found, unreadable = identified(discover(machine.roots), identify, machine.roots)
    assert found == []
    assert isinstance(unreadable[0].error, RegionUnfit)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_sys_that_this_process_may_not_write_to(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A container has it read-only, an ordinary user may not open it; the node is open to both."""
    real = os.open

    def refuse(path: Path, flags: int, *rest: int, **more: int) -> int:
        if Path(path).name.startswith("resource2") and (code == errno.EACCES or flags & os.O_RDWR):
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    hint = "-o ro" if code == errno.EROFS else "run as root"
    refused(f"pci:{ONE}", RegionDenied, machine.roots, hint)
    machine.bind(ONE, "my_driver")
    node = machine.node("ivshmem0", "240:0", ONE)
    assert opened_by(machine) == (node, SIZE)


def test_a_device_that_is_off_where_sys_is_readonly(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine.place(ONE) / "enable").write_text("0\n")

    def refuse(*_args: object, **_named: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_text", refuse)
    refused(f"pci:{ONE}", RegionDenied, machine.roots, "switched off", "outside")


@pytest.mark.parametrize(
    ("start", "size", "flags"), [(0, 0, 0), (0, SIZE, 0x14220C), (START, SIZE, 0x2014220C)]
)
@pytest.mark.parametrize("behind", ["", "0000:00:02.0"])
def test_a_bar_without_an_address(
    tmp_path: Path, start: int, size: int, flags: int, behind: str
) -> None:
    machine = FakeMachine(tmp_path)
    machine.device(start=start, size=size, flags=flags, behind=behind)
    hints = ("pref64-reserve=", behind) if behind else ("restart",)
    refused(f"pci:{ONE}", RegionSize, machine.roots, "got no address", *hints)
    assert rows(machine) == [(f"pci:{ONE}", "PCI device, BAR2 has no address")]


def test_a_device_of_revision_0(machine: FakeMachine) -> None:
    """Older QEMUs' ivshmem; its memory is BAR2 as well."""
    (machine.place(ONE) / "revision").write_text("0x00\n")
    assert opened_by(machine)[1] == SIZE


# --- /dev/mem ---------------------------------------------------------------------------------


@pytest.fixture
def physical(machine: FakeMachine) -> FakeMachine:
    """Also with a /dev/mem, which is sparse."""
    with (machine.roots.dev / "mem").open("wb") as file:
        file.truncate(START + (64 << 20))
    return machine


@pytest.mark.parametrize("text", ["0xfe000000", "fe000000", "FE000000", "00000000fe000000"])
def test_addresses_as_lspci_prints_them(physical: FakeMachine, text: str) -> None:
    with open_region(f"mem:{text}:2M", roots=physical.roots) as region:
        assert region.spec == "mem:0xfe000000:2M"


def test_an_address_that_may_be_decimal(physical: FakeMachine) -> None:
    roots = physical.roots
    refused("mem:4000000000:1M", UsageError, roots, "write 0x4000000000 ", "or 0xee6b2800 ")


@pytest.mark.parametrize("place", ["fe000000:4M", "fdf00000:2M", "0xfe100000:2M"])
def test_more_than_the_shared_memory(physical: FakeMachine, place: str) -> None:
    """The memory beside it may be registers."""
    hints = ("more than the shared memory", f"pci:{ONE}", "mem:0xfe000000:2M")
    refused(f"mem:{place}", RegionSize, physical.roots, *hints)


def test_devmem_of_a_device_that_a_driver_holds(
    physical: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    physical.bind(ONE, "my_driver")
    hold(monkeypatch, errno.EPERM)
    roots = physical.roots
    refused("mem:fe000000:2M", RegionHeld, roots, "my_driver", "that driver's character device")
    node = physical.node("ivshmem0", "240:0", ONE)
    refused("mem:fe000000:2M", RegionHeld, roots, f"use {node}")


@pytest.mark.parametrize("level", ["integrity", "confidentiality", "none"])
def test_lockdown(physical: FakeMachine, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """The kernel refuses both to root; what a driver maps is still there."""
    if os.geteuid() != 0:
        pytest.skip("what an ordinary user is refused says nothing about lockdown")
    physical.lockdown(level)
    real = os.open

    def refuse(path: Path, *rest: int, **more: int) -> int:
        if Path(path).name == "mem":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    hold(monkeypatch, errno.EPERM)
    said = "is locked down (Secure Boot), or" if level == "none" else f"locked down ({level}"
    for spec in ("mem:fe000000:2M", f"pci:{ONE}"):
        refused(spec, RegionDenied, physical.roots, said, "character device", "signed")
    with pytest.raises(RegionError, match="locked down"):
        open_region("label=label", identify=identify, roots=physical.roots)
    physical.bind(ONE, "my_driver")
    node = physical.node("ivshmem0", "240:0", ONE)
    assert opened_by(physical) == (node, SIZE)


def test_of_several_devices_the_readable_one_with_a_filesystem_is_chosen(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.device(TWO, start=START + (64 << 20))
    machine.bind(TWO, "my_driver")
    machine.node("ivshmem0", "240:0", TWO)
    for address in (ONE, TWO):
        stamp(machine, address)
    with pytest.raises(RegionAmbiguous):
        open_region("pci", identify=identify, roots=machine.roots)
    hold(monkeypatch)
    with open_region("pci", identify=identify, roots=machine.roots) as region:
        assert region.spec == f"pci:{TWO}"
