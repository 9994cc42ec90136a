"""Which error each system call fails with."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.raising import fails
from tests.support.lab import needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]

LONGEST = "n" * 255
TOO_LONG = "n" * 256


def _mknod(path: str) -> None:
    os.mknod(path, 0o600 | stat.S_IFIFO)


def _create(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def _open(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


#: Calls of one path.
PATH_CALLS: dict[str, Callable[[str], object]] = {
    "open": _open,
    "stat": os.stat,
    "lstat": os.lstat,
    "chmod": lambda path: os.chmod(path, 0o600),
    "chown": lambda path: os.chown(path, 0, 0),
    "lchown": lambda path: os.lchown(path, 0, 0),
    "truncate": lambda path: os.truncate(path, 0),
    "utime": lambda path: os.utime(path),
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "readlink": os.readlink,
    "chdir": os.chdir,
    "listdir": os.listdir,
    "statvfs": os.statvfs,
    "getxattr": lambda path: os.getxattr(path, "user.a"),
    "setxattr": lambda path: os.setxattr(path, "user.a", b""),
    "link from": lambda path: os.link(path, path + "2"),
    "rename from": lambda path: os.rename(path, path + "2"),
}
MAKING_CALLS: dict[str, Callable[[str], object]] = {
    "create": _create,
    "mkdir": os.mkdir,
    "mknod": _mknod,
    "mkfifo": os.mkfifo,
    "symlink": lambda path: os.symlink("to", path),
}
ALL_CALLS = {**PATH_CALLS, **MAKING_CALLS}
each_path_call = pytest.mark.parametrize("call", PATH_CALLS.values(), ids=PATH_CALLS)
each_making_call = pytest.mark.parametrize("call", MAKING_CALLS.values(), ids=MAKING_CALLS)
each_call = pytest.mark.parametrize("call", ALL_CALLS.values(), ids=ALL_CALLS)


@each_path_call
def test_no_such_file(here: Path, call: Callable[[str], object]) -> None:
    fails(errno.ENOENT, call, f"{here}/none")
    fails(errno.ENOENT, call, f"{here}/none/below")


@each_making_call
def test_making_where_there_is_no_directory(here: Path, call: Callable[[str], object]) -> None:
    fails(errno.ENOENT, call, f"{here}/none/new")


@each_call
def test_a_file_in_the_middle_of_a_path(here: Path, call: Callable[[str], object]) -> None:
    (here / "file").touch()
    os.mkfifo(here / "fifo")
    fails(errno.ENOTDIR, call, f"{here}/file/new")
    fails(errno.ENOTDIR, call, f"{here}/fifo/new")


@each_call
def test_a_name_that_is_too_long(here: Path, call: Callable[[str], object]) -> None:
    fails(errno.ENAMETOOLONG, call, f"{here}/{TOO_LONG}")
    fails(errno.ENAMETOOLONG, call, f"{here}/{TOO_LONG}/below")
    fails(errno.ENAMETOOLONG, call, f"{here}/{'n' * 2000}")


@each_call
def test_a_path_that_is_too_long(here: Path, call: Callable[[str], object]) -> None:
    fails(errno.ENAMETOOLONG, call, f"{here}/" + "./" * 2048 + "x")


@each_call
def test_a_ring_of_symbolic_links(here: Path, call: Callable[[str], object]) -> None:
    os.symlink("two", here / "one")
    os.symlink("one", here / "two")
    fails(errno.ELOOP, call, f"{here}/one/new")


@each_making_call
@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "symlink", "dangling", "socket"])
def test_making_what_exists(here: Path, kind: str, call: Callable[[str], object]) -> None:
    path = here / "it"
    make_node(path, kind)
    if call is _create:
        os.unlink(path) if kind != "directory" else os.rmdir(path)
        make_node(path, kind)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        fails(errno.EEXIST, lambda: os.open(path, flags, 0o600))
    else:
        fails(errno.EEXIST, call, str(path))


def make_node(path: Path, kind: str) -> None:
    """Make something of a kind."""
    if kind == "file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in ("symlink", "dangling"):
        if kind == "symlink":
            (path.parent / "target").touch()
        os.symlink("target" if kind == "symlink" else "nowhere", path)
    else:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))


def test_the_longest_name_works_everywhere(here: Path, there: Path) -> None:
    name = here / LONGEST
    name.touch()
    assert (there / LONGEST).exists()
    name.rename(here / ("m" * 255))
    fails(errno.ENAMETOOLONG, os.rename, here / ("m" * 255), here / TOO_LONG)
    fails(errno.ENAMETOOLONG, os.link, here / ("m" * 255), here / TOO_LONG)
    assert os.listdir(there) == ["m" * 255]


def test_symbolic_link_targets(here: Path, there: Path) -> None:
    os.symlink("t" * 4095, here / "long")
    assert len(os.readlink(there / "long")) == 4095
    fails(errno.ENAMETOOLONG, os.symlink, "t" * 4096, here / "longer")
    fails(errno.ENOENT, os.symlink, "", here / "empty")
    fails(errno.ENAMETOOLONG, os.stat, here / "long")


def test_directories_are_no_files(here: Path) -> None:
    (here / "dir").mkdir()
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT):
        fails(errno.EISDIR, os.open, here / "dir", flags)
    fails(errno.EISDIR, os.truncate, here / "dir", 0)
    fails(errno.EISDIR, os.unlink, here / "dir")
    fails(errno.EPERM, os.link, here / "dir", here / "dir2")
    fd = os.open(here / "dir", os.O_RDONLY)
    fails(errno.EISDIR, os.read, fd, 1)
    fails(errno.EBADF, os.write, fd, b"x")
    fails((errno.EBADF, errno.EINVAL), os.ftruncate, fd, 0)
    os.close(fd)


def test_files_are_no_directories(here: Path) -> None:
    (here / "file").touch()
    fails(errno.ENOTDIR, os.rmdir, here / "file")
    fails(errno.ENOTDIR, os.listdir, here / "file")
    fails(errno.ENOTDIR, os.chdir, here / "file")
    fails(errno.ENOTDIR, os.open, here / "file", os.O_RDONLY | os.O_DIRECTORY)
    fails(errno.EINVAL, os.readlink, here / "file")


def test_rmdir(here: Path) -> None:
    (here / "dir" / "sub").mkdir(parents=True)
    fails(errno.ENOTEMPTY, os.rmdir, here / "dir")
    fails(errno.EINVAL, os.rmdir, f"{here}/dir/sub/.")
    fails(errno.ENOTEMPTY, os.rmdir, f"{here}/dir/sub/..")
    os.symlink("sub", here / "dir" / "link")
    fails(errno.ENOTDIR, os.rmdir, here / "dir" / "link")


def test_the_root_of_a_mount(here: Path) -> None:
    top = here.parent
    fails((errno.EBUSY, errno.ENOTEMPTY), os.rmdir, top)
    fails((errno.EBUSY, errno.EXDEV, errno.EINVAL), os.rename, top, here / "x")
    fails(errno.EXDEV, os.rename, here, top.parent / "x")
    (here / "file").touch()
    fails(errno.EXDEV, os.rename, here / "file", top.parent / "x")
    fails(errno.EXDEV, os.link, here / "file", top.parent / "x")


def test_mounts_of_one_region_are_two_file_systems(here: Path, there: Path) -> None:
    (here / "file").touch()
    fails(errno.EXDEV, os.rename, here / "file", there / "moved")
    fails(errno.EXDEV, os.link, here / "file", there / "linked")


def test_opening(here: Path) -> None:
    os.symlink("nowhere", here / "dangling")
    fails(errno.ELOOP, os.open, here / "dangling", os.O_RDONLY | os.O_NOFOLLOW)
    fails(errno.ENOENT, os.open, here / "dangling", os.O_RDONLY)
    os.mkfifo(here / "fifo")
    fails(errno.ENXIO, os.open, here / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    make_node(here / "sock", "socket")
    fails(errno.ENXIO, os.open, here / "sock", os.O_RDONLY)
    os.mknod(here / "nothing", 0o600 | stat.S_IFCHR, os.makedev(250, 250))
    fails(errno.ENXIO, os.open, here / "nothing", os.O_RDONLY)


def test_a_running_program_is_not_written(here: Path) -> None:
    program = here / "sleep"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    pid = os.posix_spawn(program, ["sleep", "60"], {})
    try:
        while os.readlink(f"/proc/{pid}/exe") != str(program):
            pass
        fails(errno.ETXTBSY, os.open, program, os.O_WRONLY)
        fails(errno.ETXTBSY, os.truncate, program, 0)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_sizes_and_offsets(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"0123456789")
    fails(errno.EINVAL, os.truncate, path, -1)
    with path.open("r+b", buffering=0) as file:
        fd = file.fileno()
        fails(errno.EINVAL, os.ftruncate, fd, -1)
        fails(errno.EINVAL, os.lseek, fd, -1, os.SEEK_SET)
        fails(errno.EINVAL, os.lseek, fd, -11, os.SEEK_END)
        fails(errno.EINVAL, os.pread, fd, 1, -1)
        fails(errno.EINVAL, os.pwrite, fd, b"x", -1)
        fails(errno.ENXIO, os.lseek, fd, 11, os.SEEK_DATA)
        fails((errno.EFBIG, errno.EINVAL), os.pwrite, fd, b"x", (1 << 63) - 1)
        fails((errno.EFBIG, errno.EINVAL), os.ftruncate, fd, (1 << 63) - 1)
        assert os.pread(fd, 5, 10) == b""
        assert os.pread(fd, 5, 1 << 40) == b""
        fails((errno.EINVAL,), mmap.mmap, fd, 0, mmap.MAP_SHARED, mmap.PROT_READ, 0, 3)
    assert path.read_bytes() == b"0123456789"


@pytest.mark.parametrize("exponent", [32, 40, 44, 50, 56, 60, 61])
def test_a_file_of_any_size_works_or_is_too_big(here: Path, exponent: int) -> None:
    """Sizes beyond what the block map can hold are EFBIG, never damage."""
    path = here / "file"
    path.write_bytes(b"start")
    size = 1 << exponent
    for call in (
        lambda: os.truncate(path, size),
        lambda: _write_at(path, size - 2),
        lambda: os.truncate(path, 5),
    ):
        assert errno_of(call) in (0, errno.EFBIG)
    assert path.read_bytes() == b"start"


def errno_of(call: Callable[[], object]) -> int:
    """The errno that a call fails with; 0 if it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def _write_at(path: Path, offset: int) -> None:
    with path.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), b"ab", offset) == 2
        assert os.pread(file.fileno(), 9, offset) == b"ab"
        assert os.fstat(file.fileno()).st_size >= offset + 2


