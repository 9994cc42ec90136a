"""What the API makes has the mode and the access lists that it would have through a mount."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ivshmemfs
from ivshmemfs import Client
from ivshmemfs.engine import contents
from ivshmemfs.engine.xattr import ACCESS_LIST, DEFAULT_LIST
from tests.support.mounts import needs_fuse, release, run
from tests.support.regions import TestRegion

COMMAND = (sys.executable, "-m", "ivshmemfs.cli")
UMASK = 0o027
NOBODY, NO_ID = 65534, 0xFFFFFFFF
#: Entries of default lists, (tag, permissions, id): one is no more than a mode, one names a user.
LISTS = {
    "open": [(1, 7, NO_ID), (4, 7, NO_ID), (32, 7, NO_ID)],
    "named": [(1, 7, NO_ID), (2, 6, NOBODY), (4, 5, NO_ID), (16, 7, NO_ID), (32, 4, NO_ID)],
}


def _encoded(entries: list[tuple[int, int, int]]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def _lock(fs: Client, path: str) -> None:
    with fs.lock(path):
        pass


#: Each way to make a file.
FILES: dict[str, Callable[[Client, str], object]] = {
    "open": lambda fs, path: fs.open(path, "w").close(),
    "write_bytes": lambda fs, path: fs.write_bytes(path, b"x"),
    "write_bytes, long": lambda fs, path: fs.write_bytes(path, bytes(contents.MOST + 1)),
    "copy_in": lambda fs, path: fs.copy_in("/proc/self/cmdline", path),
    "kv.set": lambda fs, path: fs.kv(os.path.dirname(path)).set(os.path.basename(path), b"x"),
    "kv.set_many": lambda fs, path: fs.kv(os.path.dirname(path)).set_many(
        {os.path.basename(path): b"x"}
    ),
    "lock": _lock,
    "map": lambda fs, path: fs.map(path, create=4096).close(),
    "queue": lambda fs, path: fs.queue(path).close(),
}


def _shown(path: Path) -> tuple[int, dict[bytes, bytes]]:
    names = (ACCESS_LIST, DEFAULT_LIST)
    there = {os.fsencode(name) for name in os.listxattr(path)}
    return os.stat(path).st_mode, {name: os.getxattr(path, name) for name in names if name in there}


@pytest.fixture
def place(made: TestRegion, tmp_path: Path) -> Iterator[Path]:
    """A mount of `made` with a directory without a default list, and one for each of LISTS."""
    path = tmp_path / "mnt"
    path.mkdir()
    mounted = run(*COMMAND, "mount", made.path, path, timeout=60)
    assert (mounted.returncode, mounted.stderr) == (0, "")
    before = os.umask(UMASK)
    try:
        (path / "plain").mkdir()
        for name, entries in LISTS.items():
            (path / name).mkdir()
            os.setxattr(path / name, DEFAULT_LIST, _encoded(entries))
        yield path
    finally:
        os.umask(before)
        run(*COMMAND, "umount", path, timeout=60)
        release(path)


@needs_fuse
@pytest.mark.parametrize("folder", ["plain", *LISTS])
def test_what_is_made_is_as_through_a_mount(place: Path, made: TestRegion, folder: str) -> None:
    (place / folder / "file").touch()
    (place / folder / "directory").mkdir()
    file, directory = _shown(place / folder / "file"), _shown(place / folder / "directory")
    assert (file[0] & 0o777 == 0o666 & ~UMASK) == (folder == "plain")
    with ivshmemfs.open(made.path) as fs:
        fs.mkdir(f"/{folder}/made/below", parents=True)
        assert _shown(place / folder / "made") == directory
        found = {}
        for name, make in FILES.items():
            make(fs, f"/{folder}/{name}")
            found[name] = _shown(place / folder / name)
    assert found == dict.fromkeys(FILES, file)
