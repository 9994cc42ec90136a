"""What an argument names: a region, or a mount of one.  Each command takes either.

A mount is found in mountinfo, and its mount point is never looked at.
"""

from __future__ import annotations

import os
from contextlib import suppress

from ivshmemfs.errors import IvshmemfsError, MountError, RegionMissing, UsageError
from ivshmemfs.fuse import mountpoint
from ivshmemfs.fuse.mountpoint import MountEntry
from ivshmemfs.region import refuse_hung

#: Prefixes of regions that are not named by a path.
PREFIXES = ("pci:", "vfio:", "mem:", "file:", "label=", "uuid=", "LABEL=", "UUID=")


def mount_at(argument: str) -> MountEntry | None:
    """The ivshmemfs mount whose mount point is *argument*."""
    if not argument:
        return None
    with suppress(MountError):
        entry = mountpoint.find(mountpoint.resolve(argument))
        if entry is not None and entry.fstype == mountpoint.FSTYPE:
            return entry
    return None


def region_of(argument: str) -> str:
    """The region that *argument* names: itself, or what is mounted there.

    Raises RegionMissing for a file that went away under its mounts: its place is not to be taken.
    """
    entry = mount_at(argument)
    region = argument if entry is None else entry.source
    path = os.path.normpath(region) if region.startswith("/") else ""
    if path:
        refuse_hung(path)
    if path and not os.path.lexists(path) and (mounts := mounts_of(path)):
        listed = ", ".join(shown(mount) for mount in mounts)
        raise RegionMissing(
            f"{region}: is not there any more, but is still mounted on {listed}: "
            "unmount it, or give the file its name back"
        )
    if entry is None and region and not is_named(region) and _is_directory(region):
        raise RegionMissing(
            f"{region} is a directory, and no ivshmemfs is mounted on it: name a region or a mount "
            "point ('ivshmemfs list' shows them)"
        )
    return region


def _is_directory(path: str) -> bool:
    """Return whether a path that does not hang leads to a directory."""
    refuse_hung(path)
    return os.path.isdir(path)


def mounts_of(region: str) -> list[MountEntry]:
    """The mounts on this machine of the region that *region* names."""
    with suppress(MountError):
        if entries := mountpoint.ours():
            names = {region, canonical(region)}
            return [entry for entry in entries if entry.source in names]
    return []


def canonical(region: str) -> str:
    """Return what a mount of *region* shows as its source."""
    if not is_named(region):
        with suppress(FileNotFoundError):  # the current directory was removed
            return os.path.abspath(region)
        return region
    from ivshmemfs.format.superblock import identify
    from ivshmemfs.region import open_region

    with (
        suppress(IvshmemfsError, OSError),
        open_region(region, readonly=True, identify=identify) as opened,
    ):
        return opened.spec
    return region.removeprefix("file:")


def mount_point_of(argument: str) -> str:
    """The mount point that *argument* names: itself, or where that region is mounted.

    Raises UsageError when the region has several mounts.
    """
    if mount_at(argument) is not None:
        return argument
    mounts = mounts_of(argument)
    if len(mounts) > 1:
        listed = ", ".join(entry.path for entry in mounts)
        raise UsageError(f"{argument} is mounted {len(mounts)} times, name one: {listed}")
    return mounts[0].path if mounts else argument


def is_named(argument: str) -> bool:
    """Whether *argument* names a region by another name than a path."""
    return argument == "pci" or argument.startswith(PREFIXES)


def looks_like_region(argument: str) -> bool:
    """Whether *argument* surely names a region and no mount point."""
    if is_named(argument):
        return True
    if mount_at(argument) is not None:
        return False
    with suppress(MountError):
        target = mountpoint.resolve(argument)
        return (
            mountpoint.enclosing(target) is None
            and os.path.exists(target)
            and not (os.path.isdir(target))
        )
    return False


def shown(entry: MountEntry) -> str:
    """A mount point, and what is wrong with the mount."""
    from ivshmemfs.fuse.lifeline import condition

    trouble = condition(entry)
    return f"{entry.path} ({trouble})" if trouble else entry.path
