"""mmap(2): what works, what is coherent, and what is not (docs/semantics.md says the same)."""

from __future__ import annotations

import faulthandler
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.posix.raising import fails
from tests.support.lab import SHARED_MAPPINGS, Lab, needs_fuse, needs_root, new_lab

pytestmark = [needs_fuse, needs_root]
shared = pytest.mark.skipif(not SHARED_MAPPINGS, reason="needs Linux 6.6: see -o mmap")
PAGE = mmap.PAGESIZE
PATIENCE = 20.0


def mapped(path: Path, length: int = 0, flags: int = mmap.MAP_SHARED) -> mmap.mmap:
    """A mapping of a whole file, readable and writable."""
    fd = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(fd, length, flags)
    finally:
        os.close(fd)


# --- on one mount -----------------------------------------------------------------------------


def test_programs_and_libraries_run_from_a_mount(here: Path, there: Path) -> None:
    shutil.copy(shutil.which("expr") or "/usr/bin/expr", here / "program")
    answer = subprocess.run([there / "program", "6", "*", "7"], capture_output=True, check=True)
    assert answer.stdout == b"42\n"
    (here / "script").write_text(f"#!{sys.executable}\nprint('ran')\n")
    (here / "script").chmod(0o755)
    assert subprocess.check_output([there / "script"]) == b"ran\n"


def test_a_program_that_another_machine_replaced(here: Path, there: Path) -> None:
    """Each start runs what the file holds then."""
    for name in ("true", "false", "true", "false"):
        source = shutil.which(name) or f"/usr/bin/{name}"
        shutil.copy(source, here / "new")
        os.rename(here / "new", here / "program")
        assert subprocess.run([there / "program"], check=False).returncode == int(name == "false")
    for name in ("true", "false"):
        (here / "program").write_bytes(Path(shutil.which(name) or "").read_bytes())
        assert subprocess.run([there / "program"], check=False).returncode == int(name == "false")


def test_private_mappings_keep_their_changes_to_themselves(here: Path) -> None:
    (here / "file").write_bytes(b"a" * 10_000)
    with mapped(here / "file", flags=mmap.MAP_PRIVATE) as mapping:
        mapping[5000:5003] = b"own"
        assert mapping[4999:5004] == b"aowna"
    assert (here / "file").read_bytes() == b"a" * 10_000


@shared
def test_shared_mappings_and_calls_agree_on_one_mount(here: Path) -> None:
    (here / "file").write_bytes(bytes(5 * PAGE))
    with mapped(here / "file") as mapping, mapped(here / "file") as second:
        fd = os.open(here / "file", os.O_RDWR)
        for number in range(1, 50):
            at = number * 397
            mapping[at : at + 3] = b"map"
            assert os.pread(fd, 3, at) == b"map"
            assert second[at : at + 3] == b"map"
            os.pwrite(fd, b"call", at)
            assert mapping[at : at + 4] == b"call"
        os.close(fd)


@shared
def test_what_a_dead_process_had_mapped_is_kept(here: Path, there: Path) -> None:
    (here / "file").write_bytes(bytes(3 * PAGE))
    pid = os.fork()
    if pid == 0:
        mapping = mapped(here / "file")
        mapping[PAGE : PAGE + 4] = b"kept"
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    end = time.monotonic() + 60
    with (here / "file").open("rb") as file:
        os.fsync(file.fileno())
        assert file.read()[PAGE : PAGE + 4] == b"kept"
    while (there / "file").read_bytes()[PAGE : PAGE + 4] != b"kept" and time.monotonic() < end:
        time.sleep(0.2)
    assert (there / "file").read_bytes()[PAGE : PAGE + 4] == b"kept"


@shared
def test_an_unlinked_file_stays_mapped(here: Path, there: Path) -> None:
    (here / "file").write_bytes(b"x" * PAGE)
    with mapped(here / "file") as mapping:
        os.unlink(there / "file")
        mapping[0:3] = b"yes"
        mapping.flush()
        assert mapping[0:4] == b"yesx"


def test_touching_behind_the_end_is_a_bus_error(here: Path, there: Path) -> None:
    """As on any file system, also when another machine moved the end."""
    (here / "file").write_bytes(b"x" * (3 * PAGE))
    for place in (here, there):
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            fd = os.open(here / "file", os.O_RDONLY)
            mapping = mmap.mmap(fd, 3 * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ)
            os.truncate(place / "file", 10)
            os.fstat(fd)
            os._exit(mapping[2 * PAGE])
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -7
        (here / "file").write_bytes(b"x" * (3 * PAGE))


# --- between mounts ---------------------------------------------------------------------------


