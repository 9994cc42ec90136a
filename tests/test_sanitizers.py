"""The C extension under AddressSanitizer, UndefinedBehaviorSanitizer and a leak check."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.long
def test_nothing_is_found_in_the_extension() -> None:
    if shutil.which("gcc") is None or not (TOP / ".venv").exists():
        pytest.skip("builds with gcc in the environment that scripts/setup makes")
    done = subprocess.run(
        ["sh", TOP / "scripts" / "sanitize"], capture_output=True, text=True, timeout=7200
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "sanitize: nothing found" in done.stdout
