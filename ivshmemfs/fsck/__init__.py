"""Checking a region against the numbered invariants of the format, and repairing it.

fsck reads the format itself, never through the engine, so that a misreading there cannot hide.
`invariants` states each invariant as one `check_*` function; `walk` collects the facts they are
asked about; `salvage` decides what can be kept of a damaged region and `rebuild` stores it.

What is exported is imported on first use: `__main__` must be able to say that a machine is unfit.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ivshmemfs.fsck.checking import check
    from ivshmemfs.fsck.invariants import INVARIANTS
    from ivshmemfs.fsck.repairing import repair
    from ivshmemfs.fsck.report import Finding, Report

__all__ = ["INVARIANTS", "Finding", "Report", "check", "repair"]

_MODULES = {
    "INVARIANTS": "invariants",
    "Finding": "report",
    "Report": "report",
    "check": "checking",
    "repair": "repairing",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)
