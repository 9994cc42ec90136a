"""Paths in a region: what an argument names, look-ups by path, and listings in pieces."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ivshmemfs.cli.attach import names
from ivshmemfs.cli.attach.names import region_of
from ivshmemfs.cli.attach.peer import attached, patiently
from ivshmemfs.errors import Corrupt, FsError, RegionMissing, UsageError

if TYPE_CHECKING:
    from ivshmemfs.engine import Attr, Filesystem, Handle

#: Entries of a listing that are held at once.
LISTED = 256
#: Bytes of one read.
PIECE = 1 << 20
#: The cookie of a listing behind `.` and `..`.
_BEHIND_DOTS = 2


class Target(NamedTuple):
    """A path in a region."""

    region: str  # as the user or the mount names it
    path: bytes  # from the region's root, "/" first
    shown: bytes  # the user's own way to say it

    def named(self, inside: bytes) -> bytes:
        """How the user would name what is at `inside`, a path below this one."""
        return self.shown.rstrip(b"/") + b"/" + inside if inside else self.shown


def target_of(argument: str) -> Target:
    """The path that an argument names: on a mount, or REGION:/path.  Raises UsageError."""
    from ivshmemfs.fuse.mountpoint import enclosing, refuse_hung

    start = len("file:/") if argument.startswith("file:/") else 0
    at = argument.find(":/", start)
    if at >= 0 and not os.path.lexists(argument):
        region, path = argument[:at], os.fsencode(argument[at + 1 :])
        if not region:
            raise UsageError(f"{argument}: no region before the colon")
        return Target(region, os.path.normpath(path), os.fsencode(argument))
    entry = enclosing(argument)
    if entry is None:
        raise UsageError(
            f"{argument} is not on an ivshmemfs mount: name a path on one, or REGION:/path"
        )
    refuse_hung(entry)
    absolute = os.path.abspath(argument)
    inside = os.path.normpath("/" + os.path.relpath(absolute, entry.path))
    return Target(entry.source, os.fsencode(inside), os.fsencode(argument))


def region_target_of(argument: str) -> Target:
    """Return the path that an argument names, or the root of the region that it names."""
    from ivshmemfs.fuse.mountpoint import enclosing

    is_path = ":/" in argument.removeprefix("file:/") and not os.path.lexists(argument)
    if is_path or not (names.is_named(argument) or enclosing(argument) is None):
        return target_of(argument)
    return Target(argument, b"/", os.fsencode(argument))


@contextmanager
def reached(
    target: Target, *, readonly: bool, waits: bool = False, doorbell: str | None = None
) -> Iterator[Filesystem]:
    """Be a peer of the region of `target` for the time of a `with`; see `attached`.

    Raises RegionError.
    """
    region = region_of(target.region)
    with ExitStack() as stack:
        try:
            fs = stack.enter_context(
                attached(region, readonly=readonly, waits=waits, doorbell=doorbell)
            )
        except RegionMissing:
            raise RegionMissing(f"{target.region}: there is no such region") from None
        yield fs


class Place:
    """A name in a directory of the region, and the path to show for it."""

    __slots__ = ("folder", "name", "path")

    def __init__(self, folder: int, name: bytes, above: bytes) -> None:
        self.folder = folder
        self.name = name
        self.path = os.path.join(above, name)


def place_of(fs: Filesystem, target: Target) -> Place:
    """Return the place of a name that is made, moved or removed; raises UsageError for the root."""
    above, _, name = target.path.rpartition(b"/")
    if not name:
        raise UsageError(f"{os.fsdecode(target.shown)} is the root directory: it stays")
    shown = target.shown.rstrip(b"/").rpartition(b"/")
    return Place(resolve(fs, above, shown[0] + shown[1]).ino, name, shown[0] + shown[1])


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


def needed(sources: Sequence[object], destination: bytes | str, usage: str) -> None:
    """Raise UsageError for a single path, which may be the source or the destination."""
    if not sources:
        only = os.fsdecode(destination)
        raise UsageError(f"{only} is one path, and two are needed, from and to: {usage}")


def attributes(fs: Filesystem, target: Target) -> Attr:
    """Return the attributes of a target; follows no symbolic link."""
    return resolve(fs, target.path, target.shown)


def resolve(fs: Filesystem, path: bytes, shown: bytes = b"") -> Attr:
    """Return the attributes at a path from the region's root; follows no symbolic link.

    Raises OSError about `shown`, which is `path` if it is empty.
    """
    from ivshmemfs.engine import ROOT_INO

    with about(lambda: shown or path):
        attr = patiently(lambda: fs.getattr(ROOT_INO))
        for name in path.split(b"/"):
            if name:
                attr = child(fs, attr.ino, name)
        return attr


def child(fs: Filesystem, ino: int, name: bytes) -> Attr:
    """Return the attributes of a name in a directory of the region; raises FsError."""
    return patiently(lambda: fs.lookup(ino, name))


def found(fs: Filesystem, path: bytes) -> Attr | None:
    """Return the same as `resolve`, or None if the path does not exist."""
    try:
        return resolve(fs, path)
    except FileNotFoundError:
        return None


def entries(fs: Filesystem, ino: int) -> dict[bytes, Attr]:
    """Return all names in a directory of the region, in order; raises Corrupt, StaleHandle."""
    found: dict[bytes, Attr] = {}
    for name, attr in listing(fs, ino):
        if name in found:
            raise twice(ino)
        found[name] = attr
    return dict(sorted(found.items()))


def twice(ino: int) -> Corrupt:
    """Return the error for a directory that has a name twice; it may have no end."""
    return Corrupt(f"directory {ino} has a name twice: run fsck.ivshmemfs -y")


def contents(fs: Filesystem, ino: int) -> Iterator[memoryview]:
    """Yield the bytes of a file in pieces; each is valid until the next."""
    buffer, at = memoryview(bytearray(PIECE)), 0
    handle = patiently(lambda: fs.open(ino, os.O_RDONLY))
    try:
        while got := patiently(lambda at=at: fs.read(handle, at, PIECE, buffer)):  # type: ignore[misc]
            yield memoryview(got)
            at += len(got)
    finally:
        fs.release(handle)


def listing(fs: Filesystem, ino: int) -> Iterator[tuple[bytes, Attr]]:
    """Yield the names in a directory of the region, as they are when they are reached.

    Raises StaleHandle at once when the directory is gone.
    """
    return _pieces(fs, patiently(lambda: fs.opendir(ino)))


def _pieces(fs: Filesystem, handle: Handle) -> Iterator[tuple[bytes, Attr]]:
    cookie = _BEHIND_DOTS
    while piece := patiently(lambda at=cookie: list(islice(fs.readdir(handle, at), LISTED))):  # type: ignore[misc]
        for name, attr, _ in piece:
            yield name, attr
        cookie = piece[-1][2]
