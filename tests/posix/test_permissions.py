"""Permissions: modes, owners, groups, the sticky bit, set-user-ID and set-group-ID."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.actor import Actor
from tests.posix.conftest import GROUP, OTHER, SECOND_GROUP, USER
from tests.posix.raising import fails
from tests.support.lab import needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def owned(path: Path, uid: int, gid: int, mode: int) -> Path:
    """Give a path an owner and a mode."""
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


# --- files ------------------------------------------------------------------------------------

R, W, X = 4, 2, 1


@pytest.mark.parametrize("digit", range(8))
@pytest.mark.parametrize("who", ["owner", "group", "second group", "others"])
def test_each_class_of_users_has_its_bits(here: Path, there: Path, user: Actor, who: str,
                                          digit: int) -> None:  # fmt: skip
    """Exactly the bits of the first class that applies count, on either mount."""
    uid = USER if who == "owner" else OTHER
    gid = {"group": GROUP, "second group": SECOND_GROUP}.get(who, 0)
    shift = {"owner": 6, "others": 0}.get(who, 3)
    mode = (0o777 & ~(7 << shift)) | digit << shift
    path = here / "file"
    path.write_bytes(b"#!/bin/sh\n")
    owned(path, uid, gid, mode)
    for seen in (path, there / "file"):
        name = str(seen)
        assert user.access(name, os.R_OK) == bool(digit & R)
        assert user.access(name, os.W_OK) == bool(digit & W)
        assert user.access(name, os.X_OK) == bool(digit & X)
        for flags, needed in ((os.O_RDONLY, R), (os.O_WRONLY, W), (os.O_RDWR, R | W)):
            if digit & needed == needed:
                user.can_open(name, flags)
            else:
                fails(errno.EACCES, user.can_open, name, flags)
        if digit & W:
            user.truncate(name, 10)
        else:
            fails(errno.EACCES, user.truncate, name, 5)
            fails(errno.EACCES, user.can_open, name, os.O_RDONLY | os.O_TRUNC)
    assert path.stat().st_size == 10


def test_root_may_everything_but_execute_what_nobody_can(here: Path, root: Actor) -> None:
    path = here / "file"
    path.touch()
    owned(path, USER, GROUP, 0)
    root.can_open(str(path), os.O_RDWR)
    assert not root.access(str(path), os.X_OK)
    path.chmod(0o001)
    assert root.access(str(path), os.X_OK)


def test_a_change_of_mode_elsewhere_counts_at_once(here: Path, there: Path, user: Actor) -> None:
    (here / "file").touch()
    for _ in range(20):
        (there / "file").chmod(0o600)
        fails(errno.EACCES, user.can_open, str(here / "file"), os.O_RDONLY)
        (there / "file").chmod(0o644)
        user.can_open(str(here / "file"), os.O_RDONLY)
    fd = os.open(here / "file", os.O_RDWR)
    (there / "file").chmod(0)
    os.write(fd, b"what is open stays open")
    os.close(fd)


# --- directories ------------------------------------------------------------------------------


@pytest.mark.parametrize("digit", range(8))
def test_what_the_bits_of_a_directory_allow(here: Path, user: Actor, digit: int) -> None:
    folder = here / "dir"
    folder.mkdir()
    for name in ("file", "gone", "moved"):
        (folder / name).touch()
        owned(folder / name, USER, GROUP, 0o666)
    (folder / "sub").mkdir()
    owned(folder, 0, 0, 0o770 | digit)
    may_search, may_write = bool(digit & X), bool(digit & W and digit & X)

    def expect(allowed: bool, call: Callable[..., object], *args: object) -> None:
        if allowed:
            call(*args)
        else:
            fails(errno.EACCES, call, *args)

    expect(bool(digit & R), user.listdir, str(folder))
    expect(may_search, user.stat, f"{folder}/file")
    expect(may_search, user.chdir, str(folder))
    user.chdir("/")
    expect(may_write, user.create_file, f"{folder}/new")
    expect(may_write, user.mkdir, f"{folder}/newdir")
    expect(may_write, user.mkfifo, f"{folder}/newfifo")
    expect(may_write, user.symlink, "to", f"{folder}/newlink")
    expect(may_write, user.unlink, f"{folder}/gone")
    expect(may_write, user.rename, f"{folder}/moved", f"{folder}/there")
    expect(may_write, user.rmdir, f"{folder}/sub")
    if may_write:
        user.link(f"{folder}/new", f"{folder}/new2")
    else:
        user.create_file(f"{here}/own")
        fails(errno.EACCES, user.link, f"{here}/own", f"{folder}/new2")
        fails(errno.EACCES, user.rename, f"{here}/own", f"{folder}/own")


def test_a_directory_that_moves_must_be_writable(here: Path, user: Actor) -> None:
    """Its entry `..` changes."""
    (here / "to").mkdir()
    (here / "to").chmod(0o777)
    (here / "dir").mkdir()
    owned(here / "dir", USER, GROUP, 0o555)
    fails(errno.EACCES, user.rename, f"{here}/dir", f"{here}/to/dir")
    user.rename(f"{here}/dir", f"{here}/dir2")
    (here / "dir2").chmod(0o755)
    user.rename(f"{here}/dir2", f"{here}/to/dir")


def test_search_permission_on_the_way(here: Path, user: Actor) -> None:
    (here / "a" / "b").mkdir(parents=True)
    (here / "a" / "b" / "file").write_bytes(b"x")
    (here / "a").chmod(0o700)
    for call in (user.stat, user.read_file, user.unlink, user.readlink, user.create_file):
        fails(errno.EACCES, call, f"{here}/a/b/file")
    (here / "a").chmod(0o711)
    assert user.read_file(f"{here}/a/b/file") == b"x"
    fails(errno.EACCES, user.listdir, f"{here}/a")


# --- sticky -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "symlink"])
def test_sticky_directories(here: Path, user: Actor, other: Actor, kind: str) -> None:
    """In one, entries go only by their owner, the directory's owner or root."""
    folder = here / "sticky"
    folder.mkdir()
    owned(folder, 0, 0, 0o1777)
    make: dict[str, Callable[[str], object]] = {
        "file": user.create_file,
        "directory": user.mkdir,
        "fifo": user.mkfifo,
        "symlink": lambda path: user.symlink("to", path),
    }
    for name in ("one", "two", "three"):
        make[kind](f"{folder}/{name}")
    remove = "rmdir" if kind == "directory" else "unlink"
    fails(errno.EPERM, getattr(other, remove), f"{folder}/one")
    fails(errno.EPERM, other.rename, f"{folder}/one", f"{folder}/x")
    (other.mkdir if kind == "directory" else other.create_file)(f"{folder}/own")
    fails(errno.EPERM, other.rename, f"{folder}/own", f"{folder}/one")
    getattr(user, remove)(f"{folder}/one")
    owned(folder, OTHER, 0, 0o1777)
    getattr(other, remove)(f"{folder}/two")
    folder.chmod(0o777)
    owned(folder, 0, 0, 0o777)
    getattr(other, remove)(f"{folder}/three")


