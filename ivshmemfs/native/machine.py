"""Refuses machines that cannot use a region; imported before the extension is loaded.

The words of a region are 64 bits wide and little-endian.  The protocol needs whole loads and stores
of them; a 32-bit program tears them.
"""

from __future__ import annotations

import sys

from ivshmemfs.errors import UnfitMachine


def refuse_unfit_machine(pointer_bits: int, byteorder: str) -> None:
    """Raise UnfitMachine for a 32-bit or big-endian Python."""
    if pointer_bits < 64:
        raise UnfitMachine(
            f"this Python is a {pointer_bits}-bit program, which tears the 64-bit words that other "
            "machines read; use a 64-bit Python"
        )
    if byteorder != "little":
        raise UnfitMachine(
            "this machine is big-endian, and the words of a region are little-endian; use x86_64 "
            "or ARM64"
        )


refuse_unfit_machine(sys.maxsize.bit_length() + 1, sys.byteorder)
