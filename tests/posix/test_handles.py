"""Files by handle instead of by name, as NFS servers and backup programs open them."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.posix.raising import fails
from tests.support.lab import PATIENCE, needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]
_libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, LARGEST = -100, 128


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def handle_of(path: Path) -> bytes:
    """name_to_handle_at(2)."""
    handle = ctypes.create_string_buffer((LARGEST).to_bytes(4, "little"), 8 + LARGEST)
    mount = ctypes.c_int()
    name = os.fsencode(path)
    _checked(_libc.name_to_handle_at(AT_FDCWD, name, handle, ctypes.byref(mount), 0))
    return handle.raw


def opened(mount: int, handle: bytes, flags: int = os.O_RDONLY) -> int:
    """open_by_handle_at(2)."""
    return _checked(_libc.open_by_handle_at(mount, ctypes.c_char_p(handle), flags))


def forget() -> None:
    """Have the kernel drop what it knows, so that it has to ask for an inode by its number."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


def test_a_file_is_found_by_its_handle(here: Path, there: Path) -> None:
    mount = os.open(here, os.O_RDONLY)
    (here / "file").write_bytes(b"content")
    (here / "dir" / "sub").mkdir(parents=True)
    file, folder = handle_of(here / "file"), handle_of(here / "dir" / "sub")
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: os.rename(there / "file", there / "dir" / "moved"),
        lambda: os.rename(there / "dir", there / "elsewhere"),
    ]
    for change in changes:
        change()
        for drops in (False, True):
            if drops:
                forget()
            fd = opened(mount, file)
            assert os.read(fd, 100) == b"content"
            os.close(fd)
            fd = opened(mount, folder)
            assert os.listdir(fd) == []
            os.close(fd)
    os.close(mount)


def _wait_until_gone(mount: int, handle: bytes) -> None:
    """The kernel tells of a close(2) some time after it, and so of what it has forgotten."""
    end = time.monotonic() + PATIENCE
    with suppress(OSError):
        while time.monotonic() < end:
            forget()
            os.close(opened(mount, handle))
            time.sleep(0.01)


def test_a_handle_of_what_is_gone_is_stale(here: Path, there: Path) -> None:
    mount = os.open(here, os.O_RDONLY)
    for number, place in enumerate((here, there)):
        (here / f"file{number}").write_bytes(b"content")
        (here / f"dir{number}").mkdir()
        handles = [handle_of(here / f"file{number}"), handle_of(here / f"dir{number}")]
        fd = os.open(here / f"file{number}", os.O_RDONLY)
        os.unlink(place / f"file{number}")
        os.rmdir(place / f"dir{number}")
        os.close(fd)
        for one in handles:
            _wait_until_gone(mount, one)
            fails(errno.ESTALE, opened, mount, one)
        (here / f"file{number}").write_bytes(b"another")
        fails(errno.ESTALE, opened, mount, handles[0])
    os.close(mount)
