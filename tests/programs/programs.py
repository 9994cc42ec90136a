"""Programs that the tests run on a mount, and what to do when one is missing."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

#: Set by scripts/test, which installs them all: then a missing program is a failure.
REQUIRED = os.environ.get("IVSHMEMFS_TEST_PROGRAMS") == "required"
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin:/usr/games"


def find(program: str) -> str:
    """The path of a program; skips the test (or fails, see above) when it is not installed."""
    found = shutil.which(program, path=PATH)
    if found is None:
        reason = f"{program} is not installed: sh scripts/setup --programs"
        if REQUIRED:
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def run(
    *words: object,
    cwd: Path,
    seconds: float = 120,
    env: dict[str, str] | None = None,
    user: int | None = None,
) -> str:
    """Run a program to its end, asserting that it succeeds; returns what it said."""
    command = [find(str(words[0])), *map(str, words[1:])]
    done = subprocess.run(
        command,
        cwd=cwd,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "LC_ALL": "C", "HOME": str(cwd), "TMPDIR": str(cwd), **(env or {})},
        user=user,
        group=user,
        extra_groups=[] if user is not None else None,
        preexec_fn=_no_core,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}"
    return done.stdout


def _no_core() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
