"""`Client.queue`: records between programs, each taken once or seen by all."""

from __future__ import annotations

import errno
import gc
import os
import queue
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import ivshmemfs
from ivshmemfs import Client, Queue
from ivshmemfs.api import messages
from ivshmemfs.format import queue as fmt
from ivshmemfs.format import words
from ivshmemfs.native import Memory
from ivshmemfs.shm.commit import LOOKS
from ivshmemfs.shm.queue import nap_after
from tests.support.mounts import ENVIRONMENT, PATIENCE
from tests.support.regions import TestRegion, new_region


@pytest.fixture
def work(fs: Client) -> Iterator[Queue]:
    """A small work queue."""
    with fs.queue("/work", records=4, record_size=100) as made:
        yield made


def test_records_come_in_order_and_once(fs: Client, other: Client, work: Queue) -> None:
    with other.queue("/work") as theirs:
        assert (theirs.records, theirs.record_size, theirs.broadcast) == (4, 100, False)
        for record in (b"one", b"", b"x" * 100, bytearray(b"four")):
            work.put(record)
        assert [theirs.get(), work.get(), theirs.get(), work.get()] == [
            b"one", b"", b"x" * 100, b"four",
        ]  # fmt: skip
        with pytest.raises(queue.Empty):
            theirs.get(timeout=0)


def test_a_full_queue_waits(work: Queue) -> None:
    for number in range(4):
        work.put(b"%d" % number, timeout=0)
    with pytest.raises(queue.Full):
        work.put(b"more", timeout=0.01)
    taker = threading.Timer(0.05, work.get)
    taker.start()
    work.put(b"more", timeout=PATIENCE)
    taker.join()
    assert [work.get() for _ in range(4)] == [b"1", b"2", b"3", b"more"]


def test_a_reader_waits(work: Queue, other: Client) -> None:
    with other.queue("/work") as theirs:
        for pause in (0.0, 0.001, 0.05):
            writer = threading.Timer(pause, theirs.put, [b"late"])
            writer.start()
            assert work.get(timeout=PATIENCE) == b"late"
            writer.join()


def test_all_see_a_broadcast(fs: Client, other: Client, reader: Client) -> None:
    with fs.queue("/news", broadcast=True, records=4, record_size=100) as sender:
        sender.put(b"before")
        with (
            other.queue("/news") as one,
            reader.queue("/news") as two,
            reader.queue("/news", replay=True) as three,
        ):
            sender.put(b"first")
            one.put(b"second")
            for seen in (sender, one, two):
                wanted = [b"first", b"second"]
                if seen is sender:
                    wanted = [b"before", *wanted]
                assert [seen.get(timeout=0) for _ in wanted] == wanted
            assert [three.get() for _ in range(3)] == [b"before", b"first", b"second"]
            with pytest.raises(OSError, match=r"[Rr]ead-only") as caught:
                two.put(b"no")
            assert caught.value.errno == errno.EROFS


def test_a_slow_reader_is_told_what_it_lost(fs: Client, reader: Client) -> None:
    with (
        fs.queue("/news", broadcast=True, records=4, record_size=100) as sender,
        reader.queue("/news") as slow,
    ):
        for number in range(11):
            sender.put(b"%d" % number)
        seen: list[int] = []
        while len(seen) + slow.lost < 11:
            seen.append(int(slow.get(timeout=0)))
        assert seen == list(range(11 - len(seen), 11))
        assert 0 < len(seen) <= 4
        assert slow.lost == 11 - len(seen)


