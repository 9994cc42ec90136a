"""One mount of one region: how operations look, how they change anything, and the upkeep.

A look takes a snapshot and runs on it; if other peers overtake it, it starts again.  A change is
a plan, a function of a `Transaction`, that `change` runs:

    take the hint        (Busy if another peer is committing and makes progress)
    begin                own slot IDLE -> ACTIVE; all claims bear the new counter
      load the commit word, check that this incarnation still stands
      plan, seal         private blocks only
      publish            one compare-and-swap; lost: plan again on the new root
    end                  own slot ACTIVE -> IDLE
    release              what was replaced, and claims that were not needed
    give the hint

Nothing here waits: `Busy` means that nothing was changed and that trying again will do.

Nothing here computes for long: each look and each change is one turn of bounded work (see
`shm/published.py`), and whatever may be more is done in pieces.  Its progress is kept by this mount
(what is to be released, collected, or freed), by the node cache (what was read), or by `go_on` of
the Unfinished that ends a turn.  `work` does the next piece of what nobody waits for.

What the region does to us is contained here: arithmetic that damaged metadata upsets becomes
Corrupt, an access that fails (the file was truncated) EIO, and both become ESTALE when the
superblock is no longer the one that was mounted.
"""

from __future__ import annotations

import errno
import logging
import random
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Self, TypeVar

from ivshmemfs.engine import directory, names
from ivshmemfs.engine.clock import Clock
from ivshmemfs.engine.collect import Collector
from ivshmemfs.engine.directory import Entry
from ivshmemfs.engine.dropped import Dropped
from ivshmemfs.engine.transaction import Known, Transaction, View
from ivshmemfs.errors import (
    Busy,
    Corrupt,
    Fenced,
    FormatError,
    FsError,
    IvshmemfsError,
    NoSpace,
    Restart,
    StaleHandle,
    UnderRepair,
    Unfinished,
)
from ivshmemfs.format import repair, superblock, words
from ivshmemfs.format.geometry import SCRATCH_OFFSET, SCRATCH_SIZE
from ivshmemfs.format.inode import ORPHANS_INO
from ivshmemfs.region.condition import Condition
from ivshmemfs.region.probe import Scratch, cas_works, probe, refuse_unfit
from ivshmemfs.shm.commit import Hint
from ivshmemfs.shm.freelist import FreeList
from ivshmemfs.shm.membership import Membership
from ivshmemfs.shm.peers import PeerTable, Retirement
from ivshmemfs.shm.published import ENDLESS, Store
from ivshmemfs.shm.workspace import Workspace

if TYPE_CHECKING:
    from ivshmemfs.region import Region

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS = 100  # plans of one operation before it reports Busy
SHORT_PAUSE = 60.0  # seconds between two lines of the log about memory that cannot be had
COLLECTED_AT_ONCE = 128  # nodes that one piece of a collection reads, in about 5 ms
LOOKED_THROUGH = 256  # orphans of which one piece of work sees whether they are open
FREED_AT_ONCE = 8  # orphans that one piece of work frees, each in a commit of its own
COLLECT_PAUSE = 1.0  # seconds between two collections for want of space
TIGHT = 0.05  # seconds that a full region waits for claims of peers that are at work
RETIRE_TICKS = 4  # between two looks for peers that are surely gone
TRIES = 3  # scratch words that a mount tries before it calls the mapping unfit
_SILENT = "this mount was declared gone while it was silent"
_TWIN = (
    "another process goes by this mount's identity: its machine was cloned, or put back into an "
    "older state, and nothing but `ivshmemfs evict` will tell of this mount's end"
)
_UPSET = (struct.error, OverflowError, IndexError, ValueError)


