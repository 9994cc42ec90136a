"""`get` of regions that a hostile machine wrote: nothing outside of DEST changes, and it ends."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from ivshmemfs.cli.exits import EXIT_PARTLY
from ivshmemfs.cli.main import main
from ivshmemfs.cli.transfer.get import Getter, Wishes
from ivshmemfs.cli.transfer.local import Folder
from ivshmemfs.cli.transfer.meter import Meter
from ivshmemfs.engine import Filesystem
from tests.support.damage import Knife, Names, sample
from tests.support.regions import ROOT, TestRegion, new_region, put
from tests.support.wounds import ladder

Snapshot = dict[str, tuple[int, ...]]
ESC = b"\x1b[2Jname\n\x9b\xe2\x80\xae"


class Result(NamedTuple):
    code: int
    lines: list[str]  # of standard error


Get = Callable[..., Result]


@pytest.fixture
def region() -> Iterator[TestRegion]:
    with new_region(4 << 20) as made:
        yield made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """DEST, beside things that must not change."""
    for name in ("victim", "victim/inner", "dest"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "victim" / "secret").write_text("precious")
    return tmp_path / "dest"


@pytest.fixture
def get(region: TestRegion, place: Path, capfd: pytest.CaptureFixture[str]) -> Get:
    """Runs `get -r` of names in the region's root into DEST; all that it prints is harmless."""

    def run(*names: str, options: tuple[str, ...] = ()) -> Result:
        with pytest.raises(SystemExit) as ended:
            main(["get", "-r", *options, str(region.path), *names, str(place)], "ivshmemfs")
        out, err = capfd.readouterr()
        assert out == ""
        assert all(line.isprintable() for line in err.split("\n")), repr(err)
        assert "internal error" not in err
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, err.splitlines())

    return run


def outside(place: Path) -> Snapshot:
    """All that is beside DEST, with every change that can be seen."""
    found: Snapshot = {}
    for path in sorted(place.parent.rglob("*")):
        if path != place and place not in path.parents:
            status = path.lstat()
            mine = (status.st_ino, status.st_mode, status.st_size, status.st_nlink)
            found[str(path)] = (*mine, status.st_mtime_ns, status.st_ctime_ns)
    return found