def test_what_is_refused(fs: Client, reader: Client, work: Queue) -> None:
    with pytest.raises(OSError, match="101 bytes") as caught:
        work.put(bytes(101))
    assert caught.value.errno == errno.EMSGSIZE
    for wrong in ("text", 5, None):
        with pytest.raises(TypeError):
            work.put(wrong)  # type: ignore[arg-type]
    with pytest.raises(queue.Empty):
        work.get(timeout=0)
    with pytest.raises(FileExistsError, match="as a work queue"):
        fs.queue("/work", broadcast=True)
    fs.write_bytes("/plain", b"x")
    fs.map("/mapped", create=4096).close()
    for path in ("/plain", "/mapped"):
        with pytest.raises(OSError, match="it is no") as caught:
            fs.queue(path)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        reader.queue("/nothing")
    with reader.queue("/work") as theirs, pytest.raises(OSError, match="work") as caught:
        theirs.get(timeout=0)
    assert caught.value.errno == errno.EROFS
    for records, size in ((0, 1), (1, 0), (fmt.MAX_CELLS + 1, 1), (1, fmt.MAX_RECORD + 1)):
        with pytest.raises(ValueError, match="not "):
            fs.queue("/new", records=records, record_size=size)
    assert not fs.exists("/new")
    work.close()
    with pytest.raises(ValueError, match="closed"):
        work.get(timeout=0)


def test_a_queue_that_was_released_is_not_damaged(fs: Client, reader: Client) -> None:
    """A client that only reads is listed nowhere.  Its file may be released and used again."""
    fs.queue("/news", broadcast=True, records=4, record_size=100).close()
    with reader.queue("/news") as theirs:
        fs.release("/news")
        for content in (b"", b"\xff"):
            fs.write_bytes("/news", content * 4096)
            with pytest.raises(OSError, match="was released") as caught:
                theirs.get(timeout=PATIENCE)
            assert caught.value.errno == errno.ESTALE


def test_machines_without_one_memory_take_nothing(fs: Client, work: Queue) -> None:
    """Their swaps do not exclude each other (shm/coherence.py)."""
    work.put(b"x")
    fs.session._fs._volume.joined().unfit = "this machine does not share the memory"
    for call in (lambda: work.get(timeout=0), lambda: work.put(b"y", timeout=0)):
        with pytest.raises(OSError, match="does not share") as caught:
            call()
        assert caught.value.errno == errno.EROFS
    fs.session._fs._volume.joined().unfit = ""
    assert work.get(timeout=0) == b"x"


def test_a_queue_that_nothing_uses_is_closed(fs: Client, other: Client) -> None:
    fs.queue("/work").put(b"x")
    gc.collect()
    assert other.release("/work")


