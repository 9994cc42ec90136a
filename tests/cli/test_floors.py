"""The oldest versions that pyproject.toml allows, and what is said of libraries that do not do."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ivshmemfs.fuse.daemon import PYFUSE3_NEEDED
from tests.cli.conftest import complains, ivshmemfs
from tests.support.mounts import TOP, mount_lines, needs_fuse
from tests.support.regions import TestRegion

#: How a requirement ends that is for the other versions of Python.
UNLIKE = "<'3.13'" if sys.version_info >= (3, 13) else ">='3.13'"
FLOORS = dict(
    re.findall(r"(\w+)>=([\d.]+)", word)[0]
    for word in tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["dependencies"]
    if not word.endswith("python_version" + UNLIKE)
)
#: What these versions need beside what is installed here.
ALSO = ("commonmark", "async_generator")


def test_the_floor_of_pyfuse3_is_checked_at_the_start() -> None:
    assert ".".join(str(number) for number in PYFUSE3_NEEDED) == FLOORS["pyfuse3"]


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oldest click, trio and rich, to be found before those that are installed."""
    target = tmp_path_factory.mktemp("oldest")
    words = [f"{name}=={FLOORS[name]}" for name in ("click", "trio", "rich")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, *words,
         *ALSO],
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("no package index can be reached")
    return target


def with_path(path: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{path}:{TOP}"}


def test_errors_are_one_line_with_the_oldest_click(oldest: Path) -> None:
    environment = with_path(oldest)
    for words, code, said in (
        (["frobnicate"], 1, "frobnicate"),
        (["info"], 1, "Missing argument"),
        (["mount", "--bogus"], 1, "--bogus"),
        (["evict", "/none", "x"], 1, "'x'"),
        (["info", "/none"], 32, "no such file"),
    ):
        complains(ivshmemfs(*words, **environment), code, said)
    assert "Usage: ivshmemfs" in ivshmemfs("--help", **environment).stdout


@needs_fuse
def test_a_mount_with_the_oldest_trio(
    oldest: Path, formatted: TestRegion, place: Path, tmp_path: Path
) -> None:
    environment = with_path(oldest)
    for loop in ("poll", "trio"):
        assert (
            ivshmemfs(
                "mount", "-o", f"loop={loop}", formatted.path, place, **environment
            ).returncode
            == 0
        )
        (place / loop).write_text(loop)
        assert (place / loop).read_text() == loop
        result = ivshmemfs("umount", place, **environment)
        assert (result.returncode, result.stderr) == (0, "")
    result = ivshmemfs("get", formatted.path, "/poll", tmp_path / "got", **environment)
    assert (result.returncode, (tmp_path / "got").read_text()) == (0, "poll")


@needs_fuse
@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("__version__ = '3.2.1'", ("pyfuse3 3.2.1 is too old", FLOORS["pyfuse3"])),
        ("__version__ = '3.4.0'", ("pyfuse3 3.4.0 is too old", FLOORS["pyfuse3"])),
        (
            "raise ImportError('libfuse3.so.3: cannot open shared object file')",
            ("libfuse3 cannot be loaded", "install fuse3", "ivshmemfs get"),
        ),
        ("raise ImportError('no such module')", ("pyfuse3 cannot be loaded", "install pyfuse3")),
    ],
)
def test_libraries_that_do_not_do(
    formatted: TestRegion, place: Path, tmp_path: Path, module: str, said: tuple[str, ...]
) -> None:
    (tmp_path / "pyfuse3.py").write_text(module + "\n")
    result = ivshmemfs("mount", formatted.path, place, **with_path(tmp_path))
    complains(result, 32, *said)
    assert not mount_lines(place)
    assert "no machine" in ivshmemfs("peers", formatted.path).stdout
