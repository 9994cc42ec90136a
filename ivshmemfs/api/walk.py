"""Paths of a region: from its root, by the names in its directories.

A leading slash is optional.  `.` and `..` mean what they mean to the kernel; the root is above
itself.  Symbolic links with a relative target are followed.  An absolute target counts from the
root of a machine, not of the region, so following it raises EXDEV.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from ivshmemfs.errors import FsError
from ivshmemfs.format.inode import ROOT_INO

if TYPE_CHECKING:
    from ivshmemfs.engine import Attr, Filesystem

MAX_LINKS = 40  # symbolic links in one path; the kernel's limit

Path = str | bytes | os.PathLike[str]


class Place(NamedTuple):
    """Where a path leads to: a directory, the name in it, and the attributes of what is there.

    The name of the root is empty.
    """

    parent: int
    name: bytes
    attr: Attr | None


def text_of(path: Path) -> str:
    """Return a path as text; raises ValueError for a NUL, TypeError for anything but a path."""
    text = os.fsdecode(path)
    if "\0" in text:
        raise ValueError("embedded null byte")
    return text


def place_of(fs: Filesystem, path: str, *, follow: bool = True) -> Place:
    """Return where `path` leads to; nothing needs to be there.

    `follow` says whether a symbolic link at its end is followed.  Raises ENOENT, ENOTDIR, ELOOP,
    EXDEV, Busy.
    """
    if not path:
        raise FsError(errno.ENOENT, "the path is empty")
    todo = _parts(os.fsencode(path))
    to_directory = path.endswith(("/", "/."))
    place = Place(ROOT_INO, b"", fs.getattr(ROOT_INO))
    links = 0
    while todo:
        here = place.attr
        if here is None:
            raise FsError(errno.ENOENT)
        name = todo.pop()
        attr = fs.find(here.ino, name)
        last = not todo
        if (
            attr is None
            or not stat.S_ISLNK(attr.mode)
            or (last and not follow and not to_directory)
        ):
            place = Place(here.ino, name, attr)
            continue
        links += 1
        if links > MAX_LINKS:
            raise FsError(errno.ELOOP)
        target = fs.readlink(attr.ino)
        if target.startswith(b"/"):
            raise FsError(errno.EXDEV, f"the link to {os.fsdecode(target)} leads out of the region")
        todo += _parts(target)
    if to_directory and place.attr is not None and not stat.S_ISDIR(place.attr.mode):
        raise FsError(errno.ENOTDIR)
    return place


def existing(fs: Filesystem, path: str, *, follow: bool = True) -> Attr:
    """Return the attributes of what is at `path`; raises ENOENT and what `place_of` raises."""
    attr = place_of(fs, path, follow=follow).attr
    if attr is None:
        raise FsError(errno.ENOENT)
    return attr


def named(fs: Filesystem, path: str) -> Place:
    """Return the place of a name that is made, moved or removed; its last link is not followed.

    Raises EBUSY for the root, EINVAL for a path that ends in `..`.
    """
    place = place_of(fs, path, follow=False)
    if not place.name:
        raise FsError(errno.EBUSY, "the root directory stays where it is")
    if place.name == b"..":
        raise FsError(errno.EINVAL)
    return place


def _parts(path: bytes) -> list[bytes]:
    """Return the names in a path, the last one first."""
    return [name for name in reversed(path.split(b"/")) if name not in (b"", b".")]
