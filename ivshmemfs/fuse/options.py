"""The ``-o`` options of a mount: what each means, and where it goes.

Four kinds: options of the kernel's mount, handed to fusermount3 as they are; options of this
filesystem; words without effect here, which are ignored; and words that ask for what cannot be
had, which are refused with the reason.  Ignored are all generic options of mount(8) that only fstab
or mount(8) itself care about, those about access times (reading does not change them), and what
/proc/mounts shows of a mount, so that its column of options can be given back.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ivshmemfs.errors import UsageError

#: Handed to the kernel by fusermount3.
_KERNEL_FLAGS = frozenset(("sync", "async", "dirsync", "exec", "noexec", "atime", "noatime"))
#: Without effect here: always so, or meant for mount(8) and fstab.
_IGNORED = frozenset(
    (
        *("defaults", "auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner"),
        *("group", "nogroup", "nofail", "_netdev", "silent", "loud", "mand", "nomand"),
        *("relatime", "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime"),
        *("diratime", "nodiratime", "iversion", "noiversion", "symfollow"),
        *("default_permissions", "nonempty", "nosuid", "nodev"),
    )
)
#: The same with a value: a mount's source is always its region, its type always this one.
_IGNORED_VALUES = frozenset(
    (
        *("fsname", "subtype", "comment", "uhelper", "helper"),
        *("fd", "rootmode", "user_id", "group_id", "max_read", "blksize"),
    )
)
_SELINUX = frozenset(("context", "fscontext", "defcontext", "rootcontext"))
#: What cannot be had, and why.
_REFUSED = {
    "allow_root": "use allow_other",
    "auto_unmount": "a dead daemon's mount is cleared by 'ivshmemfs umount'",
    "nosymfollow": "fusermount3 does not know it",
    "loop": "a region is a file already; how to wait for requests is loop=poll or loop=trio",
}
SELINUX = "/sys/fs/selinux"
#: Flags of mount(2) by the words for them, for a remount.
_MOUNT_FLAGS = {"nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "noatime": 1024}
_OPPOSITES = {"exec": "noexec", "atime": "noatime", "async": "sync"}
_MS_RDONLY, _MS_REMOUNT = 1, 32
#: How the daemon waits for requests; see `loop`.
LOOPS = ("poll", "trio")
#: Between which programs flock(2) and fcntl(2) locks hold: of all mounts, or of this one.
LOCKS = ("shared", "local")


@dataclass
class MountOptions:
    """What the user asked for."""

    readonly: bool = False
    allow_other: bool = False
    suid: bool = False
    dev: bool = False
    #: Present every file as owned by this user or group; None presents the stored owner.
    uid: int | None = None
    gid: int | None = None
    #: Permission bits taken away from every file, as it is presented.
    umask: int = 0
    #: Open files through the page cache, so that shared mappings work on kernels before 6.6.
    mmap: bool = False
    loop: str = "poll"
    locks: str = "shared"
    log: str | None = None
    #: Change a mount that is there.
    remount: bool = False
    kernel_flags: list[str] = field(default_factory=list)

    @property
    def root_only(self) -> bool:
        """Whether only root may use the mount, and the daemon checks permissions.

        It costs the kernel a request more for each look at a name.  See `rights`.
        """
        if self.allow_other or self.loop != "poll" or os.geteuid() != 0:
            return False
        from ivshmemfs.fuse.callers import can_tell

        return can_tell()


def parse(groups: Iterable[str]) -> MountOptions:
    """Parse the arguments of all ``-o`` options; a later word overrides an earlier one.

    Raises UsageError that names the offending word.
    """
    options = MountOptions()
    for word in (word for group in groups for word in group.split(",")):
        if word:
            _apply(options, word)
    _check(options)
    return options


def _apply(options: MountOptions, word: str) -> None:
    name, equals, value = word.partition("=")
    if _means_nothing(name, equals):
        pass
    elif equals:
        setter = _VALUED.get(name)
        if setter is None:
            raise UsageError(f"unknown mount option '{word}': see 'ivshmemfs mount --help'")
        if not value:
            raise UsageError(f"mount option '{name}' needs a value")
        setter(options, value)
    elif name in _REFUSED:
        raise UsageError(f"mount option '{name}' cannot be had: {_REFUSED[name]}")
    elif name in _VALUED:
        raise UsageError(f"mount option '{name}' needs a value: {name}=...")
    elif name in _FLAGS:
        attribute, flag = _FLAGS[name]
        setattr(options, attribute, flag)
    elif name in _KERNEL_FLAGS:
        options.kernel_flags.append(name)
    else:
        raise UsageError(f"unknown mount option '{word}': see 'ivshmemfs mount --help'")
    if name in ("nosuid", "nodev"):
        setattr(options, name.removeprefix("no"), False)


def _means_nothing(name: str, equals: str) -> bool:
    """Whether an option is without effect; raises UsageError where SELinux would need it."""
    if name.startswith(("x-", "X-")):
        return True
    if name in _SELINUX and equals:
        if os.path.isdir(SELINUX):
            raise UsageError(
                f"mount option '{name}' cannot be had: fusermount3 does not pass it on"
            )
        return True
    return name in (_IGNORED_VALUES if equals else _IGNORED)


def _check(options: MountOptions) -> None:
    for name in ("suid", "dev"):
        if getattr(options, name) and os.geteuid() != 0:
            raise UsageError(f"mount option '{name}' is for root alone")


def remount_flags(options: MountOptions) -> int:
    """The flags of mount(2) that give a mount these options."""
    on = {f"no{name}" for name in ("suid", "dev") if not getattr(options, name)}
    for word in options.kernel_flags:
        on.discard(_OPPOSITES.get(word, ""))
        on.add(word)
    flags = _MS_REMOUNT | (_MS_RDONLY if options.readonly else 0)
    return flags | sum(_MOUNT_FLAGS.get(word, 0) for word in on)


def fusermount_options(options: MountOptions, source: str) -> str:
    """The options in fusermount3's syntax; *source* is what df(1) shows as the device."""
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={escaped}", "subtype=ivshmemfs", *_common(options, direct=True)]
    return ",".join(words)


