"""One-operation workloads, all on the same small world.

`prepare` runs before anything can happen to the victim; `act` is the operation that is stopped.
Both are given the victim, another peer of the region, and a place for handles.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from ivshmemfs.engine import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    ROOT_INO,
    Context,
    Filesystem,
    Handle,
    acl,
    contents,
    fixed,
    names,
)
from ivshmemfs.engine.lock_table import Lock
from ivshmemfs.engine.locks import QUEUE_AFTER, Guard, Wait
from ivshmemfs.engine.transaction import Transaction
from ivshmemfs.engine.xattr import ACCESS_LIST, DEFAULT_LIST
from ivshmemfs.errors import FsError
from ivshmemfs.format.lock import END, FCNTL, READ, WRITE
from tests.support.laboratory import Death, Laboratory, Peer
from tests.support.regions import ROOT, put

USER = Context(1000, 100)
SIZE = 448 << 10
PLAN = {"block_size": 1024, "peer_count": 6}


@dataclass
class Scene:
    """The peers and handles of one case."""

    laboratory: Laboratory
    victim: Peer
    other: Peer
    handles: dict[str, Handle] = field(default_factory=dict)


Step = Callable[[Scene], object]


@dataclass(frozen=True)
class Workload:
    """One operation."""

    name: str
    act: Step
    prepare: Step
    mounted: bool = True  # whether the victim mounts before `act`
    plain: bool = False  # whether it can be paired with any other plain one


WORKLOADS: dict[str, Workload] = {}


def nothing(scene: Scene) -> None:
    """No preparation."""


def workload(name: str, act: Callable[[Filesystem], object], prepare: Step = nothing) -> None:
    """Register an operation of the victim's mount."""
    step = lambda scene: scene.victim.run(act)  # noqa: E731
    WORKLOADS[name] = Workload(name, step, prepare, plain=prepare is nothing)


def handle_workload(
    name: str, path: bytes, flags: int, act: Callable[[Filesystem, Handle], object]
) -> None:
    """Register an operation on a file that the victim has open."""

    def prepare(scene: Scene) -> None:
        scene.handles[name] = scene.victim.run(lambda fs: fs.open(ino(fs, path), flags, ROOT))

    def step(scene: Scene) -> object:
        return scene.victim.run(lambda fs: act(fs, scene.handles[name]))

    WORKLOADS[name] = Workload(name, step, prepare, plain=True)


INOS: dict[bytes, int] = {}  # by path in the world, which is the same every time


def ino(fs: Filesystem, path: bytes) -> int:
    """The inode that was at a path when the world was made.

    A kernel looks names up beforehand, too, and asks for operations by inode number.
    """
    return INOS[path]


