"""What callers get for an inode that is removed between its look-up and its use."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from ivshmemfs.engine import NOW, ROOT_INO, Context, Filesystem, lifetimes
from tests.engine.asking import fails
from tests.support.checks import assert_adds_up
from tests.support.regions import ROOT, put

USER = Context(1000, 100)
CAPABILITY = b"security.capability"


def test_what_this_mount_removed_is_remembered_until_it_is_forgotten(fs: Filesystem) -> None:
    made = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    file = put(fs, ROOT_INO, b"file", b"content")
    fs.rmdir(ROOT_INO, b"dir", ROOT)
    fs.unlink(ROOT_INO, b"file", ROOT)
    for attr in (made, file):
        found = fs.getattr(attr.ino)
        assert (found.mode, found.nlink, found.size > 0) == (attr.mode, 0, attr.size > 0)
        changed = fs.setattr(attr.ino, ROOT, mode=0o700, uid=7, mtime_ns=5)
        assert changed == fs.getattr(attr.ino)
        assert (stat.S_IMODE(changed.mode), changed.uid, changed.mtime_ns) == (0o700, 7, 5)
        fs.forget(attr.ino)
        fails(errno.ESTALE, lambda ino=attr.ino: fs.getattr(ino))  # type: ignore[misc]
        fails(errno.ESTALE, lambda ino=attr.ino: fs.setattr(ino, ROOT, mode=0))  # type: ignore[misc]
    assert_adds_up(fs)


def test_a_removed_directory_can_still_be_read(fs: Filesystem) -> None:
    made = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    fs.rmdir(ROOT_INO, b"dir", ROOT)
    assert list(fs.readdir(fs.opendir(made.ino), 0)) == []
    fails(errno.ENOENT, lambda: fs.mkdir(made.ino, b"sub", 0o755, ROOT))
    fs.forget(made.ino)
    fails(errno.ESTALE, lambda: fs.opendir(made.ino))


def test_a_file_that_another_mount_removed_is_stale(fs: Filesystem, other: Filesystem) -> None:
    made = put(fs, ROOT_INO, b"file", b"content")
    other.unlink(ROOT_INO, b"file", ROOT)
    fails(errno.ESTALE, lambda: fs.getattr(made.ino))
    fails(errno.ESTALE, lambda: fs.open(made.ino, os.O_RDONLY, ROOT))


@pytest.mark.parametrize("found", ["made", "looked up", "listed"])
def test_a_directory_that_another_mount_removed(
    fs: Filesystem, other: Filesystem, found: str
) -> None:
    """A caller that has looked it up sees it empty and without links, not ESTALE."""
    maker = fs if found == "made" else other
    made = maker.mkdir(ROOT_INO, b"dir", 0o750, ROOT)
    if found == "looked up":
        assert fs.lookup(ROOT_INO, b"dir") == made
    elif found == "listed":
        assert b"dir" in [name for name, _, _ in fs.readdir(fs.opendir(ROOT_INO), 0)]
    other.rmdir(ROOT_INO, b"dir", ROOT)
    assert (fs.getattr(made.ino).nlink, fs.getattr(made.ino).mode) == (0, made.mode)
    assert list(fs.readdir(fs.opendir(made.ino), 0)) == []
    assert fs.listxattr(made.ino) == []
    fails(errno.ENODATA, lambda: fs.getxattr(made.ino, b"user.a"))
    fails(errno.ENOENT, lambda: fs.lookup(made.ino, b"name"))
    fails(errno.ENOENT, lambda: fs.mkdir(made.ino, b"sub", 0o755, ROOT))
    fs.forget(made.ino)
    fails(errno.ESTALE, lambda: fs.getattr(made.ino))


def test_ghosts_are_few(fs: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetimes, "GHOSTS", 3)
    monkeypatch.setattr(lifetimes, "FOLDERS", 1)
    attrs = []
    for _ in range(5):
        attrs.append(fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT))
        fs.rmdir(ROOT_INO, b"dir", ROOT)
    for attr in attrs[:2]:
        fails(errno.ESTALE, lambda ino=attr.ino: fs.getattr(ino))  # type: ignore[misc]
    assert fs.getattr(attrs[4].ino).nlink == 0


def test_the_second_walk_of_a_path_cannot_fail(
    fs: Filesystem, other: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an ESTALE, a looked-up file exists until it is opened, also if its name is replaced."""
    attr = put(fs, ROOT_INO, b"file", b"one")
    put(other, ROOT_INO, b"file2", b"two")
    assert fs.lookup(ROOT_INO, b"file").ino == attr.ino
    other.rename(ROOT_INO, b"file2", ROOT_INO, b"file", 0, ROOT)
    fails(errno.ESTALE, lambda: fs.open(attr.ino, os.O_RDONLY, ROOT))

    again = fs.lookup(ROOT_INO, b"file")
    put(other, ROOT_INO, b"file3", b"three")
    other.rename(ROOT_INO, b"file3", ROOT_INO, b"file", 0, ROOT)
    handle = fs.open(again.ino, os.O_RDONLY, ROOT)
    assert bytes(fs.read(handle, 0, 10)) == b"two"
    fs.release(handle)

    monkeypatch.setattr("time.monotonic", lambda: float(10**9))
    fs.tick()  # the pin's time is over, and the file is freed
    fails(errno.ESTALE, lambda: fs.getattr(again.ino))
    other.unlink(ROOT_INO, b"file", ROOT)
    assert_adds_up(fs)


