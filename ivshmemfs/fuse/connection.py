"""Opening of the FUSE connection: negotiates more than libfuse asks for, and keeps the descriptor.

Reads and writes bypass the page cache (``direct_io``), which keeps machines coherent.  The kernel
then refuses shared mappings with ENODEV.  It allows them if the filesystem sets
FUSE_DIRECT_IO_ALLOW_MMAP in its answer to FUSE_INIT (Linux 6.6 and later).  FUSE_INIT is the first
request on a connection.  Neither libfuse 3.14 nor pyfuse3 can set that flag.  libfuse accepts an
open descriptor, written /dev/fd/N, instead of a mount point.  That descriptor is first one end of a
socket pair.  A `Handshake` holds the other end and the real connection:

    state      what has happened                                         what comes next
    MOUNTED    the mount exists; the kernel has queued INIT              `step` passes INIT on
    OFFERED    libfuse can read INIT from the socket, and answers there  `step` amends the answer
    OPEN       the kernel has the answer; see below                      nothing
    FAILED     `step` raised an error and closed the descriptors         the caller unmounts
    CLOSED     `close` closed a kept connection                          nothing

OPEN has two forms.  If libfuse reads the requests, the real connection has replaced the socket
under the number N, and libfuse and the kernel talk directly.  If `kernel_frontend` reads them, the
`relay` owns the real connection and forwards to libfuse the requests without a handler there.

`loop.Loop` calls `step` before each wait for a request, in the thread that also runs libfuse.  So
nothing here is concurrent: libfuse has answered when it waits again.

A kernel that does not offer a flag gets an answer without it.
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

#: Buffer for one request, in bytes; the kernel refuses to fill a much smaller one.
READ_SIZE = 64 * 1024
#: Seconds to wait for INIT and for its answer; normally both are queued already.
PATIENCE = 5.0
#: Largest request or answer that passes through the socket, in bytes.
ROOM = 200 * 1024


class State(enum.Enum):
    """The states that the module's docstring lists."""

    MOUNTED = enum.auto()
    OFFERED = enum.auto()
    OPEN = enum.auto()
    FAILED = enum.auto()
    CLOSED = enum.auto()


class Relay:
    """Forwards requests to libfuse over a socket, and its answers to the kernel."""

    def __init__(
        self,
        device: int,
        ours: socket.socket,
        *,
        setxattr_ext: bool = False,
        access_lists: bool = False,
        shares_locks: bool = False,
    ) -> None:
        #: The FUSE descriptor.
        self.device = device
        #: Whether the kernel sends the longer header of SETXATTR.
        self.setxattr_ext = setxattr_ext
        #: Whether the kernel obeys access lists.
        self.access_lists = access_lists
        #: Whether the kernel sends requests for locks.
        self.shares_locks = shares_locks
        self._ours = ours
        ours.setblocking(False)

    def offer(self, request: bytes | memoryview) -> None:
        """Let libfuse read *request*.  libfuse must have read the previous one."""
        self._ours.send(request)

    def pump(self) -> None:
        """Forward all answers that libfuse has written so far."""
        while True:
            try:
                answer = self._ours.recv(ROOM)
            except BlockingIOError:
                return
            if not answer:  # libfuse closed its end
                return
            try:
                os.write(self.device, answer)
            except OSError as error:
                self.unwanted(error)

    @staticmethod
    def unwanted(error: OSError) -> None:
        """Log that the kernel refused an answer.

        ENOENT is normal (the caller was killed), and so is the end of the connection.
        """
        if error.errno != errno.ENOENT and error.errno not in protocol.ENDED:
            log.error("the kernel refused an answer: %s", error)


class Handshake:
    """The opening of one FUSE connection; it owns the descriptor *device*.

    With *keep* `kernel_frontend` reads the requests, else libfuse does.  With *kernel_checks* the
    kernel checks permissions (default_permissions); with *access_lists* it then obeys lists, too.
    With *locks* it sends requests for locks, if requests are kept.
    """

    def __init__(
        self,
        device: int,
        *,
        keep: bool = False,
        kernel_checks: bool = False,
        access_lists: bool = False,
        locks: bool = False,
    ) -> None:
        self.state = State.MOUNTED
        #: Whether the kernel allows shared mappings of files opened for direct I/O.
        self.shared_mappings = False
        #: Whether the kernel obeys access lists.
        self.access_lists = False
        self._kernel_checks = kernel_checks
        self._wants_access_lists = kernel_checks and access_lists
        self._device = device
        #: Set in state OPEN if the connection is kept.
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
        """The text that libfuse accepts as a mount point."""
        return f"/dev/fd/{self._libfuse_fd}"

    def step(self, _fd: int) -> bool:
        """Advance the handshake; return True when the connection is open.

        Call it each time before libfuse waits for a request.  Raises MountError if the kernel or
        libfuse sends nothing, or something else than INIT and its answer.
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
        """Close the connection, unless libfuse owns it."""
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
                access_lists=self.access_lists,
                shares_locks=self._locks,
            )
            return
        os.dup2(self._device, self._libfuse_fd, inheritable=False)
        os.close(self._device)
        self._ours.close()

    def _amend(self, answer: bytearray) -> None:
        """Change the flags in libfuse's answer to those of this filesystem."""
        if len(answer) < protocol.OUT_HEADER.size + protocol.INIT_OUT.size:
            return
        fields = list(protocol.INIT_OUT.unpack_from(answer, protocol.OUT_HEADER.size))
        wanted = protocol.DONT_MASK
        if self._wants_access_lists:
            wanted |= protocol.POSIX_ACL
        if self._keep:
            wanted |= protocol.SETXATTR_EXT
            # Attributes in a listing are out of date at once.  pyfuse3 always asks for them.
            fields[3] &= ~(protocol.DO_READDIRPLUS | protocol.READDIRPLUS_AUTO)
        both = protocol.POSIX_LOCKS | protocol.FLOCK_LOCKS
        self._locks = self._locks and self._offered_flags & both == both
        if self._locks:
            wanted |= both
        fields[3] |= wanted & self._offered_flags
        self._setxattr_ext = bool(fields[3] & protocol.SETXATTR_EXT)
        self.access_lists = bool(fields[3] & protocol.POSIX_ACL)
        wanted2 = protocol.DIRECT_IO_ALLOW_MMAP
        if self._keep and self._kernel_checks:
            wanted2 |= protocol.ALLOW_IDMAP
        agreed2 = wanted2 & self._offered_flags2
        if agreed2:
            if not fields[3] & protocol.INIT_EXT:
                fields[10] = 0
            fields[3] |= protocol.INIT_EXT
            fields[10] |= agreed2
            self.shared_mappings = bool(agreed2 & protocol.DIRECT_IO_ALLOW_MMAP)
        protocol.INIT_OUT.pack_into(answer, protocol.OUT_HEADER.size, *fields)


def _await_readable(fd: int, otherwise: str) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        raise MountError(otherwise)
