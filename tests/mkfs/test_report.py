"""What was formatted stays, also when no one reads the report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_reader_who_leaves_early_does_not_take_the_region_along(tmp_path: Path) -> None:
    region = tmp_path / "region"
    command = f"{sys.executable} -m mkfs --size 1M {region} | true"
    subprocess.run(["bash", "-c", command], cwd=Path(__file__).parents[2], timeout=60, check=False)
    assert region.stat().st_size == 1 << 20
    assert region.read_bytes()[:7] == b"IVSHMFS"
