"""A machine's /sys, /dev and /proc as far as ivshmem devices show there, made of plain files."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ivshmemfs.region import Memory, Roots, create_file
from ivshmemfs.region import mapped as mapped_module

SIZE = 2 << 20
START = 0xFE000000
REGISTERS = 0xFEBF1000
ONE, TWO = "0000:00:04.0", "0000:00:05.0"


@dataclass(frozen=True)
class FakeRoots(Roots):
    """Roots where some plain files count as character devices."""

    numbers: dict[Path, str] = field(default_factory=dict)

    def device_number(self, path: Path) -> str | None:
        path.stat()
        return self.numbers.get(path.resolve())


class FakeMachine:
    """Builds the directories below a temporary one; each method adds what its name says."""

    def __init__(self, top: Path, machine: str = "x86_64") -> None:
        self.roots = FakeRoots(sys=top / "sys", dev=top / "dev", proc=top / "proc", machine=machine)
        for directory in (self.roots.sys / "dev/char", self.roots.dev, self.roots.proc):
            directory.mkdir(parents=True)
        self._bus = self.roots.sys / "bus/pci"
        (self._bus / "devices").mkdir(parents=True)

    def device(
        self,
        address: str = ONE,
        *,
        start: int = START,
        size: int = SIZE,
        flags: int = 0x14220C,
        kind: int = 0x1110,
        revision: int = 1,
        behind: str = "",
    ) -> Path:
        """A PCI device with its memory; `behind` is the bridge above it, if there is one."""
        above = self.roots.sys / "devices/pci0000:00"
        if behind:
            above /= behind
            above.mkdir(parents=True, exist_ok=True)
            (above / "class").write_text("0x060400\n")
        directory = above / address
        directory.mkdir(parents=True)
        (self._bus / "devices" / address).symlink_to(directory)
        (directory / "vendor").write_text("0x1af4\n")
        (directory / "device").write_text(f"{kind:#06x}\n")
        (directory / "revision").write_text(f"{revision:#04x}\n")
        (directory / "enable").write_text("1\n")
        config = bytearray(64)
        config[0x18:0x1C] = (start & 0xFFFFFFF0 | 0xC).to_bytes(4, "little")
        (directory / "config").write_bytes(config)
        lines = [(REGISTERS, REGISTERS + 0xFF, 0x40200), (0, 0, 0)]
        lines.append((start, start + size - 1, flags) if size else (0, 0, 0))
        (directory / "resource").write_text(
            "".join(f"{a:#018x} {b:#018x} {c:#018x}\n" for a, b, c in lines)
        )
        if size:
            create_file(directory / "resource2", size)
            os.link(directory / "resource2", directory / "resource2_wc")
        return directory

    def place(self, address: str) -> Path:
        return self._bus / "devices" / address

    def bind(self, address: str, driver: str, module: str = "") -> None:
        """Bind a driver; it does not request the BAR (see `hold`)."""
        directory = self._bus / "drivers" / driver
        directory.mkdir(parents=True, exist_ok=True)
        (self.place(address) / "driver").symlink_to(directory)
        if module and not (directory / "module").exists():
            (self.roots.sys / "module" / module).mkdir(parents=True)
            (directory / "module").symlink_to(self.roots.sys / "module" / module)

    def described(self, name: str, number: str, parent: str = "", kind: str = "") -> Path:
        """A character device in sysfs alone, below a PCI device or without a parent."""
        kind = kind or "ivshmem"
        above = self.place(parent).resolve() if parent else self.roots.sys / "devices/virtual"
        directory = above / kind / name
        directory.mkdir(parents=True)
        (directory / "dev").write_text(f"{number}\n")
        (directory / "uevent").write_text(f"MAJOR=1\nMINOR=2\nDEVNAME={name}\n")
        (directory / "subsystem").symlink_to(self.roots.sys / "class" / kind)
        if parent:
            (directory / "device").symlink_to(self.place(parent).resolve())
        (self.roots.sys / "dev/char" / number).symlink_to(directory)
        return directory

    def in_dev(self, name: str, number: str, memory: str = "") -> Path:
        """A character device in /dev alone; `memory`: the PCI device whose bytes it maps."""
        path = self.roots.dev / name
        if memory:
            os.link(self.place(memory) / "resource2", path)
        else:
            create_file(path, SIZE)
        self.roots.numbers[path] = number
        return path

    def node(self, name: str, number: str, parent: str, kind: str = "") -> Path:
        """A driver's character device as it should be."""
        self.described(name, number, parent, kind)
        return self.in_dev(name, number, parent)

    def uio(self, number: str, parent: str, maps: list[tuple[int, int]]) -> Path:
        """/dev/uio0 with maps (address, bytes)."""
        directory = self.described("uio0", number, parent, "uio")
        for index, (address, size) in enumerate(maps):
            entry = directory / f"maps/map{index}"
            entry.mkdir(parents=True)
            (entry / "addr").write_text(f"{address:#018x}\n")
            (entry / "size").write_text(f"{size:#018x}\n")
            (entry / "offset").write_text("0x0\n")
        path = self.roots.dev / "uio0"
        create_file(path, SIZE + len(maps) * os.sysconf("SC_PAGE_SIZE"))
        self.roots.numbers[path] = number
        return path

    def majors(self, names: dict[int, str]) -> None:
        """/proc/devices."""
        lines = "".join(f"{major:3} {name}\n" for major, name in names.items())
        text = f"Character devices:\n  1 mem\n{lines}\nBlock devices:\n  8 sd\n"
        (self.roots.proc / "devices").write_text(text)

    def lockdown(self, level: str) -> None:
        levels = ("none", "integrity", "confidentiality")
        path = self.roots.sys / "kernel/security/lockdown"
        path.parent.mkdir(parents=True)
        path.write_text(" ".join(f"[{one}]" if one == level else one for one in levels) + "\n")


def hold(monkeypatch: pytest.MonkeyPatch, code: int = errno.EINVAL) -> None:
    """Let the kernel refuse to map resource2 and /dev/mem, as when a driver requested the BAR."""

    def make(descriptor: int, *args: int, **named: int) -> Memory:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if name.startswith(("resource2", "mem")):
            raise OSError(code, os.strerror(code))
        return Memory(descriptor, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(mapped_module, "Memory", make)
    monkeypatch.setattr("ivshmemfs.region.devmem.Memory", make)
