"""Paths inside a region, and listings that are taken in pieces."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from ivshmemfs.cli.attach.peering import patiently
from ivshmemfs.engine import ROOT_INO
from ivshmemfs.errors import FsError

if TYPE_CHECKING:
    from ivshmemfs.engine import Attr, Filesystem, Handle

#: Entries of a listing that are held at once.
LISTED = 256
#: The cookie of a listing behind `.` and `..`.
_BEHIND_DOTS = 2


@contextmanager
def about(path: Callable[[], bytes], local: Callable[[], bytes] | None = None) -> Iterator[None]:
    """Make every error of the region one about `path`, and others about `local`; not nested."""
    try:
        yield
    except FsError as error:
        raise OSError(error.errno, str(error), os.fsdecode(path())) from None
    except OSError as error:
        text = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, text, os.fsdecode((local or path)())) from None


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
