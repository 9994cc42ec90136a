"""Upkeep: what a mount does that no request asks for, in bounded pieces.

Each `tick`, about once a second, does in this order:

    beat         a new heartbeat and nonce, and statistics; rejoin if another peer retired this one
    watch        look at the slots of all peers
    check        ask another peer whether it sees the same memory, and answer
    decide       at every RETIRE_TICKS-th tick, or when space is short: begin to judge silent peers
    work         one piece, as below

Each `work` lets pins go, does one piece of the most urgent of three kinds, then reaps:

    unpin        some expired pins

    retire       peers that are gone, which leaves garbage
    release      what commits of this mount cut off
    collect      what leaked

    reap         orphans that no peer holds open

A repair shuts the mount out (UnderRepair): it still beats, and does no work until the repair ends.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Final

from ivshmemfs.engine.garbage import Garbage
from ivshmemfs.engine.lifetimes import Lifetimes
from ivshmemfs.engine.openfiles import OpenFiles
from ivshmemfs.engine.orphans import Orphans
from ivshmemfs.engine.volume import DAMAGE, Volume
from ivshmemfs.errors import Busy, Fenced, FsError, IvshmemfsError, UnderRepair
from ivshmemfs.shm.coherence import Coherence
from ivshmemfs.shm.membership import Membership
from ivshmemfs.shm.peers import Retirement

log = logging.getLogger(__name__)

RETIRE_TICKS: Final = 4  # ticks between two decisions about silent peers


class Upkeep:
    """The upkeep of one mount, and its end."""

    def __init__(
        self,
        volume: Volume,
        openfiles: OpenFiles,
        garbage: Garbage,
        orphans: Orphans,
        lifetimes: Lifetimes,
    ) -> None:
        self._volume: Final = volume
        self._openfiles: Final = openfiles
        self._garbage: Final = garbage
        self._orphans: Final = orphans
        self._lifetimes: Final = lifetimes
        self._retirement: Final = Retirement(volume.table)
        self._coherence: Coherence | None = None
        self.ticks = 0
        self._rang = volume.rings  # whether this mount rings; a lost doorbell never comes back
        self._shut_out = False  # whether the log says that a repair shuts this mount out

    def tick(self) -> bool:
        """Beat, look at other peers, and do one piece of work; about once a second.

        Returns whether there is more work, for which the caller calls `work` soon.  Raises Busy,
        Corrupt, EIO, ESTALE.
        """
        self.ticks += 1
        try:
            member = self._volume.member
            if member is not None:
                self._keep_alive(member)
            self._look_for_repair()
        except DAMAGE as error:
            raise self._volume.contained(error) from error
        return self.work()

    def work(self) -> bool:
        """Do one piece of work; whether there is more.  Raises as `tick` does."""
        volume, member, more = self._volume, self._volume.member, False
        with suppress(Busy, FsError):  # a mount that may not write keeps pins, too
            more = self._lifetimes.unpin(time.monotonic())
        if member is None or member.unfit:
            return more
        try:
            self._work_piece(member)
            orphans = volume.view().root.orphans
        except DAMAGE as error:
            self._garbage.collector = None
            raise volume.contained(error) from error
        if orphans:
            more |= self._reap()
        return more or self._retirement.pending or self._garbage.has_work(member)

    def _reap(self) -> bool:
        """Free some orphans; whether there may be more to free."""
        try:
            return self._orphans.reap_piece()
        except UnderRepair:
            raise
        except Busy:  # another peer commits: soon again, lest orphans fill the region
            return True

    def _work_piece(self, member: Membership) -> None:
        if self._retirement.pending:
            self._volume.check_identity()
            member.must_collect |= self._retirement.step()
        else:
            self._garbage.work(member)

    def _look_for_repair(self) -> None:
        """Log the start and the end of a repair; raises UnderRepair between them."""
        try:
            self._volume.store.snapshot()
        except UnderRepair as error:
            if not self._shut_out:
                log.warning("%s; until then every operation waits", error)
                self._shut_out = True
            raise
        if self._shut_out:
            log.warning("the repair of the region is over")
            self._shut_out = False

    def _keep_alive(self, member: Membership) -> None:
        volume = self._volume
        try:
            self._state_rings(member)
            member.beat()
            member.publish_statistics(
                volume.operations, volume.bytes_read, volume.bytes_written,
                volume.retries, volume.locks, len(self._openfiles.counts),
            )  # fmt: skip
        except Fenced:
            self._volume.rejoin(member)
        self._watch_others(member)
        self._check_coherence(member)
        if self.ticks % RETIRE_TICKS == 0 or self._garbage.suspects_death:
            self._retirement.begin(member.slot)
            self._garbage.suspects_death = False
        supply = self._volume.supply
        member.must_collect |= supply.owed
        supply.owed = False

    def _state_rings(self, member: Membership) -> None:
        """State whether this mount still rings; log the loss of its doorbell."""
        if self._rang and not self._volume.rings:
            self._rang = False
            log.warning("the doorbell is lost: its server or device is gone; waiters poll now")
        member.state_rings(self._rang)

    def _check_coherence(self, member: Membership) -> None:
        """Go on with the checks of the memory; log the first disagreement."""
        if self._coherence is None:
            self._coherence = Coherence(self._volume.table, member)
        before = member.unfit
        with suppress(Fenced):  # the next beat joins again
            self._coherence.turn()
        if member.unfit and not before:
            log.error("%s", member.unfit)

    def _watch_others(self, member: Membership) -> None:
        """Look at all slots; log machines that share a hardware UUID, and distrust that UUID."""
        watch = self._volume.table.watch
        known = set(watch.machines.shared)
        watch.look()
        for machine in watch.machines.shared - known:
            log.warning(
                "two machines go by the hardware UUID %s: it will not tell of anybody's end",
                watch.machines.name(machine),
            )
            member.doubt_machine(machine)

    # --- the end of the mount -------------------------------------------------------------------

    def unmount(self) -> None:
        """Free what only this mount keeps from being free, and give its slot back.

        Ignores errors of the region: it may be gone, damaged, or hold another filesystem.
        """
        volume, member = self._volume, self._volume.member
        if member is None:
            return
        with suppress(IvshmemfsError, OSError):
            volume.check_identity()
            with suppress(IvshmemfsError, OSError):  # damaged, or under repair: leave all the same
                self._give_back(member)
            member.leave()
        volume.member = None

    def _give_back(self, member: Membership) -> None:
        self._openfiles.let_all_go(member)
        with suppress(Busy):  # the next tick of another peer frees the remaining orphans
            self._orphans.reap()
        self._garbage.release_all()
        member.must_collect |= self._volume.supply.owed
        if member.must_collect or self._garbage.collector is not None:  # no other peer knows of it
            self._garbage.collect()
