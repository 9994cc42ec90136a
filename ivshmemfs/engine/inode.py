"""An inode in memory, and the attributes that callers see.

An `Inode` is immutable.  Readers share it through the node cache.  A transaction that changes a
file makes a new one (`Inode.evolve`) and hands it to `Transaction.put`.
"""

from __future__ import annotations

import stat
from typing import Any, Final, NamedTuple

from ivshmemfs.errors import Corrupt
from ivshmemfs.format import inode as fmt
from ivshmemfs.format import node as node_format
from ivshmemfs.format import words
from ivshmemfs.format.dirent import Interior, Leaf
from ivshmemfs.format.inode import INODE, PAYLOAD_OFFSET, InodeRecord
from ivshmemfs.native import picked_tuple

SECTOR: Final = 512  # bytes; the unit of `Attr.blocks`
# Names of this module are bound by the compiler; those of others are looked up at each use.
_LAYOUT: Final = INODE
_picked_tuple: Final = picked_tuple
# The values of the module `stat`, as constants at compile time.
_FORMAT: Final = 0o170000
_DIRECTORY: Final = 0o040000
_REGULAR: Final = 0o100000


class Attr(NamedTuple):
    """The result of stat(2); `blocks` in units of 512 bytes, times in ns since 1970."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


_NO_ATTR: Final = Attr(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
_COMPUTED: Final = ("ino", "size", "blocks")
# The items of an `Attr` in a record with the computed fields behind it.
_PICKED: Final = tuple(
    [
        len(INODE.fields) + _COMPUTED.index(name) if name in _COMPUTED else INODE.places(name)[0]
        for name in Attr._fields
    ]
)


class Context(NamedTuple):
    """The caller; `umask` is 0 for requests that make nothing, or whose mode is masked already."""

    uid: int
    gid: int
    pid: int = 0
    umask: int = 0


class StatFs(NamedTuple):
    """The result of statvfs(3); counts in units of `block_size` bytes."""

    block_size: int
    blocks: int
    blocks_free: int
    blocks_avail: int
    files: int
    files_free: int
    name_max: int


class Inode:
    """One inode: its record, its payload and its inline extended attributes."""

    __slots__ = ("_format", "attr", "data", "ino", "leaf", "record", "top", "xattr")

    def __init__(self, ino: int, record: InodeRecord, data: bytes, xattr: bytes) -> None:
        self.ino: Final = ino
        self.record: Final = record
        self.data: Final = data  # the payload
        self.xattr: Final = xattr
        self._format = 0  # `format` fills it
        self.attr: Attr | None = None  # `attributes` fills it
        self.leaf: Leaf | None = None  # parsed payload of an EMPTY or DIRLEAF directory
        self.top: Interior | None = None  # parsed payload of a DIRTREE directory

    def evolve(
        self, *, data: bytes | None = None, xattr: bytes | None = None, **changes: Any
    ) -> Inode:
        """Return a changed inode: other payload, inline attributes, record fields."""
        return self.changed(changes, data, xattr)

    def changed(
        self, changes: dict[str, Any], data: bytes | None = None, xattr: bytes | None = None
    ) -> Inode:
        """Do the same with changes in a dict; this function adds to the dict."""
        if data is None:
            data = self.data
        else:
            changes["payload_size"] = len(data)
        if xattr is None:
            xattr = self.xattr
        else:
            changes["xattr_inline"] = len(xattr)
        return Inode(self.ino, _LAYOUT.changed(self.record, changes), data, xattr)

    @property
    def format(self) -> int:
        """The file type, as bits of the mode."""
        if not self._format:
            self._format = self.record.mode & _FORMAT
        return self._format

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return self.format == _DIRECTORY

    @property
    def is_regular(self) -> bool:
        """Whether it is a regular file."""
        return self.format == _REGULAR


def parse(ino: int, data: bytes, block_size: int) -> Inode:
    """Return the inode in the bytes of an inode block; raises Corrupt when they contradict."""
    if len(data) < PAYLOAD_OFFSET:
        raise Corrupt(f"inode {ino}: its block holds only {len(data)} bytes")
    record = INODE.unpack(data, node_format.HEADER_SIZE)
    end = PAYLOAD_OFFSET + record.payload_size
    if end + record.xattr_inline != len(data) or len(data) > block_size:
        raise Corrupt(f"inode {ino}: payload of {record.payload_size} bytes does not fit its block")
    problem = _problem(record)
    if problem:
        raise Corrupt(f"inode {ino}: {problem}")
    return Inode(ino, record, data[PAYLOAD_OFFSET:end], data[end:])


_ALLOWED = fmt.ALLOWED_PAYLOADS
_MOST_BLOCKS = 1 << 32  # numbers of blocks have 32 bits
MAX_RDEV = (1 << 32) - 1  # what a FUSE request carries
TARGET_MAX = fmt.TARGET_MAX


def _problem(record: InodeRecord) -> str | None:
    """Return a contradiction in a record, or None."""
    kinds = _ALLOWED.get(stat.S_IFMT(record.mode))
    if kinds is None:
        return f"mode {record.mode:o} is of no file type"
    if record.payload not in kinds:
        return f"payload kind {record.payload} does not go with mode {record.mode:o}"
    if record.height > node_format.MAX_HEIGHT or record.xattr_height > node_format.MAX_HEIGHT:
        return f"tree height {max(record.height, record.xattr_height)}"
    if record.payload == fmt.INLINE and record.payload_size != record.size:
        return f"{record.payload_size} inline bytes, but size {record.size}"
    if record.payload == fmt.EMPTY and record.payload_size:
        return "an empty payload with bytes"
    if record.payload == fmt.MAP and record.payload_size % words.POINTER_SIZE:
        return "half a pointer in the block map"
    if record.fixed and (record.payload != fmt.MAP or not stat.S_ISREG(record.mode)):
        return "it is marked as fixed, but has no block map"
    if record.payload == fmt.DIRTREE and not record.height:
        return "a directory tree without levels"
    if record.size > fmt.MAX_FILE_SIZE or not 0 < record.blocks < _MOST_BLOCKS:
        return f"size {record.size}, {record.blocks} blocks"
    if stat.S_ISLNK(record.mode) and record.size > TARGET_MAX:
        return f"a symbolic link to {record.size} bytes"
    if record.rdev > MAX_RDEV:
        return f"device number {record.rdev:#x}"
    return None


def attributes(inode: Inode, block_size: int) -> Attr:
    """Return the result of stat(2) for an inode."""
    if inode.attr is None:
        record = inode.record
        held = record.blocks
        if record.payload in (fmt.EMPTY, fmt.INLINE) and not record.xattr_height:
            held = 1 if record.size else 0
        elif inode.is_regular:
            held -= 1  # other file systems do not count the inode block either
        size = record.blocks * block_size if inode.is_dir else record.size
        computed = (inode.ino, size, held * block_size // SECTOR)
        inode.attr = _picked_tuple(_NO_ATTR, _PICKED, record, computed)
    return inode.attr
