"""Both front ends on real mounts of the test double: conversions, errors, waiting."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ivshmemfs.engine import Filesystem
from ivshmemfs.fuse import pyfuse3_frontend
from tests.fuse.fake_mount import FakeMount
from tests.support.mounts import eventually, needs_fuse

pytestmark = needs_fuse

MountFactory = Callable[..., FakeMount]

#: Both ways in which requests come: read here first, or all of them by pyfuse3.
LOOPS = ("poll", "trio")


@pytest.fixture(params=LOOPS)
def mnt(mount: MountFactory, request: pytest.FixtureRequest) -> FakeMount:
    """One mount of the test double."""
    return mount("-o", f"loop={request.param}")


@pytest.fixture(scope="module", params=LOOPS)
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FakeMount]:
    """One mount for all tests that each work in a directory of their own."""
    one = FakeMount(tmp_path_factory.mktemp("shared"), "-o", f"loop={request.param}")
    try:
        yield one
    finally:
        one.end()


def error_of(call: Callable[[], object]) -> int:
    """The errno that *call* fails with; 0 when it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


# --- conversions ------------------------------------------------------------------------------


def test_a_file_comes_back_as_written(mnt: FakeMount) -> None:
    data = os.urandom(3_000_001)
    (mnt.path / "f").write_bytes(data)
    assert (mnt.path / "f").read_bytes() == data
    with open(mnt.path / "f", "r+b", buffering=0) as file:
        file.seek(1_500_000)
        assert file.write(b"middle") == 6
        assert (
            os.pread(file.fileno(), 8, 1_499_999)
            == data[1_499_999:1_500_000] + b"middle" + (data[1_500_006:1_500_007])
        )


def test_one_write_call_of_a_mebibyte_is_one_request(mnt: FakeMount) -> None:
    fd = os.open(mnt.path / "f", os.O_CREAT | os.O_WRONLY)
    try:
        mnt.fail("write", "FsError", 1)
        assert error_of(lambda: os.write(fd, bytes(1 << 20))) == errno.EXDEV
        # Had the call been split, a later part would have been written past the first.
        assert os.fstat(fd).st_size == 0
        assert os.write(fd, bytes(1 << 20)) == 1 << 20
    finally:
        os.close(fd)


def test_attributes_come_through(mnt: FakeMount) -> None:
    path = mnt.path / "f"
    path.write_bytes(b"12345")
    path.chmod(0o640)
    os.chown(path, 1234, 5678)
    os.utime(path, ns=(1_000_000_001, -1_500_000_000))
    seen = path.stat()
    assert stat.S_IMODE(seen.st_mode) == 0o640
    assert stat.S_ISREG(seen.st_mode)
    assert (seen.st_uid, seen.st_gid, seen.st_nlink, seen.st_size) == (1234, 5678, 1, 5)
    assert (seen.st_atime_ns, seen.st_mtime_ns) == (1_000_000_001, -1_500_000_000)
    assert seen.st_blocks == 1


def test_utime_now_and_omit(mnt: FakeMount) -> None:
    path = mnt.path / "f"
    path.touch()
    os.utime(path, ns=(5, 6))
    before = time.time_ns()
    os.utime(path)
    seen = path.stat()
    assert before - 10**9 < seen.st_atime_ns <= time.time_ns()
    assert before - 10**9 < seen.st_mtime_ns <= time.time_ns()
    path.chmod(0o600)
    assert path.stat().st_mtime_ns == seen.st_mtime_ns


def test_names_of_all_kinds(mnt: FakeMount) -> None:
    root = os.fsencode(mnt.path)
    for name in (b"n" * 255, b"\xff\xfe not utf-8", b"new\nline", "größe".encode()):
        with open(root + b"/" + name, "wb") as file:
            file.write(name)
        with open(root + b"/" + name, "rb") as file:
            assert file.read() == name
        assert name in os.listdir(root)
    assert error_of(lambda: os.stat(root + b"/" + b"n" * 256)) == errno.ENAMETOOLONG