def test_buffers_that_are_not_there(here: Path) -> None:
    """EFAULT, and nothing changes."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    path = here / "file"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDWR)
    try:
        for call in (libc.write, libc.read):
            ctypes.set_errno(0)
            assert call(fd, ctypes.c_void_p(8), ctypes.c_size_t(4)) == -1
            assert ctypes.get_errno() == errno.EFAULT
        assert os.fstat(fd).st_size == 10
    finally:
        os.close(fd)
    for name in ("unlink", "rmdir", "chdir", "mkdir"):
        ctypes.set_errno(0)
        assert getattr(libc, name)(ctypes.c_void_p(8), 0) == -1
        assert ctypes.get_errno() == errno.EFAULT
    assert path.read_bytes() == b"0123456789"


def test_descriptors_of_the_wrong_kind(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"x")
    reading = os.open(path, os.O_RDONLY)
    writing = os.open(path, os.O_WRONLY)
    try:
        fails(errno.EBADF, os.write, reading, b"x")
        fails(errno.EBADF, os.read, writing, 1)
        fails((errno.EINVAL, errno.EBADF), os.ftruncate, reading, 0)
        fails(errno.ENOTDIR, lambda: os.open("x", os.O_RDONLY, dir_fd=reading))
    finally:
        os.close(reading)
        os.close(writing)
