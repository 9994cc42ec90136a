"""The Debian package: what it has, and that it installs, upgrades and goes without a trace.

Its files run in a root with busybox alone, so they need nothing of a Debian.  With --long dpkg
installs it in fresh roots of Debian 11, 12 and 13.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import find
from tests.support.roots import busybox_root, debian_root, missing, run_in

TOP = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

USE = """
mkfs.ivshmemfs -q --size 1M -L hello /dev/shm/hello
mkdir -p /mnt/a
mount.ivshmemfs label=hello /mnt/a
cp /etc/passwd /mnt/a/
ivshmemfs cat /dev/shm/hello:/passwd | cmp - /etc/passwd
"""
#: What an administrator does with it, in the words of a shell.
LIFE = f"""
dpkg -i /tmp/old/*.deb >/dev/null
{USE}
dpkg -i /tmp/new/*.deb | grep 'goes on with' || true
if dpkg -r ivshmemfs 2>/tmp/said; then exit 9; fi
grep 'unmount it first' /tmp/said
cmp /mnt/a/passwd /etc/passwd
ivshmemfs umount /mnt/a
fsck -t ivshmemfs -n /dev/shm/hello | tail -n 1
dpkg -P ivshmemfs >/dev/null
echo --- left
find / -xdev -name '*ivshmemfs*' ! -path '/tmp/*' ! -path '/proc/*'
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package without the compiled engine, which takes seconds and not minutes to make."""
    if not sys.executable.startswith(str(TOP / ".venv")):
        pytest.skip("builds on the environment that scripts/setup makes")
    find("dpkg-deb")
    place = tmp_path_factory.mktemp("deb")
    subprocess.run(
        ["sh", TOP / "scripts/deb", place], check=True, timeout=1500, capture_output=True,
        env={**os.environ, "IVSHMEMFS_COMPILE": "0"},
    )  # fmt: skip
    (made,) = place.glob("ivshmemfs_0.1.0_*.deb")
    return made


@pytest.fixture(scope="module")
def files(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files."""
    place = tmp_path_factory.mktemp("files")
    subprocess.run(["dpkg-deb", "-x", package, place], check=True, timeout=120)
    return place


def test_what_is_where(files: Path) -> None:
    for name in ("bin/ivshmemfs", "sbin/mkfs.ivshmemfs", "sbin/fsck.ivshmemfs",
                 "sbin/mount.ivshmemfs", "sbin/mount.fuse.ivshmemfs"):  # fmt: skip
        link = files / "usr" / name
        assert os.readlink(link) == f"../lib/ivshmemfs/bin/{link.name}"
        assert link.resolve().is_file()
    for name in ("lib/systemd/system/ivshmemfs@.service", "lib/udev/rules.d/60-ivshmemfs.rules",
                 "lib/tmpfiles.d/ivshmemfs.conf", "share/man/man8/mkfs.ivshmemfs.8.gz",
                 "share/bash-completion/completions/fsck.ivshmemfs",
                 "share/zsh/vendor-completions/_ivshmemfs", "share/doc/ivshmemfs/copyright",
                 "share/doc/ivshmemfs/licences/libc6"):  # fmt: skip
        assert (files / "usr" / name).is_file(), name
    assert "@DIR@" not in (files / "usr/bin/ivshmemfs").read_text()
    assert {path.name for path in files.iterdir()} == {"usr"}


def test_the_checksums_are_of_its_files(package: Path, files: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "-e", package, tmp_path / "control"], check=True, timeout=60)
    sums = tmp_path / "control" / "md5sums"
    subprocess.run(["md5sum", "--quiet", "-c", sums], cwd=files, check=True, timeout=120)
    listed = {line.split("  ", 1)[1] for line in sums.read_text().splitlines()}
    there = (path for path in files.rglob("*") if path.is_file() and not path.is_symlink())
    assert listed == {str(path.relative_to(files)) for path in there}


def test_the_licence_is_the_project_s(files: Path) -> None:
    def words(text: str) -> list[str]:
        return re.findall(r"[\w\"]+", text)

    ours = words((TOP / "LICENSE").read_text().split("\n\n", 2)[2])
    theirs = words((files / "usr/share/doc/ivshmemfs/copyright").read_text())
    assert "".join(ours) in "".join(theirs)


def test_lintian_finds_nothing(package: Path) -> None:
    done = subprocess.run(
        [find("lintian"), "--allow-root", package], capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_its_files_need_nothing_else(files: Path, tmp_path: Path) -> None:
    root = busybox_root(tmp_path / "root")
    if root is None:
        pytest.skip("no static busybox here: apt-get install busybox-static")
    subprocess.run(["cp", "-a", f"{files}/usr/.", root / "usr"], check=True)
    done = run_in(root, USE + "ivshmemfs umount /mnt/a; fsck.ivshmemfs -n /dev/shm/hello")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/dev/shm/hello: clean" in done.stdout


@pytest.mark.long
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("suite", ["bullseye", "bookworm", "trixie"])
def test_its_life_on_a_debian(suite: str, package: Path, tmp_path: Path) -> None:
    root = debian_root(suite)
    tree = tmp_path / "tree"
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True, timeout=120)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace("Version: 0.1.0", "Version: 0.0.9"))
    older = tmp_path / "older.deb"
    subprocess.run(["dpkg-deb", "-Znone", "-b", tree, older], check=True, timeout=300)
    script = f"mkdir /tmp/old /tmp/new; mv /tmp/older.deb /tmp/old; mv /tmp/{package.name} /tmp/new"
    done = run_in(root, script + LIFE, package, older, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    said = "ivshmemfs: what is mounted goes on with version 0.0.9 until it is mounted again"
    assert said in lines
    assert "ivshmemfs is mounted at /mnt/a: unmount it first" in lines
    assert any(line.startswith("/dev/shm/hello: clean") for line in lines)
    assert lines[lines.index("--- left") + 1 :] == []
