"""`ivshmemfs send` and `receive`: records between shells, without and with a mount."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support.checks import assert_clean
from tests.support.lab import needs_fuse, new_lab
from tests.support.mounts import ENVIRONMENT, PATIENCE
from tests.support.regions import TestRegion, new_region


@pytest.fixture
def made() -> Iterator[TestRegion]:
    """A region of 16 MiB."""
    with new_region(16 << 20) as region:
        yield region
        assert_clean(region)


def begin(*words: object) -> subprocess.Popen[bytes]:
    """Start a subcommand."""
    return subprocess.Popen(
        [sys.executable, "-m", "ivshmemfs", *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip


def run(*words: object, given: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run a subcommand; return exit code, output, errors."""
    process = begin(*words)
    out, err = process.communicate(given, timeout=PATIENCE)
    return process.returncode, out, err


def test_words_lines_and_whole_inputs(made: TestRegion) -> None:
    queue = f"{made.path}:/jobs"
    assert run("send", queue, "one", "two words") == (0, b"", b"")
    assert run("send", queue, given=b"three\n\nlast") == (0, b"", b"")
    assert run("send", "--whole", queue, given=b"a\nb\n") == (0, b"", b"")
    assert run("receive", "-n", 5, queue) == (0, b"one\ntwo words\nthree\n\nlast\n", b"")
    assert run("receive", "-0", queue) == (0, b"a\nb\n\0", b"")
    assert run("receive", "-t", 0, queue) == (124, b"", b"")


def test_a_receiver_waits(made: TestRegion) -> None:
    queue = f"{made.path}:/jobs"
    receiver = begin("receive", "-t", PATIENCE, queue)
    time.sleep(0.3)
    assert run("send", queue, "late")[0] == 0
    assert receiver.communicate(timeout=PATIENCE)[0] == b"late\n"
    assert receiver.returncode == 0


def test_a_full_queue(made: TestRegion) -> None:
    queue = f"{made.path}:/jobs"
    assert run("send", "--records", 2, "--record-size", 10, queue, "1", "2")[0] == 0
    assert run("send", "-t", 0.1, queue, "3") == (124, b"", b"")
    sender = begin("send", "-t", PATIENCE, queue, "3")
    time.sleep(0.3)
    assert run("receive", "-n", 3, queue)[1] == b"1\n2\n3\n"
    sender.communicate(timeout=PATIENCE)
    assert sender.returncode == 0


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">/dev/full", 2, b"write error: standard output: No space left on device"),
        (">&-", 2, b"write error: standard output: Bad file descriptor"),
    ],
)
def test_what_cannot_be_printed_is_put_back(
    made: TestRegion, redirected: str, code: int, said: bytes
) -> None:
    queue = f"{made.path}:/jobs"
    assert run("send", queue, "first", "second")[0] == 0
    script = f'"$0" -m ivshmemfs receive -t 0 "$1" {redirected}'
    failed = subprocess.run(
        ["sh", "-c", script, sys.executable, queue],
        check=False, capture_output=True, env=ENVIRONMENT, timeout=PATIENCE,
    )  # fmt: skip
    assert (failed.returncode, failed.stderr) == (code, b"ivshmemfs: " + said + b"\n")
    assert run("receive", "-n", 2, "-t", 0, queue) == (0, b"second\nfirst\n", b"")


def test_a_receiver_whose_reader_is_gone_takes_nothing(made: TestRegion) -> None:
    """As `head -n 1` behind a pipe: it ends, though nothing comes that it could fail to print."""
    queue = f"{made.path}:/jobs"
    with begin("receive", "-f", queue) as receiver:
        assert run("send", queue, "one")[0] == 0
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == b"one\n"
        receiver.stdout.close()
        assert receiver.wait(timeout=PATIENCE) == 2
    assert run("send", queue, "two")[0] == 0
    assert run("receive", "-t", 0, queue) == (0, b"two\n", b"")


def test_a_broadcast_goes_to_all(made: TestRegion) -> None:
    queue = f"{made.path}:/news"
    assert run("send", "--broadcast", queue, "before")[0] == 0
    readers = [begin("receive", "-f", "--replay", queue) for _ in range(2)]
    lines = []
    for reader in readers:
        assert reader.stdout is not None
        lines.append(reader.stdout.readline())
    assert run("send", queue, "after")[0] == 0
    for reader in readers:
        assert reader.stdout is not None
        lines.append(reader.stdout.readline())
        reader.kill()
        reader.communicate()
    assert lines == [b"before\n"] * 2 + [b"after\n"] * 2
    assert run("receive", "-t", 0, queue) == (124, b"", b"")


def test_refusals(made: TestRegion) -> None:
    assert run("send", "--record-size", 10, f"{made.path}:/jobs", "1")[0] == 0
    for words, told in (
        (["send", f"{made.path}:/jobs", "x" * 11], b"takes records of 10"),
        (["send", f"{made.path}:/", "x"], b"directory"),
        (["send", f"{made.path}:/no/where", "x"], b"No such file"),
        (["send", "--whole", f"{made.path}:/jobs", "x"], b"leave out TEXT"),
        (["send", "--record-size", "1G", f"{made.path}:/new", "x"], b"not 1073741824"),
        (["receive", f"{made.path}.none:/jobs"], b"no such file"),
    ):
        code, out, err = run(*words)
        assert code in (1, 2, 32)
        assert out == b""
        assert told in err
        assert err.count(b"\n") == 1


@needs_fuse
def test_a_mount_names_the_queue() -> None:
    with new_lab(mounts=2) as lab:
        assert run("send", lab.paths[0] / "jobs", "through a mount")[0] == 0
        assert run("receive", lab.paths[1] / "jobs") == (0, b"through a mount\n", b"")
        assert run("map", "--release", lab.paths[0] / "jobs")[0] == 0
        (lab.paths[1] / "jobs").unlink()
