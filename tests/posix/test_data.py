"""File data: sparse files, sizes, blocks, space, extended attributes, handles."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.posix.actor import Actor
from tests.posix.conftest import GROUP, USER
from tests.posix.raising import fails
from tests.support.lab import needs_fuse, needs_root, new_lab

pytestmark = [needs_fuse, needs_root]

GIB = 1 << 30


# --- sparse and large -------------------------------------------------------------------------


def test_holes_read_as_zeros_and_take_no_room(here: Path, there: Path) -> None:
    path = here / "file"
    with path.open("wb", buffering=0) as file:
        for at in (10 << 20, 1 << 20, 100 << 20):
            file.seek(at)
            file.write(b"island")
    found = (there / "file").stat()
    assert found.st_size == (100 << 20) + 6
    assert found.st_blocks * 512 < 1 << 20
    with (there / "file").open("rb") as file:
        assert file.read(1 << 20) == bytes(1 << 20)
        assert file.read(6) == b"island"
        file.seek((10 << 20) - 3)
        assert file.read(12) == b"\0\0\0island\0\0\0"
    os.truncate(path, 2 << 20)
    assert path.stat().st_blocks * 512 < 64 << 10
    os.truncate(path, 0)
    assert path.stat().st_blocks == 0


def test_blocks_follow_the_data(here: Path, there: Path) -> None:
    path = here / "file"
    path.write_bytes(b"")
    assert (there / "file").stat().st_blocks == 0
    path.write_bytes(b"x")
    assert 1 <= (there / "file").stat().st_blocks <= 16
    path.write_bytes(bytes(1 << 20))
    full = (there / "file").stat().st_blocks
    assert (1 << 20) // 512 <= full <= (1 << 20) // 512 * 1.05
    os.truncate(path, 512 << 10)
    assert abs((there / "file").stat().st_blocks - full / 2) < 64


def test_beyond_four_gib(here: Path, there: Path) -> None:
    path = here / "file"
    marks = [0, 2 * GIB - 3, 4 * GIB - 3, 4 * GIB + 50, 5 * GIB]
    with path.open("wb", buffering=0) as file:
        for mark in marks:
            os.pwrite(file.fileno(), b"%012d" % mark, mark)
    assert (there / "file").stat().st_size == 5 * GIB + 12
    with (there / "file").open("rb", buffering=0) as file:
        for mark in marks:
            assert os.pread(file.fileno(), 12, mark) == b"%012d" % mark
        file.seek(-12, os.SEEK_END)
        assert file.read() == b"%012d" % marks[-1]
    os.truncate(path, 4 * GIB + 1)
    assert (there / "file").stat().st_size == 4 * GIB + 1
    with (there / "file").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 100, 4 * GIB - 3) == (b"%012d" % marks[2])[:4]


def test_growing_after_shrinking_shows_zeros(here: Path, there: Path) -> None:
    path = here / "file"
    for size in (1, 10, 500, 832, 833, 1023, 1024, 1025, 4096, 5000, 70_000):
        path.write_bytes(b"\xff" * 100_000)
        os.truncate(path, size)
        os.truncate(path, 100_000)
        assert (there / "file").read_bytes() == b"\xff" * size + bytes(100_000 - size), size


# --- handles ----------------------------------------------------------------------------------


def test_appending(here: Path, there: Path) -> None:
    path = here / "file"
    one = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    two = os.open(there / "file", os.O_RDWR | os.O_APPEND)
    for number in range(20):
        os.write(one if number % 2 else two, b"%02d\n" % number)
    os.pwrite(two, b"20\n", 0)  # as Linux has it: the offset does not matter
    assert path.read_bytes() == b"".join(b"%02d\n" % number for number in range(21))
    os.ftruncate(one, 3)
    os.write(two, b"after\n")
    assert path.read_bytes() == b"00\nafter\n"
    os.close(one)
    os.close(two)


def test_truncating_at_opening(here: Path, there: Path) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY):
        (here / "file").write_bytes(b"content")
        os.close(os.open(there / "file", flags | os.O_TRUNC))
        assert (here / "file").read_bytes() == b"", flags
    (here / "file").write_bytes(b"content")
    os.close(os.open(there / "file", os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o600))
    assert (here / "file").stat().st_size == 0


def test_vectors_and_copies_in_the_kernel(here: Path) -> None:
    source = os.open(here / "one", os.O_CREAT | os.O_RDWR)
    to = os.open(here / "two", os.O_CREAT | os.O_RDWR)
    content = random.Random(1).randbytes(300_000)
    assert os.writev(source, [content[:100_000], content[100_000:250_001], content[250_001:]])
    assert os.copy_file_range(source, to, 200_000, 0, 0) == 200_000
    os.lseek(to, 200_000, os.SEEK_SET)
    assert os.sendfile(to, source, 200_000, 100_000) == 100_000
    assert (here / "two").read_bytes() == content
    buffers = [bytearray(100_000), bytearray(200_000)]
    assert os.preadv(to, buffers, 0) == 300_000
    assert b"".join(buffers) == content
    os.close(source)
    os.close(to)


def test_direct_and_synchronous_handles(here: Path, there: Path) -> None:
    import mmap

    for flags in (os.O_DIRECT, os.O_SYNC, os.O_DSYNC, os.O_DIRECT | os.O_SYNC):
        fd = os.open(here / "file", os.O_CREAT | os.O_RDWR | flags)
        with mmap.mmap(-1, 65536) as page:
            page[:] = os.urandom(65536)
            assert os.pwritev(fd, [page], 0) == 65536
            assert (there / "file").read_bytes() == page[:]
        os.fsync(fd)
        os.fdatasync(fd)
        os.close(fd)


# --- space ------------------------------------------------------------------------------------


def test_df_and_du_add_up() -> None:
    with new_lab(16 << 20, 2) as lab:
        one, two = lab.paths
        empty = os.statvfs(one)
        assert empty.f_blocks * empty.f_frsize > 15 << 20
        assert empty.f_bavail <= empty.f_bfree <= empty.f_blocks
        assert empty.f_namemax == 255
        for number in range(20):
            (one / f"file{number}").write_bytes(os.urandom(100_000 + number * 1000))
        (one / "dir").mkdir()
        used = os.statvfs(two)
        taken = (empty.f_bfree - used.f_bfree) * used.f_frsize
        du = int(subprocess.check_output(["du", "-s", "-B1", two]).split()[0])
        assert abs(taken - du) < 0.05 * taken
        df = subprocess.check_output(["df", "-B1", "--output=used,avail,itotal", two], text=True)
        shown = [int(word) for word in df.splitlines()[1].split()]
        assert shown[0] == (used.f_blocks - used.f_bfree) * used.f_frsize
        assert used.f_files - used.f_ffree == empty.f_files - empty.f_ffree + 21
        for path in two.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        after = os.statvfs(one)
        assert after == empty


def _append(path: Path, content: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(content)


def test_a_full_region_keeps_what_it_has_and_can_be_emptied() -> None:
    with new_lab(4 << 20, 2) as lab:
        one, two = lab.paths
        written = 0
        with (one / "big").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                written += file.write(bytes([written % 251]) * 10_000)
        fails(errno.ENOSPC, _append, one / "big", bytes(100_000))
        assert (two / "big").stat().st_size == written
        assert written > 0.9 * (4 << 20)
        fails(errno.ENOSPC, (two / "more").write_bytes, bytes(100_000))
        (two / "more").unlink(missing_ok=True)
        os.truncate(two / "big", 1000)
        (one / "big").unlink()
        (two / "again").write_bytes(bytes(written - 100_000))
        (one / "again").unlink()
        assert os.listdir(two) == []


def test_a_part_of_a_write_that_fits_is_written() -> None:
    with new_lab(1 << 20, 1) as lab:
        path = lab.paths[0] / "file"
        fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        got = os.write(fd, b"x" * (2 << 20))
        os.close(fd)
        assert 500_000 < got < 1 << 20
        assert path.stat().st_size == got
        assert path.read_bytes() == b"x" * got


# --- extended attributes ----------------------------------------------------------------------


def test_attributes_of_every_size(here: Path, there: Path) -> None:
    path, seen = here / "file", there / "file"
    path.write_bytes(b"content")
    for size in (0, 1, 100, 1000, 4096, 20_000, 65_536):
        value = random.Random(size).randbytes(size)
        os.setxattr(path, "user.value", value)
        assert os.getxattr(seen, "user.value") == value
    fails((errno.E2BIG, errno.ENOSPC, errno.ERANGE), os.setxattr, path, "user.large", bytes(65_537))
    assert os.listxattr(seen) == ["user.value"]
    os.removexattr(seen, "user.value")
    assert os.listxattr(path) == []
    assert path.read_bytes() == b"content"


def test_many_attributes(here: Path, there: Path) -> None:
    (here / "dir").mkdir()
    for number in range(200):
        os.setxattr(here / "dir", f"user.{number}", b"v" * number)
    assert sorted(os.listxattr(there / "dir")) == sorted(f"user.{n}" for n in range(200))
    for number in range(200):
        assert os.getxattr(there / "dir", f"user.{number}") == b"v" * number
        os.removexattr(there / "dir", f"user.{number}")
    assert os.listxattr(here / "dir") == []


def test_errors_of_attributes(here: Path) -> None:
    path = here / "file"
    path.touch()
    fails(errno.ENODATA, os.getxattr, path, "user.none")
    fails(errno.ENODATA, os.removexattr, path, "user.none")
    fails(errno.ENODATA, os.setxattr, path, "user.none", b"", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    fails(errno.EEXIST, os.setxattr, path, "user.a", b"2", os.XATTR_CREATE)
    os.setxattr(path, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"3"
    fails(errno.EOPNOTSUPP, os.setxattr, path, "nonsense", b"")
    fails(errno.EOPNOTSUPP, os.setxattr, path, "other.name", b"")
    fails((errno.EOPNOTSUPP, errno.EINVAL), os.setxattr, path, "user.", b"")
    fails(errno.ERANGE, os.setxattr, path, "user." + "n" * 251, b"")
    os.setxattr(path, "user." + "n" * 250, b"longest")
    fails((errno.EOPNOTSUPP, errno.EINVAL), os.setxattr, path, "system.posix_acl_access", b"x")
    os.mkfifo(here / "fifo")
    os.symlink("file", here / "link")
    fails(errno.EPERM, os.setxattr, here / "fifo", "user.a", b"")
    fails(errno.EPERM, lambda: os.setxattr(here / "link", "user.a", b"", follow_symlinks=False))
    os.setxattr(here / "link", "trusted.a", b"1", follow_symlinks=False)
    assert os.listxattr(here / "link", follow_symlinks=False) == ["trusted.a"]


def test_a_buffer_that_is_too_small(here: Path) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(here / "file")
    (here / "file").touch()
    os.setxattr(path, "user.a", b"0123456789")
    small = ctypes.create_string_buffer(5)
    assert libc.getxattr(path, b"user.a", small, 5) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert libc.getxattr(path, b"user.a", None, 0) == 10
    assert libc.listxattr(path, small, 5) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert libc.listxattr(path, None, 0) == 7


def test_namespaces_of_attributes(here: Path, user: Actor, other: Actor) -> None:
    path = here / "file"
    path.touch()
    os.chown(path, USER, GROUP)
    path.chmod(0o644)
    user.setxattr(str(path), "user.a", b"mine")
    fails(errno.EACCES, other.setxattr, str(path), "user.a", b"")
    assert other.getxattr(str(path), "user.a") == b"mine"
    path.chmod(0o600)
    fails(errno.EACCES, other.getxattr, str(path), "user.a")
    os.setxattr(path, "trusted.b", b"secret")
    os.setxattr(path, "security.c", b"open")
    fails(errno.EPERM, user.setxattr, str(path), "trusted.b", b"")
    fails(errno.ENODATA, user.getxattr, str(path), "trusted.b")
    fails(errno.EPERM, user.setxattr, str(path), "security.c", b"")
    assert user.getxattr(str(path), "security.c") == b"open"
    assert sorted(user.listxattr(str(path))) == ["security.c", "user.a"]
    assert sorted(os.listxattr(path)) == ["security.c", "trusted.b", "user.a"]
