"""The queue of one fixed file, as one mount uses it: each `put` is a transaction without a commit.

    put    begin (own slot IDLE -> ACTIVE), claim a buffer, fill it, swap it into a cell, end
    take   one swap, without a transaction
    peek   a look; nothing is stored

Nothing here waits; `put` says that the queue is full, `take` and `peek` that nothing is there.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Final

from ivshmemfs.engine.volume import DAMAGE, Volume
from ivshmemfs.errors import Busy, Fenced, FsError, IvshmemfsError
from ivshmemfs.format.words import WORD
from ivshmemfs.shm.membership import Membership
from ivshmemfs.shm.queue import Ring


class Messages:
    """One queue.  Not thread-safe, as the mount that it belongs to."""

    def __init__(self, volume: Volume, offset: int, size: int) -> None:
        """Open the queue in `size` bytes at `offset` of the region; raises EINVAL if it is none."""
        self._volume: Final = volume
        try:
            self.ring: Final = Ring(volume.region.memory, offset, size)
        except ValueError as error:
            raise FsError(errno.EINVAL, str(error)) from None

    def put(self, record: bytes) -> bool:
        """Put a record; False when the queue is full.

        Raises EMSGSIZE when it is too long, EROFS without a slot, Busy, Corrupt, EIO.
        """
        if len(record) > self.ring.geometry.record:
            raise FsError(
                errno.EMSGSIZE,
                f"{len(record)} bytes; this queue takes records of {self.ring.geometry.record}",
            )
        member = self._volume.joined()
        try:
            if not self.ring.has_room():
                return False
            tag = self._begin(member)
            try:
                return self._put(member, tag, len(record).to_bytes(WORD, "little") + record)
            finally:
                self._end(member)
        except Fenced as error:
            self._volume.rejoin(member)
            raise Busy(str(error)) from error
        except DAMAGE as error:
            raise self._volume.contained(error) from error

    def _put(self, member: Membership, tag: int, parts: bytes) -> bool:
        ring = self.ring
        buffer = ring.claim(tag)
        if buffer < 0:
            ring.collect(member.table.limits())
            buffer = ring.claim(tag)
            if buffer < 0:
                return False
        ring.fill(buffer, parts, member.own_state)
        if ring.publish(buffer):
            return True
        ring.give_back(buffer, tag)
        return False

    def _begin(self, member: Membership) -> int:
        try:
            return member.begin()
        except Fenced:
            self._volume.rejoin(member)
            return member.begin()

    def _end(self, member: Membership) -> None:
        """End the transaction; what was published stays, also after this peer was declared gone."""
        try:
            member.end()
        except Fenced:
            with suppress(IvshmemfsError, OSError):
                self._volume.rejoin(member)

    def take(self) -> bytes | None:
        """Take the oldest record of a work queue; None when it is empty.  Raises as `put`."""
        self._volume.joined()
        try:
            return self.ring.take()
        except DAMAGE as error:
            raise self._volume.contained(error) from error

    def peek(self, number: int) -> tuple[bytes | None, int]:
        """Look at record `number` of a broadcast; see `Ring.peek`.  Raises Busy, Corrupt, EIO."""
        try:
            return self.ring.peek(number)
        except DAMAGE as error:
            raise self._volume.contained(error) from error
