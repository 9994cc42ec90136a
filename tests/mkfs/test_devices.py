"""Formatting devices: the same filesystem, wherever the region is mapped from."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from ivshmemfs import fsck
from ivshmemfs.region import Roots, create_file, open_region
from mkfs import main as command

SIZE = 1 << 20


def pci(top: Path, machine: str) -> Roots:
    """A machine with one ivshmem device."""
    device = top / "sys/bus/pci/devices/0000:00:04.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1af4\n")
    (device / "device").write_text("0x1110\n")
    (device / "enable").write_text("1\n")
    rows = [(0, 0, 0), (0, 0, 0), (0xFE000000, 0xFE000000 + SIZE - 1, 0xC)]
    text = "".join(f"{a:#018x} {b:#018x} {c:#018x}\n" for a, b, c in rows)
    (device / "resource").write_text(text)
    create_file(device / "resource2", SIZE)
    return Roots(sys=top / "sys", dev=top / "dev", machine=machine)


def physical(top: Path) -> Roots:
    """A machine whose /dev/mem has a region at 64 KiB."""
    for name in ("dev", "proc"):
        (top / name).mkdir()
    (top / "proc/iomem").write_text("")
    create_file(top / "dev/mem", 0x10000 + SIZE)
    return Roots(sys=top / "sys", dev=top / "dev", proc=top / "proc", machine="x86_64")


def formatted(roots: Roots, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "open_region", functools.partial(open_region, roots=roots))
    command.main(["--label", "device", spec])
    with open_region(spec, readonly=True, roots=roots) as region:
        assert not fsck.check(region).findings
        assert b"device" in region.memory.read(56, 64)
    with pytest.raises(SystemExit, match="1"):
        command.main([spec])


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("spec", ["pci", "pci:0000:00:04.0"])
def test_pci(spec: str, machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formatted(pci(tmp_path, machine), spec, monkeypatch)


def test_physical_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formatted(physical(tmp_path), "mem:0x10000:1M", monkeypatch)
    before, after = (tmp_path / "dev/mem").read_bytes()[:0x10000], 0x10000 + SIZE
    assert not any(before)
    assert (tmp_path / "dev/mem").stat().st_size == after
