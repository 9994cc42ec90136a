"""mmap(2) on a mount: with the flag of Linux 6.6, without it, and through the page cache."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ivshmemfs.errors import MountError
from ivshmemfs.fuse import connection, protocol
from ivshmemfs.fuse.connection import Handshake, State
from tests.fuse.fake_mount import FakeMount
from tests.support.mounts import PATIENCE, needs_fuse

MountFactory = Callable[..., FakeMount]

KERNEL = tuple(int(part) for part in os.uname().release.split(".")[:2])
needs_flag = pytest.mark.skipif(KERNEL < (6, 6), reason="the kernel is older than 6.6")


def share(path: Path) -> int:
    """Write through a shared mapping; returns the errno that mapping failed with, or 0."""
    path.write_bytes(b"." * 10_000)
    with open(path, "r+b", buffering=0) as file:
        try:
            mapping = mmap.mmap(file.fileno(), 10_000)
        except OSError as error:
            return error.errno or -1
        with mapping:
            mapping[5_000:5_005] = b"hello"
            mapping.flush()
    assert path.read_bytes()[4_999:5_006] == b".hello."
    return 0


@needs_fuse
@needs_flag
def test_shared_mappings_work(mnt: FakeMount) -> None:
    assert share(mnt.path / "f") == 0
    assert "shared mappings with direct I/O are allowed" in mnt.log_text()


@needs_fuse
@needs_flag
def test_a_shared_mapping_and_direct_calls_agree_on_one_machine(mnt: FakeMount) -> None:
    path = mnt.path / "f"
    path.write_bytes(bytes(8192))
    with open(path, "r+b", buffering=0) as file, mmap.mmap(file.fileno(), 8192) as mapping:
        mapping[0:3] = b"map"
        assert os.pread(file.fileno(), 3, 0) == b"map"
        os.pwrite(file.fileno(), b"call", 4096)
        assert mapping[4096:4100] == b"call"


@needs_fuse
def test_private_mappings_and_programs(mnt: FakeMount) -> None:
    program = mnt.path / "true"
    shutil.copy(shutil.which("true") or "/bin/true", program)
    program.chmod(0o755)
    assert subprocess.run([program], timeout=PATIENCE, check=False).returncode == 0
    with (
        open(program, "rb") as file,
        mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping,
    ):
        assert mapping[:4] == b"\x7fELF"


@needs_fuse
def test_through_the_page_cache_reads_notice_changes(mount: MountFactory) -> None:
    """With -o mmap, read(2) still asks whether the file has changed."""
    one = mount("-o", "mmap")
    path = one.path / "f"
    path.write_bytes(b"old")
    with open(path, "rb", buffering=0) as reader:
        assert os.pread(reader.fileno(), 10, 0) == b"old"
        path.write_bytes(b"newer")
        assert os.pread(reader.fileno(), 10, 0) == b"newer"


# --- the handshake by itself ------------------------------------------------------------------


def init_request(*, flags: int = 0, flags2: int = 0, opcode: int = protocol.INIT) -> bytes:
    """FUSE_INIT as the kernel sends it."""
    body = struct.pack("=IIIII44x", 7, 40, 131072, flags, flags2)
    return struct.pack("=IIQQIIII", 40 + len(body), opcode, 2, 0, 0, 0, 0, 0) + body


def init_answer(*, error: int = 0, flags: int = 0) -> bytes:
    """FUSE_INIT's answer as libfuse writes it."""
    body = struct.pack("=IIIIHHIIHHI28x", 7, 36, 131072, flags, 12, 9, 1 << 20, 1, 256, 0, 0)
    return struct.pack("=IiQ", 16 + len(body), error, 2) + body


class Ends:
    """A handshake between a socket that plays the kernel and the end that libfuse gets."""

    def __init__(
        self, *, keep: bool = False, kernel_checks: bool = False, access_lists: bool = False
    ) -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.shake = Handshake(
            device.detach(), keep=keep, kernel_checks=kernel_checks, access_lists=access_lists
        )
        self.fd = int(self.shake.path.rsplit("/", 1)[1])

    def answer(self, request: bytes, answer: bytes) -> bytes:
        """Go through the whole handshake; returns what the kernel gets."""
        self.kernel.send(request)
        assert not self.shake.step(self.fd)
        assert os.read(self.fd, 4096) == request
        os.write(self.fd, answer)
        assert self.shake.step(self.fd)
        return self.kernel.recv(4096)

    def close(self) -> None:
        """Close every descriptor, in any state of the handshake."""
        self.shake.close()
        self.kernel.close()
        os.close(self.fd)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    try:
        yield made
    finally:
        made.close()


