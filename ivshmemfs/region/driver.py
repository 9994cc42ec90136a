"""The drivers that hold ivshmem devices, and the nodes (character devices) that they made.

The driver chooses class and name of its nodes.  A node belongs to a device in one of three cases:

- Its directory in sysfs lies below the PCI device's: the driver named its parent.
- It has no parent (/sys/devices/virtual), and the driver or its module has the name of the node,
  of its class, or of its major number in /proc/devices.
- "ivshmem" is part of such a name, and exactly one device is held by a driver without other nodes.

The last two may fit several devices; then nothing is guessed.  Nothing here opens a node.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ivshmemfs.region.pci import PciDevice, find_devices
from ivshmemfs.region.roots import HERE, Roots

NAMED = ("ivshmem", "kvmfr")  # parts of names: such nodes are always looked at
NO_MEMORY = ("vfio", "vfio-dev")  # classes of nodes whose mmap(2) gives no memory of the device
NO_NODES = ("vfio-pci", "pci-stub")  # drivers without nodes of other classes
_NUMBER = re.compile(r"[-_.!]?[0-9]+$")


@dataclass(frozen=True)
class Node:
    """A character device; `path` need not exist (a container's /dev, a node made by hand)."""

    path: Path
    number: str  # "240:0"
    there: bool
    names: frozenset[str] = field(
        default=frozenset(), repr=False
    )  # its own, its class's, its major's


@dataclass(frozen=True)
class Holding:
    """An ivshmem device, the driver bound to it ("" without one), and that driver's nodes."""

    device: PciDevice
    driver: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Survey:
    """All ivshmem devices, and the nodes of which the device is not certain."""

    holdings: list[Holding]
    unclear: list[tuple[Node, list[PciDevice]]]  # the devices whose memory it may give

    def at(self, address: str) -> Holding | None:
        """The device with this PCI address."""
        return next((held for held in self.holdings if held.device.address == address), None)

    def behind(self, number: str) -> list[PciDevice]:
        """The devices whose memory the node with this number gives, or may give."""
        for held in self.holdings:
            if any(node.number == number for node in held.nodes):
                return [held.device]
        return next((devices for node, devices in self.unclear if node.number == number), [])


def named_nodes(held: Holding) -> str:
    """The nodes of a device as a message names them; words for them when none is known."""
    return " or ".join(str(node.path) for node in held.nodes) or "that driver's character device"


def sysfs_directory(number: str, roots: Roots = HERE) -> Path:
    """Where sysfs describes the character device "major:minor"."""
    return roots.sys / "dev/char" / number


# --- uio ------------------------------------------------------------------------------------


def _value(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii").strip(), 0)
    except (OSError, ValueError):
        return 0


def uio_maps(directory: Path) -> Iterator[tuple[int, int, int]]:
    """(number, physical address, bytes) of what a uio device maps."""
    for entry in sorted((directory / "maps").glob("map*")):
        if entry.name[3:].isdecimal():
            size = _value(entry / "size") - _value(entry / "offset")
            yield int(entry.name[3:]), _value(entry / "addr"), size


def shared_map(directory: Path, device: PciDevice) -> tuple[int, int] | None:
    """(number, bytes) of the uio map that is the device's shared memory; others are registers."""
    for number, address, size in uio_maps(directory):
        if device.size and address == device.start and size > 0:
            return number, min(size, device.size)
    return None


# --- looking --------------------------------------------------------------------------------


def _linked(path: Path) -> str:
    """The name of what a link of sysfs leads to, "" without one."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:
        return ""


def _target(link: Path) -> Path:
    """Where a link of sysfs leads, without looking at what is on the way."""
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
    """The names under which drivers registered the major numbers of character devices."""
    try:
        text = (roots.proc / "devices").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    words = (line.split() for line in text.partition("Block devices:")[0].splitlines())
    return {pair[0]: pair[1] for pair in words if len(pair) == 2 and pair[0].isdecimal()}


def _device_name(directory: Path) -> str:
    """The path below /dev that the kernel gives the node."""
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
    """Where the node is, and whether it is there; it may have another name than the usual one."""
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
    """One look at sysfs and then at /dev, which files each node under the devices it may be of."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._majors = _majors(roots)
        self._seen: set[str] = set()
        self.devices = list(find_devices(roots))
        self.certain: dict[str, list[Node]] = {device.address: [] for device in self.devices}
        self.loose: list[tuple[Node, list[PciDevice]]] = []

    def at_sysfs(self) -> None:
        """The nodes below the devices, and those without a parent whose names fit."""
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
        """The nodes that sysfs tells nothing of, or of which another device is the parent."""
        found = sorted(path for name in NAMED for path in self._roots.dev.glob(f"*{name}*"))
        for path in found:
            try:
                number = self._roots.device_number(path)
            except OSError:
                continue
            if number is None or number in self._seen:
                continue
            self._seen.add(number)
            node = Node(path, number, True, self._names(number, path.name))
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

    def _node(self, number: str, directory: Path, names: frozenset[str] = frozenset()) -> Node:
        path, there = _place(_device_name(directory), number, self._roots)
        return Node(path, number, there, names)

    def _possible(self, node: Node) -> list[PciDevice]:
        """The devices whose memory a node without a parent may give."""
        free = [
            device
            for device in self.devices
            if _linked(device.directory / "driver") not in ("", *NO_NODES)
            and not self.certain[device.address]
        ]
        same = [device for device in free if node.names & _driver_names(device)]
        return same or (free if _has_part(node.names, ("ivshmem",)) else [])


def survey(roots: Roots = HERE) -> Survey:
    """Look at all ivshmem devices, the drivers bound to them, and the nodes of those."""
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
    return Survey(holdings, [(node, may) for node, may in look.loose if len(may) != 1])
