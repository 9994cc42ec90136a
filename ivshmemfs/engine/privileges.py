"""Privileges that a file gives to a process that executes it, and the changes that remove them.

    set-user-ID, set-group-ID   bits of the mode
    capabilities                the extended attribute CAPABILITY

A write, a change of size and a change of owner remove them, as the kernel does on its own
filesystems.  Which bits a caller may keep depends on the caller; the callers of `shed` find it out.
"""

from __future__ import annotations

import stat
from typing import Final

from ivshmemfs.engine import xattr
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.transaction import Transaction

CAPABILITY: Final = b"security.capability"
SET_ID_BITS: Final = stat.S_ISUID | stat.S_ISGID
# With both bits a file is a set-group-ID program.  The set-group-ID bit alone has no effect on
# execution; only a caller outside the file's group removes it.
SET_GROUP_ID_PROGRAM: Final = stat.S_ISGID | stat.S_IXGRP


def group_bit_alone(mode: int) -> bool:
    """Return whether a file has the set-group-ID bit and its group may not execute it."""
    return mode & SET_GROUP_ID_PROGRAM == stat.S_ISGID


def shed(tx: Transaction, inode: Inode, *, unprivileged: bool, outsider: bool) -> Inode:
    """Return the inode without the privileges that a change of contents or owner removes.

    Every caller loses the capabilities.  An `unprivileged` caller also loses the set-ID bits; an
    `outsider` is not in the file's group.
    """
    record = inode.record
    if record.xattr_size:
        inode = xattr.discard(tx, inode, CAPABILITY)
    if unprivileged and record.mode & SET_ID_BITS:
        inode = without_set_id(inode, outsider=outsider)
    return inode


def without_set_id(inode: Inode, *, outsider: bool) -> Inode:
    """Return the inode without the set-user-ID bit and the set-group-ID bit of a program.

    For an `outsider`, also without the set-group-ID bit of any other file.
    """
    mode = inode.record.mode & ~stat.S_ISUID
    if outsider or mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    return inode.evolve(mode=mode) if mode != inode.record.mode else inode
