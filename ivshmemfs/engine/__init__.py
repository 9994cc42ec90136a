"""Filesystem semantics, synchronous and independent of FUSE.

Callers use `Filesystem`.  Every change of the region goes through a `Transaction`.
"""

from ivshmemfs.engine import filesystem
from ivshmemfs.engine.file_lock import FileLock
from ivshmemfs.engine.filesystem import NOW, Filesystem
from ivshmemfs.engine.handle import Handle
from ivshmemfs.engine.inode import Attr, Context, StatFs
from ivshmemfs.engine.names import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from ivshmemfs.format.inode import ROOT_INO

COMPILED = not filesystem.__file__.endswith(".py")  # setup.py compiles ahead of time

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
