"""Device memory is touched by naturally aligned words only: the processor itself watches."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import ivshmemfs.native

COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.fixture(scope="module", params=["-O2", "-O3"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.machine() != "x86_64":
        pytest.skip("the alignment check flag is x86's; scripts/aarch64-check does it on ARM64")
    if COMPILER is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("alignment") / "alignment"
    source = Path(__file__).with_name("alignment.c")
    includes = Path(ivshmemfs.native.__file__).parent
    command = [COMPILER, request.param, "-Wall", "-Wno-unused-function", "-I", includes, source]
    subprocess.run([*command, "-o", program], check=True)
    return program


def test_device_copies_are_aligned_and_exact(program: Path) -> None:
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "aligned\n")


def test_a_plain_copy_would_be_caught(program: Path) -> None:
    assert subprocess.run([program, "plain"], check=False).returncode == -7  # SIGBUS
