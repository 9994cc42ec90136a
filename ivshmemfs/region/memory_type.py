"""Whether the processor caches a mapping, from its kind and from the kernel's own list.

A measured rate does not tell: an emulated guest reads cached memory more slowly than a real one
reads uncached memory.
"""

from __future__ import annotations

import re
from pathlib import Path

from ivshmemfs.native import DEVICE
from ivshmemfs.region.mapped import Region, shown
from ivshmemfs.region.pci import COMBINING, PLAIN, bar_extent
from ivshmemfs.region.roots import HERE, Roots

# "PAT: [mem 0x...-0x...] write-back"; before Linux 5.6 "write-back @ 0x...-0x..."
_LINE = re.compile(
    r"PAT: \[mem (0x[0-9a-f]+)-(0x[0-9a-f]+)\] (\S+)|(\S+) @ (0x[0-9a-f]+)-(0x[0-9a-f]+)"
)


def uncached(region: Region, roots: Roots = HERE) -> str | None:
    """Return one line if the processor does not cache the mapping, with what to do; else None.

    A write-combining mapping of a guest is cached where the hypervisor decides so; it gets no line.
    """
    if region.kind == "file":
        return None
    start, named = _place(region)
    kind = _in_list(start, roots) if start else ""
    if kind:
        bad = kind.startswith("uncached")
    else:
        bad = region.memory.access == DEVICE or region.path.name == PLAIN
        kind = "device memory" if region.memory.access == DEVICE else "by resource2"
    if not bad:
        return None
    return (
        f"this mapping is not cached ({named}: {kind}); map {COMBINING}, or use a kernel driver "
        "that maps the device cached"
    )


def _place(region: Region) -> tuple[int, str]:
    """Return the physical address of a region, 0 if unknown, and its name in a message."""
    if region.path.name in (PLAIN, COMBINING):
        return bar_extent(region.path.parent)[0], region.path.name
    if region.spec.startswith("mem:"):
        return int(region.spec.split(":")[1], 16), shown(region.path)
    return 0, shown(region.path)


def _in_list(address: int, roots: Roots) -> str:
    """Return the memory type of `address` that an x86 kernel lists; "" if it cannot be known."""
    path: Path = roots.sys / "kernel/debug/x86/pat_memtype_list"
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # only root may read it, where debugfs is mounted
        return ""
    for line in lines:
        match = _LINE.search(line)
        if match:
            start, end = (int(match[1] or match[5], 16), int(match[2] or match[6], 16))
            if start <= address < end:
                return match[3] or match[4]
    return ""
