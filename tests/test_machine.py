"""What would tear or swap the words of a region is refused: when it is built, and at the start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ivshmemfs.errors import UnfitMachine
from ivshmemfs.native.machine import refuse_unfit_machine

TOP = Path(__file__).parent.parent
SMALL = "import sys; sys.maxsize = 2**31 - 1"
SWAPPED = "import sys; sys.byteorder = 'big'"
MACHINES = [(SMALL, "64-bit Python"), (SWAPPED, "little-endian")]


def python(*statements: str) -> subprocess.CompletedProcess[str]:
    code = "\n".join(statements)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=TOP, check=False, timeout=60,
    )  # fmt: skip


def test_this_machine_is_fit() -> None:
    refuse_unfit_machine(64, "little")
    with pytest.raises(UnfitMachine, match="32-bit"):
        refuse_unfit_machine(32, "little")
    with pytest.raises(UnfitMachine, match="big-endian"):
        refuse_unfit_machine(64, "big")


@pytest.mark.parametrize(("machine", "words"), MACHINES)
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("from ivshmemfs.cli.main import main; main(['info', '/nowhere'])", 2),
        ("from ivshmemfs.cli.main import main; main(['list'])", 2),
        ("from ivshmemfs.__main__ import mkfs; mkfs()", 1),
        ("from ivshmemfs.__main__ import fsck; fsck()", 8),
    ],
)
def test_each_command_says_it_in_one_line(
    machine: str, words: str, command: str, code: int
) -> None:
    done = python(machine, command)
    assert (done.returncode, done.stdout) == (code, "")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


@pytest.mark.parametrize(("machine", "words"), MACHINES)
def test_it_is_not_built(machine: str, words: str) -> None:
    done = python(machine, "import runpy; runpy.run_path('setup.py', run_name='__main__')")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ""),
        (["-U__SIZEOF_POINTER__", "-D__SIZEOF_POINTER__=4"], "a 32-bit program tears them"),
        (["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"], "are little-endian"),
    ],
)
def test_the_compiler_refuses_it(options: list[str], words: str) -> None:
    headers = [
        path
        for path in (TOP / "ivshmemfs").rglob("*.h")
        if "__ORDER_LITTLE_ENDIAN__" in path.read_text()
    ]
    assert headers
    for header in headers:
        done = subprocess.run(
            ["gcc", *options, "-x", "c", "-E", header],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (done.returncode == 0) == (words == "")
        assert words in done.stderr