# --- changing modes and owners ----------------------------------------------------------------


def test_only_the_owner_changes_the_mode(here: Path, user: Actor, other: Actor) -> None:
    path = here / "file"
    path.touch()
    owned(path, USER, GROUP, 0o644)
    fails(errno.EPERM, other.chmod, str(path), 0o666)
    user.chmod(str(path), 0o4711)
    assert mode_of(path) == 0o4711


@pytest.mark.parametrize("mode", [0, 0o111, 0o777, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777])
def test_every_mode_can_be_set(here: Path, there: Path, mode: int) -> None:
    for make in (lambda p: p.touch(), lambda p: p.mkdir(), os.mkfifo):
        path = here / f"it{make}"
        make(path)
        path.chmod(mode)
        assert stat.S_IMODE((there / path.name).stat().st_mode) == mode


def test_set_group_id_is_for_members(here: Path, user: Actor) -> None:
    path = here / "file"
    path.touch()
    owned(path, USER, 0, 0o644)
    user.chmod(str(path), 0o2755)
    assert mode_of(path) == 0o755
    owned(path, USER, SECOND_GROUP, 0o644)
    user.chmod(str(path), 0o2755)
    assert mode_of(path) == 0o2755


def test_who_may_change_owners(here: Path, user: Actor, other: Actor) -> None:
    path = here / "file"
    path.touch()
    owned(path, USER, GROUP, 0o644)
    fails(errno.EPERM, user.chown, str(path), OTHER, -1)
    fails(errno.EPERM, user.chown, str(path), -1, 0)
    fails(errno.EPERM, other.chown, str(path), -1, SECOND_GROUP)
    user.chown(str(path), -1, SECOND_GROUP)
    user.chown(str(path), USER, GROUP)
    assert (path.stat().st_uid, path.stat().st_gid) == (USER, GROUP)


