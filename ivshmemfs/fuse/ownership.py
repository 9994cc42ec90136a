"""Presented owners and permissions: the mount options uid=, gid= and umask=."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

from ivshmemfs.engine import Attr
from ivshmemfs.errors import FsError

#: With one of these changes, the kernel sends a mode only to clear set-ID bits.
_SHEDDING = {"uid", "gid", "size"}


class Ownership(NamedTuple):
    """Values that every file shows in place of the stored ones; the stored ones do not change."""

    uid: int | None = None
    gid: int | None = None
    umask: int = 0

    @property
    def presenter(self) -> Callable[[Attr], Attr]:
        """Return a function from stored to presented attributes."""
        return _as_stored if self == Ownership() else self._presented

    def _presented(self, attr: Attr) -> Attr:
        return attr._replace(
            mode=attr.mode & ~self.umask,
            uid=attr.uid if self.uid is None else self.uid,
            gid=attr.gid if self.gid is None else self.gid,
        )

    def stored(self, wanted: dict[str, int]) -> dict[str, int]:
        """Return the changes to store for the attributes that setattr *wanted*.

        Raises EPERM for a new owner if the mount fixes the owner.  A mode that comes with an owner
        or a size becomes `kept`: it only clears set-ID bits, because its other bits may be old.
        """
        changes = dict(wanted)
        for field, fixed in (("uid", self.uid), ("gid", self.gid)):
            if fixed is not None and changes.pop(field, fixed) != fixed:
                raise FsError(errno.EPERM, f"the mount option {field}= fixes the owner")
        if "mode" in changes:
            mode = changes.pop("mode") & 0o7777
            changes["kept" if changes.keys() & _SHEDDING else "mode"] = mode
        return changes


def _as_stored(attr: Attr) -> Attr:
    return attr
