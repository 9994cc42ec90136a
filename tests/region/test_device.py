"""The same tests on the shared memory of a real ivshmem device, by every route to it.

They destroy what is on the device, so they run only where IVSHMEMFS_TEST_DEVICE names one, as in
``IVSHMEMFS_TEST_DEVICE=pci:0000:00:04.0``.  scripts/aarch64-check does so in an ARM64 guest, where
`resource2` is device memory and faults on every access that is not an aligned word.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.region import (
    DEVICE,
    NORMAL,
    Blocks,
    Memory,
    Region,
    Scratch,
    discover,
    open_region,
    probe,
    refuse_unfit,
    uncached,
)
from tests.region.conftest import BLOCK, COUNT, DATA, SIZE, TAGS
from tests.region.contract import BlocksContract, MemoryContract

SPEC = os.environ.get("IVSHMEMFS_TEST_DEVICE", "")
ARM = platform.machine() == "aarch64"

if not SPEC:
    pytest.skip(
        "destroys what is on a device: IVSHMEMFS_TEST_DEVICE must name it", allow_module_level=True
    )


def sysfs() -> Path:
    return Path("/sys/bus/pci/devices") / SPEC.removeprefix("pci:")


def physical() -> str:
    """The mem: spec of the device's BAR2."""
    start, end = (int(n, 16) for n in (sysfs() / "resource").read_text().split("\n")[2].split()[:2])
    return f"mem:{start:#x}:{end - start + 1}"


def map_file(name: str, access: int) -> Memory:
    descriptor = os.open(sysfs() / name, os.O_RDWR)
    try:
        return Memory(descriptor, (sysfs() / name).stat().st_size, access=access)
    finally:
        os.close(descriptor)


@pytest.fixture(params=["pci", "resource2", "mem"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    region: Region | None = None
    if request.param == "resource2":
        made = map_file("resource2", DEVICE)
    else:
        region = open_region(SPEC if request.param == "pci" else physical())
        made = region.memory
    made.zero(0, SIZE)
    yield made
    made.trap(0, None)
    made.close()


@pytest.fixture
def blocks(memory: Memory) -> Blocks:
    return Blocks(memory, TAGS, DATA, BLOCK, COUNT)


class TestMemory(MemoryContract):
    pass


class TestBlocks(BlocksContract):
    pass


def test_the_device_is_found() -> None:
    assert SPEC in [candidate.spec for candidate in discover()]
    with open_region("pci") as region:
        assert region.spec == SPEC
        assert region.path.name == "resource2_wc"


def test_the_write_combining_mapping_bears_anything() -> None:
    with open_region(SPEC) as region:
        found = probe(region.memory, Scratch(8192, 8192))
        assert found.unaligned_ok
        assert found.cas_ok
        refuse_unfit(found, region.spec)
        print(region.description, found.describe(), uncached(region))


def test_all_routes_lead_to_the_same_words() -> None:
    plain = map_file("resource2", DEVICE)
    with open_region(SPEC) as pci, open_region(physical()) as mem:
        routes = [pci.memory, mem.memory, plain]
        for number, route in enumerate(routes):
            route.store(64, number)
            assert [other.load(64) for other in routes] == [number] * 3
            assert routes[number - 1].cas(64, number, number + 10) == number
            assert [other.load(64) for other in routes] == [number + 10] * 3
    plain.close()


@pytest.mark.skipif(not ARM, reason="only ARM64 has memory that refuses unaligned accesses")
class TestDeviceMemory:
    def test_unaligned_accesses_are_refused_by_the_processor(self) -> None:
        plain = map_file("resource2", DEVICE)
        assert not plain.unaligned_ok(0)
        assert not probe(plain, Scratch(8192, 8192)).unaligned_ok
        plain.close()

    def test_an_ordinary_copy_is_an_error_and_not_the_end(self) -> None:
        wrong = map_file("resource2", NORMAL)
        # Whole pages: shorter copies may use vector loads of single bytes, which pass.
        for call in (
            lambda: wrong.read(1, 4096),
            lambda: wrong.write(3, bytes(4096)),
            lambda: wrong.zero(5, 4096),
        ):
            with pytest.raises(OSError, match="bus error at offset") as caught:
                call()
            assert caught.value.errno == errno.EIO
        wrong.close()

    def test_swapping_works_there(self) -> None:
        plain = map_file("resource2", DEVICE)
        assert probe(plain, Scratch(64, 8)).cas_ok
        plain.close()


def test_leave_a_mark_for_the_host() -> None:
    with open_region(SPEC) as region:
        region.memory.write(region.size - 16, b"seen by a guest!")
        region.memory.fence()
        assert region.memory.read(region.size - 16, 16) == b"seen by a guest!"