@shared
def test_a_flushed_mapping_is_seen_elsewhere(here: Path, there: Path) -> None:
    """msync(2) publishes: calls and new mappings on other machines see it."""
    (here / "file").write_bytes(bytes(4 * PAGE))
    with mapped(here / "file") as mapping:
        for number in range(20):
            at = number * 700
            mapping[at : at + 5] = b"%05d" % number
            mapping.flush()
            with (there / "file").open("rb") as file:
                assert file.read()[at : at + 5] == b"%05d" % number
            with mapped(there / "file") as other:
                assert other[at : at + 5] == b"%05d" % number


@shared
def test_what_is_not_flushed_is_not_seen_elsewhere(here: Path, there: Path) -> None:
    """The documented exception: pages that are mapped belong to one machine."""
    (here / "file").write_bytes(b"old" + bytes(PAGE))
    with mapped(here / "file") as mapping, mapped(there / "file") as other:
        assert other[0:3] == b"old"
        mapping[0:3] = b"new"
        assert (there / "file").read_bytes()[0:3] == b"old"
        assert other[0:3] == b"old"
        mapping.flush()
        assert (there / "file").read_bytes()[0:3] == b"new"
        assert other[0:3] == b"new", "opening the file drops pages that were only read"


def _comes(look: Callable[[], bytes], wanted: bytes) -> bool:
    """Whether *look* returns *wanted* within PATIENCE seconds; nothing else touches the file."""
    end = time.monotonic() + PATIENCE
    while look() != wanted:
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


@shared
def test_a_mapped_page_follows_what_others_write(here: Path, there: Path) -> None:
    (here / "file").write_bytes(b"0" * (64 * PAGE))
    with mapped(here / "file") as mapping, (there / "file").open("r+b", buffering=0) as other:
        for number in range(1, 20):
            at = number * 3 * PAGE
            assert mapping[at : at + 2] in (b"00", b"%02d" % (number - 1))
            os.pwrite(other.fileno(), b"%02d" % number, at)
            assert _comes(lambda at=at: mapping[at : at + 2], b"%02d" % number)  # type: ignore[misc]


def _sees_it_grow(here: Path, there: Path, size: int) -> bool:
    """In a process of its own, which a bus error may end."""
    (here / "file").write_bytes(bytes(8 * PAGE))
    mapping = mapped(here / "file")
    os.truncate(here / "file", 100)
    before = mapping[:100]
    with (there / "file").open("r+b", buffering=0) as other:
        other.write(b"b" * size)
    known = _comes(lambda: mapping[:PAGE], b"b" * PAGE)
    return known and before == bytes(100) and mapping[:size] == b"b" * size


@shared
@pytest.mark.parametrize("size", [2 * PAGE, 2 * PAGE + 1, 5 * PAGE + 17])
def test_a_mapped_file_that_others_make_longer(here: Path, there: Path, size: int) -> None:
    """The size that a page fault relies on follows too; nothing looks at the file meanwhile."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        code = 1
        try:
            code = 0 if _sees_it_grow(here, there, size) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@shared
def test_dirty_pages_win_as_the_later_write(here: Path, there: Path) -> None:
    """What is stored here before the other machine's change arrives replaces the whole page."""
    (here / "file").write_bytes(b"-" * (2 * PAGE))
    with mapped(here / "file") as mapping, (there / "file").open("r+b", buffering=0) as other:
        assert mapping[PAGE : PAGE + 1] == b"-"
        mapping[0:4] = b"mine"
        os.pwrite(other.fileno(), b"theirs", PAGE - 6)
        os.pwrite(other.fileno(), b"theirs", PAGE)
        assert _comes(lambda: mapping[PAGE : PAGE + 6], b"theirs")
        assert _comes(lambda: os.pread(other.fileno(), 4, 0), b"mine")
        assert os.pread(other.fileno(), 6, PAGE - 6) == b"------"
        assert os.pread(other.fileno(), 6, PAGE) == b"theirs"


@shared
def test_many_dirty_pages_and_many_changes_elsewhere(here: Path, there: Path) -> None:
    """The kernel writes pages back from inside the notification: nothing may hang."""
    pages = 512
    (here / "file").write_bytes(bytes(pages * PAGE))
    with mapped(here / "file") as mapping, (there / "file").open("r+b", buffering=0) as other:
        for turn in range(1, 60):
            for page in range(0, pages, 2):
                mapping[page * PAGE : page * PAGE + 1] = bytes([turn])
            for page in range(1, pages, 64):
                os.pwrite(other.fileno(), bytes([turn]), page * PAGE)
        assert _comes(lambda: mapping[PAGE : PAGE + 1], bytes([59]))
        mapping.flush()
        for page in range(0, pages, 2):
            assert os.pread(other.fileno(), 1, page * PAGE) == bytes([59])


