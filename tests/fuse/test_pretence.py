"""The answers to the replayer: nothing that it did not announce, and the queue."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from ivshmemfs.engine import ROOT_INO, Attr, Context
from ivshmemfs.engine.filesystem import Filesystem
from ivshmemfs.errors import FsError
from ivshmemfs.fuse import pretence, protocol, replayer
from ivshmemfs.fuse.kernel_frontend import ABSENT, Answer, Buffer
from ivshmemfs.fuse.operations import Operations
from ivshmemfs.fuse.pretence import Action, Parts, Pretence
from tests.fuse.fake_kernel import PID, Kernel
from tests.support.regions import ROOT, new_region

FILE = 0o100644
HELPER = Context(0, 0, 4711)
HEADER = bytes(protocol.IN_HEADER.size)


async def _no_pause(_seconds: float) -> None:
    raise AssertionError("nothing is busy here")


def _usual(_node: int, _ctx: Context, _request: Buffer, _end: int) -> Answer:
    raise AssertionError("the replayer must not reach the usual handlers")


def _entry(node: int, attr: Attr) -> bytes:
    return b"%d %o %d" % (node, attr.mode, attr.nlink)


class Played:
    """A pretence over a region, and the requests that the kernel would send."""

    def __init__(self, fs: Filesystem) -> None:
        self.fs = fs
        self.pretence = Pretence(fs, Operations(fs, _no_pause), lambda _ino: None)
        attr = lambda attr: _entry(attr.ino, attr)  # noqa: E731  # the shape is that of `Parts`
        self.pretence.allowed = 1 << 20
        self.pretence.use(Parts(_entry, attr, lambda value, _: value, _usual, ABSENT))
        self.number = 0

    def ask(self, opcode: int, body: bytes, node: int = ROOT_INO) -> Answer:
        """The answer to one request of the replayer."""
        handler = self.pretence.handler(opcode, _usual)
        assert handler is not None
        request = HEADER + body
        return handler(node, HELPER, request, len(request))

    def refused(self, opcode: int, body: bytes, node: int = ROOT_INO) -> bool:
        """Whether a request gets EACCES."""
        with pytest.raises(FsError) as caught:
            self.ask(opcode, body, node)
        return caught.value.errno == errno.EACCES

    def next(self) -> replayer.Record:
        """The next record."""
        self.number += 1
        name = replayer.ATTRIBUTE + b"%d" % self.number
        raw = self.ask(protocol.GETXATTR, protocol.GETXATTR_IN.pack(4096) + name + b"\0")
        assert isinstance(raw, bytes)
        return replayer.unpacked(raw)


@pytest.fixture
def played() -> Iterator[Played]:
    with new_region(16 << 20) as region:
        yield Played(region.mount())


REQUESTS = {
    protocol.MKNOD: protocol.MKNOD_IN.pack(FILE, 0, 0) + b"name\0",
    protocol.MKDIR: protocol.MKDIR_IN.pack(0o755, 0) + b"name\0",
    protocol.SYMLINK: b"name\0target\0",
    protocol.LINK: protocol.LINK_IN.pack(2) + b"name\0",
    protocol.CREATE: protocol.CREATE_IN.pack(1, FILE, 0) + b"name\0",
    protocol.UNLINK: b"name\0",
    protocol.RMDIR: b"name\0",
    protocol.RENAME: protocol.RENAME_IN.pack(1) + b"name\0other\0",
    protocol.RENAME2: protocol.RENAME2_IN.pack(1, 1) + b"name\0other\0",
    protocol.SETATTR: bytes(protocol.SETATTR_IN.size),
    protocol.OPEN: protocol.OPEN_IN.pack(1),
    protocol.WRITE: bytes(protocol.WRITE_IN.size),
    protocol.READ: bytes(protocol.READ_IN.size),
    protocol.LOOKUP: b"name\0",
    protocol.SETXATTR: bytes(64),
    protocol.REMOVEXATTR: b"user.x\0",
    protocol.FALLOCATE: bytes(protocol.FALLOCATE_IN.size),
    protocol.COPY_FILE_RANGE: bytes(protocol.COPY_FILE_RANGE_IN.size),
    protocol.OPENDIR: bytes(8),
    99: b"",
}


@pytest.mark.parametrize("opcode", REQUESTS)
def test_what_is_not_announced_is_refused(played: Played, opcode: int) -> None:
    assert played.refused(opcode, REQUESTS[opcode])  # without a record
    played.pretence.add(Action(replayer.UNLINK, 9999, b"announced", 9998))
    played.next()
    assert played.refused(opcode, REQUESTS[opcode])  # with one for another name
    assert played.fs.find(ROOT_INO, b"name") is None


def test_only_the_pid_of_the_replayer_counts() -> None:
    with closing(Kernel()) as kernel:
        body = protocol.MKDIR_IN.pack(0o755, 0) + b"name\0"
        kernel.front_end.replayer = PID
        kernel.send(protocol.MKDIR, body)
        assert kernel.answer()[0] == errno.EACCES
        assert kernel.send(99) is None  # libfuse never gets its requests
        assert kernel.answer()[0] == errno.EACCES
        kernel.front_end.replayer = PID + 1
        kernel.send(protocol.MKDIR, body)
        assert kernel.answer()[0] == 0


def test_the_same_name_and_another_action(played: Played) -> None:
    played.fs.mknod(ROOT_INO, b"name", FILE, 0, ROOT)
    played.pretence.add(Action(replayer.CHMOD, ROOT_INO, b"name", 2))
    assert played.next().number == 0o644
    for opcode in (protocol.MKNOD, protocol.UNLINK, protocol.RENAME, protocol.OPEN):
        assert played.refused(opcode, REQUESTS[opcode])
    assert played.fs.find(ROOT_INO, b"name") is not None


def test_a_removal_changes_nothing(played: Played) -> None:
    """The name may be there again: another machine made it anew."""
    kept = played.fs.mknod(ROOT_INO, b"name", FILE, 0, ROOT).ino
    played.pretence.add(Action(replayer.UNLINK, ROOT_INO, b"name", 4000))
    assert played.next() == replayer.Record(replayer.UNLINK, ROOT_INO, b"", b"name")
    answer = played.ask(protocol.LOOKUP, b"name\0")
    assert isinstance(answer, bytes)
    assert int(answer.split()[0]) >= 1 << 62  # a phantom
    assert played.ask(protocol.UNLINK, b"name\0") is None
    found = played.fs.find(ROOT_INO, b"name")
    assert found is not None
    assert found.ino == kept


def test_what_is_gone_for_the_replayer_makes_no_look_up_careful(played: Played) -> None:
    """A careful look-up lists the file as open in the region; each one costs more for 5 s."""
    kept = played.fs.mknod(ROOT_INO, b"kept", FILE, 0, ROOT).ino
    for what in (replayer.UNLINK, replayer.RENAME, replayer.CREATE):
        to = (ROOT_INO, b"to") if what == replayer.RENAME else (0, b"")
        played.pretence.add(Action(what, ROOT_INO, b"name", 4000, False, *to))
        played.next()
        with suppress(FsError):
            played.ask(protocol.LOOKUP, b"name\0")
        with suppress(FsError):
            played.ask(protocol.GETATTR, b"", 4000)
    assert played.fs.find(ROOT_INO, b"kept") is not None
    assert not played.fs.is_open(kept)
    with pytest.raises(FsError):  # as a caller finds it gone
        played.fs.getattr(4000)
    assert played.fs.find(ROOT_INO, b"kept") is not None
    assert played.fs.is_open(kept)


def test_a_creation_shows_the_true_inode(played: Played) -> None:
    made = played.fs.mknod(ROOT_INO, b"name", FILE, 0, ROOT).ino
    played.pretence.add(Action(replayer.CREATE, ROOT_INO, b"name", made))
    played.next()
    assert played.ask(protocol.LOOKUP, b"name\0") is ABSENT
    answer = played.ask(protocol.MKNOD, REQUESTS[protocol.MKNOD])
    assert answer == b"%d 100644 1" % made


def test_equal_changes_of_a_file_are_one(played: Played) -> None:
    action = Action(replayer.MODIFY, ROOT_INO, b"name", 2)
    for _ in range(pretence.QUEUE_MAX + 1):
        assert played.pretence.add(action)


def test_the_queue_is_bounded(played: Played) -> None:
    for number in range(pretence.QUEUE_MAX):
        assert played.pretence.add(Action(replayer.CREATE, ROOT_INO, b"%d" % number, number))
    assert not played.pretence.add(Action(replayer.CREATE, ROOT_INO, b"one more", 1))


def test_the_replayer_gets_as_many_records_as_are_allowed(played: Played) -> None:
    for number in range(3):
        played.pretence.add(Action(replayer.CREATE, ROOT_INO, b"%d" % number, number))
    played.pretence.allowed, played.pretence.awake = 2, True
    assert [played.next().name, played.next().name] == [b"0", b"1"]
    with pytest.raises(FsError) as caught:
        played.next()
    assert caught.value.errno == errno.ENODATA
    assert not played.pretence.awake
    assert played.pretence.has_work
    played.pretence.allowed = 1
    played.number -= 1  # that one was not given
    assert played.next().name == b"2"


def test_actions_that_lead_nowhere_are_skipped_in_turns(played: Played) -> None:
    for number in range(pretence.SKIPPED_AT_ONCE + 1):
        played.pretence.add(Action(replayer.CHMOD, ROOT_INO, b"%d" % number, 4000))
    played.pretence.awake = True
    assert played.next().action == replayer.NOTHING
    with pytest.raises(FsError) as caught:
        played.next()
    assert caught.value.errno == errno.ENODATA
    assert not played.pretence.awake


# --- the replayer's way in ----------------------------------------------------------------------


@pytest.mark.parametrize("call", [replayer._OPEN_TREE, 9999])
def test_the_replayer_enters_with_and_without_a_copy(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old kernel does not know the call; an ordinary user may not use it."""
    monkeypatch.setattr(replayer, "_OPEN_TREE", call)
    monkeypatch.setattr(replayer, "_have", lambda *_: None)  # this process keeps its rights
    device = tmp_path.stat().st_dev
    assert replayer.Replayer(str(tmp_path), device).replay() is False  # there are no records
    assert replayer.Replayer(str(tmp_path), device + 1).replay() is None
    assert replayer.Replayer(str(tmp_path / "missing"), device).replay() is None
    (tmp_path / "link").symlink_to(tmp_path)
    assert replayer.Replayer(str(tmp_path / "link"), device).replay() is None


