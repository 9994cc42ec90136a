"""Idmapped mounts: a bind mount that shows and stores other owners (Linux 6.12 and later)."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.posix.actor import Actor
from tests.posix.raising import fails
from tests.support.lab import EVERYTHING, KERNEL, Lab, needs_fuse, needs_root, new_lab

pytestmark = [
    needs_fuse,
    needs_root,
    pytest.mark.skipif(KERNEL < (6, 12), reason="FUSE has idmapped mounts since Linux 6.12"),
]

#: What the region holds as owner N is shown as SHIFT + N.
SHIFT, COUNT = 100_000, 65_536
USER, GROUP = 9, 8
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_CLONE, _CLOEXEC, _EMPTY_PATH, _IDMAP, _FROM_EMPTY = 1, 0o2000000, 0x1000, 0x100000, 4
_NEWUSER, _HERE, _DETACH = 0x10000000, -100, 2
_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *words: object) -> int:
    typed = [ctypes.c_long(word) if isinstance(word, int) else word for word in words]
    result = int(_libc.syscall(ctypes.c_long(number), *typed))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _user_namespace() -> int:
    """A descriptor of a user namespace that maps 0... to SHIFT...."""
    left, leave = os.pipe()
    end, ended = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(leave, b"y" if _libc.unshare(_NEWUSER) == 0 else b"n")
        os.close(ended)
        os.read(end, 1)
        os._exit(0)
    try:
        if os.read(left, 1) != b"y":
            pytest.skip("user namespaces are not allowed here")
        for kind in ("uid", "gid"):
            Path(f"/proc/{child}/{kind}_map").write_text(f"0 {SHIFT} {COUNT}")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    finally:
        for fd in (left, leave, end, ended):
            os.close(fd)
        os.waitpid(child, 0)


def idmapped(source: Path, target: Path) -> None:
    """Mount *source* once more, on *target*, with owners shifted; raises OSError."""
    namespace = _user_namespace()
    tree = _call(_OPEN_TREE, _HERE, os.fsencode(source), _CLONE | _CLOEXEC)
    try:
        attributes = (ctypes.c_uint64 * 4)(_IDMAP, 0, 0, namespace)
        _call(_MOUNT_SETATTR, tree, b"", _EMPTY_PATH, attributes, ctypes.sizeof(attributes))
        _call(_MOVE_MOUNT, tree, b"", _HERE, os.fsencode(target), _FROM_EMPTY)
    finally:
        os.close(tree)
        os.close(namespace)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A region with two mounts; all users may use the root directory."""
    with new_lab(64 << 20, 2, EVERYTHING) as made:
        yield made