class _SlowMemory:
    """Memory in which a nap takes ten times as long as it should, by a clock of its own."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.now = 1000.0

    def load(self, at: int) -> int:
        return self.memory.load(at)

    def await_change(self, _at: int, value: int, nanoseconds: int, naps: int) -> int:
        self.now += (1e-6 + 10 * nanoseconds / 1e9) * naps
        return value


@pytest.mark.parametrize("timeout", [0.0, 0.001, 0.5, 30.0])
def test_a_time_that_is_over_is_over(
    fs: Client, work: Queue, monkeypatch: pytest.MonkeyPatch, timeout: float
) -> None:
    """Naps take longer on a machine that is busy."""
    slow = _SlowMemory(work._memory)
    longest = 10 * LOOKS * nap_after(1e9)[0]
    with fs.map("/shared", create=4096) as mapped:
        monkeypatch.setattr(work, "_memory", slow)
        monkeypatch.setattr(mapped, "_memory", slow)
        for module in ("messages", "mapped_file"):  # the clock of the upkeep thread goes on
            clock = SimpleNamespace(monotonic=lambda: slow.now)
            monkeypatch.setattr(f"ivshmemfs.api.{module}.time", clock)
        for call in (lambda: work.get(timeout), lambda: mapped.wait(0, 0, timeout)):
            began = slow.now
            with suppress(queue.Empty):
                assert call() == 0
            assert timeout <= slow.now - began <= timeout + longest
    monkeypatch.undo()


def test_large_records(fs: Client, other: Client) -> None:
    with fs.queue("/large", records=8, record_size=1 << 20) as one, other.queue("/large") as two:
        content = random.Random(1).randbytes(1 << 20)
        for length in (1 << 20, 65536, 65537, 4095):
            one.put(content[:length])
            assert two.get(timeout=0) == content[:length]


class Model(RuleBasedStateMachine):
    """Two clients of one work queue and one broadcast, beside lists."""

    @initialize()
    def begin(self) -> None:
        self._context = new_region(2 << 20)
        made = self._context.__enter__()
        self.clients = [ivshmemfs.open(made.path) for _ in range(2)]
        self.work = [client.queue("/w", records=4, record_size=100) for client in self.clients]
        self.news = [
            client.queue("/n", broadcast=True, records=4, record_size=100)
            for client in self.clients
        ]
        self.waiting: deque[bytes] = deque()
        self.told: list[bytes] = []
        self.seen = [0, 0]

    @rule(who=st.integers(0, 1), record=st.binary(max_size=100))
    def put(self, who: int, record: bytes) -> None:
        try:
            self.work[who].put(record, timeout=0)
            self.waiting.append(record)
        except queue.Full:
            assert len(self.waiting) == 4

    @rule(who=st.integers(0, 1))
    def get(self, who: int) -> None:
        try:
            assert self.work[who].get(timeout=0) == self.waiting.popleft()
        except queue.Empty:
            assert not self.waiting

    @rule(who=st.integers(0, 1), record=st.binary(max_size=100))
    def tell(self, who: int, record: bytes) -> None:
        self.news[who].put(record)
        self.told.append(record)

    @rule(who=st.integers(0, 1))
    def hear(self, who: int) -> None:
        reader, lost = self.news[who], self.news[who].lost
        try:
            record = reader.get(timeout=0)
        except queue.Empty:
            assert self.seen[who] == len(self.told)
            return
        self.seen[who] += reader.lost - lost
        assert record == self.told[self.seen[who]]
        assert self.seen[who] >= len(self.told) - 4
        self.seen[who] += 1

    @invariant()
    def nothing_is_ahead(self) -> None:
        for seen in getattr(self, "seen", []):
            assert seen <= len(self.told)

    def teardown(self) -> None:
        for client in getattr(self, "clients", []):
            client.close()
        if hasattr(self, "_context"):
            self._context.__exit__(None, None, None)


Model.TestCase.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase


# --- processes that are killed and stopped ------------------------------------------------------

PART = """
import os, queue, sys, zlib
import ivshmemfs
region, part, name = sys.argv[1:]
with ivshmemfs.open(region) as fs, fs.queue("/jobs") as jobs, fs.queue("/done") as done:
    print("ready", flush=True)
    number = 0
    while True:
        if part == "writer":
            body = f"{name} {number} ".encode() * (1 + number % 30)
            jobs.put(zlib.crc32(body).to_bytes(4, "little") + body)
            number += 1
            os.write(1, b"%d\\n" % number)
        else:
            record = jobs.get()
            assert zlib.crc32(record[4:]) == int.from_bytes(record[:4], "little"), "torn"
            done.put(b" ".join(record[4:].split(b" ")[:2]))
