"""Guests for a whole test run: booting takes far longer than most of what is tested in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.harness import (
    Guest,
    GuestError,
    Recipe,
    arm_parts,
    kernel_root,
    make_recipe,
    missing_parts,
)
from tests.guest.machines import FSCK, IVSHMEMFS, MKFS, Host, Machine, Mount

SIZES = (64 << 20, 1 << 20)
# How guests get at the memory.  On ARM64 the second is device memory, which is another way of
# touching it; elsewhere it is only slower.
ROUTES = ("pci", "resource2") if arm_parts() else ("pci",)
_PREFIX = "ivshmemfs-guest-test-"


@pytest.fixture(scope="session")
def workplace() -> Iterator[Path]:
    """A directory for sockets and logs; short, because socket paths are limited."""
    missing = missing_parts()
    if missing:
        text = f"{missing}: run 'sh scripts/setup --guest'"
        if os.environ.get("IVSHMEMFS_TEST_GUEST") == "required":
            pytest.fail(text)
        pytest.skip(text)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def regions() -> Iterator[list[Path]]:
    """The files behind the guests' devices: 64 MiB and 1 MiB, not formatted."""
    for old in Path("/dev/shm").glob(_PREFIX + "*"):
        if not Path("/proc", old.name.removeprefix(_PREFIX).split("-")[0]).exists():
            old.unlink()
    paths = [Path(f"/dev/shm/{_PREFIX}{os.getpid()}-{index}") for index in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        with path.open("wb") as file:
            file.truncate(size)
    yield paths
    for path in paths:
        path.unlink()


@pytest.fixture(scope="session")
def recipe(workplace: Path) -> Recipe:
    """How all guests boot."""
    return make_recipe(workplace)


@pytest.fixture(scope="session")
def pair(workplace: Path, recipe: Recipe, regions: list[Path]) -> Iterator[list[Guest]]:
    modest = arm_parts() is None  # by hand, so that no other run waits for the machine
    # A port for test_doorbell.py; the ARM64 machine has none.
    port = ["-device", "pcie-root-port,id=bell,chassis=9,slot=9,addr=0x19"] if modest else []
    guests = [
        Guest(recipe, name, regions, workplace, port, modest=modest)
        for name in ("guest1", "guest2")
    ]
    yield guests
    for guest in guests:
        guest.close()


@pytest.fixture(scope="session")
def drivers(workplace: Path) -> Path:
    """Where our kernel modules are (`driver/`), built for the guest's kernel."""
    headers = next(
        (kernel_root().resolve() / "headers/usr/src").glob("linux-headers-*-amd64"), None
    )
    assert headers is not None, "no headers of the guest's kernel: run 'sh scripts/setup --guest'"
    place = workplace / "driver"
    shutil.copytree(Path(__file__).with_name("driver"), place)
    made = subprocess.run(
        ["make", "-C", headers, f"M={place}", "KCFLAGS=-Werror", "modules"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    return place


def ready(*guests: Guest) -> None:
    """Boot the guests that are not up, at the same time."""
    for guest in guests:
        if guest.failed_to_boot:
            pytest.fail(f"{guest.name} did not boot for an earlier test")
        if not guest.running:
            guest.start()
    for guest in guests:
        guest.wait_ready()


@pytest.fixture
def guest(pair: list[Guest]) -> Guest:
    """A guest with the 64 MiB and the 1 MiB region."""
    ready(pair[0])
    return pair[0]


@pytest.fixture
def guests(pair: list[Guest]) -> list[Guest]:
    """Two guests on the same regions."""
    ready(*pair)
    return pair


@pytest.fixture
def host() -> Host:
    return Host()


def erase(path: Path) -> None:
    """Zero a region in place: QEMU has it mapped, so it is not made anew."""
    zeros = bytes(1 << 20)
    with path.open("r+b") as file:
        for _ in range(path.stat().st_size // len(zeros)):
            file.write(zeros)


@pytest.fixture
def blank(regions: list[Path]) -> Iterator[list[Path]]:
    """The regions with nothing on them, before and after."""
    for path in regions:
        erase(path)
    yield regions
    for path in regions:
        erase(path)


@pytest.fixture
def region(blank: list[Path], host: Host) -> Path:
    """The 64 MiB region, formatted."""
    host.run(MKFS, "--label", "guest-test", blank[0]).check()
    return blank[0]


class Shared:
    """The 64 MiB region mounted on several machines, for all tests of a module.

    Mounting in a guest takes seconds without KVM, so a mount stays until its machine dies.
    """

    def __init__(self, region: Path, place: Path, route: str) -> None:
        self.region = region
        self.route = route
        self._place = place
        self._mounts: dict[str, Mount] = {}

    def on(self, machine: Machine) -> Mount:
        """The mount on this machine, made when there is none."""
        mount = self._mounts.get(machine.name)
        if mount is not None and mount.mounted():
            return mount
        if isinstance(machine, Guest):
            place, source = "/run/shared", self.source(machine)
        else:
            place, source = str(self._place), str(self.region)
        machine.run("/bin/mkdir", "-p", place).check()
        machine.run(IVSHMEMFS, "mount", source, place).check()
        self._mounts[machine.name] = Mount(machine, place)
        return self._mounts[machine.name]

    def source(self, guest: Guest) -> str:
        """The region as the commands in a guest name it."""
        return guest.device(0) if self.route == "pci" else f"{guest.bar(0)}/{self.route}"

    def check(self, host: Host) -> None:
        """Nothing is wrong on the region, also while it is mounted."""
        host.run(FSCK, "-n", self.region).check()

    def close(self) -> None:
        """Unmount everywhere; by force what is still in use after an interrupted test."""
        for mount in self._mounts.values():
            if mount.mounted():
                try:
                    mount.unmount()
                except GuestError as error:
                    warnings.warn(f"{mount.machine.name}: {error}", stacklevel=1)
                    mount.abandon()


@pytest.fixture(scope="module", params=ROUTES)
def module_region(
    request: pytest.FixtureRequest, regions: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    host = Host()
    for path in regions:
        erase(path)
    host.run(MKFS, "--label", "guest-test", regions[0]).check()
    shared = Shared(regions[0], tmp_path_factory.mktemp("host") / "shared", request.param)
    yield shared
    shared.close()
    shared.check(host)
    for path in regions:
        erase(path)


@pytest.fixture
def shared(module_region: Shared, host: Host) -> Iterator[Shared]:
    """The shared region, empty before each test and sound after it."""
    module_region.on(host).sh("rm -rf $M/*")
    yield module_region
    module_region.check(host)
