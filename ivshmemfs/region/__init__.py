"""Find, map and measure regions: files, PCI devices, character devices, physical memory.

`Memory` gives words, fences and copies on a mapping.  `Blocks` gives the operations on tagged
blocks in it.  The layers above know what the bytes mean.
"""

from __future__ import annotations

from ivshmemfs.native import DEVICE, NORMAL, WRITE_COMBINING, Blocks, Memory, Turn, crc32c
from ivshmemfs.region.blank import Found, find_data
from ivshmemfs.region.condition import Condition
from ivshmemfs.region.file import cramped, create_file, refuse_tight, reserve
from ivshmemfs.region.locate import (
    Candidate,
    Unreadable,
    discover,
    first_page,
    identified,
    open_region,
)
from ivshmemfs.region.mapped import Region, refuse_hung
from ivshmemfs.region.memory_type import uncached
from ivshmemfs.region.pci import no_device
from ivshmemfs.region.probe import Probe, Scratch, probe, refuse_unfit
from ivshmemfs.region.roots import Roots
from ivshmemfs.region.sizes import exact_size, parse_size, readable_size

__all__ = [
    "DEVICE",
    "NORMAL",
    "WRITE_COMBINING",
    "Blocks",
    "Candidate",
    "Condition",
    "Found",
    "Memory",
    "Probe",
    "Region",
    "Roots",
    "Scratch",
    "Turn",
    "Unreadable",
    "cramped",
    "crc32c",
    "create_file",
    "discover",
    "exact_size",
    "find_data",
    "first_page",
    "identified",
    "no_device",
    "open_region",
    "parse_size",
    "probe",
    "readable_size",
    "refuse_hung",
    "refuse_tight",
    "refuse_unfit",
    "reserve",
    "uncached",
]
