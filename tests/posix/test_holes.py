"""Holes, room asked for, files without a name, birth times, and what a single write knows."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.posix.actor import Actor
from tests.posix.raising import fails
from tests.support.lab import KERNEL, Lab, needs_fuse, needs_root, new_lab

pytestmark = needs_fuse

BLOCK = 4096
KEEP, PUNCH, COLLAPSE, ZERO = 1, 2, 8, 16
_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which the library has under that name."""
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def name_it(fd: int, path: Path) -> None:
    """Give an open file a name, as linkat(2) with AT_SYMLINK_FOLLOW does."""
    old, here = f"/proc/self/fd/{fd}".encode(), -100
    if _libc.linkat(here, old, here, os.fsencode(path), 0x400):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def extents(fd: int) -> list[tuple[int, int]]:
    """Where data is, as SEEK_DATA and SEEK_HOLE tell it."""
    found: list[tuple[int, int]] = []
    at = 0
    while True:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return found
        at = os.lseek(fd, start, os.SEEK_HOLE)
        assert at > start
        found.append((start, at))


@pytest.fixture
def fd(here: Path) -> Iterator[int]:
    descriptor = os.open(here / "file", os.O_CREAT | os.O_RDWR)
    yield descriptor
    os.close(descriptor)


# --- where they are ---------------------------------------------------------------------------


def test_data_and_holes_of_a_sparse_file(fd: int, there: Path) -> None:
    for start in (3, 500, 70_000, 70_001):
        os.pwrite(fd, b"x" * BLOCK, start * BLOCK)
    os.truncate(fd, 80_000 * BLOCK)
    expected = [(s * BLOCK, e * BLOCK) for s, e in ((3, 4), (500, 501), (70_000, 70_002))]
    assert extents(fd) == expected
    other = os.open(there / "file", os.O_RDONLY)
    assert extents(other) == expected
    os.close(other)
    assert os.lseek(fd, 3 * BLOCK + 5, os.SEEK_DATA) == 3 * BLOCK + 5
    assert os.lseek(fd, 5 * BLOCK + 5, os.SEEK_HOLE) == 5 * BLOCK + 5
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        fails(errno.ENXIO, os.lseek, fd, 80_000 * BLOCK, whence)


def test_a_full_file_has_its_only_hole_at_the_end(fd: int) -> None:
    os.pwrite(fd, os.urandom(3 << 20), 0)
    assert extents(fd) == [(0, 3 << 20)]
    os.pwrite(fd, b"x", 3 << 20)
    assert os.lseek(fd, 7, os.SEEK_HOLE) == (3 << 20) + 1


def test_small_and_empty_files(fd: int) -> None:
    assert extents(fd) == []
    os.pwrite(fd, b"small", 0)
    assert extents(fd) == [(0, 5)]
    os.truncate(fd, 0)
    os.truncate(fd, 1 << 30)
    assert extents(fd) == []
    assert os.lseek(fd, 5, os.SEEK_HOLE) == 5


# --- making and filling them ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_against_a_model(fd: int, there: Path, seed: int) -> None:
    chance, model = random.Random(seed), bytearray()
    limit = 40 * BLOCK if seed % 2 else 3 * BLOCK
    for _ in range(120):
        offset = chance.randrange(limit)
        length = chance.choice((1, 100, BLOCK, 5 * BLOCK, chance.randrange(1, limit)))
        end = offset + length
        mode = chance.choice((None, 0, KEEP, PUNCH | KEEP, ZERO, ZERO | KEEP))
        if mode is None:
            content = chance.randbytes(length)
            os.pwrite(fd, content, offset)
        else:
            fallocate(fd, mode, offset, length)
            content = bytes(length) if mode & (PUNCH | ZERO) else bytes(model[offset:end])
            content = content.ljust(length, b"\0")
        if mode is None or not mode & KEEP:
            model.extend(bytes(max(end - len(model), 0)))
        content = content[: max(len(model) - offset, 0)]
        model[offset : offset + len(content)] = content
        assert (there / "file").read_bytes() == model, (mode, offset, length)
        for start, stop in zip(
            [0, *(end for _, end in extents(fd))],
            [*(start for start, _ in extents(fd)), len(model)],
            strict=True,
        ):
            assert not any(model[start:stop]), "a hole that is not zero"