def _note_inos(fs: Filesystem, folder: int, prefix: bytes) -> None:
    for name, attr, _ in fs.readdir(fs.opendir(folder), 0):
        if name not in (b".", b".."):
            INOS[prefix + name] = attr.ino
            if stat.S_ISDIR(attr.mode):
                _note_inos(fs, attr.ino, prefix + name + b"/")


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes in which no two blocks are equal."""
    return b"".join(b"%08x" % (seed << 20 | n) for n in range(-(-length // 8)))[:length]


def build_world(fs: Filesystem) -> None:
    """What every workload finds."""
    put(fs, ROOT_INO, b"a", pattern(300))
    put(fs, ROOT_INO, b"b", pattern(3500, 2))
    put(fs, ROOT_INO, b"c", pattern(70 * 1024 + 100, 3))
    put(fs, ROOT_INO, b"q", pattern(9000, 4))
    fs.mkdir(ROOT_INO, b"d", 0o755, ROOT)
    e = fs.mkdir(ROOT_INO, b"e", 0o755, ROOT).ino
    for n in range(3):
        put(fs, e, b"e%d" % n, pattern(50 * n, 10 + n))
    fs.mkdir(e, b"sub", 0o755, ROOT)
    t = fs.mkdir(ROOT_INO, b"t", 0o755, ROOT).ino
    for n in range(64):
        fs.mknod(t, b"name-%016d" % n, stat.S_IFREG | 0o600, 0, ROOT)
    brim = fs.mkdir(ROOT_INO, b"brim", 0o755, ROOT).ino  # full to the brim, still in its inode
    for n in range(8):
        fs.mknod(brim, b"%080d" % n, stat.S_IFREG | 0o600, 0, ROOT)
    over = fs.mkdir(ROOT_INO, b"over", 0o755, ROOT).ino  # just a tree; shrinks back into its inode
    for n in range(4):
        fs.mknod(over, b"%0250d" % n, stat.S_IFREG | 0o600, 0, ROOT)
    for n in range(3):
        fs.unlink(over, b"%0250d" % n, ROOT)
        fs.mknod(over, b"%0100d" % n, stat.S_IFREG | 0o600, 0, ROOT)
    fs.symlink(ROOT_INO, b"l", b"e/e1", ROOT)
    fs.symlink(ROOT_INO, b"long", pattern(1500, 5), ROOT)
    x = put(fs, ROOT_INO, b"x", pattern(100, 6)).ino
    fs.setxattr(x, b"user.one", b"1" * 40, 0, ROOT)
    y = put(fs, ROOT_INO, b"y", pattern(2000, 7)).ino
    fs.setxattr(y, b"user.big", pattern(3000, 8), 0, ROOT)
    s = put(fs, ROOT_INO, b"s", b"").ino
    sparse = fs.open(s, os.O_WRONLY, ROOT)
    fs.write(sparse, 500_000, b"in the middle")
    fs.release(sparse)
    fs.setattr(s, ROOT, size=1_000_000)
    fs.mknod(ROOT_INO, b"fifo", stat.S_IFIFO | 0o600, 0, ROOT)
    h = put(fs, ROOT_INO, b"h1", pattern(1200, 9)).ino
    fs.link(h, ROOT_INO, b"h2", ROOT)
    fs.setattr(put(fs, ROOT_INO, b"hole", b"").ino, ROOT, size=5000)
    fs.setattr(put(fs, ROOT_INO, b"suid", pattern(1100, 9)).ino, ROOT, mode=0o6755)
    fs.change(lambda tx: names.make_fixed(tx, ROOT_INO, b"fixed", 0o640, 8192, USER))
    _note_inos(fs, ROOT_INO, b"")


def _create(name: bytes, flags: int, parent: bytes = b"") -> Callable[[Filesystem], object]:
    def act(fs: Filesystem) -> object:
        above = ino(fs, parent) if parent else ROOT_INO
        return fs.create(above, name, 0o640, flags, ROOT)

    return act


workload("create", _create(b"new", os.O_RDWR))
workload("create-exclusive", _create(b"new", os.O_RDWR | os.O_EXCL))
workload("create-existing", _create(b"a", os.O_RDWR))
workload("create-truncating", _create(b"b", os.O_RDWR | os.O_TRUNC))
workload("create-truncating-large", _create(b"c", os.O_RDWR | os.O_TRUNC))
workload("create-in-directory", _create(b"new", os.O_RDWR, b"e"))
workload("create-in-tree", _create(b"new", os.O_RDWR, b"t"))
workload("create-splits-leaf", _create(b"n" * 255, os.O_RDWR, b"t"))
workload("create-makes-tree", _create(b"n" * 200, os.O_RDWR, b"brim"))
workload("mknod-fifo", lambda fs: fs.mknod(ROOT_INO, b"new", stat.S_IFIFO | 0o600, 0, ROOT))
workload("mknod-device", lambda fs: fs.mknod(ROOT_INO, b"new", stat.S_IFCHR | 0o600, 259, ROOT))
workload("mkdir", lambda fs: fs.mkdir(ROOT_INO, b"new", 0o755, USER))
workload("mkdir-nested", lambda fs: fs.mkdir(ino(fs, b"e/sub"), b"new", 0o755, ROOT))
workload("symlink", lambda fs: fs.symlink(ROOT_INO, b"new", b"to", ROOT))
workload("symlink-long", lambda fs: fs.symlink(ROOT_INO, b"new", pattern(3000), ROOT))
workload("link", lambda fs: fs.link(ino(fs, b"a"), ino(fs, b"e"), b"new", ROOT))
workload("link-in-tree", lambda fs: fs.link(ino(fs, b"h1"), ino(fs, b"t"), b"new", ROOT))


def _store(*files: tuple[bytes, bytes, bytes]) -> Callable[[Filesystem], object]:
    """Replace the contents, and a note, of several files in one commit."""

    def plan(tx: Transaction) -> None:
        for name, content, note in files:
            contents.store(tx, ROOT_INO, name, content, 0o640, USER, {b"user.note": note})

    return lambda fs: fs.change(plan)


workload("contents-new", _store((b"new", pattern(700, 8), b"note")))
workload("contents-inline", _store((b"a", pattern(9000, 8), b"")))
workload("contents-map", _store((b"b", b"short", pattern(300, 9))))
workload("contents-attributes", _store((b"y", b"", b"n")))
workload(
    "contents-of-many",
    _store(
        (b"a", b"1", b""), (b"new", pattern(5000), b"n"), (b"c", b"3", b""), (b"also", b"", b"")
    ),
)


def _refused_unlink(fs: Filesystem) -> None:
    with pytest.raises(FsError) as caught:
        fs.unlink(ROOT_INO, b"fixed", ROOT)
    assert caught.value.errno == errno.EPERM


workload(
    "fixed-make",
    lambda fs: fs.change(lambda tx: names.make_fixed(tx, ROOT_INO, b"new", 0o640, 20480, USER)),
)
workload("fixed-release", lambda fs: fs.change(lambda tx: fixed.release(tx, ino(fs, b"fixed"))))
workload("fixed-unlink", _refused_unlink)
workload("fixed-chmod", lambda fs: fs.setattr(ino(fs, b"fixed"), ROOT, mode=0o600))

workload("unlink-inline", lambda fs: fs.unlink(ROOT_INO, b"a", ROOT))
workload("unlink-map", lambda fs: fs.unlink(ROOT_INO, b"b", ROOT))
workload("unlink-large", lambda fs: fs.unlink(ROOT_INO, b"c", ROOT))
workload("unlink-sparse", lambda fs: fs.unlink(ROOT_INO, b"s", ROOT))
workload("unlink-symlink", lambda fs: fs.unlink(ROOT_INO, b"long", ROOT))
workload("unlink-one-of-two", lambda fs: fs.unlink(ROOT_INO, b"h1", ROOT))
workload("unlink-attributes", lambda fs: fs.unlink(ROOT_INO, b"y", ROOT))
workload("unlink-in-tree", lambda fs: fs.unlink(ino(fs, b"t"), b"name-%016d" % 7, ROOT))
workload("unlink-fifo", lambda fs: fs.unlink(ROOT_INO, b"fifo", ROOT))
workload("rmdir", lambda fs: fs.rmdir(ROOT_INO, b"d", ROOT))
workload("rmdir-nested", lambda fs: fs.rmdir(ino(fs, b"e"), b"sub", ROOT))


def _shrink(keep: int) -> Step:
    def prepare(scene: Scene) -> None:
        def shrink(fs: Filesystem) -> None:
            folder = ino(fs, b"t")
            for n in range(keep, 64):
                with suppress(Exception):
                    fs.unlink(folder, b"name-%016d" % n, ROOT)

        scene.victim.run(shrink)

    return prepare


for left in (20, 14):  # among these are merges of leaves
    workload(
        f"unlink-merges-{left}",
        lambda fs, at=left - 1: fs.unlink(  # type: ignore[misc]
            ino(fs, b"t"), b"name-%016d" % at, ROOT
        ),
        _shrink(left),
    )
workload("unlink-makes-inline", lambda fs: fs.unlink(ino(fs, b"over"), b"%0250d" % 3, ROOT))


def _rename(old: bytes, new: bytes, flags: int = 0) -> Callable[[Filesystem], object]:
    def split(fs: Filesystem, path: bytes) -> tuple[int, bytes]:
        above, _, name = path.rpartition(b"/")
        return (ino(fs, above) if above else ROOT_INO), name

    def act(fs: Filesystem) -> None:
        fs.rename(*split(fs, old), *split(fs, new), flags, ROOT)

    return act


workload("rename", _rename(b"a", b"new"))
workload("rename-across", _rename(b"b", b"e/new"))
workload("rename-over", _rename(b"a", b"b"))
workload("rename-over-large", _rename(b"a", b"c"))
workload("rename-over-link", _rename(b"a", b"h1"))
workload("rename-across-over", _rename(b"e/e1", b"q"))
workload("rename-directory", _rename(b"e", b"d/moved"))
workload("rename-directory-over", _rename(b"e/sub", b"d"))
workload("rename-noreplace", _rename(b"a", b"d/new", RENAME_NOREPLACE))
workload("rename-exchange", _rename(b"a", b"b", RENAME_EXCHANGE))
workload("rename-whiteout", _rename(b"a", b"e/new", RENAME_WHITEOUT))
workload("rename-exchange-kinds", _rename(b"a", b"e/sub", RENAME_EXCHANGE))
workload("rename-within-tree", _rename(b"t/name-%016d" % 3, b"t/other"))
workload("rename-into-tree", _rename(b"l", b"t/other"))

workload("chmod", lambda fs: fs.setattr(ino(fs, b"a"), ROOT, mode=0o600))
workload("chown", lambda fs: fs.setattr(ino(fs, b"c"), ROOT, uid=7, gid=8))
workload("utimes", lambda fs: fs.setattr(ino(fs, b"e"), ROOT, atime_ns=1, mtime_ns=2))
for label, path, size in (
    ("inline-shrink", b"a", 100),
    ("inline-grow", b"a", 500),
    ("inline-to-map", b"a", 5000),
    ("map-to-nothing", b"b", 0),
    ("map-within-block", b"b", 2500),
    ("map-at-block", b"b", 2048),
    ("map-grow", b"b", 100_000),
    ("large-cut", b"c", 60 * 1024 + 7),
    ("large-to-few", b"c", 3 * 1024),
    ("large-to-nothing", b"c", 0),
    ("sparse-cut", b"s", 500_005),
    ("hole-grow", b"hole", 50_000),
):
    workload(
        f"truncate-{label}",
        lambda fs, path=path, size=size: fs.setattr(  # type: ignore[misc]
            ino(fs, path), ROOT, size=size
        ),
    )

for label, path, offset, length in (
    ("inline", b"a", 10, 50),
    ("inline-grow", b"a", 250, 200),
    ("inline-to-map", b"a", 200, 2000),
    ("one-block", b"b", 1024, 1024),
    ("part-of-block", b"b", 1500, 30),
    ("across-blocks", b"b", 1000, 2000),
    ("extending", b"b", 3400, 5000),
    ("many-blocks", b"c", 5 * 1024 + 9, 30 * 1024),
    ("into-hole", b"s", 900_000, 100),
    ("sparse-over", b"s", 499_000, 3000),
    ("far", b"q", 4 << 20, 10),
    ("hole", b"hole", 2000, 100),
):
    handle_workload(
        f"write-{label}",
        path,
        os.O_RDWR,
        lambda fs, handle, offset=offset, length=length: fs.write(  # type: ignore[misc]
            handle, offset, pattern(length, 77)
        ),
    )
handle_workload(
    "append-inline", b"a", os.O_WRONLY | os.O_APPEND, lambda fs, h: fs.write(h, 0, pattern(60, 5))
)
handle_workload(
    "append-map", b"b", os.O_WRONLY | os.O_APPEND, lambda fs, h: fs.write(h, 0, pattern(2500, 5))
)
handle_workload(
    "append-large", b"c", os.O_WRONLY | os.O_APPEND, lambda fs, h: fs.write(h, 0, pattern(9000, 5))
)

for label, path, mode, offset, length in (
    ("punch", b"c", 3, 700, 40_000),
    ("punch-all", b"c", 3, 0, 1 << 20),
    ("punch-inline", b"a", 3, 10, 100),
    ("zero-range", b"q", 16, 100, 12_000),
    ("fill", b"s", 0, 0, 30_000),
    ("fill-beyond-the-end", b"b", 0, 1000, 9000),
):
    handle_workload(
        label,
        path,
        os.O_RDWR,
        lambda fs, handle, mode=mode, offset=offset, length=length: fs.fallocate(  # type: ignore[misc]
            handle, mode, offset, length
        ),
    )
workload("nameless", lambda fs: fs.tmpfile(ino(fs, b"d"), 0o600, os.O_RDWR, ROOT))


def _nameless(scene: Scene) -> None:
    scene.handles["it"], _ = scene.victim.run(lambda fs: fs.tmpfile(ROOT_INO, 0o600, 2, ROOT))
    scene.victim.run(lambda fs: fs.write(scene.handles["it"], 0, pattern(3000, 9)))


WORKLOADS["name-the-nameless"] = Workload(
    "name-the-nameless",
    lambda scene: scene.victim.run(
        lambda fs: fs.link(scene.handles["it"].ino, ino(fs, b"d"), b"named", ROOT)
    ),
    _nameless,
)
WORKLOADS["name-the-nameless-over"] = Workload(
    "name-the-nameless-over",
    lambda scene: scene.victim.run(
        lambda fs: fs.link(scene.handles["it"].ino, ROOT_INO, b"b", ROOT, over=True)
    ),
    _nameless,
)
WORKLOADS["close-the-nameless"] = Workload(
    "close-the-nameless",
    lambda scene: scene.victim.run(lambda fs: fs.release(scene.handles["it"])),
    _nameless,
)


def _from_a_file(fs: Filesystem, handle: Handle) -> int:
    """Append what a local file holds there, as `put` does."""
    with tempfile.TemporaryFile() as file:
        file.write(pattern(100_000, 6))
        file.flush()
        at = fs.getattr(handle.ino).size // fs.block_size * fs.block_size
        return fs.write_from(handle, at + fs.block_size, 9000, file.fileno())


handle_workload("from-a-file", b"b", os.O_WRONLY, _from_a_file)


def _as_user(scene: Scene) -> None:
    scene.handles["it"] = scene.victim.run(lambda fs: fs.open(ino(fs, b"suid"), os.O_RDWR, USER))


WORKLOADS["write-drops-privileges"] = Workload(
    "write-drops-privileges",
    lambda scene: scene.victim.run(lambda fs: fs.write(scene.handles["it"], 3, b"user")),
    _as_user,
)

for label, path, name, value in (
    ("set", b"a", b"user.new", b"value"),
    ("set-blocks", b"a", b"user.new", pattern(2500, 3)),
    ("replace", b"x", b"user.one", b"other"),
    ("grow-to-blocks", b"x", b"user.one", pattern(2500, 3)),
    ("replace-blocks", b"y", b"user.big", pattern(4000, 3)),
    ("shrink-to-inline", b"y", b"user.big", b"small"),
    ("directory", b"t", b"user.new", b"value" * 30),
):
    workload(
        f"xattr-{label}",
        lambda fs, path=path, name=name, value=value: fs.setxattr(  # type: ignore[misc]
            ino(fs, path), name, value, 0, ROOT
        ),
    )
workload("xattr-remove", lambda fs: fs.removexattr(ino(fs, b"x"), b"user.one", ROOT))


def _listed(scene: Scene) -> None:
    """A file and a directory with access lists, longer than their inode blocks have room for."""
    users = [acl.Entry(acl.USER, 6, 1000 + number) for number in range(80)]
    entries = [acl.Entry(acl.USER_OBJ, 7), *users, acl.Entry(acl.GROUP_OBJ, 5)]
    value = acl.encode([*entries, acl.Entry(acl.MASK, 7), acl.Entry(acl.OTHER, 0)])

    def give(fs: Filesystem) -> None:
        fs.setxattr(ino(fs, b"a"), ACCESS_LIST, value, 0, ROOT)
        fs.setxattr(ino(fs, b"d"), DEFAULT_LIST, value, 0, ROOT)

    scene.victim.run(give)


workload("mkdir-list", lambda fs: fs.mkdir(ino(fs, b"d"), b"new", 0o770, ROOT), _listed)
workload("setattr-list", lambda fs: fs.setattr(ino(fs, b"a"), ROOT, mode=0o640), _listed)
workload("xattr-list-remove", lambda fs: fs.removexattr(ino(fs, b"a"), ACCESS_LIST, ROOT), _listed)
workload("xattr-remove-blocks", lambda fs: fs.removexattr(ino(fs, b"y"), b"user.big", ROOT))


def _lock(fs: Filesystem, path: bytes, owner: int, end: int = END, type: int = WRITE) -> bool:
    """Take an fcntl(2) lock, through an open file of its own."""
    return fs.locks.take(Guard(fs.locks, ino(fs, path)), Lock(FCNTL, type, owner, 0, end))


def _locked(*paths: bytes) -> Step:
    def prepare(scene: Scene) -> None:
        for path in paths:
            assert scene.victim.run(lambda fs: _lock(fs, path, 1))  # noqa: B023

    return prepare


def _queue(scene: Scene) -> None:
    """Wait for the lock of another peer, with a ticket."""

    def wait(fs: Filesystem) -> bool:
        lock = Lock(FCNTL, WRITE, 2)
        wait = Wait(fs.locks, Guard(fs.locks, ino(fs, b"b")), lock, blocking=True, detect=True)
        wait.attempt()
        time.sleep(QUEUE_AFTER)
        return wait.attempt()

    scene.victim.run(wait)


def _write_locked(scene: Scene) -> None:
    handle = scene.handles["it"]
    scene.victim.run(lambda fs: fs.write(handle, 0, pattern(100, 9)))


def _opened_and_locked(scene: Scene) -> None:
    def prepare(fs: Filesystem) -> Handle:
        handle = fs.open(ino(fs, b"b"), os.O_RDWR, ROOT)
        handle.guard = Guard(fs.locks, handle.ino)
        fs.locks.take(handle.guard, Lock(FCNTL, WRITE, 1))
        return handle

    scene.handles["it"] = scene.victim.run(prepare)


workload("lock", lambda fs: _lock(fs, b"b", 1))
workload("lock-beside-attributes", lambda fs: _lock(fs, b"y", 1))
workload("lock-more", lambda fs: _lock(fs, b"b", 1, 99, READ), _locked(b"b"))
workload("unlock", lambda fs: fs.locks.give(ino(fs, b"b"), FCNTL, 1), _locked(b"b"))
workload("unlock-all", lambda fs: fs.locks.leave(), _locked(b"a", b"b", b"d"))
WORKLOADS["lock-queue"] = Workload(
    "lock-queue", _queue, lambda scene: scene.other.run(lambda fs: _lock(fs, b"b", 1))
)
WORKLOADS["write-locked"] = Workload("write-locked", _write_locked, _opened_and_locked)

workload("open", lambda fs: fs.open(ino(fs, b"a"), os.O_RDONLY, ROOT))
workload("open-truncating", lambda fs: fs.open(ino(fs, b"b"), os.O_RDWR | os.O_TRUNC, ROOT))
handle_workload("close", b"a", os.O_RDONLY, lambda fs, handle: fs.release(handle))


def _open_by(holder: str, path: bytes) -> Step:
    def prepare(scene: Scene) -> None:
        peer = scene.victim if holder == "victim" else scene.other
        scene.handles[holder] = peer.run(lambda fs: fs.open(ino(fs, path), os.O_RDONLY, ROOT))

    return prepare


workload("unlink-open-here", lambda fs: fs.unlink(ROOT_INO, b"b", ROOT), _open_by("victim", b"b"))
workload(
    "unlink-open-elsewhere", lambda fs: fs.unlink(ROOT_INO, b"b", ROOT), _open_by("other", b"b")
)
workload("rename-over-open", _rename(b"a", b"c"), _open_by("victim", b"c"))


def _orphan(*holders: str) -> Step:
    def prepare(scene: Scene) -> None:
        for holder in holders:
            _open_by(holder, b"c")(scene)
        scene.other.run(lambda fs: fs.unlink(ROOT_INO, b"c", ROOT))

    return prepare


def _close_victims(scene: Scene) -> None:
    scene.victim.run(lambda fs: fs.release(scene.handles["victim"]))


WORKLOADS["close-orphan"] = Workload("close-orphan", _close_victims, _orphan("victim"))
WORKLOADS["close-shared-orphan"] = Workload(
    "close-shared-orphan", _close_victims, _orphan("victim", "other")
)
WORKLOADS["write-orphan"] = Workload(
    "write-orphan",
    lambda scene: scene.victim.run(lambda fs: fs.write(scene.handles["victim"], 0, pattern(3000))),
    lambda scene: (
        _orphan("victim")(scene),
        scene.handles.update(
            victim=scene.victim.run(
                lambda fs: fs.open(scene.handles["victim"].ino, os.O_RDWR, ROOT)
            )
        ),
    ),
)


def _unmount(scene: Scene) -> None:
    scene.victim.run(lambda fs: fs.unmount())


WORKLOADS["unmount"] = Workload("unmount", _unmount, nothing)
WORKLOADS["unmount-orphan"] = Workload("unmount-orphan", _unmount, _orphan("victim"))
WORKLOADS["mount"] = Workload("mount", lambda scene: scene.victim.mount(), nothing, mounted=False)


def _leak(scene: Scene) -> None:
    """A third peer dies in the middle of a large write, and all others may know it."""
    third = scene.laboratory.mounted()
    handle = third.run(lambda fs: fs.open(ino(fs, b"b"), os.O_WRONLY, ROOT))
    third.die_at(45)
    with suppress(Death):
        third.run(lambda fs: fs.write(handle, 0, pattern(15_000, 66)))
    third.bury()


def _recover(scene: Scene) -> None:
    scene.victim.tick(10)


def _collect(scene: Scene) -> None:
    def collect(fs: Filesystem) -> int:
        fs.table.retire_gone()
        return fs.collect()

    scene.victim.run(collect)


WORKLOADS["tick"] = Workload("tick", lambda scene: scene.victim.tick(), nothing)
WORKLOADS["tick-recovers"] = Workload("tick-recovers", _recover, _leak)
WORKLOADS["collect"] = Workload("collect", _collect, _leak)
WORKLOADS["mount-after-death"] = Workload(
    "mount-after-death", lambda scene: scene.victim.mount(), _leak, mounted=False
)
