"""The program of the replayer: a child of the daemon that repeats foreign changes on the mount.

The kernel reports to inotify what system calls on this machine do.  So the replayer makes the
system calls that another machine made.  The daemon knows the requests of this process by its pid.
It answers them as the kernel expects, and changes nothing; see `pretence`.

This file runs as a program of its own and imports the standard library only.  It gets records, and
sends the nodes that programs watch:

    asleep     it waits for a byte on its socket; it holds nothing of the mount, so an unmount works
    scanning   it reads /proc for inotify and fanotify marks on the mount
    replaying  the current directory is the root of the mount; it asks for one record after another
               by getxattr(2), and acts on each

It replays in a private copy of the mount, which has no place in the tree of names.  The
mount is not busy, so umount(8) works meanwhile.  The copy ends with its descriptor, and the file
system ends with its last mount.  Without the right to copy it replays in the mount
itself.  So it does while fanotify marks the mount: fanotify gets the path of a change, and a copy
has none.

It ends when the socket closes or the daemon dies.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import stat
import sys
import time
from contextlib import suppress
from typing import Final, NamedTuple

NOTHING: Final = b"nothing"
CREATE: Final = b"create"
MKDIR: Final = b"mkdir"
UNLINK: Final = b"unlink"
RMDIR: Final = b"rmdir"
RENAME: Final = b"rename"
MODIFY: Final = b"modify"  # truncate to the present size, then as CLOSE
CLOSE: Final = b"close"  # open for writing, and close
CHMOD: Final = b"chmod"  # to the present mode
CHOWN: Final = b"chown"  # of a symbolic link, to the present owner

#: Messages to the daemon: a part of the list of nodes, its last part, out of records, no /proc.
MARKS_PART: Final = b"m"
MARKS: Final = b"M"
GIVEN_UP: Final = b"Z"
NO_PROC: Final = b"P"
#: The attribute of the root that is the next record; a number follows.
ATTRIBUTE: Final = b"user.ivshmemfs.replay."
NODES_PER_MESSAGE: Final = 2000
#: Seconds between two scans of /proc.
SCAN_SECONDS: Final = 0.5
#: Share of a CPU that scans of all processes may take; else the next one comes later.
SCAN_SHARE: Final = 0.02
LONGEST_SCAN_PAUSE: Final = 5.0  # seconds
#: Records between two looks at the clock.
RECORDS_AT_ONCE: Final = 100

_HANDLE_TYPE: Final = 0x81  # FILEID_INO64_GEN
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITIES_VERSION: Final = 0x20080522
#: Capabilities that stay: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, SYS_PTRACE.
_CAPABILITIES: Final = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 19
_SYS_ADMIN: Final = 1 << 21  # in effect during open_tree(2) only
_AT_FDCWD: Final = -100
_OPEN_TREE: Final = 428  # its number on all machines but Alpha
#: OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC, AT_SYMLINK_NOFOLLOW, AT_NO_AUTOMOUNT.
_COPY: Final = 1 | os.O_CLOEXEC | 0x100 | 0x800


class Record(NamedTuple):
    """One change to repeat.  A folder is a node number and a path from the root ("": unknown)."""

    action: bytes
    node: int
    path: bytes
    name: bytes = b""  # empty: the node itself
    to_node: int = 0
    to_path: bytes = b""
    to_name: bytes = b""
    number: int = 0  # size in bytes, mode or uid

    def packed(self) -> bytes:
        """Return the record as bytes; names contain no NUL."""
        fields = (
            self.action, b"%d" % self.node, self.path, self.name,
            b"%d" % self.to_node, self.to_path, self.to_name, b"%d" % self.number,
        )  # fmt: skip
        return b"\0".join(fields)


def unpacked(raw: bytes) -> Record:
    """Return the record in *raw*; raises ValueError."""
    action, node, path, name, to_node, to_path, to_name, number = raw.split(b"\0")
    if any(b"/" in one or one in (b".", b"..") for one in (name, to_name)):
        raise ValueError("a name of a record leads elsewhere")
    return Record(
        action, int(node), path, name, int(to_node), to_path, to_name, int(number)
    )  # fmt: skip


class _Handle(ctypes.Structure):
    """A file handle of FUSE: node number in two halves, and generation."""

    _fields_ = (
        ("bytes", ctypes.c_uint32),
        ("type", ctypes.c_int32),
        ("high", ctypes.c_uint32),
        ("low", ctypes.c_uint32),
        ("generation", ctypes.c_uint32),
    )


# --- marks --------------------------------------------------------------------------------------


def marked_node(line: str, device: int) -> int | None:
    """Return the node that a line of fdinfo marks on *device*; None for another line."""
    kind, _, rest = line.partition(" ")
    if kind not in ("inotify", "fanotify"):
        return None
    fields = dict(word.split(":", 1) for word in rest.split() if ":" in word)
    try:
        if "ino" not in fields or int(fields["sdev"], 16) != device:
            return None
        if int(fields.get("fhandle-type", "0"), 16) == _HANDLE_TYPE:
            raw = bytes.fromhex(fields["f_handle"])
            high, low = (int.from_bytes(raw[at : at + 4], sys.byteorder) for at in (0, 4))
            return high << 32 | low
        return int(fields["ino"], 16)
    except (KeyError, ValueError):
        return None


class Scanner:
    """Finds the marks of all processes on one *device*, in the kernel's form of a number."""

    def __init__(self, device: int) -> None:
        self._device = device
        self.fanotify = False  # whether the last scan found marks of fanotify
        self._watching: list[str] = []  # processes with a descriptor of inotify or fanotify
        self._next_full = 0.0

    def scan(self) -> set[int]:
        """Return the marked nodes.  Most scans read only processes that had marks."""
        begun, used = time.monotonic(), time.process_time()
        full = begun >= self._next_full
        processes = [name for name in os.listdir("/proc") if name.isdigit()] if full else None
        found: set[int] = set()
        watching = []
        self.fanotify = False
        for process in processes if processes is not None else self._watching:
            with suppress(OSError):
                if self._scan_process(process, found):
                    watching.append(process)
        self._watching = watching
        if full:
            pause = (time.process_time() - used) / SCAN_SHARE
            self._next_full = begun + min(max(pause, SCAN_SECONDS), LONGEST_SCAN_PAUSE)
        return found

    def _scan_process(self, process: str, found: set[int]) -> bool:
        watches = False
        for number in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):
                link = os.readlink(f"/proc/{process}/fd/{number}")
                if link in ("anon_inode:inotify", "anon_inode:[fanotify]"):
                    watches = True
                    with open(f"/proc/{process}/fdinfo/{number}", encoding="ascii") as lines:
                        marked = (marked_node(line, self._device) for line in lines)
                        nodes = [node for node in marked if node is not None]
                    found.update(nodes)
                    self.fanotify |= bool(nodes) and link == "anon_inode:[fanotify]"
        return watches


