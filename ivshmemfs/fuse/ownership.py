"""How owners and permissions are presented: the mount options uid=, gid= and umask=."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

from ivshmemfs.engine import Attr
from ivshmemfs.errors import FsError

#: Changes with which the kernel sends a mode only to take set-ID bits away.
_SHEDDING = {"uid", "gid", "size"}


class Ownership(NamedTuple):
    """What every file shows in place of what is stored, which stays as it is."""

    uid: int | None = None
    gid: int | None = None
    umask: int = 0

    @property
    def presenter(self) -> Callable[[Attr], Attr]:
        """A function that returns attributes as they are presented."""
        return _as_stored if self == Ownership() else self._presented

    def _presented(self, attr: Attr) -> Attr:
        return attr._replace(
            mode=attr.mode & ~self.umask,
            uid=attr.uid if self.uid is None else self.uid,
            gid=attr.gid if self.gid is None else self.gid,
        )

    def stored(self, wanted: dict[str, int]) -> dict[str, int]:
        """The changes to store for what setattr *wanted*, as the engine takes them.

        A presented owner can only be set to what it is: EPERM.  A mode that comes with an owner or
        a size only takes set-ID bits away; its other bits are as the kernel last saw them.
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
