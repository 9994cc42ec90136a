"""Root with and without its capabilities on a mount that only root may use, compared with a tmpfs.

The kernel checks no permissions there, so the daemon does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.lab import Lab, needs_fuse, needs_root, new_lab

pytestmark = [needs_fuse, needs_root]

CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID = range(5)
SOMEBODY = 1000
NEWUSER = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)


def drop(*capabilities: int) -> None:
    """Give capabilities up; all when none is named."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert _libc.capget(header, sets) == 0
    gone = sum(1 << one for one in capabilities) if capabilities else 0xFFFFFFFF
    for number in range(3):
        sets[number] &= ~gone & 0xFFFFFFFF
        sets[number + 3] &= 0 if not capabilities else 0xFFFFFFFF
    assert _libc.capset(header, sets) == 0


def drop_in_group() -> None:
    """Be in a group that files have, and nothing else."""
    os.setgroups([SOMEBODY])
    drop()


def leave_user_namespace() -> None:
    """Be root of nothing: in a user namespace of its own, with all capabilities there."""
    assert _libc.unshare(NEWUSER) == 0


CALLERS: dict[str, Callable[[], None]] = {
    "all": lambda: None,
    "none": drop,
    "no override": lambda: drop(DAC_OVERRIDE),
    "no override, no search": lambda: drop(DAC_OVERRIDE, DAC_READ_SEARCH),
    "no fowner": lambda: drop(FOWNER),
    "no chown": lambda: drop(CHOWN),
    "no fsetid": lambda: drop(FSETID),
    "a group of the file": drop_in_group,
    "another user namespace": leave_user_namespace,
}
#: Those that cannot list a user's private directory.
SHUT_OUT = ("none", "no override, no search", "a group of the file", "another user namespace")
#: Older kernels have no attributes of users on a tmpfs.
UNKNOWN = errno.errorcode[errno.ENOTSUP]


def build(top: Path) -> None:
    """What the calls work on: little of it is root's."""

    def put(name: str, uid: int, gid: int, mode: int) -> None:
        path = top / name
        if mode & stat.S_IFDIR:
            path.mkdir()
        else:
            path.write_bytes(b"#!/bin/sh\nexit 0\n")
        os.chown(path, uid, gid)
        path.chmod(mode & 0o7777)

    folder = stat.S_IFDIR
    for name, uid, gid, mode in (
        ("locked", SOMEBODY, 0, folder | 0o700), ("theirs", SOMEBODY, 0, folder | 0o755),
        ("group", SOMEBODY, SOMEBODY, folder | 0o770), ("own", 0, 0, folder | 0o755),
        ("shut", 0, 0, folder), ("search", SOMEBODY, 0, folder | 0o711),
        ("sticky", SOMEBODY, 0, folder | 0o1777),
    ):  # fmt: skip
        put(name, uid, gid, mode)
        put(f"{name}/private", SOMEBODY, SOMEBODY, 0o600)
        put(f"{name}/public", SOMEBODY, SOMEBODY, 0o644)
        put(f"{name}/none", 0, 0, 0)
        put(f"{name}/program", SOMEBODY, SOMEBODY, 0o744)
        put(f"{name}/folder", SOMEBODY, SOMEBODY, folder | 0o700)
        put(f"{name}/own", 0, 0, 0o644)
        put(f"{name}/set", 0, SOMEBODY, 0o6755)
        put(f"{name}/lock", 0, SOMEBODY, 0o2644)
        put(f"to-{name}", 0, 0, 0o644)
        put(f"folder-to-{name}", SOMEBODY, 0, folder | 0o755)


def written(name: str) -> int:
    """The mode that a file has after it was written to."""
    fd = os.open(name, os.O_WRONLY)
    os.pwrite(fd, b"x", 0)
    os.close(fd)
    return os.stat(name).st_mode


def cut(name: str) -> int:
    os.truncate(name, 3)
    return os.stat(name).st_mode


def opened(flags: int) -> Callable[[str], object]:
    return lambda name: os.close(os.open(name, flags, 0o644))


def mode_after(mode: int) -> Callable[[str], int]:
    def change(name: str) -> int:
        os.chmod(name, mode)
        return os.stat(name).st_mode

    return change


def visited(name: str) -> None:
    back = os.open(".", os.O_PATH)
    try:
        os.chdir(name)
    finally:
        os.fchdir(back)
        os.close(back)


