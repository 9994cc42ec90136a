"""The lines for /etc/fstab that README gives: systemd waits for no device before it mounts them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.support.mounts import TOP, run

GENERATOR = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")

pytestmark = pytest.mark.skipif(
    not GENERATOR.exists() or shutil.which("systemd-analyze") is None,
    reason="systemd is not installed",
)


def documented() -> list[str]:
    """The lines of README that are for /etc/fstab."""
    lines = (TOP / "README.md").read_text().splitlines()
    return [line for line in lines if re.search(r"^\S+ +/\S+ +ivshmemfs ", line)]


def devices_waited_for(line: str, folder: Path) -> set[str]:
    """The device units that systemd starts before it mounts what a line of fstab says."""
    units = folder / "units"
    units.mkdir()
    (folder / "fstab").write_text(line + "\n")
    generated = run(
        GENERATOR, units, units, units,
        env={"SYSTEMD_FSTAB": str(folder / "fstab"), "SYSTEMD_LOG_TARGET": "console"},
    )  # fmt: skip
    assert generated.returncode == 0, generated.stderr
    made = list(units.glob("*.mount"))
    assert len(made) == 1
    checked = run(
        "systemd-analyze", "verify", "--man=no", *made, timeout=60,
        env={"SYSTEMD_UNIT_PATH": f"{units}:", "SYSTEMD_LOG_LEVEL": "debug",
             "SYSTEMD_LOG_TARGET": "console"},
    )  # fmt: skip
    said = checked.stdout + checked.stderr
    assert f"{made[0].name}: Installed new job" in said, said[-2000:]
    return set(re.findall(r"(\S+\.device): Installed new job", said))


def test_there_are_such_lines() -> None:
    assert len(documented()) >= 2


@pytest.mark.parametrize("line", documented())
def test_no_device_is_waited_for(line: str, tmp_path: Path) -> None:
    assert devices_waited_for(line, tmp_path) == set()


@pytest.mark.skipif(os.path.exists("/dev/none"), reason="a strange machine")
def test_that_a_path_below_dev_would_be_waited_for(tmp_path: Path) -> None:
    """So that the test above shows something."""
    waited = devices_waited_for("/dev/none /mnt/shared ivshmemfs defaults 0 0", tmp_path)
    assert waited == {"dev-none.device"}
