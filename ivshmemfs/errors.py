"""The one exception tree.

Every error that a caller may see has an ``errno``, the answer to a FUSE request.  It has an
``exit_code``, with which a command ends, in the sense of mount(8) and fsck(8).  Its text is one
line that says what is wrong and what to do.  No command shows its traceback.

Exit codes: 1 wrong use or permission, 2 system error, 4 internal bug, 8 interrupted or
operational error, 16 usage (fsck), 32 mount failure.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable


class IvshmemfsError(Exception):
    """Base of all errors of this project; ``errno`` and ``exit_code`` say how it surfaces."""

    errno: int = _errno.EIO
    exit_code: int = 1


class Interrupted(BaseException):
    """A signal asked the command to end.

    Unlike KeyboardInterrupt it passes through click, which would print an empty line.
    """


class OutputError(IvshmemfsError):
    """Standard output could not be written: a full disk, a closed device."""

    errno = _errno.EIO
    exit_code = 2


# --- opening a region -----------------------------------------------------------------------


class UnfitMachine(IvshmemfsError):
    """This processor or this Python cannot use a region at all."""

    errno = _errno.ENOSYS
    exit_code = 2


class UsageError(IvshmemfsError):
    """The arguments make no sense together."""

    errno = _errno.EINVAL
    exit_code = 1


class RegionError(IvshmemfsError):
    """The region could not be opened or mapped."""

    errno = _errno.EIO
    exit_code = 32


class RegionMissing(RegionError):
    """There is no such file or device."""

    errno = _errno.ENOENT


class RegionDenied(RegionError):
    """The region exists, and this user may not open it."""

    errno = _errno.EACCES


class RegionHeld(RegionError):
    """A kernel driver holds the device, and the kernel lets only that driver map it."""

    errno = _errno.EBUSY


class RegionAmbiguous(RegionError):
    """Several regions match and the user must choose."""

    errno = _errno.ENOTUNIQ


class RegionSize(RegionError):
    """The size of a region is unknown, too small or not what it should be."""

    errno = _errno.EINVAL


class RegionUnfit(RegionError):
    """The mapping lacks something that writing needs, such as a working compare-and-swap."""

    errno = _errno.EOPNOTSUPP


# --- what is on the region --------------------------------------------------------------


class FormatError(IvshmemfsError):
    """The bytes on the region are not a filesystem that this version can use."""

    errno = _errno.EINVAL
    exit_code = 32


class NotFormatted(FormatError):
    """The region carries no filesystem at all."""


class ForeignFormat(FormatError):
    """The region carries something that is not ours."""


class UnsupportedVersion(FormatError):
    """The filesystem was written by a version or with features that this one does not know."""

    errno = _errno.EPROTONOSUPPORT


class GeometryMismatch(FormatError):
    """The region is smaller or larger than its superblock says."""


class InUse(IvshmemfsError):
    """Refused because live peers, or an existing filesystem, would be harmed."""

    errno = _errno.EBUSY
    exit_code = 1


class TooManyPeers(IvshmemfsError):
    """Every slot of the peer table is taken."""

    errno = _errno.EUSERS
    exit_code = 32


class MountError(IvshmemfsError):
    """The mount itself failed: mount point, /dev/fuse, fusermount3."""

    errno = _errno.EINVAL
    exit_code = 32


# --- while it is in use ---------------------------------------------------------------------


class FsError(IvshmemfsError):
    """An ordinary POSIX failure of one operation, such as ENOENT."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(message or os.strerror(code))
        self.errno = code


class StaleHandle(FsError):
    """What the caller means is gone: another machine removed it, or the region was reformatted."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_errno.ESTALE, message)


class NoSpace(FsError):
    """No free blocks are left for this operation."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_errno.ENOSPC, message)


class Corrupt(FsError):
    """Something on the region contradicts the format; the message says what and where."""

    def __init__(self, message: str) -> None:
        super().__init__(_errno.EUCLEAN, message)


class Busy(IvshmemfsError):
    """Not now: another peer is committing.  Nothing was changed; try again in a moment."""

    errno = _errno.EAGAIN


class UnderRepair(Busy):
    """A repair excludes all other peers; a caller that waits can go on when it is over."""

    exit_code = 32


class Unfinished(Busy):
    """The operation has used up its turn.  Its progress is kept; let others run, then try again.

    An operation of several commits did some of them: then `go_on` does the rest, and is called
    instead of the operation.  `so_far` is the result if the rest is given up; None if that fails.
    """

    def __init__(
        self, message: str, go_on: Callable[[], object] | None = None, so_far: object = None
    ) -> None:
        super().__init__(message)
        self.go_on = go_on
        self.so_far = so_far


class Fenced(IvshmemfsError):
    """This incarnation was declared gone by another peer; it must rejoin before it writes again."""

    errno = _errno.ESTALE


class LockLost(IvshmemfsError):
    """A lock between machines is no longer held: its holder was silent for too long.

    What would be written under it is refused.
    """

    errno = _errno.EIO


class Restart(Busy):
    """The snapshot that an operation read was overtaken; it starts again from the new root."""