CALLS: dict[str, tuple[Callable[[str], object], tuple[str, ...]]] = {
    "stat": (lambda name: os.stat(name).st_size, ("public",)),
    "read": (opened(os.O_RDONLY), ("private", "public", "none", "own")),
    "write": (opened(os.O_WRONLY), ("private", "public", "none", "own")),
    "both": (opened(os.O_RDWR), ("private", "public")),
    "cut": (opened(os.O_RDONLY | os.O_TRUNC), ("public",)),
    "append": (opened(os.O_RDWR | os.O_APPEND | os.O_CREAT), ("public", "new")),
    "exclusively": (opened(os.O_WRONLY | os.O_CREAT | os.O_EXCL), ("public", "new2")),
    "nameless": (opened(os.O_RDWR | os.O_TMPFILE), (".", "folder")),
    "list": (os.listdir, (".", "folder")),
    "visit": (visited, (".", "folder")),
    "may read": (lambda name: os.access(name, os.R_OK), ("private", "none", ".")),
    "may write": (lambda name: os.access(name, os.W_OK), ("public", "none", ".")),
    "may run": (lambda name: os.access(name, os.X_OK), ("private", "program", ".")),
    "run": (lambda name: subprocess.call([os.path.abspath(name)]), ("program", "private")),
    "truncate": (cut, ("public", "own", "set", "lock")),
    "shed": (written, ("set", "lock")),
    "chmod": (mode_after(0o604), ("public", "own", "none")),
    "set-ID": (mode_after(0o6755), ("public", "own", "set")),
    "chown": (lambda name: os.chown(name, 0, -1), ("public", "own")),
    "give": (lambda name: os.chown(name, SOMEBODY, -1), ("own",)),
    "chgrp": (lambda name: os.chown(name, -1, SOMEBODY), ("public", "none")),
    "touch": (os.utime, ("public", "own")),
    "times": (lambda name: os.utime(name, (1, 1)), ("public", "own")),
    "mkdir": (os.mkdir, ("made", "folder/made")),
    "mkfifo": (os.mkfifo, ("fifo",)),
    "symlink": (lambda name: os.symlink("to", name), ("link",)),
    "link": (lambda name: os.link(name, name + ".link"), ("own",)),
    "rename": (lambda name: os.rename(name, name + ".new"), ("public", "folder")),
    "rename away": (lambda name: os.rename(name, name + "/../../here"), ("program",)),
    "rename out": (lambda name: os.rename(name, "out"), ("folder.new",)),
    "rename in": (lambda name: os.rename(f"to-{Path(name).parent}", name), ("in", "own")),
    "move in": (lambda name: os.rename(f"folder-to-{Path(name).parent}", name), ("in2",)),
    "describe": (lambda name: os.setxattr(name, "user.x", b"x"), (".", "program")),
    "look": (lambda name: os.getxattr(name, "user.x"), (".", "program", "private")),
    "tell no more": (lambda name: os.removexattr(name, "user.x"), (".", "program")),
    "unlink": (os.unlink, ("public.new", "own")),
    "rmdir": (os.rmdir, ("made",)),
}  # fmt: skip


def outcomes(top: Path, become: Callable[[], None]) -> list[tuple[str, object]]:
    """What every call gives on every thing below a tree, by a process that `become`s a user."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(top)
            become()
            found = [
                (f"{title} {folder}/{name}", outcome(call, f"{folder}/{name}"))
                for title, (call, names) in CALLS.items()
                for folder in ("theirs", "group", "own", "search", "sticky", "locked", "shut")
                for name in names
            ]
            os.write(sending, pickle.dumps(found))
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        data = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    every: list[tuple[str, object]] = pickle.loads(data)
    return every


def outcome(call: Callable[[str], object], name: str) -> object:
    try:
        result = call(name)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return sorted(result) if isinstance(result, list) else result


@pytest.fixture(scope="module")
def private() -> Iterator[Lab]:
    """A mount that only root may use."""
    with new_lab(16 << 20, 1, "suid,dev") as made:
        yield made


@pytest.mark.parametrize("caller", CALLERS)
def test_root_may_what_its_capabilities_permit(private: Lab, caller: str) -> None:
    here = private.paths[0] / caller
    here.mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        twin = Path(folder)
        for top in (here, twin):
            top.chmod(0o755)
            build(top)
        ours, theirs = (outcomes(top, CALLERS[caller]) for top in (here, twin))
    different = [(title, one, two) for (title, one), (_, two) in zip(ours, theirs, strict=True)
                 if one != two and two != UNKNOWN]  # fmt: skip
    assert not different, "\n".join(map(str, different))
    refused = dict(theirs)["list locked/."] == "EACCES"
    assert refused == (caller in SHUT_OUT)


def test_another_user_of_such_a_mount(private: Lab) -> None:
    """Root that takes on a user's file system identity, as a file server does."""
    (private.paths[0] / "file").touch(0o666)
    listed = os.open(private.paths[0], os.O_PATH)

    def become() -> None:
        _libc.setfsgid(SOMEBODY)
        _libc.setfsuid(SOMEBODY)

    for call in (os.listdir, os.stat, lambda f: os.symlink("x", f"{f}/link")):
        pid = os.fork()
        if pid == 0:
            become()
            try:
                call(
                    f"/proc/self/fd/{listed}/file" if call is os.stat else f"/proc/self/fd/{listed}"
                )
            except PermissionError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
    os.close(listed)
