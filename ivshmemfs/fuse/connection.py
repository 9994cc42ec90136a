"""Opening the FUSE connection by hand: to agree with the kernel on more than libfuse asks for, and
to read requests before libfuse does.

Reads and writes bypass the page cache (``direct_io``), which keeps machines coherent.  The kernel
then refuses shared mappings (ENODEV), unless the filesystem sets FUSE_DIRECT_IO_ALLOW_MMAP in its
answer to FUSE_INIT, the first request on a connection (Linux 6.6 and later).  Neither libfuse 3.14
nor pyfuse3 can set that flag.  libfuse can, however, be given an open descriptor instead of a mount
point, written /dev/fd/N.  So that descriptor is first one end of a socket pair, and a `Handshake`
holds the other end and the real connection:

    state      what has happened                                         what comes next
    MOUNTED    fusermount3 has mounted; the kernel has queued INIT       `step` passes INIT on
    OFFERED    libfuse can read INIT from the socket, and answers there  `step` amends the answer
    OPEN       the kernel has the answer; see below                      nothing
    FAILED     an error was raised; the descriptors are closed           the caller unmounts
    CLOSED     a kept connection was closed                              nothing

What OPEN means depends on who reads requests.  Libfuse: the real connection has taken the place of
the socket under the number N, and libfuse and the kernel talk directly.  Somebody else: the real
connection is the `relay`'s, which hands on to libfuse what that reader does not answer itself.

`step` is called before each wait for a request (`loop.Loop`), in the one thread that also runs
libfuse, so that nothing here is ever concurrent: libfuse has answered when it waits again.

A kernel that does not offer the flag gets libfuse's answer unchanged.  When fusermount3 is not
installed there is no handshake: libfuse mounts by itself (only root can), and shared mappings are
refused.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import select
import socket

from ivshmemfs.errors import MountError
from ivshmemfs.fuse import protocol

log = logging.getLogger(__name__)

#: Bytes that the kernel wants room for when a request is read, at the least.
READ_SIZE = 64 * 1024
#: Seconds within which INIT and its answer must arrive; both are there when all is well.
PATIENCE = 5.0
#: Bytes of the largest request or answer that passes through the socket.
ROOM = 200 * 1024


class State(enum.Enum):
    """See the module's comment."""

    MOUNTED = enum.auto()
    OFFERED = enum.auto()
    OPEN = enum.auto()
    FAILED = enum.auto()
    CLOSED = enum.auto()


class Relay:
    """Hands requests on to libfuse, over a socket, and its answers back to the kernel."""

    def __init__(
        self,
        device: int,
        ours: socket.socket,
        *,
        setxattr_ext: bool = False,
        shares_locks: bool = False,
    ) -> None:
        #: What requests are read from.
        self.device = device
        #: Whether the kernel sends the longer header of SETXATTR.
        self.setxattr_ext = setxattr_ext
        #: Whether the kernel leaves all locks of files to this file system.
        self.shares_locks = shares_locks
        self._ours = ours
        ours.setblocking(False)

    def offer(self, request: bytes | memoryview) -> None:
        """Let libfuse read *request*, which is to be the only one that it has not read."""
        self._ours.send(request)

    def pump(self) -> None:
        """Pass on what libfuse has answered so far."""
        while True:
            try:
                answer = self._ours.recv(ROOM)
            except BlockingIOError:
                return
            if not answer:  # libfuse is gone
                return
            try:
                os.write(self.device, answer)
            except OSError as error:
                self.unwanted(error)

    @staticmethod
    def unwanted(error: OSError) -> None:
        """An answer that the kernel did not take: nobody waits for it, or all is over."""
        if error.errno != errno.ENOENT and error.errno not in protocol.ENDED:
            log.error("the kernel refused an answer: %s", error)


class Handshake:
    """The opening of one FUSE connection; *device* is its descriptor, owned from now on.

    With *keep* the daemon reads the requests before libfuse; with *locks* it keeps locks, too.
    """

    def __init__(self, device: int, *, keep: bool = False, locks: bool = False) -> None:
        self.state = State.MOUNTED
        #: Whether the kernel allows shared mappings of files opened for direct I/O.
        self.shared_mappings = False
        self._device = device
        #: Once open, when the connection is kept.
        self.relay: Relay | None = None
        self._keep = keep
        self._locks = locks and keep
        self._offered_flags = 0
        self._offered_flags2 = 0
        self._setxattr_ext = False
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM)
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
        """Close what is not libfuse's to close: the connection, unless libfuse has it."""
        ours = self.state is not State.OPEN or self.relay is not None
        if not ours or self.state in (State.FAILED, State.CLOSED):
            return
        self.state = State.FAILED if self.state is not State.OPEN else State.CLOSED
        self._ours.close()
        os.close(self._device)

    def _offer(self) -> None:
        _await_readable(self._device, "the kernel sent no FUSE_INIT")
        request = os.read(self._device, READ_SIZE)
        opcode = protocol.IN_HEADER.unpack_from(request)[1]
        if opcode != protocol.INIT:
            raise MountError(f"the kernel sent request {opcode} before FUSE_INIT")
        if len(request) >= protocol.IN_HEADER.size + protocol.INIT_IN.size:
            *_, flags, flags2 = protocol.INIT_IN.unpack_from(request, protocol.IN_HEADER.size)
            self._offered_flags = flags
            self._offered_flags2 = flags2 if flags & protocol.INIT_EXT else 0
        self._ours.send(request)
        self.state = State.OFFERED

    def _answer(self) -> None:
        _await_readable(self._ours.fileno(), "libfuse did not answer FUSE_INIT")
        answer = bytearray(self._ours.recv(READ_SIZE))
        error = protocol.OUT_HEADER.unpack_from(answer)[1]
        if error:
            raise MountError(f"libfuse does not speak this kernel's FUSE: {os.strerror(-error)}")
        self._amend(answer)
        os.write(self._device, answer)
        self.state = State.OPEN
        if self._keep:
            os.set_blocking(self._device, False)
            self.relay = Relay(
                self._device,
                self._ours,
                setxattr_ext=self._setxattr_ext,
                shares_locks=self._locks,
            )
            return
        os.dup2(self._device, self._libfuse_fd, inheritable=False)
        os.close(self._device)
        self._ours.close()

    def _amend(self, answer: bytearray) -> None:
        """Make libfuse's answer one for this filesystem."""
        if len(answer) < protocol.OUT_HEADER.size + protocol.INIT_OUT.size:
            return
        fields = list(protocol.INIT_OUT.unpack_from(answer, protocol.OUT_HEADER.size))
        self._setxattr_ext = bool(fields[3] & protocol.SETXATTR_EXT)
        if self._keep:
            # The attributes would be out of date at once; pyfuse3 lists in no other way.
            fields[3] &= ~(protocol.DO_READDIRPLUS | protocol.READDIRPLUS_AUTO)
        both = protocol.POSIX_LOCKS | protocol.FLOCK_LOCKS
        self._locks = self._locks and self._offered_flags & both == both
        if self._locks:
            fields[3] |= both
        if self._offered_flags2 & protocol.DIRECT_IO_ALLOW_MMAP:
            if not fields[3] & protocol.INIT_EXT:
                fields[10] = 0
            fields[3] |= protocol.INIT_EXT
            fields[10] |= protocol.DIRECT_IO_ALLOW_MMAP
            self.shared_mappings = True
        protocol.INIT_OUT.pack_into(answer, protocol.OUT_HEADER.size, *fields)


def _await_readable(fd: int, otherwise: str) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        raise MountError(otherwise)
