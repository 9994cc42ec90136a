"""Devices of PCI revision 0 (the `ivshmem` of older QEMU) and of revision 1, side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivshmemfs.region import discover, open_region
from tests.support.sysfs import ONE, START, TWO, FakeMachine


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    made = FakeMachine(tmp_path)
    made.device(ONE, revision=0)
    made.device(TWO, revision=1, start=START + (16 << 20))
    return made


def test_both_are_found_and_each_is_opened_by_its_address(machine: FakeMachine) -> None:
    specs = [candidate.spec for candidate in discover(machine.roots)]
    assert specs == [f"pci:{ONE}", f"pci:{TWO}"]
    for number, spec in enumerate(specs):
        with open_region(spec, roots=machine.roots) as region:
            region.memory.store(64, number + 1)
    for number, spec in enumerate(specs):
        with open_region(spec, readonly=True, roots=machine.roots) as region:
            assert region.memory.load(64) == number + 1
            assert region.path.name == "resource2_wc"


def test_a_label_tells_them_apart(machine: FakeMachine) -> None:
    with open_region(f"pci:{ONE}", roots=machine.roots) as region:
        region.memory.write(0, b"legacy--")
    found = lambda page: ("old", "u") if page.startswith(b"legacy") else None  # noqa: E731
    with open_region("label=old", identify=found, roots=machine.roots) as region:
        assert region.spec == f"pci:{ONE}"
