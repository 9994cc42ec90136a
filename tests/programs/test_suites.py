"""Test suites and torture programs of others, with a mount as their place of work."""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.programs.programs import run
from tests.support.lab import SHARED_MAPPINGS, needs_fuse, needs_root
from tests.support.programs import find

pytestmark = [needs_fuse, needs_root, pytest.mark.slow]
NOBODY = 65534


# --- python's own tests -------------------------------------------------------------------------

#: Slow parts that show nothing more here; the long form runs them, too.
SLOW = ["test_walk_many_open_files", "test_fd_leak", "test_large_file", "test_large_offset"]
MODULES = {
    "short": ["test_os", "test_shutil", "test_tempfile", "test_mmap"],
    "long": ["test_posix", "test_pathlib", "test_glob", "test_zipfile", "test_tarfile",
             "test_fileio", "test_io", "test_largefile", "test_mailbox", "test_dbm", "test_shelve",
             "test_fcntl", "test_stat", "test_filecmp", "test_posixpath", "test_file"],
}  # fmt: skip


@pytest.mark.parametrize("user", [0, NOBODY], ids=["root", "user"])
def test_python(here: Path, long_run: bool, user: int) -> None:
    if not Path(sysconfig.get_path("stdlib"), "test/test_os.py").exists():
        find(f"libpython{sys.version_info[0]}.{sys.version_info[1]}-testsuite")
    work = here / "work"
    work.mkdir()
    work.chmod(0o777)
    words = ["/usr/bin/python3", "-m", "test", "-q"]
    if not long_run:
        for name in SLOW:
            words += ["-i", f"*{name}*"]
    modules = MODULES["short"] + (MODULES["long"] if long_run else [])
    said = run(*words, *modules, cwd=work, seconds=3000 if long_run else 240, user=user)
    assert "SUCCESS" in said


# --- fio ----------------------------------------------------------------------------------------

ENGINES = {
    "psync": ["--ioengine=psync"],
    "libaio": ["--ioengine=libaio", "--iodepth=8", "--direct=1"],
    "mmap": ["--ioengine=mmap"],
    "vsync": ["--ioengine=vsync", "--iodepth=4"],
    "posixaio": ["--ioengine=posixaio", "--iodepth=4"],
}


@pytest.mark.parametrize("pattern", ["randrw", "write", "randwrite"])
@pytest.mark.parametrize("engine", ENGINES)
def test_fio_verifies_what_it_wrote(here: Path, long_run: bool, engine: str, pattern: str) -> None:
    if engine == "mmap" and not SHARED_MAPPINGS:
        pytest.skip("shared mappings need Linux 6.6, or -o mmap")
    said = run(
        "fio", "--name=v", "--directory=.", f"--size={'64M' if long_run else '3M'}",
        f"--rw={pattern}", "--bsrange=512-64k" if engine == "psync" else "--bs=4k",
        "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0",
        "--numjobs=2", "--group_reporting", f"--loops={4 if long_run else 1}",
        *ENGINES[engine], cwd=here, seconds=3600 if long_run else 900,
    )  # fmt: skip
    assert "err= 0" in said


# --- load generators ----------------------------------------------------------------------------


def test_dbench(here: Path, long_run: bool) -> None:
    said = run("dbench", "-D", ".", "-t", 120 if long_run else 4, 4, cwd=here, seconds=900)
    found = re.search(r"Throughput ([0-9.]+) MB/sec", said)
    assert found is not None
    assert float(found[1]) > 0
    # Its own start needs a semaphore of the machine, which says nothing about files.
    assert "failed" not in said.lower().replace("failed to create barrier semaphore", "")


def test_bonnie(here: Path, long_run: bool) -> None:
    size, files = ("256M:64k", "8:20000:10:16") if long_run else ("24M:64k", "1:2000:10:4")
    said = run("bonnie++", "-d", ".", "-s", size, "-r", 12, "-n", files, "-u", "root", "-q", "-f",
               "-D" if long_run else "-b", cwd=here, seconds=3600)  # fmt: skip
    assert said.strip()


def test_postmark(here: Path, long_run: bool) -> None:
    number, transactions = (3000, 20_000) if long_run else (150, 400)
    script = here / "script"
    script.write_text(
        f"set location {here}\nset number {number}\nset transactions {transactions}\n"
        "set size 500 20000\nset subdirectories 5\nrun\nquit\n"
    )
    assert "Deletion alone" in run("postmark", script, cwd=here, seconds=1200)


#: stress-ng's stressors that have to do with files; each checks what it does.  Not those that need
#: another kind of device below (bind-mount, loop, swap).
STRESSORS = [
    "access", "aio", "aiol", "chattr", "chdir", "chmod", "chown", "copy-file", "dentry", "dir",
    "dirdeep", "dirmany", "dnotify", "dup", "fallocate", "fanotify", "fcntl", "fiemap",
    "file-ioctl", "filename", "flock", "fpunch", "fsize", "fstat", "getdent", "handle", "hdd",
    "inode-flags", "inotify", "io", "io-uring", "iomix", "lease", "link", "locka", "lockf",
    "lockofd", "mknod", "open", "readahead", "rename", "revio", "seek", "sendfile", "splice",
    "symlink", "sync-file", "touch", "utime", "verity", "xattr",
]  # fmt: skip
NEEDS_SHARED_MAPPINGS = ["fault", "mmap", "msync"]


def test_stress_ng(here: Path, long_run: bool) -> None:
    stressors = STRESSORS + (NEEDS_SHARED_MAPPINGS if SHARED_MAPPINGS else [])
    if long_run:
        for one in stressors:
            run("stress-ng", "--temp-path", ".", f"--{one}", 4, "--timeout", 20, "--verify", "-q",
                cwd=here, seconds=300)  # fmt: skip
        return
    words: list[object] = ["stress-ng", "--temp-path", ".", "--timeout", 12, "--verify", "-q"]
    for one in stressors:
        words += [f"--{one}", 1]
    run(*words, cwd=here, seconds=300)


def test_stress_ng_on_both_mounts(here: Path, there: Path, long_run: bool) -> None:
    """Two machines torture two directories of one region."""
    import threading

    find("stress-ng")
    failures: list[BaseException] = []

    def torture(place: Path, name: str) -> None:
        (place / name).mkdir()
        words: list[object] = ["--timeout", 60 if long_run else 5, "--verify", "-q"]
        words += ["--hdd-bytes", "16M"]  # a gigabyte each, as it has it, would fill the region
        for one in ("dentry", "dir", "rename", "hdd", "link", "symlink", "xattr", "chmod"):
            words += [f"--{one}", 1]
        try:
            run("stress-ng", "--temp-path", ".", *words, cwd=place / name, seconds=400)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=torture, args=args) for args in ((here, "a"), (there, "b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
