"""Runs programs on a mount."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

from tests.support.programs import find


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