# --- replaying ------------------------------------------------------------------------------------


class Replayer:
    """Acts on records below one mount."""

    def __init__(self, path: str, device: int) -> None:
        self._path = path
        self._device = device
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._number = 0  # of the last record

    def replay(self, *, in_copy: bool = True) -> bool | None:
        """Act on up to RECORDS_AT_ONCE records; return whether there may be more.

        None if the mount cannot be reached.  With *in_copy* it acts in a copy, if it may copy.
        """
        try:
            root = self._enter(in_copy=in_copy)
        except OSError:
            return None
        try:
            if os.fstat(root).st_dev != self._device:
                return None
            os.fchdir(root)
            return self._act_on_all(root)
        except OSError:
            return None
        finally:
            os.chdir("/")
            os.close(root)

    def _enter(self, *, in_copy: bool) -> int:
        """Return a descriptor of the root of a copy of the mount, or else of the mount itself."""
        path, fd = os.fsencode(self._path), -1
        if in_copy:
            _have(self._libc, _CAPABILITIES | _SYS_ADMIN)
            fd = self._libc.syscall(_OPEN_TREE, _AT_FDCWD, path, _COPY)
            _have(self._libc, _CAPABILITIES)
        return fd if fd >= 0 else os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)

    def _act_on_all(self, root: int) -> bool:
        for _ in range(RECORDS_AT_ONCE):
            try:
                raw = os.getxattr(f"/proc/self/fd/{root}", ATTRIBUTE + b"%d" % (self._number + 1))
            except OSError:
                return False
            self._number += 1
            with suppress(OSError, ValueError):
                self._act(root, unpacked(raw))
        return True

    def _act(self, root: int, record: Record) -> None:
        if record.action == NOTHING:
            return
        folder = self._open(root, record.node, record.path)
        try:
            if record.action == RENAME:
                to = self._open(root, record.to_node, record.to_path)
                try:
                    os.rename(record.name, record.to_name, src_dir_fd=folder, dst_dir_fd=to)
                finally:
                    os.close(to)
            elif record.name:
                _act_on_name(folder, record)
            else:
                _act_on_inode(folder, record)
        finally:
            os.close(folder)

    def _open(self, root: int, node: int, path: bytes) -> int:
        """Open an inode by its node number, or a directory by its path from the root."""
        if node == 1:
            return os.dup(root)
        handle = _Handle(12, _HANDLE_TYPE, node >> 32, node & 0xFFFFFFFF, 0)
        fd: int = self._libc.open_by_handle_at(_AT_FDCWD, ctypes.byref(handle), os.O_PATH)
        if fd >= 0:
            return fd
        if not path:
            raise OSError(ctypes.get_errno(), "no path is known")
        fd = os.dup(root)
        for name in path.strip(b"/").split(b"/"):
            try:
                below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd


