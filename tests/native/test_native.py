"""The C kernel by itself, in plain C programs under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import ivshmemfs.native

HERE = Path(__file__).parent
NATIVE = Path(ivshmemfs.native.__file__).parent
PROGRAMS = sorted(path.stem for path in HERE.glob("*.c"))
COMPILER = shutil.which("gcc") or shutil.which("cc")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The kernel's files, each compiled once, with all warnings as errors and without Python."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("kernel")
    sources = sorted(NATIVE.glob("*.c"))
    command = [COMPILER, "-g", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", *SANITIZERS]
    subprocess.run([*command, "-I", NATIVE, "-c", *sources], check=True, cwd=folder, timeout=300)
    return sorted(folder.glob("*.o"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_kernel(program: str, kernel: list[Path], tmp_path: Path) -> None:
    assert COMPILER is not None
    command = [COMPILER, "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    source = HERE / f"{program}.c"
    made = tmp_path / program
    subprocess.run(
        [*command, *SANITIZERS, "-I", NATIVE, source, *kernel, "-o", made], check=True, timeout=300
    )
    environment = {**os.environ, "ASAN_OPTIONS": "handle_sigbus=0", "LD_PRELOAD": ""}
    done = subprocess.run([made], capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_function_of_the_interface_is_tested() -> None:
    declared = set(re.findall(r"\b(\w+)\(", re.sub(r"/\*.*?\*/", "", _interface(), flags=re.S)))
    used = "".join(path.read_text() for path in HERE.glob("*.[ch]"))
    untested = {name for name in declared if not re.search(rf"\b{name}\(", used)}
    assert untested <= {"fence", "unaligned_load_works", "mapping_unmap"}


def _interface() -> str:
    text = (NATIVE / "native.h").read_text()
    return "\n".join(re.findall(r"^(?:int|void|bool|u?int64_t) \w+\(.*", text, flags=re.M))
