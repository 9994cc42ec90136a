"""A guest with a kernel and busybox alone: it installs the bundle from a disk, and exchanges files.

It has no Python, no fuse3, no C library and no network.  One boot shows all of it, because booting
takes far longer than the rest without KVM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.harness import BOOT_SECONDS, COMMAND_SECONDS, arm_parts, kernel_root, kvm_works
from tests.guest.machines import IVSHMEMFS, MKFS
from tests.support.roots import busybox_root

TOP = Path(__file__).parents[2]
#: Kernel modules in the order of loading, those that they need first.
WANTED = ("virtio_pci", "virtio_blk", "isofs", "fuse")
INIT = """#!/bin/sh
export PATH=/usr/local/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod "$module"; done
exec >/dev/console 2>&1 </dev/null
check() {
    mount -t iso9660 /dev/vda /cd && sh /cd/ivshmemfs-bundle.sh && ivshmemfs list &&
        ivshmemfs mount /mnt && grep fuse.ivshmemfs /proc/mounts && cat /mnt/from-host &&
        echo 'written in the guest' >/mnt/from-guest && ivshmemfs lock /mnt/lock -- echo locked &&
        ivshmemfs umount /mnt && fsck.ivshmemfs -n pci && sh /cd/ivshmemfs-bundle.sh --uninstall
}
check && echo "All is well: $(ls /opt | wc -l) left"
poweroff -f
"""


@pytest.fixture
def place() -> Iterator[Path]:
    programs = ("qemu-system-x86_64", "busybox", "xorriso")
    missing = [name for name in programs if not shutil.which(name)]
    if arm_parts() or missing or not (kernel_root() / "boot").is_dir():
        what = ", ".join(missing) or "a kernel for x86_64"
        text = f"{what} is missing: run 'sh scripts/setup --guest --programs'"
        if os.environ.get("IVSHMEMFS_TEST_GUEST") == "required" and not arm_parts():
            pytest.fail(text)
        pytest.skip(text)
    with tempfile.TemporaryDirectory(prefix="ivshmemfs-bare-", dir="/dev/shm") as directory:
        yield Path(directory)


def modules() -> list[Path]:
    """The files of WANTED and of what they need, in the order of loading."""
    top = next((kernel_root() / "lib/modules").iterdir())
    needs = dict(line.split(":") for line in (top / "modules.dep").read_text().splitlines())
    found: list[str] = []
    for name in WANTED:
        for path, others in needs.items():
            if Path(path).name.startswith(f"{name}.ko"):
                found += [*reversed(others.split()), path]
    return [top / path for path in dict.fromkeys(found)]


def write_initramfs(to: Path, place: Path) -> None:
    """Make the archive of a root with busybox, the modules and the first process."""
    root = busybox_root(place)
    if root is None:
        pytest.skip("no static busybox here: apt-get install busybox-static")
    for name in ("usr/local/bin", "opt", "proc", "sys", "dev", "tmp", "mnt", "cd", "modules"):
        (root / name).mkdir(parents=True)
    for number, module in enumerate(modules()):
        shutil.copy(module, root / f"modules/{number:02}-{module.name}")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*"))) + "\n"
    with to.open("wb") as file:
        subprocess.run(
            ["busybox", "cpio", "-o", "-H", "newc"],
            input=names.encode(), stdout=file, stderr=subprocess.DEVNULL, cwd=root, check=True,
        )  # fmt: skip


@pytest.mark.guest
@pytest.mark.slow
def test_a_guest_of_busybox_alone(place: Path) -> None:
    subprocess.run(
        ["sh", TOP / "scripts/bundle", "--iso", place / "bundle.sh"],
        check=True, capture_output=True, timeout=900,
        env={**os.environ, "IVSHMEMFS_COMPILE": "0"},
    )  # fmt: skip
    write_initramfs(place / "initramfs", place / "root")
    region = place / "region"
    subprocess.run([MKFS, "--size", "1M", "--label", "hello", region], check=True)
    (place / "from-host").write_text("written on the host\n")
    subprocess.run([IVSHMEMFS, "put", region, place / "from-host", "/"], check=True)
    kernel = next((kernel_root() / "boot").glob("vmlinuz-*"))
    booted = subprocess.run(
        ["qemu-system-x86_64", "-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio",
         *(["-enable-kvm", "-cpu", "host"] if kvm_works() else ["-cpu", "max"]),
         "-smp", "2", "-m", "1G", "-kernel", kernel, "-initrd", place / "initramfs",
         "-append", "console=ttyS0 quiet panic=-1 no_timer_check",
         "-drive", f"file={place}/bundle.iso,if=virtio,readonly=on,format=raw",
         "-object", f"memory-backend-file,id=shm,share=on,mem-path={region},size=1M",
         "-device", "ivshmem-plain,memdev=shm"],
        capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
        timeout=BOOT_SECONDS + COMMAND_SECONDS, check=False,
    )  # fmt: skip
    said = booted.stdout.replace("\r", "")
    assert "All is well: 0 left" in said, said[-4000:]
    assert "is installed in /opt/ivshmemfs" in said
    assert "written on the host\n" in said
    assert "locked\n" in said
    got = subprocess.run(
        [IVSHMEMFS, "get", region, "/from-guest", "-"], capture_output=True, check=True
    )
    assert got.stdout == b"written in the guest\n"
