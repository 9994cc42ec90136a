"""The bundle for machines without a network installs from what it carries alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent


def _runs_compiled(program: Path) -> bool:
    shown = subprocess.run([program, "--version"], check=True, capture_output=True, timeout=60)
    return b"compiled" in shown.stdout


def _wheel_for(version: str, bundle: Path, work: Path) -> str:
    """The name of the wheel that pip on another version of Python would take."""
    carried = bundle.read_bytes().split(b"\n__PACKAGES__\n", 1)[1]
    subprocess.run(["tar", "-xf", "-", "-C", work], input=carried, check=True, timeout=60)
    taken = work / "taken"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-index", "--find-links", work,
         "--no-deps", "--only-binary", ":all:", "--python-version", version, "-d", taken,
         "ivshmemfs"],
        check=True, timeout=60,
    )  # fmt: skip
    return next(taken.iterdir()).name


@pytest.mark.slow
def test_the_bundle_installs_without_a_network(tmp_path: Path) -> None:
    if not (TOP / ".venv").exists() or not sys.executable.startswith(str(TOP / ".venv")):
        pytest.skip("builds on the environment that scripts/setup makes")
    bundle = tmp_path / "bundle.sh"
    subprocess.run(["sh", TOP / "scripts/bundle", bundle], check=True, timeout=1500)
    target = tmp_path / "opt"
    # An index that does not exist: anything that is not carried along would fail.
    environment = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_NO_INDEX": "1"}
    environment.pop("PIP_FIND_LINKS", None)
    subprocess.run(["sh", bundle, target], check=True, timeout=300, env=environment)
    assert _runs_compiled(target / "bin/ivshmemfs")
    other = tmp_path / "other"
    other.mkdir()
    assert "-abi3-" in _wheel_for("3.14", bundle, other)
    size = subprocess.run(
        [target / "bin/mkfs.ivshmemfs", "--size", "1M", tmp_path / "region"],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "1 MiB" in size.stdout
    listed = subprocess.run(
        [target / "bin/fsck.ivshmemfs", "-n", tmp_path / "region"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
