"""The numbered invariants.  Each `check_*` states one and yields a phrase for each violation.

The functions are pure: the caller reads the facts.  Every fact may come from a hostile region.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, ParamSpec

from ivshmemfs.errors import UnsupportedVersion
from ivshmemfs.format import inode as ino_format
from ivshmemfs.format import lock, superblock, words, xattr
from ivshmemfs.format import node as node_format
from ivshmemfs.format.dirent import COLLISIONS, NAME_MAX, name_key
from ivshmemfs.format.geometry import Geometry
from ivshmemfs.format.inode import InodeRecord
from ivshmemfs.format.node import KIND_NAMES, HeaderRecord, RootRecord
from ivshmemfs.format.record import Buffer
from ivshmemfs.fsck.report import Invariant
from ivshmemfs.region import crc32c

P = ParamSpec("P")

INVARIANTS: dict[int, Invariant[Any]] = {}

MODE_MASK = 0o177777
FUTURE = 1 << 19  # incarnations; one that is up to this far ahead, modulo 2^20, is of the future


def _invariant(
    number: int, note: bool = False
) -> Callable[[Callable[P, Iterator[str]]], Invariant[P]]:
    def register(function: Callable[P, Iterator[str]]) -> Invariant[P]:
        invariant = Invariant(number, note, function)
        if number in INVARIANTS:
            raise ValueError(f"two invariants have number {number}")
        INVARIANTS[number] = invariant
        return invariant

    return register


def show(name: bytes) -> str:
    """Return a name from the region as ASCII of bounded length."""
    return ascii(name[:60])[1:] + ("..." if len(name) > 60 else "")


# --- superblock and control words -----------------------------------------------------------


@_invariant(1)
def check_superblock(raw: Buffer) -> Iterator[str]:
    """The superblock is whole: magic, checksum, a version and features that are known."""
    record = superblock.SUPERBLOCK.unpack(raw)
    if record.magic != superblock.MAGIC:
        yield f"the superblock begins with {show(record.magic)}"
    elif not superblock.crc_valid(raw):
        yield "the superblock's checksum is wrong"
    else:
        try:
            superblock.check_version(record)
        except UnsupportedVersion as error:
            yield str(error)


@_invariant(2)
def check_superblock_copy(raw: Buffer, copy: Buffer) -> Iterator[str]:
    """The copy at byte 2048 equals the superblock."""
    if bytes(raw) != bytes(copy):
        yield "the superblock and its copy differ"


@_invariant(3)
def check_geometry(geometry: Geometry, region_size: int) -> Iterator[str]:
    """The geometry is possible, and it is that of the region as mapped."""
    if problem := geometry.problem():
        yield f"the geometry is impossible: {problem}"
    if geometry.region_size != region_size:
        yield f"the region has {region_size} bytes, the superblock says {geometry.region_size}"


@_invariant(4)
def check_root(header: HeaderRecord, record: RootRecord, fsid: int, commit: int) -> Iterator[str]:
    """The commit word leads to a root block of this filesystem, not newer than the word itself."""
    if record.fsid != fsid:
        yield f"the root block is of filesystem {record.fsid:#x}, not {fsid:#x}"
    ahead = (record.sequence - words.split_commit(commit)[0]) & words.SEQUENCE_MASK
    if 0 < ahead < words.SEQUENCE_MASK // 2:
        yield f"the root block is {ahead} commits newer than the commit word"
    capacity = header.used - node_format.ROOT_POINTERS
    if record.slots * words.POINTER_SIZE != capacity:
        yield f"the root block has {record.slots} pointers in {capacity} bytes"
    if record.height > node_format.MAX_HEIGHT:
        yield f"the inode table is {record.height} levels high"


# --- blocks and pointers --------------------------------------------------------------------


@_invariant(5)
def check_node(
    data: bytes, block_size: int, tag: int, kind: int, level: int, owner: int
) -> Iterator[str]:
    """A metadata block is whole and has the kind, level and owner that its place asks for.  It
    repeats the tag of the claim that wrote it."""
    header = node_format.HEADER.unpack(data)
    if not node_format.HEADER_SIZE <= header.used <= block_size:
        yield f"{header.used} bytes in use in a block of {block_size}"
        return
    if crc32c(data[4 : header.used]) != header.crc:
        yield "its checksum is wrong"
        return
    if header.tag != tag:
        yield f"it was written under tag {header.tag:#x}, the pointer says {tag:#x}"
    if (header.kind, header.level, header.owner) != (kind, level, owner):
        yield (
            f"it is a {KIND_NAMES.get(header.kind, header.kind)} of level {header.level} of "
            f"inode {header.owner}, where a {KIND_NAMES[kind]} of level {level} of inode {owner} "
            "should be"
        )


@_invariant(6)
def check_tag(pointed: int, found: int) -> Iterator[str]:
    """The tag in a pointer is the tag of the block in the tag table."""
    if pointed != found:
        now = f"the tag of the block is {found:#x}" if found else "the block is free"
        yield f"a pointer has tag {pointed:#x}, but {now}"


@_invariant(7)
def check_pointer(block: int, weight: int, tag: int, block_count: int) -> Iterator[str]:
    """A pointer is all zero, or has a tag and a block within the region."""
    if not tag:
        yield f"a null pointer has block {block}, weight {weight}"
    elif block >= block_count:
        yield f"a pointer leads to block {block} of {block_count}"


@_invariant(8)
def check_single_reference(owner: int, other: int) -> Iterator[str]:
    """No block is referenced twice."""
    by = f"inode {other}" if other else "the inode table"
    again = f"inode {owner}" if owner else "the inode table"
    yield f"{again} references it, and {by} does already"


@_invariant(9)
def check_weight(stated: int, found: int) -> Iterator[str]:
    """A pointer's weight is the number of blocks in its subtree, the target included."""
    if stated != found:
        yield f"a pointer has weight {stated}; its subtree has {found} blocks"


