"""What looks and replays may take beside other requests: measured times in, decisions out."""

from __future__ import annotations

import pytest

from ivshmemfs.fuse.pacing import (
    BURST_SECONDS,
    BUSY_SHARE,
    LEAST_COST,
    MEASURED_SECONDS,
    RECORDS_MAX,
    Pacer,
)

TICK = 0.01  # seconds between two looks that are not paced


class Load:
    """A mount under load: what each tick costs if the pacer lets it."""

    def __init__(self, served: float, look: float, record: float, wanted: int) -> None:
        self.pacer = Pacer()
        self._served, self._look, self._record, self._wanted = served, look, record, wanted
        self.used = 0.0
        self.looks = self.records = 0

    def run(self, seconds: float) -> None:
        """Let the time pass; the daemon serves other requests at its share of a CPU."""
        for _ in range(round(seconds / TICK)):
            looks = self._look if self.pacer.may_look else 0.0
            records = min(self._wanted, self.pacer.records, int(TICK / self._record))
            replayer = answers = records * self._record / 2
            daemon = self._served * TICK + looks + answers
            self.pacer.account(TICK, looks, replayer, daemon, records)
            self.used += looks + replayer + answers
            self.looks += looks > 0
            self.records += records


@pytest.mark.parametrize("look", [0.0001, 0.002, 0.02])
@pytest.mark.parametrize("record", [0.0002, 0.003])
@pytest.mark.parametrize("wanted", [0, 3, 10_000])
def test_a_busy_mount_gives_no_more_than_the_share(look: float, record: float, wanted: int) -> None:
    load = Load(served=0.5, look=look, record=record, wanted=wanted)
    load.run(1.0)  # it learns that it is busy, and what a record costs
    used, looks = load.used, load.looks
    load.run(20.0)
    assert load.used - used <= BUSY_SHARE * 0.5 * 20.0 + BURST_SECONDS + look
    assert load.looks > looks  # nothing is put off for ever
    if wanted:
        assert load.records


def test_a_cost_that_cannot_be_measured() -> None:
    pacer = Pacer()
    for _ in range(100):
        pacer.account(TICK, 0.0, 0.0, TICK, 5)
    assert pacer.busy
    assert pacer.records <= BURST_SECONDS / LEAST_COST


def test_few_changes_on_a_busy_mount_wait_for_nothing() -> None:
    load = Load(served=0.9, look=0.0001, record=0.0005, wanted=0)
    load.run(10.0)
    assert load.looks == round(10.0 / TICK)
    assert load.pacer.records >= 10


def test_an_idle_mount_is_not_paced() -> None:
    load = Load(served=0.02, look=0.005, record=0.0005, wanted=5)
    load.run(10.0)
    assert load.looks == round(10.0 / TICK)
    assert load.pacer.records == RECORDS_MAX


def test_what_was_used_while_idle_is_no_debt() -> None:
    pacer = Pacer()
    pacer.account(1.0, 0.5, 0.2, 0.75, 100)
    assert pacer.may_look
    for _ in range(round(MEASURED_SECONDS / TICK) + 1):
        pacer.account(TICK, 0.0, 0.0, TICK, 0)
    assert pacer.busy
    assert pacer.may_look
    assert 0 < pacer.records < RECORDS_MAX


def test_a_daemon_that_was_stopped_gets_no_more_credit() -> None:
    load = Load(served=0.5, look=0.001, record=0.0005, wanted=1000)
    load.run(5.0)
    before = load.pacer.records
    load.pacer.account(100.0, 0.0, 0.0, 0.0, 0)
    load.run(2 * MEASURED_SECONDS)
    assert load.pacer.busy
    assert load.pacer.records <= before + 0.01 / 0.0005
