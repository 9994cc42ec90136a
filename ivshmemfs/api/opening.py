"""`open`: from the name of a region to a client of it."""

from __future__ import annotations

import os
from contextlib import suppress

from ivshmemfs.api.client import Client
from ivshmemfs.api.session import Session, join, os_error
from ivshmemfs.api.signals import deferred
from ivshmemfs.errors import IvshmemfsError, MountError


def open(
    region: str | os.PathLike[str],
    *,
    readonly: bool = False,
    doorbell: str | os.PathLike[str] | None = None,
) -> Client:
    """Join the peers of `region` and return a client, which is a context manager.

    `region` is a path, "pci", "label=...", "uuid=...", "mem:ADDRESS:SIZE", as in all commands, or a
    mount point of ivshmemfs, which means its region.  A writing client is a peer: a thread of
    it beats.  With `readonly` it stores nothing in the region, and needs no thread.

    The waits of a writing client sleep if it has a doorbell.  A guest's device has its own.  For a
    file, `doorbell` is the socket of `ivshmemfs server`.  It defaults to the one in
    /run/ivshmemfs, if it is there; "off" means none.

    Raises FileNotFoundError, PermissionError, and OSError EINVAL for a region without a filesystem.
    Raises OSError EUSERS when the peer table is full, EBUSY when a driver holds the device, and
    ETIMEDOUT during a repair.
    """
    from ivshmemfs.doorbell.finding import doorbell_of
    from ivshmemfs.format.superblock import identify
    from ivshmemfs.region import open_region

    spec = os.fsdecode(region)
    try:
        opened = open_region(_mounted_at(spec) or spec, readonly=readonly, identify=identify)
        bell = None
        try:
            if not readonly:
                bell = doorbell_of(opened, None if doorbell is None else os.fsdecode(doorbell))
            fs = deferred(lambda: join(opened, readonly=readonly, doorbell=bell))
            return Client(Session(opened, fs), fs, opened.spec)
        except BaseException:
            if bell is not None:
                bell.close()
            opened.close()
            raise
    except (IvshmemfsError, OSError) as error:
        raise os_error(error, spec) from error


def _mounted_at(path: str) -> str | None:
    """Return the region that is mounted at `path`; looks at mountinfo, never at the mount."""
    from ivshmemfs.fuse import mountpoint

    if "=" in path or not path:
        return None
    with suppress(MountError):
        entry = mountpoint.find(mountpoint.resolve(path))
        if entry is not None and entry.fstype == mountpoint.FSTYPE:
            return entry.source
    return None
