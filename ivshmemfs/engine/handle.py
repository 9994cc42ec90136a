"""An open file or directory, as the caller holds it between its opening and its release."""

from __future__ import annotations

import os

from ivshmemfs.engine.inode import Context
from ivshmemfs.engine.locks import Guard


class Handle:
    """An open file or directory.  Its attributes keep their values at open time.

    `unprivileged`: a user other than root opened it, or a user that the request does not name.
    `outsider`: the opener does not belong to the file's group.  Both count for writes whose caller
    is unknown.
    """

    __slots__ = ("append", "guard", "ino", "outsider", "readable", "unprivileged", "writable")

    def __init__(
        self, ino: int, flags: int, ctx: Context | None, *, outsider: bool = False
    ) -> None:
        self.ino = ino
        self.append = bool(flags & os.O_APPEND)
        access = flags & os.O_ACCMODE
        self.readable = access != os.O_WRONLY
        self.writable = access != os.O_RDONLY
        self.unprivileged = ctx is not None and ctx.uid != 0
        self.outsider = outsider
        self.guard: Guard | None = None  # of the locks that were taken through it
