"""A client of ivshmem servers: of our own, and of ones that break the protocol."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from ivshmemfs.doorbell import client as client_module
from ivshmemfs.doorbell.client import MOST_CLIENTS, ServerBell
from ivshmemfs.doorbell.finding import doorbell_of
from ivshmemfs.errors import IvshmemfsError, RegionMissing, RegionUnfit, UsageError
from ivshmemfs.region import open_region
from tests.support.doorbell import Client, serving
from tests.support.mounts import eventually
from tests.support.regions import TestRegion, new_region

SIZE = 1 << 20
Message = tuple[int, int]


@pytest.fixture
def made() -> Iterator[TestRegion]:
    with new_region(SIZE) as region:
        yield region


def joined(made: TestRegion, path: Path) -> ServerBell:
    bell = doorbell_of(made.region(), str(path))
    assert isinstance(bell, ServerBell)
    return bell


def readable(bell: ServerBell) -> bool:
    try:
        return os.eventfd_read(bell.fileno()) > 0
    except BlockingIOError:
        return False


# --- our server -------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [1, 3])
def test_clients_ring_each_other_and_those_that_come_later(
    made: TestRegion, tmp_path: Path, vectors: int
) -> None:
    with serving(tmp_path / "s", made.path, "--vectors", str(vectors)):
        first, second = joined(made, tmp_path / "s"), joined(made, tmp_path / "s")
        second.ring([first.number])
        assert readable(first)
        first.ring([second.number])  # it has not read yet that there is a second one
        assert readable(second)
        first.ring([first.number])  # two waiters of one process
        assert readable(first)
        device = Client(tmp_path / "s").join(vectors)
        first.ring([device.id])
        assert device.rings(0)
        device.leave()
        first.ring([device.id, 65535, -3, 1 << 70])
        first.quiet()
        second.close()
        first.close()


def test_a_server_that_ends_leaves_a_client_without_a_number(
    made: TestRegion, tmp_path: Path
) -> None:
    with serving(tmp_path / "s", made.path):
        bell = joined(made, tmp_path / "s")
        number = bell.number
        assert bell.keep()
    assert eventually(lambda: not bell.keep())
    assert bell.number == -1
    bell.ring([number])
    assert not readable(bell)
    bell.close()
    bell.close()


def test_every_descriptor_is_closed_again(made: TestRegion, tmp_path: Path) -> None:
    region = made.region()
    with serving(tmp_path / "s", made.path, "--vectors", "2"):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            bell, other = (doorbell_of(region, str(tmp_path / "s")) for _ in range(2))
            assert bell is not None
            assert other is not None
            bell.keep()
            other.close()
            bell.keep()
            bell.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_server_of_another_region_is_refused(made: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(SIZE))
    with serving(tmp_path / "s", tmp_path / "other"):
        with pytest.raises(UsageError, match="another region"):
            doorbell_of(made.region(), str(tmp_path / "s"))
        (tmp_path / "run").mkdir()
        os.link(tmp_path / "s", tmp_path / "run" / f"{made.path.name}.sock")
        found = doorbell_of(made.region(), sockets=tmp_path / "run", at_once=True)
        assert found is None, "a mount goes on without"


def test_what_is_named_must_be_there(made: TestRegion, tmp_path: Path) -> None:
    with pytest.raises(RegionMissing, match="no server listens there"):
        doorbell_of(made.region(), str(tmp_path / "missing"))
    assert doorbell_of(made.region(), "off") is None


# --- servers that break the protocol ------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[list[Message]], Path]]:
    """Makes servers that say what the test wants, and then stay or end."""
    with ExitStack() as stack:

        def make(messages: list[Message], *, stays: bool = True) -> Path:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            path = tmp_path / f"odd{len(list(tmp_path.iterdir()))}"
            listener.bind(str(path))
            listener.listen()

            def serve() -> None:
                connection, _ = listener.accept()
                if stays:
                    stack.callback(connection.close)
                with suppress(OSError):  # the client has closed it
                    for number, descriptor in messages:
                        held = [descriptor] if descriptor >= 0 else []
                        socket.send_fds(connection, [struct.pack("<q", number)], held)
                if not stays:
                    connection.close()

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            stack.callback(thread.join, 20.0)
            return path

        yield make


@pytest.fixture
def memory(made: TestRegion) -> Iterator[int]:
    descriptor = os.open(made.path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def event() -> Iterator[int]:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("case", ["version", "id", "no memory", "silent", "ends", "no eventfd"])
def test_a_server_that_breaks_the_protocol_is_refused_in_bounded_time(
    made: TestRegion,
    server: Callable[..., Path],
    memory: int,
    event: int,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "ANSWER_SECONDS", 0.2)
    good: list[Message] = [(0, -1), (7, -1), (-1, memory), (7, event)]
    said = {
        "version": [(1, -1), *good[1:]],
        "id": [good[0], (1 << 20, -1), *good[2:]],
        "no memory": [*good[:2], (-1, -1), good[3]],
        "silent": good[:2],
        "ends": good[:3],
        "no eventfd": [*good[:3], (7, memory)],  # 8 bytes of it would be overwritten
    }
    path = server(said[case], stays=case != "ends")
    before = len(os.listdir("/proc/self/fd"))
    region = made.region()
    with pytest.raises((RegionUnfit, UsageError, IvshmemfsError)):
        doorbell_of(region, str(path))
    region.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the server's end of the connection


def test_strange_messages_change_nothing(
    made: TestRegion, server: Callable[..., Path], memory: int, event: int
) -> None:
    held = os.open(made.path, os.O_RDWR)
    content = os.pread(held, 4096, 0)
    others = [(number, event) for number in (-5, 1 << 40, 65536)]
    path = server(
        [(0, -1), (7, -1), (-1, memory), (9, memory), (7, event), (7, event), (7, -1), (55, -1)]
        + others
    )
    bell = joined(made, path)
    assert eventually(bell.keep)
    assert bell.number == 7
    bell.ring([9, 55, -5, 65536, 1 << 40])
    assert not readable(bell)
    assert os.pread(held, 4096, 0) == content, "what is no eventfd was not written to"
    bell.ring([7])
    assert readable(bell)
    bell.close()
    os.close(held)


def test_more_clients_than_are_kept(
    made: TestRegion, server: Callable[..., Path], memory: int, event: int
) -> None:
    crowd = [(number, event) for number in range(MOST_CLIENTS + 50)]
    path = server([(0, -1), (60000, -1), (-1, memory), *crowd, (60000, event)])
    bell = joined(made, path)
    assert len(bell._peers) == MOST_CLIENTS
    bell.close()


def test_a_region_that_is_no_file_has_no_server(made: TestRegion) -> None:
    from dataclasses import replace

    with open_region(str(made.path)) as region:
        device = replace(region, kind="PCI device, resource2", spec="pci:0000:00:04.0")
        with pytest.raises(UsageError, match="leave the socket out"):
            doorbell_of(device, "/run/some.sock")
