"""Clients as peers: opening, upkeep, threads, fork, the end, and locks between them."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import ivshmemfs
from ivshmemfs import Client
from ivshmemfs.api import session as sessions
from ivshmemfs.api import signals
from ivshmemfs.api.signals import NUMBERS
from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import Busy, LockLost, RegionMissing, Unfinished
from ivshmemfs.format import geometry, words
from mkfs.initial import Parameters
from mkfs.writer import format_region
from tests.support.mounts import eventually, needs_fuse, release, run
from tests.support.regions import TestRegion, new_region

PYTHON = sys.executable


def peers(region: TestRegion) -> list[int]:
    """The slots in use."""
    fs = region.mount(readonly=True)
    return [peer.slot for peer in fs.table.peers() if peer.state != words.FREE]


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program of its own."""
    return run(PYTHON, "-c", code, *arguments)


# --- importing --------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_of_the_api() -> None:
    code = (
        "import sys; before = set(sys.modules); import ivshmemfs; ivshmemfs.__version__;"
        "print(sorted(set(sys.modules) - before));"
        "ivshmemfs.open; print(sorted({'trio', 'pyfuse3', 'click'} & set(sys.modules)))"
    )
    assert python(code).stdout.splitlines() == ["['ivshmemfs']", "[]"]


def test_the_package_names_what_it_has() -> None:
    assert {"open", "Client", "__version__"} <= set(dir(ivshmemfs))
    with pytest.raises(AttributeError, match="nonsense"):
        ivshmemfs.nonsense  # noqa: B018


# --- opening ----------------------------------------------------------------------------------


def test_a_region_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="create it with") as caught:
        ivshmemfs.open("/dev/shm/ivshmemfs-no-such-region")
    assert caught.value.filename == "/dev/shm/ivshmemfs-no-such-region"
    assert isinstance(caught.value.__cause__, RegionMissing)


def test_a_file_without_a_filesystem(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    with pytest.raises(OSError, match="mkfs") as caught:
        ivshmemfs.open(tmp_path / "f")
    assert caught.value.errno == errno.EINVAL


def test_a_full_peer_table(made: TestRegion) -> None:
    looker = made.mount(readonly=True)
    clients = [ivshmemfs.open(made.path) for _ in range(looker.table.count)]
    with pytest.raises(OSError, match=r".") as caught:
        ivshmemfs.open(made.path)
    assert caught.value.errno == errno.EUSERS
    for client in clients:
        client.close()
    assert peers(made) == []


@needs_fuse
def test_a_mount_point_stands_for_its_region(made: TestRegion, tmp_path: Path) -> None:
    place = tmp_path / "mnt"
    place.mkdir()
    mounted = run(PYTHON, "-m", "ivshmemfs.cli", "mount", made.path, place, timeout=60)
    assert (mounted.returncode, mounted.stderr) == (0, "")
    try:
        with ivshmemfs.open(place) as fs:
            assert fs.spec == str(made.path)
            fs.write_bytes("/from-api", b"1")
            assert (place / "from-api").read_bytes() == b"1"
            (place / "from-mount").write_bytes(b"2")
            assert fs.read_bytes("/from-mount") == b"2"
            status, shown = fs.stat("/from-api"), os.stat(place / "from-api")
            for field in ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size",
                          "st_mtime_ns", "st_ctime_ns", "st_blocks"):  # fmt: skip
                assert getattr(status, field) == getattr(shown, field)
            words = (PYTHON, "-m", "ivshmemfs.cli", "lock", "-n", place / "lock", "--", "true")
            with fs.lock("/lock"):
                assert run(*words, timeout=60).returncode == 1  # the command's own lock is the same
            assert run(*words, timeout=60).returncode == 0
    finally:
        run(PYTHON, "-m", "ivshmemfs.cli", "umount", place, timeout=60)
        release(place)


# --- being a peer -----------------------------------------------------------------------------


