"""The messages of an ivshmem server, as QEMU's docs/specs/ivshmem-spec.rst declares them.

A message is one signed 64-bit number, little-endian, with at most one file descriptor beside it
(SCM_RIGHTS).  A new client gets, in this order:

    VERSION
    its own id
    MEMORY, with the descriptor of the shared memory
    the id of each other client, once for each vector, with an eventfd that interrupts that client
    its own id, once for each vector, with an eventfd that it is interrupted by

Later it gets the same of each client that joins.  An id without a descriptor says that this client
left.  A client sends nothing.
"""

from __future__ import annotations

import array
import socket
import struct
from typing import NamedTuple

VERSION = 0
MEMORY = -1
LARGEST_ID = 0xFFFF  # ids have 16 bits in the doorbell register
MOST_VECTORS = 64  # of QEMU's own server; each takes a descriptor here and in each client
NUMBER = struct.Struct("<q")


class Message(NamedTuple):
    """A number and the descriptor beside it, -1 for none."""

    number: int
    descriptor: int = -1

    def send(self, connection: socket.socket) -> None:
        """Send it whole or not at all; raises OSError, BlockingIOError where there is no room."""
        beside = []
        if self.descriptor >= 0:
            rights = array.array("i", [self.descriptor])
            beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        sent = connection.sendmsg([NUMBER.pack(self.number)], beside)
        if sent != NUMBER.size:
            raise ConnectionAbortedError("a message was cut")
