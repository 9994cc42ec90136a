"""The ``-o`` options of a mount.

There are four kinds: options of the kernel's mount, which fusermount3 gets unchanged; options of
this filesystem; ignored words; and refused words, with a reason.  Ignored are all generic options
of mount(8) that concern only fstab or mount(8) itself, and those about access times, which do not
change here.  Ignored too are the words that /proc/mounts shows, so a user can copy them from there.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ivshmemfs.errors import UsageError

#: fusermount3 passes these to the kernel.
_KERNEL_FLAGS = frozenset(("sync", "async", "dirsync", "exec", "noexec", "atime", "noatime"))
#: Words without effect here: always true here, or meant for mount(8) and fstab.
_IGNORED = frozenset(
    (
        *("defaults", "auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner"),
        *("group", "nogroup", "nofail", "_netdev", "silent", "loud", "mand", "nomand"),
        *("relatime", "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime"),
        *("diratime", "nodiratime", "iversion", "noiversion", "symfollow"),
        *("default_permissions", "nonempty", "nosuid", "nodev"),
    )
)
#: Words without effect that have a value: source and type of a mount cannot be chosen.
_IGNORED_VALUES = frozenset(
    (
        *("fsname", "subtype", "comment", "uhelper", "helper"),
        *("fd", "rootmode", "user_id", "group_id", "max_read", "blksize"),
    )
)
_SELINUX = frozenset(("context", "fscontext", "defcontext", "rootcontext"))
#: Refused words, and the reason.
_REFUSED = {
    "allow_root": "use allow_other",
    "auto_unmount": "a dead daemon's mount is cleared by 'ivshmemfs umount'",
    "nosymfollow": "fusermount3 does not know it",
    "loop": "a region is a file already; loop=poll or loop=trio chooses the wait for requests",
}
SELINUX = "/sys/fs/selinux"
#: Flags of mount(2) by option, for a remount.
_MOUNT_FLAGS = {"nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "noatime": 1024}
_OPPOSITES = {"exec": "noexec", "atime": "noatime", "async": "sync"}
_MS_RDONLY, _MS_REMOUNT = 1, 32
#: The ways to wait for requests; see `loop`.
LOOPS = ("poll", "trio")
#: Between which programs flock(2) and fcntl(2) locks hold: of all mounts, or of this one.
LOCKS = ("shared", "local")


@dataclass
class MountOptions:
    """The options of one mount."""

    readonly: bool = False
    allow_other: bool = False
    suid: bool = False
    dev: bool = False
    #: Present every file as owned by this user or group; None presents the stored owner.
    uid: int | None = None
    gid: int | None = None
    #: Permission bits that no file shows.
    umask: int = 0
    #: Obey and show POSIX access lists; a mount with uid=, gid= or umask= never does.
    acl: bool = True
    #: Open files through the page cache, which allows shared mappings on kernels before 6.6.
    mmap: bool = False
    #: Report changes of other machines to inotify and fanotify.
    notify: bool = False
    loop: str = "poll"
    locks: str = "shared"
    #: The socket of the server whose clients ring; "off" for none, None to look for one.
    doorbell: str | None = None
    log: str | None = None
    #: Change an existing mount.
    remount: bool = False
    kernel_flags: list[str] = field(default_factory=list)

    @property
    def root_only(self) -> bool:
        """Whether only root may use the mount, and the daemon checks permissions (`rights`).

        Checks by the kernel cost one more request for each look-up.
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
    """Return whether an option has no effect; raises UsageError if SELinux would need it."""
    if name.startswith(("x-", "X-")):
        return True
    if name in _SELINUX and equals:
        if os.path.isdir(SELINUX):
            raise UsageError(
                f"mount option '{name}' cannot be had: fusermount3 does not pass it to the kernel"
            )
        return True
    return name in (_IGNORED_VALUES if equals else _IGNORED)


def _check(options: MountOptions) -> None:
    for name in ("suid", "dev"):
        if getattr(options, name) and os.geteuid() != 0:
            raise UsageError(f"mount option '{name}' is for root alone")
    if options.notify and options.loop != "poll":
        raise UsageError(f"mount option 'notify' needs loop=poll, not loop={options.loop}")
    if options.notify and options.readonly:
        raise UsageError("mount option 'notify' cannot be had with 'ro': mount it read-write")


def mount_flags(options: MountOptions) -> int:
    """Return the flags of mount(2) for these options, MS_REMOUNT included."""
    on = {f"no{name}" for name in ("suid", "dev") if not getattr(options, name)}
    for word in options.kernel_flags:
        on.discard(_OPPOSITES.get(word, ""))
        on.add(word)
    flags = (_MS_REMOUNT if options.remount else 0) | (_MS_RDONLY if options.readonly else 0)
    return flags | sum(_MOUNT_FLAGS.get(word, 0) for word in on)


def fusermount_options(options: MountOptions, source: str) -> str:
    """Return the options in fusermount3's syntax; df(1) shows *source* as the device."""
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={escaped}", "subtype=ivshmemfs", "ro" if options.readonly else "rw"]
    words += _connection(options)
    words += [name for name in ("suid", "dev") if getattr(options, name)]
    return ",".join(words + options.kernel_flags)


def mount_data(options: MountOptions) -> str:
    """Return the options of the kernel's FUSE for a mount by mount(2)."""
    return ",".join(_connection(options))


def _connection(options: MountOptions) -> list[str]:
    """Return the options for the users of the connection and for the check of permissions."""
    words = [] if options.root_only else ["default_permissions"]
    return words + (["allow_other"] if options.allow_other else [])


# --- options with a value -----------------------------------------------------------------------


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


def _set_doorbell(options: MountOptions, value: str) -> None:
    options.doorbell = value if value == "off" else os.path.abspath(value)


_FLAGS: dict[str, tuple[str, bool]] = {
    "ro": ("readonly", True),
    "rw": ("readonly", False),
    "allow_other": ("allow_other", True),
    "suid": ("suid", True),
    "dev": ("dev", True),
    "acl": ("acl", True),
    "noacl": ("acl", False),
    "mmap": ("mmap", True),
    "notify": ("notify", True),
    "remount": ("remount", True),
}
_VALUED: dict[str, Callable[[MountOptions, str], None]] = {
    "uid": _set_uid,
    "gid": _set_gid,
    "umask": _set_umask,
    "loop": _set_loop,
    "locks": _set_locks,
    "log": _set_log,
    "doorbell": _set_doorbell,
}
