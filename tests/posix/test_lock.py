"""`ivshmemfs lock FILE -- COMMAND` on real mounts, and what it replaces."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.lab import ENVIRONMENT, PATIENCE, Lab, needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]
PROGRAM = [sys.executable, "-m", "ivshmemfs.cli", "lock"]
#: One that takes a lock over from a holder that shows no life for 2 s.
IMPATIENT = [sys.executable, "-m", "tests.support.impatient", "SILENT=2", "lock"]


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the command; what still runs at the end is ended."""
    running = []

    def begin(*words: object) -> subprocess.Popen[bytes]:
        command = [*PROGRAM, *map(str, words)]
        running.append(subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE))
        return running[-1]

    try:
        yield begin
    finally:
        for one in running:
            one.kill()
            one.communicate()


def lock(*words: object, program: list[str] = PROGRAM) -> int:
    return subprocess.run(
        [*program, *map(str, words)], env=ENVIRONMENT, timeout=PATIENCE, check=False
    ).returncode


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_command_runs_and_its_exit_code_counts(here: Path) -> None:
    assert lock(here / "file", "--", "sh", "-c", f"echo ran > {here}/out; exit 7") == 7
    assert (here / "out").read_text() == "ran\n"
    assert (here / "file").stat().st_size == 0
    assert lock(here / "file", "--", "sh", "-c", "kill -9 $$") == 137
    assert lock(here / "file", "no-such-command") == 1
    assert lock(here, "true") == 0  # a directory will do


def test_one_at_a_time_on_all_mounts(places: list[Path], start: Start) -> None:
    """A counter that is read, changed and written under the lock loses nothing."""
    (places[0] / "counter").write_text("0")
    script = "n=$(cat counter); sleep 0.01; echo $((n + 1)) > counter"
    running = []
    for number in range(9):
        place = places[number % 3]
        command = ["sh", "-c", f"cd {place} && {script}"]
        running.append(start(place / "lock", "--", *command))
    for one in running:
        assert one.wait(PATIENCE) == 0
    assert (places[1] / "counter").read_text() == "9\n"


def test_held_elsewhere(here: Path, there: Path, start: Start) -> None:
    holder = start(here / "file", "--", "sh", "-c", f"touch {here}/held; exec sleep 60")
    eventually((here / "held").exists)
    assert lock("-n", there / "file", "true") == 1
    assert lock("--nonblock", "-E", "9", there / "file", "true") == 9
    before = time.monotonic()
    assert lock("-w", "0.5", there / "file", "true") == 1
    assert time.monotonic() - before > 0.5
    assert lock("-n", there / "another", "true") == 0
    holder.send_signal(signal.SIGTERM)
    assert holder.wait(PATIENCE) == 143
    assert lock("-n", there / "file", "true") == 0


def test_the_holders_death_frees_it_and_ends_the_command(
    here: Path, there: Path, start: Start
) -> None:
    holder = start(here / "file", "--", "sh", "-c", f"echo $$ > {here}/pid; exec sleep 60")
    eventually(lambda: (here / "pid").exists() and (here / "pid").read_text())
    pid = int((here / "pid").read_text())
    waiting = start(there / "file", "--", "touch", there / "got")
    time.sleep(0.3)
    assert not (there / "got").exists()
    holder.kill()
    holder.wait(PATIENCE)
    assert waiting.wait(PATIENCE) == 0
    assert (here / "got").exists()
    eventually(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.slow
def test_a_holder_that_sleeps_too_long_loses_it(here: Path, there: Path, start: Start) -> None:
    holder = start(here / "file", "--", "sh", "-c", f"touch {here}/held; exec sleep 60")
    eventually((here / "held").exists)
    holder.send_signal(signal.SIGSTOP)
    assert lock(there / "file", "--", "true", program=IMPATIENT) == 0
    holder.send_signal(signal.SIGCONT)
    _, said = holder.communicate(timeout=PATIENCE)
    assert holder.returncode != 0
    assert b"taken over" in said


def test_a_removed_file_stays_locked(here: Path, there: Path, start: Start) -> None:
    """As with flock(1), the lock is on the file, not on the name."""
    holder = start(here / "file", "--", "sh", "-c", f"touch {here}/held; exec sleep 60")
    eventually((here / "held").exists)
    (there / "file").unlink()
    assert lock("-n", there / "file", "true") == 0
    holder.terminate()
    assert holder.wait(PATIENCE) == 143


def test_where_there_is_nothing_to_lock(here: Path, tmp_path: Path) -> None:
    assert lock(tmp_path / "file", "true") == 1
    assert lock(here / "none" / "file", "true") == 2
    (here / "out").symlink_to(tmp_path / "made")
    assert lock(here / "out", "true") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_fifo_is_locked_like_a_file(here: Path) -> None:
    """Opening it does not wait."""
    os.mkfifo(here / "fifo")
    assert lock(here / "fifo", "--", "sh", "-c", "exit 5") == 5
    assert lock(here, "--", "sh", "-c", "exit 6") == 6


def test_a_region_that_was_renamed_under_its_mount(lab: Lab, here: Path) -> None:
    lab.expected = "the region's file is not at its path any more"
    renamed = lab.region.with_name("renamed")
    lab.region.rename(renamed)
    try:
        result = subprocess.run(
            [*PROGRAM, str(here / "new"), "true"], env=ENVIRONMENT, timeout=PATIENCE,
            check=False, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        renamed.rename(lab.region)
    assert result.returncode == 32
    assert f"{lab.region}, which is mounted on {here.parent}, is not there" in result.stderr
    assert "mkfs" not in result.stderr
    assert not (here / "new").exists()


def test_no_mount_is_needed_to_hold_it(lab: Lab, here: Path, there: Path, start: Start) -> None:
    """The holder is a peer of its own."""
    holder = start(here / "file", "--", "sh", "-c", f"touch {there}/held; exec sleep 60")
    eventually((there / "held").exists)
    slots = subprocess.run(
        [sys.executable, "-m", "ivshmemfs.cli", "peers", str(lab.region)],
        env=ENVIRONMENT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(holder.pid) in slots
    holder.terminate()
    holder.wait(PATIENCE)


# --- locks of other programs --------------------------------------------------------------------


def _locked(path: Path, how: Callable[[int, int], object]) -> bool:
    """Whether a process of its own finds the file locked."""
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            how(os.open(path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            code = 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_flock_and_fcntl_locks_hold_on_all_mounts(here: Path, there: Path) -> None:
    (here / "file").touch()
    for how in (fcntl.flock, fcntl.lockf):
        fd = os.open(here / "file", os.O_RDWR)
        how(fd, fcntl.LOCK_EX)
        assert _locked(here / "file", how)
        assert _locked(there / "file", how)
        os.close(fd)
        eventually(lambda: not _locked(there / "file", how))  # noqa: B023 # closing is told later
        assert not _locked(here / "file", how)
