"""The FUSE protocol's bytes, as far as this package speaks it itself: linux/fuse.h, ABI 7.

A request is an IN header and a body, an answer an OUT header and a body; all in the machine's own
byte order.  Only what `connection` and `kernel_frontend` need is declared; libfuse speaks the rest.
"""

from __future__ import annotations

import errno
import struct

#: Errors of the FUSE descriptor that mean that the connection has ended: unmounted (ENODEV), or
#: aborted, as /sys/fs/fuse/connections and an unmount under load do it.
ENDED = frozenset((errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN))
#: The kernel takes no larger errno in an answer; the request would never be answered.
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
#: mode; the name follows.  The kernel has applied the umask.
MKDIR_IN = struct.Struct("=Ixxxx")
#: flags, mode; the name follows.
CREATE_IN = struct.Struct("=IIxxxxxxxx")
#: flags.
OPEN_IN = struct.Struct("=Ixxxx")
#: fh, offset, size; READ and READDIR.
READ_IN = struct.Struct("=QQIxxxxxxxxxxxxxxxxxxxx")
#: fh, offset, size, write_flags, the file's flags; the bytes follow.
WRITE_IN = struct.Struct("=QQIIxxxxxxxxIxxxx")
#: mode, rdev as dev_t has its lower 32 bits; the name follows.  The kernel has applied the umask.
MKNOD_IN = struct.Struct("=IIxxxxxxxx")
#: nodeid of what gets another name; that name follows.
LINK_IN = struct.Struct("=Q")
#: fh, flags; FSYNC and FSYNCDIR.
FSYNC_IN = struct.Struct("=QIxxxx")
#: length of the value, flags as setxattr(2) takes them; name and value follow.  Longer by 8 bytes
#: where SETXATTR_EXT was agreed on.
SETXATTR_IN = struct.Struct("=II")
SETXATTR_EXT_SIZE = 16
#: room that the caller has, 0 to ask for the size; GETXATTR, where the name follows, and LISTXATTR.
GETXATTR_IN = struct.Struct("=Ixxxx")
#: fh; RELEASE and RELEASEDIR.
RELEASE_IN = struct.Struct("=Qxxxxxxxxxxxxxxxx")
#: fh, owner of the locks that end; FLUSH.
FLUSH_IN = struct.Struct("=QxxxxxxxxQ")
#: fh, owner, first and last byte, type, pid, lk_flags; GETLK, SETLK, SETLKW.
LK_IN = struct.Struct("=QQQQIIIxxxx")
#: mask, as access(2) takes it.
ACCESS_IN = struct.Struct("=Ixxxx")
#: unique of the request that is not waited for any more.
INTERRUPT_IN = struct.Struct("=Q")
#: nodeid of the new directory; both names follow.
RENAME_IN = struct.Struct("=Q")
#: The same, and flags.
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
#: In LK_IN's type, as fcntl(2) has them.
F_RDLCK, F_WRLCK, F_UNLCK = 0, 1, 2
#: In lk_flags: an flock(2) lock.
LK_FLOCK = 1
#: In FSYNC_IN's flags: without the attributes.
FSYNC_FDATASYNC = 1
#: In write_flags: written back from the page cache, with whatever handle there is.
WRITE_CACHE = 1

# --- bodies of answers ------------------------------------------------------------------------

#: ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize.
ATTR = struct.Struct("=QQQqqqIIIIIIIIIxxxx")
#: The first field of ATTR.
INO = struct.Struct("=Q")
#: Before ATTR: how long it may be kept (0 here).
ATTR_OUT_SIZE = 16
#: nodeid; before ATTR: generation and how long name and attributes may be kept (all 0 here).
ENTRY_OUT = struct.Struct("=Q32x")
#: fh, open flags.
OPEN_OUT = struct.Struct("=QIxxxx")
#: size.
WRITE_OUT = struct.Struct("=Ixxxx")
#: size of an attribute, or of their names.
GETXATTR_OUT = struct.Struct("=Ixxxx")
#: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize.
STATFS_OUT = struct.Struct("=QQQQQIIIxxxx24x")
#: First and last byte, type, pid.
LK_OUT = struct.Struct("=QQII")
#: offset.
LSEEK_OUT = struct.Struct("=Q")
#: After how long it may be kept and flags (all 0 here): mask, blksize, nlink, uid, gid, mode, ino,
#: size, blocks, seconds and nanoseconds of atime, btime, ctime and mtime, rdev's major and minor.
STATX_OUT = struct.Struct("=32xIIxxxxxxxxIIIHxxQQQxxxxxxxxqIxxxxqIxxxxqIxxxxqIxxxxII120x")
#: In its mask: all that stat(2) tells, and when it was made.
STATX_BASIC_STATS, STATX_BTIME = 0x7FF, 0x800
#: ino, cookie of the next, length of the name, type; the name follows, then zeros up to 8 bytes.
DIRENT = struct.Struct("=QQII")

#: Open flags of an answer.
FOPEN_DIRECT_IO = 1

# --- INIT -------------------------------------------------------------------------------------

#: major, minor, max_readahead, flags, flags2.
INIT_IN = struct.Struct("=IIIII")
#: Up to flags2: major, minor, max_readahead, flags, max_background, congestion_threshold,
#: max_write, time_gran, max_pages, map_alignment, flags2.
INIT_OUT = struct.Struct("=IIIIHHIIHHI")
#: In ``flags``: the second word of flags counts.
INIT_EXT = 1 << 30
#: In ``flags``: listings come with attributes, always or as the kernel likes.
DO_READDIRPLUS, READDIRPLUS_AUTO = 1 << 13, 1 << 14
#: In ``flags``: the file system keeps fcntl(2) locks; flock(2) locks.
POSIX_LOCKS, FLOCK_LOCKS = 1 << 1, 1 << 10
#: In ``flags``: SETXATTR_IN is longer.
SETXATTR_EXT = 1 << 29
#: In the second word of flags (bit 36 of both words together).
DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32)
