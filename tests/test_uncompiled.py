"""The hot modules do the same uncompiled, as on a Python that no compiled wheel fits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ivshmemfs.engine import COMPILED

TOP = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_engine_uncompiled(tmp_path: Path) -> None:
    if not COMPILED:
        pytest.skip("nothing is compiled here: all other tests show it")

    def without(_folder: str, names: list[str]) -> set[str]:
        return {
            name
            for name in names
            if name == "__pycache__" or (name.endswith(".so") and not name.startswith("_native."))
        }

    for part in ("ivshmemfs", "mkfs", "tests"):
        shutil.copytree(TOP / part, tmp_path / part, ignore=without)
    shutil.copy(TOP / "pyproject.toml", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    which = subprocess.run(
        [sys.executable, "-c", "from ivshmemfs import engine; print(engine.__file__)"],
        check=True, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60,
    )  # fmt: skip
    assert which.stdout.startswith(str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"\d{3} passed", done.stdout)
