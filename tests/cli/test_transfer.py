"""`get` and `put`: both directions, what they keep, and what they refuse."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ivshmemfs.engine import ROOT_INO, acl
from ivshmemfs.engine.xattr import ACCESS_LIST
from ivshmemfs.errors import Busy
from tests.cli.conftest import complains, ivshmemfs
from tests.support.checks import assert_sound, unreachable
from tests.support.mounts import eventually, needs_fuse, run
from tests.support.regions import ROOT, TestRegion, new_region, put, tree

MIB = 1 << 20


def done(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture
def region() -> Iterator[TestRegion]:
    with new_region(8 * MIB) as made:
        yield made
        assert_sound(made.region().memory)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A tree with everything that can be copied."""
    top = tmp_path / "tree"
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "empty").write_bytes(b"")
    (top / "sub" / "file").write_bytes(os.urandom(300_001))
    (top / os.fsdecode(b"not-\xff-utf8")).write_bytes(b"name")
    (top / "link").symlink_to("sub/file")
    (top / "dangling").symlink_to("nowhere")
    os.mkfifo(top / "fifo")
    with (top / "sparse").open("wb") as file:
        file.seek(3 * MIB)
        file.write(b"end")
        file.truncate(20 * MIB)
    (top / "sub" / "file").chmod(0o751)
    for path in (top / "sub" / "file", top / "sub"):
        os.utime(path, ns=(1_000_000_001, 2_000_000_003))
    return top