def test_a_writer_beats_and_a_reader_leaves_no_trace(made: TestRegion) -> None:
    with ivshmemfs.open(made.path, readonly=True):
        assert peers(made) == []
    with ivshmemfs.open(made.path):
        looker = made.mount(readonly=True)
        (slot,) = [peer.slot for peer in looker.table.peers()]

        def beats() -> bool:
            looker.table.watch.look()
            return looker.table.watch.beats(slot)

        looker.table.watch.look()
        first = looker.table.peer(slot).record.heartbeat
        assert eventually(lambda: looker.table.peer(slot).record.heartbeat > first + 1)
        assert beats()
    assert peers(made) == []


def test_an_evicted_client_rejoins(made: TestRegion, fs: Client) -> None:
    fs.write_bytes("/f", b"before")
    table = made.mount().table
    (slot,) = [s for s in peers(made) if table.peer(s).record.pid == os.getpid()][:1]
    table.retire(slot, table.peer(slot).word)
    fs.write_bytes("/f", b"after")
    assert fs.read_bytes("/f") == b"after"


def test_collection_closes_a_client(made: TestRegion) -> None:
    client = ivshmemfs.open(made.path)
    file = client.open("/f", "wb")
    file.write(b"unflushed")
    session = client.session
    del client
    gc.collect()
    assert not session.closed  # the file keeps its client
    del file
    gc.collect()
    assert session.closed
    assert peers(made) == []
    with ivshmemfs.open(made.path, readonly=True) as fs:
        assert fs.read_bytes("/f") == b"unflushed"


def test_the_end_of_the_process_closes_clients_and_files(made: TestRegion) -> None:
    code = """if True:
        import ivshmemfs, sys
        fs = ivshmemfs.open(sys.argv[1])
        file = fs.open("/f", "w")
        file.write("unflushed")
    """
    ended = python(code, made.path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert peers(made) == []
    with ivshmemfs.open(made.path, readonly=True) as fs:
        assert fs.read_text("/f") == "unflushed"


def test_a_closed_client(fs: Client) -> None:
    with fs.open("/f", "wb") as file:
        file.write(b"unflushed")
        scan = fs.scandir()
        fs.close()
        assert file.closed
    fs.close()
    assert fs.closed
    for use in (
        lambda: fs.stat("/f"),
        lambda: next(scan),
        lambda: fs.kv("/kv"),
        lambda: fs.lock("/f").acquire(),
    ):
        with pytest.raises(ValueError, match="closed region"):
            use()


def test_fork_is_refused(made: TestRegion) -> None:
    code = """if True:
        import ivshmemfs, os, sys
        fs = ivshmemfs.open(sys.argv[1])
        fs.write_bytes("/f", b"parent")
        if os.fork() == 0:
            try:
                fs.read_bytes("/f")
            except RuntimeError as error:
                print(error)
            fs.close()
            with ivshmemfs.open(sys.argv[1]) as own:
                own.write_bytes("/f", b"child")
            sys.exit()
        os.wait()
        print(fs.read_bytes("/f").decode(), fs.closed)
    """
    ended = python(code, made.path)
    assert (ended.returncode, ended.stderr) == (0, "")
    refused, parent = ended.stdout.splitlines()
    assert "before fork()" in refused
    assert "open the region again" in refused
    assert parent == "child False"
    assert peers(made) == []


def test_a_child_that_just_ends_leaves_the_parents_slot(made: TestRegion) -> None:
    code = """if True:
        import ivshmemfs, os, sys
        fs = ivshmemfs.open(sys.argv[1])
        if os.fork() == 0:
            sys.exit()  # runs what the parent registered for its end
        os.wait()
        print(len([p for p in fs.session.call(lambda engine: list(engine.table.peers()))]))
    """
    ended = python(code, made.path)
    assert (ended.stdout, ended.stderr) == ("1\n", "")


def test_many_threads_share_a_client(fs: Client, other: Client) -> None:
    each, count = 30, 6
    failed: list[BaseException] = []

    def work(number: int) -> None:
        client = (fs, other)[number % 2]
        try:
            client.mkdir(f"/{number}")
            for step in range(each):
                client.write_bytes(f"/{number}/{step}", bytes([number]) * 5000)
                assert client.read_bytes(f"/{number}/{step}") == bytes([number]) * 5000
                client.rename(f"/{number}/{step}", f"/{number}-{step}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(fs.listdir()) == count * (each + 1)


def test_a_call_within_a_call_is_refused_and_harms_nothing(fs: Client) -> None:
    def meddle(_engine: Filesystem) -> None:
        fs.read_bytes("/f")  # as a finalizer that runs during a call

    with pytest.raises(RuntimeError, match="during a call"):
        fs.session.call(meddle)
    fs.write_bytes("/f", b"goes on")


def test_a_file_that_is_collected_during_a_call_is_released_later(fs: Client) -> None:
    fs.write_bytes("/f", b"x")
    raw = fs.open("/f", "rb", 0)
    ino = raw.ino
    files = [raw]
    del raw

    def during(_engine: Filesystem) -> None:
        files.clear()
        gc.collect()

    fs.session.call(during)
    assert eventually(lambda: not fs.session.call(lambda engine: engine.is_open(ino)))


# In a callback of the garbage collector or of a weak reference, Python prints what is raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_may_come_anywhere(made: TestRegion, fs: Client) -> None:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    chance, interrupted, done = random.Random(3), 0, 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while interrupted < 150:
            data = b"%d" % done * chance.choice([1, 3000])
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 6e-4))
                fs.write_bytes("/f", data)
                with fs.open("/g", "ab", 0) as raw:
                    raw.write(b"12345678")
                fs.kv("/kv").set("k", data)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
            done += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    fs.write_bytes("/f", b"goes on")
    with ivshmemfs.open(made.path, readonly=True) as reader:
        assert reader.read_bytes("/f") == b"goes on"
        log = reader.read_bytes("/g")
        assert {log[at : at + 8] for at in range(0, len(log), 8)} <= {b"12345678"}
    assert len(peers(made)) == 1  # the client is still the same peer


