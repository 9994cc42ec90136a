"""From what a user names to an open region, and what there is to be named."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ivshmemfs.errors import (
    IvshmemfsError,
    RegionAmbiguous,
    RegionDenied,
    RegionMissing,
    UsageError,
)
from ivshmemfs.region.chardev import described_extent, is_character_device, open_chardev
from ivshmemfs.region.chardev import sysfs_directory as char_directory
from ivshmemfs.region.devmem import open_devmem
from ivshmemfs.region.file import open_file
from ivshmemfs.region.mapped import Region, look_at, shown
from ivshmemfs.region.pci import find_devices, is_ivshmem, is_resource, open_pci, open_resource
from ivshmemfs.region.roots import HERE, Roots
from ivshmemfs.region.sizes import parse_number, parse_size, readable_size

Identify = Callable[[bytes], tuple[str, str] | None]
FIRST_PAGE = 4096  # bytes that an Identify gets to see


@dataclass(frozen=True)
class Candidate:
    """A region that could be opened; `size` is 0 when only opening it would tell."""

    spec: str
    description: str
    size: int
    device: str = field(default="", compare=False)  # same text: the same memory by another way


# --- what there is --------------------------------------------------------------------------


def _pci_candidates(roots: Roots) -> Iterator[Candidate]:
    for device in find_devices(roots):
        what = f"PCI device, {readable_size(device.size)}" if device.size else "PCI, no BAR2"
        yield Candidate(device.spec, what, device.size, device.address)


def _chardev_candidates(roots: Roots) -> Iterator[Candidate]:
    for pattern in ("kvmfr*", "uio*"):
        for path in sorted(roots.dev.glob(pattern)):
            try:
                status = path.stat()
            except OSError:
                continue
            if not is_character_device(status.st_mode):
                continue
            directory = char_directory(status.st_rdev, roots)
            extent = described_extent(directory)
            parent = directory / "device"
            size = extent.size if extent else 0
            yield Candidate(
                str(path),
                f"device, {readable_size(size)}" if size else "device, size unknown",
                size,
                parent.resolve().name if is_ivshmem(parent) else "",
            )


def _file_candidates(roots: Roots) -> Iterator[Candidate]:
    try:
        paths = sorted(roots.shm.iterdir())
    except OSError:
        return
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size >= FIRST_PAGE:
                size = status.st_size
                yield Candidate(str(path), f"file, {readable_size(size)}", size)


def discover(roots: Roots = HERE) -> list[Candidate]:
    """What could be a region here: ivshmem devices, /dev/kvmfr*, /dev/uio*, files in /dev/shm.

    Opens nothing, so that it needs no permission.
    """
    return [
        *_pci_candidates(roots),
        *_chardev_candidates(roots),
        *_file_candidates(roots),
    ]


# --- finding one by what it carries ---------------------------------------------------------


def _first_page(spec: str, roots: Roots) -> bytes:
    with _open_named(spec, True, roots) as region:
        return region.memory.read(0, min(FIRST_PAGE, region.size))


def identified(
    candidates: list[Candidate], identify: Identify, roots: Roots = HERE
) -> tuple[list[tuple[Candidate, tuple[str, str]]], list[Candidate]]:
    """Those that carry a filesystem with their (label, uuid), and those nobody let us read."""
    found, denied, seen = [], [], set()
    for candidate in candidates:
        if candidate.device and candidate.device in seen:
            continue
        try:
            names = identify(_first_page(candidate.spec, roots))
        except RegionDenied:
            denied.append(candidate)
            continue
        except (IvshmemfsError, OSError):
            continue
        if names is not None:
            seen.add(candidate.device)
            found.append((candidate, names))
    return found, denied


def _listing(candidates: list[Candidate]) -> str:
    return "; ".join(f"{shown(c.spec)} ({c.description})" for c in candidates)


def _choose(matches: list[Candidate], denied: list[Candidate], wanted: str) -> str:
    if len(matches) == 1:
        return matches[0].spec
    if matches:
        raise RegionAmbiguous(
            f"{len(matches)} regions are {wanted}: {_listing(matches)}; name one of them"
        )
    if denied:
        raise RegionDenied(
            f"no region is {wanted} among those this user may read; try as root "
            f"({_listing(denied)})"
        )
    raise RegionMissing(f"no region is {wanted}; see: ivshmemfs list")


def _by_name(kind: str, value: str, identify: Identify | None, roots: Roots) -> str:
    if identify is None:
        raise UsageError(f"{kind}= finds only what is formatted; name the file or device instead")
    if not value:
        raise UsageError(f"{kind}= lacks a value; write it like {kind}=...")
    found, denied = identified(discover(roots), identify, roots)
    position = 0 if kind == "label" else 1
    fold = str.lower if kind == "uuid" else str
    matches = [c for c, names in found if fold(names[position]) == fold(value)]
    return _choose(matches, denied, f"{kind}={shown(value)}")


def _only_pci(identify: Identify | None, roots: Roots) -> str:
    """The one ivshmem device; of several, the one that carries a filesystem."""
    devices = list(_pci_candidates(roots))
    if len(devices) == 1:
        return devices[0].spec
    if not devices:
        raise RegionMissing(
            "no ivshmem device (PCI 1af4:1110) here; in a guest, give QEMU one (see README); on "
            "the host, name the file in /dev/shm"
        )
    if identify is None:
        return _choose(devices, [], "an ivshmem device")
    found, denied = identified(devices, identify, roots)
    if not found and not denied:
        return _choose(devices, [], "an ivshmem device, none formatted")
    return _choose([c for c, _ in found], denied, "a formatted ivshmem device")


# --- opening --------------------------------------------------------------------------------


def _split_extent(spec: str) -> tuple[Path, int | None, int | None]:
    """(path, offset, size) of ``PATH``, ``PATH:SIZE`` or ``PATH:OFFSET:SIZE``.

    A file whose name contains a colon is still a file: what exists as it is written comes first.
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
    if os.path.lexists(path) and is_character_device(look_at(path).st_mode):
        return open_chardev(path, offset=offset, size=size, readonly=readonly, roots=roots)
    if size is not None:
        raise UsageError(f"{shown(path)}: only a character device takes an offset or size")
    if is_resource(path):
        return open_resource(path, readonly=readonly, roots=roots)
    return open_file(path, readonly=readonly)