def test_what_is_punched_is_given_back(fd: int, here: Path) -> None:
    os.pwrite(fd, os.urandom(1 << 20), 0)
    full, free = os.fstat(fd).st_blocks, os.statvfs(here).f_bfree
    fallocate(fd, PUNCH | KEEP, 100, (1 << 20) - 200)
    assert os.fstat(fd).st_blocks <= full - 254 * BLOCK // 512
    assert os.statvfs(here).f_bfree >= free + 253
    assert os.fstat(fd).st_size == 1 << 20
    fallocate(fd, PUNCH | KEEP, 0, 1 << 30)
    assert extents(fd) == []
    assert os.fstat(fd).st_size == 1 << 20


def test_room_that_was_asked_for_is_taken(fd: int, here: Path) -> None:
    os.pwrite(fd, b"kept", 0)
    free = os.statvfs(here).f_bavail
    fallocate(fd, 0, 0, 5 << 20)
    assert os.fstat(fd).st_size == 5 << 20
    assert os.fstat(fd).st_blocks * 512 >= 5 << 20
    assert free - os.statvfs(here).f_bavail >= (5 << 20) // BLOCK - 1
    assert os.pread(fd, 6, 0) == b"kept\0\0"
    before = os.fstat(fd).st_blocks
    fallocate(fd, 0, 0, 5 << 20)
    assert os.fstat(fd).st_blocks == before


def test_more_room_than_there_is(fd: int, here: Path) -> None:
    before = os.statvfs(here)
    fails(errno.ENOSPC, fallocate, fd, 0, 0, 10 << 30)
    assert os.fstat(fd).st_size == 0
    assert os.statvfs(here).f_bfree == before.f_bfree


def test_what_is_refused(fd: int, here: Path) -> None:
    for mode in (PUNCH, COLLAPSE, PUNCH | ZERO | KEEP, 32, 64):
        fails(errno.EOPNOTSUPP, fallocate, fd, mode, 0, BLOCK)
    fails(errno.EINVAL, fallocate, fd, 0, 0, 0)
    fails(errno.EFBIG, fallocate, fd, 0, 1 << 62, 1 << 61)
    reader = os.open(here / "file", os.O_RDONLY)
    fails(errno.EBADF, fallocate, reader, 0, 0, 1)
    os.close(reader)


# --- files without a name ---------------------------------------------------------------------


def test_a_file_without_a_name_gets_one(here: Path, there: Path) -> None:
    fd = os.open(here, os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"content")
    assert os.listdir(there) == []
    assert os.fstat(fd).st_nlink == 0
    name_it(fd, here / "name")
    assert os.fstat(fd).st_nlink == 1
    os.close(fd)
    assert (there / "name").read_bytes() == b"content"
    assert (there / "name").stat().st_mode & 0o777 == 0o640


def test_a_file_without_a_name_goes_with_its_last_handle(here: Path) -> None:
    before = os.statvfs(here).f_bfree
    fd = os.open(here, os.O_TMPFILE | os.O_RDWR | os.O_EXCL)
    os.write(fd, os.urandom(1 << 20))
    assert os.statvfs(here).f_bfree < before
    fails(errno.ENOENT, name_it, fd, here / "name")
    os.close(fd)
    end = time.monotonic() + 10
    while os.statvfs(here).f_bfree != before and time.monotonic() < end:
        time.sleep(0.05)  # the kernel closes behind close(2)
    assert os.statvfs(here).f_bfree == before


