"""Requests that are answered without pyfuse3: a socket plays the kernel, the double the engine."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import NoReturn

import pytest
import trio

from ivshmemfs.engine import ROOT_INO
from ivshmemfs.errors import Busy, FsError, Unfinished
from ivshmemfs.fuse import direct, served, wire
from ivshmemfs.fuse.direct import FORGOTTEN_AT_ONCE, Direct
from ivshmemfs.fuse.handshake import Relay
from ivshmemfs.fuse.served import Ownership, Served
from tests.fuse.fake_engine import FakeFilesystem
from tests.fuse.fake_mount import FakeMount
from tests.support.mounts import needs_fuse

UNIQUE = 77


class Kernel:
    """Sends requests as the kernel does, and takes the answers."""

    def __init__(self, *, root_only: bool = False, ownership: Ownership | None = None) -> None:
        self.fs = FakeFilesystem()
        self.mine, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.libfuse, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._device = device
        device.setblocking(False)
        self.tasks: list[Callable[[], Awaitable[None]]] = []
        self.served = Served(self.fs, trio.sleep, ownership=ownership, root_only=root_only)  # type: ignore[arg-type]
        self.direct = Direct(
            self.served,
            Relay(device.fileno(), ours),
            self.tasks.append,
            page_cache=False,
        )
        self._ours = ours
        self.mine.settimeout(10)

    def send(
        self,
        opcode: int,
        body: bytes = b"",
        *,
        node: int = ROOT_INO,
        uid: int = 0,
        unique: int = UNIQUE,
    ) -> memoryview | None:
        """One request; returns it if it is not answered."""
        size = wire.IN_HEADER.size + len(body)
        self.mine.send(wire.IN_HEADER.pack(size, opcode, unique, node, uid, 0, 1, 0) + body)
        return self.direct.serve()

    def answer(self) -> tuple[int, bytes]:
        """(errno, body) of the next answer."""
        got = self.mine.recv(1 << 21)
        length, error, unique = wire.OUT_HEADER.unpack_from(got)
        assert (length, unique) == (len(got), UNIQUE)
        return -error, got[wire.OUT_HEADER.size :]

    def ask(self, opcode: int, body: bytes = b"", *, node: int = ROOT_INO, uid: int = 0) -> bytes:
        """The body of a good answer."""
        assert self.send(opcode, body, node=node, uid=uid) is None
        error, answer = self.answer()
        assert error == 0, os.strerror(error)
        return answer

    def silent(self) -> bool:
        """Whether there is no answer."""
        self.mine.setblocking(False)
        try:
            self.mine.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.mine.settimeout(10)
        return False

    def run(self, beside: Callable[[], Awaitable[None]] | None = None) -> None:
        """Run the tasks that were started, and *beside* beside them."""

        async def main() -> None:
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    for task in self.tasks:
                        nursery.start_soon(task)
                    if beside is not None:
                        nursery.start_soon(beside)

        trio.run(main)

    def create(self, name: bytes) -> tuple[int, int]:
        """(inode, handle) of a new file."""
        body = wire.CREATE_IN.pack(os.O_RDWR, 0o644) + name + b"\0"
        answer = self.ask(wire.CREATE, body)
        entry = wire.ENTRY_OUT.size + wire.ATTR.size
        return wire.ENTRY_OUT.unpack_from(answer)[0], wire.OPEN_OUT.unpack_from(answer, entry)[0]

    def close(self) -> None:
        for end in (self.mine, self._device, self.libfuse, self._ours):
            end.close()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("record", "size"),
    [
        (wire.IN_HEADER, 40),
        (wire.OUT_HEADER, 16),
        (wire.SETATTR_IN, 88),
        (wire.CREATE_IN, 16),
        (wire.MKDIR_IN, 8),
        (wire.OPEN_IN, 8),
        (wire.READ_IN, 40),
        (wire.WRITE_IN, 40),
        (wire.RELEASE_IN, 24),
        (wire.ACCESS_IN, 8),
        (wire.RENAME2_IN, 16),
        (wire.BATCH_FORGET_IN, 8),
        (wire.FORGET_ONE, 16),
        (wire.ATTR, 88),
        (wire.ENTRY_OUT, 128 - 88),
        (wire.OPEN_OUT, 16),
        (wire.LSEEK_IN, 24),
        (wire.LSEEK_OUT, 8),
        (wire.FALLOCATE_IN, 32),
        (wire.COPY_FILE_RANGE_IN, 56),
        (wire.STATX_OUT, 32 + 256),
        (wire.WRITE_OUT, 8),
        (wire.DIRENT, 24),
    ],
)  # fmt: skip
def test_records_are_as_large_as_the_kernel_says(record: struct.Struct, size: int) -> None:
    assert record.size == size


def test_what_was_written_is_read(kernel: Kernel) -> None:
    ino, handle = kernel.create(b"f")
    content = os.urandom(100_000)
    body = wire.WRITE_IN.pack(handle, 5, len(content), 0, 0) + content
    assert wire.WRITE_OUT.unpack(kernel.ask(wire.WRITE, body, node=ino)) == (len(content),)
    got = kernel.ask(wire.READ, wire.READ_IN.pack(handle, 0, 1 << 20), node=ino)
    assert got == bytes(5) + content


def test_copying_between_files(kernel: Kernel) -> None:
    """At most as much as one request carries; the caller asks for the rest."""
    (one, source), (two, to) = kernel.create(b"f"), kernel.create(b"g")
    content = os.urandom(100_000)
    body = wire.WRITE_IN.pack(source, 0, len(content), 0, 0) + content
    kernel.ask(wire.WRITE, body, node=one)
    for length, copied in ((50_000, 50_000), (1 << 40, 99_993)):
        body = wire.COPY_FILE_RANGE_IN.pack(source, 7, two, to, 3, length, 0)
        answer = kernel.ask(wire.COPY_FILE_RANGE, body, node=one)
        assert wire.WRITE_OUT.unpack(answer) == (copied,)
        got = kernel.ask(wire.READ, wire.READ_IN.pack(to, 0, 1 << 20), node=two)
        assert got == bytes(3) + content[7 : 7 + copied]


def test_an_entry_and_its_attributes(kernel: Kernel) -> None:
    ino, _ = kernel.create(b"f")
    change = wire.SETATTR_IN.pack(
        wire.SET_MODE | wire.SET_ATIME | wire.SET_MTIME,
        0, 0, -1, 7, 999_999_999, 8, 0o600, 1234, 5678,
    )  # fmt: skip
    kernel.ask(wire.SETATTR, change, node=ino)
    # With an owner the kernel sends a mode only to take set-ID bits away.
    change = wire.SETATTR_IN.pack(wire.SET_MODE | wire.SET_UID, 0, 0, 0, 0, 0, 0, 0o6777, 1234, 0)
    set_to = kernel.ask(wire.SETATTR, change, node=ino)
    found = kernel.ask(wire.LOOKUP, b"f\0")
    assert wire.ENTRY_OUT.unpack_from(found) == (ino,)
    assert found[wire.ENTRY_OUT.size :] == set_to[wire.ATTR_OUT_SIZE :]
    assert set_to[: wire.ATTR_OUT_SIZE] == bytes(wire.ATTR_OUT_SIZE)  # not to be kept
    fields = wire.ATTR.unpack(found[wire.ENTRY_OUT.size :])
    assert fields[0] == ino
    assert fields[3:5] == (-1, 7)
    assert fields[6:8] == (999_999_999, 8)
    assert fields[9:14] == (0o100600, 1, 1234, 0, 0)
    assert kernel.ask(wire.GETATTR, bytes(16), node=ino) == set_to


def test_attributes_that_changed_are_not_the_old_ones(kernel: Kernel) -> None:
    ino, handle = kernel.create(b"f")
    before = kernel.ask(wire.GETATTR, bytes(16), node=ino)
    kernel.ask(wire.WRITE, wire.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    assert wire.ATTR.unpack_from(before, wire.ATTR_OUT_SIZE)[1] == 0
    after = kernel.ask(wire.GETATTR, bytes(16), node=ino)
    assert wire.ATTR.unpack_from(after, wire.ATTR_OUT_SIZE)[1] == 3


def test_errors_are_answers(kernel: Kernel) -> None:
    assert kernel.send(wire.LOOKUP, b"nothing\0") is None
    assert kernel.answer() == (errno.ENOENT, b"")
    assert kernel.send(wire.FLUSH, bytes(24)) is None
    assert kernel.answer() == (errno.ENOSYS, b"")
    # A handle that was never given out: what nobody expects is EIO, and logged.
    assert kernel.send(wire.READ, wire.READ_IN.pack(999, 0, 1)) is None
    assert kernel.answer() == (errno.EIO, b"")


def test_names_of_a_directory(kernel: Kernel) -> None:
    names = {bytes([65 + n]) * (n * 37 % 255 + 1) for n in range(26)}
    inodes = {name: kernel.create(name)[0] for name in names} | {b".": ROOT_INO, b"..": ROOT_INO}
    (handle,) = struct.unpack_from("=Q", kernel.ask(wire.OPENDIR, bytes(8)))
    cookie, seen = 0, []
    while listed := kernel.ask(wire.READDIR, wire.READ_IN.pack(handle, cookie, 4096)):
        assert len(listed) <= 4096
        at = 0
        while at < len(listed):
            ino, cookie, length, kind = wire.DIRENT.unpack_from(listed, at)
            at += wire.DIRENT.size
            name = listed[at : at + length]
            at += -(-length // 8) * 8
            assert ino == inodes[name]
            assert kind == (4 if name in (b".", b"..") else 8)
            seen.append(name)
    assert sorted(seen) == sorted([b".", b"..", *names])
    assert kernel.ask(wire.RELEASEDIR, wire.RELEASE_IN.pack(handle)) == b""


def test_removing_and_moving(kernel: Kernel) -> None:
    kernel.ask(wire.MKDIR, wire.MKDIR_IN.pack(0o755) + b"d\0")
    kernel.create(b"f")
    kernel.ask(wire.RENAME, wire.RENAME_IN.pack(ROOT_INO) + b"f\0g\0")
    kernel.ask(wire.RENAME2, wire.RENAME2_IN.pack(ROOT_INO, 1) + b"g\0h\0")
    kernel.ask(wire.UNLINK, b"h\0")
    kernel.ask(wire.RMDIR, b"d\0")
    for name in (b"f", b"g", b"h", b"d"):
        kernel.send(wire.LOOKUP, name + b"\0")
        assert kernel.answer()[0] == errno.ENOENT


def test_what_has_no_answer(kernel: Kernel) -> None:
    assert kernel.send(wire.FORGET, wire.FORGET_IN.pack(1), node=7) is None
    batch = wire.BATCH_FORGET_IN.pack(2) + wire.FORGET_ONE.pack(8, 1) + wire.FORGET_ONE.pack(9, 2)
    assert kernel.send(wire.BATCH_FORGET, batch, node=0) is None
    assert kernel.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(12345), node=0) is None
    assert kernel.silent()


def test_the_rest_goes_through_libfuse_and_back(kernel: Kernel) -> None:
    request = kernel.send(17)  # STATFS
    assert request is not None
    kernel.direct.hand_on(request)
    assert kernel.libfuse.recv(4096) == bytes(request)
    assert kernel.silent()
    kernel.libfuse.send(wire.OUT_HEADER.pack(16, -errno.EXDEV, UNIQUE))
    kernel.direct.pump()
    assert kernel.answer() == (errno.EXDEV, b"")
    kernel.direct.pump()
    assert kernel.silent()


def test_nothing_to_read(kernel: Kernel) -> None:
    with pytest.raises(BlockingIOError):
        kernel.direct.serve()


# --- waiting ----------------------------------------------------------------------------------


def make_busy(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the next *times* calls of write find the engine busy."""
    real, left = kernel.fs.write, times

    def write(handle: object, offset: int, data: bytes, **how: object) -> int:
        nonlocal left
        left -= 1
        if left >= 0:
            raise Busy("injected")
        return real(handle, offset, data, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel.served.fs, "write", write)


