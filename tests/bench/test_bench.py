"""The benchmark runs and says what it measured; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_a_quick_run_writes_its_figures(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts beside tmpfs, which takes root")
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "look", "--peer", "tmpfs"]
    done = subprocess.run(
        [*command, "--cores", "1", "--rounds", "1", "--json", figures],
        cwd=TOP, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(figures.read_text())
    assert document["machine"]["empty_call"] > 0
    assert document["machine"]["fresh_page"] > document["machine"]["empty_call"]
    assert "An empty system call takes" in done.stdout
    text = json.dumps(document)
    assert "stat" in text
    assert "tmpfs" in text
    assert "Traceback" not in done.stderr
