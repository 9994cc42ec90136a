"""A test double of the kernel: a socket in place of the FUSE descriptor."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable

import trio

from ivshmemfs.engine import ROOT_INO
from ivshmemfs.fuse import protocol
from ivshmemfs.fuse.budget import Budget
from ivshmemfs.fuse.connection import Relay
from ivshmemfs.fuse.kernel_frontend import KernelFrontEnd
from ivshmemfs.fuse.operations import Operations
from ivshmemfs.fuse.ownership import Ownership
from ivshmemfs.fuse.pretence import Pretence
from tests.fuse.fake_engine import FakeFilesystem

#: ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize.
ATTR = struct.Struct("=QQQqqqIIIIIIIIIxxxx")
#: Bytes before ATTR in the answer to GETATTR: how long the kernel may cache it.
ATTR_OUT_SIZE = 16
#: nodeid; then up to ATTR: generation and cache times of name and attributes.
ENTRY_OUT = struct.Struct("=Q32x")
UNIQUE = 77
PID = 1  # of the caller


class Kernel:
    """Sends requests as the kernel does, and takes the answers."""

    def __init__(
        self,
        *,
        root_only: bool = False,
        ownership: Ownership | None = None,
        setxattr_ext: bool = False,
        access_lists: bool = False,
    ) -> None:
        self.fs = FakeFilesystem()
        self.mine, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.libfuse, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._device = device
        device.setblocking(False)
        self.tasks: list[Callable[[], Awaitable[None]]] = []
        self.operations = Operations(
            self.fs,  # type: ignore[arg-type]
            trio.sleep,
            ownership=ownership,
            root_only=root_only,
            access_lists=ownership is None,
        )
        self.front_end = KernelFrontEnd(
            self.operations,
            Relay(device.fileno(), ours, setxattr_ext=setxattr_ext, access_lists=access_lists),
            self.tasks.append,
            page_cache=False,
            pretence=Pretence(self.fs, self.operations, lambda _ino: None),  # type: ignore[arg-type]
        )
        self._ours = ours
        self.mine.settimeout(10)

    def send(
        self,
        opcode: int,
        body: bytes = b"",
        *,
        node: int = ROOT_INO,
        uid: int = 0,
        unique: int = UNIQUE,
    ) -> memoryview | None:
        """One request; returns it if it is not answered."""
        self.push(opcode, body, node=node, uid=uid, unique=unique)
        return self.serve()

    def push(
        self,
        opcode: int,
        body: bytes = b"",
        *,
        node: int = ROOT_INO,
        uid: int = 0,
        unique: int = UNIQUE,
    ) -> None:
        """Queue a request."""
        size = protocol.IN_HEADER.size + len(body)
        self.mine.send(protocol.IN_HEADER.pack(size, opcode, unique, node, uid, 0, PID, 0) + body)

    def serve(self) -> memoryview | None:
        """Let the front end answer one request; returns it if it has no handler."""
        budget = Budget()
        budget.left = 1
        return self.front_end.serve(budget, 0, 0)

    def answer(self) -> tuple[int, bytes]:
        """(errno, body) of the next answer."""
        got = self.mine.recv(1 << 21)
        length, error, unique = protocol.OUT_HEADER.unpack_from(got)
        assert (length, unique) == (len(got), UNIQUE)
        return -error, got[protocol.OUT_HEADER.size :]

    def ask(self, opcode: int, body: bytes = b"", *, node: int = ROOT_INO, uid: int = 0) -> bytes:
        """The body of a good answer."""
        assert self.send(opcode, body, node=node, uid=uid) is None
        error, answer = self.answer()
        assert error == 0, os.strerror(error)
        return answer

    def silent(self) -> bool:
        """Whether there is no answer."""
        self.mine.setblocking(False)
        try:
            self.mine.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.mine.settimeout(10)
        return False

    def run(self, beside: Callable[[], Awaitable[None]] | None = None) -> None:
        """Run the tasks that were started, and *beside* beside them."""

        async def main() -> None:
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    for task in self.tasks:
                        nursery.start_soon(task)
                    if beside is not None:
                        nursery.start_soon(beside)

        trio.run(main)

    def create(self, name: bytes) -> tuple[int, int]:
        """(inode, handle) of a new file."""
        body = protocol.CREATE_IN.pack(os.O_RDWR, 0o644, 0) + name + b"\0"
        answer = self.ask(protocol.CREATE, body)
        entry = ENTRY_OUT.size + ATTR.size
        (ino,) = ENTRY_OUT.unpack_from(answer)
        return ino, protocol.OPEN_OUT.unpack_from(answer, entry)[0]

    def close(self) -> None:
        for end in (self.mine, self._device, self.libfuse, self._ours):
            end.close()