# --- permissions of what another machine has just made -------------------------------------------


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "flags", "folder", "allowed"),
    [
        (0o600, 1000, 100, os.O_RDWR, 0o777, True),
        (0o600, 1000, 100, os.O_RDWR, 0o1777, True),
        (0o400, 1000, 100, os.O_WRONLY, 0o777, False),
        (0o600, 5, 100, os.O_RDONLY, 0o777, False),
        (0o060, 5, 100, os.O_RDWR, 0o777, True),
        (0o606, 5, 100, os.O_RDONLY, 0o777, False),
        (0o666, 5, 6, os.O_RDWR, 0o777, True),
        (0o666, 5, 6, os.O_RDWR, 0o1777, False),
        (0o606, 5, 6, os.O_RDWR, 0o777, False),  # the caller may be in group 6
        (0o644, 5, 6, os.O_RDONLY, 0o777, True),
        (0o644, 5, 6, os.O_RDONLY | os.O_TRUNC, 0o777, False),
    ],
)
def test_creating_what_somebody_has_just_created(
    fs: Filesystem, mode: int, uid: int, gid: int, flags: int, folder: int, allowed: bool
) -> None:
    made = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    fs.setattr(made.ino, ROOT, mode=folder)
    attr = put(fs, made.ino, b"file", b"content")
    fs.setattr(attr.ino, ROOT, mode=mode, uid=uid, gid=gid)

    def create() -> None:
        handle, found = fs.create(made.ino, b"file", 0o600, flags, USER)
        assert found.ino == attr.ino
        fs.release(handle)

    if allowed:
        create()
    else:
        fails(errno.ESTALE, create)
        assert fs.getattr(attr.ino).size == 7
    fs.release(fs.create(made.ino, b"file", 0o600, flags, ROOT)[0])


def test_creating_where_a_symbolic_link_has_just_appeared(fs: Filesystem) -> None:
    fs.symlink(ROOT_INO, b"link", b"target", ROOT)
    fails(errno.ESTALE, lambda: fs.create(ROOT_INO, b"link", 0o600, os.O_RDWR, ROOT))


# --- attributes at their limits -------------------------------------------------------------------


def test_times_at_their_limits(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"")
    for moment in (-1, 0, -(1 << 63), (1 << 63) - 1):
        assert fs.setattr(attr.ino, ROOT, atime_ns=moment).atime_ns == moment
    assert fs.setattr(attr.ino, ROOT, mtime_ns=1 << 90).mtime_ns == (1 << 63) - 1
    assert fs.setattr(attr.ino, ROOT, mtime_ns=-(1 << 90)).mtime_ns == -(1 << 63)
    now = fs.setattr(attr.ino, ROOT, mtime_ns=NOW)
    assert now.mtime_ns == now.ctime_ns


def test_capabilities_go_with_every_change_of_contents_or_owner(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"content")
    handle = fs.open(attr.ino, os.O_RDWR, ROOT)
    for change in (
        lambda: fs.write(handle, 0, b"x"),
        lambda: fs.setattr(attr.ino, ROOT, size=3),
        lambda: fs.setattr(attr.ino, ROOT, uid=3),
        lambda: fs.setattr(attr.ino, ROOT, gid=3),
    ):
        fs.setxattr(attr.ino, CAPABILITY, b"c", 0, ROOT)
        fs.setxattr(attr.ino, b"user.kept", b"k", 0, ROOT)
        change()
        assert fs.listxattr(attr.ino) == [b"user.kept"]
    fs.setxattr(attr.ino, CAPABILITY, b"c", 0, ROOT)
    fs.setattr(attr.ino, ROOT, mode=0o755, mtime_ns=5)
    assert fs.getxattr(attr.ino, CAPABILITY) == b"c"
    fs.release(handle)


def test_trusted_attributes_are_for_root(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"")
    fs.setxattr(attr.ino, b"trusted.a", b"", 0, ROOT)
    fs.setxattr(attr.ino, b"user.b", b"", 0, ROOT)
    assert fs.listxattr(attr.ino, USER) == [b"user.b"]
    assert fs.listxattr(attr.ino, ROOT) == [b"trusted.a", b"user.b"]
    fails(errno.EINVAL, lambda: fs.setxattr(attr.ino, b"user.", b"", 0, ROOT))
