"""Requests that are answered without pyfuse3: a socket plays the kernel, the double the engine."""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import NoReturn

import pytest
import trio

from ivshmemfs.engine import ROOT_INO, Context
from ivshmemfs.errors import Busy, FsError, Unfinished
from ivshmemfs.fuse import protocol, retry
from ivshmemfs.fuse.budget import REQUESTS_PER_TURN, Budget
from ivshmemfs.fuse.kernel_frontend import FORGOTTEN_AT_ONCE
from ivshmemfs.fuse.ownership import Ownership
from tests.fuse.fake_kernel import ATTR, ATTR_OUT_SIZE, ENTRY_OUT, UNIQUE, Kernel
from tests.fuse.fake_mount import FakeMount
from tests.support.mounts import needs_fuse


@pytest.mark.parametrize(
    ("record", "size"),
    [
        (protocol.IN_HEADER, 40),
        (protocol.OUT_HEADER, 16),
        (protocol.SETATTR_IN, 88),
        (protocol.CREATE_IN, 16),
        (protocol.MKDIR_IN, 8),
        (protocol.OPEN_IN, 8),
        (protocol.READ_IN, 40),
        (protocol.WRITE_IN, 40),
        (protocol.RELEASE_IN, 24),
        (protocol.ACCESS_IN, 8),
        (protocol.RENAME2_IN, 16),
        (protocol.MKNOD_IN, 16),
        (protocol.LINK_IN, 8),
        (protocol.FSYNC_IN, 16),
        (protocol.SETXATTR_IN, 8),
        (protocol.SETXATTR_EXT_IN, 16),
        (protocol.GETXATTR_IN, 8),
        (protocol.GETXATTR_OUT, 8),
        (protocol.STATFS_OUT, 80),
        (protocol.BATCH_FORGET_IN, 8),
        (protocol.FORGET_ONE, 16),
        (ATTR, 88),
        (ENTRY_OUT, 128 - 88),
        (protocol.OPEN_OUT, 16),
        (protocol.LSEEK_IN, 24),
        (protocol.LSEEK_OUT, 8),
        (protocol.FALLOCATE_IN, 32),
        (protocol.COPY_FILE_RANGE_IN, 56),
        (protocol.STATX_OUT, 32 + 256),
        (protocol.WRITE_OUT, 8),
        (protocol.DIRENT, 24),
    ],
)  # fmt: skip
def test_records_are_as_large_as_the_kernel_says(record: struct.Struct, size: int) -> None:
    assert record.size == size


def test_what_was_written_is_read(kernel: Kernel) -> None:
    ino, handle = kernel.create(b"f")
    content = os.urandom(100_000)
    body = protocol.WRITE_IN.pack(handle, 5, len(content), 0, 0) + content
    assert protocol.WRITE_OUT.unpack(kernel.ask(protocol.WRITE, body, node=ino)) == (len(content),)
    got = kernel.ask(protocol.READ, protocol.READ_IN.pack(handle, 0, 1 << 20), node=ino)
    assert got == bytes(5) + content


def test_copying_between_files(kernel: Kernel) -> None:
    """At most as much as one request carries; the caller asks for the rest."""
    (one, source), (two, to) = kernel.create(b"f"), kernel.create(b"g")
    content = os.urandom(100_000)
    body = protocol.WRITE_IN.pack(source, 0, len(content), 0, 0) + content
    kernel.ask(protocol.WRITE, body, node=one)
    for length, copied in ((50_000, 50_000), (1 << 40, 99_993)):
        body = protocol.COPY_FILE_RANGE_IN.pack(source, 7, two, to, 3, length, 0)
        answer = kernel.ask(protocol.COPY_FILE_RANGE, body, node=one)
        assert protocol.WRITE_OUT.unpack(answer) == (copied,)
        got = kernel.ask(protocol.READ, protocol.READ_IN.pack(to, 0, 1 << 20), node=two)
        assert got == bytes(3) + content[7 : 7 + copied]


