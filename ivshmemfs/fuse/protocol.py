"""The part of the FUSE protocol that this package speaks itself: linux/fuse.h, ABI 7.

A request is an IN header and a body.  An answer is an OUT header and a body.  Both use the
machine's own byte order.  This module declares only what `connection` and `kernel_frontend` need.
`native` takes headers apart and packs entries and attributes; libfuse speaks the rest.
"""

from __future__ import annotations

import errno
import struct

#: Errors of the FUSE descriptor after the connection has ended.  ENODEV follows an unmount.  The
#: others follow an abort (through /sys/fs/fuse/connections, or by an unmount under load).
ENDED = frozenset((errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN))
#: Largest errno in an answer.  The kernel refuses an answer with a larger one.
MAX_ERRNO = 511

# --- operations -------------------------------------------------------------------------------

LOOKUP = 1
FORGET = 2
GETATTR = 3
SETATTR = 4
READLINK = 5
SYMLINK = 6
MKNOD = 8
MKDIR = 9
UNLINK = 10
RMDIR = 11
RENAME = 12
LINK = 13
OPEN = 14
READ = 15
WRITE = 16
STATFS = 17
RELEASE = 18
FSYNC = 20
SETXATTR = 21
GETXATTR = 22
LISTXATTR = 23
REMOVEXATTR = 24
FLUSH = 25
INIT = 26
OPENDIR = 27
READDIR = 28
RELEASEDIR = 29
FSYNCDIR = 30
GETLK = 31
SETLK = 32
SETLKW = 33
ACCESS = 34
CREATE = 35
INTERRUPT = 36
BATCH_FORGET = 42
FALLOCATE = 43
RENAME2 = 45
LSEEK = 46
COPY_FILE_RANGE = 47
TMPFILE = 51
STATX = 52

# --- headers ----------------------------------------------------------------------------------

#: uid and gid of a request that makes no inode, if ALLOW_IDMAP was negotiated.
NO_ID = (1 << 32) - 1
#: length, opcode, unique, nodeid, uid, gid, pid, length of extensions.
IN_HEADER = struct.Struct("=IIQQIIIHxx")
#: length, negative errno, unique.
OUT_HEADER = struct.Struct("=IiQ")

# --- bodies of requests -----------------------------------------------------------------------

#: nlookup.
FORGET_IN = struct.Struct("=Q")
#: count; that many of nodeid, nlookup follow.
BATCH_FORGET_IN = struct.Struct("=Ixxxx")
FORGET_ONE = struct.Struct("=QQ")
#: valid, fh, size, atime, mtime, atimensec, mtimensec, mode, uid, gid.
SETATTR_IN = struct.Struct("=IxxxxQQxxxxxxxxqqxxxxxxxxIIxxxxIxxxxIIxxxx")
#: mode, umask; the name follows.
MKDIR_IN = struct.Struct("=II")
#: flags, mode, umask; CREATE, where the name follows, and TMPFILE.
CREATE_IN = struct.Struct("=IIIxxxx")
#: flags.
OPEN_IN = struct.Struct("=Ixxxx")
#: fh, offset, size; READ and READDIR.
READ_IN = struct.Struct("=QQIxxxxxxxxxxxxxxxxxxxx")
#: The low byte of a READ's flags; without this one the kernel reads pages that it will keep.
READ_FLAGS_AT = IN_HEADER.size + 20
READ_LOCKOWNER = 1 << 1
#: fh, offset, size, write_flags, the file's flags; the bytes follow.
WRITE_IN = struct.Struct("=QQIIxxxxxxxxIxxxx")
#: mode, rdev as dev_t has its lower 32 bits, umask; the name follows.
MKNOD_IN = struct.Struct("=IIIxxxx")
#: nodeid of the file; its new name follows.
LINK_IN = struct.Struct("=Q")
#: fh, flags; FSYNC and FSYNCDIR.
FSYNC_IN = struct.Struct("=QIxxxx")
#: length of the value, flags as setxattr(2) takes them; name and value follow.
SETXATTR_IN = struct.Struct("=II")
#: The same and flags of FUSE; used if SETXATTR_EXT was negotiated.
SETXATTR_EXT_IN = struct.Struct("=IIIxxxx")
#: size of the caller's buffer, 0 to ask for the size needed; GETXATTR (the name follows) and
#: LISTXATTR.
GETXATTR_IN = struct.Struct("=Ixxxx")
#: fh; RELEASE and RELEASEDIR.
RELEASE_IN = struct.Struct("=Qxxxxxxxxxxxxxxxx")
#: fh, owner of the locks that end; FLUSH.
FLUSH_IN = struct.Struct("=QxxxxxxxxQ")
#: fh, owner, first and last byte, type, pid, lk_flags; GETLK, SETLK, SETLKW.
LK_IN = struct.Struct("=QQQQIIIxxxx")
#: mask, as access(2) takes it.
ACCESS_IN = struct.Struct("=Ixxxx")
#: unique of the request whose caller was interrupted.
INTERRUPT_IN = struct.Struct("=Q")
#: nodeid of the new directory; both names follow.
RENAME_IN = struct.Struct("=Q")
#: nodeid of the new directory, flags; both names follow.
RENAME2_IN = struct.Struct("=QIxxxx")

