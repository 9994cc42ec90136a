"""An ivshmem server: each client gets the shared memory, and eventfds to interrupt every other.

States of a client; the server's one thread changes them, in this order:

    connected  accepted; nothing is said of it
    member     it has an id and eventfds; its own messages and those about it are queued
    gone       its connection ended or it sent something: the others are told, all of it is closed

Messages wait in a queue for each client, because a client may be stopped for an hour.  A queue
refers to eventfds of other clients, so a client's leaving first removes what is queued about it;
then they are closed.  A queue therefore has at most the messages about the present members, and one
for each that left.  A client with more than `LONGEST_QUEUE` messages is disconnected.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable

import trio

from ivshmemfs.doorbell.messages import LARGEST_ID, MEMORY, VERSION, Message

LONGEST_QUEUE = 1 << 17  # messages: every id twice; about 20 MB
PAUSE = 0.1  # seconds until the next try when descriptors ran out
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: ucred of unix(7)


class Member:
    """One client; `vectors` are the eventfds that interrupt it."""

    def __init__(self, number: int, connection: socket.socket, vectors: int) -> None:
        self.number = number
        self.connection = connection
        self.scope = trio.CancelScope()
        self.queue: deque[tuple[Message, Member | None]] = deque()
        self.queued = trio.Event()
        self.vectors: list[int] = []
        try:
            for _ in range(vectors):
                self.vectors.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError:
            self.close()
            raise

    def tell(self, message: Message, about: Member | None = None) -> None:
        """Queue a message; `about` is the client that owns its descriptor."""
        self.queue.append((message, about))
        self.queued.set()
        if len(self.queue) > LONGEST_QUEUE:
            self.scope.cancel()

    def introduce(self, other: Member) -> None:
        """Queue the messages that give the eventfds of `other`, which may be itself."""
        for vector in other.vectors:
            self.tell(Message(other.number, vector), other)

    def forget(self, other: Member) -> None:
        """Remove what is queued about `other`; queue that it left if anything of it was sent."""
        kept = deque(entry for entry in self.queue if entry[1] is not other)
        unsent = len(self.queue) - len(kept)
        self.queue = kept
        if unsent < len(other.vectors):
            self.tell(Message(other.number))

    async def send_queued(self) -> None:
        """Send what is queued, for ever; raises OSError when the client is gone."""
        while True:
            while self.queue:
                await trio.lowlevel.wait_writable(self.connection)
                if not self.queue:
                    break
                try:
                    self.queue[0][0].send(self.connection)
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno != errno.ETOOMANYREFS:
                        raise
                    await trio.sleep(PAUSE)  # too many descriptors wait in sockets of this user
                    continue
                self.queue.popleft()
            self.queued = trio.Event()
            await self.queued.wait()

    async def wait_for_end(self) -> str:
        """Return why the client is to leave: it closed the connection, or broke the protocol."""
        while True:
            await trio.lowlevel.wait_readable(self.connection)
            try:
                return "sent something" if self.connection.recv(1) else "closed the connection"
            except BlockingIOError:
                continue

    def close(self) -> None:
        """Close all its descriptors."""
        for vector in self.vectors:
            os.close(vector)
        self.vectors = []
        self.connection.close()


class Server:
    """Serves one memory, the open file `memory`, to clients with `vectors` interrupts each.

    `note` gets a line for each event.
    """

    def __init__(self, memory: int, vectors: int, note: Callable[[str], None]) -> None:
        self._memory = memory
        self._vectors = vectors
        self._note = note
        self._members: dict[int, Member] = {}
        self._next = 0

    async def run(self, listener: socket.socket, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM, SIGINT or SIGHUP; `ready` is called when signals are handled."""
        _raise_limit()
        ending = [
            number
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN
        ]
        with trio.open_signal_receiver(*ending) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept_all, listener, nursery)
                ready()
                async for _number in signals:
                    nursery.cancel_scope.cancel()
                    break

    async def _accept_all(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        full = False
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                connection, _address = listener.accept()
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS:
                    if not full:
                        self._note(f"clients wait: {error.strerror}; see RLIMIT_NOFILE (ulimit -n)")
                    full = True
                    await trio.sleep(PAUSE)
                continue
            full = False
            connection.setblocking(False)
            nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: socket.socket) -> None:
        process = _process_of(connection)
        try:
            member = self._join(connection)
        except OSError as error:
            connection.close()
            self._note(f"{process} was refused: {error.strerror}; see RLIMIT_NOFILE (ulimit -n)")
            return
        self._note(f"client {member.number} joined: {process}")
        why = "did not take its messages"
        try:
            with member.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send, member)
                    why = await _end_of(member)
                    nursery.cancel_scope.cancel()
        finally:
            self._leave(member)
        self._note(f"client {member.number} left: it {why}")

    async def _send(self, member: Member) -> None:
        try:
            await member.send_queued()
        except OSError:
            return  # the end of the connection is told by `wait_for_end`

    def _join(self, connection: socket.socket) -> Member:
        """Make a member, tell it of the others and the others of it; raises OSError."""
        if len(self._members) > LARGEST_ID:
            raise OSError(errno.EUSERS, os.strerror(errno.EUSERS))
        while self._next in self._members:
            self._next = (self._next + 1) & LARGEST_ID
        member = Member(self._next, connection, self._vectors)
        # The next client gets another id, because peers may still ring the last owner of this one.
        self._next = (self._next + 1) & LARGEST_ID
        for message in (
            Message(VERSION),
            Message(member.number),
            Message(MEMORY, self._memory),
        ):
            member.tell(message)
        for other in self._members.values():
            other.introduce(member)
            member.introduce(other)
        member.introduce(member)
        self._members[member.number] = member
        return member

    def _leave(self, member: Member) -> None:
        del self._members[member.number]
        for other in self._members.values():
            other.forget(member)
        member.close()


async def _end_of(member: Member) -> str:
    try:
        return await member.wait_for_end()
    except OSError as error:
        return f"is gone: {error.strerror}"


def _process_of(connection: socket.socket) -> str:
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return "an unknown process"
    pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return f"process {pid} of user {uid}"


def _raise_limit() -> None:
    """Allow as many descriptors as root has granted: each client takes 1 and its vectors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
