"""The native reader of a FUSE descriptor, with a socket or pipe in its place, and its answers."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

import pytest

from ivshmemfs.engine import Attr, Context
from ivshmemfs.fuse import protocol
from ivshmemfs.native import Requests, cut, packed_attributes, packed_entry
from tests.fuse.fake_kernel import ATTR, ATTR_OUT_SIZE, ENTRY_OUT

BODY = protocol.IN_HEADER.size
FOUND = Attr(7, 0o100644, 2, 3, 4, 5, 600, 8, 1_000_000_007, -1, (1 << 63) - 1)


class Ends(NamedTuple):
    kernel: socket.socket
    requests: Requests[Context]
    buffer: bytearray


@pytest.fixture
def ends() -> Iterator[Ends]:
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device.setblocking(False)
    kernel.settimeout(10)
    buffer = bytearray(8192)
    with kernel, device:
        yield Ends(kernel, Requests(device.fileno(), buffer, Context), buffer)


def request(opcode: int, unique: int, node: int, *who: int, body: bytes = b"") -> bytes:
    return protocol.IN_HEADER.pack(BODY + len(body), opcode, unique, node, *who, 0) + body


def test_a_request_is_taken_apart(ends: Ends) -> None:
    most = (1 << 64) - 1
    ends.kernel.send(request(1, most, most - 1, 5, 6, 7, body=b"name\0"))
    got = ends.requests.read(0, 0)
    assert got == (BODY + 5, 1, most, most - 1, (5, 6, 7, 0))
    assert got is not None
    assert isinstance(got[4], Context)
    assert ends.buffer[BODY : BODY + 5] == b"name\0"


def test_each_request_has_its_own_caller(ends: Ends) -> None:
    callers = [
        (0, 0, 0),
        (1, 0, 0),
        (1, 2, 0),
        (1, 2, 3),
        (1, 2, 3),
        ((1 << 32) - 1,) * 3,
        (0, 0, 0),
    ]
    for who in callers:
        ends.kernel.send(request(3, 9, 1, *who))
    got = [ends.requests.read(0, 0) for _ in callers]
    assert [one[4] for one in got if one is not None] == [Context(*who) for who in callers]


def test_nothing_comes(ends: Ends) -> None:
    assert ends.requests.read(0, 0) is None
    assert ends.requests.read(1000, 1) is None


@pytest.mark.parametrize(("spin", "nap"), [(0, 10_000), (10**10, 0)])
def test_what_comes_later_is_awaited(ends: Ends, spin: int, nap: int) -> None:
    def send() -> None:
        time.sleep(0.02)
        ends.kernel.send(request(3, 9, 1, 0, 0, 0))

    sender = threading.Thread(target=send)
    sender.start()
    got = ends.requests.read(spin, nap)
    sender.join()
    assert got is not None
    assert got[:3] == (BODY, 3, 9)


def test_a_signal_is_handled_while_it_waits(ends: Ends) -> None:
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 2:
            raise InterruptedError("the second one ends it")

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        with pytest.raises(InterruptedError, match="the second one"):
            ends.requests.read(0, 10_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) == 2


def test_a_descriptor_that_cannot_be_read() -> None:
    receiving, sending = os.pipe()
    try:
        with pytest.raises(OSError, match="Bad file") as caught:
            Requests(sending, bytearray(100), Context).read(0, 0)
        assert caught.value.errno == errno.EBADF
        os.write(sending, bytes(BODY - 1))
        with pytest.raises(OSError, match="Input/output") as caught:
            Requests(receiving, bytearray(100), Context).read(0, 0)
        assert caught.value.errno == errno.EIO
    finally:
        os.close(receiving)
        os.close(sending)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 100_000])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_answers(ends: Ends, size: int, kind: type[bytes]) -> None:
    body = os.urandom(size)
    ends.requests.answer(1 << 63, kind(body))
    assert ends.kernel.recv(1 << 20) == protocol.OUT_HEADER.pack(16 + size, 0, 1 << 63) + body


def test_answers_without_a_body(ends: Ends) -> None:
    ends.requests.answer(5, None)
    ends.requests.refuse(6, errno.ENOENT)
    assert ends.kernel.recv(100) == protocol.OUT_HEADER.pack(16, 0, 5)
    assert ends.kernel.recv(100) == protocol.OUT_HEADER.pack(16, -errno.ENOENT, 6)


def test_an_answer_that_is_refused(ends: Ends) -> None:
    ends.kernel.close()
    with pytest.raises(BrokenPipeError):
        ends.requests.answer(5, b"x")
    with pytest.raises(BrokenPipeError):
        ends.requests.refuse(5, errno.EPERM)


def test_wrong_arguments(ends: Ends) -> None:
    with pytest.raises(ValueError, match="room"):
        Requests(0, bytearray(BODY - 1), Context)
    with pytest.raises(BufferError):
        Requests(0, bytes(100), Context)
    with pytest.raises(ValueError, match="fd"):
        Requests(-1, bytearray(100), Context)
    with pytest.raises(ValueError, match="unique"):
        ends.requests.answer(-1, b"")
    with pytest.raises(ValueError, match="error"):
        ends.requests.refuse(1, -1)
    with pytest.raises(TypeError):
        ends.requests.answer(1, "text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nap"):
        ends.requests.read(0, -1)


def _attr(number: int, attr: Attr) -> bytes:
    times = [divmod(moment, 10**9) for moment in (attr.atime_ns, attr.mtime_ns, attr.ctime_ns)]
    return ATTR.pack(
        number, attr.size, attr.blocks, *(one[0] for one in times), *(one[1] for one in times),
        attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, 4096,
    )  # fmt: skip


def test_entries_and_attributes() -> None:
    """Times before 1970 are rounded down, as the kernel has them."""
    entry = packed_entry(9, 11, FOUND, 4096)
    assert entry == ENTRY_OUT.pack(9) + _attr(11, FOUND)
    assert packed_attributes(7, FOUND, 4096) == bytes(ATTR_OUT_SIZE) + _attr(7, FOUND)
    first = struct.unpack_from("=qqq", entry, ENTRY_OUT.size + 24)
    assert first == (1, -1, ((1 << 63) - 1) // 10**9)


@pytest.mark.parametrize("field", ["mode", "nlink", "uid", "gid", "rdev"])
def test_attributes_that_do_not_fit(field: str) -> None:
    for value in (-1, 1 << 32):
        with pytest.raises(ValueError, match="out of range"):
            packed_entry(1, 1, FOUND._replace(**{field: value}), 4096)
    with pytest.raises(OverflowError):
        packed_entry(1, 1, FOUND._replace(mtime_ns=1 << 63), 4096)
    with pytest.raises(ValueError, match="11 attributes"):
        packed_entry(1, 1, FOUND[:-1], 4096)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_cutting(kind: type[bytes]) -> None:
    buffer = kind(b"0123456789")
    for start, stop in ((0, 10), (3, 5), (5, 3), (0, 100), (100, 200), (4, 4), (9, 1 << 63)):
        assert cut(buffer, start, stop) == b"0123456789"[start:stop]
    with pytest.raises(ValueError, match="stop"):
        cut(buffer, 0, -1)
