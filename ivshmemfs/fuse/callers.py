"""Capabilities and groups of a caller, which a FUSE request does not carry.

A request names a thread by its number in the daemon's pid namespace.  The number is 0 for a thread
of another pid namespace.  The thread waits for the answer, so its number stays valid until then.
A capability counts only in the user namespace that it belongs to.  Root of a container has all
capabilities there, and none over the files of this mount.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from ivshmemfs.fuse.protocol import NO_ID

if TYPE_CHECKING:
    from ivshmemfs.engine import Context

#: linux/capability.h
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID = 0, 1, 2, 3, 4
CAP_SYS_PTRACE, CAP_SYS_ADMIN = 19, 21
_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_Header = ctypes.c_uint32 * 2
_Sets = ctypes.c_uint32 * 6  # effective, permitted, inheritable: low words, then high words


def capabilities(thread: int) -> int:
    """Return the effective capabilities of a thread as a bit mask; 0 if the thread has ended."""
    sets = _Sets()
    if _libc.capget(_Header(_VERSION_3, thread), sets):
        return 0
    return int(sets[0]) | int(sets[3]) << 32


def _user_namespace(thread: int | str) -> tuple[int, int] | None:
    try:
        found = os.stat(f"/proc/{thread}/ns/user")
    except OSError:
        return None
    return found.st_dev, found.st_ino


def can_tell() -> bool:
    """Return whether this process can read the capabilities of others.

    It needs CAP_SYS_PTRACE and the /proc of its own pid namespace.
    """
    try:
        own = os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False
    return own and bool(capabilities(os.getpid()) >> CAP_SYS_PTRACE & 1)


def is_capable(thread: int, capability: int) -> bool:
    """Return whether a thread has a capability in this process's user namespace.

    False for a thread that has ended or that has no number here.
    """
    if not thread or not capabilities(thread) >> capability & 1:
        return False
    namespace = _user_namespace(thread)
    return namespace is not None and namespace == _user_namespace("self")


def identified(ctx: Context) -> Context:
    """Return *ctx* with uid 0 if the request has no uid and its thread has root's capabilities."""
    if ctx.uid == NO_ID and is_capable(ctx.pid, CAP_SYS_ADMIN):
        return ctx._replace(uid=0)
    return ctx


def groups(process: int) -> Collection[int]:
    """Return the groups of a process for access to files: the first one and the supplementary ones.

    Empty for a process that has ended or that is in another pid namespace.
    """
    found: set[int] = set()
    try:
        with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("Gid:"):  # real, effective, saved, of the file system
                    found.add(int(line.split()[4]))
                elif line.startswith("Groups:"):
                    found.update(map(int, line.split()[1:]))
                    break
    except (OSError, ValueError, IndexError):
        return ()
    return found
