"""Changes of the region: a plan runs in a transaction until one commit publishes it.

A plan is a function of a `Transaction`.  `Committer.change` runs it in this order:

    take the hint        Busy if another peer commits and makes progress
    begin                own slot IDLE -> ACTIVE; the tags of all claims carry the new counter
      load the commit word, check that no peer has retired this incarnation
      plan, seal         only private blocks change
      publish            one compare-and-swap; after a lost race, plan again on the new root
    end                  own slot ACTIVE -> IDLE
    release              the replaced blocks, and the claims that the commit did not need
    give the hint
    ring                 the doorbells of peers that wait (see `shm/bells.py`)

Nothing here waits: `Busy` means that nothing was changed and that the caller can try again.  Each
change is one turn of bounded work (see `shm/published.py`).  A longer change raises Unfinished at
the end of its turn.  Its progress is in the node cache (nodes read), in `Garbage` (blocks to
release or collect), or in `go_on` of the Unfinished.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

from ivshmemfs.engine.garbage import Garbage
from ivshmemfs.engine.openfiles import OpenFiles
from ivshmemfs.engine.transaction import CommitCache, Transaction, View
from ivshmemfs.engine.volume import ATTEMPTS, DAMAGE, Volume
from ivshmemfs.errors import (
    Busy,
    Corrupt,
    Fenced,
    FsError,
    IvshmemfsError,
    NoSpace,
    Restart,
    Unfinished,
)
from ivshmemfs.format import repair
from ivshmemfs.format.bell import BELLS_OFFSET
from ivshmemfs.shm.commit import Hint
from ivshmemfs.shm.membership import BEGUN, CHECKED, Membership
from ivshmemfs.shm.workspace import Workspace

T = TypeVar("T")

# In place of the commit word that `Committer._enter` returns.
_NOT_BEGUN: Final = -1
_UNCHECKED: Final = -2


class Committer:
    """The changes of one mount."""

    def __init__(self, volume: Volume, openfiles: OpenFiles, garbage: Garbage) -> None:
        self._volume: Final = volume
        self._store: Final = volume.store
        self._turn: Final = volume.store.turn
        self._supply: Final = volume.supply
        self._openfiles: Final = openfiles
        self._garbage: Final = garbage
        self.hint: Final = Hint(volume.region.memory)
        # The repair slot's state word at the last transaction.
        self._repairs = volume.table.state(repair.SLOT)
        self._rings: Final = volume.bells is not None
        self._load: Final = volume.region.memory.load
        self._unrung = False  # a commit of this peer is not told to waiters yet

    def change(self, plan: Callable[[Transaction], T], *, removal: bool = False) -> T:
        """Run `plan` in a transaction and return its result; a `removal` may use the reserve.

        Raises EROFS, Busy, Unfinished, NoSpace, Corrupt, EIO, ESTALE, and what `plan` raises.
        """
        member = self._volume.joined()
        self._volume.operations += 1
        self._store.begin_turn()
        try:
            try:
                return self._transact(member, plan, removal, self._enter(member))
            except NoSpace:
                releasing = self._garbage.dropped.pending
                if not self._garbage.make_room(member):
                    raise
                return self._transact_again(member, plan, removal, releasing)
            finally:
                try:
                    member.withdraw()
                finally:
                    self.hint.give()
                if self._unrung:
                    self._unrung = False
                    if self._load(BELLS_OFFSET):
                        self._ring()
        except Fenced as error:
            self._volume.rejoin(member)
            raise Busy(str(error)) from error
        except DAMAGE as error:
            raise self._volume.contained(error) from error
        except FsError as error:  # the copy from a file into blocks failed
            if error.errno != errno.EIO:
                raise
            raise self._volume.contained(error) from error

    def _ring(self) -> None:
        """Ring those that wait; a fault of the region here is told by the next operation."""
        if self._volume.bells is not None:
            with suppress(OSError, ValueError):
                self._volume.bells.ring()

    def _transact_again(
        self, member: Membership, plan: Callable[[Transaction], T], removal: bool, releasing: bool
    ) -> T:
        """Run `plan` again after `make_room` freed some blocks.

        Raises Unfinished if it finds no space and the blocks came from `releasing`: the next turn
        may release more, or collect.
        """
        self._store.begin_turn()
        try:
            return self._transact(member, plan, removal, _NOT_BEGUN)
        except NoSpace:
            if not releasing:
                raise
            raise Unfinished("blocks of what was removed are being released") from None

    def _enter(self, member: Membership) -> int:
        """Take the hint and begin a transaction, in one call while nothing is unexpected.

        Returns the commit word; _UNCHECKED if the own state must be checked again; _NOT_BEGUN if
        `_begin` must find out what is unexpected.  Raises Busy.
        """
        hint, passed = self.hint, 0
        if member.is_plain:
            mine = hint.next_word(member.slot)
            try:
                word = member.begin_with(self._turn, mine, self._repairs)
            except BaseException:
                if self._turn.passed >= CHECKED:
                    self._end(member)
                raise
            finally:
                passed = self._turn.passed
                if passed:
                    hint.taken(mine)
            if word >= 0:
                self._supply.repairs = self._repairs
                return word
            if passed >= CHECKED:
                return _UNCHECKED
            if passed >= BEGUN:
                member.abandon()
        if not passed and not hint.take(member.slot):
            raise Busy("another peer is committing")
        return _NOT_BEGUN

    def _transact(
        self, member: Membership, plan: Callable[[Transaction], T], removal: bool, entered: int
    ) -> T:
        """Run `plan` and commit; `entered` is what `_enter` returned."""
        volume, store = self._volume, self._store
        tag = self._begin(member) if entered == _NOT_BEGUN else member.tag
        space = Workspace(store, tag, self._supply)
        try:
            for _ in range(ATTEMPTS):
                if entered >= 0:
                    word, root = store.snapshot_at(entered)
                else:
                    word, root = store.snapshot()
                if word != entered:
                    member.check()
                entered = _UNCHECKED
                tx = Transaction(
                    store, word, root, space, self._openfiles.in_use, removal,
                    volume.clock, self._cache_of(word), volume.table_before(word),
                )  # fmt: skip
                try:
                    result = plan(tx)
                    if not tx.changed:
                        volume.latest = View(store, word, root, tx.cache, tx.before)
                        return result
                    new_root = tx.seal()
                except Restart as overtaken:
                    if store.commit_word.load() == word:
                        raise Corrupt(f"the present root leads astray: {overtaken}") from None
                except IvshmemfsError:  # also Unfinished: what was read is known to the next plan
                    volume.latest = View(store, word, root, tx.cache, tx.before)
                    raise
                else:
                    if new_word := space.publish(word, new_root):
                        self._unrung = self._rings
                        volume.note_commit(word, new_word)
                        volume.latest = View(store, new_word, new_root, tx.hand_over())
                        if space.dropped:
                            self._garbage.take(space.dropped)
                        return result
                volume.retries += 1
                space.forget_plan()
                if not self.hint.retake(member.slot):
                    break
            raise Busy("other peers commit faster than this one can plan")
        finally:
            plain = space.published and member.active and space.is_small
            if not (plain and self._leave(member, space)):
                space.settle(self._end(member))

    def _leave(self, member: Membership, space: Workspace) -> bool:
        """Do after a commit what `_end`, `settle` and giving the hint do, in one call.

        Returns False if it did nothing.
        """
        supply, hint, few = self._supply, self.hint, space.leftovers()
        mine = 0 if member.intends else hint.mine
        try:
            if member.end_with(self._turn, supply.repairs, few, mine):
                if few:
                    supply.released(few)
                if mine:
                    hint.given()
                return True
        except ValueError:  # a damaged tree led to a block beyond the region
            if self._turn.passed:
                raise
        if self._turn.passed:
            supply.owed = True  # a repair has begun
            return True
        return False

    def _cache_of(self, word: int) -> CommitCache:
        """Return what the latest view knows if it is of commit `word`, else nothing known."""
        view = self._volume.latest
        return view.hand_over() if view is not None and view.word == word else CommitCache()

    def _begin(self, member: Membership) -> int:
        """Begin a transaction; returns the tag of its claims.

        What was cut off before a repair is left to a collection: the repair may reach it again.
        """
        repairs = self._supply.begin()
        if repairs != self._repairs:
            self._repairs = repairs
            member.must_collect |= self._garbage.dropped.leave()
        try:
            tag = member.begin()
        except Fenced:
            self._volume.rejoin(member)
            tag = member.begin()
        self._store.blocks.guard(*member.own_state)
        return tag

    def _end(self, member: Membership) -> bool:
        """End the transaction; whether this peer ended it, not the one that retired it.

        A commit stays valid after the peer was retired, so a failure to rejoin raises nothing: the
        next transaction tries again.
        """
        try:
            member.end()
        except Fenced:
            member.must_collect = True
            with suppress(IvshmemfsError, OSError):
                self._volume.rejoin(member)
            return False
        return True
