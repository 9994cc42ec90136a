"""`ivshmemfs server`, seen by clients that speak QEMU's protocol, and by its user."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.doorbell import IVSHMEMFS, PATIENCE, Client, serving

SIZE = 1 << 20
VECTORS = 2


@pytest.fixture
def region(tmp_path: Path) -> Path:
    path = tmp_path / "region"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def path(tmp_path: Path, region: Path) -> Iterator[Path]:
    """The socket of a server with two vectors."""
    with serving(tmp_path / "socket", region, "--vectors", str(VECTORS)):
        yield tmp_path / "socket"


@pytest.fixture
def connect(path: Path) -> Iterator[Callable[[], Client]]:
    """Connect clients, closed at the end."""
    with ExitStack() as stack:

        def make() -> Client:
            client = Client(path)
            stack.callback(client.leave)
            return client.join(VECTORS)

        yield make


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [IVSHMEMFS, "server", *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_clients_share_the_memory_and_ring_each_other(
    connect: Callable[[], Client], region: Path
) -> None:
    first, second = connect(), connect()
    assert second.id != first.id
    for _ in range(VECTORS):
        assert first.take() == second.id
    assert os.pwrite(first.memory, b"hello", 100) == 5
    assert os.pread(second.memory, 5, 100) == b"hello"
    assert region.read_bytes()[100:105] == b"hello"
    for vector in range(VECTORS):
        os.eventfd_write(first.peers[second.id][vector], 1)
        assert second.rings(vector)
        os.eventfd_write(second.peers[first.id][vector], 1)
        assert first.rings(vector)
        os.eventfd_write(first.own[vector], 1)  # as a device that rings itself
        assert first.rings(vector)


def test_a_third_client_is_told_of_both_and_they_of_it_and_of_its_end(
    connect: Callable[[], Client], path: Path
) -> None:
    clients = [connect(), connect()]
    third = Client(path).join(VECTORS)
    assert set(third.peers) == {client.id for client in clients}
    for client in clients:
        while len(client.peers.get(third.id, [])) < VECTORS:
            client.take()
    third.leave()
    for client in clients:
        assert client.take() == third.id
        assert third.id not in client.peers
    assert connect().id not in (third.id, *(client.id for client in clients))


def test_a_client_that_dies_before_it_reads_harms_nobody(
    connect: Callable[[], Client], path: Path
) -> None:
    first = connect()
    for _ in range(50):
        Client(path).socket.close()
    last = connect()
    while set(first.peers) != {last.id} or len(first.peers[last.id]) < VECTORS:
        first.take()  # a TimeoutError if one is never told to be gone
    os.eventfd_write(first.peers[last.id][0], 1)
    assert last.rings(0)


def test_a_client_that_does_not_read_holds_up_nobody(
    connect: Callable[[], Client], path: Path
) -> None:
    """More comes and goes than its socket has room for; nothing that is closed reaches it."""
    sleeper = Client(path)
    for _ in range(400):
        client = Client(path).join(VECTORS)
        client.leave()
    awake = connect()
    sleeper.join(VECTORS)
    while len(sleeper.peers.get(awake.id, [])) < VECTORS:
        sleeper.take()
    os.eventfd_write(sleeper.peers[awake.id][0], 1)
    assert awake.rings(0)
    sleeper.leave()


def test_a_client_that_sends_something_is_disconnected(
    connect: Callable[[], Client], path: Path
) -> None:
    talker = Client(path).join(VECTORS)
    socket.send_fds(talker.socket, [b"0" * 8], [talker.memory])
    with pytest.raises((EOFError, ConnectionResetError)):
        talker.message()
    talker.leave()
    connect()


def test_clients_that_take_all_descriptors_leave_the_others_connected(
    tmp_path: Path, region: Path
) -> None:
    path = tmp_path / "socket"
    with serving(path, region, limit=40) as server:
        first = Client(path).join(1)
        crowd = [Client(path) for _ in range(60)]
        assert server.stderr is not None
        while "RLIMIT_NOFILE" not in server.stderr.readline():
            assert server.poll() is None
        for client in crowd:
            client.socket.close()
        last = Client(path)
        while True:  # until those are gone
            try:
                last.join(1)
                break
            except (EOFError, ConnectionResetError):
                last = Client(path)
        while last.id not in first.peers:
            first.take()
        os.eventfd_write(first.peers[last.id][0], 1)
        assert last.rings(0)
        first.leave()
        last.leave()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(number: signal.Signals, tmp_path: Path, region: Path) -> None:
    path, pidfile = tmp_path / "socket", tmp_path / "pid"
    pidfile.write_text("123456\n")  # of a server that was killed
    with serving(path, region, "--pidfile", str(pidfile), "--mode", "600") as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert pidfile.read_text() == f"{server.pid}\n"
        client = Client(path).join(1)
        server.send_signal(number)
        err = server.communicate(timeout=PATIENCE)[1]
        assert server.returncode == 0
        assert "client 0 joined: process" in err
        assert not path.exists()
        assert not pidfile.exists()
        os.pwrite(client.memory, b"still", 0)
        client.leave()


def test_a_killed_servers_socket_is_taken_over_and_a_living_ones_is_not(
    tmp_path: Path, region: Path
) -> None:
    path = tmp_path / "socket"
    with serving(path, region) as server:
        server.kill()
        server.wait(PATIENCE)
    assert path.is_socket()
    with serving(path, region):
        refused = run(path, region)
        assert refused.returncode == 1
        assert "another server listens there" in refused.stderr
        Client(path).join(1).leave()


def test_what_is_in_the_way_is_kept(tmp_path: Path, region: Path) -> None:
    kept = tmp_path / "notes"
    kept.write_text("kept")
    for words, said in (
        ((kept, region), "not a socket"),
        (("--pidfile", kept, tmp_path / "s", region), "not a process id's file"),
    ):
        refused = run(*words)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1
        assert said in refused.stderr
    assert kept.read_text() == "kept"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/none/s", "{}/region"], "no such directory"),
        (["{}/" + "s" * 108, "{}/region"], "at most 107 bytes"),
        (["{}/s", "{}/missing"], "no such file"),
        (["{}/s", "{}/odd"], "power of two"),
        (["{}/s"], "Missing argument"),
        (["--vectors", "0", "{}/s", "{}/region"], "not in the range"),
        (["--mode", "rw", "{}/s", "{}/region"], "not a mode"),
        (["--group", "no-such", "{}/s", "{}/region"], "no group"),
        (["--pidfile", "{}/none/p", "{}/s", "{}/region"], "No such file"),
    ],
)
def test_wrong_arguments(words: list[str], said: str, tmp_path: Path, region: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(3 << 20))
    refused = run(*(word.replace("{}", str(tmp_path)) for word in words))
    assert refused.returncode in (1, 32)
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert said in refused.stderr
    assert not (tmp_path / "s").exists()


def test_systemd_is_told_when_clients_may_connect(
    tmp_path: Path, region: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with serving(tmp_path / "socket", region):
            assert notify.recv(100) == b"READY=1"


def test_closed_standard_streams_do_not_end_it(tmp_path: Path, region: Path) -> None:
    path = tmp_path / "socket"
    reader, writer = os.pipe()
    os.close(reader)
    server = subprocess.Popen([IVSHMEMFS, "server", path, region], stdout=writer, stderr=writer)
    os.close(writer)
    try:
        end = time.monotonic() + PATIENCE
        while not path.is_socket() and time.monotonic() < end:
            time.sleep(0.01)
        Client(path).join(1).leave()
    finally:
        server.terminate()
        assert server.wait(PATIENCE) == 0