def _act_on_name(folder: int, record: Record) -> None:
    name = record.name
    if record.action == CREATE:
        os.mknod(name, stat.S_IFREG | 0o600, dir_fd=folder)
    elif record.action == MKDIR:
        os.mkdir(name, 0o700, dir_fd=folder)
    elif record.action == UNLINK:
        os.unlink(name, dir_fd=folder)
    elif record.action == RMDIR:
        os.rmdir(name, dir_fd=folder)
    elif record.action == CHOWN:
        os.chown(name, record.number, -1, dir_fd=folder, follow_symlinks=False)
    else:
        inode = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)
        try:
            _act_on_inode(inode, record)
        finally:
            os.close(inode)


def _act_on_inode(inode: int, record: Record) -> None:
    link = f"/proc/self/fd/{inode}"
    if record.action == CHMOD:
        os.chmod(link, record.number)
        return
    if not stat.S_ISREG(os.fstat(inode).st_mode):  # it is a device by now: leave it alone
        return
    if record.action == MODIFY:
        os.truncate(link, record.number)
    if record.action in (MODIFY, CLOSE):
        os.close(os.open(link, os.O_WRONLY | os.O_NONBLOCK))


# --- the process ----------------------------------------------------------------------------------


def _reduce() -> None:
    """Give up the capabilities that the replayer does not need; an ordinary user has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _have(libc, _CAPABILITIES, keep=_CAPABILITIES | _SYS_ADMIN)


def _have(libc: ctypes.CDLL, effective: int, keep: int = ~0) -> None:
    """Let the permitted capabilities in *effective* be in effect; give up those not in *keep*."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the upper halves
    if libc.capget(header, sets) == 0:
        sets[1] &= keep
        sets[0] = sets[1] & effective
        sets[2] = sets[3] = sets[4] = sets[5] = 0
        libc.capset(header, sets)


def main() -> None:
    """Serve the daemon: arguments are socket, mount point, device (MAJOR:MINOR), daemon's pid."""
    number, path, device, daemon = sys.argv[1:5]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(daemon):
        return
    _reduce()
    channel = socket.socket(fileno=int(number))
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            raise FileNotFoundError
        os.listdir("/proc/self/fdinfo")
    except OSError:
        channel.send(NO_PROC)
        return
    major, minor = (int(part) for part in device.split(":"))
    with suppress(BrokenPipeError, ConnectionResetError):
        _serve(channel, Scanner(major << 20 | minor), Replayer(path, os.makedev(major, minor)))


def _serve(channel: socket.socket, scanner: Scanner, replayer: Replayer) -> None:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    told: set[int] | None = None
    next_scan, more = time.monotonic(), False
    while True:
        left = 0.0 if more else max(0.0, next_scan - time.monotonic())
        if poll.poll(left * 1000):
            if not channel.recv(64):
                return
            more = True
        if more:
            state = replayer.replay(in_copy=not scanner.fanotify)
            if state is None:
                channel.send(GIVEN_UP)
            more = bool(state)
        if time.monotonic() >= next_scan:
            next_scan = time.monotonic() + SCAN_SECONDS
            marks = scanner.scan()
            if marks != told:
                told = marks
                _tell(channel, sorted(marks))


def _tell(channel: socket.socket, nodes: list[int]) -> None:
    while len(nodes) > NODES_PER_MESSAGE:
        channel.send(MARKS_PART + _numbers(nodes[:NODES_PER_MESSAGE]))
        del nodes[:NODES_PER_MESSAGE]
    channel.send(MARKS + _numbers(nodes))


def _numbers(nodes: list[int]) -> bytes:
    return b"".join(node.to_bytes(8, "little") for node in nodes)


if __name__ == "__main__":
    main()
