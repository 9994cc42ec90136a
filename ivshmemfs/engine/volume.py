"""The region as one peer sees it: what it mounted, its membership, snapshots, and damage.

    READ-ONLY   the peer has no slot; `member` is None and `joined` raises EROFS
    MEMBER      `mount` took a slot; `member` is the membership
    FENCED      another peer retired this one during its silence; `rejoin` takes a slot again,
                as a new incarnation, and the peer is a MEMBER again
    LEFT        `Upkeep.unmount` gave the slot back; `member` is None

Upkeep beats, `Committer` begins and ends transactions, and `OpenFiles` lists inodes.  Each of them
may find the peer FENCED, and then calls `rejoin`.

A look takes a snapshot and runs on it.  When commits of other peers overtake it, it starts again
on a newer snapshot.  It never waits: `Busy` means that the caller can try again.  Each look is one
turn of bounded work (see `shm/published.py`).

Damage of the region is contained here.  An exception that damaged metadata causes in arithmetic
becomes Corrupt.  A failed access (the file was truncated) becomes EIO.  Both become ESTALE when the
superblock is not the one that was mounted.
"""

from __future__ import annotations

import errno
import logging
import random
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from ivshmemfs.engine.clock import Clock
from ivshmemfs.engine.radix import RadixTree
from ivshmemfs.engine.transaction import CommitCache, View
from ivshmemfs.errors import (
    Busy,
    Corrupt,
    FormatError,
    FsError,
    NoSpace,
    Restart,
    StaleHandle,
    Unfinished,
)
from ivshmemfs.format import superblock, words
from ivshmemfs.format.geometry import SCRATCH_OFFSET, SCRATCH_SIZE
from ivshmemfs.region.condition import Condition
from ivshmemfs.region.probe import Scratch, cas_works, probe, refuse_unfit
from ivshmemfs.shm.bells import Bells, Doorbell
from ivshmemfs.shm.freelist import FreeList
from ivshmemfs.shm.membership import Membership
from ivshmemfs.shm.peers import PeerTable
from ivshmemfs.shm.published import Store

if TYPE_CHECKING:
    from ivshmemfs.region import Region

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS: Final = 100  # runs of one look, or plans of one change, before it raises Busy
SHORT_PAUSE: Final = 60.0  # seconds between two log lines about exhausted memory
PROBE_ATTEMPTS: Final = 3  # scratch words that `mount` tries before it refuses the mapping
_SILENT = "this mount was declared gone while it was silent"
_TWIN = (
    "another process goes by this mount's identity: its machine was cloned, or put back into an "
    "older state, and nothing but `ivshmemfs evict` will tell of this mount's end"
)
#: What a look or change raises when the region is damaged or cannot be accessed.
DAMAGE: Final = (struct.error, OverflowError, IndexError, ValueError, OSError, Corrupt)