@_invariant(10)
def check_slots(slots: bytes, used: int, may_be_empty: bool) -> Iterator[str]:
    """A run of radix tree slots consists of whole pointers, and its last one is not null; an
    index block has at least one."""
    if used % words.POINTER_SIZE:
        yield f"{used} bytes are not a whole number of pointers"
    elif not slots and not may_be_empty:
        yield "an index block without pointers"
    elif slots and not any(slots[-words.POINTER_SIZE :]):
        yield "a run of pointers ends with null pointers"


# --- the inode table ------------------------------------------------------------------------


@_invariant(11)
def check_counters(
    record: RootRecord, used: int, inodes: int, orphans: int, highest: int
) -> Iterator[str]:
    """The root block's counters are true: blocks in use, inodes, inodes without links; and the
    next inode number is above all there are."""
    for name, stated, found in (
        ("blocks in use", record.used, used),
        ("inodes", record.inodes, inodes),
        ("inodes without links", record.orphans, orphans),
    ):
        if stated != found:
            yield f"the root block counts {stated} {name}; there are {found}"
    if not highest < record.next_ino <= ino_format.MAX_INO:
        yield f"the next inode number is {record.next_ino}; the highest in use is {highest}"


@_invariant(12)
def check_reserved_inodes(ino: int, kind: int | None) -> Iterator[str]:
    """Inode 1, the root directory, and inode 2, the list of inodes without links, exist and are
    directories.  No inode has number 0 or one above the largest."""
    if ino in (ino_format.ROOT_INO, ino_format.ORPHANS_INO):
        if kind is None:
            yield "it is missing"
        elif kind != stat.S_IFDIR >> 12:
            yield "it is not a directory"
    elif not ino_format.FIRST_INO <= ino <= ino_format.MAX_INO:
        yield "no inode can have this number"


# --- inodes ---------------------------------------------------------------------------------


@_invariant(13)
def check_inode(record: InodeRecord, used: int) -> Iterator[str]:
    """An inode record is sane: it has a known type, and a payload that goes with it and fits its
    block.  Fields that do not apply are zero."""
    kind = stat.S_IFMT(record.mode)
    if kind not in ino_format.ALLOWED_PAYLOADS or record.mode & ~MODE_MASK:
        yield f"mode {record.mode:o} is of no file type"
        return
    if record.payload not in ino_format.ALLOWED_PAYLOADS[kind]:
        yield f"a payload of kind {record.payload} does not go with mode {record.mode:o}"
        return
    if ino_format.PAYLOAD_OFFSET + record.payload_size + record.xattr_inline != used:
        yield (
            f"{record.payload_size} bytes of payload and {record.xattr_inline} of extended "
            f"attributes do not make up {used} bytes in use"
        )
    if record.size > ino_format.MAX_FILE_SIZE:
        yield f"a size of {record.size} bytes"
    yield from _check_payload(record)
    if kind not in (stat.S_IFREG, stat.S_IFLNK) and record.size:
        yield f"a size of {record.size} bytes, but it is not a file"
    if kind not in (stat.S_IFCHR, stat.S_IFBLK) and record.rdev:
        yield f"device number {record.rdev:#x}, but it is not a device"
    elif record.rdev >> 32:
        yield f"device number {record.rdev:#x}, of more than 32 bits"
    if record.fixed and (kind != stat.S_IFREG or record.payload != ino_format.MAP):
        yield "it is marked as fixed, but has no block map"
    elif record.fixed > 1:
        yield f"a mark of fixed files of {record.fixed}"
    if kind != stat.S_IFDIR and (record.parent or record.entries):
        yield f"parent {record.parent} and {record.entries} entries, but it is not a directory"


