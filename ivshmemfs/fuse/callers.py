"""What the kernel knows of a caller and does not send: its capabilities and groups.

A request names a thread, by its number in the daemon's pid namespace; 0 for threads of others.  The
thread waits for the answer, so the number means it until then.  Capabilities count only in
the user namespace that they belong to: root of a container has all of them, over nothing of ours.
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
_Sets = ctypes.c_uint32 * 6  # effective, permitted, inheritable, twice 32 of each


def capabilities(thread: int) -> int:
    """The effective capabilities of a thread as a bit mask; 0 when it is gone."""
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
    """Whether this process can find out about others: /proc is of its own pid namespace."""
    try:
        own = os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False
    return own and bool(capabilities(os.getpid()) >> CAP_SYS_PTRACE & 1)


def is_capable(thread: int, capability: int) -> bool:
    """Whether a thread has a capability over what this process serves; not, when unknown."""
    if not thread or not capabilities(thread) >> capability & 1:
        return False
    namespace = _user_namespace(thread)
    return namespace is not None and namespace == _user_namespace("self")


def groups(process: int) -> Collection[int]:
    """The further groups of a process; none when it is gone, or in another pid namespace."""
    from pyfuse3 import get_sup_groups  # not before something is mounted: it loads libfuse

    try:
        found: Collection[int] = get_sup_groups(process)
    except Exception:  # whatever is wrong with the process: no group is known
        return ()
    return found
