"""Checking a region against the numbered invariants of the format, and repairing it.

fsck reads the format itself, never through the engine, so a mistake of the engine cannot hide.
`invariants` states each invariant as one `check_*` function.  `walk` walks the trees as a policy
decides: strictly in `check`, leniently in `repair`.
"""

from ivshmemfs.fsck.check import check
from ivshmemfs.fsck.invariants import INVARIANTS
from ivshmemfs.fsck.repair import repair
from ivshmemfs.fsck.report import Finding, Report

__all__ = ["INVARIANTS", "Finding", "Report", "check", "repair"]