#: fh, offset, length, mode.
FALLOCATE_IN = struct.Struct("=QQQIxxxx")
#: fh and offset to read from, nodeid, fh and offset to write to, length, flags.
COPY_FILE_RANGE_IN = struct.Struct("=QQQQQQQ")
#: fh, offset, whence.
LSEEK_IN = struct.Struct("=QQIxxxx")

# Bits of SETATTR_IN's first field.
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, SET_FH = 1, 2, 4, 8, 16, 32, 64
SET_ATIME_NOW, SET_MTIME_NOW = 1 << 7, 1 << 8
#: In SETXATTR_EXT_IN's flags: an access list must clear set-group-ID.
SETXATTR_ACL_KILL_SGID = 1
#: In LK_IN's type, as fcntl(2) has them.
F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2
#: In lk_flags: an flock(2) lock.
LK_FLOCK = 1
#: In FSYNC_IN's flags: fdatasync(2), which leaves out the attributes.
FSYNC_FDATASYNC = 1
#: In write_flags: the kernel writes back its page cache, through any handle of the file.
WRITE_CACHE = 1

# --- bodies of answers ------------------------------------------------------------------------

#: fh, open flags.
OPEN_OUT = struct.Struct("=QIxxxx")
#: size.
WRITE_OUT = struct.Struct("=Ixxxx")
#: size of the value of an attribute, or of the list of names.
GETXATTR_OUT = struct.Struct("=Ixxxx")
#: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize.
STATFS_OUT = struct.Struct("=QQQQQIIIxxxx24x")
#: First and last byte, type, pid.
LK_OUT = struct.Struct("=QQII")
#: offset.
LSEEK_OUT = struct.Struct("=Q")
#: cache time and flags (all 0 here), mask, blksize, nlink, uid, gid, mode, ino, size, blocks.
#: Then seconds and nanoseconds of atime, btime, ctime and mtime; major and minor of rdev.
STATX_OUT = struct.Struct("=32xIIxxxxxxxxIIIHxxQQQxxxxxxxxqIxxxxqIxxxxqIxxxxqIxxxxII120x")
#: In its mask: the fields of stat(2), and the birth time.
STATX_BASIC_STATS, STATX_BTIME = 0x7FF, 0x800
#: ino, cookie of the next entry, length of the name, type; the name follows, padded to 8 bytes.
DIRENT = struct.Struct("=QQII")

# --- notifications: an OUT header with `unique` 0 and the code in place of the errno -----------

NOTIFY_INVAL_INODE = 2
NOTIFY_STORE = 4
#: nodeid, offset, length; negative or 0: to the end.
_INVAL_INODE_OUT = struct.Struct("=Qqq")
#: nodeid, offset, bytes that follow.
_STORE_OUT = struct.Struct("=QQIxxxx")


def inval_inode(node: int) -> bytes:
    """The message that makes the kernel drop all pages, and the attributes, of a file."""
    body = _INVAL_INODE_OUT.pack(node, 0, 0)
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), NOTIFY_INVAL_INODE, 0) + body


def store(node: int, offset: int, content: bytes) -> bytes:
    """The message that puts *content* into the kernel's pages; the file grows to its end."""
    body = _STORE_OUT.pack(node, offset, len(content)) + content
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), NOTIFY_STORE, 0) + body


#: In the flags of OPEN_OUT: reads and writes bypass the page cache.
FOPEN_DIRECT_IO = 1

# --- INIT -------------------------------------------------------------------------------------

#: major, minor, max_readahead, flags, flags2.
INIT_IN = struct.Struct("=IIIII")
#: Up to flags2: major, minor, max_readahead, flags, max_background, congestion_threshold,
#: max_write, time_gran, max_pages, map_alignment, flags2.
INIT_OUT = struct.Struct("=IIIIHHIIHHI")
#: In ``flags``: the second word of flags is valid.
INIT_EXT = 1 << 30
#: In ``flags``: listings carry attributes, always or when the kernel asks for them.
DO_READDIRPLUS, READDIRPLUS_AUTO = 1 << 13, 1 << 14
#: In ``flags``: the file system keeps fcntl(2) locks; flock(2) locks.
POSIX_LOCKS, FLOCK_LOCKS = 1 << 1, 1 << 10
#: In ``flags``: the kernel sends SETXATTR_EXT_IN.
SETXATTR_EXT = 1 << 29
#: In ``flags``: the kernel does not apply the umask; the request carries it.
DONT_MASK = 1 << 6
#: In ``flags``: the kernel obeys access lists; it turns on default_permissions, too.
POSIX_ACL = 1 << 20
#: In ``flags2`` (bit 36 of both words together): shared mappings with direct I/O.
DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32)
#: In ``flags2`` (bit 40): the mount can be idmapped; the kernel refuses it without
#: default_permissions.
ALLOW_IDMAP = 1 << (40 - 32)