"""


@pytest.mark.slow
def test_writers_and_readers_are_killed_and_stopped(made: TestRegion, long_run: bool) -> None:
    """What a writer was told is put is taken once, unless the reader that took it was killed."""
    chance, seconds = random.Random(5), 120.0 if long_run else 8.0
    with ivshmemfs.open(made.path) as fs:
        fs.queue("/jobs", records=16, record_size=600).close()
        done = fs.queue("/done", records=4096, record_size=32)
        running: list[tuple[str, subprocess.Popen[bytes]]] = []
        acknowledged: dict[str, int] = {}
        killed_readers, names, end = 0, 0, time.monotonic() + seconds
        results: list[bytes] = []

        def start(part: str) -> None:
            nonlocal names
            names += 1
            words = [sys.executable, "-c", PART, str(made.path), part, f"p{names}"]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, env=ENVIRONMENT)
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            os.set_blocking(process.stdout.fileno(), False)
            running.append((f"{part} p{names}", process))

        def end_of(name: str, process: subprocess.Popen[bytes]) -> None:
            process.kill()
            process.wait(PATIENCE)
            drain(name, process)
            assert process.stdout is not None
            process.stdout.close()

        def drain(name: str, process: subprocess.Popen[bytes]) -> None:
            assert process.stdout is not None
            if lines := (process.stdout.read() or b"").split():
                acknowledged[name.split()[1]] = int(lines[-1])

        for part in ("writer", "writer", "reader", "reader"):
            start(part)
        while time.monotonic() < end:
            time.sleep(chance.random() * 0.2)
            name, process = victim = chance.choice(running)
            if chance.random() < 0.4:
                end_of(name, process)
                running.remove(victim)
                killed_readers += name.startswith("reader")
                start(name.split()[0])
            else:
                process.send_signal(signal.SIGSTOP)
                time.sleep(chance.random() * 0.1)
                process.send_signal(signal.SIGCONT)
            for one in running:
                drain(*one)
            while True:
                try:
                    results.append(done.get(timeout=0))
                except queue.Empty:
                    break
        for name, process in running:
            if name.startswith("writer"):
                end_of(name, process)
        while True:
            try:
                results.append(done.get(timeout=3))
            except queue.Empty:
                break
        for name, process in running:
            assert process.poll() is None or process.returncode == -signal.SIGKILL, "a part failed"
            if name.startswith("reader"):
                end_of(name, process)
        done.close()
    assert len(results) == len(set(results)), "a record was taken twice"
    wanted = {f"{who} {n}".encode() for who, count in acknowledged.items() for n in range(count)}
    missing = wanted - set(results)
    assert len(missing) <= killed_readers, f"{len(missing)} of {len(wanted)} records are lost"
    assert len(results) > 100


# --- hostile words ------------------------------------------------------------------------------


MASK = (1 << 64) - 1
ALLOWED = ("done", "nothing", errno.EUCLEAN, errno.ETIMEDOUT)


def _outcome(call: Callable[[], object]) -> object:
    try:
        call()
    except (queue.Empty, queue.Full):
        return "nothing"
    except OSError as error:
        return error.errno
    return "done"


def test_a_hostile_queue_never_hangs_or_leads_outside(made: TestRegion) -> None:
    chance = random.Random(3)
    with ivshmemfs.open(made.path) as fs:
        for round_ in range(300):
            broadcast = bool(round_ % 2)
            path = f"/q{round_}"
            with (
                fs.queue(path, broadcast=broadcast, records=4, record_size=100) as one,
                fs.map(path) as memory,
            ):
                for number in range(round_ % 5):
                    one.put(b"%d" % number, timeout=0)
                words = range(0, fmt.plan(0, 100, 4).data_offset, 8)
                for _ in range(chance.randrange(1, 4)):
                    at = chance.choice([*words, fmt.TAIL_OFFSET, fmt.HEAD_OFFSET])
                    value = chance.choice(
                        [0, (1 << 64) - 1, 1 << 63, chance.getrandbits(64), chance.getrandbits(8)]
                    )
                    if chance.random() < 0.3:
                        value = memory.load(at) ^ 1 << chance.randrange(64)
                    memory.store(at, value)
                for _ in range(8):
                    assert _outcome(lambda: one.get(timeout=0)) in ALLOWED
                    assert _outcome(lambda: one.put(b"x", timeout=0)) in ALLOWED
            fs.release(path)
            fs.remove(path)


VERBS: dict[str, Callable[[int], int]] = {
    "zero": lambda _word: 0,
    "ones": lambda _word: MASK,
    "full": lambda word: word ^ fmt.FULL,
    "lap before": lambda word: word - (1 << 24),
    "next lap": lambda word: word + (1 << 24),
    "a thousand laps": lambda word: word + (1000 << 24),
    "half of all laps": lambda word: word ^ 1 << 61,
    "other buffer": lambda word: word ^ 1,
    "no buffer": lambda word: word ^ 1 << 23,
    "one more": lambda word: word + 1,
    "one less": lambda word: word - 1,
    "a thousand more": lambda word: word + 1000,
}
PLACES = [fmt.TAIL_OFFSET, fmt.HEAD_OFFSET, *(fmt.CELLS_OFFSET + 8 * n for n in range(4))]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("broadcast", [False, True], ids=["work", "broadcast"])
def test_damage_is_never_waited_for(made: TestRegion, broadcast: bool, verb: str) -> None:
    """A queue with one wrong word goes on, or says EUCLEAN; it never looks full or empty."""
    with ivshmemfs.open(made.path) as fs:
        for at in PLACES:
            for waiting in (0, 2, 4):
                path = f"/{at} {waiting}"
                with (
                    fs.queue(path, broadcast=broadcast, records=4, record_size=100) as one,
                    fs.queue(path) as two,
                    fs.map(path) as memory,
                ):
                    for number in range(9 + waiting):
                        one.put(b"%d" % number, timeout=0)
                        if number < 9:
                            two.get(timeout=0)
                    memory.store(at, VERBS[verb](memory.load(at)) & MASK)
                    found = [_outcome(lambda: two.get(timeout=0)) for _ in range(8)]
                    for _ in range(12):
                        found.append(_outcome(lambda: one.put(b"x", timeout=0)))
                        found.append(_outcome(lambda: two.get(timeout=0)))
                    assert set(found) <= {"done", "nothing", errno.EUCLEAN}
                    assert errno.EUCLEAN in found or found[-2:] == ["done", "done"], path
                    assert two.lost <= 25
                fs.release(path)
                fs.remove(path)


@pytest.mark.parametrize("broadcast", [False, True], ids=["work", "broadcast"])
def test_a_reader_goes_on_behind_damage(fs: Client, broadcast: bool) -> None:
    with (
        fs.queue("/q", broadcast=broadcast, records=4, record_size=100) as one,
        fs.map("/q") as memory,
    ):
        for record in (b"first", b"second", b"third"):
            one.put(record)
        buffer = memory.load(fmt.CELLS_OFFSET + 8) & fmt.BUFFER_MASK
        plan = fmt.plan(0, 100, 4)
        memory.store(plan.data_offset + buffer * plan.stride, 101)
        assert one.get(timeout=0) == b"first"
        with pytest.raises(OSError, match="record 1") as caught:
            one.get(timeout=0)
        assert caught.value.errno == errno.EUCLEAN
        assert one.get(timeout=0) == b"third"
        kept = memory.load(fmt.CELLS_OFFSET + 3 * 8)  # of the record that comes next
        memory.store(fmt.CELLS_OFFSET + 3 * 8, 7 << 24 | 5)
        for _ in range(10):
            with pytest.raises(OSError, match="make another under a new name"):
                one.get(timeout=0)
        memory.store(fmt.CELLS_OFFSET + 3 * 8, kept)
        one.put(b"fourth")
        assert one.get(timeout=0) == b"fourth"


@pytest.mark.parametrize("broadcast", [False, True], ids=["work", "broadcast"])
def test_buffers_that_stopped_writers_have(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch, broadcast: bool
) -> None:
    monkeypatch.setattr(messages, "CLAIMED_SECONDS", 1e9)
    with (
        ivshmemfs.open(made.path) as fs,
        fs.queue("/q", broadcast=broadcast, records=4, record_size=100) as one,
        fs.map("/q") as memory,
    ):
        plan = fmt.plan(0, 100, 4)
        tags = memory.read(plan.tags_offset, plan.buffers * 8)
        member = fs.session._fs._volume.joined()
        claim = words.make_tag(member.slot, member.incarnation + 1, 5)  # newer: not settled
        memory.write(plan.tags_offset, struct.pack("<Q", claim) * plan.buffers)
        with pytest.raises(queue.Full):  # many writers may be at it
            one.put(b"x", timeout=0)
        monkeypatch.setattr(messages, "CLAIMED_SECONDS", 0.0)
        with pytest.raises(OSError, match="ivshmemfs evict") as caught:
            one.put(b"x", timeout=PATIENCE)
        assert caught.value.errno == errno.ENOBUFS
        memory.write(plan.tags_offset, tags)
        one.put(b"x", timeout=0)


def test_a_damaged_header_is_no_queue(fs: Client, work: Queue) -> None:
    work.close()
    with fs.map("/work") as memory:
        good = memory.read(0, 64)
        for at, raw in (
            (0, b"x"), (8, b"\2"), (12, bytes(4)), (12, b"\xff" * 4), (16, bytes(4)),
            (16, b"\xff" * 4), (20, b"\1\0\0\0"), (20, struct.pack("<I", 1 << 20)),
        ):  # fmt: skip
            memory.write(at, raw)
            with pytest.raises(OSError, match=r"it is no queue|its header is damaged") as caught:
                fs.queue("/work")
            assert caught.value.errno == errno.EINVAL
            memory.write(0, good)
    fs.queue("/work").close()
