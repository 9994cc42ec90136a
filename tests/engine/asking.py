"""Helpers of the engine's tests: expect an errno, list names, empty a directory, leave orphans."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem, Handle
from ivshmemfs.errors import FsError
from tests.support.regions import ROOT, put


def fails(code: int, call: Callable[[], object]) -> None:
    """Assert that `call` raises FsError with errno `code`."""
    with pytest.raises(FsError) as caught:
        call()
    assert caught.value.errno == code, os.strerror(caught.value.errno)


def names(fs: Filesystem, ino: int = ROOT_INO) -> list[bytes]:
    """Return the sorted names in a directory, without "." and ".."."""
    found = [name for name, _, _ in fs.readdir(fs.opendir(ino), 0)]
    assert found[:2] == [b".", b".."]
    return sorted(found[2:])


def remove_all(fs: Filesystem, ino: int) -> None:
    """Remove everything below a directory."""
    for name, attr, _ in list(fs.readdir(fs.opendir(ino), 0)):
        if name in (b".", b".."):
            continue
        if stat.S_ISDIR(attr.mode):
            remove_all(fs, attr.ino)
            fs.rmdir(ino, name, ROOT)
        else:
            fs.unlink(ino, name, ROOT)


def release_meanwhile(fs: Filesystem, other: Filesystem, handle: Handle) -> None:
    """Close a file of `other` while `fs` commits: one hint each, too short to be taken over."""
    assert fs._committer.hint.take(fs.peer_id[0])
    other.release(handle)
    fs._committer.hint.give()


def make_careful(fs: Filesystem, other: Filesystem) -> None:
    """Have `other` look up carefully: it meets a file that is gone."""
    gone = put(fs, ROOT_INO, b"gone", b"")
    fs.unlink(ROOT_INO, b"gone", ROOT)
    fails(errno.ESTALE, lambda: other.open(gone.ino, os.O_RDONLY, ROOT))
