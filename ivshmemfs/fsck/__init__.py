"""Checking a region against the numbered invariants of the format, and repairing it.

fsck reads the format itself, never through the engine, so that a misreading there cannot hide.
`invariants` states each invariant as one `check_*` function; `walk` collects the facts they are
asked about; `survey` and `graph` decide what a repair keeps, and `rebuild` stores it.
"""

from ivshmemfs.fsck.checking import check
from ivshmemfs.fsck.invariants import INVARIANTS
from ivshmemfs.fsck.repairing import repair
from ivshmemfs.fsck.report import Finding, Report

__all__ = ["INVARIANTS", "Finding", "Report", "check", "repair"]
