"""examples/jobs.sh: each job is done by exactly one machine, and failures are kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.lab import needs_fuse, new_lab
from tests.support.mounts import ENVIRONMENT, PATIENCE, TOP

SCRIPT = TOP / "examples" / "jobs.sh"
#: The programs of this environment come first, as after an installation.
SHELL = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
pytestmark = needs_fuse


def jobs(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["sh", str(SCRIPT), *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=SHELL,
    )  # fmt: skip


@contextmanager
def workers(*words: list[object]) -> Iterator[list[subprocess.Popen[str]]]:
    running = [jobs(*one) for one in words]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def sent(*words: object) -> None:
    process = jobs("send", *words)
    said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said[1]) == (0, "")


@pytest.mark.slow
def test_each_job_is_done_once(tmp_path: Path) -> None:
    count = 30
    for number in range(count):
        (tmp_path / f"job {number}").write_text(f"{number}\n")
    with new_lab(mounts=3) as lab:
        one, two, three = (path / "spool" for path in lab.paths)
        one.mkdir()
        command = ["sh", "-c", 'cat "$1"; cat "$1" >> "$0"/log']
        with workers(["work", two, *command, two], ["work", three, *command, three]) as running:
            sent(one, *(tmp_path / f"job {number}" for number in range(count)))
            done = one / "done"
            end = time.monotonic() + PATIENCE
            while len(list(done.iterdir())) < count:
                assert time.monotonic() < end
                time.sleep(0.02)
            (one / "stop").touch()
            for process in running:
                assert process.wait(PATIENCE) == 0
                assert process.stderr is not None
                assert process.stderr.read() == ""
        assert sorted(int(path.read_text()) for path in done.iterdir()) == list(range(count))
        assert sorted(map(int, (one / "log").read_text().split())) == list(range(count))
        assert list((one / "jobs").iterdir()) == list((one / "taken").iterdir()) == []


def test_a_failed_job_is_kept_and_said(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("bad")
    with new_lab(mounts=2) as lab:
        one, two = (path / "spool" for path in lab.paths)
        one.mkdir()
        with workers(["work", two, "sh", "-c", "echo half; exit 3"]) as (process,):
            sent(one, tmp_path / "bad")
            assert process.stderr is not None
            assert process.stderr.readline() == "jobs: bad failed\n"
            (one / "stop").touch()
            assert process.wait(PATIENCE) == 0
        assert (one / "failed" / "bad").read_text() == "bad"
        assert list((one / "done").iterdir()) == []


def test_wrong_usage_is_one_hint() -> None:
    process = jobs("send")
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1
    assert said.startswith("  sh jobs.sh send DIRECTORY FILE...")