def test_calls_never_see_stale_pages(here: Path, there: Path) -> None:
    """While it is mapped here, read(2) shows what others have written."""
    (here / "file").write_bytes(b"old" + bytes(PAGE))
    with mapped(here / "file", flags=mmap.MAP_PRIVATE) as mapping:
        assert mapping[0:3] == b"old"
        with (here / "file").open("rb", buffering=0) as file:
            (there / "file").write_bytes(b"new" + bytes(PAGE))
            assert os.pread(file.fileno(), 3, 0) == b"new"
    with mapped(here / "file", flags=mmap.MAP_PRIVATE) as mapping:
        assert mapping[0:3] == b"new"


def _sent(fd: int, to: int) -> bytes:
    """What sendfile(2) sends."""
    os.ftruncate(to, 0)
    os.lseek(to, 0, os.SEEK_SET)
    os.sendfile(to, fd, 0, 1 << 20)
    return os.pread(to, 1 << 20, 0)


def test_what_the_kernel_sends_by_itself_follows(here: Path, there: Path, tmp_path: Path) -> None:
    """sendfile(2) and splice(2) go through pages, too."""
    (here / "file").write_bytes(b"old" * 3000)
    fd, to = os.open(here / "file", os.O_RDONLY), os.open(tmp_path / "to", os.O_CREAT | os.O_RDWR)
    assert _sent(fd, to) == b"old" * 3000
    with (there / "file").open("r+b", buffering=0) as other:
        other.write(b"new" * 3000)
        assert _comes(lambda: _sent(fd, to), b"new" * 3000)
        other.write(b"longer" * 1000)
        assert _comes(lambda: _sent(fd, to), b"new" * 3000 + b"longer" * 1000)
        os.truncate(there / "file", 6)
        assert _comes(lambda: _sent(fd, to)[:6], b"newnew")
    os.close(fd)
    os.close(to)


def test_what_the_kernel_sends_is_right_at_once_after_a_look(
    here: Path, there: Path, tmp_path: Path
) -> None:
    """Opening and stat(2) renew pages without waiting."""
    (here / "file").write_bytes(b"old" * 3000)
    fd, to = os.open(here / "file", os.O_RDONLY), os.open(tmp_path / "to", os.O_CREAT | os.O_RDWR)
    assert _sent(fd, to) == b"old" * 3000
    with (there / "file").open("r+b", buffering=0) as other:
        other.write(b"new" * 3000)
        os.fstat(fd)
        assert _sent(fd, to) == b"new" * 3000
        other.write(b"longer" * 1000)
        os.stat(here / "file")
        assert _sent(fd, to) == b"new" * 3000 + b"longer" * 1000
        os.truncate(there / "file", 6)
        os.close(os.open(here / "file", os.O_RDONLY))
        assert _sent(fd, to) == b"newnew"
    os.close(fd)
    os.close(to)


def test_copies_within_a_mount_see_what_others_write(here: Path, there: Path) -> None:
    """copy_file_range(2) copies what is there now, as far as the kernel knows the file."""
    (here / "file").write_bytes(b"old" * 3000)
    fd, to = os.open(here / "file", os.O_RDONLY), os.open(here / "to", os.O_CREAT | os.O_RDWR)
    for content in (b"new", b"abc"):
        with (there / "file").open("r+b", buffering=0) as other:
            other.write(content * 3000)
        assert os.copy_file_range(fd, to, 9000, 0, 0) == 9000
        assert (there / "to").read_bytes() == content * 3000
    (there / "file").write_bytes(b"x" * 20_000)
    os.fstat(fd)
    assert os.copy_file_range(fd, to, 30_000, 0, 0) == 20_000
    os.close(fd)
    os.close(to)


# --- with -o mmap, for kernels before 6.6 -------------------------------------------------------


@pytest.fixture(scope="module")
def cached() -> Iterator[Lab]:
    with new_lab(32 << 20, 2, "allow_other,mmap") as lab:
        yield lab


def test_the_option_allows_shared_mappings_everywhere(cached: Lab) -> None:
    one, two = cached.paths
    (one / "file").write_bytes(bytes(3 * PAGE))
    with mapped(one / "file") as mapping:
        mapping[PAGE : PAGE + 5] = b"hello"
        mapping.flush()
    assert (one / "file").read_bytes()[PAGE : PAGE + 5] == b"hello"
    assert (two / "file").read_bytes()[PAGE : PAGE + 5] == b"hello"


def test_with_the_option_a_new_open_sees_everything(cached: Lab) -> None:
    """Close-to-open: an open file shows all that was written before."""
    one, two = cached.paths
    for number in range(50):
        (one / "file").write_bytes(b"%06d" % number * (number + 1))
        assert (two / "file").read_bytes() == b"%06d" % number * (number + 1)


def test_names_are_coherent_with_the_option(cached: Lab) -> None:
    one, two = cached.paths
    for number in range(20):
        (one / f"n{number}").touch()
        assert (two / f"n{number}").exists()
        (two / f"n{number}").unlink()
        fails(2, os.stat, one / f"n{number}")
