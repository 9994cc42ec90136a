"""Two guests with ivshmem-doorbell devices of `ivshmemfs server`, plugged in while they run.

The host is a client of the server too, so a guest's ring is seen there.  In the guest no driver
takes interrupts, so rings go one way here; `tests/doorbell` has both ways.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.harness import COMMAND_SECONDS, Guest, arm_parts
from tests.guest.machines import FSCK, IVSHMEMFS, MKFS, Host, Mount
from tests.support.doorbell import Client, serving

pytestmark = pytest.mark.guest

if arm_parts() is not None:
    pytest.skip("devices are plugged in by ACPI, x86_64 only", allow_module_level=True)

SIZE = 4 << 20
VECTORS = 2
SLOT = 0x1A
ADDRESS = f"0000:00:{SLOT:02x}.0"
BAR = f"/sys/bus/pci/devices/{ADDRESS}"

# The registers of BAR0: the own id, and the doorbell, which takes (client << 16) + vector.
RING = f"""
import mmap, os, struct, sys
registers = mmap.mmap(os.open("{BAR}/resource0", os.O_RDWR), 256)
(me,) = struct.unpack_from("<I", registers, 8)
registers[12:16] = struct.pack("<I", int(sys.argv[1]) << 16 | int(sys.argv[2]))
print(me)
"""


def plug(guest: Guest, path: Path) -> None:
    backend = {"addr": {"type": "unix", "data": {"path": str(path)}}, "server": False}
    guest.qmp("chardev-add", id="bell", backend={"type": "socket", "data": backend})
    guest.qmp(
        "device_add", driver="ivshmem-doorbell", id="bell", chardev="bell", vectors=VECTORS,
        addr=f"{SLOT:#x}",
    )  # fmt: skip
    guest.sh(f"for n in $(seq 200); do [ -e {BAR}/resource2 ] && exit; sleep 0.1; done; exit 1")


def unplug(guest: Guest) -> None:
    guest.qmp("device_del", id="bell")
    guest.sh(f"for n in $(seq 200); do [ -e {BAR} ] || exit 0; sleep 0.1; done; exit 1")
    end = time.monotonic() + 30
    while time.monotonic() < end:  # QEMU frees the device when the guest has let it go
        try:
            guest.qmp("chardev-remove", id="bell")
            return
        except AssertionError:
            time.sleep(0.1)


@pytest.fixture
def served(
    guests: list[Guest], workplace: Path, regions: list[Path], host: Host
) -> Iterator[tuple[Path, Client]]:
    """The file of a region that both guests have by its server, and the host's client."""
    region, path = Path(f"{regions[0]}-bell"), workplace / "bell"
    host.run(MKFS, "--size", str(SIZE), "--label", "bell", region).check()
    try:
        with serving(path, region, "--vectors", str(VECTORS)):
            client = Client(path).join(VECTORS)
            for guest in guests:
                plug(guest, path)
            yield region, client
            for guest in guests:
                unplug(guest)
            client.leave()
    finally:
        region.unlink()


def test_guests_exchange_files_and_ring(
    served: tuple[Path, Client], guests: list[Guest], host: Host
) -> None:
    region, client = served
    mounts = [Mount(guest, "/run/bell") for guest in guests]
    try:
        for mount in mounts:
            mount.sh("mkdir -p $M", timeout=COMMAND_SECONDS)
            mount.machine.run(IVSHMEMFS, "mount", f"pci:{ADDRESS}", mount.place).check()
        for writer, reader in (mounts, mounts[::-1]):
            name = writer.machine.name
            written = writer.sh(f"head -c 1000003 /dev/urandom | tee $M/{name} | sha256sum")
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
    for vector, guest in enumerate(guests):
        done = guest.run(sys.executable, "-c", RING, str(client.id), str(vector)).check()
        ids.append(int(done.out))
        assert client.rings(vector)
    assert sorted(ids) == sorted(client.peers)
