"""Making, linking, removing and renaming on one mount, seen by another."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from ivshmemfs.engine import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    ROOT_INO,
    Context,
    Filesystem,
)
from tests.engine.asking import fails, names, remove_all
from tests.support.checks import assert_adds_up, detailed_tree, free_blocks
from tests.support.regions import ROOT, TestRegion, get, put, tree

USER = Context(1000, 100)


# --- making ---------------------------------------------------------------------------------


def test_a_new_filesystem_is_empty(fs: Filesystem) -> None:
    assert names(fs) == []
    attr = fs.getattr(ROOT_INO)
    assert (stat.S_ISDIR(attr.mode), attr.nlink) == (True, 2)


def test_create_is_seen_by_the_other_mount_at_once(fs: Filesystem, other: Filesystem) -> None:
    handle, attr = fs.create(ROOT_INO, b"new", 0o640, os.O_RDWR, USER)
    assert other.lookup(ROOT_INO, b"new") == attr
    assert (attr.mode, attr.nlink, attr.uid, attr.gid, attr.size) == (
        stat.S_IFREG | 0o640, 1, 1000, 100, 0,
    )  # fmt: skip
    assert handle.ino == attr.ino


def test_create_opens_what_exists(fs: Filesystem, other: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"content")
    handle, found = other.create(ROOT_INO, b"file", 0o600, os.O_RDWR, ROOT)
    assert (found.ino, found.mode, found.size) == (attr.ino, attr.mode, 7)
    assert bytes(other.read(handle, 0, 100)) == b"content"


def test_exclusive_create_is_a_lock_between_mounts(fs: Filesystem, other: Filesystem) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    fs.create(ROOT_INO, b"lock", 0o600, flags, ROOT)
    fails(errno.EEXIST, lambda: other.create(ROOT_INO, b"lock", 0o600, flags, ROOT))
    fs.unlink(ROOT_INO, b"lock", ROOT)
    other.create(ROOT_INO, b"lock", 0o600, flags, ROOT)


def test_create_truncates_when_told_to(fs: Filesystem, other: Filesystem) -> None:
    put(fs, ROOT_INO, b"file", b"x" * 5000)
    _, attr = other.create(ROOT_INO, b"file", 0o600, os.O_WRONLY | os.O_TRUNC, ROOT)
    assert (attr.size, fs.lookup(ROOT_INO, b"file").size) == (0, 0)


def test_create_over_a_directory(fs: Filesystem) -> None:
    fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    fails(errno.EISDIR, lambda: fs.create(ROOT_INO, b"dir", 0o600, os.O_RDWR, ROOT))


KINDS = {
    "file": stat.S_IFREG,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "character": stat.S_IFCHR,
    "block": stat.S_IFBLK,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_mknod_of_every_kind(fs: Filesystem, other: Filesystem, kind: int) -> None:
    rdev = os.makedev(8, 1) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    attr = fs.mknod(ROOT_INO, b"node", kind | 0o604, rdev, USER)
    assert (attr.mode, attr.rdev, attr.uid, attr.nlink) == (kind | 0o604, rdev, 1000, 1)
    assert other.getattr(attr.ino) == attr
    fails(errno.EEXIST, lambda: other.mknod(ROOT_INO, b"node", kind | 0o600, 0, ROOT))
    other.unlink(ROOT_INO, b"node", ROOT)
    fails(errno.ESTALE, lambda: fs.getattr(attr.ino))


def test_mknod_makes_no_directories(fs: Filesystem) -> None:
    fails(errno.EINVAL, lambda: fs.mknod(ROOT_INO, b"dir", stat.S_IFDIR | 0o755, 0, ROOT))


def test_mkdir_and_rmdir_count_links(fs: Filesystem, other: Filesystem) -> None:
    made = fs.mkdir(ROOT_INO, b"dir", 0o750, USER)
    assert (made.mode, made.nlink) == (stat.S_IFDIR | 0o750, 2)
    assert other.getattr(ROOT_INO).nlink == 3
    other.mkdir(made.ino, b"sub", 0o755, ROOT)
    assert fs.getattr(made.ino).nlink == 3
    assert fs.lookup(made.ino, b"..").ino == ROOT_INO
    fails(errno.ENOTEMPTY, lambda: fs.rmdir(ROOT_INO, b"dir", ROOT))
    fs.rmdir(made.ino, b"sub", ROOT)
    other.rmdir(ROOT_INO, b"dir", ROOT)
    assert fs.getattr(ROOT_INO).nlink == 2
    fails(errno.ENOENT, lambda: fs.lookup(ROOT_INO, b"dir"))


def test_set_group_id_directories_hand_down(fs: Filesystem) -> None:
    made = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    fs.setattr(made.ino, ROOT, mode=0o2775, gid=77)
    inner = fs.mkdir(made.ino, b"inner", 0o755, USER)
    assert (inner.gid, inner.mode & stat.S_ISGID) == (77, stat.S_ISGID)
    _, file = fs.create(made.ino, b"file", 0o644, os.O_RDWR, USER)
    assert (file.gid, file.mode & stat.S_ISGID) == (77, 0)


@pytest.mark.parametrize("length", [1, 100, 832, 833, 1024, 4095])
def test_symlinks_of_every_length(fs: Filesystem, other: Filesystem, length: int) -> None:
    target = (b"/target" * 600)[:length]
    attr = fs.symlink(ROOT_INO, b"link", target, USER)
    assert (attr.size, stat.S_ISLNK(attr.mode)) == (length, True)
    assert other.readlink(attr.ino) == target
    fails(errno.EEXIST, lambda: other.symlink(ROOT_INO, b"link", b"x", ROOT))
    other.unlink(ROOT_INO, b"link", ROOT)
    assert names(fs) == []


def test_symlink_limits(fs: Filesystem) -> None:
    fails(errno.ENAMETOOLONG, lambda: fs.symlink(ROOT_INO, b"link", b"x" * 4096, ROOT))
    fails(errno.ENOENT, lambda: fs.symlink(ROOT_INO, b"link", b"", ROOT))
    attr = put(fs, ROOT_INO, b"file", b"")
    fails(errno.EINVAL, lambda: fs.readlink(attr.ino))


def test_linking_over_a_name_replaces_it(fs: Filesystem, other: Filesystem) -> None:
    old = put(fs, ROOT_INO, b"name", b"old" * 1000)
    fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    open_there = other.open(old.ino, os.O_RDONLY, ROOT)
    handle, new = fs.tmpfile(ROOT_INO, 0o600, os.O_WRONLY, ROOT)
    fs.write(handle, 0, b"new")
    fails(errno.EEXIST, lambda: fs.link(new.ino, ROOT_INO, b"name", ROOT))
    fails(errno.EISDIR, lambda: fs.link(new.ino, ROOT_INO, b"dir", ROOT, over=True))
    assert fs.link(new.ino, ROOT_INO, b"name", ROOT, over=True).nlink == 1
    assert fs.link(new.ino, ROOT_INO, b"name", ROOT, over=True).nlink == 1  # over its own name
    fs.release(handle)
    assert get(other, ROOT_INO, b"name") == b"new"
    assert bytes(other.read(open_there, 0, 3)) == b"old"
    other.release(open_there)
    for mount in (fs, other):
        assert fs.link(put(fs, ROOT_INO, b"b", b"b").ino, ROOT_INO, b"name", ROOT, over=True)
        assert mount.lookup(ROOT_INO, b"name").nlink == 2
        mount.unlink(ROOT_INO, b"b", ROOT)
        assert get(mount, ROOT_INO, b"name") == b"b"
    assert fs.view().root.record.orphans == 0
    assert_adds_up(fs)


def test_what_is_made_without_a_name(fs: Filesystem, other: Filesystem) -> None:
    made = fs.make_nameless(ROOT_INO, stat.S_IFLNK | 0o777, os.O_RDWR, ROOT, target=b"to" * 900)
    fifo = fs.make_nameless(ROOT_INO, stat.S_IFIFO | 0o640, os.O_RDWR, ROOT)
    node = fs.make_nameless(ROOT_INO, stat.S_IFCHR | 0o600, os.O_RDWR, ROOT, rdev=0x103)
    assert names(other) == []
    fs.link(made[1].ino, ROOT_INO, b"link", ROOT)
    fs.link(node[1].ino, ROOT_INO, b"node", ROOT)
    for handle, _ in (made, fifo, node):
        fs.release(handle)
    assert names(other) == [b"link", b"node"]
    assert other.readlink(made[1].ino) == b"to" * 900
    assert other.lookup(ROOT_INO, b"node").rdev == 0x103
    assert fs.view().root.record.orphans == 0
    fails(
        errno.ENAMETOOLONG,
        lambda: fs.make_nameless(ROOT_INO, stat.S_IFLNK, os.O_RDWR, ROOT, target=b"t" * 4096),
    )
    assert_adds_up(fs)


def test_link(fs: Filesystem, other: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"one", b"shared")
    folder = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    linked = other.link(attr.ino, folder.ino, b"two", ROOT)
    assert (linked.ino, linked.nlink) == (attr.ino, 2)
    assert fs.getattr(attr.ino).nlink == 2
    fails(errno.EEXIST, lambda: fs.link(attr.ino, folder.ino, b"two", ROOT))
    fails(errno.EPERM, lambda: fs.link(folder.ino, ROOT_INO, b"dir2", ROOT))
    fs.unlink(ROOT_INO, b"one", ROOT)
    assert get(other, folder.ino, b"two") == b"shared"
    assert other.getattr(attr.ino).nlink == 1
    other.unlink(folder.ino, b"two", ROOT)
    fails(errno.ESTALE, lambda: fs.getattr(attr.ino))
    fails(errno.ESTALE, lambda: fs.link(attr.ino, ROOT_INO, b"again", ROOT))


BAD_NAMES = {
    "empty": (b"", errno.EINVAL),
    "dot": (b".", errno.EINVAL),
    "dotdot": (b"..", errno.EINVAL),
    "slash": (b"a/b", errno.EINVAL),
    "nul": (b"a\0b", errno.EINVAL),
    "long": (b"n" * 256, errno.ENAMETOOLONG),
}


@pytest.mark.parametrize(("name", "code"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_impossible_names_are_refused_everywhere(fs: Filesystem, name: bytes, code: int) -> None:
    attr = put(fs, ROOT_INO, b"file", b"x")
    before = tree(fs)
    fails(code, lambda: fs.create(ROOT_INO, name, 0o600, os.O_RDWR, ROOT))
    fails(code, lambda: fs.mkdir(ROOT_INO, name, 0o755, ROOT))
    fails(code, lambda: fs.mknod(ROOT_INO, name, stat.S_IFREG | 0o600, 0, ROOT))
    fails(code, lambda: fs.symlink(ROOT_INO, name, b"x", ROOT))
    fails(code, lambda: fs.link(attr.ino, ROOT_INO, name, ROOT))
    fails(code, lambda: fs.rename(ROOT_INO, b"file", ROOT_INO, name, 0, ROOT))
    assert tree(fs) == before


def test_looking_up_what_is_not_there(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"x")
    fails(errno.ENOENT, lambda: fs.lookup(ROOT_INO, b"nothing"))
    fails(errno.ENAMETOOLONG, lambda: fs.lookup(ROOT_INO, b"n" * 256))
    fails(errno.ENOTDIR, lambda: fs.lookup(attr.ino, b"x"))
    fails(errno.ENOENT, lambda: fs.lookup(999, b"x"))
    fails(errno.ESTALE, lambda: fs.getattr(0))
    fails(errno.ESTALE, lambda: fs.getattr((1 << 56) + 5))
    fails(errno.ENOTDIR, lambda: fs.opendir(attr.ino))
    fails(errno.EISDIR, lambda: fs.open(ROOT_INO, os.O_RDONLY, ROOT))


def test_removing_the_wrong_kind(fs: Filesystem) -> None:
    put(fs, ROOT_INO, b"file", b"x")
    fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    fails(errno.EISDIR, lambda: fs.unlink(ROOT_INO, b"dir", ROOT))
    fails(errno.ENOTDIR, lambda: fs.rmdir(ROOT_INO, b"file", ROOT))
    fails(errno.ENOENT, lambda: fs.unlink(ROOT_INO, b"none", ROOT))
    fails(errno.ENOENT, lambda: fs.rmdir(ROOT_INO, b"none", ROOT))
    fails(errno.EINVAL, lambda: fs.rmdir(ROOT_INO, b".", ROOT))
    assert names(fs) == [b"dir", b"file"]


def test_names_in_a_removed_directory(fs: Filesystem, other: Filesystem) -> None:
    made = fs.mkdir(ROOT_INO, b"dir", 0o755, ROOT)
    reading = fs.opendir(made.ino)
    other.rmdir(ROOT_INO, b"dir", ROOT)
    assert list(fs.readdir(reading, 0)) == []
    fails(errno.ENOENT, lambda: fs.create(made.ino, b"file", 0o600, os.O_RDWR, ROOT))
    fails(errno.ENOENT, lambda: fs.mkdir(made.ino, b"sub", 0o755, ROOT))


# --- renaming -------------------------------------------------------------------------------

THINGS = ("file", "dir", "full", "link", "none")


def make_thing(fs: Filesystem, parent: int, name: bytes, thing: str) -> None:
    if thing == "file":
        put(fs, parent, name, name * 3)
    elif thing == "link":
        fs.symlink(parent, name, b"to-" + name, ROOT)
    elif thing != "none":
        made = fs.mkdir(parent, name, 0o755, ROOT)
        if thing == "full":
            put(fs, made.ino, b"inside", name)


def expected_rename(source: str, target: str, flags: int) -> int:
    """Return the errno of rename(2), 0 for success."""
    if source == "none":
        return errno.ENOENT
    if flags == RENAME_EXCHANGE:
        return errno.ENOENT if target == "none" else 0
    if target == "none":
        return 0
    if flags == RENAME_NOREPLACE:
        return errno.EEXIST
    folders = ("dir", "full")
    if source in folders and target not in folders:
        return errno.ENOTDIR
    if source not in folders and target in folders:
        return errno.EISDIR
    return errno.ENOTEMPTY if target == "full" else 0


@pytest.mark.parametrize("across", [False, True], ids=["within", "across"])
@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE, RENAME_EXCHANGE])
def test_rename_matrix(flags: int, across: bool, made: TestRegion) -> None:
    fs, other = made.mount(), made.mount()
    for source in THINGS:
        for target in THINGS:
            one = fs.mkdir(ROOT_INO, b"one", 0o755, ROOT).ino
            two = fs.mkdir(ROOT_INO, b"two", 0o755, ROOT).ino if across else one
            make_thing(fs, one, b"a", source)
            make_thing(fs, two, b"b", target)
            before = detailed_tree(other)
            a = detailed_tree(fs, one).get(b"a")
            b = detailed_tree(fs, two).get(b"b")
            code = expected_rename(source, target, flags)
            if code:
                fails(code, lambda: fs.rename(one, b"a", two, b"b", flags, ROOT))  # noqa: B023
                assert detailed_tree(other) == before
            else:
                fs.rename(one, b"a", two, b"b", flags, ROOT)
                assert detailed_tree(other, two).get(b"b") == a
                left = b if flags == RENAME_EXCHANGE else None
                assert detailed_tree(other, one).get(b"a") == left
            for ino in {one, two}:
                found = detailed_tree(fs, ino)
                folders = sum(stat.S_ISDIR(entry[0]) for entry in found.values())
                assert other.getattr(ino).nlink == 2 + folders
                for name, entry in found.items():
                    if stat.S_ISDIR(entry[0]):
                        assert fs.lookup(fs.lookup(ino, name).ino, b"..").ino == ino
            remove_all(fs, ROOT_INO)


def test_rename_to_itself_and_between_links_does_nothing(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"one", b"x")
    fs.link(attr.ino, ROOT_INO, b"two", ROOT)
    for flags in (0, RENAME_EXCHANGE):
        fs.rename(ROOT_INO, b"one", ROOT_INO, b"one", flags, ROOT)
        fs.rename(ROOT_INO, b"one", ROOT_INO, b"two", flags, ROOT)
    assert names(fs) == [b"one", b"two"]
    assert fs.getattr(attr.ino).nlink == 2


@pytest.mark.parametrize("flags", [0, RENAME_EXCHANGE])
def test_a_directory_never_moves_below_itself(fs: Filesystem, flags: int) -> None:
    top = fs.mkdir(ROOT_INO, b"top", 0o755, ROOT).ino
    mid = fs.mkdir(top, b"mid", 0o755, ROOT).ino
    low = fs.mkdir(mid, b"low", 0o755, ROOT).ino
    put(fs, low, b"x", b"")
    before = detailed_tree(fs)
    fails(errno.EINVAL, lambda: fs.rename(ROOT_INO, b"top", low, b"x", flags, ROOT))
    fails(errno.EINVAL, lambda: fs.rename(ROOT_INO, b"top", top, b"mid", flags, ROOT))
    if flags == RENAME_EXCHANGE:
        fails(errno.EINVAL, lambda: fs.rename(mid, b"low", ROOT_INO, b"top", flags, ROOT))
    else:
        fails(errno.ENOTEMPTY, lambda: fs.rename(mid, b"low", ROOT_INO, b"top", flags, ROOT))
    assert detailed_tree(fs) == before


def test_unknown_rename_flags(fs: Filesystem) -> None:
    put(fs, ROOT_INO, b"a", b"x")
    for flags in (3, 6, 7, 8, 16):
        fails(errno.EINVAL, lambda f=flags: fs.rename(ROOT_INO, b"a", ROOT_INO, b"b", f, ROOT))  # type: ignore[misc]


def test_rename_leaves_a_whiteout(fs: Filesystem, other: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"a", b"x").ino
    fs.rename(ROOT_INO, b"a", ROOT_INO, b"b", RENAME_WHITEOUT, ROOT)
    assert other.lookup(ROOT_INO, b"b").ino == ino
    left = other.lookup(ROOT_INO, b"a")
    assert (left.mode, left.rdev, left.nlink) == (stat.S_IFCHR, 0, 1)
    fs.rename(ROOT_INO, b"b", ROOT_INO, b"b", RENAME_WHITEOUT, ROOT)
    assert other.lookup(ROOT_INO, b"b").ino == ino


def test_rename_over_frees_what_was_there(fs: Filesystem, other: Filesystem) -> None:
    put(fs, ROOT_INO, b"a", b"new")
    used = fs.view().root.record.used
    victim = put(fs, ROOT_INO, b"b", b"o" * 6000)
    other.rename(ROOT_INO, b"a", ROOT_INO, b"b", 0, ROOT)
    assert get(fs, ROOT_INO, b"b") == b"new"
    fails(errno.ESTALE, lambda: fs.getattr(victim.ino))
    assert fs.view().root.record.used == used
    assert_adds_up(fs)


# --- attributes -----------------------------------------------------------------------------


def test_setattr(fs: Filesystem, other: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"x")
    changed = other.setattr(attr.ino, ROOT, mode=0o6755, uid=5, gid=6, atime_ns=7, mtime_ns=-8)
    assert (changed.mode, changed.uid, changed.gid) == (stat.S_IFREG | 0o6755, 5, 6)
    assert (changed.atime_ns, changed.mtime_ns) == (7, -8)
    assert changed.ctime_ns >= attr.ctime_ns
    assert fs.getattr(attr.ino) == changed
    fails(errno.ESTALE, lambda: fs.setattr(12345, ROOT, mode=0o600))


def test_writing_as_a_user_drops_privileges(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"x")
    fs.setattr(attr.ino, ROOT, mode=0o6755)
    handle = fs.open(attr.ino, os.O_WRONLY, USER)
    fs.write(handle, 0, b"y")
    assert fs.getattr(attr.ino).mode == stat.S_IFREG | 0o755
    fs.setattr(attr.ino, ROOT, mode=0o6755)
    fs.setattr(attr.ino, USER, size=0)
    assert fs.getattr(attr.ino).mode == stat.S_IFREG | 0o755


def test_resizing_the_wrong_kind(fs: Filesystem) -> None:
    fails(errno.EISDIR, lambda: fs.setattr(ROOT_INO, ROOT, size=0))
    link = fs.symlink(ROOT_INO, b"link", b"to", ROOT)
    fails(errno.EINVAL, lambda: fs.setattr(link.ino, ROOT, size=0))
    attr = put(fs, ROOT_INO, b"file", b"x")
    fails(errno.EINVAL, lambda: fs.setattr(attr.ino, ROOT, size=-1))


def test_a_refused_operation_leaves_no_claims(fs: Filesystem) -> None:
    put(fs, ROOT_INO, b"file", b"x")
    free = free_blocks(fs)
    fails(errno.EEXIST, lambda: fs.mkdir(ROOT_INO, b"file", 0o755, ROOT))
    fails(errno.ENOENT, lambda: fs.unlink(ROOT_INO, b"none", ROOT))
    fails(errno.ENOENT, lambda: fs.rename(ROOT_INO, b"none", ROOT_INO, b"x", 0, ROOT))
    assert free_blocks(fs) == free


def test_which_names_an_inode_bears_at_one_moment(fs: Filesystem, other: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"a", b"").ino
    folder = fs.mkdir(ROOT_INO, b"folder", 0o755, ROOT).ino
    one, two = (ROOT_INO, b"a"), (folder, b"b")
    assert not other.names_lead_to(ino, (one, two))
    fs.link(ino, *two, ROOT)
    assert other.names_lead_to(ino, (one, two))
    assert not other.names_lead_to(folder, (one, two))
    fs.rename(*two, ROOT_INO, b"c", 0, ROOT)
    assert not other.names_lead_to(ino, (one, two))
    assert not other.names_lead_to(ino, ((ino, b"in a file"), one))
    assert not other.names_lead_to(ino, ((ino + 1000, b"in what is gone"), one))