def _refuse_unfit(region: Region) -> None:
    """Raise RegionUnfit when the mapping's compare-and-swap does not work."""
    for _ in range(TRIES):  # another mount may try the same word
        word = SCRATCH_OFFSET + words.WORD * random.randrange(SCRATCH_SIZE // words.WORD)
        if cas_works(region.memory, word):
            return
    refuse_unfit(probe(region.memory, Scratch(word, words.WORD)), region.spec)


class Mount:
    """Membership in the region, and the two ways to work on it.  Not thread-safe."""

    def __init__(self, region: Region, *, readonly: bool = False) -> None:
        self.region = region
        self._raw = region.memory.read(0, superblock.SUPERBLOCK.size)
        self.superblock = superblock.decode(self._raw, region.size)
        self.readonly = readonly or region.readonly or self.superblock.read_only
        self.store = Store(region.memory, self.superblock)
        self.table = PeerTable(region.memory, self.superblock.geometry, self.store.commit_word)
        self.block_size = self.superblock.geometry.block_size
        self.clock = Clock()
        self._hint = Hint(region.memory)
        self._member: Membership | None = None
        self._open: dict[int, int] = {}  # handles by inode
        self._supply = FreeList(self.store)
        self._dropped = Dropped(self.store, self._supply)
        self._reaped = 0  # the key of the last orphan that this pass has looked at
        self._view: View | None = None
        self._collector: Collector | None = None
        self._collected_at = float("-inf")
        self._tight_since = 0.0
        self._retirement = Retirement(self.table)
        self._decide_soon = False  # who is gone: at the next tick
        self._ticks = 0
        self._short_at = float("-inf")  # when the log last told that memory is short
        self._shut_out = False  # by a repair, as the log says
        self._repairs = self.table.state(repair.SLOT)

    @classmethod
    def mount(cls, region: Region, *, readonly: bool = False) -> Self:
        """Join the peers of `region`, or only look when `readonly`.

        Raises FormatError and its kin for what is not a usable filesystem, TooManyPeers,
        UnderRepair.
        """
        self = cls(region, readonly=readonly)
        self.store.snapshot()
        if not self.readonly:
            _refuse_unfit(region)
            member = Membership(self.table)
            member.join()
            self.table.watch.look()
            try:
                member.must_collect |= self._leaks()
            except BaseException:
                member.leave()
                raise
            self._member = member
            count = self.superblock.geometry.block_count
            start = (member.slot - 1) * count // self.table.count
            self._supply = FreeList(self.store, start)
            self._dropped = Dropped(self.store, self._supply)
        return self

    def unmount(self) -> None:
        """Leave the peer table.  Files that are still open and have no links are given back."""
        member = self._member
        if member is None:
            return
        with suppress(IvshmemfsError, OSError):  # the region may be gone, or another filesystem
            self._check_identity()
            with suppress(IvshmemfsError, OSError):  # it may be damaged, or under repair
                self._give_back(member)
            member.leave()
        self._member = None

    def _give_back(self, member: Membership) -> None:
        """Free all that this mount alone keeps from being free."""
        for ino in list(self._open):
            for _ in range(self._open.pop(ino)):
                member.unlist_open(ino)
        with suppress(Busy):  # what is left, another peer's next tick frees
            self.reap()
        self._release_dropped()
        member.must_collect |= self._supply.owed
        if member.must_collect or self._collector is not None:  # nobody else knows of it
            self.collect()

    @property
    def place(self) -> tuple[int, int]:
        """(slot, incarnation) of this mount among the peers; (0, 0) when it only looks."""
        member = self._member
        return (member.slot, member.incarnation) if member is not None else (0, 0)

    @property
    def is_committing(self) -> bool:
        """Whether somebody is committing at this moment, so that a change would be Busy."""
        return self._hint.held

    # --- the two ways to work -------------------------------------------------------------

    def view(self) -> View:
        """The present state; the same object while nobody commits."""
        word, root = self.store.snapshot()
        if self._view is None or self._view.word != word:
            self._view = View(self.store, word, root, Known())
        return self._view

    def look(self, reader: Callable[[View], T]) -> T:
        """Run `reader` on a snapshot, again on newer ones while it is overtaken."""
        self.store.begin_turn()
        try:
            for _ in range(ATTEMPTS):
                view = self.view()
                try:
                    return reader(view)
                except Restart as overtaken:
                    if self.store.commit_word.load() == view.word:
                        self._refute(reader, view, overtaken)
        except (*_UPSET, OSError, Corrupt) as error:
            raise self._contained(error) from error
        raise Busy("other peers change this faster than it can be read")

    def _refute(self, reader: Callable[[View], T], view: View, overtaken: Restart) -> None:
        """Nobody committed, so nobody may have replaced what the root leads to: look once more."""
        try:
            reader(view)
        except Restart:
            if self.store.commit_word.load() == view.word:
                raise Corrupt(f"the present root leads astray: {overtaken}") from None

    def change(self, plan: Callable[[Transaction], T], *, removal: bool = False) -> T:
        """Run `plan` in a transaction; a `removal` may use the reserve."""
        member = self._joined()
        self.store.begin_turn()
        try:
            if not self._hint.take(member.slot):
                raise Busy("another peer is committing")
            try:
                return self._transact(member, plan, removal)
            except NoSpace:
                releasing = self._dropped.pending
                if not self._make_room(member):
                    raise
                return self._transact_again(member, plan, removal, releasing)
            finally:
                member.withdraw()
                self._hint.give()
        except Fenced as error:
            self._rejoin(member)
            raise Busy(str(error)) from error
        except (*_UPSET, OSError, Corrupt) as error:
            raise self._contained(error) from error
        except FsError as error:  # a file was copied into blocks, and one of them failed
            if error.errno != errno.EIO:
                raise
            raise self._contained(error) from error

    def _joined(self) -> Membership:
        if self._member is None:
            raise FsError(errno.EROFS)
        return self._member

    def _transact_again(
        self, member: Membership, plan: Callable[[Transaction], T], removal: bool, releasing: bool
    ) -> T:
        """After some room was made.

        Unfinished if that was done by `releasing` what was dropped: there may be more of it, or
        something to be collected.
        """
        self.store.begin_turn()
        try:
            return self._transact(member, plan, removal)
        except NoSpace:
            if not releasing:
                raise
            raise Unfinished("blocks of what was removed are being released") from None

    def _transact(self, member: Membership, plan: Callable[[Transaction], T], removal: bool) -> T:
        space = Workspace(self.store, self._begin(member), self._supply)
        published = False
        try:
            for _ in range(ATTEMPTS):
                word, root = self.store.snapshot()
                member.check()
                known = self._known_of(word)
                tx = Transaction(
                    self.store, word, root, space, self._in_use, removal, self.clock, known
                )
                try:
                    result = plan(tx)
                    if not tx.changed:
                        return result
                    new_root = tx.seal()
                except Restart as overtaken:
                    if self.store.commit_word.load() == word:
                        raise Corrupt(f"the present root leads astray: {overtaken}") from None
                except Unfinished:
                    self._view = View(self.store, word, root, tx.known)
                    raise
                else:
                    space.store_nodes()
                    if new_word := space.publish(word, new_root):
                        published = True
                        self._view = View(self.store, new_word, new_root, tx.hand_over())
                        if space.dropped:
                            self._dropped.add(space.dropped)
                            self._release_piece()
                        return result
                space.forget_plan()
                if not self._hint.retake(member.slot):
                    break
            raise Busy("other peers commit faster than this one can plan")
        finally:
            space.settle(published, self._end(member))

    def _known_of(self, word: int) -> Known:
        """What is known of the commit with this word, taken from the view of it."""
        view = self._view
        return view.hand_over() if view is not None and view.word == word else Known()

    def _begin(self, member: Membership) -> int:
        repairs = self._supply.begin()
        if repairs != self._repairs:
            self._repairs = repairs
            member.must_collect |= self._dropped.leave()
        try:
            tag = member.begin()
        except Fenced:
            self._rejoin(member)
            tag = member.begin()
        self.store.blocks.guard(*member.own_state)
        return tag

    def _end(self, member: Membership) -> bool:
        """Whether it was us who ended the transaction.

        What was published stands, so a slot that cannot be had at once is left to later.
        """
        try:
            member.end()
        except Fenced:
            member.must_collect = True
            with suppress(IvshmemfsError, OSError):
                self._rejoin(member)
            return False
        return True

    def _rejoin(self, member: Membership) -> None:
        """Another peer took our slot while we were silent: go on as a new incarnation.

        Raises Busy, or TooManyPeers when all slots have been taken for long.
        """
        self._check_identity()
        if member.owns_slot:
            return  # joined again already, on the way out of the transaction
        member.rejoin()
        log.warning("%s; it joined again", _TWIN if member.twin_seen else _SILENT)

    # --- what the region may do to us -------------------------------------------------------

    def _contained(self, error: Exception) -> FsError:
        """What a caller is told of `error`."""
        try:
            self._check_identity()
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
        """The memory behind the region is used up; the log says so, but not at every operation."""
        now = time.monotonic()
        if now - self._short_at > SHORT_PAUSE:
            self._short_at = now
            log.error("%s", text)
        return NoSpace(text)

    def _check_identity(self) -> None:
        """Raise StaleHandle, or EIO, unless the region still carries what was mounted."""
        try:
            raw = self.store.memory.read(0, superblock.SUPERBLOCK.size)
            if raw != self._raw and superblock.decode(raw) != self.superblock:
                raise StaleHandle("the region was formatted anew: unmount it and mount it again")
        except (FormatError, Corrupt):
            raise StaleHandle("the region no longer carries this filesystem") from None
        except OSError as error:
            raise FsError(errno.EIO, f"the region cannot be accessed any more: {error}") from None

    def condition(self) -> Condition:
        """What became of the region since it was mounted.  Never raises for what it reads."""
        found = self.region.condition()
        if found is not Condition.SOUND:
            return found
        try:
            raw = self.store.memory.read(0, superblock.SUPERBLOCK.size)
            if raw == self._raw:
                return Condition.SOUND
            if raw == b"\xff" * len(raw):
                return Condition.ONES
            same = superblock.decode(raw) == self.superblock
            return Condition.SOUND if same else Condition.REFORMATTED
        except OSError:
            return Condition.UNREADABLE
        except (FormatError, Corrupt):
            return Condition.OVERWRITTEN

    # --- space ----------------------------------------------------------------------------

    def _make_room(self, member: Membership) -> bool:
        """An allocation failed: collect garbage if there is any; whether something was found.

        Claims of peers at work come back in a moment, so for a moment it raises Busy.  A collection
        that takes several turns raises Unfinished after each.
        """
        if self._dropped.pending:
            return self._release_piece()
        if self._collector is not None and self._collect_piece():
            return True
        if not self._leaking():
            return False
        self._decide_soon = True  # a dead peer may hold some; the upkeep finds out
        now = time.monotonic()
        if member.must_collect or now - self._collected_at > COLLECT_PAUSE:
            member.must_collect = False
            self._tight_since = now
            self._collector = Collector(self.store, self.table)
            if self._collect_piece():
                return True
        at_work = any(
            word >> words.SLOT_SHIFT == words.ACTIVE and slot != member.slot
            for slot, word in enumerate(self.table.states(), 1)
        )
        if at_work and now - self._tight_since < TIGHT:
            raise Busy("other peers hold the last free blocks")
        return False

    def _leaking(self) -> bool:
        """Whether blocks are neither free nor reachable: lost, or claimed at this moment.

        Raises Unfinished while they are being counted.
        """
        return self._supply.lacking(self.view().root.record.used)

    def _leaks(self) -> bool:
        """The same, counted to the end."""
        while True:
            with suppress(Unfinished):
                return self._leaking()

    def _collect_piece(self) -> bool:
        """Go on with a collection; whether it gave anything back.  Unfinished until it ends."""
        collector, self._collector = self._collector, None
        assert collector is not None
        try:
            done = collector.step(COLLECTED_AT_ONCE)
        except Busy:  # a repair; the collection starts anew after it
            self._collector = collector
            raise
        if not done:
            self._collector = collector
            raise Unfinished("lost blocks are being collected")
        self._note_collection(collector)
        return collector.released > 0

    def _note_collection(self, collector: Collector) -> None:
        self._collected_at = time.monotonic()
        if collector.released:
            self._supply.recount()

    def _release_piece(self) -> bool:
        """Release some blocks of what was dropped; whether there were any."""
        self.store.begin_turn(ENDLESS)  # the steps are counted instead
        return self._dropped.step()

    def _release_dropped(self) -> None:
        while self._dropped.pending:
            self._release_piece()

    def collect(self) -> int:
        """Collect at once; returns how many blocks were given back."""
        collector = Collector(self.store, self.table)
        try:
            collector.step()
        except (*_UPSET, OSError, Corrupt) as error:
            raise self._contained(error) from error
        return collector.released

    # --- upkeep ---------------------------------------------------------------------------

    def tick(self) -> bool:
        """Show life and do a bounded piece of housekeeping; about once a second.  Raises Busy.

        Returns whether there is more to do, for which `work` is to be called soon.
        """
        self._ticks += 1
        try:
            if self._member is not None:
                self._keep_alive(self._member)
            self._look_for_repair()
        except (*_UPSET, OSError, Corrupt) as error:
            raise self._contained(error) from error
        return self.work()

    def work(self) -> bool:
        """Do a bounded piece of housekeeping; whether there is more to do.  Raises Busy."""
        member = self._member
        if member is None:
            return False
        try:
            self._work_piece(member)
            orphans = self.view().root.record.orphans
        except (*_UPSET, OSError, Corrupt) as error:
            self._collector = None
            raise self._contained(error) from error
        freed = self._reap_piece() if orphans else 0
        if freed or self._retirement.pending or self._dropped.pending:
            return True
        return self._collector is not None or member.must_collect

    def _work_piece(self, member: Membership) -> None:
        """The next piece of what is most urgent: who is gone, what is to be released, what lost."""
        if self._retirement.pending:
            self._check_identity()
            member.must_collect |= self._retirement.step()
        elif self._dropped.pending:
            self._check_identity()
            self._release_piece()
        elif self._collector is not None or member.must_collect:
            if self._collector is None:
                self._collector = Collector(self.store, self.table)
                member.must_collect = False
            if self._collector.step(COLLECTED_AT_ONCE):
                self._note_collection(self._collector)
                self._collector = None

    def _look_for_repair(self) -> None:
        """Log that a repair shuts this mount out, and that it is over; raises UnderRepair."""
        try:
            self.store.snapshot()
        except UnderRepair as error:
            if not self._shut_out:
                log.warning("%s; until then every operation waits", error)
                self._shut_out = True
            raise
        if self._shut_out:
            log.warning("the repair of the region is over")
            self._shut_out = False

    def _keep_alive(self, member: Membership) -> None:
        try:
            member.beat()
        except Fenced:
            self._rejoin(member)
        self._watch_others(member)
        if self._ticks % RETIRE_TICKS == 0 or self._decide_soon:
            self._retirement.begin(member.slot)
            self._decide_soon = False
        member.must_collect |= self._supply.owed
        self._supply.owed = False

    def _watch_others(self, member: Membership) -> None:
        watch = self.table.watch
        known = set(watch.machines.shared)
        watch.look()
        for machine in watch.machines.shared - known:
            log.warning(
                "two machines go by the hardware UUID %s: it will not tell of anybody's end",
                watch.machines.name(machine),
            )
            member.doubt_machine(machine)

    # --- open inodes without links ----------------------------------------------------------

    def reap(self) -> None:
        """Free every orphan that nobody holds open any more, however many there are."""
        self._reaped = 0
        while self._reap_piece() or self._reaped:
            pass

    def _reap_piece(self) -> int:
        """Look through some orphans, after those of last time, and free some; how many it freed.

        `_reaped` is 0 once all were looked at.
        """

        def read(view: View) -> list[Entry]:
            return directory.leaf_after(view, view.inode(ORPHANS_INO), self._reaped)

        member, freed, seen = self._joined(), 0, 0
        while seen < LOOKED_THROUGH:
            found = self.look(read)
            if not found:
                self._reaped = 0
                break
            for entry in found:
                if freed == FREED_AT_ONCE:
                    return freed
                self._reaped = entry.key
                if entry.ino not in self._open and not member.listed_elsewhere(entry.ino):
                    freed += self._free_orphan(entry.ino)
            seen += len(found)
        return freed

    def _free_orphan(self, ino: int) -> bool:
        return self.change(lambda tx: names.free_orphan(tx, ino), removal=True)

    def _in_use(self, ino: int) -> bool:
        """Whether anybody holds `ino` open; if not, openers from now on will see our intent."""
        if ino in self._open:
            return True
        member = self._joined()
        member.intend(ino)
        return member.listed_elsewhere(ino)

    def _hold(self, ino: int) -> None:
        """One handle of `ino` more."""
        self._open[ino] = self._open.get(ino, 0) + 1
        if self._member is not None:
            try:
                self._member.list_open(ino)
            except Fenced:
                try:
                    self._rejoin(self._member)
                except BaseException:
                    self._let_go(ino)
                    raise

    def _confirm(self, ino: int) -> None:
        """After `_hold`: make sure that nobody who did not see that frees the inode."""
        if self._member is not None and self._member.intended_elsewhere(ino):
            self.store.commit_word.fence()
        self.look(lambda view: view.inode(ino))

    def _let_go(self, ino: int) -> bool:
        """One handle less; whether it was the last one here."""
        left = self._open.get(ino, 0) - 1
        if left > 0:
            self._open[ino] = left
        else:
            self._open.pop(ino, None)
        if self._member is not None:
            self._member.unlist_open(ino)
        return left <= 0
