"""A kernel driver holds the device, and files are exchanged through its character device.

One guest for the whole module, with our own driver (``driver/``), Debian's uio_pci_generic, a port
without room, and in the end a locked-down kernel.  The order of the tests matters only for that.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import ready
from tests.guest.harness import Completed, Guest, Recipe, arm_parts, kernel_root
from tests.guest.machines import FSCK, IVSHMEMFS, Host, Mount, manifest

pytestmark = pytest.mark.guest

if arm_parts() is not None:
    pytest.skip("the driver is built for x86_64 guests", allow_module_level=True)

Load = Callable[[str], None]
MountAll = Callable[[], list[Mount]]

COMMANDS = Path(__file__).with_name("commands.py").resolve()
NAME = "ivshmem_shared"
NODE = "/dev/ivshmem0"
PORT = 0x18  # on the guest's PCI bus
LATE_SIZE = 64 << 20  # bytes; the port's window has 2 MiB
TREE = sysconfig.get_path("stdlib") + "/json"


@pytest.fixture(scope="module")
def module_file(drivers: Path) -> Path:
    """The driver, built for the guest's kernel."""
    return drivers / f"{NAME}.ko"


@pytest.fixture(scope="module")
def driven(
    workplace: Path, recipe: Recipe, regions: list[Path], module_file: Path
) -> Iterator[Guest]:
    """A guest with the regions of the other guests, and with a port for one more."""
    late = Path(f"{regions[0]}-late")
    with late.open("wb") as file:
        file.truncate(LATE_SIZE)
    backend = f"memory-backend-file,id=late,share=on,mem-path={late},size={LATE_SIZE}"
    port = f"pcie-root-port,id=narrow,chassis=1,slot=1,addr={PORT:#x}"
    devices = ["-object", backend, "-device", port]
    machine = Guest(recipe, "driven", regions, workplace, devices)
    try:
        ready(machine)
        yield machine
    finally:
        machine.close()
        late.unlink()


@pytest.fixture
def load(driven: Guest, module_file: Path) -> Iterator[Load]:
    """Load the driver, with parameters; it is unloaded after the test."""

    def insert(parameters: str = "") -> None:
        driven.sh(f"/sbin/insmod {module_file} {parameters}")

    yield insert
    driven.sh(f"if [ -d /sys/module/{NAME} ]; then /sbin/rmmod {NAME}; fi")


@pytest.fixture
def mounts(driven: Guest, host: Host, region: Path, tmp_path: Path) -> Iterator[MountAll]:
    """Mount on the host, and in the guest what it finds; unmounted and checked afterwards."""
    here, there = Mount(host, str(tmp_path / "shared")), Mount(driven, "/run/driven")

    def mount() -> list[Mount]:
        for one, source in ((here, [str(region)]), (there, [])):
            one.machine.run("/bin/mkdir", "-p", one.place).check()
            one.machine.run(IVSHMEMFS, "mount", *source, one.place).check()
        return [here, there]

    yield mount
    for one in (there, here):
        if one.mounted():
            one.unmount()
    host.run(FSCK, "-n", region).check()


def together(guest: Guest, *commands: list[str]) -> list[Completed]:
    """What each of these commands (see commands.py) does; none may end in an internal error."""
    out = guest.run(sys.executable, COMMANDS, json.dumps(commands)).check().out
    results = [
        Completed(words, status, shown, said)
        for words, (status, shown, said) in zip(commands, json.loads(out), strict=True)
    ]
    for done in results:
        assert "internal error" not in done.err, done
        if done.argv[0] == "sh":
            done.check()
    return results


def info(spec: str) -> list[str]:
    return ["ivshmemfs", "info", spec]


LIST = ["ivshmemfs", "list"]


def address(guest: Guest, index: int) -> str:
    return guest.device(index).removeprefix("pci:")


def physical(guest: Guest, index: int) -> str:
    """The device's memory as lspci prints it."""
    line = guest.sh(f"sed -n 3p {guest.bar(index)}/resource")
    start, end = (int(word, 16) for word in line.split()[:2])
    return f"mem:0x{start:x}:{end - start + 1}"


def refused(done: Completed, *words: str) -> None:
    """It failed with one line that has these words and does not advise to format anything."""
    assert done.exit == 32, done
    assert len(done.err.splitlines()) == 1, done.err
    assert "mkfs" not in done.err
    for word in words:
        assert word in done.err


def row(listed: Completed, spec: str) -> str:
    """The one line of a list that is about this region."""
    (found,) = (line for line in listed.check().out.splitlines() if spec in line)
    return found


