"""Open the region that a user names, and list the candidates."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ivshmemfs.errors import (
    IvshmemfsError,
    RegionAmbiguous,
    RegionDenied,
    RegionError,
    RegionHeld,
    RegionMissing,
    RegionUnfit,
    UsageError,
)
from ivshmemfs.native import NORMAL
from ivshmemfs.region.chardev import open_chardev
from ivshmemfs.region.devdax import find_dax
from ivshmemfs.region.devmem import open_devmem
from ivshmemfs.region.driver import DriverNode, DriverSurvey, Holding, named_nodes, survey
from ivshmemfs.region.file import open_file
from ivshmemfs.region.mapped import Region, look_at, refuse_hung, shown
from ivshmemfs.region.pci import (
    PciDevice,
    is_resource,
    no_device,
    normal_address,
    open_pci,
    open_resource,
)
from ivshmemfs.region.roots import HERE, Roots
from ivshmemfs.region.sizes import parse_number, parse_size, readable_size
from ivshmemfs.region.vfio import DRIVER as VFIO_DRIVER
from ivshmemfs.region.vfio import open_vfio

Identify = Callable[[bytes], tuple[str, str] | None]
FIRST_PAGE = 4096  # bytes that an Identify gets


@dataclass(frozen=True)
class Candidate:
    """A region that could be opened; `size` in bytes, 0 when only opening it would tell."""

    spec: str
    description: str
    size: int
    device: str = field(default="", compare=False)  # the ivshmem device or the node; "" for a file


class Unreadable(NamedTuple):
    """A candidate that could not be read, and the error; its contents are unknown."""

    candidate: Candidate
    error: IvshmemfsError | OSError


# --- what there is --------------------------------------------------------------------------


def _pci_candidate(held: Holding) -> Candidate:
    device = held.device
    what = f"PCI device, {readable_size(device.size) if device.size else 'BAR2 has no address'}"
    if held.driver:
        what += f", driver {held.driver}"
        what += "".join(f", {shown(node.path)}" for node in held.nodes)
    return Candidate(device.spec, what, device.size, device.address)


def _node_candidate(node: DriverNode, devices: list[PciDevice]) -> Candidate:
    sizes = {device.size for device in devices}
    size = sizes.pop() if len(sizes) == 1 else 0
    what = f"device, {readable_size(size)}" if size else "device, size unknown"
    if devices:
        what += f", {' or '.join(device.spec for device in devices)}"
    return Candidate(str(node.path), what, size, str(node.path))


def _device_candidates(found: DriverSurvey) -> Iterator[Candidate]:
    """Yield each device once: the nodes of its driver are other ways to the same memory.

    If the device of a node is uncertain, the node takes the place of the devices.
    """
    unclear = [(node, devices) for node, devices in found.unclear if node.there]
    for held in found.holdings:
        meant = [devices for _node, devices in unclear if held.device in devices]
        if not meant or len(meant) < len(meant[0]):  # some of the devices have no node
            yield _pci_candidate(held)
    for node, devices in unclear:
        yield _node_candidate(node, devices)


def _file_candidates(roots: Roots) -> Iterator[Candidate]:
    try:
        with os.scandir(roots.shm) as entries:
            found = sorted(entries, key=lambda entry: entry.path)
    except OSError:
        return
    for entry in found:
        with contextlib.suppress(OSError):
            if entry.is_file(follow_symlinks=False):  # a look at a mount point may hang
                size = entry.stat(follow_symlinks=False).st_size
                if size >= FIRST_PAGE:
                    yield Candidate(entry.path, f"file, {readable_size(size)}", size)


def _dax_candidates(roots: Roots) -> Iterator[Candidate]:
    for found in find_dax(roots):
        what = f"device-dax, {readable_size(found.size)}"
        yield Candidate(str(found.path), what, found.size, str(found.path))


def discover(roots: Roots = HERE) -> list[Candidate]:
    """Return the candidates: ivshmem devices, nodes of their drivers, device-dax, /dev/shm.

    It does not open them, so it needs no permission.
    """
    return [*_device_candidates(survey(roots)), *_dax_candidates(roots), *_file_candidates(roots)]


# --- finding one by what it carries ---------------------------------------------------------


def first_page(region: Region) -> bytes:
    """Return the first bytes of a region; raises RegionUnfit when a device answers only ones."""
    page = region.memory.read(0, min(FIRST_PAGE, region.size))
    if region.memory.access != NORMAL and not page.strip(b"\xff"):
        raise RegionUnfit(
            f"{region.spec}: every load gives ones: the device is switched off, or it is gone; "
            "see: ivshmemfs list"
        )
    return page


def identified(
    candidates: list[Candidate], identify: Identify, roots: Roots = HERE
) -> tuple[list[tuple[Candidate, tuple[str, str]]], list[Unreadable]]:
    """Return the candidates with a filesystem and its (label, uuid), and the unreadable ones."""
    found, unreadable = [], []
    for candidate in candidates:
        try:
            with _open_named(candidate.spec, True, roots) as region:
                names = identify(first_page(region))
        except (IvshmemfsError, OSError) as error:
            unreadable.append(Unreadable(candidate, error))
            continue
        if names is not None:
            found.append((candidate, names))
    return found, unreadable


def _listing(candidates: list[Candidate]) -> str:
    return "; ".join(f"{shown(c.spec)} ({c.description})" for c in candidates)


def _choose(matches: list[Candidate], unreadable: list[Unreadable], wanted: str) -> str:
    if len(matches) == 1:
        return matches[0].spec
    if matches:
        raise RegionAmbiguous(
            f"{len(matches)} regions are {wanted}: {_listing(matches)}; name one of them"
        )
    denied = [one.candidate for one in unreadable if isinstance(one.error, RegionDenied)]
    if denied and os.geteuid() != 0:
        raise RegionDenied(
            f"no region is {wanted} among those this user may read; try as root "
            f"({_listing(denied)})"
        )
    devices = [one for one in unreadable if one.candidate.device]
    if devices:
        raise RegionError(
            f"no region is {wanted} among those that can be read; "
            + "; ".join(str(one.error) for one in devices)
        )
    raise RegionMissing(f"no region is {wanted}; see: ivshmemfs list")


def _by_name(kind: str, value: str, identify: Identify | None, roots: Roots) -> str:
    if identify is None:
        raise UsageError(f"{kind}= finds only what is formatted; name the file or device instead")
    if not value:
        raise UsageError(f"{kind}= lacks a value; write it like {kind}=...")
    found, unreadable = identified(discover(roots), identify, roots)
    position = 0 if kind == "label" else 1
    fold = str.lower if kind == "uuid" else str
    matches = [c for c, names in found if fold(names[position]) == fold(value)]
    return _choose(matches, unreadable, f"{kind}={shown(value)}")


def _only_pci(identify: Identify | None, roots: Roots) -> str:
    """Return the spec of the one ivshmem device; of several, of the one with a filesystem."""
    devices = [_pci_candidate(held) for held in survey(roots).holdings]
    if len(devices) == 1:
        return devices[0].spec
    if not devices:
        raise no_device(roots)
    if identify is None:
        return _choose(devices, [], "an ivshmem device")
    found, unreadable = identified(devices, identify, roots)
    if not found and not unreadable:
        return _choose(devices, [], "an ivshmem device, none formatted")
    return _choose([c for c, _ in found], unreadable, "a formatted ivshmem device")


# --- opening --------------------------------------------------------------------------------


def _split_extent(spec: str) -> tuple[Path, int | None, int | None]:
    """Return (path, offset, size) of ``PATH``, ``PATH:SIZE`` or ``PATH:OFFSET:SIZE``.

    An existing file whose name contains a colon comes first.
    """
    if os.path.lexists(spec) or ":" not in spec:
        return Path(spec), None, None
    head, _, last = spec.rpartition(":")
    if os.path.lexists(head):
        return Path(head), None, parse_size(last)
    shorter, _, middle = head.rpartition(":")
    if shorter and os.path.lexists(shorter):
        return Path(shorter), parse_number(middle), parse_size(last)
    return Path(spec), None, None


def _open_path(spec: str, readonly: bool, roots: Roots) -> Region:
    if "\0" in spec:
        raise RegionMissing(f"{shown(spec)}: no such file or device; see: ivshmemfs list")
    path, offset, size = _split_extent(spec)
    if os.path.lexists(path):
        look_at(path)
        if roots.device_number(path) is not None:
            return open_chardev(path, offset=offset, size=size, readonly=readonly, roots=roots)
    if size is not None:
        raise UsageError(f"{shown(path)}: only a character device takes an offset or size")
    if is_resource(path):
        return _open_resource(path, readonly, roots)
    return open_file(path, readonly=readonly)


def _open_resource(path: Path, readonly: bool, roots: Roots) -> Region:
    try:
        return open_resource(path, readonly=readonly, roots=roots)
    except RegionHeld:
        held = survey(roots).at(path.absolute().parent.resolve().name)
        if held is None or not held.driver:
            raise
        raise RegionHeld(
            f"{shown(path)}: driver {held.driver} holds the device, and this kernel lets only "
            f"the driver map it; use {named_nodes(held)}"
        ) from None


def _open_pci(address: str, readonly: bool, roots: Roots) -> Region:
    """Open a device by sysfs; if that is refused, by a node of the driver that holds it."""
    try:
        return open_pci(address, readonly=readonly, roots=roots)
    except RegionError as refused:
        found = survey(roots)
        held = found.at(normal_address(address))
        if held is None or not held.driver or not held.device.size:
            raise
        unclear = [node for node, devices in found.unclear if held.device in devices]
        return _through_driver(held, unclear, refused, readonly, roots)


def _through_driver(
    held: Holding, unclear: list[DriverNode], refused: RegionError, readonly: bool, roots: Roots
) -> Region:
    failed: RegionError | None = None
    if held.driver == VFIO_DRIVER:
        try:
            region = open_vfio(held.device.address, readonly=readonly, roots=roots)
            return replace(region, spec=held.device.spec)
        except RegionMissing:
            pass  # no IOMMU here: the text below says how to release the device
        except RegionError as error:
            failed = error
    for node in held.nodes:
        try:
            region = _open_node(node, readonly, roots)
        except RegionError as error:
            failed = failed or error
        else:
            kind = f"PCI device, {region.path} of driver {held.driver}"
            return replace(region, spec=held.device.spec, kind=kind)
    spec, driver = held.device.spec, held.driver
    if failed is not None:
        raise type(failed)(f"{spec}: driver {driver} holds the device; {failed}") from None
    if isinstance(refused, RegionHeld):
        nodes = "that driver's character device"
        nodes += f" ({' or '.join(shown(node.path) for node in unclear)})" if unclear else ""
        release = f"echo {held.device.address} >{roots.sys}/bus/pci/drivers/{driver}/unbind"
        raise RegionHeld(
            f"{spec}: driver {driver} holds the device, and this kernel lets only the "
            f"driver map it; name {nodes}, or release the device: {release}"
        ) from None
    raise refused


def _open_node(node: DriverNode, readonly: bool, roots: Roots) -> Region:
    if not node.there:
        raise RegionMissing(
            f"its character device is not in {roots.dev} here; make it: "
            f"mknod {shown(node.path)} c {node.number.replace(':', ' ')}"
        )
    return open_chardev(node.path, readonly=readonly, roots=roots)


def _open_named(spec: str, readonly: bool, roots: Roots) -> Region:
    if spec.startswith("pci:"):
        return _open_pci(spec[4:], readonly, roots)
    if spec.startswith("vfio:"):
        return open_vfio(spec[5:], readonly=readonly, roots=roots)
    if spec.startswith("mem:"):
        return open_devmem(spec[4:], readonly=readonly, roots=roots)
    return _open_path(spec, readonly, roots)


def open_region(
    spec: str,
    *,
    readonly: bool = False,
    identify: Identify | None = None,
    roots: Roots = HERE,
) -> Region:
    """Open the region that `spec` names.  Forms of `spec`:

        PATH                      a file, a character device, or a device's `resource2` or
                                  `resource2_wc` in sysfs
        PATH:SIZE                 a character device, or PATH:OFFSET:SIZE
        pci, pci:0000:00:04.0     an ivshmem device
        vfio:0000:00:04.0         the same, through VFIO only
        mem:ADDRESS:SIZE          physical memory
        label=L, uuid=U           the filesystem with that label or UUID; also LABEL=, UUID=
        file:PATH                 as PATH; systemd does not take it for a device

    `identify` gets the first 4096 bytes of a region and returns the (label, uuid) of its
    filesystem, or None.  ``label=`` and ``uuid=`` need it; ``pci`` uses it to choose among several
    devices.  Raises a RegionError, or UsageError for a text of another form.
    """
    if not spec:
        raise UsageError("the region has no name; see: ivshmemfs list")
    refuse_hung(spec.removeprefix("file:"))
    if spec == "pci":
        spec = _only_pci(identify, roots)
    elif spec.startswith(("label=", "uuid=", "LABEL=", "UUID=")) and not os.path.lexists(spec):
        kind, _, value = spec.partition("=")
        spec = _by_name(kind.lower(), value, identify, roots)
    elif spec.startswith("file:") and not os.path.lexists(spec):
        spec = spec.removeprefix("file:")
    return _open_named(spec, readonly, roots)
