"""The request loop by itself: the gate, pauses, and workers that go on."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from ivshmemfs.errors import MountError
from ivshmemfs.fuse import budget as budget_module
from ivshmemfs.fuse.budget import Budget
from ivshmemfs.fuse.connection import Relay
from ivshmemfs.fuse.loop import Loop, ReadLock, Workers


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    """Run *body* with a bound on its time."""

    async def bounded() -> Any:
        with trio.fail_after(10):
            return await body()

    return trio.run(bounded)


def test_the_gate_lets_one_in() -> None:
    async def body() -> int:
        gate, inside, most = ReadLock(), 0, 0

        async def worker() -> None:
            nonlocal inside, most
            for _round in range(50):
                async with gate:
                    inside += 1
                    most = max(most, inside)
                    await trio.sleep(0)
                    inside -= 1
                gate.pass_on()
                await trio.sleep(0)
            gate.pass_on()

        async with trio.open_nursery() as nursery:
            for _number in range(5):
                nursery.start_soon(worker)
        return most

    assert run(body) == 1


def test_an_open_gate_does_not_schedule() -> None:
    async def body() -> list[str]:
        gate, order = ReadLock(), []
        gate.budget.renew()

        async def other() -> None:
            order.append("other")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _round in range(3):
                async with gate:
                    order.append("worker")
        return order

    assert run(body) == ["worker", "worker", "worker", "other"]


def test_others_get_a_turn_after_enough_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "SECONDS_PER_TURN", 100.0)

    async def body() -> int:
        gate, passed = ReadLock(), 0
        gate.budget.renew()
        done = False

        async def other() -> None:
            nonlocal done
            done = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            while not done:
                async with gate:
                    passed += 1
        return passed

    # The entry after a full turn yields before it goes in; trio runs either of the two first.
    turn = budget_module.REQUESTS_PER_TURN
    assert turn < run(body) <= 10 * turn


def test_others_get_a_turn_after_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "REQUESTS_PER_TURN", 10**9)

    async def body() -> bool:
        gate = ReadLock()
        gate.budget.renew()
        done = False

        async def other() -> None:
            nonlocal done
            done = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            end = trio.current_time() + 5
            while not done and trio.current_time() < end:
                async with gate:
                    pass
        return done

    assert run(body)


def test_a_pause_hands_the_gate_on() -> None:
    async def body() -> list[str]:
        loop, order = Loop(lambda _fd: True), []
        gate = loop.Lock()

        async def first() -> None:
            async with gate:
                order.append("first reads")
                await trio.sleep(0.01)  # the second one parks meanwhile
            order.append("first pauses")
            await loop.pause(0.05)
            order.append("first answers")
            loop.worker_ended()

        async def second() -> None:
            await trio.sleep(0.005)
            async with gate:
                order.append("second reads")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            nursery.start_soon(second)
        return order

    assert run(body) == ["first reads", "first pauses", "second reads", "first answers"]


def test_waiting_ends_when_there_is_something_to_read() -> None:
    async def body() -> float:
        loop = Loop(lambda _fd: True)
        receiving, sending = os.pipe()
        try:

            async def send() -> None:
                await trio.sleep(0.05)
                os.write(sending, b"x")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                started = trio.current_time()
                await loop.wait_readable(receiving)
                assert os.read(receiving, 1) == b"x"
                return trio.current_time() - started
        finally:
            os.close(receiving)
            os.close(sending)

    assert 0.04 < run(body) < 2


def test_the_opening_comes_before_each_wait_until_it_is_done() -> None:
    async def body() -> list[int]:
        receiving, sending = os.pipe()
        calls: list[int] = []

        def opening(fd: int) -> bool:
            calls.append(fd)
            return len(calls) == 2

        loop = Loop(opening)
        os.write(sending, b"x")
        for _round in range(4):
            await loop.wait_readable(receiving)
        assert not os.get_blocking(receiving)
        os.close(receiving)
        os.close(sending)
        return calls

    assert len(run(body)) == 2


def supervised(outcomes: list[Exception | None]) -> int:
    """Run one worker that ends in each of *outcomes* in turn; returns how often it was started."""
    started = 0

    async def body() -> None:
        async def worker() -> None:
            nonlocal started
            started += 1
            outcome = outcomes[min(started, len(outcomes)) - 1]
            if outcome is not None:
                raise outcome

        async with trio.open_nursery() as nursery:
            Workers(nursery, Loop(lambda _fd: True)).start_soon(worker, name="worker")

    run(body)
    return started


def test_a_worker_that_raises_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    assert supervised([KeyError("bug"), ValueError("bug"), None]) == 3
    assert "KeyError" in caplog.text
    assert "failed outside of its handler" in caplog.text


def test_a_withdrawn_request_is_no_event(caplog: pytest.LogCaptureFixture) -> None:
    withdrawn: list[Exception | None] = [OSError(errno.EAGAIN, "fuse_session_receive_buf failed")]
    assert supervised(withdrawn * 300 + [None]) == 301
    assert caplog.text == ""


ENDS = ["ENODEV", "ECONNABORTED", "ENOTCONN"]


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_the_connection_is_no_failure(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Unmounted, or aborted, while a worker reads."""
    assert supervised([OSError(getattr(errno, name), "fuse_session_receive_buf failed")]) == 1
    assert caplog.text == ""


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_the_connection_ends_whoever_answers_first(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[bool] = []
    monkeypatch.setattr("pyfuse3.terminate", lambda: ended.append(True))

    class Requests:
        def serve(self, budget: Budget, spin: int, nap: int) -> memoryview | None:
            raise OSError(getattr(errno, name), "read")

        def hand_on(self, request: memoryview) -> None: ...

        def pump(self) -> None: ...

    async def body() -> None:
        receiving, sending = os.pipe()
        os.write(sending, b"x")
        loop = Loop(lambda _fd: True)
        loop.answer_first(Requests(), receiving)
        try:
            with pytest.raises(trio.ClosedResourceError):
                await loop.wait_readable(receiving)
        finally:
            os.close(receiving)
            os.close(sending)

    run(body)
    assert ended == [True]
    assert caplog.text == ""


@pytest.mark.parametrize("name", [*ENDS, "ENOENT"])
def test_an_answer_after_the_end_is_no_event(name: str, caplog: pytest.LogCaptureFixture) -> None:
    Relay.unwanted(OSError(getattr(errno, name), "write"))
    assert caplog.text == ""
    Relay.unwanted(OSError(errno.EINVAL, "write"))
    assert "refused an answer" in caplog.text


def test_a_descriptor_that_fails_for_good_ends_the_loop() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        supervised([OSError(errno.EBADF, "gone")])
    assert caught.group_contains(OSError)


def test_a_failed_opening_ends_the_loop_at_once() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        supervised([MountError("no"), None])
    assert caught.group_contains(MountError)