def test_an_entry_and_its_attributes(kernel: Kernel) -> None:
    ino, _ = kernel.create(b"f")
    change = protocol.SETATTR_IN.pack(
        protocol.SET_MODE | protocol.SET_ATIME | protocol.SET_MTIME,
        0, 0, -1, 7, 999_999_999, 8, 0o600, 1234, 5678,
    )  # fmt: skip
    kernel.ask(protocol.SETATTR, change, node=ino)
    # With an owner the kernel sends a mode only to take set-ID bits away.
    change = protocol.SETATTR_IN.pack(
        protocol.SET_MODE | protocol.SET_UID, 0, 0, 0, 0, 0, 0, 0o6777, 1234, 0
    )
    set_to = kernel.ask(protocol.SETATTR, change, node=ino)
    found = kernel.ask(protocol.LOOKUP, b"f\0")
    assert ENTRY_OUT.unpack_from(found) == (ino,)
    assert found[ENTRY_OUT.size :] == set_to[ATTR_OUT_SIZE:]
    assert set_to[:ATTR_OUT_SIZE] == bytes(ATTR_OUT_SIZE)  # not to be kept
    fields = ATTR.unpack(found[ENTRY_OUT.size :])
    assert fields[0] == ino
    assert fields[3:5] == (-1, 7)
    assert fields[6:8] == (999_999_999, 8)
    assert fields[9:14] == (0o100600, 1, 1234, 0, 0)
    assert kernel.ask(protocol.GETATTR, bytes(16), node=ino) == set_to


