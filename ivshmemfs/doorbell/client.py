"""A process on the host as a client of an ivshmem server: it rings devices, and is rung by them.

States; only this object changes them:

    joined   the server named this client, its own eventfd and the eventfds of the others; more
             messages tell who comes and goes, and `keep`, `ring` and `quiet` read them
    lost     the server ended, or broke the protocol: it rings nobody, and has no number

It uses vector 0 of each client, and closes the eventfds of other vectors.  A client that the
server has not named is never rung.  The server may be another user's, so each message is bounded:
at most `MOST_CLIENTS` clients, and each descriptor must be an eventfd.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ivshmemfs.doorbell.messages import LARGEST_ID, MEMORY, NUMBER, VERSION
from ivshmemfs.errors import IvshmemfsError, RegionDenied, RegionMissing, RegionUnfit, UsageError
from ivshmemfs.printing import printable

ANSWER_SECONDS = 1.0  # longest wait for a message while it joins
MOST_CLIENTS = 256  # others whose eventfds are kept, one descriptor each; a region has 255 peers
MOST_MESSAGES = 1 << 17  # in one row: more than any server has to say at once
_EVENTFD = "anon_inode:[eventfd]"


class ServerBell:
    """The doorbell of a process that a server gave it; raises what `connect` says.

    `is_memory` tells whether a descriptor is the region's own file.
    """

    def __init__(self, path: Path, is_memory: Callable[[int], bool]) -> None:
        self._shown = printable(str(path))
        self._number = -1
        self._own = -1
        self._peers: dict[int, int] = {}  # eventfd of vector 0 by client
        self._part = b""  # of a message
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(path)
            self._join(is_memory)
        except BaseException:
            self.close()
            raise

    def _connect(self, path: Path) -> None:
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.connect(str(path))
        except PermissionError:
            raise RegionDenied(
                f"{self._shown}: permission denied; run as root, or see --group of "
                "'ivshmemfs server'"
            ) from None
        except OSError as error:
            raise RegionMissing(
                f"{self._shown}: no server listens there ({error.strerror or 'timed out'}); start "
                "it: ivshmemfs server SOCKET REGION"
            ) from None

    def _join(self, is_memory: Callable[[int], bool]) -> None:
        try:
            version, nothing = self._expect()
            self._drop(nothing)
            number, nothing = self._expect()
            self._drop(nothing)
            what, memory = self._expect()
            same = memory >= 0 and is_memory(memory)
            self._drop(memory)
            if version != VERSION or what != MEMORY or not 0 <= number <= LARGEST_ID:
                raise self._strange()
            if not same:
                raise UsageError(
                    f"{self._shown}: that server serves another region; name the server of this one"
                )
            self._number = number
            for _ in range(MOST_MESSAGES):
                if self._own >= 0:
                    break
                self._note(*self._expect())
        except OSError as error:
            raise IvshmemfsError(
                f"{self._shown}: the server does not answer ({error.strerror or 'timed out'}); "
                "look at its log"
            ) from None
        if self._own < 0:
            raise self._strange()
        self._socket.setblocking(False)

    def _strange(self) -> IvshmemfsError:
        return RegionUnfit(
            f"{self._shown}: what listens there is no ivshmem server of version {VERSION}"
        )

    # --- messages -----------------------------------------------------------------------------

    def _expect(self) -> tuple[int, int]:
        """Return the next (number, descriptor or -1); raises OSError, RegionUnfit at the end."""
        message = self._receive()
        if message is None:
            raise self._strange()
        return message

    def _receive(self) -> tuple[int, int] | None:
        """Return the next message, None at the end of the connection; raises OSError."""
        kept = -1
        while len(self._part) < NUMBER.size:
            room = NUMBER.size - len(self._part)
            data, descriptors, _flags, _address = socket.recv_fds(
                self._socket, room, 1, socket.MSG_CMSG_CLOEXEC
            )
            for descriptor in descriptors:
                self._drop(kept)
                kept = descriptor
            if not data:
                self._drop(kept)
                return None
            self._part += data
        (number,) = NUMBER.unpack(self._part)
        self._part = b""
        return number, kept

    def _note(self, number: int, descriptor: int) -> None:
        """Note what a message says of a client; takes the descriptor."""
        if descriptor < 0:
            if number != self._number:
                self._drop(self._peers.pop(number, -1))
            return
        mine = number == self._number
        known = self._own >= 0 if mine else number in self._peers
        full = not mine and len(self._peers) >= MOST_CLIENTS
        if known or full or not 0 <= number <= LARGEST_ID or not _is_eventfd(descriptor):
            self._drop(descriptor)
        elif mine:
            self._own = descriptor
        else:
            self._peers[number] = descriptor

    @staticmethod
    def _drop(descriptor: int) -> None:
        if descriptor >= 0:
            os.close(descriptor)

    # --- what `Bells` uses --------------------------------------------------------------------

    @property
    def number(self) -> int:
        """The id that the server gave this client; -1 when it is lost."""
        return self._number

    def keep(self) -> bool:
        """Read what the server has said; whether it still serves."""
        with suppress(BlockingIOError):
            for _ in range(MOST_MESSAGES):
                try:
                    message = self._receive() if self._number >= 0 else None
                except BlockingIOError:
                    raise
                except OSError:
                    message = None
                if message is None:
                    self._number = -1
                    break
                self._note(*message)
        return self._number >= 0

    def ring(self, numbers: Iterable[int]) -> None:
        """Ring clients that the server has named; ignores all other numbers."""
        wanted = set(numbers)
        if wanted - self._peers.keys() - {self._number}:
            self.keep()
        for number in wanted:
            descriptor = self._own if number == self._number else self._peers.get(number, -1)
            if descriptor >= 0 and self._number >= 0:
                with suppress(OSError):  # EAGAIN: it was rung 2^64 times
                    os.eventfd_write(descriptor, 1)

    def fileno(self) -> int:
        """Return the own eventfd."""
        return self._own

    def quiet(self) -> None:
        """Forget the rings so far, and read what the server has said."""
        with suppress(OSError):
            os.eventfd_read(self._own)
        self.keep()

    def close(self) -> None:
        """Close all descriptors."""
        self._socket.close()
        for descriptor in (self._own, *self._peers.values()):
            self._drop(descriptor)
        self._number = self._own = -1
        self._peers = {}


def _is_eventfd(descriptor: int) -> bool:
    """Return whether a descriptor is an eventfd; makes it non-blocking."""
    try:
        if os.readlink(f"/proc/self/fd/{descriptor}") != _EVENTFD:
            return False
        os.set_blocking(descriptor, False)
    except OSError:
        return False
    return True
