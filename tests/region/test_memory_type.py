"""A mapping is told to be uncached by its kind and the kernel's list, never by its speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivshmemfs.region import open_region, uncached
from tests.support.sysfs import ONE, SIZE, START, FakeMachine


def test_the_kinds_of_mappings(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    directory = machine.device()
    with open_region(f"pci:{ONE}", roots=machine.roots) as region:
        assert uncached(region, machine.roots) is None
    with open_region(str(directory / "resource2"), roots=machine.roots) as region:
        said = uncached(region, machine.roots) or ""
        assert "not cached (resource2" in said
        assert "resource2_wc" in said
        assert "MB/s" not in said
    with open_region(str(directory / "resource2")) as region:
        assert region.kind != "file"


def test_device_memory_of_arm_is_uncached(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, "aarch64")
    directory = machine.device()
    with open_region(str(directory / "resource2"), roots=machine.roots) as region:
        assert "device memory" in (uncached(region, machine.roots) or "")


@pytest.mark.parametrize(
    ("line", "name", "bad"),
    [
        ("PAT: [mem 0x{:016x}-0x{:016x}] write-back", "resource2", False),
        ("PAT: [mem 0x{:016x}-0x{:016x}] uncached-minus", "resource2_wc", True),
        ("PAT: [mem 0x{:016x}-0x{:016x}] write-combining", "resource2_wc", False),
        ("uncached @ 0x{:x}-0x{:x}", "resource2_wc", True),
        ("PAT: [mem 0xzz-0x{:x}] {:x}", "resource2_wc", False),
    ],
)
def test_the_kernels_list_decides(line: str, name: str, bad: bool, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    path = machine.device() / name
    types = machine.roots.sys / "kernel/debug/x86/pat_memtype_list"
    types.parent.mkdir(parents=True)
    elsewhere = "PAT: [mem 0x0000000000001000-0x0000000000002000] uncached\n"
    types.write_text(f"PAT memtype list:\n{elsewhere}{line.format(START, START + SIZE)}\n")
    with open_region(str(path), roots=machine.roots) as region:
        assert (uncached(region, machine.roots) is not None) == bad


def test_a_file_is_cached(tmp_path: Path) -> None:
    (tmp_path / "region").write_bytes(bytes(1 << 20))
    with open_region(str(tmp_path / "region")) as region:
        assert uncached(region) is None
