"""`mount` and `umount`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ivshmemfs.cli.attach.complete import complete_mount
from ivshmemfs.cli.attach.names import looks_like_region, mount_point_of
from ivshmemfs.cli.exits import exits
from ivshmemfs.command import tell_systemd
from ivshmemfs.completion import complete_region
from ivshmemfs.errors import (
    RegionAmbiguous,
    RegionDenied,
    RegionError,
    RegionMissing,
    UsageError,
)
from ivshmemfs.fuse import daemon
from ivshmemfs.fuse.options import MountOptions, parse
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say

if TYPE_CHECKING:
    from ivshmemfs.region import Candidate, Roots, Unreadable

HELP = """Mount the filesystem on REGION.

REGION is a file (also file:PATH), a character device, pci, pci:ADDRESS, mem:ADDRESS:SIZE,
label=LABEL or uuid=UUID.  Without it, the one ivshmem device that carries a filesystem is mounted.

\b
Options (-o), separated by commas:
  ro                  read only; stores nothing in the region
  allow_other         let other users use the mount
  uid=N, gid=N        show every file as owned by this user or group
  umask=NNN           take these permission bits away from what is shown
  noacl               neither obey nor show POSIX access lists
  suid, dev           allow set-user-ID programs and device nodes (root only)
  noexec, sync        as in mount(8); options without effect here are ignored
  remount,ro          make a mount read-only until remount,rw (root only)
  mmap                shared mappings on kernels before 6.6, by the page cache
  locks=shared|local  flock(2), fcntl(2) locks hold on all mounts, or on this
  notify              report changes of other machines to inotify
  doorbell=SOCKET     ring and sleep by the server there; off for polling
  log=FILE            write the log to FILE
  loop=poll|trio      how to wait for requests

