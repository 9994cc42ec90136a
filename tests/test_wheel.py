"""Wheels: one for each Python of Debian 12 and 13, built there, installed where no compiler is.

pip builds the project, and each requirement that has no wheel for that Python.  Then a root
with Python, pip and fuse3 alone installs all of it without a network, and mounts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.roots import debian_root, missing, run_in

TOP = Path(__file__).resolve().parent.parent
SUITES = {"bookworm": "cp311", "trixie": "cp313"}
BUILDERS = ("python3-dev", "python3-venv", "gcc", "libc6-dev", "libfuse3-dev", "pkg-config",
            "ca-certificates")  # fmt: skip
BUILD = """
mkdir /tmp/source
tar -xf /tmp/source.tar -C /tmp/source
python3 -m venv /tmp/pip
/tmp/pip/bin/pip wheel -q --no-cache-dir --wheel-dir {out} /tmp/source >/tmp/log 2>&1 ||
    { tail -n 20 /tmp/log; exit 1; }
"""
USE = """
! command -v gcc cc c++ clang tcc
python3 -m venv /tmp/v
/tmp/v/bin/pip install -q --no-index --no-cache-dir --find-links {out} ivshmemfs
PATH=/tmp/v/bin:$PATH
python -c 'import ivshmemfs.engine.filesystem as m; print(m.__file__.rpartition(".")[2])'
mkfs.ivshmemfs -q --size 1M -L hello /dev/shm/hello
mkdir -p /tmp/mnt
ivshmemfs mount label=hello /tmp/mnt
echo text >/tmp/mnt/file
ivshmemfs cat /dev/shm/hello:/file
ivshmemfs umount /tmp/mnt
fsck.ivshmemfs -n /dev/shm/hello
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The project's files, as git knows them, in an archive."""
    archive = tmp_path / "source.tar"
    listed = subprocess.run(
        ["git", "-C", TOP, "ls-files", "-z"], capture_output=True, check=True
    ).stdout
    subprocess.run(
        ["tar", "-C", TOP, "--null", "-T", "-", "-cf", archive], input=listed, check=True
    )
    return archive


@pytest.fixture(params=list(SUITES))
def suite(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def places(suite: str, tmp_path: Path) -> Iterator[tuple[Path, Path, str]]:
    """A root with a compiler, one without, and a directory that both have."""
    builder, target = debian_root(suite, *BUILDERS), debian_root(suite, "python3-venv", "fuse3")
    out = f"srv/{tmp_path.name}"
    for root in (builder, target):
        shutil.rmtree(root / out, ignore_errors=True)
    yield builder, target, out
    for root in (builder, target):
        shutil.rmtree(root / out, ignore_errors=True)


def wheels(places: tuple[Path, Path, str], source: Path, *, compiled: bool) -> list[str]:
    """Build, hand over to the other root, and return the names."""
    builder, target, out = places
    settings = {name: value for name, value in os.environ.items() if name == "PIP_INDEX_URL"}
    settings["IVSHMEMFS_COMPILE"] = str(int(compiled))
    files = [source]
    if "PIP_CERT" in os.environ:  # a registry whose certificate Debian does not know
        certificates = source.with_name("certificates")
        shutil.copy(os.environ["PIP_CERT"], certificates)
        files.append(certificates)
        settings["PIP_CERT"] = "/tmp/certificates"
    built = run_in(builder, BUILD.replace("{out}", f"/{out}"), *files, timeout=1500, env=settings)
    assert built.returncode == 0, built.stdout + built.stderr
    shutil.copytree(builder / out, target / out)
    return sorted(path.name for path in (target / out).iterdir())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wheel_of_each_debian_installs_without_a_compiler(
    suite: str, places: tuple[Path, Path, str], source: Path, compiled: bool
) -> None:
    names = wheels(places, source, compiled=compiled)
    python, machine = SUITES[suite], os.uname().machine
    tag = f"{python}-{python}" if compiled else "cp311-abi3"
    assert f"ivshmemfs-0.1.0-{tag}-linux_{machine}.whl" in names
    _builder, target, out = places
    done = run_in(target, USE.replace("{out}", f"/{out}"))
    assert done.returncode == 0, done.stdout + done.stderr
    kind, text, *rest = done.stdout.splitlines()
    assert (kind, text) == ("so" if compiled else "py", "text")
    assert "/dev/shm/hello: clean" in rest[-1]
