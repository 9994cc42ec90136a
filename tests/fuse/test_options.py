"""The -o options: what is accepted, what each becomes, and how a wrong one is named."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from ivshmemfs.errors import UsageError
from ivshmemfs.fuse import options
from ivshmemfs.fuse.options import MountOptions, fusermount_options, mount_data, parse


def test_nothing_given() -> None:
    assert parse([]) == MountOptions()
    assert parse(["", ",,"]) == MountOptions()


def test_later_words_override() -> None:
    assert parse(["ro", "rw"]).readonly is False
    assert parse(["rw,ro"]).readonly is True
    assert parse(["umask=077,umask=022"]).umask == 0o022


def test_values() -> None:
    chosen = parse(["uid=0,gid=4294967294", "umask=7,allow_other,mmap,loop=trio,log=/x/y=z"])
    assert chosen.uid == 0
    assert chosen.gid == 4294967294
    assert chosen.umask == 7
    assert chosen.allow_other
    assert chosen.mmap
    assert chosen.loop == "trio"
    assert chosen.locks == "shared"
    assert parse(["locks=local"]).locks == "local"
    assert chosen.log == "/x/y=z"


def test_names_instead_of_numbers() -> None:
    someone = pwd.getpwall()[-1]
    assert parse([f"uid={someone.pw_name}"]).uid == someone.pw_uid


#: Every filesystem-independent option of mount(8) but those that have an effect here.
GENERIC = (
    "defaults,auto,noauto,user,nouser,users,owner,group,nofail,_netdev,nosuid,nodev,silent,loud,"
    "relatime,norelatime,strictatime,nostrictatime,lazytime,nolazytime,diratime,nodiratime,"
    "iversion,noiversion,mand,nomand,symfollow,comment=c,x-systemd.automount,x-a=b,X-mount.mkdir"
)
#: What mountinfo and /proc/mounts show of a mount.
SHOWN = (
    "fd=5,rootmode=40000,user_id=0,group_id=0,default_permissions,max_read=4096,blksize=4096,"
    "fsname=/dev/shm/x,subtype=ivshmemfs,nonempty"
)


@pytest.mark.parametrize("words", [GENERIC, SHOWN])
def test_words_without_effect(words: str) -> None:
    assert parse([words]) == MountOptions()
    for word in words.split(","):
        assert parse([word]) == MountOptions(), word


def test_words_of_selinux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(options, "SELINUX", str(tmp_path / "none"))
    assert parse(["context=system_u:object_r:tmp_t:s0"]) == MountOptions()
    monkeypatch.setattr(options, "SELINUX", str(tmp_path))
    with pytest.raises(UsageError, match="'context' cannot be had"):
        parse(["context=x"])


def test_flags_of_a_remount() -> None:
    always = 32 | 2 | 4  # MS_REMOUNT, MS_NOSUID, MS_NODEV
    assert options.mount_flags(parse(["remount,rw"])) == always
    assert options.mount_flags(parse(["remount,ro,noexec"])) == always | 1 | 8
    assert options.mount_flags(parse(["remount,noexec,exec,sync,noatime"])) == always | 16 | 1024


@pytest.mark.skipif(os.geteuid() != 0, reason="suid is for root")
def test_what_mount_2_gets() -> None:
    assert options.mount_flags(parse(["ro,suid"])) == 1 | 4
    assert mount_data(parse(["allow_other,noexec"])) == "default_permissions,allow_other"


def test_kernel_flags_are_passed_on() -> None:
    chosen = parse(["noexec,noatime"])
    assert chosen.kernel_flags == ["noexec", "noatime"]
    assert {"noexec", "noatime"} <= set(fusermount_options(chosen, "s").split(","))
    assert options.mount_flags(chosen) & (8 | 1024) == 8 | 1024


@pytest.mark.skipif(os.geteuid() != 0, reason="suid and dev are for root")
def test_suid_and_dev() -> None:
    assert parse(["suid,dev"]).suid
    assert parse(["suid,dev"]).dev
    assert parse(["suid,dev,nosuid,nodev"]) == MountOptions()
    assert "suid" in fusermount_options(parse(["suid"]), "s").split(",")
    assert "suid" not in fusermount_options(parse([]), "s").split(",")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("frobnicate", "frobnicate"),
        ("allow_root", "use allow_other"),
        ("auto_unmount", "umount"),
        ("nosymfollow", "nosymfollow"),
        ("loop", "loop=poll"),
        ("uid", "uid"),
        ("uid=", "uid"),
        ("uid=no such user", "no such user"),
        ("uid=-1", "-1"),
        ("uid=4294967295", "4294967295"),
        ("gid=1.5", "1.5"),
        ("umask=9", "umask=9"),
        ("umask=1777", "1777"),
        ("umask=", "umask"),
        ("loop=fast", "loop=fast"),
        ("ro=1", "ro=1"),
    ],
)
def test_wrong_words_are_named(words: str, named: str) -> None:
    with pytest.raises(UsageError, match="mount option") as caught:
        parse([words])
    assert named in str(caught.value)
    assert caught.value.exit_code == 1


def test_suid_is_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for word in ("suid", "dev"):
        with pytest.raises(UsageError, match="root"):
            parse([word])


def test_the_source_is_escaped() -> None:
    assert "fsname=a\\,b\\\\c," in fusermount_options(MountOptions(), "a,b\\c")
