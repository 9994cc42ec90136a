"""Reads a region that may be damaged, hostile, or in use by live peers.

An `Image` is the region under one commit word.  It reads the commit word first, then copies the
tag table.  So the copy has every block of this commit under the tag in its pointer, while other
peers claim and release.  If a peer commits later, the commit word moves: the findings do not count
any more, and `Image.refuse_moved` raises Overtaken.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from ivshmemfs.errors import (
    Corrupt,
    ForeignFormat,
    GeometryMismatch,
    InUse,
    IvshmemfsError,
    NotFormatted,
    UnderRepair,
    UnsupportedVersion,
)
from ivshmemfs.format import node as node_format
from ivshmemfs.format import peer, repair, superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET, REPAIR_OFFSET, Geometry
from ivshmemfs.format.superblock import SUPERBLOCK, Superblock
from ivshmemfs.region import Memory
from ivshmemfs.shm.repair import RepairSession, abandoned, describe


class Overtaken(Exception):
    """A peer committed during the check; start again."""


class Superblocks(NamedTuple):
    """Both copies as the region has them, and the one to use."""

    raw: bytes
    copy: bytes
    good: bytes  # the one to use
    usable: Superblock  # the same, decoded


def read_superblocks(memory: Memory) -> Superblocks:
    """Return the superblock to use.

    Raises NotFormatted or ForeignFormat when the region has none, UnsupportedVersion,
    GeometryMismatch, or Corrupt when both copies are damaged.
    """
    if memory.length < node_format.HEADER_SIZE + superblock.COPY_OFFSET + SUPERBLOCK.size:
        raise NotFormatted("the region is too small to carry a filesystem")
    raw = memory.read(superblock.OFFSET, SUPERBLOCK.size)
    copy = memory.read(superblock.COPY_OFFSET, SUPERBLOCK.size)
    usable: dict[Superblock, bytes] = {}
    errors: list[IvshmemfsError] = []
    for candidate in (raw, copy):
        try:
            usable.setdefault(superblock.decode(candidate, memory.length), candidate)
        except IvshmemfsError as error:
            errors.append(error)
    if usable:
        chosen = max(usable, key=lambda s: (not s.read_only, _leads_to_root(memory, s)))
        return Superblocks(raw, copy, usable[chosen], chosen)
    order = (GeometryMismatch, UnsupportedVersion, Corrupt, ForeignFormat, NotFormatted)
    raise _damaged_twice(min(errors, key=lambda e: order.index(type(e))))


def _damaged_twice(error: IvshmemfsError) -> IvshmemfsError:
    if isinstance(error, Corrupt):
        return Corrupt(
            f"the superblock and its copy are both damaged ({error}): what is on the region "
            "cannot be reached any more"
        )
    return error


def _leads_to_root(memory: Memory, candidate: Superblock) -> bool:
    """Return whether the commit word leads to a root of this filesystem."""
    geometry = candidate.geometry
    _, block = words.split_commit(published_commit(memory))
    if block >= geometry.block_count:
        return False
    data = memory.read(
        geometry.data_offset + block * geometry.block_size, node_format.ROOT_POINTERS
    )
    record = node_format.ROOT_RECORD.unpack(data, node_format.HEADER_SIZE)
    return record.fsid == candidate.fsid


def published_commit(memory: Memory) -> int:
    """Return the commit word; if a repair has put its mark there, the one before the repair."""
    word = memory.load(COMMIT_OFFSET)
    if words.under_repair(word):
        return memory.load(REPAIR_OFFSET + repair.FORMER_OFFSET)
    return word


class Image:
    """The region under one commit word.

    A check uses the present commit word.  A repair has put its mark there, and passes the `commit`
    that it works on.
    """

    def __init__(
        self, memory: Memory, usable: Superblock, commit: int = 0, turn: RepairSession | None = None
    ) -> None:
        self.memory = memory
        self.superblock = usable
        self.geometry: Geometry = usable.geometry
        self.block_size = self.geometry.block_size
        self.block_count = self.geometry.block_count
        self.fanout = node_format.index_fanout(self.block_size)
        self._turn = turn
        self._word = memory.load(COMMIT_OFFSET) if turn is None else turn.marked
        if turn is None and words.under_repair(self._word) and not abandoned(memory):
            raise UnderRepair(describe(memory))
        self.commit = self._word if turn is None else commit
        self.sequence = words.split_commit(self._word)[0]
        self.tags: array[int] = array("Q")
        self.tags.frombytes(memory.read(self.geometry.tags_offset, self.block_count * words.WORD))
        self.states = tuple(  # state words by slot; slot 0 is the repair slot
            memory.load(REPAIR_OFFSET + slot * peer.SLOT_SIZE)
            for slot in range(1 + self.geometry.peer_count)
        )

    @property
    def moved(self) -> bool:
        """Whether the commit word has changed since the image was opened."""
        return self.memory.load(COMMIT_OFFSET) != self._word

    def refuse_moved(self) -> None:
        """Raise Overtaken if a peer committed; InUse if the mark of this repair is gone."""
        if not self.moved:
            return
        if self._turn is not None:
            raise InUse("the region was formatted, repaired or damaged by another meanwhile")
        raise Overtaken

    def block(self, number: int) -> bytes:
        """Return a whole block; the caller has checked that `number` is in range."""
        if self._turn is not None:
            self._turn.beat()
        at = self.geometry.data_offset + number * self.block_size
        return self.memory.read(at, self.block_size)

    def occupants(self) -> list[peer.Occupant]:
        """Return the peer slots in use; read again, at most twice, while a peer joins."""
        offset, count = self.geometry.peers_offset, self.geometry.peer_count
        found: list[peer.Occupant] = []
        for _ in range(3):
            table = self.memory.read(offset, count * peer.SLOT_SIZE)
            found = list(peer.occupants(table, count))
            if all(p.identity_valid for p in found):
                break
        return found
