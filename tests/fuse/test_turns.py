"""Turns of computing: how long requests wait for many tasks, and in which order those come."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ivshmemfs.fuse.turns import Turns

COST = 0.004  # seconds of computing
MANY = 50


def _turns() -> Turns:
    return Turns(trio.sleep, trio.current_time)


def test_requests_run_between_two_turns() -> None:
    """A task that is ready all the time, as the one that serves requests under load."""
    clock = MockClock(autojump_threshold=0)
    gaps: list[float] = []
    done: list[int] = []

    async def waiter(turns: Turns, number: int) -> None:
        for _ in range(3):
            async with turns.turn(0):
                clock.jump(COST)
            done.append(number)

    async def serve() -> None:
        last = trio.current_time()
        while len(done) < 3 * MANY:
            await trio.sleep(COST / 100)
            gaps.append(trio.current_time() - last)
            last = trio.current_time()

    async def run() -> float:
        turns = _turns()
        async with trio.open_nursery() as nursery:
            for number in range(MANY):
                nursery.start_soon(waiter, turns, number)
            nursery.start_soon(serve)
        return trio.current_time()

    ended = trio.run(run, clock=clock)
    assert sorted(done) == sorted(list(range(MANY)) * 3)
    assert max(gaps) <= COST * 1.5
    assert ended >= 3 * MANY * COST * 1.9  # half of the time is left to requests


def test_the_order_of_turns() -> None:
    """By rank and by arrival in turn, so that a bad rank starves no task."""
    order: list[str] = []

    async def waiter(turns: Turns, name: str, rank: int) -> None:
        async with turns.turn(rank):
            order.append(name)

    async def run() -> None:
        turns = _turns()
        async with trio.open_nursery() as nursery, turns.turn(0):
            for name, rank in (("old", 9), ("a", 1), ("b", 0), ("c", 0), ("d", 0)):
                nursery.start_soon(waiter, turns, name, rank)
                await wait_all_tasks_blocked()

    trio.run(run, clock=MockClock(autojump_threshold=0.01))
    assert order == ["b", "old", "c", "a", "d"]


def test_a_task_that_ends_early_leaves_no_turn_behind() -> None:
    entered: list[str] = []

    async def waiter(turns: Turns, name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with turns.turn(0):
                entered.append(name)

    async def run() -> None:
        turns, waits, given = _turns(), trio.CancelScope(), trio.CancelScope()
        async with trio.open_nursery() as nursery:
            async with turns.turn(0):
                nursery.start_soon(waiter, turns, "given", given)
                await wait_all_tasks_blocked()
                nursery.start_soon(waiter, turns, "waits", waits)
                await wait_all_tasks_blocked()
                waits.cancel()
                await wait_all_tasks_blocked()
                nursery.start_soon(waiter, turns, "last", trio.CancelScope())
                await wait_all_tasks_blocked()
            given.cancel()  # at the moment in which it is given the turn
        async with turns.turn(0):
            entered.append("afterwards")

    trio.run(run, clock=MockClock(autojump_threshold=0.01))
    assert entered[-2:] == ["last", "afterwards"]
    assert "waits" not in entered
