"""A client of an ivshmem server, as a QEMU device is one, and the server itself."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IVSHMEMFS = str(Path(sys.executable).parent / "ivshmemfs")
PATIENCE = 20.0  # seconds for an answer of a server on a busy machine


class Client:
    """Connects and reads what the server says; `peers` are the eventfds of each other client."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self.id = -1
        self.memory = -1
        self.own: list[int] = []
        self.peers: dict[int, list[int]] = {}

    def message(self) -> tuple[int, int]:
        """The next number and descriptor (-1: none); raises EOFError at the end."""
        data, descriptors, _flags, _address = socket.recv_fds(self.socket, 8, 4)
        if not data:
            raise EOFError
        assert len(data) == 8
        assert len(descriptors) <= 1
        (number,) = struct.unpack("<q", data)
        return number, descriptors[0] if descriptors else -1

    def join(self, vectors: int) -> Client:
        """Read all that a new client is told, in the order of the specification."""
        assert self.message() == (0, -1)
        self.id, nothing = self.message()
        assert nothing == -1
        number, self.memory = self.message()
        assert number == -1
        assert self.memory >= 0
        while len(self.own) < vectors:
            self.take()
        return self

    def take(self) -> int:
        """Read one message about a client; returns its id."""
        number, descriptor = self.message()
        if descriptor < 0:
            for old in self.peers.pop(number, []):
                os.close(old)
        elif number == self.id:
            self.own.append(descriptor)
        else:
            self.peers.setdefault(number, []).append(descriptor)
        return number

    def rings(self, vector: int) -> bool:
        """Whether this client was interrupted through a vector; it is read."""
        readable, _, _ = select.select([self.own[vector]], [], [], PATIENCE)
        return bool(readable) and os.eventfd_read(self.own[vector]) > 0

    def leave(self) -> None:
        """Close everything, as a QEMU that ends."""
        self.socket.close()
        for descriptor in [*self.own, *(one for held in self.peers.values() for one in held)]:
            os.close(descriptor)
        if self.memory >= 0:
            os.close(self.memory)


@contextmanager
def serving(
    path: Path, region: Path, *words: str, limit: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A server that serves; ended at the end.  `limit` is its most descriptors."""
    shell = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"] if limit else []
    server = subprocess.Popen(
        [*shell, IVSHMEMFS, "server", *words, path, region],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stderr is not None
    try:
        line = server.stderr.readline()
        assert "serving" in line, server.communicate(timeout=PATIENCE)
        yield server
    finally:
        if server.poll() is None:
            server.terminate()
        server.communicate(timeout=PATIENCE)
