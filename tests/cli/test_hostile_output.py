"""No command and no log shows what a region says in a way that drives a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ivshmemfs.cli.main import main
from ivshmemfs.cli.transfer.meter import Meter
from ivshmemfs.format import inode, peer
from ivshmemfs.fsck.main import main as fsck_main
from mkfs.main import main as mkfs_main
from tests.cli.conftest import ivshmemfs
from tests.support.damage import Knife
from tests.support.mounts import needs_fuse
from tests.support.regions import ROOT, TestRegion, new_region, put

#: ESC, a line end, a C1 control (as UTF-8 and as a byte), bidi controls, a line separator.
NASTY = "\x1b[31m\n\r\x85\u202e\u2066\u2028".encode() + b"\x9b"
MARK = "[31m"  # what is left to be recognized

Show = Callable[..., str]


@pytest.fixture
def region() -> Iterator[TestRegion]:
    """Label, host name, version, names, link targets and attributes are hostile; some contradict
    what else is there, so that messages name them."""
    path = Path(f"/dev/shm/ivshmemfs-nasty-{os.getpid()}")
    with new_region(1 << 20) as made:
        fs = made.mount()
        folder = fs.mkdir(1, NASTY, 0o755, ROOT).ino
        fs.symlink(1, b"link", NASTY, ROOT)
        bad_link = fs.symlink(folder, b"bad" + NASTY, NASTY, ROOT).ino
        file = put(fs, folder, b"file" + NASTY, b"content").ino
        fs.setxattr(file, b"user.a" + NASTY, b"1", 0, ROOT)
        fs.setxattr(file, b"user.b" + NASTY, b"1", 0, ROOT)
        fs.mknod(folder, b"fifo" + NASTY, 0o010644, 0, ROOT)
        gone = fs.mkdir(1, b"gone" + NASTY, 0o755, ROOT).ino
        memory = made.region().memory
        knife = Knife(memory)
        knife.edit_superblock(label=NASTY)
        knife.set_payload(bad_link, NASTY + b"\0", size=len(NASTY) + 1, payload=inode.INLINE)
        knife.set_names(gone, [(b"dangling" + NASTY, 1), (b"dangling" + NASTY, 2)])
        raw = knife.read(knife.block_of(file))
        knife.write(knife.block_of(file), raw.replace(b"user.a", b"user.c"))
        at = knife.geometry.peers_offset
        slot = peer.SLOT.unpack(memory.read(at, peer.SLOT_SIZE))
        forged = peer.encode_identity(slot._replace(host=NASTY, version=NASTY[:16]))
        memory.write(at + peer.IDENTITY_OFFSET, forged)
        os.link(made.path, path)
        try:
            yield made
        finally:
            path.unlink()
        del fs


@pytest.fixture
def show(capfdbinary: pytest.CaptureFixture[bytes]) -> Show:
    """Runs a command and returns all that it prints."""

    def run(command: Callable[[list[str]], None], *words: object) -> str:
        with pytest.raises(SystemExit):
            command([str(word) for word in words])
        out, err = capfdbinary.readouterr()
        text = (out + err).decode()
        assert all(line.isprintable() for line in text.split("\n")), repr(text)
        assert "internal error" not in text
        assert err.count(b"ivshmemfs: ") == err.count(b"\n") or command is not main
        return text

    return run


@pytest.mark.slow
def test_commands_that_look(region: TestRegion, show: Show) -> None:
    assert show(main, "list").count(MARK)
    assert show(main, "info", region.path).count(MARK) == 1
    assert show(main, "peers", region.path).count(MARK) == 2  # host, version
    assert show(main, "dump", region.path, "all").count(MARK) == 3  # label, host, version
    for what in ("superblock", "copy", "peers", "root", "inode:3", "inode:4", "block:1"):
        show(main, "dump", region.path, what)
    show(main, "evict", region.path, 9)
    show(main, "evict", region.path, 1)


def test_formatting_and_checking(region: TestRegion, show: Show) -> None:
    assert MARK in show(mkfs_main, region.path)
    assert MARK in show(fsck_main, "-n", region.path)
    assert MARK in show(fsck_main, "-y", region.path)  # refused: it names the mounts
    assert MARK in show(fsck_main, "-y", "--force", region.path)
    show(main, "evict", region.path, 1)
    assert MARK in show(mkfs_main, region.path)


def test_copying(region: TestRegion, show: Show, tmp_path: Path) -> None:
    nasty, dest = os.fsdecode(NASTY), tmp_path / os.fsdecode(NASTY)
    dest.mkdir()
    for words in (
        ("get", region.path, nasty, dest),
        ("get", "-r", region.path, nasty, dest),
        ("get", "-r", region.path, "gone" + nasty, dest),
        ("get", region.path, "none" + nasty, dest),
        ("get", region.path, "link", dest / "none" / "x"),
        ("get", region.path, nasty, "-"),
        ("put", region.path, dest, "/"),
        ("put", "-r", region.path, dest, "/link/" + nasty),
        ("put", dest, region.path, "/"),
        ("put", region.path, dest / "none", "/"),
        ("lock", dest / "none", "true"),
        ("lock", dest, "true"),
    ):
        assert MARK in show(main, *words), words


def test_the_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """On a terminal, names are neither escapes of it nor marks of the program that draws."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("ivshmemfs.cli.transfer.meter.LONG", 0.0)
    meter = Meter(quiet=False)
    meter.add(b"\\[link=x]\x1b[7m\x9b\n", 5, 10)
    meter.close()
    text = capfdbinary.readouterr().err.decode()
    assert "link=x]\\x1b[7m\\x9b\\n" in text
    assert "\x1b[7m" not in text


def test_mounting(region: TestRegion, show: Show, tmp_path: Path) -> None:
    nasty = os.fsdecode(NASTY)
    for words in (
        ("mount", f"label={nasty}", tmp_path / "none"),
        ("mount", nasty, tmp_path),
        ("mount", region.path, tmp_path / nasty),
        ("umount", tmp_path / nasty),
        ("mount", region.path, tmp_path, "-o", nasty),
        ("frob" + nasty,),
        ("mount", f"--{nasty}"),
    ):
        assert "\x1b" not in show(main, *words)


@needs_fuse
def test_the_log_of_a_mount(region: TestRegion, place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ivshmemfs("mount", "-o", f"log={log}", region.path, place).returncode == 0
    for top, folders, files in os.walk(os.fsencode(place)):
        for name in (*folders, *files):
            path = os.path.join(top, name)
            for look in (os.lstat, os.readlink, os.listxattr, os.listdir):
                try:
                    look(path)
                except OSError:
                    continue
    assert ivshmemfs("umount", place).returncode == 0
    text = log.read_text()
    assert all(line.isprintable() for line in text.split("\n")), repr(text)
    assert MARK in text
