"""Opening the FUSE connection by hand, to agree with the kernel on more than libfuse asks for.

Reads and writes bypass the page cache (``direct_io``), which keeps machines coherent.  The kernel
then refuses shared mappings (ENODEV), unless the filesystem sets FUSE_DIRECT_IO_ALLOW_MMAP in its
answer to FUSE_INIT, the first request on a connection (Linux 6.6 and later).  Neither libfuse 3.14
nor pyfuse3 can set that flag.  libfuse can, however, be given an open descriptor instead of a mount
point, written /dev/fd/N.  So that descriptor is first one end of a socket pair, and a `Handshake`
holds the other end and the real connection:

    state      what has happened                                         what comes next
    MOUNTED    fusermount3 has mounted; the kernel has queued INIT       `step` passes INIT on
    OFFERED    libfuse can read INIT from the socket, and answers there  `step` amends the answer
    OPEN       the kernel has the answer; the real connection has taken  nothing: libfuse and the
               the place of the socket under the number N                kernel talk directly
    FAILED     an error was raised; the descriptors are closed           the caller unmounts

`step` is called before each wait for a request (`loop.Loop`), in the one thread that also runs
libfuse, so that nothing here is ever concurrent: libfuse has answered when it waits again.

A kernel that does not offer the flag gets libfuse's answer unchanged.  When fusermount3 is not
installed there is no handshake: libfuse mounts by itself (only root can), and shared mappings are
refused.
"""

from __future__ import annotations

import enum
import os
import select
import socket
import struct

from ivshmemfs.errors import MountError

#: Bytes that the kernel wants room for when a request is read, at the least.
READ_SIZE = 64 * 1024
#: Seconds within which INIT and its answer must arrive; both are there when all is well.
PATIENCE = 5.0

FUSE_INIT = 26
#: In ``flags``: the second word of flags counts.
FUSE_INIT_EXT = 1 << 30
#: In the second word of flags (bit 36 of both words together).
FUSE_DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32)

# struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, padding
_REQUEST = struct.Struct("=IIQQIIII")
# struct fuse_init_in: major, minor, max_readahead, flags, flags2
_INIT_IN = struct.Struct("=IIIII")
# struct fuse_out_header: len, error, unique
_ANSWER = struct.Struct("=IiQ")
# struct fuse_init_out up to flags2: major, minor, max_readahead, flags, max_background,
# congestion_threshold, max_write, time_gran, max_pages, map_alignment, flags2
_INIT_OUT = struct.Struct("=IIIIHHIIHHI")


class State(enum.Enum):
    """See the module's comment."""

    MOUNTED = enum.auto()
    OFFERED = enum.auto()
    OPEN = enum.auto()
    FAILED = enum.auto()


class Handshake:
    """The opening of one FUSE connection; *device* is its descriptor, owned from now on."""

    def __init__(self, device: int) -> None:
        self.state = State.MOUNTED
        #: Whether the kernel allows shared mappings of files opened for direct I/O.
        self.shared_mappings = False
        self._device = device
        self._offered_flags2 = 0
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._libfuse_fd = theirs.detach()  # libfuse closes it

    @property
    def path(self) -> str:
        """What libfuse takes for a mount point."""
        return f"/dev/fd/{self._libfuse_fd}"

    def step(self, _fd: int) -> bool:
        """Do what is due before libfuse waits for a request; True when the connection is open.

        Raises MountError when the kernel or libfuse do not do their part.
        """
        try:
            if self.state is State.MOUNTED:
                self._offer()
            elif self.state is State.OFFERED:
                self._answer()
            return self.state is State.OPEN
        except OSError as error:
            self.close()
            raise MountError(f"the FUSE connection could not be opened: {error}") from error
        except MountError:
            self.close()
            raise

    def close(self) -> None:
        """Give up before the connection is open; libfuse's descriptor is libfuse's to close."""
        if self.state in (State.MOUNTED, State.OFFERED):
            self.state = State.FAILED
            self._ours.close()
            os.close(self._device)

    def _offer(self) -> None:
        _await_readable(self._device, "the kernel sent no FUSE_INIT")
        request = os.read(self._device, READ_SIZE)
        opcode = _REQUEST.unpack_from(request)[1]
        if opcode != FUSE_INIT:
            raise MountError(f"the kernel sent request {opcode} before FUSE_INIT")
        if len(request) >= _REQUEST.size + _INIT_IN.size:
            *_, flags, flags2 = _INIT_IN.unpack_from(request, _REQUEST.size)
            self._offered_flags2 = flags2 if flags & FUSE_INIT_EXT else 0
        self._ours.send(request)
        self.state = State.OFFERED

    def _answer(self) -> None:
        _await_readable(self._ours.fileno(), "libfuse did not answer FUSE_INIT")
        answer = bytearray(self._ours.recv(READ_SIZE))
        error = _ANSWER.unpack_from(answer)[1]
        if error:
            raise MountError(f"libfuse does not speak this kernel's FUSE: {os.strerror(-error)}")
        self._amend(answer)
        os.write(self._device, answer)
        os.dup2(self._device, self._libfuse_fd, inheritable=False)
        os.close(self._device)
        self._ours.close()
        self.state = State.OPEN

    def _amend(self, answer: bytearray) -> None:
        """Add to libfuse's answer what the kernel offers and libfuse does not know."""
        if not self._offered_flags2 & FUSE_DIRECT_IO_ALLOW_MMAP:
            return
        if len(answer) < _ANSWER.size + _INIT_OUT.size:
            return
        fields = list(_INIT_OUT.unpack_from(answer, _ANSWER.size))
        if not fields[3] & FUSE_INIT_EXT:
            fields[10] = 0
        fields[3] |= FUSE_INIT_EXT
        fields[10] |= FUSE_DIRECT_IO_ALLOW_MMAP
        _INIT_OUT.pack_into(answer, _ANSWER.size, *fields)
        self.shared_mappings = True


def _await_readable(fd: int, otherwise: str) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        raise MountError(otherwise)