def libfuse_options(options: MountOptions, source: str) -> set[str]:
    """The options for a mount by libfuse itself, which takes them one by one, in ASCII."""
    escaped = re.sub(r"[^ -~]|[,\\]", "?", source)
    return {f"fsname={escaped}", "subtype=ivshmemfs", *_common(options, direct=False)}


def _common(options: MountOptions, *, direct: bool) -> list[str]:
    words = ["ro" if options.readonly else "rw"]
    if not (options.root_only and direct):
        words.append("default_permissions")
    words += [name for name in ("allow_other", "suid", "dev") if getattr(options, name)]
    return words + options.kernel_flags


# --- the words --------------------------------------------------------------------------------


def _set_uid(options: MountOptions, value: str) -> None:
    options.uid = _identity("uid", value, lambda name: pwd.getpwnam(name).pw_uid)


def _set_gid(options: MountOptions, value: str) -> None:
    options.gid = _identity("gid", value, lambda name: grp.getgrnam(name).gr_gid)


def _identity(option: str, value: str, lookup: Callable[[str], int]) -> int:
    if re.fullmatch("[0-9]+", value) and int(value) < 2**32 - 1:
        return int(value)
    try:
        return lookup(value)
    except KeyError:
        raise UsageError(f"mount option '{option}={value}': no such number or name") from None


def _set_umask(options: MountOptions, value: str) -> None:
    if not re.fullmatch("[0-7]{1,4}", value) or int(value, 8) > 0o777:
        raise UsageError(f"mount option 'umask={value}': give an octal number up to 777")
    options.umask = int(value, 8)


def _set_loop(options: MountOptions, value: str) -> None:
    if value not in LOOPS:
        raise UsageError(f"mount option 'loop={value}': give one of {', '.join(LOOPS)}")
    options.loop = value


def _set_locks(options: MountOptions, value: str) -> None:
    if value not in LOCKS:
        raise UsageError(f"mount option 'locks={value}': give one of {', '.join(LOCKS)}")
    options.locks = value


def _set_log(options: MountOptions, value: str) -> None:
    options.log = value


_FLAGS: dict[str, tuple[str, bool]] = {
    "ro": ("readonly", True),
    "rw": ("readonly", False),
    "allow_other": ("allow_other", True),
    "suid": ("suid", True),
    "dev": ("dev", True),
    "mmap": ("mmap", True),
    "remount": ("remount", True),
}
_VALUED: dict[str, Callable[[MountOptions, str], None]] = {
    "uid": _set_uid,
    "gid": _set_gid,
    "umask": _set_umask,
    "loop": _set_loop,
    "locks": _set_locks,
    "log": _set_log,
}