def _check_swaps(region: Region) -> None:
    """Raise RegionUnfit when the mapping's compare-and-swap does not work."""
    for _ in range(PROBE_ATTEMPTS):  # another mount may use the same word
        word = SCRATCH_OFFSET + words.WORD * random.randrange(SCRATCH_SIZE // words.WORD)
        if cas_works(region.memory, word):
            return
    refuse_unfit(probe(region.memory, Scratch(word, words.WORD)), region.spec)


class Volume:
    """One peer's region, membership and latest view.  Not thread-safe."""

    def __init__(
        self, region: Region, *, readonly: bool = False, doorbell: Doorbell | None = None
    ) -> None:
        self.region: Final = region
        self._raw: Final = region.memory.read(0, superblock.SUPERBLOCK.size)
        self.superblock: Final = superblock.decode(self._raw, region.size)
        self.readonly: Final = readonly or region.readonly or self.superblock.read_only
        self.store: Final = Store(region.memory, self.superblock)
        self.table: Final = PeerTable(
            region.memory, self.superblock.geometry, self.store.commit_word
        )
        self.bells: Final = None if doorbell is None else Bells(region.memory, self.table, doorbell)
        self.block_size: Final = self.superblock.geometry.block_size
        self.clock: Final = Clock()
        self.member: Membership | None = None
        self.supply = FreeList(self.store)  # the blocks that this peer claims next
        self.latest: View | None = None  # the view of the last commit that this peer saw
        # Statistics of this mount; upkeep publishes them.  A read-only mount publishes nothing.
        self.operations = 0  # looks and changes
        self.bytes_read = 0
        self.bytes_written = 0
        self.retries = 0  # commits that were lost to another peer
        self.locks = 0  # (owner, inode) pairs that hold locks
        self._own_word = 0  # the commit word after the last commit of this peer
        self._own_since = 0  # the commit word before the unbroken row of own commits up to that
        self._short_at = float("-inf")  # the time of the last log line about exhausted memory

    @classmethod
    def mount(
        cls, region: Region, *, readonly: bool = False, doorbell: Doorbell | None = None
    ) -> Volume:
        """Return `region` as a new peer sees it; with `readonly`, without a slot.

        With a `doorbell`, it rings after each commit.  The caller closes it.

        Raises FormatError and its subclasses when the region holds no usable filesystem,
        RegionUnfit, TooManyPeers, UnderRepair.
        """
        self = cls(region, readonly=readonly, doorbell=doorbell)
        self.store.snapshot()
        if not self.readonly:
            _check_swaps(region)
            self._join()
        return self

    def _join(self) -> None:
        member = Membership(self.table, rings=self.rings)
        member.join()
        self.table.watch.look()
        try:
            member.must_collect |= self._has_leaked()
        except BaseException:
            member.leave()
            raise
        self.member = member
        count = self.superblock.geometry.block_count
        self.supply = FreeList(self.store, (member.slot - 1) * count // self.table.count)

    # --- membership -------------------------------------------------------------------------

    @property
    def peer_id(self) -> tuple[int, int]:
        """(slot, incarnation) of this peer; (0, 0) without a slot."""
        member = self.member
        return (member.slot, member.incarnation) if member is not None else (0, 0)

    @property
    def rings(self) -> bool:
        """Whether waiters are rung after each commit of this peer."""
        return self.bells is not None and self.bells.doorbell.keep()

    def joined(self) -> Membership:
        """Return the membership; raises EROFS without a slot."""
        if self.member is None:
            raise FsError(errno.EROFS)
        return self.member

    def rejoin(self, member: Membership) -> None:
        """Take a slot as a new incarnation, after another peer retired this one.

        Raises Busy, or TooManyPeers when all slots have been taken for a long time.
        """
        self.check_identity()
        if member.owns_slot:
            return  # the end of the failed transaction has already rejoined
        member.rejoin()
        log.warning("%s; it joined again", _TWIN if member.twin_seen else _SILENT)

    # --- looking ----------------------------------------------------------------------------

    def view(self) -> View:
        """Return the present state; the same object until the next commit."""
        word, root = self.store.snapshot()
        if self.latest is None or self.latest.word != word:
            before = self.table_before(word)
            self.latest = View(self.store, word, root, CommitCache(), before)
        return self.latest

    def table_before(self, word: int) -> RadixTree | None:
        """Return the inode table that this mount knew before other peers' commits up to `word`.

        None when there was none, or no commit of another peer.
        """
        latest = self.latest
        if latest is None:
            return None
        return latest.before if latest.word == word else latest.root.table

    def note_commit(self, before: int, after: int) -> None:
        """This peer's commit replaced the commit word `before` by `after`."""
        if before != self._own_word:
            self._own_since = before
        self._own_word = after

    def only_own_commits(self, before: int, now: int) -> bool:
        """Whether this peer made all commits after the commit word `before`, up to `now`."""
        return now == before or (now == self._own_word and self._own_since <= before)

    def look(self, reader: Callable[[View], T]) -> T:
        """Return what `reader` returns for a snapshot; run it again when a commit overtakes it."""
        self.operations += 1
        self.store.begin_turn()
        try:
            for _ in range(ATTEMPTS):
                view = self.view()
                try:
                    return reader(view)
                except Restart as overtaken:
                    if self.store.commit_word.load() == view.word:
                        self._refute(reader, view, overtaken)
        except DAMAGE as error:
            raise self.contained(error) from error
        raise Busy("other peers change this faster than it can be read")

    def _refute(self, reader: Callable[[View], T], view: View, overtaken: Restart) -> None:
        """Run `reader` once more, because no peer has committed since the snapshot.

        Without a commit no peer replaces what the root reaches, so a second Restart means damage.
        """
        try:
            reader(view)
        except Restart:
            if self.store.commit_word.load() == view.word:
                raise Corrupt(f"the present root leads astray: {overtaken}") from None

    def is_leaking(self) -> bool:
        """Whether some blocks are neither free nor reachable: leaked, or claimed by a transaction.

        Raises Unfinished while it counts the free blocks.
        """
        return self.supply.lacking(self.view().root.used)

    def _has_leaked(self) -> bool:
        while True:
            with suppress(Unfinished):
                return self.is_leaking()

    # --- damage -----------------------------------------------------------------------------

    def contained(self, error: Exception) -> FsError:
        """Return the error that the caller gets for `error`, which is one of DAMAGE or EIO."""
        try:
            self.check_identity()
        except FsError as stale:
            return stale
        if getattr(error, "errno", 0) == errno.EIO and (short := self.region.shortage()):
            return self._short(short)
        if isinstance(error, FsError):
            return error
        if isinstance(error, OSError):
            return FsError(errno.EIO, f"the region cannot be accessed any more: {error}")
        return Corrupt(f"metadata contradicts itself: {error}")

    def _short(self, text: str) -> NoSpace:
        """Return NoSpace for exhausted memory behind the region; log it once in SHORT_PAUSE."""
        now = time.monotonic()
        if now - self._short_at > SHORT_PAUSE:
            self._short_at = now
            log.error("%s", text)
        return NoSpace(text)

    def check_identity(self) -> None:
        """Raise StaleHandle, or EIO, unless the region still holds the mounted filesystem."""
        try:
            raw = self.store.memory.read(0, superblock.SUPERBLOCK.size)
            if raw != self._raw and not superblock.decode(raw).same_filesystem(self.superblock):
                raise StaleHandle(
                    "the region was formatted anew, or made larger: unmount it and mount it again"
                )
        except (FormatError, Corrupt):
            raise StaleHandle("the region no longer carries this filesystem") from None
        except OSError as error:
            raise FsError(errno.EIO, f"the region cannot be accessed any more: {error}") from None

    def condition(self, found: Condition | None = None) -> Condition:
        """Return how the region has changed since the mount.  Never raises for what it reads.

        `found` is what a look at the region's path has shown; without it, the path is looked at.
        """
        found = found or self.region.condition()
        if found is not Condition.SOUND:
            return found
        try:
            raw = self.store.memory.read(0, superblock.SUPERBLOCK.size)
            if raw == self._raw:
                return Condition.SOUND
            if raw == b"\xff" * len(raw):
                return Condition.ONES
            same = superblock.decode(raw).same_filesystem(self.superblock)
            return Condition.SOUND if same else Condition.REFORMATTED
        except OSError:
            return Condition.UNREADABLE
        except (FormatError, Corrupt):
            return Condition.OVERWRITTEN
