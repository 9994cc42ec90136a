"""Operations on paths: what they do, and the OSErrors that they raise."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ivshmemfs import Client
from ivshmemfs.errors import FsError

MIB = 1 << 20


def test_what_one_client_writes_the_others_read(fs: Client, other: Client, reader: Client) -> None:
    fs.write_bytes("/a", b"first")
    assert (other.read_bytes("a"), reader.read_text("/a")) == (b"first", "first")
    other.write_text("/a", "zwölf")
    assert fs.read_text("/a") == "zwölf"


@pytest.mark.parametrize("size", [0, 1, 4096, MIB - 1, MIB, MIB + 1, 3 * MIB + 5])
def test_contents_of_any_size(fs: Client, size: int) -> None:
    data = os.urandom(size)
    fs.write_bytes("/f", b"old" * 1000)
    fs.write_bytes("/f", data)
    assert fs.read_bytes("/f") == data
    assert fs.stat("/f").st_size == size


def test_write_bytes_of_up_to_1_mib_is_one_commit(fs: Client) -> None:
    def sequence() -> int:
        return fs.session.call(lambda engine: engine.view().root.record.sequence)

    for data in (b"new", b"x" * MIB, b""):
        before = sequence()
        fs.write_bytes("/f", data)
        assert sequence() == before + 1


def test_write_bytes_keeps_the_inode_the_mode_and_the_other_names(fs: Client) -> None:
    fs.write_bytes("/f", b"old")
    fs.chmod("/f", 0o640)
    fs.link("/f", "/g")
    ino = fs.stat("/f").st_ino
    fs.write_bytes("/f", b"new")
    status = fs.stat("/g")
    assert (status.st_ino, stat.S_IMODE(status.st_mode), status.st_nlink) == (ino, 0o640, 2)
    assert fs.read_bytes("/g") == b"new"
    fs.write_bytes("/f", bytes(2 * MIB))  # takes a new inode, with mode and owner of the old one
    assert stat.S_IMODE(fs.stat("/f").st_mode) == 0o640
    assert fs.read_bytes("/g") == b"new"


def test_write_bytes_drops_set_id_bits_of_an_unprivileged_writer(fs: Client) -> None:
    fs.write_bytes("/f", b"old")
    fs.chmod("/f", 0o6755)
    fs.context = fs.context._replace(uid=1000, gid=1000)
    fs.write_bytes("/f", b"new")
    assert stat.S_IMODE(fs.stat("/f").st_mode) == 0o755


def test_a_full_region_keeps_the_old_contents(fs: Client) -> None:
    fs.write_bytes("/f", b"old")
    with pytest.raises(OSError, match="full") as caught:
        fs.write_bytes("/f", bytes(20 * MIB))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/f")
    assert fs.read_bytes("/f") == b"old"


def test_directories(fs: Client) -> None:
    fs.makedirs("/a/b/c")
    fs.mkdir("/a/d/e", parents=True)
    fs.mkdir("/a/d/e", parents=True, exist_ok=True)
    assert sorted(fs.listdir("/a")) == ["b", "d"]
    with pytest.raises(FileExistsError):
        fs.mkdir("/a/b")
    with pytest.raises(FileNotFoundError):
        fs.mkdir("/none/b")
    fs.write_bytes("/a/f", b"")
    with pytest.raises(FileExistsError):
        fs.mkdir("/a/f", exist_ok=True)
    with pytest.raises(OSError, match="not empty"):
        fs.rmdir("/a")
    fs.rmdir("/a/b/c")
    fs.rmtree("/a")
    assert fs.listdir() == []


def test_walk_is_that_of_os(fs: Client, tmp_path: Path) -> None:
    for name in ("a/b/c", "a/d", "e"):
        fs.makedirs(name)
        (tmp_path / name).mkdir(parents=True)
    for name in ("f", "a/g", "a/b/h"):
        fs.write_bytes(name, b"")
        (tmp_path / name).write_bytes(b"")
    fs.symlink("a", "link")
    (tmp_path / "link").symlink_to("a")
    for topdown in (True, False):
        for links in (True, False):
            ours = [(p, sorted(d), sorted(f)) for p, d, f in fs.walk("/", topdown, None, links)]
            theirs = [
                ("/" + os.path.relpath(p, tmp_path).removeprefix("."), sorted(d), sorted(f))
                for p, d, f in os.walk(tmp_path, topdown, None, links)
            ]
            assert sorted(ours) == sorted(theirs)
            assert (ours[0][0] == "/") is topdown
    visited = []
    for path, folders, _ in fs.walk():
        visited.append(path)
        folders.clear()
    assert visited == ["/"]


def test_scandir_of_many_entries(fs: Client) -> None:
    names = {f"file-{number}" for number in range(700)}
    for name in names:
        fs.write_bytes(f"/{name}", b"")
    assert set(fs.listdir()) == names
    entries = {entry.name: entry for entry in fs.scandir("/")}
    assert entries["file-5"].path == os.fspath(entries["file-5"]) == "/file-5"
    assert entries["file-5"].is_file()
    assert entries["file-5"].inode() == fs.stat("/file-5").st_ino


def test_entries_know_links(fs: Client) -> None:
    fs.mkdir("/d")
    fs.symlink("d", "/to-d")
    fs.symlink("none", "/to-none")
    entries = {entry.name: entry for entry in fs.scandir()}
    assert entries["to-d"].is_symlink()
    assert entries["to-d"].is_dir()
    assert not entries["to-d"].is_dir(follow_symlinks=False)
    assert not entries["to-none"].is_dir()
    assert stat.S_ISLNK(entries["to-d"].stat(follow_symlinks=False).st_mode)
    assert entries["to-d"].stat().st_ino == fs.stat("/d").st_ino


def test_names_are_moved_linked_and_removed(fs: Client) -> None:
    fs.write_bytes("/a", b"a")
    fs.write_bytes("/b", b"b")
    fs.exchange("/a", "/b")
    assert (fs.read_bytes("/a"), fs.read_bytes("/b")) == (b"b", b"a")
    with pytest.raises(FileExistsError):
        fs.rename_new("/a", "/b")
    with pytest.raises(FileExistsError):
        fs.link("/a", "/b")
    fs.replace("/a", "/b")
    assert fs.listdir() == ["b"]
    fs.rename("/b", "/c")
    fs.remove("/c")
    with pytest.raises(FileNotFoundError) as caught:
        fs.rename("/c", "/d")
    assert (caught.value.filename, caught.value.filename2) == ("/c", "/d")


def test_symbolic_links(fs: Client) -> None:
    fs.makedirs("/a/b")
    fs.write_bytes("/a/f", b"found")
    fs.symlink("../f", "/a/b/up")
    fs.symlink("a/b", "/down")
    fs.symlink("loop", "/loop")
    fs.symlink("/a/f", "/absolute")
    fs.symlink("../../../a/f", "/a/above")
    assert fs.read_bytes("/down/up") == b"found"
    assert fs.read_bytes("/a/above") == b"found"  # the root is above itself
    assert fs.readlink("/down") == "a/b"
    assert fs.is_symlink("/down")
    assert not fs.is_symlink("/down/")
    with pytest.raises(OSError, match="levels") as caught:
        fs.stat("/loop")
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(OSError, match="leads out of the region"):
        fs.read_bytes("/absolute")
    assert fs.exists("/a/f")
    assert not fs.exists("/loop")
    fs.write_bytes("/down/up", b"through a link")
    assert fs.read_bytes("/a/f") == b"through a link"
    fs.symlink("new", "/dangling")
    fs.write_bytes("/dangling", b"made")
    assert fs.read_bytes("/new") == b"made"


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda fs: fs.open("/none"), errno.ENOENT),
        (lambda fs: fs.open(""), errno.ENOENT),
        (lambda fs: fs.open("/f/none"), errno.ENOTDIR),
        (lambda fs: fs.open("/f/"), errno.ENOTDIR),
        (lambda fs: fs.open("/new/", "w"), errno.EISDIR),
        (lambda fs: fs.open("/d", "w"), errno.EISDIR),
        (lambda fs: fs.open("/d"), errno.EISDIR),
        (lambda fs: fs.open("/f", "x"), errno.EEXIST),
        (lambda fs: fs.open("/" + "x" * 256, "w"), errno.ENAMETOOLONG),
        (lambda fs: fs.read_bytes("/d"), errno.EISDIR),
        (lambda fs: fs.write_bytes("/d", b""), errno.EISDIR),
        (lambda fs: fs.write_bytes("/d", bytes(2 * MIB)), errno.EISDIR),
        (lambda fs: fs.write_bytes("/none/f", b""), errno.ENOENT),
        (lambda fs: fs.listdir("/f"), errno.ENOTDIR),
        (lambda fs: fs.remove("/d"), errno.EISDIR),
        (lambda fs: fs.remove("/none"), errno.ENOENT),
        (lambda fs: fs.rmdir("/f"), errno.ENOTDIR),
        (lambda fs: fs.rmdir("/"), errno.EBUSY),
        (lambda fs: fs.rename("/d", "/d/below"), errno.EINVAL),
        (lambda fs: fs.remove("/d/.."), errno.EINVAL),
        (lambda fs: fs.readlink("/f"), errno.EINVAL),
        (lambda fs: fs.link("/d", "/e"), errno.EPERM),
        (lambda fs: fs.truncate("/f", -1), errno.EINVAL),
        (lambda fs: fs.mkdir("/f/x"), errno.ENOTDIR),
    ],
)
def test_errors_are_oserrors_with_errno_and_filename(
    fs: Client, call: Callable[[Client], object], code: int
) -> None:
    fs.write_bytes("/f", b"")
    fs.mkdir("/d")
    with pytest.raises(OSError, match=r".") as caught:
        call(fs)
    assert caught.value.errno == code
    assert type(caught.value) is type(OSError(code, ""))
    assert caught.value.filename is not None
    assert isinstance(caught.value.__cause__, FsError)


def test_a_reader_refuses_changes(fs: Client, reader: Client) -> None:
    fs.write_bytes("/f", b"")
    changes: list[Callable[[], object]] = [
        lambda: reader.write_bytes("/f", b"x"),
        lambda: reader.open("/new", "w"),
        lambda: reader.mkdir("/d"),
        lambda: reader.remove("/f"),
    ]
    for change in changes:
        with pytest.raises(OSError, match=r"[Rr]ead-only") as caught:
            change()
        assert caught.value.errno == errno.EROFS


def test_attributes(fs: Client) -> None:
    fs.write_bytes("/f", b"12345")
    fs.chmod("/f", 0o600)
    fs.chown("/f", 7, -1)
    fs.truncate("/f", 3)
    fs.utime("/f", ns=(1_000_000_001, 2_000_000_002))
    status = fs.stat("/f")
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_size) == (0o600, 7, 3)
    assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    assert status.st_mtime == pytest.approx(2.000000002)
    assert status.st_blocks > 0
    assert fs.statvfs().blocks_avail > 0


def test_files_are_copied_in_and_out(fs: Client, tmp_path: Path) -> None:
    data = os.urandom(2 * MIB + 7)
    (tmp_path / "in").write_bytes(data)
    assert fs.copy_in(tmp_path / "in", "/f") == len(data)
    assert fs.copy_out("/f", tmp_path / "out") == len(data)
    assert (tmp_path / "out").read_bytes() == data
    assert fs.copy_in(io.BytesIO(b"stream"), "/f") == 6
    out = io.BytesIO()
    fs.copy_out("/f", out)
    assert out.getvalue() == b"stream"
    with pytest.raises(FileNotFoundError):
        fs.copy_out("/none", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]  # no half copy is left
    assert (tmp_path / "out").read_bytes() == data


def test_a_copy_in_that_fails_leaves_the_old_file(fs: Client) -> None:
    class Failing(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, "the disk is broken")

    fs.write_bytes("/f", b"old")
    with pytest.raises(OSError, match="broken"):
        fs.copy_in(Failing(), "/f")  # type: ignore[arg-type]
    assert fs.read_bytes("/f") == b"old"
    assert fs.session.call(lambda engine: engine.view().root.record.orphans) == 0


def test_names_that_are_not_utf8_come_back(fs: Client) -> None:
    fs.write_bytes(b"/\xff\xfe", b"odd")
    (name,) = fs.listdir()
    assert os.fsencode(name) == b"\xff\xfe"
    assert fs.read_bytes(name) == b"odd"


def test_a_path_is_a_path(fs: Client) -> None:
    fs.write_bytes(Path("/f"), b"x")
    assert fs.read_bytes(Path("f")) == b"x"
    with pytest.raises(ValueError, match="null"):
        fs.stat("/a\0b")
    with pytest.raises(TypeError):
        fs.stat(5)  # type: ignore[arg-type]
