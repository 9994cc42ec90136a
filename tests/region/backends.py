"""Ways to a region of 2 MiB: a file, and devices in a faked /sys and /dev."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ivshmemfs.region import (
    DEVICE,
    NORMAL,
    WRITE_COMBINING,
    Region,
    Roots,
    create_file,
    open_region,
)
from tests.support.sysfs import FakeRoots

SIZE = 2 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Backend:
    """How to open it, and the file behind it with the place of its first byte."""

    spec: str
    roots: Roots
    file: Path
    start: int
    access: int

    def open(self, readonly: bool = False) -> Region:
        return open_region(self.spec, readonly=readonly, roots=self.roots)


def make_file(directory: Path) -> Backend:
    path = directory / "region"
    create_file(path, SIZE)
    return Backend(str(path), Roots(), path, 0, NORMAL)


def make_pci(
    tmp_path: Path, *, combining: bool, machine: str, address: str = "0000:00:04.0"
) -> Backend:
    roots = Roots(sys=tmp_path / "sys", dev=tmp_path / "dev", machine=machine)
    device = roots.sys / "bus/pci/devices" / address
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1af4\n")
    (device / "device").write_text("0x1110\n")
    (device / "enable").write_text("0\n")
    lines = [(0xFEBF1000, 0xFEBF10FF, 0x40200), (0, 0, 0), (0xFE000000, 0xFE000000 + SIZE - 1, 0xC)]
    (device / "resource").write_text(
        "".join(f"{a:#018x} {b:#018x} {c:#018x}\n" for a, b, c in lines)
    )
    file = device / "resource2"
    create_file(file, SIZE)
    if combining:
        os.link(file, device / "resource2_wc")
    access = WRITE_COMBINING if combining or machine == "x86_64" else DEVICE
    return Backend(f"pci:{address}", roots, file, 0, access)


def by_resource(device: Backend, name: str) -> Backend:
    """The same device by one of its files in sysfs."""
    access = DEVICE if name == "resource2" else WRITE_COMBINING
    spec = str(device.file.with_name(name))
    return Backend(spec, device.roots, device.file, device.start, access)


def make_mem(tmp_path: Path, machine: str) -> Backend:
    roots = Roots(
        sys=tmp_path / "sys", dev=tmp_path / "dev", proc=tmp_path / "proc", machine=machine
    )
    roots.dev.mkdir()
    roots.proc.mkdir()
    (roots.proc / "iomem").write_text("00000000-0000ffff : System RAM\n  00001000-0000 : x\n")
    file = roots.dev / "mem"
    create_file(file, 0x20000 + SIZE)
    access = WRITE_COMBINING if machine == "x86_64" else DEVICE
    return Backend("mem:0x20000:2M", roots, file, 0x20000, access)


def make_uio(tmp_path: Path) -> Backend:
    """A uio device that is not on the PCI bus."""
    roots = FakeRoots(sys=tmp_path / "sys", dev=tmp_path / "dev", machine="x86_64")
    roots.dev.mkdir()
    file = roots.dev / "uio0"
    create_file(file, PAGE + SIZE)
    maps = roots.sys / "dev/char/0:0/maps"
    for number, size in ((0, 256), (1, SIZE)):
        entry = maps / f"map{number}"
        entry.mkdir(parents=True)
        (entry / "size").write_text(f"{size:#018x}\n")
        (entry / "offset").write_text("0x0\n")
    (maps / "mapx").mkdir()
    roots.numbers[file] = "0:0"
    return Backend(str(file), roots, file, PAGE, WRITE_COMBINING)
