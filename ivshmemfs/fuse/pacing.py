"""The pace of `-o notify`: how much CPU looks and replays may take beside other requests.

A look costs CPU in the daemon.  A replayed record costs CPU in the replayer and in the daemon that
answers it.  Under load from another machine both would take what the mount's programs need.  So
they have a credit in CPU seconds, BURST_SECONDS at most:

    idle    the daemon serves few other requests: nothing waits.  The credit grows with the time
    busy    the credit grows by BUSY_SHARE of what other requests use; what looks and records use
            is taken off.  Below zero there is no look and no record

What other machines change meanwhile comes as a sum with the next look.

Only `Pacer.account` changes the state.  The caller measures all times.
"""

from __future__ import annotations

from typing import Final

#: CPU seconds of looks and replays for each CPU second of other requests in a busy daemon.  Their
#: programs use the CPU, too, so those lose less than this share of their rate.
BUSY_SHARE: Final = 0.08
#: CPU seconds that may be used at once after an idle time, and their growth in a second of it.
BURST_SECONDS: Final = 0.2
IDLE_GROWTH: Final = 0.05
#: Share of a CPU that other requests take in a busy daemon.
BUSY_FROM: Final = 0.1
#: Seconds over which that share is measured.
MEASURED_SECONDS: Final = 0.1
#: CPU seconds of one record until the first ones were measured.
FIRST_COST: Final = 0.0005
#: Minimum of that cost: a system call and a request cannot take less.
LEAST_COST: Final = 0.00002
#: Weight of the last measurement in the mean cost of a record.
WEIGHT: Final = 0.2
#: Maximum number of records that one turn allows.
RECORDS_MAX: Final = 1 << 20


class Pacer:
    """Decides when to look and how many records the replayer gets.  All times are in seconds."""

    def __init__(self) -> None:
        self.busy = False
        self._credit = BURST_SECONDS
        self._cost = FIRST_COST  # of one record
        self._served = 0.0  # CPU seconds of other requests in the present measurement
        self._elapsed = 0.0  # of that measurement

    def account(
        self, elapsed: float, looks: float, replayer: float, daemon: float, records: int
    ) -> None:
        """Account for the time since the last call, `elapsed`.

        The daemon used the CPU for `daemon` seconds, `looks` of them for looks.  The replayer used
        it for `replayer` seconds, and got `records` records.
        """
        answers = min(replayer, max(daemon - looks, 0.0)) if records else 0.0
        if records:
            self._cost += WEIGHT * ((replayer + answers) / records - self._cost)
            self._cost = max(self._cost, LEAST_COST)
        served = max(daemon - looks - answers, 0.0)
        self._served += served
        self._elapsed += elapsed
        if self._elapsed >= MEASURED_SECONDS:
            self.busy = self._served > BUSY_FROM * self._elapsed
            self._served = self._elapsed = 0.0
        if self.busy:
            credit = self._credit + BUSY_SHARE * served - looks - replayer - answers
        else:
            credit = self._credit + IDLE_GROWTH * min(elapsed, MEASURED_SECONDS)
        self._credit = min(credit, BURST_SECONDS)

    @property
    def may_look(self) -> bool:
        """Whether a look is due as far as its cost goes."""
        return self._credit > 0 or not self.busy

    @property
    def records(self) -> int:
        """How many records the replayer may get now."""
        return int(max(self._credit, 0.0) / self._cost) if self.busy else RECORDS_MAX
