"""Where a mount differs from a local file system, as docs/semantics.md says it does."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
from pathlib import Path

from tests.posix.raising import fails
from tests.support.lab import needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]
_libc = ctypes.CDLL(None, use_errno=True)


def test_reading_leaves_the_access_time_alone(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"content")
    os.utime(path, ns=(5, 6))
    assert path.read_bytes() == b"content"
    assert path.stat().st_atime_ns == 5
    folder = here.stat().st_atime_ns
    os.listdir(here)
    assert here.stat().st_atime_ns == folder


def test_only_changes_by_the_own_machine_are_notified(here: Path, there: Path) -> None:
    watch = _libc.inotify_init1(os.O_NONBLOCK)
    assert _libc.inotify_add_watch(watch, os.fsencode(here), 0x100) >= 0  # IN_CREATE
    (there / "theirs").touch()
    assert not select.select([watch], [], [], 0.1)[0]
    (here / "ours").touch()
    assert select.select([watch], [], [], 5)[0]
    assert b"ours" in os.read(watch, 4096)
    os.close(watch)


def test_the_offset_after_an_append_is_as_this_machine_knows_the_file(
    here: Path, there: Path
) -> None:
    """What is written goes to the real end; only lseek(2) right after it may be behind."""
    path = here / "file"
    path.write_bytes(b"")
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    (there / "file").write_bytes(b"theirs")
    os.write(fd, b"ours")
    assert path.read_bytes() == b"theirsours"
    assert os.lseek(fd, 0, os.SEEK_END) == 10
    os.close(fd)


def test_a_name_too_long_for_the_region_is_not_too_long_to_ask_for(here: Path) -> None:
    fails(errno.ENAMETOOLONG, os.stat, here / ("n" * 256))
    assert os.pathconf(here, "PC_NAME_MAX") == 255


def test_changed_flags_of_files_are_refused(here: Path) -> None:
    fd = os.open(here, os.O_RDONLY)
    fails((errno.ENOTTY, errno.ENOSYS), fcntl.ioctl, fd, 0x80086601, bytes(8))  # lsattr
    os.close(fd)
