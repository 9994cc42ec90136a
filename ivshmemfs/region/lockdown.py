"""Kernel lockdown: with Secure Boot even root may not map some memory."""

from __future__ import annotations

import re

from ivshmemfs.errors import RegionDenied
from ivshmemfs.region.roots import HERE, Roots

_CHOSEN = re.compile(r"\[(\w+)\]")


def lockdown_level(roots: Roots = HERE) -> str:
    """Return "integrity" or "confidentiality"; "" for none, or where securityfs is not mounted."""
    try:
        text = (roots.sys / "kernel/security/lockdown").read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    match = _CHOSEN.search(text)
    return match[1] if match and match[1] != "none" else ""


def locked_down(name: str, roots: Roots = HERE) -> RegionDenied:
    """Return the error for a mapping of device memory that the kernel refuses even to root."""
    level = lockdown_level(roots)
    if level:
        why = f"this kernel is locked down ({level}, as with Secure Boot)"
    else:
        why = "this kernel is locked down (Secure Boot), or a container lacks CAP_SYS_RAWIO"
    return RegionDenied(
        f"{name}: {why}, which closes resource2 and /dev/mem also to root; use the character "
        "device of a driver that is signed for this kernel"
    )