@pytest.mark.parametrize("owner", [(0, 0), (1, 2), (-1, 7), (7, -1), (2**32 - 2, 2**32 - 2)])
def test_every_owner_can_be_set(here: Path, there: Path, owner: tuple[int, int]) -> None:
    for make in (lambda p: p.touch(), lambda p: p.mkdir(), lambda p: os.symlink("x", p)):
        path = here / f"it{make}"
        make(path)
        os.lchown(path, 5, 6)
        os.lchown(path, *owner)
        found = (there / path.name).lstat()
        expected = tuple(new if new >= 0 else old for new, old in zip(owner, (5, 6), strict=True))
        assert (found.st_uid, found.st_gid) == expected


# --- set-user-ID and set-group-ID go ------------------------------------------------------------


def privileged(here: Path, mode: int) -> Path:
    path = here / f"program{mode:o}"
    path.write_bytes(b"0123456789")
    return owned(path, USER, GROUP, mode)


#: Modes of a program, and what is left of them when a user changes it.
SHED = {0o4755: 0o755, 0o6755: 0o755, 0o2755: 0o755, 0o2745: 0o2745, 0o1755: 0o1755}
each_mode = pytest.mark.parametrize(("mode", "left"), SHED.items(), ids=map(oct, SHED))


@each_mode
def test_writing_sheds_privileges(here: Path, user: Actor, mode: int, left: int) -> None:
    path = privileged(here, mode)
    user.write_file(str(path), b"changed")
    assert mode_of(path) == left


@each_mode
@pytest.mark.parametrize("size", [0, 5, 10, 20])
def test_truncating_sheds_privileges(here: Path, user: Actor, mode: int, left: int,
                                     size: int) -> None:  # fmt: skip
    path = privileged(here, mode)
    user.truncate(str(path), size)
    assert mode_of(path) == left


@each_mode
def test_opening_with_truncation_sheds_privileges(
    here: Path, user: Actor, mode: int, left: int
) -> None:
    path = privileged(here, mode)
    user.can_open(str(path), os.O_WRONLY | os.O_TRUNC)
    assert mode_of(path) == left


@pytest.mark.parametrize("mode", [0o2666, 0o6666, 0o3646])
@pytest.mark.parametrize("how", ["write_file", "truncate"])
def test_outsiders_shed_the_group_of_any_file(
    here: Path, user: Actor, other: Actor, mode: int, how: str
) -> None:
    """A set-group-ID without execution survives members of the group, and no others."""
    for number, (actor, gid) in enumerate([(user, GROUP), (user, SECOND_GROUP), (other, GROUP)]):
        path = here / f"file{number}"
        path.write_bytes(b"0123456789")
        owned(path, 1, gid, mode | 0o020)
        getattr(actor, how)(str(path), b"x" if how == "write_file" else 5)
        left = mode & ~stat.S_ISUID & (~stat.S_ISGID if actor is other else -1)
        assert mode_of(path) == left | 0o020


@pytest.mark.parametrize("mode", SHED, ids=oct)
@pytest.mark.parametrize(
    "change",
    [
        lambda fd: os.pwrite(fd, b"changed", 2),
        lambda fd: os.ftruncate(fd, 3),
        lambda fd: os.posix_fallocate(fd, 0, 5000),
    ],
    ids=["write", "truncate", "allocate"],
)
def test_root_keeps_privileges_that_came_after_its_open(
    here: Path, mode: int, change: Callable[[int], object]
) -> None:
    path = privileged(here, 0o644)
    fd = os.open(path, os.O_RDWR)
    try:
        os.fchmod(fd, mode)
        change(fd)
    finally:
        os.close(fd)
    assert mode_of(path) == mode


@each_mode
def test_root_writes_without_shedding(here: Path, root: Actor, mode: int, left: int) -> None:
    path = privileged(here, mode)
    root.write_file(str(path), b"changed")
    root.truncate(str(path), 3)
    assert mode_of(path) == mode


@each_mode
@pytest.mark.parametrize("group", [GROUP, SECOND_GROUP])
def test_a_change_of_group_sheds_privileges(here: Path, user: Actor, mode: int, left: int,
                                            group: int) -> None:  # fmt: skip
    path = privileged(here, mode)
    user.chown(str(path), -1, group)
    assert mode_of(path) == left


@each_mode
def test_a_change_of_owner_by_root_sheds_privileges(here: Path, mode: int, left: int) -> None:
    path = privileged(here, mode)
    os.chown(path, OTHER, -1)
    assert mode_of(path) == left