def folder_with(region: TestRegion, *names: str) -> tuple[int, dict[str, int]]:
    """A directory `top` in the region with a file, a link, a directory ...; inodes by kind."""
    fs = region.mount()
    top = fs.mkdir(1, b"top", 0o755, ROOT).ino
    made = {"file": put(fs, top, b"file", b"from the region").ino}
    made["dir"] = fs.mkdir(top, b"dir", 0o755, ROOT).ino
    put(fs, made["dir"], b"planted", b"from the region")
    made["sub"] = fs.mkdir(made["dir"], b"sub", 0o755, ROOT).ino
    made["link"] = fs.symlink(top, b"link", os.fsencode("../../victim"), ROOT).ino
    fs.unmount()
    return top, made


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "dir", "link"])
@pytest.mark.parametrize("name", [b"../x", b"../victim", b"a/b", b".", b"..", b"x\0", b"ABSOLUTE"])
def test_names_that_lead_elsewhere(
    region: TestRegion, place: Path, get: Get, name: bytes, kind: str
) -> None:
    if name == b"ABSOLUTE":
        name = os.fsencode(place.parent / "absolute")
    top, made = folder_with(region)
    Knife(region.region().memory).set_names(top, [(name, made[kind])])
    before = outside(place)
    result = get("top", options=("--force",))
    assert outside(place) == before
    assert result.code == 2
    assert "cannot be a name" in result.lines[-1]
    assert list((place / "top").iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("order", [("link", "dir"), ("dir", "link"), ("file", "file")])
def test_one_name_twice(
    region: TestRegion, place: Path, get: Get, order: tuple[str, str], force: bool
) -> None:
    top, made = folder_with(region)
    Knife(region.region().memory).set_names(top, [(b"x", made[kind]) for kind in order])
    before = outside(place)
    result = get("top", options=("--force",) if force else ())
    assert outside(place) == before
    assert result.code == 2
    assert "twice" in result.lines[-1]
    assert "top/x" in result.lines[-1]


@pytest.mark.parametrize("options", [(), ("--force",), ("--force", "--preserve-special")])
def test_a_link_that_became_a_directory(
    region: TestRegion, place: Path, get: Get, options: tuple[str, ...]
) -> None:
    """The second of two copies does not write through what the first one has made."""
    fs = region.mount()
    top = fs.mkdir(1, b"top", 0o755, ROOT).ino
    fs.symlink(top, b"x", os.fsencode(place.parent / "victim"), ROOT)
    assert get("top") == (0, [])
    fs.unlink(top, b"x", ROOT)
    inside = fs.mkdir(top, b"x", 0o777, ROOT).ino
    put(fs, inside, b"secret", b"from the region")
    put(fs, fs.mkdir(inside, b"inner", 0o777, ROOT).ino, b"planted", b"from the region")
    before = outside(place)
    result = get("top", options=options)
    assert outside(place) == before
    assert result.code == 1
    assert "top/x exists and is not a directory" in result.lines[-1]
    assert os.readlink(place / "top" / "x") == str(place.parent / "victim")
    fs.unmount()


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_a_directory_that_became_a_link(
    region: TestRegion, place: Path, get: Get, options: tuple[str, ...]
) -> None:
    fs = region.mount()
    top = fs.mkdir(1, b"top", 0o755, ROOT).ino
    put(fs, fs.mkdir(top, b"x", 0o755, ROOT).ino, b"kept", b"kept")
    assert get("top") == (0, [])
    fs.unlink(fs.lookup(top, b"x").ino, b"kept", ROOT)
    fs.rmdir(top, b"x", ROOT)
    fs.symlink(top, b"x", os.fsencode(place.parent / "victim"), ROOT)
    before = outside(place)
    result = get("top", options=options)
    assert outside(place) == before
    assert result.code in (1, 2)
    assert (place / "top" / "x" / "kept").read_bytes() == b"kept"
    fs.unmount()


def test_links_in_the_way_are_replaced_and_not_followed(
    region: TestRegion, place: Path, get: Get
) -> None:
    _top, made = folder_with(region)
    assert made
    (place / "top").mkdir()
    (place / "top" / "file").symlink_to(place.parent / "file")
    before = outside(place)
    result = get("top")
    assert (result.code, outside(place)) == (1, before)
    assert "exists" in result.lines[-1]
    assert get("top", options=("--force",)).code == 0
    assert outside(place) == before
    assert (place / "top" / "file").read_bytes() == b"from the region"
    assert not (place / "top" / "file").is_symlink()


# --- kinds and permissions ------------------------------------------------------------------


def test_devices_and_privileges_are_left_out(region: TestRegion, place: Path, get: Get) -> None:
    fs = region.mount()
    top = fs.mkdir(1, b"top", 0o7755, ROOT).ino
    fs.setattr(top, ROOT, mode=0o7755)
    put(fs, top, b"program", b"#!/bin/sh\n")
    fs.setattr(fs.lookup(top, b"program").ino, ROOT, mode=0o7755)
    for name, kind in ((b"null", stat.S_IFCHR), (b"disk", stat.S_IFBLK), (ESC, stat.S_IFIFO)):
        fs.mknod(top, name, kind | 0o666, 0x103 if kind != stat.S_IFIFO else 0, ROOT)
    fs.mknod(top, b"socket", stat.S_IFSOCK | 0o640, 0, ROOT)
    fs.unmount()
    result = get("top")
    assert result.code == EXIT_PARTLY
    assert len(result.lines) == 6
    assert all("left out" in line for line in result.lines)
    assert sum("--devices" in line for line in result.lines) == 4
    assert f"{place}/top/program: left out: bits 7000 (--preserve-special" in "".join(result.lines)
    assert f"{place}/top: left out: bits 6000 (--preserve-special" in result.lines[-1]
    assert os.listdir(place / "top") == ["program"]
    assert stat.S_IMODE((place / "top" / "program").stat().st_mode) == 0o755
    assert stat.S_IMODE((place / "top").stat().st_mode) == 0o1755

    if os.geteuid() == 0:
        assert get("top", options=("--force", "--devices", "--preserve-special")) == (0, [])
        assert len(os.listdir(place / "top")) == 5
        assert (place / "top" / "null").stat().st_rdev == 0x103
        assert stat.S_IMODE((place / "top" / "socket").lstat().st_mode) == 0o640
        assert stat.S_IMODE((place / "top" / "program").stat().st_mode) == 0o7755
        assert stat.S_IMODE((place / "top").stat().st_mode) == 0o7755


@pytest.mark.parametrize("target", [b"/etc/passwd", b"../../victim", ESC])
def test_link_targets_are_copied_as_they_are(
    region: TestRegion, place: Path, get: Get, target: bytes
) -> None:
    fs = region.mount()
    fs.symlink(1, b"link", target, ROOT)
    fs.unmount()
    before = outside(place)
    assert get("link") == (0, [])
    assert os.fsencode(os.readlink(place / "link")) == target
    assert outside(place) == before


def test_absurd_owners_and_times(region: TestRegion, place: Path, get: Get) -> None:
    top, made = folder_with(region)
    knife = Knife(region.region().memory)
    absurd = {"uid": (1 << 32) - 1, "gid": (1 << 32) - 2, "mtime_ns": -(1 << 63)}
    for ino in (top, *made.values()):
        knife.edit_inode(ino, **absurd)
    assert get("top").code == 0
    assert (place / "top" / "file").read_bytes() == b"from the region"


# --- trees that do not end ------------------------------------------------------------------


def test_rings(region: TestRegion, place: Path, get: Get) -> None:
    top, made = folder_with(region)
    knife = Knife(region.region().memory)
    knife.set_names(made["sub"], [(b"up", top), (b"self", made["sub"]), (b"root", 1)])
    result = get("top")
    assert result.code == EXIT_PARTLY
    assert sum("met before" in line for line in result.lines) == 3
    assert sorted(os.listdir(place / "top/dir/sub")) == ["root"]
    assert os.listdir(place / "top/dir/sub/root") == []


def test_a_tree_that_doubles_at_every_level(region: TestRegion, place: Path, get: Get) -> None:
    fs, inos = region.mount(), [1]
    for _ in range(41):
        inos.append(fs.mkdir(inos[-1], b"a", 0o755, ROOT).ino)
    fs.unmount()
    knife = Knife(region.region().memory)
    for above, below in pairwise(inos[1:]):
        knife.set_names(above, [(b"a", below), (b"b", below)])
    result = get("a")
    assert result.code == EXIT_PARTLY
    assert len(result.lines) == 40
    assert sum(1 for _ in place.rglob("*")) == 41


def test_many_names_for_one_file_that_says_it_has_one(
    region: TestRegion, place: Path, get: Get
) -> None:
    top, made = folder_with(region)
    names = [(b"name %d" % at, made["file"]) for at in range(30)]
    Knife(region.region().memory).set_names(top, names)
    result = get("top")
    assert result.code == EXIT_PARTLY
    assert len(os.listdir(place / "top")) == 1


def test_deep_trees_arrive(region: TestRegion, place: Path, get: Get) -> None:
    """Deeper than a path can be long, and than functions may call each other."""
    fs, ino = region.mount(), 1
    name = b"n" * 20
    for _ in range(400):
        ino = fs.mkdir(ino, name, 0o755, ROOT).ino
    put(fs, ino, b"end", b"reached")
    fs.unmount()
    assert get("n" * 20) == (0, [])
    fd = os.open(place, os.O_RDONLY)
    for _ in range(400):
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    end = os.open("end", os.O_RDONLY, dir_fd=fd)
    assert os.read(end, 10) == b"reached"
    os.close(end)
    os.close(fd)


# --- contents -------------------------------------------------------------------------------


class Watched:
    """A mount with something before each call of one of its methods."""

    def __init__(self, fs: Filesystem, method: str, before: Callable[[], object]) -> None:
        self._fs, self._method, self._before = fs, method, before

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            self._before()
        return getattr(self._fs, name)


def copied(fs: Filesystem | Watched, place: Path, name: bytes) -> Path:
    """Copy one file within this process."""
    wishes = Wishes(recursive=False, force=True, devices=False, special=False)
    with Folder(bytes(place)) as folder:
        getter = Getter(cast("Filesystem", fs), Meter(quiet=True), wishes)
        getter.copy(fs.lookup(1, name), folder, b"copy")
    return place / "copy"


@pytest.mark.parametrize("size", [64 << 30, 1 << 40])
def test_holes_are_skipped(region: TestRegion, place: Path, size: int) -> None:
    fs = region.mount()
    handle, attr = fs.create(1, b"sparse", 0o644, os.O_WRONLY, ROOT)
    for at in (size // 3, size - 5000):
        fs.write(handle, at, b"x" * 5000)
    fs.setattr(attr.ino, ROOT, size=size + 4096)
    fs.release(handle)
    pieces: list[int] = []
    copy = copied(Watched(fs, "read", lambda: pieces.append(1)), place, b"sparse")
    assert len(pieces) <= 4
    assert copy.stat().st_size == size + 4096
    assert copy.stat().st_blocks * 512 < 1 << 20
    with copy.open("rb") as file:
        file.seek(size - 5000)
        assert file.read() == b"x" * 5000 + bytes(4096)
    fs.unmount()


def test_what_is_appended_meanwhile_is_no_hole(region: TestRegion, place: Path) -> None:
    fs = region.mount()
    put(fs, 1, b"log", b"1" * 10_000)
    fs.setattr(fs.lookup(1, b"log").ino, ROOT, size=1 << 20)
    handle = fs.open(fs.lookup(1, b"log").ino, os.O_WRONLY, ROOT)
    left = [5]

    def appended() -> None:
        """Something is appended just before each of some looks."""
        if left[0]:
            left[0] -= 1
            fs.write(handle, 0, b"2" * 10_000, append=True)

    content = copied(Watched(fs, "seek", appended), place, b"log").read_bytes()
    hole = bytes((1 << 20) - 10_000)
    assert content == b"1" * 10_000 + hole + b"2" * (len(content) - (1 << 20))
    assert len(content) > 1 << 20
    assert left == [0]
    fs.unmount()


def test_every_block_of_a_sparse_file_arrives(region: TestRegion, place: Path) -> None:
    """Data, holes and zeros in every order, and an end in the middle of a block."""
    fs = region.mount()
    for seed, end in enumerate((1, 4095, 4096, 8191, 70_000, 1 << 20, (2 << 20) + 77)):
        chance, expected = random.Random(seed), bytearray(end)
        handle, attr = fs.create(1, b"sparse%d" % seed, 0o644, os.O_WRONLY, ROOT)
        fs.setattr(attr.ino, ROOT, size=end)
        for _ in range(6):
            at = chance.randrange(end)
            data = chance.choice([bytes(9000), chance.randbytes(9000), b"\0" * 4096 + b"x"])
            data = data[: end - at]
            fs.write(handle, at, data)
            expected[at : at + len(data)] = data
        fs.release(handle)
        assert copied(fs, place, b"sparse%d" % seed).read_bytes() == expected
    fs.unmount()


@pytest.mark.parametrize("size", [1 << 40, (1 << 62) - 1])
def test_sizes_that_cannot_be(place: Path, capfd: pytest.CaptureFixture[str], size: int) -> None:
    """A hole of any size is one, or too large for the disk; it takes no memory."""
    with new_region() as made:
        fs = made.mount()
        put(fs, 1, b"file", b"x" * 10_000)
        fs.setattr(fs.lookup(1, b"file").ino, ROOT, size=size)
        fs.unmount()
        with pytest.raises(SystemExit) as ended:
            main(["get", str(made.path), "file", str(place / "copy")], "ivshmemfs")
    assert ended.value.code in (0, 2)
    if ended.value.code:
        assert "too large" in capfd.readouterr().err
        assert list(place.iterdir()) == []


def test_data_that_does_not_end(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A few blocks that lead to each other claim to be 2^62 bytes of data."""
    with new_region(len(sample())) as made:
        memory = made.region().memory
        memory.write(0, sample())
        knife = Knife(memory)
        ladder(knife, Names.big, 12)
        knife.edit_inode(Names.big, size=(1 << 62) - 1)
        with pytest.raises(SystemExit) as ended:
            main(["get", str(made.path), "folder/big", str(place / "copy")], "ivshmemfs")
    assert ended.value.code == 2
    assert "more data than the region can hold" in capfd.readouterr().err
    assert list(place.iterdir()) == []


def test_hard_links_are_kept(region: TestRegion, place: Path, get: Get) -> None:
    fs = region.mount()
    top = fs.mkdir(1, b"top", 0o755, ROOT).ino
    below = fs.mkdir(top, b"below", 0o755, ROOT).ino
    file = put(fs, top, b"file", b"content").ino
    link = fs.symlink(below, b"link", b"target", ROOT).ino
    for parent, name, ino in ((below, b"file2", file), (1, b"file3", file), (top, b"l2", link)):
        fs.link(ino, parent, name, ROOT)
    fs.unmount()
    for options in ((), ("--force",)):
        assert get("top", "file3", options=options) == (0, [])
        same = [place / name for name in ("top/file", "top/below/file2", "file3")]
        assert len({path.stat().st_ino for path in same}) == 1
        assert same[0].stat().st_nlink == 3
        assert (place / "top/below/link").lstat().st_ino == (place / "top/l2").lstat().st_ino
        assert not list(place.rglob(".ivshmemfs*"))
