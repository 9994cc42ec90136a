"""Filesystem semantics, synchronous and without any knowledge of FUSE.

`Filesystem` is what callers use; a change goes through exactly one kind of `Transaction`.
"""

from ivshmemfs.engine import filesystem
from ivshmemfs.engine.file_lock import FileLock
from ivshmemfs.engine.filesystem import NOW, Filesystem, Handle
from ivshmemfs.engine.inode import Attr, Context, StatFs
from ivshmemfs.engine.names import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from ivshmemfs.format.inode import ROOT_INO

COMPILED = not filesystem.__file__.endswith(".py")  # ahead of time, as setup.py says

__all__ = [
    "COMPILED",
    "NOW",
    "RENAME_EXCHANGE",
    "RENAME_NOREPLACE",
    "RENAME_WHITEOUT",
    "ROOT_INO",
    "Attr",
    "Context",
    "FileLock",
    "Filesystem",
    "Handle",
    "StatFs",
]