def test_directories_keep_their_bits(here: Path, user: Actor) -> None:
    folder = here / "dir"
    folder.mkdir()
    owned(folder, USER, GROUP, 0o6777)
    user.chown(str(folder), -1, SECOND_GROUP)
    assert mode_of(folder) == 0o6777


def test_capabilities_of_a_program_go_when_it_changes(here: Path, user: Actor) -> None:
    value = bytes.fromhex("0100000202000000000000000000000000000000")
    changes: list[Callable[[str], object]] = [
        lambda path: user.write_file(path, b"x"),
        lambda path: user.truncate(path, 3),
        lambda path: os.truncate(path, 2),
        lambda path: os.chown(path, USER, GROUP),
        lambda path: Path(path).write_bytes(b"by root"),
    ]
    for number, change in enumerate(changes):
        path = privileged(here, 0o770 + number)
        os.setxattr(path, "security.capability", value)
        assert os.getxattr(path, "security.capability") == value
        change(str(path))
        assert os.listxattr(path) == [], number


# --- what new files get -----------------------------------------------------------------------


def test_umask(here: Path) -> None:
    for mask in (0, 0o022, 0o077, 0o777):
        os.umask(mask)
        path = here / f"{mask:o}"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o6777))
        os.mkdir(f"{path}.d", 0o1777)
        os.mkfifo(f"{path}.f", 0o666)
        os.mknod(f"{path}.n", 0o666 | stat.S_IFREG)
        assert mode_of(path) == 0o6777 & ~mask
        assert mode_of(Path(f"{path}.d")) == 0o1777 & ~mask
        assert mode_of(Path(f"{path}.f")) == 0o666 & ~mask
        assert mode_of(Path(f"{path}.n")) == 0o666 & ~mask


def test_new_files_belong_to_their_maker(here: Path, there: Path, user: Actor) -> None:
    user.create_file(f"{here}/file", 0o640)
    user.mkdir(f"{here}/dir", 0o750)
    user.symlink("to", f"{here}/link")
    user.mkfifo(f"{here}/fifo", 0o600)
    for name in ("file", "dir", "link", "fifo"):
        found = (there / name).lstat()
        assert (found.st_uid, found.st_gid) == (USER, GROUP)


def test_set_group_id_directories_hand_down_their_group(here: Path, user: Actor) -> None:
    folder = here / "dir"
    folder.mkdir()
    owned(folder, 0, SECOND_GROUP, 0o2777)
    user.create_file(f"{folder}/file", 0o2755)
    user.mkdir(f"{folder}/sub", 0o755)
    user.symlink("to", f"{folder}/link")
    user.mkfifo(f"{folder}/fifo", 0o600)
    for name in ("file", "sub", "link", "fifo"):
        assert (folder / name).lstat().st_gid == SECOND_GROUP, name
    assert mode_of(folder / "sub") == 0o2755
    assert mode_of(folder / "file") == 0o2755
    owned(folder, 0, 0, 0o2777)
    user.create_file(f"{folder}/foreign", 0o2755)
    assert mode_of(folder / "foreign") == 0o755
    assert (folder / "foreign").stat().st_gid == 0


def test_device_nodes_are_for_root(here: Path, there: Path, user: Actor) -> None:
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        fails(errno.EPERM, user.mknod, f"{here}/dev", 0o600 | kind, os.makedev(1, 3))
    os.mknod(here / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    found = (there / "null").stat()
    assert stat.S_ISCHR(found.st_mode)
    assert found.st_rdev == os.makedev(1, 3)
    (there / "null").write_bytes(b"goes nowhere")
    assert (there / "null").read_bytes() == b""
    os.mknod(here / "large", 0o600 | stat.S_IFBLK, os.makedev(4095, 1048575))
    assert (there / "large").stat().st_rdev == os.makedev(4095, 1048575)


def test_a_file_that_its_maker_may_not_open(here: Path, user: Actor) -> None:
    """The mode counts from the next open on."""
    user.create_file(f"{here}/file", 0)
    fails(errno.EACCES, user.can_open, f"{here}/file", os.O_RDONLY)


def test_set_user_id_programs_run_where_the_mount_allows_it(here: Path, user: Actor) -> None:
    program = here / "id"
    program.write_bytes(Path("/usr/bin/test").read_bytes())
    owned(program, 0, 0, 0o4755)
    secret = here / "secret"
    secret.mkdir(mode=0o700)
    (secret / "file").touch()
    assert user.run([str(program), "-e", str(secret / "file")]) == 0
    program.chmod(0o755)
    assert user.run([str(program), "-e", str(secret / "file")]) == 1