def _check_payload(record: InodeRecord) -> Iterator[str]:
    kind = record.payload
    if record.height > node_format.MAX_HEIGHT:
        yield f"a tree of {record.height} levels"
    if kind == ino_format.EMPTY and record.payload_size:
        yield f"an empty payload of {record.payload_size} bytes"
    if kind == ino_format.INLINE and record.payload_size != record.size:
        yield f"the inode block has {record.payload_size} bytes, but the size is {record.size}"
    if kind not in (ino_format.MAP, ino_format.DIRTREE) and record.height:
        yield f"{record.height} levels below a payload without pointers"
    if kind == ino_format.DIRTREE and not record.height:
        yield "a directory tree without levels"
    if stat.S_ISLNK(record.mode) and not 1 <= record.size <= ino_format.TARGET_MAX:
        yield f"a symlink to a target of {record.size} bytes"


@_invariant(14)
def check_map(beyond: int) -> Iterator[str]:
    """A file's block map has no pointers beyond the end of the file."""
    if beyond:
        yield f"{beyond} blocks are beyond the end of the file"


@_invariant(15)
def check_blocks(stated: int, found: int) -> Iterator[str]:
    """An inode's count of its blocks is true: inode block, map, data, directory nodes, extended
    attributes."""
    if stated != found:
        yield f"it counts {stated} blocks; there are {found}"


@_invariant(16)
def check_xattr(record: InodeRecord, blob: bytes | None) -> Iterator[str]:
    """Extended attributes are either in the inode block or in a tree of their own.  They are in
    order, have valid names, and add up to their size."""
    if record.xattr_inline not in (0, record.xattr_size) or record.xattr_size > xattr.BLOB_MAX:
        yield f"{record.xattr_inline} of {record.xattr_size} bytes of extended attributes inline"
        return
    outside = record.xattr_size > record.xattr_inline
    if outside != (record.xattr_pointer != words.NULL):
        yield "the pointer to the extended attributes contradicts their size"
    if record.xattr_height > node_format.MAX_HEIGHT or (record.xattr_height and not outside):
        yield f"a tree of {record.xattr_height} levels below the extended attributes' pointer"
    if blob is not None:
        try:
            xattr.decode(blob)
        except ValueError as error:
            yield str(error)


# --- directories ----------------------------------------------------------------------------


@_invariant(17)
def check_directory_bounds(keys: Sequence[int], low: int, high: int, top: bool) -> Iterator[str]:
    """The bounds in a directory's interior node ascend within the range of the node, and begin
    with 0 at the top of the tree.  They never divide names of equal hash."""
    if any(a >= b for a, b in pairwise(keys)):
        yield "its bounds are not in order"
    if keys and not (low <= keys[0] and keys[-1] < high):
        yield f"its bounds {keys[0]:#x} to {keys[-1]:#x} leave the range {low:#x} to {high:#x}"
    if any(key % COLLISIONS for key in keys):
        yield "a bound divides names of equal hash"
    if top and keys and keys[0]:
        yield f"the first bound of the tree is {keys[0]:#x}, not 0"


@_invariant(18)
def check_directory_keys(keys: Sequence[int], low: int, high: int) -> Iterator[str]:
    """The keys of a directory leaf ascend within the range of the leaf."""
    if any(a >= b for a, b in pairwise(keys)):
        yield "its keys are not in order"
    if keys and not (low <= keys[0] and keys[-1] < high):
        yield f"keys {keys[0]:#x} to {keys[-1]:#x} leave the range {low:#x} to {high:#x}"


@_invariant(19)
def check_name(name: bytes, key: int, secret: bytes) -> Iterator[str]:
    """A name has 1 to 255 bytes, no slash and no NUL, and is neither `.` nor `..`.  Its key is its
    hash."""
    if not name or len(name) > NAME_MAX or name in (b".", b"..") or b"/" in name or b"\0" in name:
        yield f"{show(name)} cannot be a name"
    elif not 0 <= key - name_key(name, secret) < COLLISIONS:
        yield f"the key {key:#x} is not that of {show(name)}"


@_invariant(20)
def check_unique_name(name: bytes) -> Iterator[str]:
    """No directory has a name twice."""
    yield f"{show(name)} is in it twice"


