"""Tables of cases for `twin`: every operation on every kind of file by every kind of caller."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator, Sequence

from tests.posix.calls import AT_SYMLINK_NOFOLLOW, NO_DEVICE, UTIME_NOW, UTIME_OMIT, Call
from tests.posix.twin import (
    CALLERS,
    FOREIGN_GROUP,
    GROUP,
    OTHER,
    OWNER,
    SECOND_GROUP,
    Case,
    Here,
)

F = Here("d/file")  # what most calls are about
NEW = Here("d/new")
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


def make(kind: str, path: str) -> tuple[Call, ...]:
    """The calls that make something of a kind at `path`, and what it needs beside it."""
    at, aim = Here(path), f"{path}.aim"
    calls: dict[str, tuple[Call, ...]] = {
        "nothing": (),
        "file": (("write_new", at, b"0123456789"),),
        "empty file": (("write_new", at, b""),),
        "two names": (("write_new", at, b"0123456789"), ("link", at, Here(f"{path}.2"))),
        "directory": (("mkdir", at),),
        "full directory": (("mkdir", at), ("write_new", Here(f"{path}/in"), b"")),
        "fifo": (("mkfifo", at),),
        "socket": (("socket", at),),
        "char": (("mknod", at, stat.S_IFCHR | 0o644, NO_DEVICE),),
        "block": (("mknod", at, stat.S_IFBLK | 0o644, NO_DEVICE),),
        "link to file": (
            ("write_new", Here(aim), b"aimed at"),
            ("symlink", os.path.basename(aim), at),
        ),
        "link to directory": (("mkdir", Here(aim)), ("symlink", os.path.basename(aim), at)),
        "dangling": (("symlink", "nowhere", at),),
        "ring": (("symlink", os.path.basename(path), at),),
    }
    return calls[kind]


KINDS = (
    "nothing", "file", "empty file", "two names", "directory", "full directory", "fifo", "socket",
    "char", "block", "link to file", "link to directory", "dangling", "ring",
)  # fmt: skip
PLAIN = ("file", "directory", "fifo", "socket", "char", "block")
NO_MODE = ("nothing", "link to file", "link to directory", "dangling", "ring")


def given(kind: str, path: str, uid: int, gid: int, mode: int | None) -> tuple[Call, ...]:
    """The calls that make something with an owner and a mode."""
    calls = make(kind, path)
    if kind != "nothing":
        calls += (("lchown", Here(path), uid, gid),)
    if mode is not None and kind not in NO_MODE:
        calls += (("chmod", Here(path), mode),)
    return calls


def folder(uid: int = 0, gid: int = 0, mode: int = 0o777, path: str = "d") -> tuple[Call, ...]:
    return ("mkdir", Here(path)), ("chown", Here(path), uid, gid), ("chmod", Here(path), mode)


#: Directories in which things happen, by what they allow to each caller.
FOLDERS: dict[str, tuple[int, int, int]] = {
    "everybody's": (0, 0, 0o777),
    "root's": (0, 0, 0o755),
    "owner's": (OWNER, GROUP, 0o755),
    "sticky": (0, 0, 0o1777),
    "owner's sticky": (OWNER, GROUP, 0o1777),
    "other's sticky": (OTHER, GROUP, 0o1777),
    "group's": (0, GROUP, 0o2775),
    "without search": (0, 0, 0o666),
    "without read": (0, 0, 0o333),
    "without write": (0, 0, 0o555),
}


# --- one path ---------------------------------------------------------------------------------

_SET_TIMES = ((5, 6), (7, 8))
OPERATIONS: dict[str, Call] = {
    "access r": ("access", F, os.R_OK),
    "access w": ("access", F, os.W_OK),
    "access x": ("access", F, os.X_OK),
    "append": ("append", F, b"more"),
    "append nothing": ("append", F, b""),
    "chdir": ("chdir", F),
    "chmod": ("chmod", F, 0o640),
    "chmod same": ("chmod", F, 0o644),
    "chmod suid": ("chmod", F, 0o6755),
    "chmod sticky": ("chmod", F, 0o1755),
    "chown": ("chown", F, OTHER, GROUP),
    "chown nothing": ("chown", F, -1, -1),
    "chown second group": ("chown", F, -1, SECOND_GROUP),
    "chown to oneself": ("chown", F, OWNER, GROUP),
    "connect": ("connect", F),
    "fchmodat": ("fchmodat", F, 0o640),
    "ftruncate": ("ftruncate", F, 5),
    "getxattr": ("getxattr", F, "user.none"),
    "lchown": ("lchown", F, -1, SECOND_GROUP),
    "lchown by root": ("lchown", F, 5, 6),
    "link": ("link", F, NEW),
    "link followed": ("link", F, NEW, True),
    "listdir": ("listdir", F),
    "listxattr": ("listxattr", F),
    "lstat": ("lstat", F),
    "mkdir": ("mkdir", F),
    "mkfifo": ("mkfifo", F),
    "mknod char": ("mknod", F, stat.S_IFCHR | 0o644, NO_DEVICE),
    "mknod block": ("mknod", F, stat.S_IFBLK | 0o644, NO_DEVICE),
    "mknod file": ("mknod", F, stat.S_IFREG | 0o644),
    "mknod plain": ("mknod", F, 0o644),
    "mknod socket": ("mknod", F, stat.S_IFSOCK | 0o644),
    "mknod directory": ("mknod", F, stat.S_IFDIR | 0o644),
    "mknod link": ("mknod", F, stat.S_IFLNK | 0o644),
    "pwrite beyond": ("pwrite", F, b"far", 100_000),
    "readlink": ("readlink", F),
    "removexattr": ("removexattr", F, "user.none"),
    "rename": ("rename", F, NEW),
    "rename to itself": ("rename", F, F),
    "rmdir": ("rmdir", F),
    "setxattr user": ("setxattr", F, "user.a", b"1"),
    "setxattr trusted": ("setxattr", F, "trusted.a", b"1"),
    "setxattr security": ("setxattr", F, "security.a", b"1"),
    "setxattr create": ("setxattr", F, "user.a", b"1", os.XATTR_CREATE),
    "setxattr replace": ("setxattr", F, "user.a", b"1", os.XATTR_REPLACE),
    "socket": ("socket", F),
    "stat": ("stat", F),
    "statvfs": ("statvfs", F),
    "symlink": ("symlink", "to", F),
    "truncate longer": ("truncate", F, 20),
    "truncate same": ("truncate", F, 10),
    "truncate shorter": ("truncate", F, 5),
    "truncate to nothing": ("truncate", F, 0),
    "unlink": ("unlink", F),
    "utimens": ("utimens", F, *_SET_TIMES),
    "utimens now": ("utimens", F, (0, UTIME_NOW), (0, UTIME_NOW)),
    "utimens of a link": ("utimens", F, *_SET_TIMES, AT_SYMLINK_NOFOLLOW),
    "open to read": ("open", F, os.O_RDONLY | os.O_NONBLOCK),
    "open to write": ("open", F, os.O_WRONLY | os.O_NONBLOCK),
    "open to create": ("open", F, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644),
    "open to truncate": ("open", F, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK),
    "open exclusively": ("open", F, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644),
    "open without access time": ("open", F, os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK),
}  # fmt: skip
#: Calls that would wait for ever on a fifo.
WAITING = ("append", "append nothing", "ftruncate", "pwrite beyond")
#: tmpfs leaves the times of an empty file alone, other than those of a file that has data.
LEFT_OUT = (("truncate to nothing", "empty file"),)


def operations(where: str) -> Iterator[Case]:
    """Every operation on every kind by every caller, in one kind of directory."""
    uid, gid, mode = FOLDERS[where]
    for (name, call), kind, caller in itertools.product(OPERATIONS.items(), KINDS, CALLERS):
        if kind == "fifo" and name in WAITING:
            continue
        if (name, kind) in LEFT_OUT:
            continue
        setup = (*folder(uid, gid), *given(kind, "d/file", OWNER, GROUP, 0o644))
        setup += (("chmod", Here("d"), mode),)
        yield Case(f"{name} on {kind}", setup, call, caller)


# --- opening ----------------------------------------------------------------------------------

OPEN_FLAGS = ("O_CREAT", "O_EXCL", "O_TRUNC", "O_DIRECTORY", "O_NOFOLLOW", "O_APPEND")
MORE_FLAGS = ("O_PATH", "O_NOATIME", "O_SYNC", "O_DSYNC")


def opening() -> Iterator[Case]:
    """Every combination of flags on every kind."""
    combinations = [
        flags for size in range(len(OPEN_FLAGS) + 1)
        for flags in itertools.combinations(OPEN_FLAGS, size)
    ]  # fmt: skip
    combinations += list(itertools.product(MORE_FLAGS, ("O_CREAT", "O_NOFOLLOW", "O_DIRECTORY")))
    for access, flags in itertools.product(("O_RDONLY", "O_WRONLY", "O_RDWR"), combinations):
        number = os.O_NONBLOCK | getattr(os, access)
        for flag in flags:
            number |= getattr(os, flag)
        for kind, caller in itertools.product(KINDS, ("root", "owner", "other")):
            setup = (*folder(), *given(kind, "d/file", OWNER, GROUP, 0o644))
            name = f"{access}|{'|'.join(flags)} on {kind}"
            yield Case(name, setup, ("open", F, number, 0o604), caller)


# --- modes and owners -------------------------------------------------------------------------


def every_mode() -> Iterator[Case]:
    """What each of the permission bits allows to each caller."""
    for mode, caller in itertools.product(range(0o1000), CALLERS):
        calls: list[Call] = [("access", F, bits) for bits in (4, 2, 1, 6, 7)]
        calls += [("open", F, flags) for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)]
        calls += [("truncate", F, 10), ("getxattr", F, "user.a"), ("setxattr", F, "user.a", b"")]
        setup = (*folder(), *given("file", "d/file", OWNER, GROUP, mode))
        yield Case(f"mode {mode:o}", setup, ("all", *calls), caller)


def modes_of_directories() -> Iterator[Case]:
    """What each of the permission bits of a directory allows to each caller."""
    for digit, caller in itertools.product(range(8), CALLERS):
        for place, shift in enumerate((6, 3, 0)):
            mode = (0o777 & ~(7 << shift)) | digit << shift
            calls: list[Call] = [
                ("listdir", Here("d")), ("stat", F), ("chdir", Here("d")), ("unlink", F),
                ("mkdir", NEW), ("rmdir", Here("d/sub")), ("symlink", "to", Here("d/link")),
                ("rename", Here("d/a"), Here("d/b")), ("rename", Here("d/b"), Here("b")),
                ("link", Here("outside"), Here("d/c")), ("mkfifo", Here("d/fifo")),
                ("open", Here("d/made"), os.O_CREAT | os.O_WRONLY, 0o600),
                ("open", Here("d/none"), os.O_RDONLY), ("access", Here("d"), 7),
            ]  # fmt: skip
            setup = (
                *folder(), *given("file", "d/file", OWNER, GROUP, 0o644), *make("file", "d/a"),
                *make("directory", "d/sub"), *given("file", "outside", OWNER, GROUP, 0o666),
                ("chown", Here("d"), OWNER, GROUP), ("chmod", Here("d"), mode),
            )  # fmt: skip
            yield Case(f"directory {mode:o} ({place})", setup, ("all", *calls), caller)


SET_ID_MODES = (0o644, 0o755, 0o4755, 0o2755, 0o6755, 0o2745, 0o4644, 0o6644, 0o1755, 0o7777)


def changing_modes() -> Iterator[Case]:
    """chmod(2) from and to modes with set-ID bits."""
    kinds = (*PLAIN, "link to file")
    for kind, new, caller in itertools.product(kinds, SET_ID_MODES, CALLERS):
        for gid in (GROUP, SECOND_GROUP, FOREIGN_GROUP):
            setup = (*folder(), *given(kind, "d/file", OWNER, gid, 0o644))
            yield Case(f"chmod {kind} {new:o} of {gid}", setup, ("chmod", F, new), caller)
            if kind in ("file", "directory"):
                call = ("fchmod", F, new)
                yield Case(f"fchmod {kind} {new:o} of {gid}", setup, call, caller)


def _nothing_to_refuse(caller: str, mode: int) -> bool:
    """Documented: a caller that changes neither owner nor group need not own the file."""
    return caller in ("member", "other") and mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID


def changing_owners() -> Iterator[Case]:
    """chown(2) to every owner and group, and what it leaves of the mode."""
    uids, gids = (-1, OWNER, OTHER, 0), (-1, GROUP, SECOND_GROUP, FOREIGN_GROUP)
    for kind, mode, caller in itertools.product(PLAIN, SET_ID_MODES, CALLERS):
        for uid, gid in itertools.product(uids, gids):
            if uid == gid == -1 and _nothing_to_refuse(caller, mode):
                continue
            setup = (*folder(), *given(kind, "d/file", OWNER, GROUP, mode))
            call = ("chown", F, uid, gid)
            yield Case(f"chown {kind} {mode:o} to {uid}:{gid}", setup, call, caller)


def shedding() -> Iterator[Case]:
    """What changes of its contents leave of the mode and the capabilities of a program."""
    capability = bytes.fromhex("0100000202000000000000000000000000000000")
    calls: dict[str, Call] = {
        "append": ("append", F, b"x"),
        "append nothing": ("append", F, b""),
        "pwrite": ("pwrite", F, b"x", 3),
        "truncate shorter": ("truncate", F, 3),
        "truncate same": ("truncate", F, 10),
        "truncate longer": ("truncate", F, 30),
        "ftruncate": ("ftruncate", F, 3),
        "ftruncate same": ("ftruncate", F, 10),
        "open to truncate": ("open", F, os.O_WRONLY | os.O_TRUNC),
        "chown nothing": ("chown", F, -1, -1),
        "setxattr": ("setxattr", F, "user.a", b""),
        "link": ("link", F, NEW),
        "rename": ("rename", F, NEW),
        "utimens": ("utimens", F, (0, UTIME_NOW), (0, UTIME_NOW)),
    }
    for (name, call), mode, caller in itertools.product(calls.items(), range(0o10), CALLERS):
        for low in (0o666, 0o676, 0o777):
            if name == "chown nothing" and _nothing_to_refuse(caller, mode << 9 | low):
                continue
            setup = (*folder(), *given("file", "d/file", OWNER, GROUP, mode << 9 | low))
            yield Case(f"{name} of {mode:o}{low:o}", setup, call, caller)
            if low == 0o777:
                with_one = (*setup, ("setxattr", F, "security.capability", capability))
                yield Case(f"{name} of {mode:o}{low:o} with one", with_one, call, caller)


def creating() -> Iterator[Case]:
    """Owner, group and mode of what is made, under every umask, in set-group-ID directories."""
    calls: dict[str, Call] = {
        "open": ("open", F, os.O_CREAT | os.O_WRONLY),
        "open exclusively": ("open", F, os.O_CREAT | os.O_EXCL | os.O_RDWR),
        "mkdir": ("mkdir", F),
        "mkfifo": ("mkfifo", F),
        "symlink": ("symlink", "to", F),
        "socket": ("socket", F),
    }
    modes = (0, 0o600, 0o755, 0o777, 0o1777, 0o2755, 0o2745, 0o4755, 0o7777)
    for gid, folder_mode in itertools.product((0, GROUP, FOREIGN_GROUP), (0o777, 0o2777, 0o3777)):
        for (name, call), mode, mask, caller in itertools.product(
            calls.items(), modes, (0, 0o022, 0o077, 0o777), CALLERS
        ):
            if name in ("symlink", "socket") and mode:
                continue
            full = call if name in ("symlink", "socket") else (*call, mode)
            title = f"{name} {mode:o} mask {mask:o} in {folder_mode:o} of {gid}"
            yield Case(title, folder(0, gid, folder_mode), ("umask", mask, full), caller)
        for kind in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            for mode, caller in itertools.product((0o644, 0o2755, 0o7777), CALLERS):
                device = NO_DEVICE if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
                call = ("umask", 0o022, ("mknod", F, kind | mode, device))
                title = f"mknod {kind | mode:o} in {folder_mode:o} of {gid}"
                yield Case(title, folder(0, gid, folder_mode), call, caller)


# --- times ------------------------------------------------------------------------------------


def setting_times() -> Iterator[Case]:
    """utimensat(2) with every pair of values by every caller."""
    values: Sequence[tuple[int, int]] = (
        (0, UTIME_NOW), (0, UTIME_OMIT), (123, 456), (-5, 999_999_999), (1 << 32, 1),
        (5, 10**9), (5, -1), (999, UTIME_OMIT), (999, UTIME_NOW),
    )  # fmt: skip
    kinds = ("file", "directory", "fifo", "link to file", "dangling")
    for kind, atime, mtime, caller in itertools.product(kinds, values, values, CALLERS):
        for mode in (0o644, 0o666) if kind == "file" else (0o644,):
            setup = (*folder(), *given(kind, "d/file", OWNER, GROUP, mode))
            for flags in (0, AT_SYMLINK_NOFOLLOW) if "link" in kind else (0,):
                call = ("utimens", F, atime, mtime, flags)
                yield Case(f"utimens {atime} {mtime} of {kind} {mode:o}", setup, call, caller)


# --- two paths --------------------------------------------------------------------------------


def renaming() -> Iterator[Case]:
    """Every kind over every kind, in one directory and from one to another, with every flag."""
    for old, new, across in itertools.product(KINDS, KINDS, (False, True)):
        to = "e/to" if across else "d/to"
        setup = (*folder(), *folder(path="e"), *make(old, "d/file"), *make(new, to))
        title = f"{old} over {new}"
        yield Case(title, setup, ("rename", F, Here(to)))
        for flags in (NOREPLACE, EXCHANGE, WHITEOUT, NOREPLACE | EXCHANGE, 8):
            yield Case(title, setup, ("rename2", F, Here(to), flags))
        yield Case(title, setup, ("link", F, Here(to)))
        yield Case(title, setup, ("link", F, Here(to), True))


def renaming_relatives() -> Iterator[Case]:
    """Directories into and over what is above and below them."""
    paths = ("a", "a/b", "a/b/c", "a/file", "a/b/file", "x", "a/x", "a/b/x", "a/b/c/x",
             "a/.", "a/..", "a/b/..", ".", "..", "a/", "a/b/", "x/", "a/file/")  # fmt: skip
    setup: tuple[Call, ...] = tuple(("mkdir", Here(path)) for path in ("a", "a/b", "a/b/c"))
    setup += tuple(("write_new", Here(path), b"") for path in ("a/file", "a/b/file"))
    for old, new in itertools.product(paths, paths):
        for flags in (0, NOREPLACE, EXCHANGE):
            yield Case(f"{old} to {new}", setup, ("rename2", Here(old), Here(new), flags))
        yield Case(f"{old} as {new}", setup, ("link", Here(old), Here(new)))


def sticky() -> Iterator[Case]:
    """Permission to remove and move, by owners of the directory, the entry and its victim."""
    uids = (0, OWNER, OTHER)
    callers = ("root", "owner", "member", "other")
    for mode, above, uid, caller in itertools.product((0o777, 0o1777), uids, uids, callers):
        for kind in ("file", "directory", "dangling", "fifo"):
            setup = (*folder(above, GROUP, mode), *given(kind, "d/file", uid, GROUP, 0o644))
            setup += folder(path="e")
            title = f"{kind} of {uid} in {mode:o} of {above}"
            yield Case(title, setup, ("unlink", F), caller)
            yield Case(title, setup, ("rmdir", F), caller)
            yield Case(title, setup, ("rename", F, NEW), caller)
            yield Case(title, setup, ("rename", F, Here("e/new")), caller)
            yield Case(title, setup, ("link", F, NEW), caller)
        for kind, victim, across in itertools.product(("file", "directory"), uids, (False, True)):
            to = "e/to" if across else "d/to"
            setup = (*folder(above, GROUP, mode), *folder(above, GROUP, 0o1777, "e"))
            setup += given(kind, "d/file", uid, GROUP, 0o755)
            setup += given(kind, to, victim, GROUP, 0o755)
            title = f"{kind} of {uid} over {victim} in {mode:o} of {above}"
            yield Case(title, setup, ("rename", F, Here(to)), caller)
            yield Case(title, setup, ("rename2", F, Here(to), EXCHANGE), caller)


# --- paths ------------------------------------------------------------------------------------

_LONGEST = "n" * 255
SHAPES = (
    "", "d/", "d/.", "d/..", "d/./file", "d//file", "d/file/", "d/file/.", "d/file/..", "d/none/x",
    "d/file/x", "d/fifo/x", "d/ring/x", "d/ring", "d/dangling/x", "d/dangling", "d/dangling/",
    "d/aim/x", "d/aim/", "d/aim/.", "d/aim/..", "d/tofile/", "d/tofile/x", "d/sub/../file",
    f"d/{_LONGEST}", f"d/{_LONGEST}n", f"d/{_LONGEST}n/x", f"d/{_LONGEST}/x", "d/none/", "d/none/.",
    "d/none/..", "d/sub/", "d/sub/.", "d/" + "./" * 2040 + "file", "d/" + "./" * 2050 + "file",
    "d/" + "/" * 4000 + "file", "d/" + "sub/../" * 500 + "file",
)  # fmt: skip


def shapes() -> Iterator[Case]:
    """Every operation on paths of every shape."""
    setup = (
        *folder(), *make("file", "d/file"), *make("fifo", "d/fifo"), *make("ring", "d/ring"),
        *make("dangling", "d/dangling"), ("mkdir", Here("d/sub")),
        ("symlink", "sub", Here("d/aim")), ("symlink", "file", Here("d/tofile")),
    )  # fmt: skip
    for shape, (name, call) in itertools.product(SHAPES, OPERATIONS.items()):
        words = tuple(Here(shape) if word == F else word for word in call)
        title = shape if len(shape) < 40 else f"{shape[:20]}… of {len(shape)}"
        yield Case(f"{name} of {title}", setup, words)


def chains() -> Iterator[Case]:
    """Symbolic links that lead to symbolic links."""
    for length in (1, 20, 39, 40, 41, 60):
        setup: list[Call] = [*folder(), *make("file", "d/0")]
        setup += [("symlink", f"{number}", Here(f"d/{number + 1}")) for number in range(length)]
        for name in ("stat", "open to read", "chmod", "truncate same", "lstat", "unlink", "rename"):
            words = tuple(Here(f"d/{length}") if w == F else w for w in OPERATIONS[name])
            yield Case(f"{name} through {length}", tuple(setup), words)