def test_attributes_that_changed_are_not_the_old_ones(kernel: Kernel) -> None:
    ino, handle = kernel.create(b"f")
    before = kernel.ask(protocol.GETATTR, bytes(16), node=ino)
    kernel.ask(protocol.WRITE, protocol.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    assert ATTR.unpack_from(before, ATTR_OUT_SIZE)[1] == 0
    after = kernel.ask(protocol.GETATTR, bytes(16), node=ino)
    assert ATTR.unpack_from(after, ATTR_OUT_SIZE)[1] == 3


def test_errors_are_answers(kernel: Kernel) -> None:
    assert kernel.send(protocol.LOOKUP, b"nothing\0") is None
    assert kernel.answer() == (errno.ENOENT, b"")
    assert kernel.send(protocol.FLUSH, bytes(24)) is None
    assert kernel.answer() == (errno.ENOSYS, b"")
    # A handle that was never given out: what is not expected is EIO, and logged.
    assert kernel.send(protocol.READ, protocol.READ_IN.pack(999, 0, 1)) is None
    assert kernel.answer() == (errno.EIO, b"")


def test_names_of_a_directory(kernel: Kernel) -> None:
    names = {bytes([65 + n]) * (n * 37 % 255 + 1) for n in range(26)}
    inodes = {name: kernel.create(name)[0] for name in names} | {b".": ROOT_INO, b"..": ROOT_INO}
    (handle,) = struct.unpack_from("=Q", kernel.ask(protocol.OPENDIR, bytes(8)))
    cookie, seen = 0, []
    while listed := kernel.ask(protocol.READDIR, protocol.READ_IN.pack(handle, cookie, 4096)):
        assert len(listed) <= 4096
        at = 0
        while at < len(listed):
            ino, cookie, length, kind = protocol.DIRENT.unpack_from(listed, at)
            at += protocol.DIRENT.size
            name = listed[at : at + length]
            at += -(-length // 8) * 8
            assert ino == inodes[name]
            assert kind == (4 if name in (b".", b"..") else 8)
            seen.append(name)
    assert sorted(seen) == sorted([b".", b"..", *names])
    assert kernel.ask(protocol.RELEASEDIR, protocol.RELEASE_IN.pack(handle)) == b""


def test_removing_and_moving(kernel: Kernel) -> None:
    kernel.ask(protocol.MKDIR, protocol.MKDIR_IN.pack(0o755, 0) + b"d\0")
    kernel.create(b"f")
    kernel.ask(protocol.RENAME, protocol.RENAME_IN.pack(ROOT_INO) + b"f\0g\0")
    kernel.ask(protocol.RENAME2, protocol.RENAME2_IN.pack(ROOT_INO, 1) + b"g\0h\0")
    kernel.ask(protocol.UNLINK, b"h\0")
    kernel.ask(protocol.RMDIR, b"d\0")
    for name in (b"f", b"g", b"h", b"d"):
        kernel.send(protocol.LOOKUP, name + b"\0")
        assert kernel.answer()[0] == errno.ENOENT


def entry_of(answer: bytes) -> tuple[int, tuple[int, ...]]:
    """(nodeid, the fields of the attributes) of an entry."""
    assert len(answer) == ENTRY_OUT.size + ATTR.size
    (node,) = ENTRY_OUT.unpack_from(answer)
    return node, ATTR.unpack_from(answer, ENTRY_OUT.size)


def test_a_device_node(kernel: Kernel) -> None:
    """rdev is 32 bits wide: the lower 8 bits of the minor, the major, the rest of the minor."""
    rdev = 0x2C | 7 << 8 | 1 << 20  # major 7, minor 300
    assert rdev == os.makedev(7, 300)
    mode = stat.S_IFBLK | 0o640
    body = struct.pack("=IIII", mode | 0o026, rdev, 0o026, 0) + b"node\0"  # the third is the umask
    node, fields = entry_of(kernel.ask(protocol.MKNOD, body))
    assert (fields[0], fields[9], fields[13]) == (node, mode, rdev)


def test_the_umask_comes_with_the_request(kernel: Kernel) -> None:
    made = [
        (protocol.MKNOD, protocol.MKNOD_IN.pack(stat.S_IFREG | 0o666, 0, 0o027)),
        (protocol.MKDIR, protocol.MKDIR_IN.pack(0o777, 0o027)),
        (protocol.CREATE, protocol.CREATE_IN.pack(os.O_RDWR, 0o666, 0o027)),
    ]
    answers = [kernel.ask(code, body + b"%d\0" % code) for code, body in made]
    found = [ATTR.unpack_from(answer, ENTRY_OUT.size) for answer in answers]
    assert [stat.S_IMODE(fields[9]) for fields in found] == [0o640, 0o750, 0o640]


@pytest.mark.parametrize("obeyed", [False, True])
def test_the_kernel_says_whether_an_access_list_clears_set_group_id(obeyed: bool) -> None:
    """Only a kernel that obeys access lists says it; else the engine finds out by itself."""
    kernel = Kernel(setxattr_ext=True, access_lists=obeyed)
    try:
        ino, _ = kernel.create(b"f")
        for flags in (0, protocol.SETXATTR_ACL_KILL_SGID):
            header = protocol.SETXATTR_EXT_IN.pack(1, 0, flags)
            kernel.ask(protocol.SETXATTR, header + b"system.posix_acl_access\0v", node=ino)
            assert kernel.fs.clears_set_group_id == (bool(flags) if obeyed else None)
    finally:
        kernel.close()


def test_access_lists_are_hidden_where_owners_are_presented() -> None:
    kernel = Kernel(ownership=Ownership(umask=0o077))
    try:
        ino, _ = kernel.create(b"f")
        name = b"system.posix_acl_access\0"
        for opcode, body in (
            (protocol.SETXATTR, protocol.SETXATTR_IN.pack(1, 0) + name + b"v"),
            (protocol.GETXATTR, protocol.GETXATTR_IN.pack(100) + name),
            (protocol.REMOVEXATTR, name),
        ):
            kernel.send(opcode, body, node=ino)
            assert kernel.answer()[0] == errno.EOPNOTSUPP
        kernel.fs.setxattr(ino, name[:-1], b"v", 0, Context(0, 0))
        listed = kernel.ask(protocol.LISTXATTR, protocol.GETXATTR_IN.pack(100), node=ino)
        assert name not in listed
    finally:
        kernel.close()


def test_a_symbolic_link_and_its_target(kernel: Kernel) -> None:
    node, fields = entry_of(kernel.ask(protocol.SYMLINK, b"name\0some/target\0"))
    assert stat.S_ISLNK(fields[9])
    assert entry_of(kernel.ask(protocol.LOOKUP, b"name\0"))[0] == node
    assert kernel.ask(protocol.READLINK, node=node) == b"some/target"


def test_another_name(kernel: Kernel) -> None:
    """The header names the directory, the body what gets another name there."""
    ino, _ = kernel.create(b"f")
    folder, _ = entry_of(kernel.ask(protocol.MKDIR, protocol.MKDIR_IN.pack(0o755, 0) + b"d\0"))
    body = protocol.LINK_IN.pack(ino) + b"g\0"
    node, fields = entry_of(kernel.ask(protocol.LINK, body, node=folder))
    assert (node, fields[10]) == (ino, 2)
    assert entry_of(kernel.ask(protocol.LOOKUP, b"g\0", node=folder))[0] == ino


def test_sizes_of_the_filesystem(kernel: Kernel) -> None:
    answer = kernel.ask(protocol.STATFS)
    assert protocol.STATFS_OUT.unpack(answer) == (1000, 600, 500, 2000, 1500, 4096, 255, 4096)


def test_what_is_synced(kernel: Kernel) -> None:
    ino, handle = kernel.create(b"f")
    (folder,) = struct.unpack_from("=Q", kernel.ask(protocol.OPENDIR, bytes(8)))
    for opcode, number in ((protocol.FSYNC, handle), (protocol.FSYNCDIR, folder)):
        for flags in (0, protocol.FSYNC_FDATASYNC):
            assert kernel.ask(opcode, protocol.FSYNC_IN.pack(number, flags), node=ino) == b""


@pytest.mark.parametrize("longer", [False, True])
def test_extended_attributes(longer: bool) -> None:
    """Their sizes, and too little room; the header of SETXATTR has two lengths."""
    kernel = Kernel(setxattr_ext=longer)
    try:
        ino, _ = kernel.create(b"f")

        def put(name: bytes, value: bytes, flags: int = 0) -> int:
            header = protocol.SETXATTR_IN.pack(len(value), flags) + bytes(8 if longer else 0)
            kernel.send(protocol.SETXATTR, header + name + b"\0" + value, node=ino)
            return kernel.answer()[0]

        def get(opcode: int, room: int, name: bytes = b"") -> tuple[int, bytes]:
            kernel.send(opcode, protocol.GETXATTR_IN.pack(room) + name, node=ino)
            return kernel.answer()

        assert get(protocol.LISTXATTR, 0) == (0, protocol.GETXATTR_OUT.pack(0))
        assert put(b"user.a", b"1\x0023", os.XATTR_CREATE) == 0
        assert put(b"user.a", b"", os.XATTR_CREATE) == errno.EEXIST
        assert put(b"user.b", b"", os.XATTR_REPLACE) == errno.ENODATA
        assert put(b"user.empty", b"") == 0
        assert get(protocol.GETXATTR, 0, b"user.a\0") == (0, protocol.GETXATTR_OUT.pack(4))
        assert get(protocol.GETXATTR, 3, b"user.a\0") == (errno.ERANGE, b"")
        for room in (4, 1 << 16):
            assert get(protocol.GETXATTR, room, b"user.a\0") == (0, b"1\x0023")
        assert get(protocol.GETXATTR, 9, b"user.empty\0") == (0, b"")
        assert get(protocol.GETXATTR, 9, b"user.none\0") == (errno.ENODATA, b"")
        noted = b"user.flags-of-the-last-setxattr"
        assert get(protocol.GETXATTR, 9, noted + b"\0") == (0, b"0")
        names = b"".join(name + b"\0" for name in (noted, b"user.a", b"user.empty"))
        assert get(protocol.LISTXATTR, 0) == (0, protocol.GETXATTR_OUT.pack(len(names)))
        assert get(protocol.LISTXATTR, len(names) - 1) == (errno.ERANGE, b"")
        assert get(protocol.LISTXATTR, len(names)) == (0, names)
        assert kernel.ask(protocol.REMOVEXATTR, b"user.a\0", node=ino) == b""
        assert get(protocol.GETXATTR, 9, b"user.a\0") == (errno.ENODATA, b"")
    finally:
        kernel.close()


def test_the_kernel_is_not_to_ask_what_it_checks_by_itself(kernel: Kernel) -> None:
    kernel.send(protocol.ACCESS, protocol.ACCESS_IN.pack(os.R_OK))
    assert kernel.answer() == (errno.ENOSYS, b"")


def test_what_has_no_answer(kernel: Kernel) -> None:
    assert kernel.send(protocol.FORGET, protocol.FORGET_IN.pack(1), node=7) is None
    batch = (
        protocol.BATCH_FORGET_IN.pack(2)
        + protocol.FORGET_ONE.pack(8, 1)
        + protocol.FORGET_ONE.pack(9, 2)
    )
    assert kernel.send(protocol.BATCH_FORGET, batch, node=0) is None
    assert kernel.send(protocol.INTERRUPT, protocol.INTERRUPT_IN.pack(12345), node=0) is None
    assert kernel.silent()


def test_the_rest_goes_through_libfuse_and_back(kernel: Kernel) -> None:
    request = kernel.send(39)  # IOCTL
    assert request is not None
    kernel.front_end.hand_on(request)
    assert kernel.libfuse.recv(4096) == bytes(request)
    assert kernel.silent()
    kernel.libfuse.send(protocol.OUT_HEADER.pack(16, -errno.EXDEV, UNIQUE))
    kernel.front_end.pump()
    assert kernel.answer() == (errno.EXDEV, b"")
    kernel.front_end.pump()
    assert kernel.silent()


def test_nothing_to_read(kernel: Kernel) -> None:
    """The budget is not spent, so the caller can tell that it must wait."""
    budget = Budget()
    assert kernel.front_end.serve(budget, 0, 0) is None
    assert budget.left == REQUESTS_PER_TURN


def test_requests_are_answered_until_the_budget_is_spent(kernel: Kernel) -> None:
    budget = Budget()
    budget.renew()
    budget.ends = float("inf")
    budget.left = 12
    for _ in range(13):
        kernel.push(protocol.GETATTR)
    assert kernel.front_end.serve(budget, 0, 0) is None
    assert budget.left == 0
    assert [kernel.answer()[0] for _ in range(12)] == [0] * 12
    assert kernel.silent()


def test_late_requests_spend_the_budget(kernel: Kernel) -> None:
    budget = Budget()  # it has ended long ago
    for _ in range(20):
        kernel.push(protocol.GETATTR)
    assert kernel.front_end.serve(budget, 0, 0) is None
    assert budget.left == 0
    assert [kernel.answer()[0] for _ in range(8)] == [0] * 8
    assert kernel.silent()


def test_a_request_for_libfuse_leaves_the_rest_of_the_budget(kernel: Kernel) -> None:
    budget = Budget()
    kernel.push(protocol.GETATTR)
    kernel.push(39)  # IOCTL
    kernel.push(protocol.GETATTR)
    assert kernel.front_end.serve(budget, 0, 0) is not None
    assert budget.left == REQUESTS_PER_TURN - 2


def test_the_end_of_the_connection_is_told(kernel: Kernel) -> None:
    """A read of 0 bytes from a socket must not count as a request."""
    kernel.mine.close()
    with pytest.raises(OSError, match="Input/output") as caught:
        kernel.serve()
    assert caught.value.errno == errno.EIO


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

    monkeypatch.setattr(kernel.fs, "write", write)


def test_a_busy_engine_is_tried_again(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    ino, handle = kernel.create(b"f")
    make_busy(kernel, monkeypatch, 3)
    kernel.send(protocol.WRITE, protocol.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    assert kernel.silent()
    # The buffer is used again in between: the request that waits has its own copy.
    kernel.ask(protocol.LOOKUP, b"f\0")
    kernel.run()
    assert kernel.answer() == (0, protocol.WRITE_OUT.pack(3))
    assert kernel.ask(protocol.READ, protocol.READ_IN.pack(handle, 0, 9), node=ino) == b"abc"


def test_a_commit_of_somebody_else_is_waited_for(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment, without another request in between; then others get their turn."""
    ino, handle = kernel.create(b"f")
    looks = iter([True] * 3 + [False] * 100)

    class Crowd:
        def __get__(self, *_: object) -> bool:
            return next(looks)

    monkeypatch.setattr(type(kernel.fs), "is_committing", Crowd())
    make_busy(kernel, monkeypatch, 2)
    kernel.send(protocol.WRITE, protocol.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    assert kernel.answer() == (0, protocol.WRITE_OUT.pack(3))
    monkeypatch.setattr(type(kernel.fs), "is_committing", True)
    make_busy(kernel, monkeypatch, 10**9)
    kernel.send(protocol.WRITE, protocol.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
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

    monkeypatch.setattr(kernel.fs, "fallocate", fallocate)
    kernel.send(protocol.FALLOCATE, protocol.FALLOCATE_IN.pack(handle, 0, 1 << 40, 0))
    assert calls == ["first"]
    assert kernel.silent()
    kernel.run()
    assert calls == ["first", "second", "second", "last"]
    assert kernel.answer() == (0, b"")


def test_a_long_list_of_what_is_forgotten_takes_several_turns(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[int] = []
    monkeypatch.setattr(kernel.fs, "forget", gone.append)
    many = range(10, 10 + 3 * FORGOTTEN_AT_ONCE)
    batch = b"".join(protocol.FORGET_ONE.pack(node, 1) for node in many)
    kernel.send(protocol.BATCH_FORGET, bytes(protocol.BATCH_FORGET_IN.size) + batch)
    assert len(gone) == FORGOTTEN_AT_ONCE
    for _ in range(2):
        del kernel.tasks[:-1]
        kernel.run()
    assert gone == list(many)
    assert kernel.silent()


class Writing:
    """The front end's way to the kernel, with answers and errnos that fail as told."""

    def __init__(self, kernel: Kernel) -> None:
        self.real = kernel.front_end._requests
        self.failures: list[Exception] = []
        kernel.front_end._requests = self  # type: ignore[assignment]

    def read(self, spin: int, nap: int) -> tuple[int, int, int, int, Context] | None:
        return self.real.read(spin, nap)

    def answer(self, unique: int, body: bytes | None) -> None:
        if self.failures:
            raise self.failures.pop()
        self.real.answer(unique, body)

    def refuse(self, unique: int, code: int) -> None:
        if self.failures:
            raise self.failures.pop()
        self.real.refuse(unique, code)


def test_an_answer_that_cannot_be_made_is_an_error(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets it, and the mount lives: nothing escapes from a task."""
    ino, handle = kernel.create(b"f")
    writing = Writing(kernel)
    writing.failures.append(MemoryError("no room"))
    assert kernel.send(protocol.GETATTR, node=ino) is None
    assert kernel.answer() == (errno.ENOMEM, b"")
    writing.failures.append(MemoryError("no room"))
    make_busy(kernel, monkeypatch, 3)
    kernel.send(protocol.WRITE, protocol.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    kernel.run()
    assert kernel.answer() == (errno.ENOMEM, b"")


def test_errors_that_the_kernel_would_not_take(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused answer leaves the caller waiting for good."""

    def fail(_ino: int) -> NoReturn:
        raise FsError(512, "a number of the kernel's own")

    monkeypatch.setattr(type(kernel.fs), "getattr", lambda _fs, ino: fail(ino))
    kernel.send(protocol.GETATTR)
    assert kernel.answer() == (errno.EIO, b"")


@pytest.mark.parametrize("times", [30, 10**9])
def test_an_interrupted_caller_waits_a_little_longer(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """EINTR only when the engine stays busy: programs do not expect it from calls on files."""
    ino, handle = kernel.create(b"f")
    make_busy(kernel, monkeypatch, times)
    kernel.send(protocol.WRITE, protocol.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)

    async def interrupt() -> None:
        await trio.sleep(0.05)
        assert kernel.silent()
        assert kernel.send(protocol.INTERRUPT, protocol.INTERRUPT_IN.pack(UNIQUE), unique=0) is None

    kernel.run(interrupt)
    if times < 10**9:
        assert kernel.answer() == (0, protocol.WRITE_OUT.pack(3))
    else:
        assert kernel.answer() == (errno.EINTR, b"")
        assert kernel.ask(protocol.READ, protocol.READ_IN.pack(handle, 0, 9), node=ino) == b""


def test_what_waits_fails_when_the_mount_ends(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino, handle = kernel.create(b"f")
    make_busy(kernel, monkeypatch, 10**9)
    kernel.send(protocol.WRITE, protocol.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)
    kernel.operations.retry.ending = True
    kernel.run()
    assert kernel.answer() == (errno.EIO, b"")


@pytest.mark.parametrize("name", [b"f\0", b"nothing\0"])
def test_an_answer_that_nobody_takes_is_no_event(
    kernel: Kernel, caplog: pytest.LogCaptureFixture, name: bytes
) -> None:
    kernel.create(b"f")
    Writing(kernel).failures.append(OSError(errno.ENOENT, "no such request"))
    kernel.send(protocol.LOOKUP, name)
    assert kernel.silent()
    assert caplog.text == ""


# --- permission -------------------------------------------------------------------------------


def test_only_root_where_the_kernel_checks_nothing() -> None:
    kernel = Kernel(root_only=True)
    try:
        ino, _ = kernel.create(b"f")
        for opcode, body in (
            (protocol.LOOKUP, b"f\0"),
            (protocol.OPEN, protocol.OPEN_IN.pack(os.O_RDONLY)),
            (protocol.CREATE, protocol.CREATE_IN.pack(os.O_RDWR, 0o644, 0) + b"g\0"),
            (protocol.UNLINK, b"f\0"),
        ):
            kernel.send(opcode, body, node=ROOT_INO if opcode != protocol.OPEN else ino, uid=1000)
            assert kernel.answer() == (errno.EACCES, b"")
        for mask, expected in ((os.R_OK | os.W_OK, 0), (os.X_OK, errno.EACCES), (os.F_OK, 0)):
            kernel.send(protocol.ACCESS, protocol.ACCESS_IN.pack(mask), node=ino)
            assert kernel.answer()[0] == expected
        kernel.send(protocol.ACCESS, protocol.ACCESS_IN.pack(os.X_OK))
        assert kernel.answer()[0] == 0
    finally:
        kernel.close()


def test_presented_owners() -> None:
    kernel = Kernel(ownership=Ownership(uid=11, gid=12, umask=0o077))
    try:
        ino, _ = kernel.create(b"f")
        fields = ATTR.unpack_from(kernel.ask(protocol.GETATTR, bytes(16), node=ino), ATTR_OUT_SIZE)
        assert fields[9:13] == (0o100600, 1, 11, 12)
        for uid, expected in ((11, 0), (13, errno.EPERM)):
            change = protocol.SETATTR_IN.pack(protocol.SET_UID, 0, 0, 0, 0, 0, 0, 0, uid, 0)
            kernel.send(protocol.SETATTR, change, node=ino)
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
        kernel.operations.retry.ending = end == "unmounted"
        raise Busy("another peer")

    def write(*_: object, **__: object) -> int:
        raise Unfinished("injected", go_on, 2)

    monkeypatch.setattr(kernel.fs, "write", write)
    if end == "impatient":
        monkeypatch.setattr(retry, "PATIENCE", 0.0)
    kernel.send(protocol.WRITE, protocol.WRITE_IN.pack(handle, 0, 3, 0, 0) + b"abc", node=ino)

    async def interrupt() -> None:
        await trio.sleep(0.05)
        if end == "interrupted":
            assert (
                kernel.send(protocol.INTERRUPT, protocol.INTERRUPT_IN.pack(UNIQUE), unique=0)
                is None
            )

    kernel.run(interrupt)
    assert kernel.answer() == (0, protocol.WRITE_OUT.pack(2))


def test_a_copy_takes_turns_too(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    ino, handle = kernel.create(b"f")

    def write(*_: object, **__: object) -> int:
        raise Unfinished("injected", lambda: 3, 2)

    monkeypatch.setattr(kernel.fs, "write", write)
    body = protocol.COPY_FILE_RANGE_IN.pack(handle, 0, ino, handle, 0, 3, 0)
    kernel.send(protocol.COPY_FILE_RANGE, body, node=ino)
    assert kernel.silent()
    kernel.run()
    assert kernel.answer() == (0, protocol.WRITE_OUT.pack(3))