def test_kinds_of_inodes(mnt: FakeMount) -> None:
    os.mkdir(mnt.path / "d")
    os.symlink("a target/that is not there", mnt.path / "s")
    os.mkfifo(mnt.path / "p")
    os.link(mnt.path / "p", mnt.path / "p2")
    assert os.readlink(mnt.path / "s") == "a target/that is not there"
    assert stat.S_ISFIFO(os.stat(mnt.path / "p2").st_mode)
    assert os.stat(mnt.path / "p").st_nlink == 2
    if os.geteuid() == 0:
        os.mknod(mnt.path / "b", stat.S_IFBLK | 0o600, os.makedev(7, 300))
        seen = os.stat(mnt.path / "b")
        assert stat.S_ISBLK(seen.st_mode)
        assert seen.st_rdev == os.makedev(7, 300)
    os.rmdir(mnt.path / "d")
    os.unlink(mnt.path / "p2")
    assert sorted(set(os.listdir(mnt.path)) - {"b"}) == ["p", "s"]


def test_rename_and_its_flags(mnt: FakeMount) -> None:
    ctypes = pytest.importorskip("ctypes")
    libc = ctypes.CDLL(None, use_errno=True)
    one, two = os.fsencode(mnt.path / "1"), os.fsencode(mnt.path / "2")

    def renameat2(flags: int) -> int:
        result = libc.renameat2(-100, one, -100, two, flags)
        return ctypes.get_errno() if result else 0

    (mnt.path / "1").write_text("one")
    (mnt.path / "2").write_text("two")
    assert renameat2(1) == errno.EEXIST
    assert renameat2(2) == 0
    assert (mnt.path / "1").read_text() == "two"
    assert (mnt.path / "2").read_text() == "one"
    os.rename(one, two)
    assert (mnt.path / "2").read_text() == "two"
    assert not (mnt.path / "1").exists()


def test_truncate_append_and_exclusive(mnt: FakeMount) -> None:
    path = mnt.path / "f"
    path.write_text("long content")
    path.write_text("short")  # O_TRUNC
    with open(path, "a") as one, open(path, "a") as two:
        for file in (one, two, one):
            file.write("+")
            file.flush()
    assert path.read_text() == "short+++"
    os.truncate(path, 3)
    assert path.read_text() == "sho"
    os.truncate(path, 5)
    assert path.read_bytes() == b"sho\0\0"
    assert error_of(lambda: os.open(path, os.O_CREAT | os.O_EXCL)) == errno.EEXIST


def test_unlinked_but_open(mnt: FakeMount) -> None:
    path = mnt.path / "f"
    with open(path, "w+b", buffering=0) as file:
        file.write(b"still here")
        path.unlink()
        assert os.pread(file.fileno(), 100, 0) == b"still here"
        assert os.fstat(file.fileno()).st_nlink == 0
        os.ftruncate(file.fileno(), 5)
        assert os.pread(file.fileno(), 100, 0) == b"still"


def test_statfs(mnt: FakeMount) -> None:
    seen = os.statvfs(mnt.path)
    assert (seen.f_bsize, seen.f_frsize, seen.f_namemax) == (4096, 4096, 255)
    assert (seen.f_blocks, seen.f_bfree, seen.f_bavail) == (1000, 600, 500)
    assert (seen.f_files, seen.f_ffree) == (2000, 1500)


def test_xattrs(mnt: FakeMount) -> None:
    path = mnt.path / "f"
    path.touch()
    os.setxattr(path, "user.a", b"1\x002")
    os.setxattr(path, "user.empty", b"")
    assert os.getxattr(path, "user.a") == b"1\x002"
    assert os.getxattr(path, "user.empty") == b""
    assert {"user.a", "user.empty"} <= set(os.listxattr(path))
    os.removexattr(path, "user.a")
    assert error_of(lambda: os.getxattr(path, "user.a")) == errno.ENODATA
    assert error_of(lambda: os.removexattr(path, "user.a")) == errno.ENODATA