@pytest.fixture(scope="module")
def shifted(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The first mount, idmapped."""
    target = tmp_path_factory.mktemp("shifted")
    for folder in (target, *target.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o011)
    idmapped(lab.paths[0], target)
    try:
        yield target
    finally:
        assert _libc.umount2(os.fsencode(target), _DETACH) == 0


@pytest.fixture(scope="module")
def user() -> Iterator[Actor]:
    """The user that is USER in the region."""
    actor = Actor(SHIFT + USER, SHIFT + GROUP, (SHIFT + GROUP,))
    yield actor
    actor.close()


def owner(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


def test_owners_are_shown_shifted(lab: Lab, shifted: Path) -> None:
    (lab.paths[1] / "file").touch()
    os.chown(lab.paths[1] / "file", 5, 6)
    assert owner(shifted / "file") == (SHIFT + 5, SHIFT + 6)
    os.chown(lab.paths[1] / "file", SHIFT + COUNT, 6)
    assert owner(shifted / "file") == (65534, SHIFT + 6)  # has no place in the map


def test_what_is_made_is_stored_shifted_back(lab: Lab, shifted: Path, user: Actor) -> None:
    top = str(shifted)
    user.mkdir(f"{top}/dir", 0o755)
    user.create_file(f"{top}/dir/file", 0o644)
    user.mkfifo(f"{top}/dir/fifo", 0o644)
    user.symlink("x", f"{top}/dir/link")
    for name in ("dir", "dir/file", "dir/fifo", "dir/link"):
        assert owner(shifted / name) == (SHIFT + USER, SHIFT + GROUP)
        assert owner(lab.paths[1] / name) == (USER, GROUP)
    user.write_file(f"{top}/dir/file", b"theirs")
    user.rename(f"{top}/dir/file", f"{top}/dir/moved")
    assert (lab.paths[1] / "dir/moved").read_bytes() == b"theirs"
    user.unlink(f"{top}/dir/moved")


def test_who_has_no_place_in_the_map_makes_nothing(shifted: Path) -> None:
    fails(errno.EOVERFLOW, (shifted / "root").touch)
    fails(errno.EOVERFLOW, os.mkdir, shifted / "root")


def test_owners_are_set_shifted_back(lab: Lab, shifted: Path) -> None:
    (lab.paths[1] / "given").touch()
    os.chown(shifted / "given", SHIFT + 20, SHIFT + 21)
    assert owner(lab.paths[1] / "given") == (20, 21)
    fails(errno.EOVERFLOW, os.chown, shifted / "given", 20, 21)
    assert owner(lab.paths[1] / "given") == (20, 21)


def test_permissions_are_those_of_the_shifted_owner(lab: Lab, shifted: Path, user: Actor) -> None:
    for name, uid in (("mine", USER), ("other", USER + 1), ("outside", SHIFT + USER)):
        path = lab.paths[1] / name
        path.touch()
        os.chown(path, uid, 0)
        path.chmod(0o600)
    user.read_file(str(shifted / "mine"))
    fails(errno.EACCES, user.read_file, str(shifted / "other"))
    fails(errno.EACCES, user.read_file, str(shifted / "outside"))
    user.read_file(str(lab.paths[0] / "outside"))  # past the idmapped mount
    fails(errno.EACCES, user.read_file, str(lab.paths[0] / "mine"))


@pytest.mark.skipif(shutil.which("setfacl") is None, reason="needs the package acl")
def test_access_lists_are_shifted(lab: Lab, shifted: Path, user: Actor) -> None:
    (lab.paths[1] / "listed").touch(0o600)
    (lab.paths[1] / "listed").chmod(0o600)
    fails(errno.EACCES, user.read_file, str(shifted / "listed"))
    subprocess.run(["setfacl", "-m", f"u:{USER}:r", lab.paths[1] / "listed"], check=True)
    user.read_file(str(shifted / "listed"))
    fails(errno.EACCES, user.write_file, str(shifted / "listed"))
    words = ["setfacl", "-m", f"u:{SHIFT + 30}:rw", str(shifted / "listed")]
    subprocess.run(words, check=True)
    for top, shift in ((lab.paths[1], 0), (shifted, SHIFT)):
        words = ["getfacl", "-n", "-p", str(top / "listed")]
        shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert f"user:{shift + USER}:r--" in shown
        assert f"user:{shift + 30}:rw-" in shown


def test_writing_takes_set_id_bits_away(lab: Lab, shifted: Path, user: Actor) -> None:
    """Only requests to make something name their caller."""
    path = lab.paths[1] / "program"
    path.touch()
    os.chown(path, USER, GROUP)
    path.chmod(0o6775)
    user.write_file(str(shifted / "program"), b"x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o775
    path.chmod(0o6775)
    (shifted / "program").write_bytes(b"root keeps them")
    assert stat.S_IMODE(path.stat().st_mode) == 0o6775


def test_a_mount_for_root_alone_cannot_be_idmapped(tmp_path: Path) -> None:
    """The kernel needs to check permissions by itself for that."""
    with new_lab(16 << 20, 1, "suid,dev") as lab:
        fails(errno.EINVAL, idmapped, lab.paths[0], tmp_path)
