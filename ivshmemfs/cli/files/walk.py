"""Trees of a region: every directory once, at any depth, without recursion."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ivshmemfs.cli.attach.paths import about, entries
from ivshmemfs.errors import Corrupt, StaleHandle

if TYPE_CHECKING:
    from ivshmemfs.engine import Attr, Filesystem


class Directory:
    """A directory of a walk.  Its path is put together when it is asked for.

    Deep trees would otherwise take memory by the square of their depth.
    """

    __slots__ = ("_above", "_name", "attr", "names")

    def __init__(self, above: Directory | None, name: bytes, attr: Attr) -> None:
        self._above = above
        self._name = name  # the whole path of the first one
        self.attr = attr
        #: The attributes by name, in order.
        self.names: dict[bytes, Attr] = {}

    @property
    def path(self) -> bytes:
        """The path, for output."""
        parts = []
        here: Directory | None = self
        while here is not None:
            parts.append(here._name)
            here = here._above
        top = parts.pop()
        return joined(top, b"/".join(reversed(parts))) if parts else top


def above_first(fs: Filesystem, attr: Attr, path: bytes) -> Iterator[Directory]:
    """Yield a directory, then each directory below it.

    Leaves out what another machine removes meanwhile.  Raises OSError with the path of a damaged
    directory, and of one that is met twice.
    """
    todo = [Directory(None, path, attr)]
    met: set[int] = set()
    while todo:
        here = todo.pop()
        with about(lambda here=here: here.path):  # type: ignore[misc]
            if here.attr.ino in met:
                raise Corrupt("it was met before: it moved meanwhile, or run fsck.ivshmemfs")
            met.add(here.attr.ino)
            try:
                here.names = entries(fs, here.attr.ino)
            except StaleHandle:
                continue
        yield here
        for name, one in reversed(here.names.items()):
            if is_directory(one):
                todo.append(Directory(here, name, one))


def below_first(fs: Filesystem, attr: Attr, path: bytes) -> Iterator[Directory]:
    """Yield the same directories, each after those below it."""
    return reversed(list(above_first(fs, attr, path)))


def joined(above: bytes, name: bytes) -> bytes:
    """Return the path of a name in a directory."""
    return above.rstrip(b"/") + b"/" + name


def is_directory(attr: Attr) -> bool:
    """Whether attributes are those of a directory."""
    return stat.S_ISDIR(attr.mode)
