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

#: linux/capability.h
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID = 0, 1, 2, 3, 4
CAP_SYS_PTRACE = 19
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


def groups(process: int) -> Collection[int]:
    """Return the supplementary groups of a process.

    Empty for a process that has ended or that is in another pid namespace.
    """
    from pyfuse3 import get_sup_groups  # imported late, because it loads libfuse

    try:
        found: Collection[int] = get_sup_groups(process)
    except Exception:  # pyfuse3 raises several types for an unreadable /proc/PID/status
        return ()
    return found