def test_what_was_removed_does_not_come_back(here: Path) -> None:
    fd = os.open(here / "file", os.O_CREAT | os.O_RDWR)
    os.unlink(here / "file")
    fails(errno.ENOENT, name_it, fd, here / "again")
    os.close(fd)


@pytest.mark.slow
def test_a_file_without_a_name_on_a_machine_that_dies() -> None:
    with new_lab(16 << 20, 2) as lab:
        before = os.statvfs(lab.paths[1]).f_bfree
        fd = os.open(lab.paths[0], os.O_TMPFILE | os.O_RDWR)
        os.write(fd, os.urandom(1 << 20))
        lab.kill(0)
        with suppress(OSError):
            os.close(fd)
        end = time.monotonic() + 30
        while os.statvfs(lab.paths[1]).f_bfree != before and time.monotonic() < end:
            time.sleep(0.1)
        assert os.statvfs(lab.paths[1]).f_bfree == before


# --- the rest ---------------------------------------------------------------------------------


@pytest.mark.skipif(KERNEL < (6, 6), reason="older kernels do not ask for it")
def test_birth_times(here: Path, there: Path) -> None:
    path = here / "file"
    path.touch()
    asked = ["stat", "-c", "%W %s %a %h %u %g %t", str(there / "file")]
    first = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    assert abs(int(first[0]) - time.time()) < 60
    os.utime(path, ns=(5, 6))
    path.chmod(0o600)
    path.write_bytes(b"12345")
    again = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    assert again == [first[0], "5", "600", "1", first[4], first[5], "0"]


def test_appending_is_decided_with_each_write(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    os.pwrite(fd, b"x", 0)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    os.write(fd, b"y")
    os.close(fd)
    assert path.read_bytes() == b"x123456789y"


@needs_root
def test_set_user_id_goes_with_who_writes(here: Path, user: Actor) -> None:
    path = here / "file"
    for opened_by_root in (True, False):
        path.write_bytes(b"")
        path.chmod(0o6777)
        fd = os.open(path, os.O_RDWR)
        if opened_by_root:
            child = os.fork()
            if not child:
                os.setuid(65533)
                os.write(fd, b"x")
                os._exit(0)
            os.waitpid(child, 0)
        else:
            os.write(fd, b"x")
        os.close(fd)
        assert path.stat().st_mode & 0o6000 == (0 if opened_by_root else 0o6000)


def test_a_lab_is_clean(lab: Lab) -> None:
    """So far: the rest of the check comes when the mounts of this module end."""
    assert all(mount.alive for mount in lab.mounts)


def test_a_hole_of_a_terabyte_holds_up_nobody(here: Path, there: Path) -> None:
    """Made in holes, in what is full, and filled again; the other calls do not wait for it."""
    path = here / "sparse"
    with path.open("w+b", buffering=0) as file:
        fd = file.fileno()
        os.truncate(path, 1 << 40)
        os.pwrite(fd, b"x", (1 << 40) - 1)
        fallocate(fd, 0, 0, 30 << 20)
        fallocate(fd, PUNCH | KEEP, 0, 1 << 40)
        assert os.fstat(fd).st_blocks == 0
        fails(errno.ENXIO, os.lseek, fd, 0, os.SEEK_DATA)
        fallocate(fd, ZERO | KEEP, 5, 1 << 39)
        os.pwrite(fd, b"y", 1 << 39)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 39
    os.unlink(path)
    assert os.listdir(there) == []


def test_others_are_served_while_a_file_is_filled(here: Path) -> None:
    path, other = here / "filled", here / "other"
    other.write_bytes(b"beside")
    with path.open("w+b", buffering=0) as file:
        filling = threading.Thread(target=fallocate, args=(file.fileno(), 0, 0, 40 << 20))
        filling.start()
        sizes = set()
        while filling.is_alive():
            assert other.read_bytes() == b"beside"
            sizes.add(path.stat().st_size)
        filling.join()
        assert len(sizes) > 3, "nobody else was served before it was full"
        assert path.stat().st_size == 40 << 20