def _open_named(spec: str, readonly: bool, roots: Roots) -> Region:
    if spec.startswith("pci:"):
        return open_pci(spec[4:], readonly=readonly, roots=roots)
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
    """Open what `spec` names.

    `spec` is the path of a file or character device (there also PATH:SIZE or PATH:OFFSET:SIZE) or
    of a device's `resource2` or `resource2_wc` in sysfs,
    ``pci``, ``pci:0000:00:04.0``, ``mem:0xADDRESS:SIZE``, ``label=L`` or ``uuid=U`` (as in fstab,
    also ``LABEL=`` and ``UUID=``), or ``file:PATH``, which systemd takes for no device.  `identify`
    gets the first 4096 bytes of a region and tells the (label, uuid) of the filesystem on it, or
    None; ``label=`` and ``uuid=`` need it, and ``pci`` uses it to choose among several devices.
    Raises a RegionError, or UsageError for a text that means nothing.
    """
    if not spec:
        raise UsageError("the region has no name; see: ivshmemfs list")
    if spec == "pci":
        spec = _only_pci(identify, roots)
    elif spec.startswith(("label=", "uuid=", "LABEL=", "UUID=")) and not os.path.lexists(spec):
        kind, _, value = spec.partition("=")
        spec = _by_name(kind.lower(), value, identify, roots)
    elif spec.startswith("file:") and not os.path.lexists(spec):
        spec = spec.removeprefix("file:")
    return _open_named(spec, readonly, roots)
