"""Mounts where fusermount3 is not installed: root mounts by mount(2), with every feature."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ivshmemfs.errors import MountError
from ivshmemfs.fuse import mountpoint, session
from ivshmemfs.fuse.options import parse
from tests.fuse.fake_mount import FakeMount
from tests.support.mounts import PATIENCE, mount_lines, needs_fuse

MountFactory = Callable[..., FakeMount]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root calls mount(2)")


@pytest.fixture
def bare(mount: MountFactory) -> MountFactory:
    """Make mounts with a PATH in which no program is found."""
    return lambda *words: mount(*words, PATH="/nonexistent")


def fields(path: Path) -> tuple[set[str], str, str, set[str]]:
    """Flags, type, source and FUSE options of the one mount on *path*."""
    (line,) = mount_lines(path)
    words = line.split()
    dash = words.index("-")
    return (
        set(words[5].split(",")),
        words[dash + 1],
        words[dash + 2],
        set(words[dash + 3].split(",")),
    )


@needs_fuse
@needs_root
def test_it_is_the_mount_that_fusermount3_makes(mount: MountFactory, bare: MountFactory) -> None:
    one, two = mount("-o", "noatime,noexec"), bare("-o", "noatime,noexec")
    assert fields(one.path) == fields(two.path)
    assert {"nosuid", "nodev", "noatime", "noexec"} <= fields(two.path)[0]


@needs_fuse
@needs_root
def test_options_reach_the_kernel(bare: MountFactory) -> None:
    flags, fstype, _source, words = fields(bare("-o", "ro,suid,allow_other").path)
    assert fstype == mountpoint.FSTYPE
    assert {"ro", "nodev"} <= flags
    assert "nosuid" not in flags
    assert {"user_id=0", "group_id=0", "allow_other", "default_permissions"} <= words


@needs_fuse
@needs_root
def test_the_daemon_keeps_the_connection(bare: MountFactory) -> None:
    one = bare()
    file = one.path / "f"
    file.write_bytes(bytes(8192))
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 6):
        assert "shared mappings with direct I/O are allowed" in one.log_text()
    assert "default_permissions" not in fields(one.path)[3]  # the daemon itself checks


@needs_fuse
@needs_root
def test_a_signal_unmounts_and_keeps_mapped_pages(bare: MountFactory, tmp_path: Path) -> None:
    """umount2(2) runs in a thread, while the daemon answers the kernel's writes."""
    one = bare("-o", "mmap")
    file = one.path / "f"
    file.write_bytes(bytes(8192))
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 8192) as mapping:
        mapping[:5] = b"dirty"
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(PATIENCE) == 0
    assert not mount_lines(one.path)
    assert "detached" not in one.log_text()


@needs_fuse
@needs_root
def test_a_signal_detaches_a_mount_in_use(bare: MountFactory) -> None:
    one = bare()
    opened = os.open(one.path / "f", os.O_CREAT)
    try:
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(PATIENCE) == 0
    finally:
        with suppress(OSError):  # ENOTCONN: its daemon is gone
            os.close(opened)
    assert not mount_lines(one.path)
    assert "is in use: detached" in one.log_text()


def test_a_user_needs_fusermount3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mountpoint, "helper", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MountError, match="install the package fuse3, or be root"):
        session._open_mount(str(tmp_path), "source", parse([]))


@needs_fuse
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENODEV, "modprobe fuse"),
        (errno.EPERM, "CAP_SYS_ADMIN"),
        (errno.EBUSY, "cannot be mounted: Device or resource busy"),
    ],
)
def test_what_the_kernel_refuses_is_named(
    number: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(mountpoint, "_mount", lambda *_arguments: number)
    with pytest.raises(MountError, match=said):
        mountpoint.open_mount_directly("/mnt", "source", 0, "")
    assert len(os.listdir("/proc/self/fd")) == before