def test_files_are_exchanged_through_the_drivers_node(
    driven: Guest, load: Load, mounts: MountAll, host: Host
) -> None:
    load("")
    here, there = mounts()
    assert driven.name in host.run(IVSHMEMFS, "peers", driven.regions[0]).check().out
    expected = manifest(host, TREE)
    for number, (writer, reader) in enumerate(((here, there), (there, here))):
        writer.sh(f"cp -a {TREE} $M/tree{number}")
        assert reader.manifest(f"tree{number}") == expected
        written = writer.sh("head -c 3000003 /dev/urandom | tee $M/large | sha256sum")
        assert reader.sh("sha256sum <$M/large") == written
        reader.sh("mv $M/large $M/moved; echo more >>$M/moved")
        assert writer.sh("stat -c %s $M/moved; [ ! -e $M/large ]; rm $M/moved") == "3000008\n"
    append = "n=0; while [ $n -lt 100 ]; do echo {} $n >>$M/log; n=$((n+1)); done"
    running = [mount.begin(append.format(mount.machine.name)) for mount in (here, there)]
    for command in running:
        command.wait().check()
    lines = here.sh("cat $M/log").splitlines()
    for mount in (here, there):
        name = mount.machine.name
        assert [line for line in lines if line.startswith(name)] == [
            f"{name} {number}" for number in range(100)
        ]
    assert len(lines) == 200


def test_the_kernel_keeps_everybody_else_from_the_memory(
    driven: Guest, load: Load, region: Path, host: Host
) -> None:
    load("")
    listed, plain, mem, made = together(
        driven,
        LIST,
        info(f"{driven.bar(0)}/resource2"),
        info(physical(driven, 0)),
        ["mkfs.ivshmemfs", "--label", "by-node", f"{NODE[:-1]}1"],
    )
    for word in ("guest-test", NAME, NODE):
        assert word in row(listed, driven.device(0))
    assert "not formatted" in row(listed, driven.device(1))
    assert listed.err == ""
    refused(plain, NAME, NODE)
    refused(mem, NAME, NODE)
    assert "1 MiB" in made.check().out
    assert "by-node" in host.run(IVSHMEMFS, "info", driven.regions[1]).check().out


def test_nodes_without_a_parent(driven: Guest, load: Load, region: Path) -> None:
    """Of one bound device the driver's nodes are its own; of two, either may be the other's."""
    load("orphan=1")
    listed, _, shown = together(
        driven,
        LIST,
        ["sh", f"echo {address(driven, 1)} >/sys/bus/pci/drivers/{NAME}/unbind"],
        info(driven.device(0)),
    )
    assert "guest-test" in row(listed, NODE)
    assert "not formatted" in row(listed, "/dev/ivshmem1")
    assert "cannot be read" not in listed.out
    assert NODE in shown.check().out
    assert "64 MiB" in shown.out


def test_a_driver_that_maps_registers_only(driven: Guest, region: Path) -> None:
    """uio_pci_generic lets others map the memory; its own map is the registers."""
    bar, name = driven.bar(0), "uio_pci_generic"
    driven.sh(
        f"/sbin/modprobe -d {kernel_root().resolve()} {name}; echo {name} >{bar}/driver_override;"
        f" echo {address(driven, 0)} >/sys/bus/pci/drivers_probe; [ -e {bar}/uio/uio0 ]"
    )
    try:
        listed, registers = together(driven, LIST, info("/dev/uio0"))
    finally:
        driven.sh(f"echo {address(driven, 0)} >{bar}/driver/unbind; echo >{bar}/driver_override")
    assert "guest-test" in row(listed, driven.device(0))
    assert name in row(listed, driven.device(0))
    assert "/dev/uio0" not in listed.out
    refused(registers, "registers", driven.device(0))


def test_a_device_that_was_plugged_in_where_there_was_no_room(driven: Guest) -> None:
    driven.qmp("device_add", driver="ivshmem-plain", id="late", memdev="late", bus="narrow")
    place = driven.sh(
        "for n in $(seq 100); do for d in /sys/bus/pci/devices/0000:0[1-9]:*; do"
        " if [ $(cat $d/device 2>/dev/null || echo) = 0x1110 ]; then echo ${d##*/}; exit; fi;"
        " done; sleep 0.1; done"
    ).strip()
    (shown,) = together(driven, info(f"pci:{place}"))
    refused(shown, place, "got no address", "pref64-reserve", f"0000:00:{PORT:02x}.0")


def test_a_locked_down_kernel(driven: Guest, load: Load, module_file: Path, region: Path) -> None:
    """For the rest of its life the kernel refuses these to root; a driver's node works on."""
    device, mem = driven.device(0), physical(driven, 0)
    driven.sh("mount -t securityfs none /sys/kernel/security")
    before, _, by_node, _, *closed = together(
        driven,
        info(mem),
        ["sh", f"/sbin/insmod {module_file}; echo integrity >/sys/kernel/security/lockdown"],
        info(device),
        ["sh", f"/sbin/rmmod {NAME}"],
        info(mem),
        info(device),
    )
    assert "guest-test" in before.check().out
    assert NODE in by_node.check().out
    for done in closed:
        refused(done, "locked down (integrity", "signed")
