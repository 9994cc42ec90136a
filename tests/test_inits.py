"""First processes of guests mount over /proc, /dev/shm and /run: no other process may run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
INITS = [("sh", "scripts/guest-init"), (sys.executable, "tests/region/guest-init"),
         (sys.executable, "tests/guest/arm-init")]  # fmt: skip


@pytest.mark.parametrize(("interpreter", "init"), INITS)
def test_only_a_first_process_runs_it(interpreter: str, init: str) -> None:
    # The guard comes first, so that a change that loses it is found without harm to this machine.
    lines = (TOP / init).read_text().splitlines()
    guard = next(n for n, line in enumerate(lines) if "$$ -eq 1" in line or "getpid() != 1" in line)
    harm = next(n for n, line in enumerate(lines) if line.startswith(("mount ", "libc", "def ")))
    assert guard < harm
    done = subprocess.run(
        [interpreter, TOP / init], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout) in ((1, ""), (2, ""))
    assert "only a guest's first process" in done.stderr