def test_xattr_flags_reach_the_engine(mnt: FakeMount) -> None:
    path = mnt.path / "f"
    path.touch()

    def flags() -> bytes:
        return os.getxattr(path, "user.flags-of-the-last-setxattr")

    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    assert flags() == b"1"
    os.setxattr(path, "user.a", b"2", os.XATTR_REPLACE)
    assert flags() == b"2"
    # A look at an attribute before a plain setxattr must not be taken for a flag.
    assert error_of(lambda: os.getxattr(path, "user.missing")) == errno.ENODATA
    os.setxattr(path, "user.a", b"3")
    assert flags() == b"0"
    assert error_of(lambda: os.setxattr(path, "user.a", b"4", os.XATTR_CREATE)) == errno.EEXIST
    assert error_of(lambda: os.setxattr(path, "user.b", b"5", os.XATTR_REPLACE)) == errno.ENODATA


def test_nothing_is_cached(mnt: FakeMount) -> None:
    """Attributes, names and failed lookups are asked for again each time."""
    path = mnt.path / "f"
    path.touch()
    path.stat()
    # The kernel takes an error about a name that it knows for "look it up again".
    mnt.fail("find", "FsError", 2)
    assert error_of(path.stat) == errno.EXDEV
    mnt.fail("getattr", "FsError")
    assert error_of(lambda: os.stat(mnt.path)) == errno.EXDEV
    missing = mnt.path / "missing"
    assert error_of(missing.stat) == errno.ENOENT
    mnt.fail("find", "FsError")
    assert error_of(missing.stat) == errno.EXDEV