OFFER = protocol.INIT_EXT
ALLOW = protocol.DIRECT_IO_ALLOW_MMAP


def test_the_flag_is_set_when_it_is_offered(ends: Ends) -> None:
    got = ends.answer(init_request(flags=OFFER, flags2=ALLOW | 1), init_answer(flags=0x23))
    fields = struct.unpack_from("=IIIIHHIIHHI", got, 16)
    assert fields[3] == 0x23 | OFFER
    assert fields[10] == ALLOW
    assert ends.shake.shared_mappings
    assert len(got) == len(init_answer())


def test_whoever_reads_requests_before_libfuse_is_asked_for_plain_listings() -> None:
    others = 0x23
    for keep, listing in ((True, 0), (False, protocol.DO_READDIRPLUS | protocol.READDIRPLUS_AUTO)):
        ends = Ends(keep=keep)
        flags = others | protocol.DO_READDIRPLUS | protocol.READDIRPLUS_AUTO
        got = ends.answer(init_request(), init_answer(flags=flags))
        assert struct.unpack_from("=IIIIHHIIHHI", got, 16)[3] == others | listing
        ends.close()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("lists", [False, True])
def test_what_is_agreed_on_permissions(keep: bool, checks: bool, lists: bool) -> None:
    """The umask is always ours; the kernel obeys lists, and maps owners, only where it checks."""
    flags = OFFER | protocol.DONT_MASK | protocol.POSIX_ACL | protocol.SETXATTR_EXT
    ends = Ends(keep=keep, kernel_checks=checks, access_lists=lists)
    got = ends.answer(init_request(flags=flags, flags2=protocol.ALLOW_IDMAP), init_answer())
    fields = struct.unpack_from("=IIIIHHIIHHI", got, 16)
    assert fields[3] & protocol.DONT_MASK
    assert bool(fields[3] & protocol.POSIX_ACL) is ends.shake.access_lists is (checks and lists)
    assert bool(fields[3] & protocol.SETXATTR_EXT) is keep
    assert fields[10] == (protocol.ALLOW_IDMAP if keep and checks else 0)
    assert not ends.shake.shared_mappings
    ends.close()


def test_from_then_on_libfuse_and_the_kernel_talk_directly(ends: Ends) -> None:
    ends.answer(init_request(), init_answer())
    ends.kernel.send(b"request")
    assert os.read(ends.fd, 100) == b"request"
    os.write(ends.fd, b"reply")
    assert ends.kernel.recv(100) == b"reply"
    assert ends.shake.state is State.OPEN
    ends.shake.close()  # changes nothing any more
    assert ends.shake.step(ends.fd)


@pytest.mark.parametrize(
    "request_bytes",
    [
        init_request(),
        init_request(flags=OFFER, flags2=1),
        init_request(flags=0, flags2=ALLOW),
        init_request(flags=OFFER, flags2=ALLOW)[:56],  # a kernel before the second word of flags
    ],
    ids=["nothing", "other flags", "one word of flags", "short"],
)
def test_what_is_not_offered_is_not_asked_for(ends: Ends, request_bytes: bytes) -> None:
    assert ends.answer(request_bytes, init_answer()) == init_answer()
    assert not ends.shake.shared_mappings


def test_a_short_answer_of_an_old_libfuse_passes_unchanged(ends: Ends) -> None:
    assert (
        ends.answer(init_request(flags=OFFER, flags2=ALLOW), init_answer()[:40])
        == (init_answer()[:40])
    )


def test_libfuse_refusing_fails_the_mount(ends: Ends) -> None:
    ends.kernel.send(init_request())
    ends.shake.step(ends.fd)
    os.write(ends.fd, init_answer(error=-71))
    with pytest.raises(MountError, match="does not speak"):
        ends.shake.step(ends.fd)
    assert ends.shake.state is State.FAILED


def test_another_request_first_fails_the_mount(ends: Ends) -> None:
    ends.kernel.send(init_request(opcode=3))
    with pytest.raises(MountError, match="before FUSE_INIT"):
        ends.shake.step(ends.fd)


def test_silence_fails_the_mount(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.05)
    with pytest.raises(MountError, match="no FUSE_INIT"):
        ends.shake.step(ends.fd)
