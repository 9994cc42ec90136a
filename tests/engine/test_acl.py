"""Access lists: their encoding, their rules, and what changes of files do to them."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import stat
import struct
import time
from contextlib import suppress

import pytest

from ivshmemfs.engine import ROOT_INO, Context, Filesystem, acl, xattr
from ivshmemfs.engine.acl import GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Entry
from ivshmemfs.engine.xattr import ACCESS_LIST, DEFAULT_LIST
from ivshmemfs.errors import FsError, NoSpace
from tests.engine.asking import fails
from tests.support.regions import ROOT, TestRegion, put

MINIMAL = [Entry(USER_OBJ, 7), Entry(GROUP_OBJ, 5), Entry(OTHER, 0)]
FULL = [
    *[Entry(USER_OBJ, 6), Entry(USER, 7, 10), Entry(USER, 0, 11)],
    *[Entry(GROUP_OBJ, 5), Entry(GROUP, 6, 20), Entry(MASK, 6), Entry(OTHER, 4)],
]
READ, WRITE = 4, 2


def lists(fs: Filesystem, ino: int) -> dict[bytes, list[Entry]]:
    return {name: acl.parse(fs.getxattr(ino, name)) for name in fs.listxattr(ino)}


def give(fs: Filesystem, ino: int, name: bytes, entries: list[Entry]) -> None:
    fs.setxattr(ino, name, acl.encode(entries), 0, ROOT)


def mode_of(fs: Filesystem, ino: int) -> int:
    return stat.S_IMODE(fs.getattr(ino).mode)


# --- values -----------------------------------------------------------------------------------


def test_the_encoding_is_that_of_linux() -> None:
    value = acl.encode(FULL)
    assert value == struct.pack(
        "<I" + "HHI" * 7, 2,
        *(1, 6, 2**32 - 1, 2, 7, 10, 2, 0, 11, 4, 5, 2**32 - 1),
        *(8, 6, 20, 16, 6, 2**32 - 1, 32, 4, 2**32 - 1),
    )  # fmt: skip
    assert acl.parse(value) == FULL
    assert acl.parse(struct.pack("<IHHI", 2, USER_OBJ, 7, 5)) == [Entry(USER_OBJ, 7)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"", errno.EINVAL),
        (b"\2\0\0", errno.EINVAL),
        (struct.pack("<I", 3), errno.EOPNOTSUPP),
        (struct.pack("<I", 2) + bytes(7), errno.EINVAL),
        (struct.pack("<I", 2) + bytes(9), errno.EINVAL),
    ],
)
def test_damaged_values(value: bytes, expected: int) -> None:
    with pytest.raises(FsError) as refused:
        acl.parse(value)
    assert refused.value.errno == expected


@pytest.mark.parametrize(
    "entries",
    [
        [],
        MINIMAL[:2],
        MINIMAL[1:],
        [MINIMAL[0], MINIMAL[0], *MINIMAL[1:]],
        [MINIMAL[0], MINIMAL[1], MINIMAL[1], MINIMAL[2]],
        [*MINIMAL, MINIMAL[2]],
        MINIMAL[::-1],
        [MINIMAL[0], Entry(USER, 7, 1), *MINIMAL[1:]],  # without a mask
        [*MINIMAL[:2], Entry(GROUP, 7, 1), MINIMAL[2]],
        [*MINIMAL[:2], Entry(MASK, 7), Entry(MASK, 7), MINIMAL[2]],
        [*MINIMAL[:2], Entry(USER, 7, 1), Entry(MASK, 7), MINIMAL[2]],  # not in order
        [MINIMAL[0], Entry(USER, 7, acl.NO_ID), MINIMAL[1], Entry(MASK, 7), MINIMAL[2]],
        [Entry(USER_OBJ, 8), *MINIMAL[1:]],
        [Entry(64, 7), *MINIMAL],
        [Entry(0, 7), *MINIMAL],
    ],
)
def test_malformed_lists(entries: list[Entry]) -> None:
    with pytest.raises(FsError) as refused:
        acl.check(entries)
    assert refused.value.errno == errno.EINVAL


def test_lists_that_the_kernel_accepts() -> None:
    same = [MINIMAL[0], Entry(USER, 7, 1), Entry(USER, 0, 1), MINIMAL[1], Entry(MASK, 7)]
    for entries in (MINIMAL, FULL, [*MINIMAL[:2], Entry(MASK, 1), MINIMAL[2]], [*same, MINIMAL[2]]):
        acl.check(entries)


def test_lists_and_modes() -> None:
    assert acl.permissions_of(MINIMAL) == 0o750
    assert acl.permissions_of(FULL) == 0o664
    for bits in range(0o1000):
        assert acl.permissions_of(acl.with_permissions(FULL, bits)) == bits
        assert acl.permissions_of(acl.with_permissions(MINIMAL, bits)) == bits
        assert acl.permissions_of(acl.inherited(FULL, bits)) == bits & 0o664
    assert acl.with_permissions(FULL, 0)[3] == Entry(GROUP_OBJ, 5)  # the mask takes its place
    assert acl.is_minimal(MINIMAL)
    assert not acl.is_minimal([*MINIMAL[:2], Entry(MASK, 1), MINIMAL[2]])


@pytest.mark.parametrize(
    ("uid", "groups", "allowed"),
    [
        (1, (), 6),  # the owner, past the mask
        (10, (), 6),  # 7 under the mask
        (10, (20,), 6),
        (11, (2, 20), 0),  # an entry of a user counts alone
        (12, (2,), 4),  # the owning group's 5 under the mask
        (12, (20,), 6),
        (12, (2, 20), 6),
        (12, (), 4),
        (12, (21,), 4),
    ],
)
def test_what_a_list_permits(uid: int, groups: tuple[int, ...], allowed: int) -> None:
    for mask in range(1, 8):
        found = acl.permits(FULL, uid, 1, 2, mask, lambda gid: gid in groups)
        assert found is (mask & ~allowed == 0), mask


def test_two_groups_do_not_add_up() -> None:
    entries = [
        *[Entry(USER_OBJ, 7), Entry(GROUP_OBJ, READ), Entry(GROUP, WRITE, 20)],
        *[Entry(MASK, 7), Entry(OTHER, 7)],
    ]
    assert not acl.permits(entries, 9, 1, 2, READ | WRITE, lambda _gid: True)
    assert acl.permits(entries, 9, 1, 2, WRITE, lambda _gid: True)


# --- files ------------------------------------------------------------------------------------


def test_an_access_list_and_the_mode_are_kept_in_step(fs: Filesystem, other: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"content").ino
    give(fs, ino, ACCESS_LIST, FULL)
    assert lists(other, ino) == {ACCESS_LIST: FULL}
    assert mode_of(other, ino) == 0o664
    other.setattr(ino, ROOT, mode=0o4640)
    assert lists(fs, ino) == {ACCESS_LIST: acl.with_permissions(FULL, 0o640)}
    assert mode_of(fs, ino) == 0o4640
    give(fs, ino, ACCESS_LIST, MINIMAL)  # says no more than a mode
    assert lists(fs, ino) == {}
    assert mode_of(fs, ino) == 0o4750


def test_a_removed_list_leaves_the_mode(fs: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"").ino
    fs.setxattr(ino, b"user.other", b"stays", 0, ROOT)
    for empty in (b"", struct.pack("<I", 2)):
        give(fs, ino, ACCESS_LIST, FULL)
        fs.setxattr(ino, ACCESS_LIST, empty, 0, ROOT)
        assert fs.listxattr(ino) == [b"user.other"]
    give(fs, ino, ACCESS_LIST, FULL)
    fs.removexattr(ino, ACCESS_LIST, ROOT)
    fs.removexattr(ino, ACCESS_LIST, ROOT)  # succeeds
    fs.removexattr(ino, DEFAULT_LIST, ROOT)
    assert mode_of(fs, ino) == 0o664
    fails(errno.ENODATA, lambda: fs.getxattr(ino, ACCESS_LIST))


def test_what_cannot_have_a_list(fs: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"").ino
    link = fs.symlink(ROOT_INO, b"link", b"file", ROOT).ino
    value = acl.encode(FULL)
    fails(errno.EACCES, lambda: fs.setxattr(ino, DEFAULT_LIST, value, 0, ROOT))
    fails(errno.EOPNOTSUPP, lambda: fs.setxattr(link, ACCESS_LIST, value, 0, ROOT))
    fails(errno.EINVAL, lambda: fs.setxattr(ino, ACCESS_LIST, value[:-8], 0, ROOT))
    for name in (b"system.posix_acl", b"system.posix_acl_access2", b"system.other", b"other.thing"):
        fails(errno.EOPNOTSUPP, functools.partial(fs.setxattr, ino, name, value, 0, ROOT))
        fails(errno.EOPNOTSUPP, functools.partial(fs.getxattr, ino, name))
    assert fs.listxattr(ino) == fs.listxattr(link) == []


def test_the_longest_list_is_one_that_every_kernel_reads(roomy: TestRegion) -> None:
    fs = roomy.mount()
    ino = put(fs, ROOT_INO, b"file", b"").ino

    def long(count: int) -> list[Entry]:
        users = [Entry(USER, 4, 1000 + number) for number in range(count - 4)]
        return [Entry(USER_OBJ, 6), *users, *MINIMAL[1:2], Entry(MASK, 7), Entry(OTHER, 0)]

    give(fs, ino, ACCESS_LIST, long(511))
    assert len(fs.getxattr(ino, ACCESS_LIST)) <= 4096
    fails(errno.E2BIG, lambda: give(fs, ino, ACCESS_LIST, long(512)))
    assert lists(fs, ino) == {ACCESS_LIST: long(511)}
    fs.setattr(ino, ROOT, mode=0o600)
    assert lists(fs, ino)[ACCESS_LIST][-2] == Entry(MASK, 0)


def test_a_change_of_a_list_is_a_change_of_the_inode(fs: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"").ino
    times = [fs.getattr(ino).ctime_ns]
    for change in (
        lambda: give(fs, ino, ACCESS_LIST, FULL),
        lambda: fs.setattr(ino, ROOT, mode=0o600),
        lambda: fs.removexattr(ino, ACCESS_LIST, ROOT),
        lambda: give(fs, ino, ACCESS_LIST, MINIMAL),
    ):
        time.sleep(0.02)  # longer than a step of the clock
        change()
        times.append(fs.getattr(ino).ctime_ns)
    assert times == sorted(set(times))


def test_a_full_region_changes_neither_list_nor_mode(roomy: TestRegion) -> None:
    fs = roomy.mount()
    ino = put(fs, ROOT_INO, b"file", b"").ino
    folder = fs.mkdir(ROOT_INO, b"folder", 0o755, ROOT).ino
    long = [Entry(USER_OBJ, 7), *[Entry(USER, 4, 1000 + number) for number in range(500)]]
    long += [Entry(GROUP_OBJ, 0), Entry(MASK, 7), Entry(OTHER, 7)]
    give(fs, folder, DEFAULT_LIST, long)
    before = fs.getattr(ino)
    handle, _ = fs.create(ROOT_INO, b"filler", 0o600, os.O_WRONLY, ROOT)
    with suppress(NoSpace):
        while True:
            fs.write(handle, 0, b"x" * 1024, append=True)
    fails(errno.ENOSPC, lambda: give(fs, ino, ACCESS_LIST, long))
    assert (fs.getattr(ino), fs.listxattr(ino)) == (before, [])
    fails(errno.ENOSPC, lambda: fs.mkdir(folder, b"inner", 0o755, ROOT))
    assert fs.find(folder, b"inner") is None
    fs.release(handle)


def test_set_group_id_goes_with_a_list_of_an_outsider(fs: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"").ino
    value = acl.encode(FULL)
    inside, outside = Context(1000, 2000), Context(1000, 3000)
    fs.setattr(ino, ROOT, uid=1000, gid=2000)
    for ctx, told, kept in (
        (inside, None, True),
        (outside, None, False),
        (ROOT, None, True),
        (outside, False, True),
        (inside, True, False),
    ):
        fs.setattr(ino, ROOT, mode=0o2755)
        fs.setxattr(ino, ACCESS_LIST, value, 0, ctx, clears_set_group_id=told)
        assert bool(mode_of(fs, ino) & stat.S_ISGID) is kept, (ctx, told)


def test_a_copy_without_the_list_gives_no_group_more(fs: Filesystem) -> None:
    ino = put(fs, ROOT_INO, b"file", b"").ino
    for entries, mode, plain in (
        (FULL, 0o664, 0o644),  # the group's 5 under the mask
        (MINIMAL, 0o750, 0o750),
        ([Entry(USER_OBJ, 6), Entry(GROUP_OBJ, 0), Entry(MASK, 7), Entry(OTHER, 0)], 0o670, 0o600),
    ):
        give(fs, ino, ACCESS_LIST, entries)
        attr = fs.getattr(ino)
        assert stat.S_IMODE(attr.mode) == mode
        assert fs.mode_without_list(attr) == stat.S_IFREG | plain


# --- inheritance ------------------------------------------------------------------------------


def test_what_is_made_inherits(fs: Filesystem, other: Filesystem) -> None:
    folder = fs.mkdir(ROOT_INO, b"folder", 0o755, ROOT).ino
    give(fs, folder, DEFAULT_LIST, FULL)
    assert mode_of(fs, folder) == 0o755
    ctx = Context(1000, 1000, 0, 0o077)  # the umask does not count here
    inner = other.mkdir(folder, b"inner", 0o777, ctx).ino
    assert lists(fs, inner) == {ACCESS_LIST: FULL, DEFAULT_LIST: FULL}
    handle, attr = other.create(inner, b"file", 0o640, os.O_RDWR, ctx)
    other.release(handle)
    fifo = other.mknod(inner, b"fifo", stat.S_IFIFO | 0o666, 0, ctx).ino
    handle, nameless = other.tmpfile(inner, 0o600, os.O_RDWR, ctx)
    for ino, mode in ((attr.ino, 0o640), (fifo, 0o664), (nameless.ino, 0o600)):
        assert lists(fs, ino) == {ACCESS_LIST: acl.with_permissions(FULL, mode)}
        assert mode_of(fs, ino) == mode
    other.release(handle)
    link = other.symlink(inner, b"link", b"x", ctx).ino
    assert fs.listxattr(link) == []
    assert mode_of(fs, link) == 0o777


def test_a_default_list_that_is_a_mode_leaves_no_access_list(fs: Filesystem) -> None:
    folder = fs.mkdir(ROOT_INO, b"folder", 0o755, ROOT).ino
    give(fs, folder, DEFAULT_LIST, MINIMAL)
    ctx = Context(0, 0, 0, 0o777)
    ino = fs.mknod(folder, b"file", stat.S_IFREG | 0o666, 0, ctx).ino
    inner = fs.mkdir(folder, b"inner", 0o707, ctx).ino
    assert (mode_of(fs, ino), lists(fs, ino)) == (0o640, {})
    assert (mode_of(fs, inner), lists(fs, inner)) == (0o700, {DEFAULT_LIST: MINIMAL})


def test_the_umask_counts_without_a_default_list(fs: Filesystem) -> None:
    folder = fs.mkdir(ROOT_INO, b"folder", 0o2777, Context(0, 0, 0, 0o022)).ino
    give(fs, folder, ACCESS_LIST, FULL)  # is not inherited
    ctx = Context(0, 0, 0, 0o027)
    handle, attr = fs.create(folder, b"file", 0o4666, os.O_RDWR, ctx)
    fs.release(handle)
    assert (mode_of(fs, attr.ino), fs.listxattr(attr.ino)) == (0o4640, [])
    assert mode_of(fs, fs.mkdir(folder, b"inner", 0o777, ctx).ino) == 0o750


def test_lists_come_and_go_without_a_leak(roomy: TestRegion) -> None:
    fs = roomy.mount()
    folder = fs.mkdir(ROOT_INO, b"folder", 0o755, ROOT).ino
    give(fs, folder, DEFAULT_LIST, FULL)
    used = fs.statfs().blocks_free
    for name in (b"a", b"b"):
        fs.mkdir(folder, name, 0o777, ROOT)
    for name in (b"a", b"b"):
        fs.rmdir(folder, name, ROOT)
    assert fs.statfs().blocks_free == used


def test_what_another_machine_damaged_is_neither_obeyed_nor_in_the_way(fs: Filesystem) -> None:
    """A malformed list, stored past the checks: files are made as if it were not there."""
    folder = fs.mkdir(ROOT_INO, b"folder", 0o755, ROOT).ino
    long = acl.encode([MINIMAL[0], *[Entry(USER, 0, 9)] * 600, MINIMAL[1], *FULL[-2:]])
    values = (b"", b"x", b"\2\0\0\0", long)
    for name, value in itertools.product((ACCESS_LIST, DEFAULT_LIST), values):
        store(fs, folder, name, value)
        assert fs.listxattr(folder) == []
        assert fs.access_list(folder) == []
        fails(errno.ENODATA, functools.partial(fs.getxattr, folder, name))
        fs.setattr(folder, ROOT, mode=0o755)
        ino = fs.mknod(folder, b"file", stat.S_IFREG | 0o666, 0, Context(0, 0, 0, 0o022)).ino
        assert (mode_of(fs, ino), fs.listxattr(ino)) == (0o644, [])
        fs.unlink(folder, b"file", ROOT)
        fs.removexattr(folder, name, ROOT)
    assert fs.look(lambda view: xattr.table(view, view.inode(folder)).names) == []


def store(fs: Filesystem, ino: int, name: bytes, value: bytes) -> None:
    """Store an attribute without looking at what it says."""
    fs.change(lambda tx: tx.put(xattr.set_value(tx, tx.inode(ino), name, value, 0)))
