"""The queue of one fixed file, as one mount uses it: each `put` is a transaction without a commit.

    put    begin (own slot IDLE -> ACTIVE), claim a buffer, fill it, swap it into a cell, end
    take   one swap, without a transaction
    peek   a look; nothing is stored

Nothing here waits; `put` says that the queue is full, `take` and `peek` that nothing is there.

The file stays fixed, in its place, while this mount lists it as open in its slot.  A mount that
lost its slot may find it released since, and other files in its blocks.  So `put` and `take` look
at the slot first, and at the file again in each new incarnation.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Final

from ivshmemfs.engine import fixed
from ivshmemfs.engine.volume import DAMAGE, Volume
from ivshmemfs.errors import Busy, Fenced, FsError, IvshmemfsError
from ivshmemfs.format.words import WORD
from ivshmemfs.shm.membership import Membership
from ivshmemfs.shm.queue import Ring

_CLAIMED: Final = (
    "writers that stopped amid a message have all of the {} buffers that hold no record; see "
    "`ivshmemfs peers`, and `ivshmemfs evict` those that will not come back"
)


class Messages:
    """One queue.  Not thread-safe, as the mount that it belongs to."""

    def __init__(self, volume: Volume, ino: int) -> None:
        """Open the queue in a fixed file, which the caller has opened.

        Raises EINVAL if it is none, Corrupt, EIO.
        """
        self._volume: Final = volume
        self._ino: Final = ino
        self._known = self._incarnation()
        self._place: Final = volume.look(lambda view: fixed.extent(view, ino))
        try:
            self.ring: Final = Ring(volume.region.memory, *self._place)
        except ValueError as error:
            raise FsError(errno.EINVAL, str(error)) from None

    def _incarnation(self) -> tuple[int, int]:
        member = self._volume.member
        return (0, 0) if member is None else (member.slot, member.incarnation)

    def _joined(self) -> Membership:
        """Return the membership, once the file is known to be fixed in this incarnation.

        Raises EROFS, Busy, StaleHandle.
        """
        member = self._volume.joined()
        if member.unfit:  # two readers might both win the swap of one record
            raise FsError(errno.EROFS, member.unfit)
        try:
            owns_slot = member.owns_slot
        except OSError as error:
            raise self._volume.contained(error) from error
        if not owns_slot:
            self._volume.rejoin(member)
        if self._known != self._incarnation():
            self._volume.look(lambda view: fixed.expect(view, self._ino, self._place))
            self._known = self._incarnation()
        return member

    def put(self, record: bytes) -> bool:
        """Put a record; False when the queue is full.

        Raises EMSGSIZE when it is too long, ENOBUFS while other writers have all free buffers,
        EROFS without a slot, Busy, StaleHandle, Corrupt, EIO.
        """
        if len(record) > self.ring.geometry.record:
            raise FsError(
                errno.EMSGSIZE,
                f"{len(record)} bytes; this queue takes records of {self.ring.geometry.record}",
            )
        member = self._joined()
        try:
            if not self.ring.has_room():
                return False
            tag = member.begin()
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
                raise FsError(errno.ENOBUFS, _CLAIMED.format(ring.geometry.buffers))
        ring.fill(buffer, parts, member.own_state)
        if ring.publish(buffer, member.own_state):
            return True
        ring.give_back(buffer, tag)
        return False

    def _end(self, member: Membership) -> None:
        """End the transaction; what was published stays, also after this peer was declared gone."""
        try:
            member.end()
        except Fenced:
            with suppress(IvshmemfsError, OSError):
                self._volume.rejoin(member)

    def take(self) -> bytes | None:
        """Take the oldest record of a work queue; None when it is empty.  Raises as `put`."""
        self._joined()
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