def test_dot_and_dot_dot_are_reported(mnt: FakeMount) -> None:
    ctypes = pytest.importorskip("ctypes")
    libc = ctypes.CDLL(None, use_errno=True)
    os.mkdir(mnt.path / "d")
    fd = os.open(mnt.path / "d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        buffer = ctypes.create_string_buffer(4096)
        length = libc.syscall(217, fd, buffer, 4096) if os.uname().machine == "x86_64" else -1
    finally:
        os.close(fd)
    if length < 0:
        pytest.skip("getdents64 has another number here")
    assert b"\x04.\x00" in buffer.raw[:length]
    assert b"\x04..\x00" in buffer.raw[:length]


def test_reading_a_large_directory_that_changes(mnt: FakeMount) -> None:
    stable = {f"stable-{number:05}" for number in range(10_000)}
    directory = mnt.path / "d"
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in stable:
            os.mknod(name, dir_fd=fd)
        stop = threading.Event()
        churned = 0

        def churn() -> None:
            nonlocal churned
            while not stop.is_set():
                name = f"churn-{churned}"
                os.mknod(name, dir_fd=fd)
                os.unlink(name, dir_fd=fd)
                churned += 1

        worker = threading.Thread(target=churn)
        worker.start()
        try:
            for _round in range(3):
                names = [name for name in os.listdir(directory) if name.startswith("stable")]
                assert len(names) == len(stable)
                assert set(names) == stable
        finally:
            stop.set()
            worker.join(20)
        assert churned > 10
    finally:
        os.close(fd)


# --- owners as presented ----------------------------------------------------------------------


def test_presented_owner_and_umask(mount: MountFactory) -> None:
    one = mount("-o", "uid=1000,gid=1001,umask=027")
    path = one.path / "f"
    path.touch()
    path.chmod(0o777)
    seen = path.stat()
    assert (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (1000, 1001, 0o750)
    os.chown(path, 1000, 1001)  # what it seems to be already
    assert error_of(lambda: os.chown(path, 0, -1)) == errno.EPERM
    assert error_of(lambda: os.chown(path, -1, 0)) == errno.EPERM
    listed = {entry.name: entry.stat().st_uid for entry in os.scandir(one.path)}
    assert listed == {"f": 1000}


# --- errors -----------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Path], object]] = {
    "find": lambda root: os.stat(root / "file"),
    "names_lead_to": lambda root: _look_at_both(root, "file", "twin"),
    "getattr": lambda root: os.stat(root.parent),  # the mount point: no look-up
    "setattr": lambda root: os.chmod(root / "file", 0o600),
    "readlink": lambda root: os.readlink(root / "link"),
    "mknod": lambda root: os.mkfifo(root / "new-fifo"),
    "mkdir": lambda root: os.mkdir(root / "new-dir"),
    "symlink": lambda root: os.symlink("x", root / "new-link"),
    "link": lambda root: os.link(root / "file", root / "new-hard-link"),
    "unlink": lambda root: os.unlink(root / "doomed"),
    "rmdir": lambda root: os.rmdir(root / "doomed-dir"),
    "rename": lambda root: os.rename(root / "file", root / "file2"),
    "create": lambda root: (root / "new-file").write_bytes(b""),
    "open": lambda root: (root / "file").read_bytes(),
    "read": lambda root: (root / "file").read_bytes(),
    "write": lambda root: (root / "file").write_bytes(b"new content"),
    "fsync": lambda root: _fsync(root / "file"),
    "opendir": lambda root: os.listdir(root),
    "lookup_number": lambda root: os.listdir(root),
    "entries": lambda root: os.listdir(root),
    "readdir-entry": lambda root: os.listdir(root),
    "statfs": lambda root: os.statvfs(root),
    "getxattr": lambda root: os.getxattr(root / "file", "user.x"),
    "setxattr": lambda root: os.setxattr(root / "file", "user.x", b"y"),
    "listxattr": lambda root: os.listxattr(root / "file"),
    "removexattr": lambda root: os.removexattr(root / "file", "user.x"),
    "seek": lambda root: _with_file(root, lambda fd: os.lseek(fd, 0, os.SEEK_DATA)),
    "fallocate": lambda root: _with_file(root, lambda fd: _libc("fallocate", fd, 0, 0, 100)),
}
KERNEL = tuple(int(part) for part in os.uname().release.split(".")[:2])
if KERNEL >= (6, 2):
    OPERATIONS["tmpfile"] = lambda root: os.close(os.open(root, os.O_TMPFILE | os.O_RDWR))
if KERNEL >= (6, 6):
    OPERATIONS["birth_time"] = lambda root: _statx(root / "file")
#: The client is not told how these end.
SILENT_OPERATIONS = ("release", "releasedir", "tick", "work", "condition", "forget")
#: Requests that pyfuse3 does not hand on.
DIRECT_ONLY = ("seek", "fallocate", "tmpfile", "birth_time")
#: What only pyfuse3 asks for: it lists names with attributes.  Else NFS alone does.
PYFUSE3_ONLY = ("lookup_number",)
#: How a handler is called in the log, where that is not what the engine calls the operation.
HANDLERS = {
    "find": "lookup",
    "names_lead_to": "lookup",
    "readdir-entry": "readdir",
    "entries": "readdir",
    "lookup_number": "readdir",
    "seek": "lseek",
    "birth_time": "statx",
}
#: Methods that are not operations of a client.
UNASKED = {"access_list", "groups_of", "is_committing", "keeps_set_id", "locks", "shares_locks"}
#: What `pages` asks beside requests; its failures are shown in tests/posix/test_mapping.py.
UNASKED |= {"commit_word", "is_open", "look", "name_mount_point", "only_own_commits"}
#: What `pretence` asks for the replayer; see tests/fuse/test_pretence.py.
UNASKED |= {"unattended"}
#: What `wakeups` waits for.
UNASKED |= {"bells"}
#: What `upkeep` looks at; its failures are shown in tests/cli/test_condition.py.
UNASKED |= {"region"}
#: How an operation ends on the test double where that is not success.
ENDS = {"tmpfile": errno.EOPNOTSUPP}


def _libc(name: str, *arguments: object) -> None:
    """A call of the C library that Python does not have."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    if getattr(libc, name)(*words):
        raise OSError(ctypes.get_errno(), name)


def _statx(path: Path) -> None:
    birth_time, here = 0x800, -100
    _libc("statx", here, os.fsencode(path), 0, birth_time, ctypes.create_string_buffer(256))


def _with_file(root: Path, call: Callable[[int], object]) -> None:
    fd = os.open(root / "file", os.O_RDWR)
    try:
        call(fd)
    finally:
        os.close(fd)


def test_every_call_of_the_engine_is_among_the_operations() -> None:
    """So that no new handler goes without injected exceptions."""
    sources = "".join(
        path.read_text() for path in Path(pyfuse3_frontend.__file__).parent.glob("*.py")
    )
    asked = set(re.findall(r"\b_?fs\.([a-z_]+)\b", sources)) & set(dir(Filesystem))
    # Older kernels do not ask for all that pyfuse3 does not know either.
    assert asked - UNASKED - set(DIRECT_ONLY) <= set(OPERATIONS) | set(SILENT_OPERATIONS)
    assert set(DIRECT_ONLY) <= asked


def is_asked(operation: str, request: pytest.FixtureRequest) -> bool:
    """Whether requests as the mount of this test gets them call the operation."""
    return operation not in (DIRECT_ONLY if "trio" in request.node.callspec.id else PYFUSE3_ONLY)


def _look_at_both(root: Path, *names: str) -> None:
    """Look names up one after the other, and nothing in between."""
    folder = os.open(root, os.O_PATH)
    try:
        for name in names:
            os.stat(name, dir_fd=folder)
    finally:
        os.close(folder)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def populate(root: Path) -> None:
    """Make what `OPERATIONS` work on."""
    (root / "file").write_bytes(b"content")
    os.setxattr(root / "file", "user.x", b"value")
    os.link(root / "file", root / "twin")
    (root / "doomed").touch()
    (root / "link").symlink_to("file")
    (root / "doomed-dir").mkdir()


@pytest.fixture
def corner(shared: FakeMount, request: pytest.FixtureRequest) -> Path:
    """A directory on the shared mount with what `OPERATIONS` work on."""
    path = shared.path / re.sub(r"\W", "-", request.node.name)
    path.mkdir()
    populate(path)
    return path


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_exception_in_every_handler_is_an_errno(
    shared: FakeMount, corner: Path, operation: str, request: pytest.FixtureRequest
) -> None:
    if not is_asked(operation, request):
        assert error_of(lambda: OPERATIONS[operation](corner)) in (0, errno.EOPNOTSUPP)
        return
    expected = {
        "FsError": errno.EXDEV,
        "Corrupt": errno.EUCLEAN,
        "OSError": errno.EIO,
        "struct.error": errno.EIO,
        "KeyError": errno.EIO,
        "ValueError": errno.EIO,
        "MemoryError": errno.ENOMEM,
        "zero": errno.EIO,
        "negative": errno.EIO,
    }
    seen = {}
    for exception in expected:
        # More than once for a look-up: the kernel asks again about a name that it knows.
        count = 3 if operation in ("find", "names_lead_to") else 1
        shared.fail(operation, exception, count)
        seen[exception] = error_of(lambda: OPERATIONS[operation](corner))
        assert shared.left() < count, f"{operation} was not called"
        shared.fail(operation, exception, 0)
    assert seen == expected
    assert shared.alive
    assert error_of(lambda: OPERATIONS[operation](corner)) == ENDS.get(operation, 0)
    log, handler = shared.log_text(), HANDLERS.get(operation, operation)
    for unexpected in ("OSError", "error", "KeyError", "ValueError", "MemoryError"):
        assert f"{handler}: unexpected {unexpected}\nTraceback" in log
    assert f"{handler}: injected: block 7 is torn" in log
    assert "cross-device" not in log.lower(), "an ordinary failure is no event"


@pytest.mark.slow
@pytest.mark.parametrize("operation", SILENT_OPERATIONS)
def test_exceptions_that_no_client_sees(mnt: FakeMount, operation: str) -> None:
    populate(mnt.path)
    for exception in ("OSError", "KeyError", "struct.error", "MemoryError", "Corrupt"):
        mnt.fail(operation, exception)
        os.listdir(mnt.path)
        (mnt.path / "file").read_bytes()
        (mnt.path / "gone").touch()
        (mnt.path / "gone").unlink()  # and so forgotten
        assert eventually(lambda: mnt.left() == 0, 5)
    assert mnt.alive
    assert (mnt.path / "file").read_bytes() == b"content"
    assert eventually(lambda: "KeyError: 'injected'" in mnt.log_text(), 5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_busy_is_tried_again(
    shared: FakeMount, corner: Path, operation: str, request: pytest.FixtureRequest
) -> None:
    if not is_asked(operation, request):
        return
    logged = len(shared.log_text())
    shared.fail(operation, "Busy", 7)
    started = time.monotonic()
    assert error_of(lambda: OPERATIONS[operation](corner)) == ENDS.get(operation, 0)
    assert shared.left() == 0
    assert time.monotonic() - started < 8
    assert "ERROR" not in shared.log_text()[logged:]


@pytest.mark.slow
def test_a_busy_operation_does_not_stop_others(mnt: FakeMount) -> None:
    populate(mnt.path)
    mnt.fail("readlink", "Busy", 400)
    slow: list[str] = []
    waiting = threading.Thread(target=lambda: slow.append(os.readlink(mnt.path / "link")))
    waiting.start()
    served = 0
    while waiting.is_alive() and served < 20:
        os.stat(mnt.path / "file")
        served += 1
    assert served == 20, "requests were not served while another one was waiting"
    waiting.join(20)
    assert slow == ["file"]


def test_what_goes_on_for_many_turns_loses_no_patience(mount: MountFactory) -> None:
    """Nor does it wait between them, and others are served."""
    mnt = mount(FAKE_PATIENCE="0.05")
    populate(mnt.path)
    mnt.fail("readlink", "Unfinished", 2000)
    ends: list[str] = []
    waiting = threading.Thread(target=lambda: ends.append(os.readlink(mnt.path / "link")))
    waiting.start()
    for _ in range(20):
        os.stat(mnt.path / "file")
    assert mnt.left() > 0, "others waited until it had ended"
    waiting.join(30)
    assert ends == ["file"]


def test_busy_for_ever_ends_in_an_error(mount: MountFactory) -> None:
    mnt = mount(FAKE_PATIENCE="1")
    populate(mnt.path)
    mnt.fail("readlink", "Busy", 10**9)
    started = time.monotonic()
    assert error_of(lambda: os.readlink(mnt.path / "link")) == errno.EIO
    assert 0.9 < time.monotonic() - started < 8
    assert "still busy" in mnt.log_text()
    mnt.fail("readlink", "Busy", 0)
    assert os.readlink(mnt.path / "link") == "file"


def test_many_busy_operations_at_once(mnt: FakeMount) -> None:
    """More waiting requests than workers, and all of them end."""
    populate(mnt.path)
    mnt.fail("getxattr", "Busy", 300)
    values: list[bytes] = []

    def read() -> None:
        values.append(os.getxattr(mnt.path / "file", "user.x"))

    threads = [threading.Thread(target=read) for _number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert values == [b"value"] * 60
    assert mnt.alive


def test_killed_clients_leave_the_daemon_serving(mnt: FakeMount) -> None:
    """A request withdrawn before it is read must not block the daemon in read(2)."""
    import signal
    import subprocess
    import sys

    populate(mnt.path)
    busy = f"import os\nwhile True: os.stat({str(mnt.path / 'file')!r})"
    for _round in range(10):
        clients = [subprocess.Popen([sys.executable, "-c", busy]) for _number in range(4)]
        time.sleep(0.1)
        for client in clients:
            client.send_signal(signal.SIGKILL)
        for client in clients:
            client.wait(10)
        assert (mnt.path / "file").read_bytes() == b"content"
    assert mnt.alive