@_invariant(21)
def check_target(name: bytes, target: int, stated: int, found: int | None) -> Iterator[str]:
    """A name leads to an inode that exists and has the type that the name states.  None leads to
    the root directory or the list of inodes without links."""
    if found is None:
        yield f"{show(name)} leads to inode {target}, which does not exist"
    elif target in (ino_format.ROOT_INO, ino_format.ORPHANS_INO):
        yield f"{show(name)} leads to inode {target}, which no name may lead to"
    elif stated != found:
        yield f"{show(name)} says that inode {target} is of type {stated}; it is of {found}"


@_invariant(22)
def check_entries(stated: int, found: int) -> Iterator[str]:
    """A directory's count of its names is true."""
    if stated != found:
        yield f"it counts {stated} names; there are {found}"


@_invariant(23)
def check_parent(names: int, parent: int, found: int, connected: bool) -> Iterator[str]:
    """Exactly one name leads to a directory, and its parent field names the directory that holds
    it.  Going up from parent to parent leads to the root directory."""
    if names > 1:
        yield f"{names} names lead to this directory"
    if names and parent != found:
        yield f"its parent is inode {found}, it says {parent}"
    if not connected:
        yield "the directory cannot be reached from the root directory"


@_invariant(24)
def check_links(stated: int, found: int) -> Iterator[str]:
    """A link count is true: the names that lead to a file, two and the subdirectories of a
    directory."""
    if stated != found:
        yield f"its link count is {stated}; it should be {found}"


@_invariant(25)
def check_orphan(listed: bool, linked: bool) -> Iterator[str]:
    """The list of inodes without links has exactly the inodes that no name leads to, each
    under its number in 16 hexadecimal digits."""
    if listed and linked:
        yield "it is listed as without links, and has some"
    elif not listed and not linked:
        yield "no name leads to it, and it is not listed as without links"


@_invariant(26)
def check_orphan_name(name: bytes, target: int) -> Iterator[str]:
    """An entry of the list of inodes without links is named after the inode that it leads to."""
    if name != ino_format.orphan_name(target):
        yield f"{show(name)} leads to inode {target}"


# --- peers and tags -------------------------------------------------------------------------


@_invariant(27)
def check_slot(state: int, identity_valid: bool) -> Iterator[str]:
    """A peer slot has a state that exists, and a valid identity if its peer has joined."""
    if state >= len(words.STATE_NAMES):
        yield f"its state is {state}"
    elif state in (words.IDLE, words.ACTIVE) and not identity_valid:
        yield f"it is {words.STATE_NAMES[state]}, but its identity's checksum is wrong"


@_invariant(28)
def check_tag_past(tag: int, states: tuple[int, ...]) -> Iterator[str]:
    """A tag is of a slot that exists (0: of a repair), and of a transaction that has begun."""
    slot, incarnation, counter = words.split_tag(tag)
    if slot >= len(states):
        yield f"its tag {tag:#x} is of slot {slot}; there are {len(states) - 1}"
        return
    _, now, reached = words.split_state(states[slot])
    ahead = (incarnation - now) & words.INCARNATION_MASK
    if 0 < ahead < FUTURE:
        yield f"its tag {tag:#x} is {ahead} incarnations ahead of slot {slot}"
    elif not ahead and counter > reached:
        yield f"its tag {tag:#x} is {counter - reached} transactions ahead of slot {slot}"


@_invariant(29, note=True)
def check_leak(leaked: int) -> Iterator[str]:
    """Every claimed block can be reached from the root, or its owner is amid a transaction.
    (Blocks that a dead peer claimed do no harm: collection releases them.)"""
    if leaked:
        yield f"{leaked} claimed blocks cannot be reached from the root"


@_invariant(30, note=True)
def check_tail(tail: bytes) -> Iterator[str]:
    """The bytes beyond the end of a file in its last block are zero."""
    if any(tail):
        yield "its last block is not zero beyond the end of the file"


# --- locks ----------------------------------------------------------------------------------


@_invariant(31, note=True)
def check_locks(blob: bytes) -> Iterator[str]:
    """The locks of an inode, and the list of waiting owners, have a possible shape.

    An impossible table locks nothing, and the next lock replaces it.
    """
    try:
        attributes = xattr.decode(blob)
    except ValueError:
        return
    for name in (lock.LOCKS, lock.WAITS):
        if problem := lock.problem(name, attributes.get(name, b"")):
            yield problem


# --- fixed files ----------------------------------------------------------------------------


@_invariant(32)
def check_row(wanted: int, found: int, strays: int) -> Iterator[str]:
    """The data blocks of a fixed file follow each other, without holes, up to its end."""
    if found != wanted:
        yield f"a fixed file has {found} of {wanted} blocks"
    if strays:
        yield f"{strays} blocks of a fixed file are not where the row has them"
