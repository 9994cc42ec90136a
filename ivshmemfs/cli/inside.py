"""The region's side of `get` and `put`: paths, and listings that are taken in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from ivshmemfs.cli.local import about
from ivshmemfs.cli.peering import patiently
from ivshmemfs.engine import ROOT_INO

if TYPE_CHECKING:
    from ivshmemfs.engine import Attr, Filesystem, Handle

#: Entries of a listing that are held at once.
LISTED = 256
#: The cookie of a listing behind `.` and `..`.
_BEHIND_DOTS = 2


def resolve(fs: Filesystem, path: bytes) -> Attr:
    """The attributes at a path from the region's root; symbolic links are not followed."""
    with about(lambda: path):
        attr = patiently(lambda: fs.getattr(ROOT_INO))
        for name in path.split(b"/"):
            if name:
                attr = child(fs, attr.ino, name)
        return attr


def child(fs: Filesystem, ino: int, name: bytes) -> Attr:
    """The attributes of a name in a directory of the region; raises FsError."""
    return patiently(lambda: fs.lookup(ino, name))


def found(fs: Filesystem, path: bytes) -> Attr | None:
    """The same as `resolve`; None when there is nothing."""
    try:
        return resolve(fs, path)
    except FileNotFoundError:
        return None


def listing(fs: Filesystem, ino: int) -> Iterator[tuple[bytes, Attr]]:
    """The names in a directory of the region, as they are when they are reached.

    Raises StaleHandle at once when the directory is gone.
    """
    return _pieces(fs, patiently(lambda: fs.opendir(ino)))


def _pieces(fs: Filesystem, handle: Handle) -> Iterator[tuple[bytes, Attr]]:
    cookie = _BEHIND_DOTS
    while piece := patiently(lambda at=cookie: list(islice(fs.readdir(handle, at), LISTED))):  # type: ignore[misc]
        for name, attr, _ in piece:
            yield name, attr
        cookie = piece[-1][2]
