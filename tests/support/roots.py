"""Other roots on this machine, each in a mount namespace that ends with the command.

Nothing that a command in such a root mounts is seen outside of it, and nothing is left behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.programs import find

CACHE = Path(os.environ.get("IVSHMEMFS_CACHE") or Path.home() / ".cache/ivshmemfs")
#: Mounts what a booted machine has, then runs the rest of the words in the root.
ENTER = """set -eu
root=$1; shift
mount --bind "$root" "$root"
cd "$root"
mkdir -p proc sys dev tmp run mnt
mount -t proc proc proc
mount -t tmpfs dev dev
mknod dev/fuse c 10 229
mknod dev/null c 1 3
mknod dev/urandom c 1 9
chmod 666 dev/fuse dev/null dev/urandom
mkdir dev/shm
mount -t tmpfs shm dev/shm
mount -t tmpfs tmp tmp
for file; do shift; [ "$file" != -- ] || break; cp "$file" tmp/; done
exec chroot . "$@"
"""
_INSTALL = """export DEBIAN_FRONTEND=noninteractive
apt-get -q update; apt-get -q install -y --no-install-recommends"""
#: The same on every distribution.
PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str:
    """What this machine lacks for a root, or ""."""
    if os.geteuid() != 0:
        return "only root may chroot"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened here"
    tried = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "true"], capture_output=True, check=False
    )
    return "" if tried.returncode == 0 else "no mount namespace can be made here"


def run_in(
    root: Path,
    script: str,
    *files: Path,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run shell text in a root; `files` are in its /tmp, `env` adds to its environment."""
    return subprocess.run(
        ["unshare", "-m", "-f", "-p", "--kill-child", "--propagation", "private", "sh", "-c", ENTER,
         "sh", root, *files, "--", "sh", "-euc", script],
        capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        env={"PATH": PATH, "HOME": "/root", **(env or {})},
    )  # fmt: skip


def debian_root(suite: str, *packages: str) -> Path:
    """A root of a Debian release, made once and kept; skips the test without debootstrap.

    It has the packages without which nothing runs, then *packages* and what they need.
    """
    find("debootstrap")
    root = CACHE / "roots" / "-".join((suite, *packages))
    root.parent.mkdir(parents=True, exist_ok=True)
    base = debian_root(suite) if packages else None
    with open(f"{root}.lock", "w") as lock:  # several processes of a test run want the same root
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (root / "complete").exists():
            return root
        shutil.rmtree(root, ignore_errors=True)
        if base is None:
            made = subprocess.run(
                ["debootstrap", "--variant=minbase", suite, root],
                capture_output=True, text=True, check=False, timeout=1200,
            )  # fmt: skip
        else:
            subprocess.run(["cp", "-a", base, root], check=True, timeout=300)
            (root / "complete").unlink()
            made = run_in(root, f"{_INSTALL} {' '.join(packages)}", timeout=1200)
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
        (root / "complete").touch()
    return root


def busybox_root(place: Path) -> Path | None:
    """Make a root with a static busybox and nothing else; None without one on this machine."""
    program = shutil.which("busybox")
    if program is None:
        return None
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout
    for folder in ("bin", "sbin", "usr/bin", "etc"):
        (place / folder).mkdir(parents=True)
    shutil.copy(program, place / "bin/busybox")
    if subprocess.run(["ldd", program], capture_output=True, check=False).returncode == 0:
        return None  # it needs the libraries of this machine
    for name in set(listed.split()) - {"busybox"}:
        (place / "bin" / name).symlink_to("busybox")
    (place / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    return place


def missing_beside() -> str:
    """What this machine lacks for `run_beside`, or ""."""
    if lacking := missing():
        return lacking
    tried = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "mount", "-t", "overlay", "-o",
         "lowerdir=/usr/local/bin:/usr/sbin", "none", "/mnt"],
        capture_output=True, check=False,
    )  # fmt: skip
    return "" if tried.returncode == 0 else "this kernel has no overlayfs"


#: Puts the commands where an installation puts them, on top of this machine's own directories.
BESIDE = """set -eu
place=$1
mount --make-rprivate /
for at in $(sed -n 's/^[^ ]* \\([^ ]*\\) fuse\\.ivshmemfs .*/\\1/p' /proc/mounts); do
    umount -l "$at" || true  # of other tests
done
mount -t tmpfs none /mnt
mount -t tmpfs none /dev/shm
mkdir /mnt/commands
for name in ivshmemfs mkfs.ivshmemfs fsck.ivshmemfs mount.ivshmemfs mount.fuse.ivshmemfs; do
    ln -s "$place/$name" /mnt/commands/
done
for folder in /usr/sbin /usr/local/bin; do
    mount -t overlay -o "lowerdir=/mnt/commands:$folder" none "$folder"
done
"""


def run_beside(script: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run shell text on this machine with the commands installed, /mnt and /dev/shm empty."""
    place = Path(sys.executable).parent
    return subprocess.run(
        ["unshare", "-m", "-f", "-p", "--mount-proc", "--kill-child", "--propagation", "private",
         "sh", "-euc", BESIDE + script, "sh", place],
        capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        env={"PATH": PATH, "HOME": "/root"},
    )  # fmt: skip