@pytest.mark.parametrize("name", [b"..", b".", b"../etc", b"a/b", b"/"])
def test_a_name_that_leads_out_of_the_mount_is_refused(name: bytes) -> None:
    """The region may say anything; the engine refuses such names, and the replayer does too."""
    for record in (
        replayer.Record(replayer.CREATE, 1, b"", name),
        replayer.Record(replayer.RENAME, 1, b"", b"name", 1, b"", name),
    ):
        with pytest.raises(ValueError, match="leads elsewhere"):
            replayer.unpacked(record.packed())


@pytest.mark.parametrize("action", [replayer.MODIFY, replayer.CLOSE])
def test_only_regular_files_are_opened(action: bytes, tmp_path: Path) -> None:
    """A hostile machine may put a device in a file's place after the daemon made the record."""
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    inode = os.open(tmp_path / "fifo", os.O_PATH)
    try:
        replayer._act_on_inode(inode, replayer.Record(action, 1, b"", b"fifo"))
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        assert poll.poll(0) == []  # a writer that came and went shows as POLLHUP
        os.close(os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK))
        assert poll.poll(0) != []
    finally:
        os.close(inode)
        os.close(reader)


# --- marks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "node"),
    [
        (
            (
                "inotify wd:1 ino:5 sdev:2b mask:fce ignored_mask:0 fhandle-bytes:c "
                "fhandle-type:81 f_handle:000000000700000000000000\n"
            ),
            7,
        ),
        (
            (
                "fanotify ino:5 sdev:2b mflags:0 mask:3b ignored_mask:0 fhandle-bytes:c "
                "fhandle-type:81 f_handle:010000000700000000000000\n"
            ),
            1 << 32 | 7,
        ),
        ("inotify wd:1 ino:1f sdev:2b mask:fce ignored_mask:0\n", 31),
        ("inotify wd:1 ino:1f sdev:2c mask:fce ignored_mask:0\n", None),
        ("fanotify mnt_id:12 mflags:0 mask:3b ignored_mask:0\n", None),
        ("inotify wd:1 ino:zz sdev:2b\n", None),
        ("pos:\t0\n", None),
    ],
)
def test_a_line_of_fdinfo(line: str, node: int | None) -> None:
    assert replayer.marked_node(line, 0x2B) == node