def test_a_busy_engine_is_tried_again(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    ino, handle = kernel.create(b"f")
    make_busy(kernel, monkeypatch, 3)
    kernel.send(wire.WRITE, wire.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    assert kernel.silent()
    # The buffer is used again in between: the request that waits has its own copy.
    kernel.ask(wire.LOOKUP, b"f\0")
    kernel.run()
    assert kernel.answer() == (0, wire.WRITE_OUT.pack(3))
    assert kernel.ask(wire.READ, wire.READ_IN.pack(handle, 0, 9), node=ino) == b"abc"


def test_a_commit_of_somebody_else_is_waited_for(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment, without another request in between; then others get their turn."""
    ino, handle = kernel.create(b"f")
    looks = iter([True] * 3 + [False] * 100)

    class Crowd:
        def __get__(self, *_: object) -> bool:
            return next(looks)

    monkeypatch.setattr(type(kernel.served.fs), "crowded", Crowd())
    make_busy(kernel, monkeypatch, 2)
    kernel.send(wire.WRITE, wire.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    assert kernel.answer() == (0, wire.WRITE_OUT.pack(3))
    monkeypatch.setattr(type(kernel.served.fs), "crowded", True)
    make_busy(kernel, monkeypatch, 10**9)
    kernel.send(wire.WRITE, wire.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    assert kernel.silent()


def test_a_long_operation_goes_on_where_it_stopped(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn ends at once: nothing is tried again before others had theirs."""
    _, handle = kernel.create(b"f")
    calls: list[str] = []

    def last() -> None:
        calls.append("last")

    def second() -> None:
        calls.append("second")
        if calls.count("second") == 1:
            raise Busy("another peer")  # which made no progress: the same again
        raise Unfinished("injected", last)

    def fallocate(*_: object) -> None:
        calls.append("first")
        raise Unfinished("injected", second)

    monkeypatch.setattr(kernel.served.fs, "fallocate", fallocate)
    kernel.send(wire.FALLOCATE, wire.FALLOCATE_IN.pack(handle, 0, 1 << 40, 0))
    assert calls == ["first"]
    assert kernel.silent()
    kernel.run()
    assert calls == ["first", "second", "second", "last"]
    assert kernel.answer() == (0, b"")


def test_a_long_list_of_what_is_forgotten_takes_several_turns(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[int] = []
    monkeypatch.setattr(kernel.served, "forget", lambda node, _times: gone.append(node))
    many = range(10, 10 + 3 * FORGOTTEN_AT_ONCE)
    batch = b"".join(wire.FORGET_ONE.pack(node, 1) for node in many)
    kernel.send(wire.BATCH_FORGET, bytes(wire.BATCH_FORGET_IN.size) + batch)
    assert len(gone) == FORGOTTEN_AT_ONCE
    for _ in range(2):
        del kernel.tasks[:-1]
        kernel.run()
    assert gone == list(many)
    assert kernel.silent()


def test_an_answer_that_cannot_be_made_is_an_error(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked gets it, and the mount lives: nothing escapes from a task."""
    ino, handle = kernel.create(b"f")
    real, failures = direct._out, [MemoryError("no room")]

    def out(length: int, code: int, unique: int) -> bytes:
        if failures:
            raise failures.pop()
        return real(length, code, unique)

    monkeypatch.setattr(direct, "_out", out)
    assert kernel.send(wire.GETATTR, node=ino) is None
    assert kernel.answer() == (errno.ENOMEM, b"")
    failures.append(MemoryError("no room"))
    make_busy(kernel, monkeypatch, 3)
    kernel.send(wire.WRITE, wire.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    kernel.run()
    assert kernel.answer() == (errno.ENOMEM, b"")


def test_errors_that_the_kernel_would_not_take(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused answer leaves the caller waiting for good."""

    def fail(_ino: int) -> NoReturn:
        raise FsError(512, "a number of the kernel's own")

    monkeypatch.setattr(type(kernel.fs), "getattr", lambda _fs, ino: fail(ino))
    kernel.send(wire.GETATTR)
    assert kernel.answer() == (errno.EIO, b"")


def test_who_stops_waiting_is_told_so(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    ino, handle = kernel.create(b"f")
    make_busy(kernel, monkeypatch, 10**9)
    kernel.send(wire.WRITE, wire.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)

    async def interrupt() -> None:
        await trio.sleep(0.05)
        assert kernel.silent()
        assert kernel.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(UNIQUE), unique=0) is None

    kernel.run(interrupt)
    assert kernel.answer() == (errno.EINTR, b"")
    assert kernel.ask(wire.READ, wire.READ_IN.pack(handle, 0, 9), node=ino) == b""


def test_what_waits_fails_when_the_mount_ends(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino, handle = kernel.create(b"f")
    make_busy(kernel, monkeypatch, 10**9)
    kernel.send(wire.WRITE, wire.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    kernel.served.ending = True
    kernel.run()
    assert kernel.answer() == (errno.EIO, b"")


def test_an_answer_that_nobody_takes_is_no_event(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOENT, "no such request")

    monkeypatch.setattr(os, "write", refuse)
    kernel.send(wire.LOOKUP, b"nothing\0")
    assert caplog.text == ""


# --- who may ----------------------------------------------------------------------------------


def test_only_root_where_the_kernel_checks_nothing() -> None:
    kernel = Kernel(root_only=True)
    try:
        ino, _ = kernel.create(b"f")
        for opcode, body in (
            (wire.LOOKUP, b"f\0"),
            (wire.OPEN, wire.OPEN_IN.pack(os.O_RDONLY)),
            (wire.CREATE, wire.CREATE_IN.pack(os.O_RDWR, 0o644) + b"g\0"),
            (wire.UNLINK, b"f\0"),
        ):
            kernel.send(opcode, body, node=ROOT_INO if opcode != wire.OPEN else ino, uid=1000)
            assert kernel.answer() == (errno.EACCES, b"")
        for mask, expected in ((os.R_OK | os.W_OK, 0), (os.X_OK, errno.EACCES), (os.F_OK, 0)):
            kernel.send(wire.ACCESS, wire.ACCESS_IN.pack(mask), node=ino)
            assert kernel.answer()[0] == expected
        kernel.send(wire.ACCESS, wire.ACCESS_IN.pack(os.X_OK))
        assert kernel.answer()[0] == 0
    finally:
        kernel.close()


def test_presented_owners() -> None:
    kernel = Kernel(ownership=Ownership(uid=11, gid=12, umask=0o077))
    try:
        ino, _ = kernel.create(b"f")
        fields = wire.ATTR.unpack_from(
            kernel.ask(wire.GETATTR, bytes(16), node=ino), wire.ATTR_OUT_SIZE
        )
        assert fields[9:13] == (0o100600, 1, 11, 12)
        for uid, expected in ((11, 0), (13, errno.EPERM)):
            change = wire.SETATTR_IN.pack(wire.SET_UID, 0, 0, 0, 0, 0, 0, 0, uid, 0)
            kernel.send(wire.SETATTR, change, node=ino)
            assert kernel.answer()[0] == expected
    finally:
        kernel.close()


@needs_fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
def test_root_may_not_run_what_nobody_may_run(mnt: FakeMount) -> None:
    path = mnt.path / "program"
    path.write_bytes(b"#!/bin/sh\nexit 0\n")
    path.chmod(0o644)
    assert os.access(path, os.R_OK | os.W_OK)
    assert not os.access(path, os.X_OK)
    with pytest.raises(PermissionError):
        os.execv(path, ["program"])
    path.chmod(0o010)
    assert os.access(path, os.X_OK | os.R_OK)


@pytest.mark.parametrize("end", ["interrupted", "unmounted", "impatient"])
def test_a_write_that_ends_early_tells_how_much_is_written(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    ino, handle = kernel.create(b"f")

    def go_on() -> int:
        kernel.served.ending = end == "unmounted"
        raise Busy("another peer")

    def write(*_: object, **__: object) -> int:
        raise Unfinished("injected", go_on, 2)

    monkeypatch.setattr(kernel.served.fs, "write", write)
    if end == "impatient":
        monkeypatch.setattr(served, "PATIENCE", 0.0)
    kernel.send(wire.WRITE, wire.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)

    async def interrupt() -> None:
        await trio.sleep(0.05)
        if end == "interrupted":
            assert kernel.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(UNIQUE), unique=0) is None

    kernel.run(interrupt)
    assert kernel.answer() == (0, wire.WRITE_OUT.pack(2))


def test_a_copy_takes_turns_too(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    ino, handle = kernel.create(b"f")

    def write(*_: object, **__: object) -> int:
        raise Unfinished("injected", lambda: 3, 2)

    monkeypatch.setattr(kernel.served.fs, "write", write)
    body = wire.COPY_FILE_RANGE_IN.pack(handle, 0, ino, handle, 0, 3, 0)
    kernel.send(wire.COPY_FILE_RANGE, body, node=ino)
    assert kernel.silent()
    kernel.run()
    assert kernel.answer() == (0, wire.WRITE_OUT.pack(3))
