"""Two guests with ivshmem-doorbell devices of `ivshmemfs server`, plugged in while they run.

The host is a client of the server too, so a guest's ring is seen there.  At first no driver takes
interrupts in the guests, so rings go one way.  Then a uio driver takes them (`driver/`), and
waiters in one guest sleep until the other guest or the host commits.  `test_vfio.py` has the same
without a driver of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.doorbell.finding import doorbell_of
from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.region import open_region
from tests.guest.conftest import erase, ready
from tests.guest.harness import COMMAND_SECONDS, Guest, arm_parts, kernel_root
from tests.guest.machines import FSCK, IVSHMEMFS, MKFS, Host, Mount
from tests.guest.sleeper import MOST, announced, wakes
from tests.support.doorbell import Client, serving
from tests.support.regions import put

pytestmark = pytest.mark.guest

if arm_parts() is not None:
    pytest.skip("devices are plugged in by ACPI, x86_64 only", allow_module_level=True)

SIZE = 1 << 20
VECTORS = 2
PORT = "0000:00:19.0"  # as conftest.py has it
WAIT = "for n in $(seq 300); do {}; sleep 0.1; done; exit 1"

# The registers of BAR0: the own id, and the doorbell, which takes (client << 16) + vector.
RING = """
import mmap, os, struct, sys
registers = mmap.mmap(os.open(sys.argv[3] + "/resource0", os.O_RDWR), 256)
(me,) = struct.unpack_from("<I", registers, 8)
registers[12:16] = struct.pack("<I", int(sys.argv[1]) << 16 | int(sys.argv[2]))
print(me)
"""


def plug(guest: Guest, path: Path) -> str:
    """Add the device; returns its address in the guest."""
    backend = {"addr": {"type": "unix", "data": {"path": str(path)}}, "server": False}
    guest.qmp("chardev-add", id="bell", backend={"type": "socket", "data": backend})
    guest.qmp(
        "device_add", driver="ivshmem-doorbell", id="ringer", chardev="bell", vectors=VECTORS,
        bus="bell",
    )  # fmt: skip
    there = f"/sys/bus/pci/devices/{PORT}/0000:*"
    look = f"for d in {there}; do if [ -e $d/resource2 ]; then echo ${{d##*/}}; exit; fi; done"
    return guest.sh(WAIT.format(look)).strip()


@pytest.fixture(scope="module")
def served(
    pair: list[Guest], workplace: Path, regions: list[Path]
) -> Iterator[tuple[Path, Client, list[str]]]:
    """The file of a region, the host's client, and the device's address in each guest.

    The devices stay plugged in until their guests end.  What they have is erased.
    """
    ready(*pair)
    region, path = Path(f"{regions[0]}-bell"), workplace / "bell"
    Host().run(MKFS, "--size", str(SIZE), "--label", "bell", region).check()
    try:
        with serving(path, region, "--vectors", str(VECTORS)):
            client = Client(path).join(VECTORS)
            yield region, client, [plug(guest, path) for guest in pair]
            client.leave()
    finally:
        erase(region)
        region.unlink()


def test_guests_exchange_files_and_ring(
    served: tuple[Path, Client, list[str]], guests: list[Guest], host: Host
) -> None:
    region, client, addresses = served
    mounts = [Mount(guest, "/run/bell") for guest in guests]
    try:
        for mount, address in zip(mounts, addresses, strict=True):
            mount.sh("mkdir -p $M", timeout=COMMAND_SECONDS)
            mount.machine.run(IVSHMEMFS, "mount", f"pci:{address}", mount.place).check()
        for writer, reader in (mounts, mounts[::-1]):
            name = writer.machine.name
            written = writer.sh(f"head -c 300007 /dev/urandom | tee $M/{name} | sha256sum")
            assert reader.sh(f"sha256sum <$M/{name}") == written
    finally:
        for mount in mounts:
            mount.abandon()
    for guest in guests:
        assert guest.name in host.run(IVSHMEMFS, "ls", f"{region}:/").check().out
    host.run(FSCK, "-n", region).check()

    while len(client.peers) < 2 or min(map(len, client.peers.values())) < VECTORS:
        client.take()
    ids = []
    for vector, (guest, address) in enumerate(zip(guests, addresses, strict=True)):
        words = (str(client.id), str(vector), f"/sys/bus/pci/devices/{address}")
        done = guest.run(sys.executable, "-c", RING, *words).check()
        ids.append(int(done.out))
        assert client.rings(vector)
    assert sorted(ids) == sorted(client.peers)


def interrupts(guest: Guest) -> int:
    """How many interrupts the uio driver's devices have had."""
    lines = guest.sh("grep ivshmem_uio /proc/interrupts").splitlines()
    return sum(int(word) for line in lines for word in line.split()[1:3])


def put_by_host(region: Path, socket: Path, name: bytes) -> int:
    """Make a file as a peer on the host that rings; how many it rang."""
    with open_region(str(region)) as opened:
        doorbell = doorbell_of(opened, str(socket))
        assert doorbell is not None
        fs = Filesystem.mount(opened, doorbell=doorbell)
        try:
            put(fs, ROOT_INO, name, b"x")
            return 0 if fs.bells is None else fs.bells.rung
        finally:
            fs.unmount()
            doorbell.close()


def test_a_waiter_in_a_guest_sleeps_until_another_machine_commits(
    served: tuple[Path, Client, list[str]],
    guests: list[Guest],
    host: Host,
    drivers: Path,
    workplace: Path,
) -> None:
    region, _, addresses = served
    for guest in guests:
        modules = kernel_root().resolve()
        guest.sh(f"/sbin/modprobe -d {modules} uio; /sbin/insmod {drivers}/ivshmem_uio.ko")
    first, second = guests
    for name in ("from-guest", "from-host"):
        before = interrupts(first)
        waiting = first.begin(IVSHMEMFS, "wait", f"pci:{addresses[0]}:/{name}")
        announced(region, waiting)
        assert wakes(first, f"wait pci:{addresses[0]}") <= MOST
        if name == "from-guest":
            source = f"pci:{addresses[1]}"
            second.run(IVSHMEMFS, "put", source, "/etc/hostname", f"/{name}").check()
        else:
            assert put_by_host(region, workplace / "bell", name.encode()) == 1
        waiting.wait().check()
        assert interrupts(first) > before
    host.run(FSCK, "-n", region).check()
