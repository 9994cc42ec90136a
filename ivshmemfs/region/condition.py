"""Tell whether the path of a region still leads to the mapped file or device.

A mapping outlives its file.  While the memory stays mapped, a user may delete, replace, rename or
cut the file, or unplug the device.  A `Region` keeps a descriptor of the mapped file to compare
with.  The layers above add the conditions that only the bytes show.
"""

from __future__ import annotations

import enum
import os
import stat
from pathlib import Path


class Condition(enum.Enum):
    """What happened to a region since it was opened; the value is the word for it."""

    SOUND = "sound"
    DELETED = "deleted"
    RENAMED = "renamed"
    REPLACED = "replaced"
    CUT = "cut"
    UNPLUGGED = "unplugged"
    # Conditions that the layers above see:
    ONES = "all ones"
    REFORMATTED = "formatted anew"
    OVERWRITTEN = "overwritten"
    UNREADABLE = "unreadable"

    @property
    def explained(self) -> str:
        """What happened, and what to do; "" for a sound region."""
        return _EXPLAINED[self]


_EXPLAINED = {
    Condition.SOUND: "",
    Condition.DELETED: (
        "the region's file was deleted; this mount goes on in memory that no other program can "
        "open: copy what you need, then unmount it"
    ),
    Condition.RENAMED: (
        "the region's file is not at its path any more, it was renamed or another mount hides it; "
        "this mount goes on: give the file its name back"
    ),
    Condition.REPLACED: (
        "another file or device has taken the region's place; this mount goes on in the old "
        "memory, apart from peers that open the new one: copy what you need, then mount it again"
    ),
    Condition.CUT: (
        "the region's file was cut; the data behind its end is lost and fails with EIO: "
        "unmount it and give the file its size back"
    ),
    Condition.UNPLUGGED: "the region's device was unplugged: unmount it",
    Condition.ONES: ("the region reads as ones, as a device does that was unplugged: unmount it"),
    Condition.REFORMATTED: "the region was formatted anew: unmount it and mount it again",
    Condition.OVERWRITTEN: (
        "the region no longer carries this filesystem: unmount it and check it with fsck.ivshmemfs"
    ),
    Condition.UNREADABLE: "the region cannot be accessed any more: unmount it",
}


class Anchor:
    """A descriptor of the file or device that is mapped; `length` bytes of it are."""

    def __init__(self, descriptor: int, length: int, *, device: bool) -> None:
        """Duplicate `descriptor`; `device` says that it is a device's file in sysfs."""
        self._descriptor = os.dup(descriptor)
        self._length = length
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode) and not device

    def close(self) -> None:
        """Close the descriptor; closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def duplicate(self) -> int:
        """Return another descriptor of the file or device, which the caller closes.

        Raises OSError EBADF after `close`.
        """
        return os.dup(self._descriptor)

    def file_system(self) -> os.statvfs_result:
        """Return the state of the file system behind the file; raises OSError."""
        return os.fstatvfs(self._descriptor)

    @property
    def is_cut(self) -> bool:
        """Whether the file is shorter than what is mapped; looks at no path."""
        return self._is_file and os.fstat(self._descriptor).st_size < self._length

    def condition(self, path: Path) -> Condition:
        """Compare with the file at `path` now; an unreadable path counts as sound."""
        held = os.fstat(self._descriptor)
        try:
            there = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            if not self._is_file:
                return Condition.UNPLUGGED
            return Condition.DELETED if held.st_nlink == 0 else Condition.RENAMED
        except OSError:
            return Condition.SOUND
        if _identity(there) != _identity(held):
            return Condition.REPLACED
        return Condition.CUT if self.is_cut else Condition.SOUND


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what identifies one file, or one device behind any of its nodes."""
    if stat.S_ISCHR(status.st_mode):
        return (status.st_rdev,)
    return status.st_dev, status.st_ino
