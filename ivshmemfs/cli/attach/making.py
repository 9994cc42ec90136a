"""What a command makes in a region: as which user, with which permissions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ivshmemfs.cli.attach.paths import found, place_of
from ivshmemfs.cli.attach.peer import patiently

if TYPE_CHECKING:
    from ivshmemfs.cli.attach.paths import Target
    from ivshmemfs.engine import Context, Filesystem


def current_umask() -> int:
    """The umask of this process; os.umask changes it for a moment."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def me(umask: int = 0) -> Context:
    """The user of this process.

    The engine applies `umask`, because a default access list of the directory takes its place.
    """
    from ivshmemfs.engine import Context

    return Context(os.getuid(), os.getgid(), os.getpid(), umask)


def make_fixed(fs: Filesystem, target: Target, size: int, head: bytes = b"") -> None:
    """Make a fixed file of `size` bytes that begins with `head`, unless the name exists."""
    from ivshmemfs.engine import fixed, names

    if found(fs, target.path) is not None:
        return
    place, whole, maker = place_of(fs, target), fixed.whole_pages(size), me(current_umask())
    patiently(
        lambda: fs.change(
            lambda tx: names.make_fixed(tx, place.folder, place.name, 0o666, whole, maker, head)
        )
    )