def described(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        owner = (status.st_uid, status.st_gid)
        found[str(path.relative_to(top))] = (status.st_mode, owner, status.st_mtime_ns, content)
    return found


def test_a_tree_there_and_back(region: TestRegion, local: Path, tmp_path: Path) -> None:
    done(ivshmemfs("put", "-r", region.path, local, "/"))
    done(ivshmemfs("get", "-r", "--devices", region.path, "tree", tmp_path / "back"))
    assert described(tmp_path / "back") == described(local)
    assert (tmp_path / "back" / "sparse").stat().st_blocks * 512 < 2 * MIB


def test_several_sources_and_a_new_name(region: TestRegion, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    done(ivshmemfs("put", region.path, tmp_path / "a", tmp_path / "b", "/"))
    done(ivshmemfs("put", region.path, tmp_path / "a", "/c"))
    assert tree(region.mount(readonly=True)) == {b"a": b"a", b"b": b"b", b"c": b"a"}
    done(ivshmemfs("get", region.path, "/c", tmp_path / "d"))
    assert (tmp_path / "d").read_text() == "a"
    complains(ivshmemfs("get", region.path, "a", "b", tmp_path / "none"), 1, "is not a directory")
    complains(ivshmemfs("put", region.path, tmp_path / "a", tmp_path / "b", "/c"), 1, "directory")


def test_nothing_is_overwritten_without_force(region: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("new")
    fs = region.mount()
    put(fs, 1, b"old", b"old")
    complains(ivshmemfs("put", region.path, tmp_path / "new", "/old"), 1, "exists", "--force")
    assert tree(fs) == {b"old": b"old"}
    complains(ivshmemfs("get", region.path, "old", tmp_path / "new"), 1, "exists", "--force")
    assert (tmp_path / "new").read_text() == "new"
    assert os.listdir(tmp_path) == ["new"]
    done(ivshmemfs("put", "--force", region.path, tmp_path / "new", "/old"))
    assert tree(fs) == {b"old": b"new"}
    put(fs, 1, b"old", b"newer")
    done(ivshmemfs("get", "--force", region.path, "old", tmp_path / "new"))
    assert (tmp_path / "new").read_text() == "newer"
    fs.unmount()


@pytest.mark.parametrize("forced", [(), ("--force",)], ids=["", "forced"])
def test_get_replaces_no_device_or_fifo(
    region: TestRegion, tmp_path: Path, forced: tuple[str, ...]
) -> None:
    """A forced copy to /dev/null or /dev/stdout would break the machine."""
    fs = region.mount()
    put(fs, ROOT_INO, b"a", b"content")
    there = tmp_path / "there"
    os.mkfifo(there)
    (tmp_path / "link").symlink_to("there")
    for name in ("there", "link"):
        refused = ivshmemfs("get", *forced, region.path, "/a", tmp_path / name)
        complains(refused, 1, "which is not replaced; '-' is the standard output")
        assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_a_tree_with_a_fifo_and_links_replaces_its_earlier_copy(
    region: TestRegion, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    os.mkfifo(tree / "fifo")
    (tree / "null").symlink_to("/dev/null")
    done(ivshmemfs("put", "-r", region.path, tree, "/tree"))
    for _ in range(2):
        done(ivshmemfs("get", "-rf", "--devices", region.path, "/tree", tmp_path / "copy"))
    assert os.readlink(tmp_path / "copy" / "null") == "/dev/null"
    assert stat.S_ISFIFO((tmp_path / "copy" / "fifo").stat().st_mode)


def test_put_ends_where_its_source_does(region: TestRegion, tmp_path: Path) -> None:
    """Files of /sys say that they have a page, and have less."""
    source = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not source.exists() or source.stat().st_size == len(source.read_bytes()):
        pytest.skip("no file here has less than it says")
    done(ivshmemfs("put", region.path, source, "/enabled"))
    done(ivshmemfs("get", region.path, "/enabled", tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_refusals(region: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "plain").write_bytes(bytes(MIB))
    complains(ivshmemfs("get", region.path, "/no/such", tmp_path / "x"), 2, "/no/such")
    complains(ivshmemfs("put", region.path, tmp_path / "no", "/x"), 2, "No such file")
    complains(ivshmemfs("put", region.path, tmp_path / "file", "/no/such"), 2, "No such file")
    complains(ivshmemfs("put", region.path, tmp_path / "dir", "/"), 1, "--recursive")
    complains(ivshmemfs("get", tmp_path / "plain", "x", tmp_path / "y"), 32)
    assert tree(region.mount(readonly=True)) == {}


def test_a_full_region_keeps_nothing_half_done(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(2 * MIB))
    with new_region(MIB) as made:
        fs = made.mount()
        free = fs.statfs().blocks_free
        complains(ivshmemfs("put", made.path, tmp_path / "big", "/"), 2, "big")
        assert tree(fs) == {}
        fs.collect()
        assert fs.statfs().blocks_free >= free - 1
        fs.unmount()


def test_a_large_file_beside_a_mount(tmp_path: Path) -> None:
    content = os.urandom(MIB) * 70 + b"end"
    (tmp_path / "large").write_bytes(content)
    with new_region(96 * MIB) as made:
        fs = made.mount()
        done(ivshmemfs("put", made.path, tmp_path / "large", "/"))
        assert fs.lookup(1, b"large").size == len(content)
        made.path.chmod(0o400)
        done(ivshmemfs("get", made.path, "large", tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == content
        fs.unmount()


def test_a_file_that_is_replaced_while_it_is_copied(tmp_path: Path) -> None:
    """What arrives is one version or the other in each piece, never torn, and put stays whole."""
    pieces = [bytes([number]) * (3 * MIB) for number in range(1, 6)]
    with new_region(32 * MIB) as made:
        fs = made.mount()
        handle, _ = fs.create(1, b"busy", 0o644, os.O_WRONLY, ROOT)
        fs.write(handle, 0, pieces[0])
        for turn in range(4):
            command = [sys.executable, "-m", "ivshmemfs.cli", "get", str(made.path), "busy"]
            running = subprocess.Popen([*command, str(tmp_path / f"copy{turn}")])
            number = 0
            while running.poll() is None:
                number += 1
                for at in range(0, 3 * MIB, MIB):
                    fs.write(handle, at, pieces[number % 5][at : at + MIB])
            assert running.returncode == 0
            copied = (tmp_path / f"copy{turn}").read_bytes()
            assert len(copied) == 3 * MIB
            for at in range(0, 3 * MIB, MIB):
                assert len(set(copied[at : at + MIB])) == 1
        fs.release(handle)
        fs.unmount()


def test_put_of_what_ends_in_the_middle_of_a_block(region: TestRegion, tmp_path: Path) -> None:
    for size in (4095, 4096, 70_000, 4 * MIB - 1):
        content = os.urandom(size)
        (tmp_path / "odd").write_bytes(content)
        done(ivshmemfs("put", "-f", region.path, tmp_path / "odd", "/odd"))
        done(ivshmemfs("get", "-f", region.path, "/odd", tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_is_said_and_leaves_nothing(region: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(3 * MIB))
    done(ivshmemfs("put", region.path, tmp_path / "big", "/big"))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(small)], check=True)
    try:
        complains(ivshmemfs("get", region.path, "/big", small / "big"), 2, "No space left")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


# --- as cp(1) does --------------------------------------------------------------------------------


def test_arguments_that_were_swapped(region: TestRegion, tmp_path: Path) -> None:
    for content in (b"", b"some text", b"x" * 10_000, bytes(8192)):
        (tmp_path / "f1").write_bytes(content)
        for command, rest in (("put", "/x"), ("get", "x")):
            result = ivshmemfs(command, tmp_path / "f1", region.path, rest)
            complains(result, 32, "f1 is not a region", f"ivshmemfs {command} REGION FILE")
            assert "mkfs" not in result.stderr
    assert (tmp_path / "f1").read_bytes() == bytes(8192)


def test_standard_input_and_output(region: TestRegion) -> None:
    content = os.urandom(3 * MIB + 7)
    command = [sys.executable, "-m", "ivshmemfs.cli"]
    for given in (content, b""):
        for words in (["put", "--force", region.path, "-", "/f"], ["get", region.path, "/f", "-"]):
            ran = subprocess.run(
                [*command, *map(str, words)], input=given, capture_output=True, timeout=60
            )
            assert (ran.returncode, ran.stderr) == (0, b"")
        assert ran.stdout == given
    subprocess.run(
        [*command, "put", "--force", str(region.path), "-", "/f"], input=content, check=True
    )
    words = [*command, "get", region.path, "/f", "-"]
    full = run("sh", "-c", '"$@" >/dev/full', "sh", *words)
    complains(full, 2, "write error: standard output: No space left on device")
    complains(ivshmemfs("put", region.path, "-", "/"), 1, "no name")
    complains(ivshmemfs("get", region.path, "/", "-"), 1, "is a directory")
    assert not Path("-").exists()


def test_what_has_no_size_is_read_to_its_end(region: TestRegion, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    writer = subprocess.Popen(["sh", "-c", f"echo through a fifo > {tmp_path}/fifo"])
    done(ivshmemfs("put", region.path, tmp_path / "fifo", "/proc/version", "/"))
    assert writer.wait(10) == 0
    version = Path("/proc/version").read_bytes()
    assert tree(region.mount(readonly=True)) == {b"fifo": b"through a fifo\n", b"version": version}


def test_an_endless_source_fills_nothing(tmp_path: Path) -> None:
    with new_region(MIB) as made:
        complains(
            ivshmemfs("put", made.path, "/dev/zero", "/zeros"), 2, "/zeros: the region is full"
        )
        fs = made.mount()
        assert tree(fs) == {}
        assert unreachable(fs) == 0
        assert fs.view().root.record.orphans == 0
        fs.unmount()


def test_links_named_alone_are_followed(region: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    done(ivshmemfs("put", region.path, tmp_path / "link", "/"))
    complains(ivshmemfs("put", region.path, tmp_path / "dangling", "/"), 2, "dangling")
    done(ivshmemfs("put", "-r", region.path, tmp_path / "link", "/kept"))
    assert tree(region.mount(readonly=True)) == {b"link": b"content", b"kept": ("->", b"file")}


def test_a_trailing_slash_asks_for_a_directory(region: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "f1").write_text("1")
    (tmp_path / "dir").mkdir()
    complains(
        ivshmemfs("put", region.path, tmp_path / "f1", "/new/"), 1, "/new/ is not a directory"
    )
    done(ivshmemfs("put", "-r", region.path, tmp_path / "dir", "/new/"))
    done(ivshmemfs("put", region.path, tmp_path / "f1", "/new/"))
    complains(
        ivshmemfs("get", region.path, "/new/f1", f"{tmp_path}/back/"), 1, "back/ is not a directory"
    )
    done(ivshmemfs("get", "-r", region.path, "/new", f"{tmp_path}/back/"))
    assert (tmp_path / "back" / "f1").read_text() == "1"


def test_errors_name_what_the_user_named(region: TestRegion, tmp_path: Path) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "a").write_text("a")
    done(ivshmemfs("put", "-r", region.path, tmp_path / "tree", "/"))
    complains(ivshmemfs("put", "-r", region.path, tmp_path / "tree", "/"), 1, "/tree/sub/a exists")
    done(ivshmemfs("put", "-r", "--force", region.path, tmp_path / "tree", "/"))
    result = ivshmemfs("get", region.path, "/tree/sub/a", tmp_path / "none" / "x")
    complains(result, 2, f"{tmp_path}/none: No such file or directory")
    complains(ivshmemfs("put", region.path, tmp_path / "tree/sub/a", "/no/x"), 2, "/no: No such")
    (tmp_path / "sub").write_text("a file where the region has a directory")
    complains(ivshmemfs("put", "-f", region.path, tmp_path / "sub", "/tree"), 2, "/tree/sub: Is a")


def test_hard_links_are_kept(region: TestRegion, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "a").write_text("content")
    (top / "sub" / "b").hardlink_to(top / "a")
    (top / "link").symlink_to("a")
    os.link(top / "link", top / "sub" / "link", follow_symlinks=False)
    for _ in range(2):
        done(ivshmemfs("put", "-r", "--force", region.path, top, "/"))
        done(ivshmemfs("get", "-r", "--force", region.path, "tree", tmp_path / "back"))
        back = tmp_path / "back"
        assert (back / "a").stat().st_ino == (back / "sub" / "b").stat().st_ino
        assert (back / "a").stat().st_nlink == 2
        assert (back / "link").lstat().st_ino == (back / "sub" / "link").lstat().st_ino


def test_local_trees_deeper_than_a_path(region: TestRegion, tmp_path: Path) -> None:
    name, depth = "n" * 100, 100
    (tmp_path / "deep").mkdir()
    fd = os.open(tmp_path / "deep", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("end", os.O_CREAT, dir_fd=fd))
    os.close(fd)
    done(ivshmemfs("put", "-r", region.path, tmp_path / "deep", "/"))
    fs = region.mount(readonly=True)
    ino = fs.lookup(1, b"deep").ino
    for _ in range(depth):
        ino = fs.lookup(ino, name.encode()).ino
    assert fs.lookup(ino, b"end").size == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_whoever_ends_put_finds_nothing_left(
    region: TestRegion, tmp_path: Path, number: int
) -> None:
    fs = region.mount()
    used = fs.view().root.record.used
    command = [sys.executable, "-m", "ivshmemfs.cli", "put", str(region.path), "-", "/file"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdin is not None
        assert running.stderr is not None
        running.stdin.write(bytes(5 * MIB))
        running.stdin.flush()
        assert eventually(lambda: fs.view().root.record.orphans)
        assert tree(fs) == {}
        running.send_signal(number)
        assert running.wait(20) == (8 if number != signal.SIGKILL else -9)
        text = running.stderr.read().decode()
    assert text == ("ivshmemfs: interrupted\n" if number != signal.SIGKILL else "")
    assert tree(fs) == {}

    def given_back() -> bool:
        with suppress(Busy):  # it may have been killed while it held the hint
            fs.tick()
        return fs.view().root.record.used <= used + 1

    if number == signal.SIGKILL:
        assert eventually(given_back)
    assert fs.view().root.record.used <= used + 1
    fs.unmount()


def test_a_copy_under_nohup_goes_on(region: TestRegion) -> None:
    command = f"trap '' HUP; exec {sys.executable} -m ivshmemfs.cli put {region.path} - /file"
    with subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE) as running:
        assert running.stdin is not None
        fs = region.mount()
        running.stdin.write(bytes(5 * MIB))
        running.stdin.flush()
        assert eventually(lambda: fs.view().root.record.orphans)
        running.send_signal(signal.SIGHUP)
        running.stdin.close()
        assert running.wait(20) == 0
    assert fs.lookup(1, b"file").size == 5 * MIB
    fs.unmount()


def test_get_ends_in_order(region: TestRegion, tmp_path: Path) -> None:
    fs = region.mount()
    handle, attr = fs.create(1, b"file", 0o644, os.O_WRONLY, ROOT)
    fs.setattr(attr.ino, ROOT, size=1 << 50)
    command = [sys.executable, "-m", "ivshmemfs.cli", "get", str(region.path), "/file", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert len(running.stdout.read(2 * MIB)) == 2 * MIB
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 8
        assert running.stderr.read() == b"ivshmemfs: interrupted\n"
    fs.release(handle)
    fs.unmount()


@needs_fuse
def test_a_tree_is_not_copied_into_itself(region: TestRegion, tmp_path: Path, place: Path) -> None:
    """Through a mount of the region, a copy would find what it has just made, for ever."""
    done(ivshmemfs("mount", region.path, place))
    (place / "a" / "b").mkdir(parents=True)
    for words in (["put", region.path, place / "a", "/a/b/new"],
                  ["get", region.path, "/a", place / "a" / "b" / "got"]):  # fmt: skip
        result = ivshmemfs(words[0], "-r", *words[1:])
        complains(result, 64, "the copy itself")
    assert [str(path.relative_to(place)) for path in place.glob("a/b/new/**/*")] == ["a/b/new/b"]
    assert sorted(str(path.relative_to(place)) for path in place.glob("a/b/got/**/*")) == [
        "a/b/got/b", "a/b/got/b/new", "a/b/got/b/new/b",
    ]  # fmt: skip


def test_get_gives_no_group_more_than_an_access_list(region: TestRegion, tmp_path: Path) -> None:
    """A copy has no list; the mask in its mode would be the group's."""
    fs = region.mount()
    ino = put(fs, ROOT_INO, b"file", b"content").ino
    entries = [
        *[acl.Entry(acl.USER_OBJ, 6), acl.Entry(acl.USER, 6, 1000), acl.Entry(acl.GROUP_OBJ, 0)],
        *[acl.Entry(acl.MASK, 6), acl.Entry(acl.OTHER, 0)],
    ]
    fs.setxattr(ino, ACCESS_LIST, acl.encode(entries), 0, ROOT)
    assert stat.S_IMODE(fs.getattr(ino).mode) == 0o660
    done(ivshmemfs("get", region.path, "/file", tmp_path / "copy"))
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o600
