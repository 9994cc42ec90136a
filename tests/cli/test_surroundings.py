"""Mounting where something is missing that is usually there: it works, or one line says why not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import complains, ivshmemfs
from tests.support.mounts import mount_lines, needs_fuse, release, run
from tests.support.regions import TestRegion

pytestmark = needs_fuse

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes mount namespaces: needs root")
COMMAND = 'ivshmemfs() { "$PYTHON" -m ivshmemfs "$@"; }; '


def shell(script: str, *words: object, namespace: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which `ivshmemfs` is the command."""
    apart = ["unshare", "--mount"] if namespace else []
    return run(*apart, "sh", "-c", COMMAND + script, "sh", *words, env={"PYTHON": sys.executable})


ROUND = 'ivshmemfs mount "$1" "$2" && echo hi >"$2/f" && cat "$2/f" && ivshmemfs umount "$2"'


@pytest.mark.parametrize(
    "before",
    [
        "unset HOME TERM; export LC_ALL=C; umask 077",
        "ulimit -n 16",
        "mkdir here && cd here && rmdir ../here",
        'export PATH="/none:$PATH" TMPDIR=/none',
    ],
    ids=["bare environment", "few descriptors", "removed directory", "no temporary directory"],
)
def test_it_works(formatted: TestRegion, place: Path, before: str, tmp_path: Path) -> None:
    result = shell(f'cd "$3"; {before}; {ROUND}', formatted.path, place, tmp_path)
    try:
        assert (result.returncode, result.stdout) == (0, "hi\n"), result.stderr
    finally:
        release(place)


@needs_root
def test_root_needs_no_fusermount(formatted: TestRegion, place: Path) -> None:
    environment = {"PATH": "/none"}
    assert ivshmemfs("mount", formatted.path, place, **environment).returncode == 0
    (place / "f").write_text("x")
    assert ivshmemfs("umount", place, **environment).returncode == 0
    assert not mount_lines(place)


@needs_root
def test_the_root_of_a_user_namespace(formatted: TestRegion) -> None:
    script = f"""
mount -t tmpfs tmpfs /mnt && mknod -m 666 /mnt/fuse c 10 229 && mount --bind /mnt/fuse /dev/fuse
mkdir /mnt/place && chown nobody /mnt/place "$1" && export COMMAND
setpriv --reuid 65534 --regid 65534 --clear-groups unshare -r -m \
    sh -c '{COMMAND}{ROUND}' sh "$1" /mnt/place
"""
    formatted.path.parent.chmod(0o755)
    result = shell(script, formatted.path, namespace=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "hi\n", "")


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        ("umount -l /proc", 32, "mount /proc first"),
        ("mount -t tmpfs none /dev", 32, "/dev/fuse is missing"),
        ("ulimit -n 10", 2, "Too many open files"),
    ],
    ids=["no proc", "no dev", "hardly any descriptors"],
)
@needs_root
def test_one_line_says_why_not(
    formatted: TestRegion, place: Path, before: str, code: int, said: str
) -> None:
    script = f'{before}; ivshmemfs mount "$1" "$2"'
    complains(shell(script, formatted.path, place, namespace=True), code, said)
    assert not mount_lines(place)
    assert "no machine" in ivshmemfs("peers", formatted.path).stdout


def test_the_current_directory_was_removed(formatted: TestRegion, tmp_path: Path) -> None:
    for words in ('mount "$1" m', "umount m", 'mount -o log=l "$1" "$2"', "mount -o remount,ro m"):
        script = f'mkdir "$2/here" && cd "$2/here" && rmdir "$2/here"; ivshmemfs {words}'
        complains(shell(script, formatted.path, tmp_path), 32, "was removed", "the whole path")


@pytest.mark.slow
@pytest.mark.parametrize("above", ["folder", "."])
def test_a_mount_above_its_own_region(tmp_path: Path, above: str) -> None:
    """The daemon looks at the region's path, which now leads through its own mount."""
    top = tmp_path / "top"
    (top / "folder").mkdir(parents=True)
    region, place = top / "folder" / "region", top / above
    assert run(sys.executable, "-m", "mkfs", "--size", "1M", region).returncode == 0
    assert ivshmemfs("mount", f"-olog={tmp_path}/log", region, place).returncode == 0
    try:
        end = time.monotonic() + 20
        while "another mount hides it" not in (tmp_path / "log").read_text():
            assert run("ls", place, timeout=10).returncode == 0
            assert time.monotonic() < end
            time.sleep(0.1)
        (place / "f").write_text("served")
        assert (place / "f").read_text() == "served"
        assert ivshmemfs("umount", place).returncode == 0
    finally:
        release(place)
    assert region.exists()


@needs_root
@pytest.mark.parametrize("first", ["bound", "mounted"])
def test_a_bind_mount_keeps_the_filesystem(
    formatted: TestRegion, places: list[Path], first: str
) -> None:
    script = """
        mount --make-rprivate / && ivshmemfs mount "$1" "$2" && mount --bind "$2" "$3" || exit 99
        ivshmemfs umount "$4" && echo hi >"$5/f" && cat "$5/f" && ivshmemfs umount "$5"
    """
    mounted, bound, _ = places
    order = (bound, mounted) if first == "bound" else (mounted, bound)
    result = shell(script, formatted.path, mounted, bound, *order, namespace=True)
    said = f"ivshmemfs: {order[0]} is unmounted; the filesystem is still mounted at {order[1]}\n"
    assert (result.returncode, result.stdout, result.stderr) == (0, "hi\n", said)


@needs_root
def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    script = 'ulimit -f 1000; "$PYTHON" -m mkfs --size 4M "$1"'
    result = shell(script, tmp_path / "region")
    assert result.returncode == 1
    assert "raise 'ulimit -f'" in result.stderr