def test_a_signal_during_a_call_is_handled_right_after_it(fs: Client) -> None:
    told: list[str] = []

    def during(_engine: Filesystem) -> None:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)
        told.append("the call ends")

    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: told.append("handled"))
    try:
        with pytest.raises(KeyboardInterrupt):
            fs.session.call(during)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == ["the call ends", "handled"]
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers


def test_a_handler_that_the_program_changed_is_the_one_that_runs(fs: Client) -> None:
    told: list[str] = []

    def tell_name(name: str, _number: int, _frame: object) -> None:
        told.append(name)

    before = signal.getsignal(signal.SIGUSR1)
    try:
        for tell in (partial(tell_name, "first"), partial(tell_name, "second")):
            signal.signal(signal.SIGUSR1, tell)
            fs.session.call(lambda _engine: signal.raise_signal(signal.SIGUSR1))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        fs.session.call(lambda _engine: signal.raise_signal(signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == ["first", "second"]


def test_a_signal_in_a_call_within_the_call_of_another_client_waits_for_both(
    fs: Client, other: Client
) -> None:
    told: list[str] = []

    def within(_engine: Filesystem) -> None:
        other.session.call(lambda _engine: signal.raise_signal(signal.SIGUSR1))
        told.append("the outer call ends")

    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: told.append("handled"))
    try:
        handlers = {number: signal.getsignal(number) for number in NUMBERS}
        fs.session.call(within)
        assert {number: signal.getsignal(number) for number in NUMBERS} == handlers
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == ["the outer call ends", "handled"]


def test_a_handler_that_uses_the_region_while_handlers_are_put_back(
    fs: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call ends, and leaves the signal that another handler waits for to the call around it."""
    told: list[str] = []

    def use(_number: int, _frame: object) -> None:
        told.append(f"used {fs.exists('/')}")

    def put_back(number: int, handler: object) -> None:
        put(number, handler)
        if handler is use and told == ["called"]:
            told.append("back")
            signal.raise_signal(signal.SIGUSR2)

    def call(_engine: Filesystem) -> None:
        signal.raise_signal(signal.SIGUSR1)
        told.append("called")

    raised: list[int] = []

    def raise_signal(number: int) -> None:
        raised.append(number)
        assert len(raised) < 10
        again(number)

    put, again = signals._set, signal.raise_signal
    first = signal.signal(signal.SIGUSR1, lambda _number, _frame: told.append("handled"))
    second = signal.signal(signal.SIGUSR2, use)
    try:
        handlers = {number: signal.getsignal(number) for number in NUMBERS}
        monkeypatch.setattr(signals, "_set", put_back)
        monkeypatch.setattr(signal, "raise_signal", raise_signal)
        fs.session.call(call)
        assert {number: signal.getsignal(number) for number in NUMBERS} == handlers
    finally:
        signal.signal(signal.SIGUSR1, first)
        signal.signal(signal.SIGUSR2, second)
    assert told == ["called", "back", "used True", "handled"]


def test_the_error_of_a_handler_is_not_taken_for_one_of_the_region(fs: Client) -> None:
    def give_up(_number: int, _frame: object) -> None:
        raise TimeoutError("the program's own")

    def look(engine: Filesystem) -> None:
        engine.look(lambda _view: signal.raise_signal(signal.SIGALRM))

    before = signal.signal(signal.SIGALRM, give_up)
    try:
        with pytest.raises(TimeoutError, match="the program's own"):
            fs.session.call(look)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert fs.exists("/")


# --- trouble with the region ------------------------------------------------------------------


def test_a_region_that_is_formatted_anew_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with new_region(1 << 20) as region:
        client = ivshmemfs.open(region.path)
        client.write_bytes("/f", b"old")
        with region.region() as mapped:
            layout = geometry.plan(region.size)
            format_region(mapped.memory, layout, Parameters(os.urandom(16)), fresh=False)
        for call in (lambda: client.read_bytes("/f"), lambda: client.write_bytes("/f", b"")):
            with pytest.raises(OSError, match="format") as caught:
                call()
            assert caught.value.errno == errno.ESTALE
        client.close()
        with ivshmemfs.open(region.path) as fresh:
            assert fresh.listdir() == []
    caplog.clear()  # the upkeep may have noticed it first


def test_a_region_that_is_cut_gives_errors(caplog: pytest.LogCaptureFixture) -> None:
    with new_region(1 << 20) as region:
        client = ivshmemfs.open(region.path)
        client.write_bytes("/f", bytes(300_000))
        os.truncate(region.path, 4096)
        with pytest.raises(OSError, match=r".") as caught:
            client.read_bytes("/f")
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == "/f"
        client.close()
        assert client.closed
    caplog.clear()


def test_upkeep_tells_what_is_wrong_once_and_goes_on(
    fs: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ticks: list[int] = []

    def broken(_engine: Filesystem) -> bool:
        ticks.append(1)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Filesystem, "tick", broken)
    assert eventually(lambda: len(ticks) > 2)
    lines = [line.getMessage() for line in caplog.records if line.name == sessions.__name__]
    assert lines == [f"upkeep of {fs.spec}: a bug"]
    caplog.clear()


def test_long_upkeep_work_is_no_silence(fs: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work without end leaves time for the beat, and for calls."""
    beats: list[int] = []
    worked: list[int] = []

    def tick(_engine: Filesystem) -> bool:
        beats.append(len(worked))
        return True

    def work(_engine: Filesystem) -> bool:
        worked.append(1)
        return True

    monkeypatch.setattr(Filesystem, "tick", tick)
    monkeypatch.setattr(Filesystem, "work", work)
    assert eventually(lambda: len(beats) > 2)
    assert beats[-1] > beats[0], "it works between two beats"
    fs.write_bytes("/file", b"x")


# --- waiting ----------------------------------------------------------------------------------


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Wait no longer than that for a busy region."""
    before, sessions.PATIENCE = sessions.PATIENCE, seconds
    try:
        yield
    finally:
        sessions.PATIENCE = before


def test_busy_is_waited_for_and_then_told(fs: Client) -> None:
    left = [5]

    def busy(_engine: Filesystem) -> str:
        left[0] -= 1
        if left[0]:
            raise Busy("another peer is committing")
        return "done"

    assert fs.session.call(busy) == "done"

    def always(_engine: Filesystem) -> None:
        raise Busy("another peer is committing")

    with patience(0.05), pytest.raises(TimeoutError, match="committing") as caught:
        fs.session.call(always, "/f")
    assert caught.value.filename == "/f"


def test_an_operation_of_several_turns_goes_on(fs: Client) -> None:
    turns: list[int] = []

    def turn() -> str:
        turns.append(1)
        if len(turns) < 4:
            raise Unfinished("more", turn)
        return "done"

    assert fs.session.call(lambda _engine: turn()) == "done"
    assert len(turns) == 4


def test_names_that_others_replace_all_the_time_are_found(fs: Client, other: Client) -> None:
    end = threading.Event()

    def replace() -> None:
        number = 0
        while not end.is_set():
            number += 1
            other.write_bytes("/fresh", b"%d" % number)
            other.replace("/fresh", "/f")

    fs.write_bytes("/f", b"0")
    thread = threading.Thread(target=replace)
    thread.start()
    try:
        seen = [int(fs.read_bytes("/f")) for _ in range(300)]
    finally:
        end.set()
        thread.join()
    assert seen == sorted(seen)


# --- locks ------------------------------------------------------------------------------------


def test_a_lock_excludes_other_clients_and_threads(fs: Client, other: Client) -> None:
    fs.write_bytes("/count", b"0")

    def count(client: Client) -> None:
        for _ in range(10):
            with client.lock("/lock"):
                value = int(client.read_bytes("/count"))
                time.sleep(0.0005)
                client.write_bytes("/count", b"%d" % (value + 1))

    threads = [threading.Thread(target=count, args=(c,)) for c in (fs, other, fs, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fs.read_bytes("/count") == b"40"


def test_a_lock_is_waited_for_no_longer_than_asked(fs: Client, other: Client) -> None:
    mine, theirs = fs.lock("/lock"), other.lock("/lock")
    assert mine.acquire()
    assert not theirs.acquire(timeout=0)
    assert not theirs.acquire(timeout=0.02)
    with pytest.raises(RuntimeError, match="not recursive"):
        mine.acquire()
    mine.check()
    mine.release()
    mine.release()
    assert theirs.acquire(timeout=0)
    theirs.release()


def test_a_lock_excludes_other_processes(made: TestRegion, fs: Client) -> None:
    code = """if True:
        import ivshmemfs, sys
        with ivshmemfs.open(sys.argv[1]) as fs:
            print(fs.lock("/lock").acquire(0))
    """
    with fs.lock("/lock"):
        assert python(code, made.path).stdout == "False\n"
    assert python(code, made.path).stdout == "True\n"


def test_a_lost_lock_is_told(made: TestRegion, fs: Client) -> None:
    lock = fs.lock("/lock")
    lock.acquire()
    table = made.mount().table
    slot = fs.session.call(lambda engine: engine.peer_id[0])
    table.retire(slot, table.peer(slot).word)
    with pytest.raises(OSError, match="taken over") as caught:
        lock.check()
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value.__cause__, LockLost)
    lock.release()


def test_the_death_of_a_holder_frees_its_lock(made: TestRegion, fs: Client) -> None:
    code = """if True:
        import ivshmemfs, os, sys
        fs = ivshmemfs.open(sys.argv[1])
        fs.lock("/lock").acquire()
        os._exit(0)
    """
    python(code, made.path)
    assert fs.lock("/lock").acquire(timeout=15)
