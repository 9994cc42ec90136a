"""What may happen to a region under real mounts: formatted, cut, replaced, scribbled on."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ivshmemfs.format.superblock import decode
from ivshmemfs.region import open_region
from tests.support.figures import Figures
from tests.support.lab import ENVIRONMENT, PATIENCE, Lab, needs_fuse, needs_root, new_lab
from tests.support.scribbles import AREAS, scribbled

pytestmark = [needs_fuse, needs_root, pytest.mark.slow]

#: What a program may be told when the region is gone or damaged.
GONE = {errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTCONN}
TOLERABLE = GONE | {
    errno.EUCLEAN, errno.ENOSPC, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR,
    errno.EINVAL, errno.ENODATA, errno.EUSERS, errno.ENOTBLK, errno.EFBIG, errno.EACCES,
    errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENXIO, errno.EMLINK, errno.EOVERFLOW, errno.EBUSY,
}  # fmt: skip
MOST_MEMORY = 200 << 10  # KiB that a daemon may grow by
SLOWEST = 60.0  # seconds in which any call ends on a busy machine; it is Busy for 10 s at most


def calls(top: Path) -> dict[str, Callable[[], object]]:
    """System calls of each kind, on what `populated` made."""
    return {
        "stat": lambda: os.stat(top),
        "listdir": lambda: os.listdir(top),
        "read": lambda: (top / "file").read_bytes(),
        "write": lambda: (top / "file").write_bytes(b"w" * 9000),
        "create": lambda: (top / "new").write_bytes(b"n" * 3000),
        "mkdir": lambda: os.mkdir(top / "made"),
        "listdir below": lambda: os.listdir(top / "dir"),
        "rename": lambda: os.rename(top / "new", top / "dir/moved"),
        "link": lambda: os.link(top / "file", top / "linked"),
        "symlink": lambda: os.symlink("to", top / "link"),
        "readlink": lambda: os.readlink(top / "link"),
        "setxattr": lambda: os.setxattr(top / "file", "user.a", b"a" * 900),
        "getxattr": lambda: os.getxattr(top / "file", "user.a"),
        "truncate": lambda: os.truncate(top / "file", 500),
        "statvfs": lambda: os.statvfs(top),
        "unlink link": lambda: os.unlink(top / "link"),
        "unlink": lambda: os.unlink(top / "linked"),
        "rmdir": lambda: os.rmdir(top / "made"),
    }


def answers(top: Path) -> set[int]:
    """What each call is answered; 0 for success."""
    found = set()
    for name, call in calls(top).items():
        began = time.monotonic()
        try:
            call()
            found.add(0)
        except OSError as error:
            found.add(error.errno or -1)
        assert time.monotonic() - began < SLOWEST, name
    return found


def populated(lab: Lab) -> int:
    """Something to work on; returns a descriptor of a file that is open."""
    top = lab.paths[0]
    (top / "file").write_bytes(os.urandom(50_000))
    (top / "dir").mkdir()
    for number in range(20):
        (top / "dir" / f"{number}").write_bytes(b"x" * 300 * number)
    return os.open(top / "file", os.O_RDWR)


@contextmanager
def harassed(mounts: int, size: int = 4 << 20) -> Iterator[Lab]:
    """A region whose mounts may log errors, but must live until the end."""
    with new_lab(size, 0) as lab:
        try:
            for _ in range(mounts):
                lab.add()
            yield lab
            assert all(mount.alive for mount in lab.mounts), "a daemon died"
            logs = "".join(mount.log_text() for mount in lab.mounts)
            assert "Traceback" not in logs, logs[-3000:]
        finally:
            for mount in lab.mounts:
                mount.end()
            lab.mounts.clear()
            lab.region.unlink(missing_ok=True)
            _format(lab.region, size)  # what the laboratory checks in the end


def _format(region: Path, size: int, *words: str) -> None:
    command = [
        sys.executable,
        "-m",
        "mkfs",
        "--force",
        "--force",
        "--size",
        str(size),
        *words,
        str(region),
    ]
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=PATIENCE, capture_output=True)


def test_formatted_anew_under_mounts() -> None:
    """ESTALE for those that had it mounted, and the new filesystem stays as it is."""
    with harassed(2) as lab:
        fd = populated(lab)
        _format(lab.region, 4 << 20)
        new = lab.add()
        (new.path / "kept").write_bytes(b"kept" * 5000)
        for path in lab.paths[:2]:
            assert answers(path) == {errno.ESTALE}
        for call in (lambda: os.pread(fd, 10, 0), lambda: os.pwrite(fd, b"x" * 5000, 0)):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.ESTALE
        os.close(fd)
        for mount in lab.mounts[:2]:
            assert mount.alive
            mount.end()
        del lab.mounts[:2]
        assert os.listdir(new.path) == ["kept"]
        assert (new.path / "kept").read_bytes() == b"kept" * 5000


@pytest.mark.parametrize("kept", [0, 4096, 100_000, 3 << 20])
def test_cut_under_mounts(kept: int) -> None:
    """An errno and no SIGBUS; unmounting ends."""
    with harassed(2) as lab:
        fd = populated(lab)
        os.truncate(lab.region, kept)
        for path in lab.paths:
            assert answers(path) <= TOLERABLE | {0}
        with suppress(OSError):
            os.pwrite(fd, b"x" * 50_000, 0)
        os.close(fd)
        assert all(mount.alive for mount in lab.mounts)
        os.truncate(lab.region, 4 << 20)  # zeros now
        for path in lab.paths:
            assert answers(path) <= TOLERABLE | {0}


def test_made_again_under_mounts() -> None:
    """The mounts keep the memory that they have; the new file is not theirs."""
    with harassed(2) as lab:
        os.close(populated(lab))
        lab.region.unlink()
        _format(lab.region, 4 << 20)
        before = lab.region.read_bytes()
        assert answers(lab.paths[0]) == {0}
        assert sorted(os.listdir(lab.paths[1])) == ["dir", "file"]
        assert lab.region.read_bytes() == before


def test_daemons_killed_with_files_open_give_everything_back() -> None:
    """All of them, and all that was open and has no name any more."""
    with new_lab(4 << 20, 2) as lab:
        free = os.statvfs(lab.paths[0]).f_bfree
        held = []
        for path in lab.paths:
            for number in range(10):
                name = path / f"{path.name}-{number}"
                fd = os.open(name, os.O_CREAT | os.O_RDWR)
                os.write(fd, os.urandom(20_000))
                held.append(fd)
        for number in range(10):  # each by the other
            os.unlink(lab.paths[1] / f"m0-{number}")
            os.unlink(lab.paths[0] / f"m1-{number}")
        assert os.listdir(lab.paths[0]) == []
        assert os.statvfs(lab.paths[0]).f_bfree < free
        for number in range(2):
            lab.kill(number)
        for fd in held:
            with suppress(OSError):
                os.close(fd)
        late, end = lab.add(), time.monotonic() + 60
        while os.statvfs(late.path).f_bfree != free and time.monotonic() < end:
            time.sleep(0.1)
        assert os.statvfs(late.path).f_bfree == free


# --- a writer scribbles while it is in use ----------------------------------------------------


def _resident(pid: int) -> int:
    """KiB that a process has in memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_a_live_scribbler_under_a_mount(area: str, long_run: bool, figures: Figures) -> None:
    """The daemon lives and answers, and its memory stays bounded; then fsck repairs the region."""
    words, told = 0, set[int]()
    with harassed(1) as lab:
        fd = populated(lab)
        mount = lab.mounts[0]
        before = _resident(mount.process.pid)
        ended, chance = threading.Event(), random.Random(area)
        with open_region(str(lab.region)) as region:
            layout = decode(region.memory.read(0, 512), region.size).geometry
            start, stop = AREAS[area](layout)

            def scribble() -> None:
                nonlocal words
                while not ended.wait(0.0005):
                    at = chance.randrange(start, stop, 8)
                    region.memory.store(at, scribbled(region.memory.load(at), chance))
                    words += 1

            thread = threading.Thread(target=scribble)
            thread.start()
            try:
                end = time.monotonic() + (60 if long_run else 2)
                while time.monotonic() < end:
                    told |= answers(lab.paths[0])
                    with suppress(OSError):
                        os.pwrite(fd, b"y" * 30_000, 5)
            finally:
                ended.set()
                thread.join()
        os.close(fd)
        assert mount.alive
        assert told <= TOLERABLE | {0}, [errno.errorcode.get(code, code) for code in told]
        assert _resident(mount.process.pid) - before < MOST_MEMORY
        mount.end()
        lab.mounts.clear()
        _repaired(lab.region)
    figures.add(f"live scribbler under a mount, on the {area}: {words:,} words")


def _repaired(region: Path) -> None:
    """fsck -y ends with something that mounts and passes, or says why it cannot."""
    command = [sys.executable, "-m", "ivshmemfs.fsck", "-y", "--force", str(region)]
    done = subprocess.run(command, check=False, env=ENVIRONMENT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    if done.returncode == 8:  # the superblock and its copy are damaged, or of another version
        assert len(done.stderr.splitlines()) == 1
        return
    assert done.returncode in (0, 1), done.stdout + done.stderr
    command[3:5] = ["-n"]
    again = subprocess.run(command, check=False, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout
