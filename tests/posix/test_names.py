"""Names: links, renames of every kind, what is open while its name goes, directories that go."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.raising import fails
from tests.support.lab import needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)


def rename2(old: Path, new: Path, flags: int) -> None:
    """renameat2(2)."""
    if _libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def link_open_file(fd: int, new: Path) -> None:
    """linkat(2) of an open file."""
    old = os.fsencode(f"/proc/self/fd/{fd}")
    if _libc.linkat(AT_FDCWD, old, AT_FDCWD, os.fsencode(new), 0x400):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# --- links ------------------------------------------------------------------------------------


def test_links_count(here: Path, there: Path) -> None:
    path = here / "file"
    path.write_bytes(b"x")
    for number in range(50):
        os.link(path, here / f"link{number}")
        assert (there / "file").stat().st_nlink == number + 2
    inos = {(there / f"link{number}").stat().st_ino for number in range(50)}
    assert inos == {path.stat().st_ino}
    for number in range(50):
        os.unlink(there / f"link{number}")
        assert path.stat().st_nlink == 50 - number
    assert path.read_bytes() == b"x"


def test_links_to_everything_but_directories(here: Path) -> None:
    os.mkfifo(here / "fifo")
    os.symlink("nowhere", here / "symlink")
    os.mknod(here / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    for name in ("fifo", "symlink", "device"):
        os.link(here / name, here / f"{name}2", follow_symlinks=False)
        assert (here / name).lstat().st_nlink == 2
        assert (here / name).lstat().st_ino == (here / f"{name}2").lstat().st_ino


def test_directories_count_their_subdirectories(here: Path, there: Path) -> None:
    folder = here / "dir"
    folder.mkdir()
    for number in range(10):
        (folder / f"sub{number}").mkdir()
        (folder / f"file{number}").touch()
    assert (there / "dir").stat().st_nlink == 12
    (folder / "sub0").rename(here / "sub0")
    assert (there / "dir").stat().st_nlink == 11
    (here / "empty").mkdir()
    (folder / "sub1").rename(here / "empty")
    (folder / "sub2").rename(folder / "sub3")
    assert (there / "dir").stat().st_nlink == 9
    assert (there / "dir" / "..").stat().st_ino == there.stat().st_ino


def test_every_byte_but_two_can_be_in_a_name(here: Path, there: Path) -> None:
    for byte in range(1, 256):
        if byte != ord("/") and bytes([byte]) != b".":
            os.close(os.open(os.fsencode(here) + b"/" + bytes([byte]), os.O_CREAT | os.O_WRONLY))
    assert len(os.listdir(there)) == 253
    assert set(os.listdir(os.fsencode(there))) == {
        bytes([byte]) for byte in range(1, 256) if byte not in b"/."
    }


# --- rename -----------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_bytes(b"content"),
    "directory": lambda path: path.mkdir(),
    "full directory": lambda path: (path / "x").mkdir(parents=True),
    "symlink": lambda path: os.symlink("nowhere", path),
    "fifo": os.mkfifo,
}
PAIRS = list(itertools.product(KINDS, KINDS))


def expected(old: str, new: str) -> int:
    if "directory" in old:
        if "directory" not in new:
            return errno.ENOTDIR
        return errno.ENOTEMPTY if new.startswith("full") else 0
    return errno.EISDIR if "directory" in new else 0


@pytest.mark.parametrize(("old", "new"), PAIRS)
@pytest.mark.parametrize("across", [False, True], ids=["one folder", "two folders"])
def test_rename_over(here: Path, there: Path, old: str, new: str, across: bool) -> None:
    source, to = here / "from" / "old", here / ("to" if across else "from") / "new"
    for folder in ("from", "to"):
        (here / folder).mkdir()
    KINDS[old](source)
    KINDS[new](to)
    ino, over = source.lstat().st_ino, to.lstat().st_ino
    fails(errno.EEXIST, rename2, source, to, NOREPLACE)
    code = expected(old, new)
    elsewhere = there / to.relative_to(here)
    if code:
        fails(code, os.rename, source, to)
        assert (source.lstat().st_ino, elsewhere.lstat().st_ino) == (ino, over)
    else:
        os.rename(source, to)
        assert elsewhere.lstat().st_ino == ino
        fails(errno.ENOENT, source.lstat)


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_exchange(here: Path, there: Path, old: str, new: str) -> None:
    for folder in ("from", "to"):
        (here / folder).mkdir()
    one, two = here / "from" / "one", here / "to" / "two"
    KINDS[old](one)
    KINDS[new](two)
    before = one.lstat().st_ino, two.lstat().st_ino
    rename2(one, two, EXCHANGE)
    after = (there / "to" / "two").lstat().st_ino, (there / "from" / "one").lstat().st_ino
    assert after == before
    assert (there / "from").stat().st_nlink == 2 + ("directory" in new)
    assert (there / "to").stat().st_nlink == 2 + ("directory" in old)
    for path in (one, two):
        if stat.S_ISDIR(path.lstat().st_mode):
            assert (path / "..").stat().st_ino == path.parent.stat().st_ino


def test_flags_of_rename(here: Path) -> None:
    (here / "file").touch()
    rename2(here / "file", here / "moved", NOREPLACE)
    assert os.listdir(here) == ["moved"]
    fails(errno.ENOENT, rename2, here / "moved", here / "none", EXCHANGE)
    fails(errno.ENOENT, rename2, here / "none", here / "moved", EXCHANGE)
    fails(errno.EINVAL, rename2, here / "moved", here / "moved2", EXCHANGE | NOREPLACE)
    fails(errno.EINVAL, rename2, here / "moved", here / "moved2", EXCHANGE | WHITEOUT)
    fails(errno.EINVAL, rename2, here / "moved", here / "moved2", 64)
    assert os.listdir(here) == ["moved"]


def test_whiteouts(here: Path, there: Path) -> None:
    """What overlay mounts ask for: the old name becomes a device node 0:0, in the same change."""
    (here / "from").mkdir()
    (here / "to").mkdir()
    for name, make in KINDS.items():
        make(here / "from" / name)
        rename2(here / "from" / name, here / "to" / name, WHITEOUT)
        left = (there / "from" / name).lstat()
        assert (left.st_mode, left.st_rdev, left.st_nlink) == (stat.S_IFCHR, 0, 1)
        assert not stat.S_ISCHR((there / "to" / name).lstat().st_mode)
        assert (there / "from").stat().st_nlink == 2
    (here / "from" / "new").touch()
    fails(errno.EEXIST, rename2, here / "from" / "new", here / "to" / "file", WHITEOUT | NOREPLACE)
    rename2(here / "from" / "new", here / "from" / "moved", WHITEOUT | NOREPLACE)
    assert sorted(os.listdir(there / "from")) == sorted([*KINDS, "new", "moved"])


def test_two_names_of_one_file(here: Path) -> None:
    """rename(2) does nothing then, and both names stay."""
    (here / "one").touch()
    os.link(here / "one", here / "two")
    os.rename(here / "one", here / "two")
    assert sorted(os.listdir(here)) == ["one", "two"]
    os.rename(here / "one", here / "one")
    rename2(here / "one", here / "two", EXCHANGE)
    assert (here / "one").stat().st_nlink == 2


def test_no_directory_moves_into_itself(here: Path) -> None:
    (here / "a" / "b" / "c").mkdir(parents=True)
    for to in ("a/x", "a/b/x", "a/b/c/x", "a/b/c"):
        fails((errno.EINVAL, errno.ENOTEMPTY), os.rename, here / "a", here / to)
    fails(errno.EINVAL, rename2, here / "a", here / "a" / "b", EXCHANGE)
    fails(errno.ENOTEMPTY, os.rename, here / "a" / "b" / "c", here / "a")
    for dots in (".", ".."):
        fails((errno.EBUSY, errno.EINVAL), os.rename, f"{here}/a/b/{dots}", here / "x")
        over = (errno.EBUSY, errno.EINVAL, errno.ENOTEMPTY)
        fails(over, os.rename, here / "a", f"{here}/a/{dots}")


def test_rename_with_a_trailing_slash(here: Path) -> None:
    (here / "file").touch()
    (here / "dir").mkdir()
    fails(errno.ENOTDIR, os.rename, here / "file", f"{here}/new/")
    fails(errno.ENOTDIR, os.rename, f"{here}/file/", here / "new")
    os.rename(f"{here}/dir/", f"{here}/moved/")
    fails((errno.ENOENT, errno.ENOTDIR), os.mkfifo, f"{here}/fifo/")
    os.mkdir(f"{here}/made/")
    fails((errno.EISDIR, errno.ENOTDIR), os.open, f"{here}/opened/", os.O_CREAT | os.O_WRONLY)
    assert sorted(os.listdir(here)) == ["file", "made", "moved"]


# --- open while the name goes -----------------------------------------------------------------


@pytest.mark.parametrize("remover", [0, 1], ids=["same mount", "other mount"])
@pytest.mark.parametrize("how", ["unlink", "rename over"])
def test_unlinked_but_open(places: list[Path], remover: int, how: str) -> None:
    here = places[0]
    path = here / "file"
    path.write_bytes(b"a" * 100_000)
    with path.open("r+b", buffering=0) as file:
        if how == "unlink":
            os.unlink(places[remover] / "file")
        else:
            (here / "new").write_bytes(b"new")
            os.rename(places[remover] / "new", places[remover] / "file")
        fd = file.fileno()
        found = os.fstat(fd)
        assert (found.st_nlink, found.st_size) == (0, 100_000)
        assert os.pread(fd, 10, 99_995) == b"a" * 5
        assert os.pwrite(fd, b"more", 100_000) == 4
        os.ftruncate(fd, 100_002)
        os.fchmod(fd, 0o600)
        os.fchown(fd, 5, 6)
        os.utime(fd, ns=(1, 2))
        os.setxattr(fd, "user.a", b"v")
        assert os.getxattr(fd, "user.a") == b"v"
        found = os.fstat(fd)
        assert (found.st_size, found.st_uid, found.st_mtime_ns) == (100_002, 5, 2)
        fails(errno.ENOENT, link_open_file, fd, here / "again")
        with open(f"/proc/self/fd/{fd}", "rb") as again:
            assert again.read()[-2:] == b"mo"
    if how == "unlink":
        assert not any(place.joinpath("file").exists() for place in places)


def test_a_directory_that_is_removed_while_it_is_open(here: Path) -> None:
    """As on any local file system: it is empty, has no links, and nothing can be made in it."""
    (here / "dir").mkdir()
    fd = os.open(here / "dir", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.rmdir(here / "dir")
        assert os.fstat(fd).st_nlink == 0
        assert os.listdir(fd) == []
        fails(errno.ENOENT, lambda: os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        fails(errno.ENOENT, lambda: os.mkdir("new", dir_fd=fd))
        fails(errno.ENOENT, lambda: os.stat("new", dir_fd=fd))
        os.fchmod(fd, 0o700)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o700
    finally:
        os.close(fd)


def test_a_directory_that_is_renamed_over_while_it_is_open(here: Path) -> None:
    (here / "old").mkdir()
    (here / "new").mkdir()
    fd = os.open(here / "old", os.O_PATH)
    os.rename(here / "new", here / "old")
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_a_file_that_is_removed_while_only_its_path_is_held(here: Path) -> None:
    for make in (lambda p: p.touch(), os.mkfifo, lambda p: os.symlink("x", p)):
        path = here / f"it{make}"
        make(path)
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        os.unlink(path)
        assert os.fstat(fd).st_nlink == 0
        os.close(fd)


def test_the_current_directory_goes(here: Path) -> None:
    (here / "dir").mkdir()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(here / "dir")
            os.rmdir(here / "dir")
            assert os.stat(".").st_nlink == 0
            for call in (os.getcwd, lambda: os.stat("x"), lambda: os.mkdir("x")):
                try:
                    call()
                except FileNotFoundError:
                    continue
                raise AssertionError
            os.chdir("..")
            assert os.getcwd() == str(here)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_directory_that_another_machine_removes(here: Path, there: Path) -> None:
    """What was opened has no links and no entries, as on the machine that removed it."""
    (here / "dir").mkdir()
    fd = os.open(here / "dir", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.rmdir(there / "dir")
        assert os.fstat(fd).st_nlink == 0
        assert os.listdir(fd) == []
        fails(errno.ENOENT, lambda: os.mkdir("new", dir_fd=fd))
        fails(errno.ENOENT, lambda: os.stat("new", dir_fd=fd))
        fails(errno.ENOENT, os.stat, here / "dir")
        fails(errno.ENOENT, os.stat, here / "dir" / "x")
    finally:
        os.close(fd)


def test_a_socket_and_a_fifo_of_another_mount(here: Path, there: Path) -> None:
    """Only the name is shared: two mounts' fifos and sockets do not meet."""
    os.mkfifo(here / "fifo")
    reader = os.open(here / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    fails(errno.ENXIO, os.open, there / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    writer = os.open(here / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    os.close(writer)


def test_sockets_connect_on_one_mount(here: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(here / "sock"))
        assert stat.S_ISSOCK((here / "sock").stat().st_mode)
        server.listen()
        client.connect(str(here / "sock"))
        connection, _ = server.accept()
        connection.close()
    with socket.socket(socket.AF_UNIX) as again:
        fails(errno.EADDRINUSE, again.bind, str(here / "sock"))
        fails(errno.ECONNREFUSED, again.connect, str(here / "sock"))


# --- reading directories ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 100, 3000])
def test_every_name_is_listed_once(here: Path, there: Path, count: int) -> None:
    names = [f"name-{number:0{number % 200 + 1}d}" for number in range(count)]
    for name in names:
        os.mknod(here / name)
    assert sorted(os.listdir(there)) == sorted(names)
    with os.scandir(there) as found:
        assert all(entry.is_file(follow_symlinks=False) for entry in found)


def test_types_and_numbers_in_a_listing(here: Path, there: Path) -> None:
    for name, make in KINDS.items():
        make(here / name)
    with os.scandir(there) as found:
        for entry in found:
            status = (there / entry.name).lstat()
            assert entry.inode() == status.st_ino
            assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(status.st_mode)
            assert entry.is_symlink() == stat.S_ISLNK(status.st_mode)
            assert entry.is_file(follow_symlinks=False) == stat.S_ISREG(status.st_mode)


@pytest.mark.slow
def test_listing_while_names_come_and_go(here: Path, there: Path) -> None:
    """What is there throughout appears exactly once."""
    stay = {f"stay{number}" for number in range(1500)}
    for name in stay:
        os.mknod(here / name)
    for number in range(1500):
        os.mknod(here / f"go{number}")
    seen: list[str] = []
    with os.scandir(there) as found:
        for number, entry in enumerate(found):
            seen.append(entry.name)
            if number < 1500:
                os.unlink(here / f"go{number}")
                os.mknod(here / f"come{number}")
    assert len(seen) == len(set(seen))
    assert stay <= set(seen)


class _Dir:
    """readdir(3) with its positions."""

    def __init__(self, path: Path) -> None:
        for name, result in (("opendir", ctypes.c_void_p), ("readdir", ctypes.c_void_p),
                             ("telldir", ctypes.c_long)):  # fmt: skip
            getattr(_libc, name).restype = result
        self._dir = ctypes.c_void_p(_libc.opendir(os.fsencode(path)))

    def read(self) -> bytes | None:
        entry = _libc.readdir(self._dir)
        return ctypes.string_at(entry + 19) if entry else None

    def tell(self) -> int:
        return int(_libc.telldir(self._dir))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._dir, ctypes.c_long(position))

    def rewind(self) -> None:
        _libc.rewinddir(self._dir)

    def close(self) -> None:
        _libc.closedir(self._dir)


def test_positions_in_a_directory(here: Path) -> None:
    for number in range(500):
        os.mknod(here / f"{number}")
    folder = _Dir(here)
    names, positions = [], []
    while True:
        positions.append(folder.tell())
        name = folder.read()
        if name is None:
            break
        names.append(name)
    assert len(names) == 502
    assert len(set(positions)) == len(positions)
    for at in (0, 1, 2, 3, 250, 501, 100):
        folder.seek(positions[at])
        assert folder.read() == names[at]
    for number in range(0, 500, 2):
        os.unlink(here / f"{number}")
    folder.seek(positions[300])
    rest = []
    while (name := folder.read()) is not None:
        rest.append(name)
    assert rest == [name for name in names[300:] if int(name) % 2]
    folder.rewind()
    os.mknod(here / "new")
    again = set()
    while (name := folder.read()) is not None:
        again.add(name)
    assert b"new" in again
    folder.close()


def test_a_deep_tree(here: Path, there: Path) -> None:
    """Deeper than a path can name."""
    fd = os.open(here, os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d" * 50, dir_fd=fd)
        below = os.open("d" * 50, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    assert os.listdir(fd) == ["bottom"]
    os.close(fd)
    import shutil

    os.rename(here / ("d" * 50), here / "top")
    assert os.listdir(there) == ["top"]
    shutil.rmtree(there / "top")
    assert os.listdir(here) == []
