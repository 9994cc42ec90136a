"""The drivers that hold ivshmem devices, and the nodes (character devices) that they made.

The driver chooses class and name of its nodes.  A node belongs to a device in one of three cases:

- Its directory in sysfs lies below the PCI device's: the driver named its parent.
- It has no parent (/sys/devices/virtual), and a name fits.  The driver or its module has the name
  of the node, of its class, or of its major number in /proc/devices.
- "ivshmem" is part of such a name, and exactly one device has a driver without other nodes.

The last two cases may fit several devices; then the node stays unassigned.  This module never opens
a node.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ivshmemfs.region.pci import PciDevice, find_devices
from ivshmemfs.region.roots import HERE, Roots

NAMED = ("ivshmem", "kvmfr")  # parts of names of nodes that the survey always looks at
NO_MEMORY = ("vfio", "vfio-dev")  # classes of nodes whose mmap(2) does not give device memory
NO_NODES = ("vfio-pci", "pci-stub")  # drivers without nodes of other classes
_NUMBER = re.compile(r"[-_.!]?[0-9]+$")


@dataclass(frozen=True)
class DriverNode:
    """A character device; `path` need not exist (a container's /dev, a node made by hand)."""

    path: Path
    number: str  # "240:0"
    there: bool
    names: frozenset[str] = field(
        default=frozenset(), repr=False
    )  # of the node, its class and its major number


@dataclass(frozen=True)
class Holding:
    """An ivshmem device, the driver bound to it ("" without one), and that driver's nodes."""

    device: PciDevice
    driver: str
    nodes: tuple[DriverNode, ...]


@dataclass(frozen=True)
class DriverSurvey:
    """All ivshmem devices, and the nodes whose device is not certain."""

    holdings: list[Holding]
    unclear: list[
        tuple[DriverNode, list[PciDevice]]
    ]  # with the devices whose memory the node may give

    def at(self, address: str) -> Holding | None:
        """Return the device with this PCI address, or None."""
        return next((held for held in self.holdings if held.device.address == address), None)

    def behind(self, number: str) -> list[PciDevice]:
        """Return the devices whose memory the node with this number gives, or may give."""
        for held in self.holdings:
            if any(node.number == number for node in held.nodes):
                return [held.device]
        return next((devices for node, devices in self.unclear if node.number == number), [])


def named_nodes(held: Holding) -> str:
    """Return the nodes of a device for a message; a phrase when none is known."""
    return " or ".join(str(node.path) for node in held.nodes) or "that driver's character device"


def sysfs_directory(number: str, roots: Roots = HERE) -> Path:
    """Return the directory where sysfs describes the character device "major:minor"."""
    return roots.sys / "dev/char" / number


# --- uio ------------------------------------------------------------------------------------


def _value(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii").strip(), 0)
    except (OSError, ValueError):
        return 0


def uio_maps(directory: Path) -> Iterator[tuple[int, int, int]]:
    """Yield (number, physical address, bytes) of the maps of a uio device."""
    for entry in sorted((directory / "maps").glob("map*")):
        if entry.name[3:].isdecimal():
            size = _value(entry / "size") - _value(entry / "offset")
            yield int(entry.name[3:]), _value(entry / "addr"), size


def shared_map(directory: Path, device: PciDevice) -> tuple[int, int] | None:
    """Return (number, bytes) of the uio map that is the device's shared memory, or None."""
    for number, address, size in uio_maps(directory):
        if device.size and address == device.start and size > 0:
            return number, min(size, device.size)
    return None


# --- looking --------------------------------------------------------------------------------


def _linked(path: Path) -> str:
    """Return the name of a sysfs link's target, "" without a link."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return ""


def _target(link: Path) -> Path:
    """Return the target of a sysfs link, without following links on the way."""
    try:
        return Path(os.path.normpath(link.parent / os.readlink(link)))
    except OSError:
        return link


def _folded(*names: str) -> frozenset[str]:
    return frozenset(name.lower().replace("-", "_") for name in names if name)


def _has_part(names: frozenset[str], parts: tuple[str, ...]) -> bool:
    return any(part in name for name in names for part in parts)


def _driver_names(device: PciDevice) -> frozenset[str]:
    driver = device.directory / "driver"
    return _folded(_linked(driver), _linked(driver / "module"))


def _majors(roots: Roots) -> dict[str, str]:
    """Return the names under which drivers registered the major numbers of character devices."""
    try:
        text = (roots.proc / "devices").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    words = (line.split() for line in text.partition("Block devices:")[0].splitlines())
    return {pair[0]: pair[1] for pair in words if len(pair) == 2 and pair[0].isdecimal()}


def _device_name(directory: Path) -> str:
    """Return the path below /dev that the kernel gives the node."""
    try:
        lines = (directory / "uevent").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = (line.partition("=")[2] for line in lines if line.startswith("DEVNAME="))
    return next(found, "") or directory.name.replace("!", "/")


def _has_number(path: Path, number: str, roots: Roots) -> bool:
    try:
        return roots.device_number(path) == number
    except (OSError, ValueError):
        return False


def _place(name: str, number: str, roots: Roots) -> tuple[Path, bool]:
    """Return (path of a node, whether it exists); the node may have an unusual name."""
    usual = roots.dev / name
    if _has_number(usual, number, roots):
        return usual, True
    try:
        others = sorted(roots.dev.iterdir())
    except OSError:
        others = []
    found = next((path for path in others if _has_number(path, number, roots)), None)
    return (usual, False) if found is None else (found, True)


class _Look:
    """One survey of sysfs and then of /dev, which assigns each node to its possible devices."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._majors = _majors(roots)
        self._seen: set[str] = set()
        self.devices = list(find_devices(roots))
        self.certain: dict[str, list[DriverNode]] = {device.address: [] for device in self.devices}
        self.loose: list[tuple[DriverNode, list[PciDevice]]] = []

    def at_sysfs(self) -> None:
        """Assign the nodes below the devices, and those without a parent whose names fit."""
        places = {_target(device.directory): device for device in self.devices}
        virtual = self._roots.sys / "devices/virtual"
        drivers = frozenset().union(*(_driver_names(device) for device in self.devices))
        loose = []
        for number, directory in self._described():
            owner = next((places[above] for above in directory.parents if above in places), None)
            if owner is not None:
                self._seen.add(number)
                if self._gives_memory(directory, owner):
                    self.certain[owner.address].append(self._node(number, directory))
            elif virtual in directory.parents:
                names = self._names(number, directory.name, directory.parent.name)
                if names & drivers or _has_part(names, NAMED):
                    self._seen.add(number)
                    loose.append(self._node(number, directory, names))
        self.loose += [(node, self._possible(node)) for node in loose]

    def at_dev(self) -> None:
        """Assign the nodes that sysfs does not describe, or below another device."""
        found = sorted(path for name in NAMED for path in self._roots.dev.glob(f"*{name}*"))
        for path in found:
            try:
                number = self._roots.device_number(path)
            except OSError:
                continue
            if number is None or number in self._seen:
                continue
            self._seen.add(number)
            node = DriverNode(path, number, True, self._names(number, path.name))
            known = sysfs_directory(number, self._roots).exists()
            self.loose.append((node, [] if known else self._possible(node)))

    def _described(self) -> Iterator[tuple[str, Path]]:
        try:
            links = sorted((self._roots.sys / "dev/char").iterdir())
        except OSError:
            return
        for link in links:
            yield link.name, _target(link)

    @staticmethod
    def _gives_memory(directory: Path, owner: PciDevice) -> bool:
        if (directory / "maps").is_dir():
            return shared_map(directory, owner) is not None
        return _linked(directory / "subsystem") not in NO_MEMORY

    def _names(self, number: str, name: str, kind: str = "") -> frozenset[str]:
        major = self._majors.get(number.partition(":")[0], "")
        return _folded(_NUMBER.sub("", name), kind, major)

    def _node(
        self, number: str, directory: Path, names: frozenset[str] = frozenset()
    ) -> DriverNode:
        path, there = _place(_device_name(directory), number, self._roots)
        return DriverNode(path, number, there, names)

    def _possible(self, node: DriverNode) -> list[PciDevice]:
        """Return the devices whose memory a node without a parent may give."""
        free = [
            device
            for device in self.devices
            if _linked(device.directory / "driver") not in ("", *NO_NODES)
            and not self.certain[device.address]
        ]
        same = [device for device in free if node.names & _driver_names(device)]
        return same or (free if _has_part(node.names, ("ivshmem",)) else [])


def survey(roots: Roots = HERE) -> DriverSurvey:
    """Return all ivshmem devices, the drivers bound to them, and the nodes of those drivers."""
    look = _Look(roots)
    look.at_sysfs()
    look.at_dev()
    nodes = look.certain
    for node, devices in look.loose:
        if len(devices) == 1:
            nodes[devices[0].address].append(node)
    holdings = [
        Holding(device, _linked(device.directory / "driver"), tuple(nodes[device.address]))
        for device in look.devices
    ]
    return DriverSurvey(holdings, [(node, may) for node, may in look.loose if len(may) != 1])
