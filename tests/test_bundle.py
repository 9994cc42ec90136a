"""The bundle: installs from what it carries alone, on machines that have little or nothing else.

A root of this machine with busybox alone is what a guest with a kernel and busybox has.  With
--long the same runs in fresh roots of Debian 11, 12 and 13, which debootstrap makes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.roots import busybox_root, debian_root, missing, run_in

TOP = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

#: Everything that a bundle promises, in the words of a shell.
ALL = """
cd /tmp
if command -v python3 fusermount3; then exit 9; fi
sh bundle.sh
mkfs.ivshmemfs -q --size 1M -L hello /dev/shm/hello
mkdir -p /mnt/a /mnt/b
MOUNT_A
ivshmemfs mount /dev/shm/hello /mnt/b
/opt/ivshmemfs/current/bin/python3 -c 'import ctypes; ctypes.CDLL("libgcc_s.so.1")'
cp /etc/passwd /mnt/a/
cmp /mnt/b/passwd /etc/passwd
ivshmemfs lock /mnt/a/lock -- cat /mnt/a/passwd | cmp - /etc/passwd
grep -c ivshmemfs /proc/mounts
echo --- over a running version
sh bundle.sh
if sh bundle.sh --uninstall; then exit 9; fi
cp /etc/passwd /mnt/b/again
cmp /mnt/a/again /etc/passwd
ivshmemfs umount /mnt/a
ivshmemfs umount /mnt/b
fsck.ivshmemfs -n /dev/shm/hello
echo --- and again
sh bundle.sh
ls /opt/ivshmemfs/versions
sh bundle.sh --uninstall
find / -xdev -name '*ivshmemfs*' ! -path '/tmp/*'
"""


def make(place: Path, *, compiled: bool) -> Path:
    """Make a bundle in a new directory, and an image where that can be."""
    if not (TOP / ".venv").exists() or not sys.executable.startswith(str(TOP / ".venv")):
        pytest.skip("builds on the environment that scripts/setup makes")
    words = ["--iso"] if shutil.which("xorriso") else []
    subprocess.run(
        ["sh", TOP / "scripts/bundle", *words, place / "bundle.sh"],
        check=True, timeout=1500, capture_output=True,
        env={**os.environ, "IVSHMEMFS_COMPILE": "1" if compiled else "0"},
    )  # fmt: skip
    return place / "bundle.sh"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without the compiled engine, which takes seconds and not minutes to make."""
    return make(tmp_path_factory.mktemp("bundle"), compiled=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as users make it."""
    return make(tmp_path_factory.mktemp("compiled"), compiled=True)


def install(bundle: Path, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installer with another root than this machine's."""
    return subprocess.run(
        ["sh", bundle, *words], env={**os.environ, "DESTDIR": str(root)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The directories of a machine that the installer looks for."""
    folders = ("usr/local/bin", "usr/share/man", "sbin", "etc/systemd/system")
    for folder in (*folders, "usr/share/bash-completion", "usr/share/zsh"):
        (tmp_path / "image" / folder).mkdir(parents=True)
    return tmp_path / "image"


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


# --- into the root of another machine ---------------------------------------------------------


def test_what_is_installed_where(bundle: Path, image: Path) -> None:
    done = install(bundle, image)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.endswith(f"is installed in {image}/opt/ivshmemfs\n")
    for name in ("usr/local/bin/ivshmemfs", "sbin/mount.ivshmemfs", "sbin/fsck.ivshmemfs"):
        assert os.readlink(image / name) == f"/opt/ivshmemfs/current/bin/{Path(name).name}"
    for number, name in ((5, "ivshmemfs.5"), (8, "ivshmemfs.8"), (8, "mount.ivshmemfs.8")):
        page = image / f"usr/local/share/man/man{number}" / name
        assert os.readlink(page) == f"/opt/ivshmemfs/current/share/man/man{number}/{name}"
        carried = image / f"opt/ivshmemfs/current/share/man/man{number}" / name
        assert carried.read_bytes() == (TOP / "docs/man" / name).read_bytes()
    for file in (
        "bash-completion/completions/ivshmemfs", "bash-completion/completions/mkfs.ivshmemfs",
        "zsh/site-functions/_ivshmemfs",
    ):  # fmt: skip
        target = os.readlink(image / "usr/local/share" / file)
        assert target.startswith("/opt/ivshmemfs/current/share/")
        assert (image / target[1:]).read_text().count("ivshmemfs") > 2
    assert not (image / "usr/local/share/fish").exists()  # there is no such shell
    start = (image / "opt/ivshmemfs/current/bin/ivshmemfs").read_text()
    assert '"/opt/ivshmemfs/versions/0.1.0-1/python"' in start
    assert str(image) not in start
    assert (image / "usr/local/lib/systemd/system/ivshmemfs-region@.service").exists()
    assert (image / "opt/ivshmemfs/current/share/licences/libc6").exists()
    assert install(bundle, image, "--uninstall").returncode == 0
    assert everything(image) == set()


def test_another_version_is_replaced(bundle: Path, image: Path) -> None:
    older = image / "older.sh"
    content = bundle.read_bytes()
    older.write_bytes(content.replace(b"VERSION='0.1.0'", b"VERSION='0.0.9'", 1))
    assert install(older, image).returncode == 0
    (image / "opt/ivshmemfs/current/VERSION").write_text("0.0.9\n")
    assert "0.0.9" in os.readlink(image / "opt/ivshmemfs/current")
    done = install(bundle, image)
    assert done.stdout.rstrip().endswith("in place of 0.0.9")
    assert os.readlink(image / "opt/ivshmemfs/current") == "versions/0.1.0-1"
    assert [path.name for path in (image / "opt/ivshmemfs/versions").iterdir()] == ["0.1.0-1"]
    older.unlink()
    removed = install(bundle, image, "--uninstall")
    assert removed.stdout == f"ivshmemfs 0.1.0 is removed from {image}/opt/ivshmemfs\n"
    assert everything(image) == set()


def test_a_bundle_of_the_old_kind_is_replaced(bundle: Path, image: Path) -> None:
    place = image / "opt/ivshmemfs"
    (place / "bin").mkdir(parents=True)
    (place / "pyvenv.cfg").touch()
    (place / "bin/ivshmemfs").write_text("#!/bin/sh\necho ivshmemfs, version 0.0.1 '(compiled)'\n")
    (place / "bin/ivshmemfs").chmod(0o755)
    done = install(bundle, image)
    assert "in place of 0.0.1 (compiled)" in done.stdout
    assert {path.name for path in place.iterdir()} == {"current", "versions"}


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_copy_leaves_the_older_version(damage: str, bundle: Path, image: Path) -> None:
    assert install(bundle, image).returncode == 0
    before = everything(image)
    content = bytearray(bundle.read_bytes())
    if damage == "cut":
        del content[-100_000:]
    else:
        content[len(content) // 2] ^= 1
    damaged = image.parent / "damaged.sh"
    damaged.write_bytes(content)
    done = install(damaged, image)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ivshmemfs-bundle: ")
    assert everything(image) == before


def test_another_machine_is_refused(bundle: Path, image: Path) -> None:
    other = image.parent / "other.sh"
    other.write_bytes(bundle.read_bytes().replace(b"MACHINE='", b"MACHINE='not-", 1))
    done = install(other, image)
    assert done.returncode == 1
    assert "this bundle is for not-" in done.stderr
    assert everything(image) == set()


def test_links_of_others_stay(bundle: Path, image: Path) -> None:
    assert install(bundle, image).returncode == 0
    (image / "sbin/mount.ivshmemfs").unlink()
    (image / "sbin/mount.ivshmemfs").symlink_to("/usr/bin/own")
    assert install(bundle, image, "--uninstall").returncode == 0
    assert everything(image) == {"sbin/mount.ivshmemfs"}


def test_wrong_use(bundle: Path, image: Path) -> None:
    nothing = install(bundle, image, "--uninstall")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "no ivshmemfs is installed" in nothing.stderr
    piped = subprocess.run(
        ["sh"], input=bundle.read_bytes(), capture_output=True, cwd=image, timeout=60, check=False
    )
    assert b"save it as a file first" in piped.stderr
    assert "unknown option --remove" in install(bundle, image, "--remove").stderr
    assert install(bundle, image, "--version").stdout.startswith("ivshmemfs 0.1.0 for ")
    assert "sh ivshmemfs-bundle.sh --uninstall" in install(bundle, image, "--help").stdout


def test_the_image_for_a_cd_drive(bundle: Path, tmp_path: Path) -> None:
    image = bundle.with_suffix(".iso")
    if not image.exists():
        pytest.skip("xorriso is not installed")
    subprocess.run(
        ["xorriso", "-osirrox", "on", "-indev", image, "-extract", "/", tmp_path / "cd"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    carried = tmp_path / "cd/ivshmemfs-bundle.sh"
    assert carried.read_bytes() == bundle.read_bytes()
    assert "sh /mnt/ivshmemfs-bundle.sh" in (tmp_path / "cd/README.txt").read_text()


# --- in other roots ---------------------------------------------------------------------------


def check_all(root: Path, bundle: Path, mount: str, kind: str = "pure Python") -> None:
    """Install, use, replace and remove it in a root."""
    done = run_in(root, ALL.replace("MOUNT_A", mount), bundle, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    first, running, again = done.stdout.split("--- ")
    assert first.splitlines()[0] == f"0.1.0 ({kind}) is installed in /opt/ivshmemfs"
    assert first.splitlines()[-1] == "2"
    assert "0.1.0 stays in /opt/ivshmemfs/versions/0.1.0-1, because process" in running
    assert "in place of 0.1.0" in running
    assert "ivshmemfs is mounted at /mnt/a: unmount it first" in done.stderr
    assert "/dev/shm/hello: clean" in running
    lines = again.splitlines()
    assert lines[1].endswith("is installed in /opt/ivshmemfs, in place of 0.1.0")
    assert lines[2:] == ["0.1.0-3", "ivshmemfs 0.1.0 is removed from /opt/ivshmemfs"]


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_with_busybox_alone(bundle: Path, tmp_path: Path) -> None:
    """busybox's mount knows no helpers, so the command itself mounts."""
    root = busybox_root(tmp_path / "root")
    if root is None:
        pytest.skip("no static busybox here: apt-get install busybox-static")
    check_all(root, bundle, "ivshmemfs mount label=hello /mnt/a")


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_commands_run_while_they_are_replaced(bundle: Path, tmp_path: Path) -> None:
    """A command runs from the older version or from the newer one, never from a mixture."""
    root = busybox_root(tmp_path / "root")
    if root is None:
        pytest.skip("no static busybox here: apt-get install busybox-static")
    done = run_in(
        root,
        """
sh /tmp/bundle.sh >/dev/null
(while [ ! -e /tmp/stop ]; do ivshmemfs --version || echo failed; done >/tmp/said 2>&1) &
sh /tmp/bundle.sh
sh /tmp/bundle.sh
touch /tmp/stop
wait
echo "$(grep -c '^ivshmemfs, version' /tmp/said) ran"
grep -v '^ivshmemfs, version' /tmp/said || echo 'none failed'
""",
        bundle,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("none failed\n"), done.stdout
    assert int(done.stdout.split(" ran")[0].split()[-1]) > 10


#: Generic words of mount(8), all at once.
WORDS = (
    "rw,auto,noauto,user,nofail,_netdev,relatime,nodiratime,lazytime,comment=x,"
    "x-systemd.automount,x-systemd.requires=a.service,x-gvfs-show,X-mount.mkdir,defaults"
)


@pytest.mark.long
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("suite", ["bullseye", "bookworm", "trixie"])
def test_in_a_root_of_debian(suite: str, compiled: Path) -> None:
    root = debian_root(suite)
    fstab = f"echo 'label=hello /mnt/a ivshmemfs {WORDS} 0 2' >/etc/fstab; mount /mnt/a"
    more = "; mount -o remount,ro /mnt/a; mount -o remount,rw,noatime /mnt/a; fsck -t ivshmemfs -n /dev/shm/hello >/dev/null"  # noqa: E501
    check_all(root, compiled, fstab + more, kind="compiled")
