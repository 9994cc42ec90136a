"""`ls`, `cat`, `du`, `df`, `mkdir`, `mv`, `rm`: files of a region without a mount."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.engine.xattr import DEFAULT_LIST
from tests.cli.conftest import complains, ivshmemfs
from tests.support.checks import assert_sound, unreachable
from tests.support.damage import Knife
from tests.support.mounts import ENVIRONMENT, needs_fuse
from tests.support.regions import ROOT, TestRegion, new_region, put, tree

MIB = 1 << 20


@pytest.fixture
def region() -> Iterator[TestRegion]:
    with new_region(4 * MIB) as made:
        yield made
        assert_sound(made.region().memory)


@pytest.fixture
def there(region: TestRegion) -> Iterator[Filesystem]:
    """Another peer, with a small tree."""
    fs = region.mount()
    put(fs, ROOT_INO, b"file", b"contents\n")
    inbox = fs.mkdir(ROOT_INO, b"inbox", 0o750, ROOT).ino
    put(fs, inbox, b"a", bytes(10_000))
    put(fs, inbox, b".hidden", b"")
    fs.symlink(inbox, b"link", b"../file", ROOT)
    below = fs.mkdir(inbox, b"below", 0o755, ROOT).ino
    put(fs, below, b"deep", bytes(100_000))
    fs.link(fs.lookup(below, b"deep").ino, inbox, b"again", ROOT)
    yield fs
    fs.unmount()


def shows(*words: object) -> list[str]:
    """The lines that a command prints; it must succeed and complain about nothing."""
    result = ivshmemfs(*words)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def objects(*words: object) -> list[dict[str, object]]:
    return [json.loads(line) for line in shows(*words, "--json")]


# --- several operands ---------------------------------------------------------------------------


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("words", "code", "reason", "shown"),
    [
        (("cat", "none", "file"), 2, "none: No such file or directory", "contents\n"),
        (("cat", "inbox", "file"), 1, "it is a directory, not a file", "contents\n"),
        (("ls", "none", "inbox/below"), 2, "none: No such file or directory", "deep"),
        (("du", "-s", "none", "inbox/below"), 2, "none: No such file or directory", "below"),
        (("mkdir", "inbox", "new"), 2, "inbox: File exists", ""),
        (("rm", "none", "file"), 2, "none: No such file or directory", ""),
        (("rm", "inbox", "file"), 1, "the directory is not empty", ""),
        (("mv", "none", "file", "inbox"), 2, "none: No such file or directory", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_they_go_on_after_an_operand_that_fails(
    region: TestRegion, words: tuple[str, ...], code: int, reason: str, shown: str
) -> None:
    """As those of the same name for local files do; the exit code tells of the failure."""
    command, *rest = words
    here = [word if word.startswith("-") else f"{region.path}:/{word}" for word in rest]
    result = ivshmemfs(command, *here)
    complains(result, code, reason)
    assert shown in result.stdout
    left = shows("ls", f"{region.path}:/")
    assert ("file" in left) == (command not in ("rm", "mv"))
    assert ("new" in left) == (command == "mkdir")


def test_df_shows_the_others(region: TestRegion) -> None:
    result = ivshmemfs("df", "/dev/shm/no-region", region.path)
    complains(result, 32, "no-region: there is no such region")
    assert str(region.path) in result.stdout
    assert ivshmemfs("df", "/dev/shm/no-region").stdout == ""


def test_the_largest_exit_code_tells_of_all(region: TestRegion) -> None:
    result = ivshmemfs("cat", "/dev/shm/no-region:/file", f"{region.path}:/none")
    assert (result.returncode, result.stderr.count("\n")) == (32, 2)


# --- ls -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("there")
def test_ls_lists_names_in_order(region: TestRegion) -> None:
    assert shows("ls", f"{region.path}:/") == ["file", "inbox"]
    assert shows("ls", f"{region.path}:/inbox/") == [".hidden", "a", "again", "below", "link"]
    assert shows("ls", f"{region.path}:/file") == [f"{region.path}:/file"]
    assert shows("ls", f"{region.path}:/inbox/below", f"{region.path}:/") == [
        f"{region.path}:/inbox/below:", "deep", "", f"{region.path}:/:", "file", "inbox",
    ]  # fmt: skip


@pytest.mark.usefixtures("there")
def test_ls_of_a_tree(region: TestRegion) -> None:
    top = f"{region.path}:/inbox"
    assert shows("ls", "-R", top) == [
        f"{top}:", ".hidden", "a", "again", "below", "link", "", f"{top}/below:", "deep",
    ]  # fmt: skip


def test_ls_shows_attributes(region: TestRegion, there: Filesystem) -> None:
    there.mknod(ROOT_INO, b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3), ROOT)
    lines = shows("ls", "-l", f"{region.path}:/inbox")
    assert lines[1].split()[:5] == ["-rw-r--r--", "1", "0", "0", "10000"]
    assert lines[2].split()[:2] == ["-rw-r--r--", "2"]
    assert lines[3].startswith("drwxr-xr-x")
    assert lines[4].endswith("link -> ../file")
    assert "1, 3" in shows("ls", "-l", f"{region.path}:/")[-1]


def test_ls_as_json(region: TestRegion, there: Filesystem) -> None:
    top = f"{region.path}:/inbox"
    found = {str(one["path"]): one for one in objects("ls", "-R", top)}
    assert set(found) == {
        f"{top}/{name}" for name in (".hidden", "a", "again", "below", "link", "below/deep")
    }
    assert found[f"{top}/link"]["target"] == "../file"
    assert found[f"{top}/a"]["size"] == 10_000
    assert found[f"{top}/a"]["mode"] == "0644"
    assert found[f"{top}/below"]["type"] == "directory"
    assert found[f"{top}/again"]["inode"] == found[f"{top}/below/deep"]["inode"]
    assert there.getattr(ROOT_INO).nlink == 3


def test_names_cannot_drive_a_terminal(region: TestRegion, there: Filesystem) -> None:
    put(there, ROOT_INO, b"\x1b[2J\n\xff", b"")
    assert "\\x1b[2J\\n\\xff" in shows("ls", f"{region.path}:/")
    names = [str(one["path"]).rpartition("/")[2] for one in objects("ls", f"{region.path}:/")]
    assert os.fsencode(sorted(names)[0]) == b"\x1b[2J\n\xff"


# --- cat ----------------------------------------------------------------------------------------


def test_cat_prints_bytes(region: TestRegion, there: Filesystem) -> None:
    content = os.urandom(2 * MIB + 17)
    put(there, ROOT_INO, b"large", content)
    name = f"{region.path}:/large"
    assert _raw("cat", name, f"{region.path}:/file") == content + b"contents\n"


def _raw(*words: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "ivshmemfs.cli", *words], env=ENVIRONMENT, capture_output=True,
        check=True, timeout=60,
    )  # fmt: skip
    return done.stdout


@pytest.mark.usefixtures("there")
def test_what_cat_refuses(region: TestRegion) -> None:
    complains(ivshmemfs("cat", f"{region.path}:/inbox"), 1, "it is a directory, not a file")
    complains(ivshmemfs("cat", f"{region.path}:/inbox/link"), 1, "it is a symlink")
    complains(ivshmemfs("cat", f"{region.path}:/none"), 2, f"{region.path}:/none", "No such file")
    complains(ivshmemfs("cat", f"{region.path}:/file/x"), 2, "Not a directory")


# --- du and df ----------------------------------------------------------------------------------


def test_du_counts_each_inode_once(region: TestRegion, there: Filesystem) -> None:
    top = f"{region.path}:/inbox"
    sizes = {str(one["path"]): int(str(one["allocated"])) for one in objects("du", top)}
    assert list(sizes) == [f"{top}/below", top]
    inbox = there.lookup(ROOT_INO, b"inbox")
    below = there.lookup(inbox.ino, b"below")
    names = (b"a", b".hidden", b"link", b"again")
    blocks = sum(there.lookup(inbox.ino, name).blocks for name in names)
    assert sizes[top] == (inbox.blocks + below.blocks + blocks) * 512
    assert sizes[f"{top}/below"] == (below.blocks + there.lookup(inbox.ino, b"again").blocks) * 512
    lines = shows("du", "-s", top, f"{region.path}:/file")
    assert [line.split()[-1] for line in lines] == [top, f"{region.path}:/file"]
    assert "KiB" in lines[0]


def test_df(region: TestRegion, there: Filesystem) -> None:
    stats = there.statfs()
    (found,) = objects("df", region.path)
    assert found["region"] == str(region.path)
    assert found["size"] == stats.blocks * stats.block_size
    assert found["available"] == stats.blocks_avail * stats.block_size
    assert found["inodes"] == stats.files - stats.files_free
    lines = shows("df", f"{region.path}:/inbox", region.path)
    assert lines[0].split() == ["REGION", "SIZE", "USED", "AVAILABLE", "USE", "INODES"]
    assert len(lines) == 3
    assert lines[1] == lines[2]


# --- mkdir --------------------------------------------------------------------------------------


def test_mkdir(region: TestRegion, there: Filesystem) -> None:
    shows("mkdir", f"{region.path}:/one", f"{region.path}:/inbox/two/")
    assert stat.S_ISDIR(there.lookup(ROOT_INO, b"one").mode)
    complains(ivshmemfs("mkdir", f"{region.path}:/one"), 2, f"{region.path}:/one", "File exists")
    complains(ivshmemfs("mkdir", f"{region.path}:/x/y"), 2, "No such file")
    complains(ivshmemfs("mkdir", f"{region.path}:/"), 1, "the root directory")
    shows("mkdir", "-p", f"{region.path}:/x/y/z")
    shows("mkdir", "-p", f"{region.path}:/x/y/z")
    complains(ivshmemfs("mkdir", "-p", f"{region.path}:/file"), 2, "File exists")
    complains(ivshmemfs("mkdir", "-p", f"{region.path}:/file/x"), 2, "Not a directory")
    complains(ivshmemfs("mkdir", "-m", "9", f"{region.path}:/m"), 1, "octal")


def test_modes_of_directories(region: TestRegion, there: Filesystem) -> None:
    before = os.umask(0o027)
    try:
        shows("mkdir", f"{region.path}:/masked")
        shows("mkdir", "-m", "1777", f"{region.path}:/open")
        there.setxattr(ROOT_INO, DEFAULT_LIST, _list_for_all(), 0, ROOT)
        shows("mkdir", f"{region.path}:/listed")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE(there.lookup(ROOT_INO, name).mode)
             for name in (b"masked", b"open", b"listed")}  # fmt: skip
    assert modes == {b"masked": 0o750, b"open": 0o1777, b"listed": 0o777}


def _list_for_all() -> bytes:
    """A default access list that permits everything to all."""
    entries = [(tag, 7, 0xFFFFFFFF) for tag in (1, 4, 32)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


# --- mv -----------------------------------------------------------------------------------------


def test_mv_never_overwrites_without_force(region: TestRegion, there: Filesystem) -> None:
    put(there, ROOT_INO, b"new", b"new")
    old, new = f"{region.path}:/file", f"{region.path}:/new"
    complains(ivshmemfs("mv", new, old), 1, "exists", "--force")
    assert tree(there)[b"file"] == b"contents\n"
    shows("mv", "--force", new, old)
    assert tree(there)[b"file"] == b"new"
    assert b"new" not in tree(there)
    shows("mv", old, new)
    assert tree(there)[b"new"] == b"new"


def test_mv_into_a_directory(region: TestRegion, there: Filesystem) -> None:
    put(there, ROOT_INO, b"b", b"b")
    shows("mv", f"{region.path}:/file", f"{region.path}:/b", f"{region.path}:/inbox")
    inbox = there.lookup(ROOT_INO, b"inbox").ino
    assert stat.S_ISREG(there.lookup(inbox, b"file").mode)
    assert b"b" not in tree(there)
    put(there, ROOT_INO, b"b", b"another")
    complains(ivshmemfs("mv", f"{region.path}:/b", f"{region.path}:/inbox"), 1, "inbox/b exists")
    shows("mv", f"{region.path}:/inbox", f"{region.path}:/renamed")
    assert b"renamed" in tree(there)


@pytest.mark.usefixtures("there")
def test_what_mv_refuses(region: TestRegion) -> None:
    name = f"{region.path}:"
    complains(ivshmemfs("mv", f"{name}/none", f"{name}/x"), 2, "none", "No such file")
    complains(ivshmemfs("mv", f"{name}/file", f"{name}/none/x"), 2, "No such file")
    complains(ivshmemfs("mv", f"{name}/inbox", f"{name}/inbox/below"), 2, "Invalid argument")
    complains(ivshmemfs("mv", f"{name}/file", f"{name}/none/"), 1, "none/ is not a directory")
    complains(ivshmemfs("mv", f"{name}/file", f"{name}/inbox/a", f"{name}/x"), 1, "directory")
    complains(ivshmemfs("mv", f"{name}/", f"{name}/inbox"), 1, "the root directory")
    with new_region() as other:
        result = ivshmemfs("mv", f"{name}/file", f"{other.path}:/file")
        complains(result, 1, "are not in one region", "ivshmemfs get")


# --- rm -----------------------------------------------------------------------------------------


def test_rm_of_a_directory_needs_recursive(region: TestRegion, there: Filesystem) -> None:
    name = f"{region.path}:"
    complains(ivshmemfs("rm", f"{name}/inbox"), 1, "is not empty", "--recursive")
    assert set(tree(there)) == {b"file", b"inbox"}
    shows("rm", f"{name}/file", f"{name}/inbox/link")
    there.mkdir(ROOT_INO, b"empty", 0o755, ROOT)
    shows("rm", f"{name}/empty")
    shows("rm", "-r", f"{name}/inbox")
    assert tree(there) == {}
    there.reap()
    assert unreachable(there) == 0


@pytest.mark.usefixtures("there")
def test_what_rm_refuses(region: TestRegion) -> None:
    name = f"{region.path}:"
    complains(ivshmemfs("rm", f"{name}/none"), 2, f"{name}/none", "No such file")
    shows("rm", "-f", f"{name}/none", f"{name}/none/below")
    complains(ivshmemfs("rm", "-r", f"{name}/"), 1, "the root directory")
    complains(ivshmemfs("rm", "/none/such:/x"), 32, "there is no such region")
    complains(ivshmemfs("rm", "/etc/hostname"), 1, "is not on an ivshmemfs mount")


def test_a_file_that_is_open_elsewhere_stays_readable(
    region: TestRegion, there: Filesystem
) -> None:
    ino = there.lookup(ROOT_INO, b"file").ino
    handle = there.open(ino, os.O_RDONLY, ROOT)
    shows("rm", f"{region.path}:/file")
    assert bytes(there.read(handle, 0, 100)) == b"contents\n"
    there.release(handle)


# --- both ways to name a path -------------------------------------------------------------------


@needs_fuse
def test_paths_on_a_mount(region: TestRegion, place: Path) -> None:
    assert ivshmemfs("mount", region.path, place).returncode == 0
    shows("mkdir", place / "made")
    (place / "made" / "file").write_text("through the mount")
    assert _raw("cat", str(place / "made" / "file")) == b"through the mount"
    assert shows("ls", place) == ["made"]
    shows("mv", place / "made" / "file", f"{region.path}:/moved")
    assert (place / "moved").read_text() == "through the mount"
    assert objects("df", place) == objects("df", place / "made") == objects("df", region.path)
    shows("rm", "-r", place / "made", place / "moved")
    assert os.listdir(place) == []


def test_looking_stores_nothing(region: TestRegion, there: Filesystem) -> None:
    there.unmount()
    region.path.chmod(0o400)
    before = region.path.read_bytes()
    name = f"{region.path}:/"
    for words in (["ls", "-lR", name], ["du", name], ["df", region.path], ["cat", f"{name}file"]):
        shows(*words)
    assert region.path.read_bytes() == before


# --- regions that a hostile machine wrote -------------------------------------------------------


@pytest.fixture
def damaged() -> Iterator[TestRegion]:
    with new_region(4 * MIB) as made:
        yield made


@pytest.mark.parametrize("words", [["ls", "-R"], ["ls", "-R", "--json"], ["du"], ["rm", "-r"]])
def test_rings_end(damaged: TestRegion, words: list[str]) -> None:
    fs = damaged.mount()
    top = fs.mkdir(ROOT_INO, b"top", 0o755, ROOT).ino
    below = fs.mkdir(top, b"below", 0o755, ROOT).ino
    fs.mkdir(below, b"up", 0o755, ROOT)
    fs.unmount()
    Knife(damaged.region().memory).set_names(below, [(b"up", top)])
    result = ivshmemfs(*words, f"{damaged.path}:/top")
    assert result.returncode == 2, result.stdout
    assert "met before" in result.stderr
    assert "/top/below/up" in result.stderr


@pytest.mark.parametrize("command", ["ls", "du", "rm"])
def test_a_name_twice_is_told(damaged: TestRegion, command: str) -> None:
    fs = damaged.mount()
    top = fs.mkdir(ROOT_INO, b"top", 0o755, ROOT).ino
    ino = put(fs, top, b"x", b"x").ino
    fs.unmount()
    Knife(damaged.region().memory).set_names(top, [(b"x", ino), (b"x", ino)])
    options = ["-r"] if command == "rm" else []
    complains(ivshmemfs(command, *options, f"{damaged.path}:/top"), 2, "/top", "twice")


def test_deep_trees(damaged: TestRegion) -> None:
    """Deeper than a path can be long, and than functions may call each other."""
    fs, ino = damaged.mount(), ROOT_INO
    for _ in range(1_200):
        ino = fs.mkdir(ino, b"n" * 20, 0o755, ROOT).ino
    name = f"{damaged.path}:/{'n' * 20}"
    lines = shows("du", name)
    assert len(lines) == 1_200
    shows("rm", "-r", name)
    assert tree(fs) == {}
    fs.unmount()
