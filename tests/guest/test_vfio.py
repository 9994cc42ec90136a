"""Two guests with an IOMMU and a shared NVDIMM: through vfio-pci, and through device-dax.

Both guests are booted for this module, because their machine differs from that of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import ready
from tests.guest.harness import Guest, Recipe, arm_parts, kernel_root
from tests.guest.machines import FSCK, IVSHMEMFS, MKFS, Host, Mount
from tests.guest.sleeper import MOST, announced, wakes
from tests.support.doorbell import serving

pytestmark = pytest.mark.guest

if arm_parts() is not None:
    pytest.skip("the machine is an x86_64 one", allow_module_level=True)

NVDIMM = 128 << 20  # bytes: the smallest that Linux makes a region of
DAX = "/dev/dax0.0"
BELL_SIZE = 4 << 20  # bytes
BELL_SLOT = 0x14
BELL_ADDRESS = f"0000:00:{BELL_SLOT:02x}.0"


@pytest.fixture(scope="module")
def nvdimm(regions: list[Path]) -> Iterator[Path]:
    path = Path(f"{regions[0]}-nvdimm")
    with path.open("wb") as file:
        file.truncate(NVDIMM)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def bell_region(workplace: Path, regions: list[Path]) -> Iterator[Path]:
    """The file of a region with a server at the socket `vfio-bell`."""
    path = Path(f"{regions[0]}-vfio-bell")
    Host().run(MKFS, "--size", str(BELL_SIZE), "--label", "vfio-bell", path).check()
    try:
        with serving(workplace / "vfio-bell", path):
            yield path
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def others(
    workplace: Path, recipe: Recipe, regions: list[Path], nvdimm: Path, bell_region: Path
) -> Iterator[list[Guest]]:
    """Two guests with the usual regions, behind an IOMMU, with the NVDIMM and a doorbell device."""
    backend = f"memory-backend-file,id=nvdimm,share=on,mem-path={nvdimm},size={NVDIMM}"
    words = (
        *("-machine", "q35,nvdimm=on,kernel-irqchip=split", "-device", "intel-iommu"),
        *("-m", "1G,slots=2,maxmem=4G", "-object", backend, "-device", "nvdimm,memdev=nvdimm"),
        *("-chardev", f"socket,path={workplace / 'vfio-bell'},id=bell"),
        *("-device", f"ivshmem-doorbell,chardev=bell,vectors=1,addr={BELL_SLOT:#x}"),
    )
    guests = [Guest(recipe, name, regions, workplace, words) for name in ("iommu1", "iommu2")]
    try:
        ready(*guests)
        yield guests
    finally:
        for guest in guests:
            guest.close()


def modprobe(guest: Guest, *names: str) -> None:
    for name in names:
        guest.sh(f"/sbin/modprobe -d {kernel_root().resolve()} {name}")


def exchange(mounts: list[Mount]) -> None:
    """Each machine writes a file that each other one reads."""
    for writer in mounts:
        name = writer.machine.name
        written = writer.sh(f"head -c 300007 /dev/urandom | tee $M/{name} | sha256sum")
        for reader in mounts:
            assert reader.sh(f"sha256sum <$M/{name}") == written


def test_guests_exchange_files_through_vfio(
    others: list[Guest], region: Path, host: Host, tmp_path: Path
) -> None:
    mounts = [Mount(host, str(tmp_path)), *(Mount(guest, "/run/vfio") for guest in others)]
    for guest in others:
        modprobe(guest, "vfio_iommu_type1", "vfio-pci")
        bar, address = guest.bar(0), guest.device(0).removeprefix("pci:")
        guest.sh(
            f"echo vfio-pci >{bar}/driver_override; echo {address} >/sys/bus/pci/drivers_probe"
        )
        assert "vfio-pci" in guest.run(IVSHMEMFS, "list").check().out
    try:
        sources = [str(region), *["vfio:0000:00:10.0"] * 2]
        for mount, source in zip(mounts, sources, strict=True):
            mount.machine.run("/bin/mkdir", "-p", mount.place).check()
            mount.machine.run(IVSHMEMFS, "mount", source, mount.place).check()
        busy = others[0].run(IVSHMEMFS, "info", "vfio:0000:00:10.0")
        assert "another process has it open" in busy.err, busy
        exchange(mounts)
    finally:
        for mount in mounts:
            mount.abandon()
    host.run(FSCK, "-n", region).check()


def test_a_waiter_sleeps_until_a_vfio_interrupt(
    others: list[Guest], bell_region: Path, host: Host
) -> None:
    """One guest waits through vfio-pci; the other commits through it, and rings by its BAR0."""
    for guest in others:
        modprobe(guest, "vfio_iommu_type1", "vfio-pci")
        guest.sh(
            f"echo vfio-pci >/sys/bus/pci/devices/{BELL_ADDRESS}/driver_override;"
            f" echo {BELL_ADDRESS} >/sys/bus/pci/drivers_probe"
        )
    first, second = others
    spec = f"vfio:{BELL_ADDRESS}"
    waiting = first.begin(IVSHMEMFS, "wait", f"{spec}:/new")
    announced(bell_region, waiting)
    assert wakes(first, f"wait {spec}") <= MOST
    assert interrupts(first) == 0
    second.run(IVSHMEMFS, "put", spec, "/etc/hostname", "/other").check()
    announced(bell_region, waiting)  # again: it is rung, looks, and waits on
    assert interrupts(first) >= 1
    second.run(IVSHMEMFS, "put", spec, "/etc/hostname", "/new").check()
    waiting.wait().check()
    host.run(FSCK, "-n", bell_region).check()


def interrupts(guest: Guest) -> int:
    """How many VFIO interrupts a guest had from its doorbell device."""
    lines = guest.sh(f"grep 'vfio-msix.*{BELL_ADDRESS}' /proc/interrupts").splitlines()
    return sum(int(word) for line in lines for word in line.split()[1:3])


def make_dax(guest: Guest) -> None:
    """Turn the NVDIMM into device-dax, as `ndctl create-namespace -m devdax -M mem` does.

    The first guest writes that into the memory; the second finds it there.
    """
    modprobe(guest, "nfit", "nd_pmem", "dax_pmem", "device_dax")
    guest.sh(
        f"[ -e {DAX} ] && exit; cd /sys/bus/nd/devices; seed=$(cat region0/dax_seed);"
        " echo namespace0.0 >/sys/bus/nd/drivers/nd_pmem/unbind || true;"
        " cd $seed; echo $(cat /proc/sys/kernel/random/uuid) >uuid; echo ram >mode;"
        " echo namespace0.0 >namespace; echo $seed >/sys/bus/nd/drivers/dax_pmem/bind;"
        f" for n in $(seq 100); do [ -e {DAX} ] && exit; sleep 0.1; done; exit 1"
    )


def test_guests_exchange_files_through_device_dax(others: list[Guest], nvdimm: Path) -> None:
    for guest in others:
        make_dax(guest)
    first, _second = others
    align = int(first.sh(f"cat /sys/bus/dax/devices/{DAX[5:]}/align"))
    assert align >= 2 << 20
    refused = first.run(IVSHMEMFS, "info", f"{DAX}:1M")
    assert "multiples of" in refused.err, refused
    first.run(MKFS, "--label", "dax", DAX).check()
    assert "device-dax" in first.run(IVSHMEMFS, "list").check().out
    mounts = [Mount(guest, "/run/dax") for guest in others]
    try:
        for mount in mounts:
            mount.machine.run("/bin/mkdir", "-p", mount.place).check()
            mount.machine.run(IVSHMEMFS, "mount", DAX, mount.place).check()
        exchange(mounts)
    finally:
        for mount in mounts:
            mount.abandon()
    first.run(FSCK, "-n", DAX).check()
