"""Makes one damaged inode sound, from the bytes of its own block alone.

It invents nothing.  If a field contradicts the others, it gets the value that the others support.
"""

from __future__ import annotations

import stat
from typing import Any, NamedTuple

from ivshmemfs.format import inode as ino_format
from ivshmemfs.format import lock, words, xattr
from ivshmemfs.format import node as node_format
from ivshmemfs.format.inode import INODE, PAYLOAD_OFFSET, InodeRecord
from ivshmemfs.fsck.invariants import MODE_MASK

# Size of a file in blocks whose record has an impossible one; the rebuilt block map tells its size.
UNKNOWN_SIZE = ino_format.MAX_FILE_SIZE + 1

_PRIVATE = 0o600  # permissions of an inode that gets another file type


class SoundInode(NamedTuple):
    """An inode that does not contradict itself, and what changed for that."""

    record: InodeRecord
    payload: bytes
    xattr: bytes  # extended attributes in the inode block
    changes: tuple[str, ...]  # a line for each

    def body(self) -> bytes:
        """Return the bytes after the node header."""
        return INODE.pack(self.record) + self.payload + self.xattr


class _Draft:
    """A record under repair; it notes a line for every change."""

    def __init__(self, record: InodeRecord) -> None:
        self.record = record
        self.changes: list[str] = []

    def set(self, why: str, **fields: Any) -> None:
        changed = self.record._replace(**fields)
        if changed != self.record:
            self.record = changed
            self.changes.append(why)


def make_sound(data: bytes) -> SoundInode:
    """Return the inode in the used bytes of an inode block; at least PAYLOAD_OFFSET bytes."""
    draft = _Draft(INODE.unpack(data, node_format.HEADER_SIZE))
    _mend_payload_kind(draft)
    _mend_type(draft)
    payload = _mend_payload(draft, data[PAYLOAD_OFFSET:])
    blob = _mend_xattr(draft, data[PAYLOAD_OFFSET + len(payload) :])
    _mend_rest(draft)
    return SoundInode(draft.record, payload, blob, tuple(draft.changes))


def _mend_payload_kind(draft: _Draft) -> None:
    record = draft.record
    pointers = record.payload in (ino_format.MAP, ino_format.DIRTREE)
    unknown = record.payload >= len(ino_format.PAYLOAD_NAMES)
    if unknown or (pointers and record.height > node_format.MAX_HEIGHT):
        draft.set(
            f"what it held cannot be read (payload {record.payload}, {record.height} levels)",
            payload=ino_format.EMPTY, height=0, size=0,
        )  # fmt: skip
    elif record.payload == ino_format.DIRTREE and not record.height:
        draft.set("its directory tree has no levels: now empty", payload=ino_format.EMPTY)
    elif not pointers:
        draft.set("it had levels, but no pointers", height=0)


def _mend_type(draft: _Draft) -> None:
    """Make the mode follow the payload, which has a structure that shows what it is."""
    record = draft.record
    if record.fixed and record.payload != ino_format.MAP:
        draft.set("it was marked as fixed, but has no block map", fixed=0)
    else:
        draft.set("its mark of fixed files was impossible", fixed=min(record.fixed, 1))
    draft.set("it had impossible mode bits", mode=record.mode & MODE_MASK)
    kind = stat.S_IFMT(draft.record.mode)
    if record.payload in ino_format.ALLOWED_PAYLOADS.get(kind, ()):
        return
    is_directory = record.payload in (ino_format.DIRLEAF, ino_format.DIRTREE)
    new = stat.S_IFDIR | 0o700 if is_directory else stat.S_IFREG | _PRIVATE
    named = "directory" if is_directory else "regular file"
    draft.set(f"mode {record.mode:o} contradicts its contents: now a {named}", mode=new)


def _mend_payload(draft: _Draft, rest: bytes) -> bytes:
    record = draft.record
    size = min(record.payload_size, len(rest))
    if record.payload == ino_format.EMPTY:
        size = 0
    elif record.payload == ino_format.MAP:
        size -= size % words.POINTER_SIZE
    draft.set("its payload does not fit its block", payload_size=size)
    if record.payload == ino_format.INLINE:
        draft.set(f"its size was {record.size}, {size} bytes are there", size=size)
    elif record.size > ino_format.MAX_FILE_SIZE:
        known = record.payload != ino_format.MAP
        size_now = ino_format.MAX_FILE_SIZE if known else UNKNOWN_SIZE
        draft.set(f"its size was {record.size}", size=size_now)
    return rest[:size]


def _mend_xattr(draft: _Draft, rest: bytes) -> bytes:
    record = draft.record
    outside = record.xattr_pointer != words.NULL
    possible = 0 < record.xattr_size <= xattr.BLOB_MAX
    if outside and not record.xattr_inline and possible:
        if record.xattr_height > node_format.MAX_HEIGHT:
            return _drop_xattr(draft)
        return b""
    blob = rest[: record.xattr_inline]
    try:
        attributes = xattr.decode(blob)
        whole = len(blob) == record.xattr_inline == record.xattr_size and not outside
    except ValueError:
        whole = False
    if whole and not record.xattr_height:
        return _mend_locks(draft, blob, attributes)
    return _drop_xattr(draft)


def _mend_locks(draft: _Draft, blob: bytes, attributes: dict[bytes, bytes]) -> bytes:
    damaged = [name for name in attributes if lock.problem(name, attributes[name])]
    if not damaged:
        return blob
    blob = xattr.encode({name: attributes[name] for name in attributes if name not in damaged})
    draft.set("its damaged locks are gone", xattr_size=len(blob), xattr_inline=len(blob))
    return blob


def _drop_xattr(draft: _Draft) -> bytes:
    draft.set(
        "its extended attributes are lost",
        xattr_height=0, xattr_size=0, xattr_inline=0, xattr_pointer=words.NULL,
    )  # fmt: skip
    return b""


def _mend_rest(draft: _Draft) -> None:
    record = draft.record
    if stat.S_ISLNK(record.mode) and not 1 <= record.size <= ino_format.TARGET_MAX:
        draft.set(
            f"a symlink to {record.size} bytes: now a regular file", mode=stat.S_IFREG | _PRIVATE
        )
    kind = stat.S_IFMT(draft.record.mode)
    if kind not in (stat.S_IFREG, stat.S_IFLNK):
        draft.set("it had a size, but is not a file", size=0)
    if kind not in (stat.S_IFCHR, stat.S_IFBLK):
        draft.set("it had a device number, but is not a device", rdev=0)
    elif record.rdev >> 32:
        draft.set("it had a device number of more than 32 bits", rdev=0)
    if kind != stat.S_IFDIR:
        draft.set("it had directory fields, but is not a directory", parent=0, entries=0)