nosuid and nodev are on unless suid or dev is given.  Permissions are always checked.
"""


MOUNT = Manual(
    examples=(
        Example("ivshmemfs mount /dev/shm/hello /mnt/shared", "Mount a file, on the host."),
        Example("ivshmemfs mount /mnt/shared", "Mount the one ivshmem device, in a guest."),
        Example(
            "ivshmemfs mount -o ro,allow_other label=hello /mnt/shared",
            "Mount by label, read only, for all users.",
        ),
    ),
    exits=exits({0: "mounted", 32: "not mounted: the region or the mount point cannot be used"}),
)
UMOUNT = Manual(
    examples=(
        Example("ivshmemfs umount /mnt/shared", "Unmount a mount point."),
        Example("ivshmemfs umount /dev/shm/hello", "Unmount where this region is mounted."),
    ),
    exits=exits({0: "unmounted", 32: "nothing is mounted there, or it is in use"}),
)


@click.command("mount", cls=Command, help=HELP, manual=MOUNT)
@click.argument("region", required=False, shell_complete=complete_region)
@click.argument("mountpoint", required=False)  # click.Path would look at it
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Mount options, see above.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground, log to stderr.")
@click.option("--log", metavar="FILE", help="Write the log to FILE.")
@click.option("-r", "--read-only", is_flag=True, help="The same as -o ro.")
@click.option("--as-helper", is_flag=True, hidden=True)
@click.option("--drop-suid-dev", is_flag=True, hidden=True)
@click.option("-s", "sloppy", is_flag=True, hidden=True)
@click.option("-n", "no_mtab", is_flag=True, hidden=True)
@click.option("-v", "verbose", is_flag=True, hidden=True)
@click.option("-w", "read_write", is_flag=True, hidden=True)
@click.option("-t", "fstype", hidden=True)
def mount_command(
    region: str | None,
    mountpoint: str | None,
    options: tuple[str, ...],
    foreground: bool,
    log: str | None,
    read_only: bool,
    as_helper: bool,
    drop_suid_dev: bool,
    **_passed_by_mount: object,
) -> None:
    """Mount the filesystem on REGION."""
    if region is None:
        raise UsageError("name a mount point: ivshmemfs mount [REGION] MOUNTPOINT")
    target = mountpoint if mountpoint is not None else region
    _refuse_nameless(target)
    chosen = parse(options)
    if mountpoint is None:
        if as_helper and not chosen.remount:
            raise UsageError("name a region and a mount point")
        if looks_like_region(region):
            raise UsageError(
                f"{region} is a region; name the mount point too: "
                f"ivshmemfs mount {region} MOUNTPOINT"
            )
        region = None
    chosen.readonly |= read_only
    if log is not None:
        chosen.log = log
    if drop_suid_dev:
        chosen.suid = chosen.dev = False
    if chosen.remount:
        daemon.remount(target, chosen)
        return
    notice = daemon.mount(
        _attach(region, chosen), target, chosen, foreground=foreground, on_ready=tell_systemd
    )
    if notice:
        say(f"ivshmemfs: {notice}", err=True)


def _refuse_nameless(mountpoint: str) -> None:
    """Reject "", which would otherwise mean the current directory."""
    if not mountpoint:
        raise UsageError("the mount point has no name: an empty variable, perhaps?")


def _attach(spec: str | None, options: MountOptions) -> daemon.Attach:
    """How the daemon enters the region."""

    @contextmanager
    def attach() -> Iterator[daemon.Attached]:
        # Imported here: the parent of a daemon ends sooner without them.
        from ivshmemfs.cli.attach.peer import enter, older_peers
        from ivshmemfs.doorbell.finding import doorbell_of
        from ivshmemfs.format.superblock import identify
        from ivshmemfs.region import open_region, uncached

        found = the_one_device() if spec is None else spec
        with open_region(found, readonly=options.readonly, identify=identify) as region:
            bell = None if options.readonly else doorbell_of(region, options.doorbell, at_once=True)
            try:
                fs = enter(region, readonly=options.readonly, doorbell=bell)
                try:
                    notices = (uncached(region), older_peers(fs.table.peers()))
                    yield daemon.Attached(fs, region.spec, "; ".join(filter(None, notices)))
                finally:
                    fs.unmount()
            finally:
                if bell is not None:
                    bell.close()

    return attach


def the_one_device(roots: Roots | None = None) -> str:
    """The one ivshmem device here that carries a filesystem, as open_region takes it."""
    from ivshmemfs.format.superblock import identify
    from ivshmemfs.region import Roots, discover, identified, no_device

    roots = roots or Roots()
    devices = [candidate for candidate in discover(roots) if candidate.device]
    if not devices and not roots.has_sysfs:
        raise no_device(roots)
    if not devices:
        raise RegionMissing(
            "there is no ivshmem device here: name the region, such as a file in /dev/shm "
            "('ivshmemfs list' shows what there is)"
        )
    found, unreadable = identified(devices, identify, roots)
    if len(found) == 1:
        return found[0][0].spec
    if found:
        raise RegionAmbiguous(
            f"{len(found)} devices carry a filesystem, name one: "
            + "; ".join(_named(candidate, names) for candidate, names in found)
        )
    if unreadable:
        raise _cannot_tell(unreadable)
    listed = ", ".join(f"{one.spec} ({one.description})" for one in devices)
    raise RegionMissing(
        f"no device here carries a filesystem, looked at {listed}: is it the right one? "
        "A new one is made with mkfs.ivshmemfs"
    )


def _cannot_tell(unreadable: list[Unreadable]) -> RegionError:
    """The error when no filesystem was found, but not every device could be read."""
    if all(isinstance(one.error, RegionDenied) for one in unreadable) and os.geteuid() != 0:
        listed = ", ".join(one.candidate.spec for one in unreadable)
        return RegionDenied(f"no permission to read {listed}: run as root")
    reasons = "; ".join(str(one.error) for one in unreadable)
    return RegionError(f"no device that can be read carries a filesystem: {reasons}")


def _named(candidate: Candidate, names: tuple[str, str]) -> str:
    label, uuid = names
    return f"{candidate.spec} (label {label!r}, uuid {uuid})"


@click.command("umount", cls=Command, manual=UMOUNT)
@click.argument("mountpoint", shell_complete=complete_mount)  # click.Path would look at it
@click.option(
    "-l", "--lazy", is_flag=True, help="Detach it even when it is in use; open files fail then."
)
def umount_command(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT, also when its daemon is dead or stopped.

    MOUNTPOINT may also be a region that is mounted once.  Returns when the daemon has left the
    region.
    """
    _refuse_nameless(mountpoint)
    if notice := daemon.umount(mount_point_of(mountpoint), lazy=lazy):
        say(f"ivshmemfs: {notice}", err=True)
