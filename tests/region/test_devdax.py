"""Device-dax nodes: their size and alignment come from sysfs, and only whole units are mapped."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivshmemfs.errors import RegionSize
from ivshmemfs.region import NORMAL, discover, open_region, uncached
from tests.support.sysfs import SIZE, FakeMachine

ALIGN = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    """A machine with a device of 2 MiB, aligned to 1 MiB, and one that is the kernel's memory."""
    made = FakeMachine(tmp_path)
    devices = made.roots.sys / "bus/dax/devices"
    devices.mkdir(parents=True)
    for minor, (name, driver) in enumerate((("dax0.0", "device_dax"), ("dax1.0", "kmem"))):
        directory = made.described(name, f"252:{minor}", kind="dax")
        (directory / "size").write_text(f"{SIZE}\n")
        (directory / "align").write_text(f"{ALIGN}\n")
        (made.roots.sys / "bus/dax/drivers" / driver).mkdir(parents=True)
        (directory / "driver").symlink_to(made.roots.sys / "bus/dax/drivers" / driver)
        (devices / name).symlink_to(directory)
    made.in_dev("dax0.0", "252:0")
    return made


def test_the_whole_device_is_mapped_cached(machine: FakeMachine) -> None:
    (candidate,) = (one for one in discover(machine.roots) if "dax" in one.spec)
    assert candidate.description == "device-dax, 2 MiB"
    with open_region(candidate.spec, roots=machine.roots) as region:
        assert (region.size, region.memory.access) == (SIZE, NORMAL)
        assert region.kind == "device-dax"
        assert uncached(region, machine.roots) is None


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("1536K", "size 1M"),
        ("512K", "size 1M"),
        ("0x80000:1M", "offset 0"),
        ("0x180000:512K", "offset 1M"),
    ],
)
def test_parts_that_the_kernel_would_not_map_are_refused(
    part: str, said: str, machine: FakeMachine
) -> None:
    path = machine.roots.dev / "dax0.0"
    with pytest.raises(RegionSize, match="multiples of 1M only") as caught:
        open_region(f"{path}:{part}", roots=machine.roots)
    assert said in str(caught.value)


def test_an_aligned_part_is_mapped(machine: FakeMachine) -> None:
    path = machine.roots.dev / "dax0.0"
    with open_region(f"{path}:0x100000:1M", roots=machine.roots) as region:
        assert region.size == ALIGN


def test_a_device_that_tells_no_alignment_is_mapped_as_asked(machine: FakeMachine) -> None:
    path = machine.roots.dev / "dax0.0"
    for name in (machine.roots.sys / "bus/dax/devices").iterdir():
        (name / "align").write_text("what\n")
    with open_region(f"{path}:64K", roots=machine.roots) as region:
        assert region.size == 64 << 10
