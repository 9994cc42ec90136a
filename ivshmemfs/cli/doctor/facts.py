"""What `doctor` knows of a machine and of a region, gathered without judging it."""

from __future__ import annotations

import grp
import importlib
import os
import pwd
import stat
import time
from contextlib import suppress
from typing import NamedTuple

from ivshmemfs.cli.attach.names import mounts_of, region_of
from ivshmemfs.cli.attach.peer import enter
from ivshmemfs.cli.peers import watched_alive
from ivshmemfs.doorbell.finding import doorbell_of, usual_socket
from ivshmemfs.errors import (
    Corrupt,
    GeometryMismatch,
    IvshmemfsError,
    MountError,
    NotFormatted,
    RegionUnfit,
    UsageError,
)
from ivshmemfs.format import superblock
from ivshmemfs.format.words import under_repair
from ivshmemfs.fuse import lifeline, mountpoint
from ivshmemfs.printing import shown
from ivshmemfs.region import Probe, Region, open_region, probe, uncached
from ivshmemfs.region.mapped import ACCESS_NAMES
from ivshmemfs.shm.bells import rings
from ivshmemfs.shm.commit import CommitWord
from ivshmemfs.shm.peers import PeerTable
from ivshmemfs.shm.repair import describe

#: Users as which libvirt runs QEMU: Debian and its kin, Fedora and its kin.
QEMU_USERS = ("libvirt-qemu", "qemu")


class QemuUser(NamedTuple):
    """The user as which libvirt runs QEMU here, and the groups of that user."""

    name: str
    uid: int
    group: str
    gids: frozenset[int]


class Machine(NamedTuple):
    """This machine; an empty string means that there is no fault."""

    fuse_device: str = ""
    has_helper: bool = True
    pyfuse3: str = ""
    qemu: QemuUser | None = None


class File(NamedTuple):
    """The file behind a region, and the file system that it is on; sizes in bytes."""

    path: str
    uid: int
    gid: int
    mode: int
    allocated: int
    fstype: str
    free: int


class Peer(NamedTuple):
    """A peer; `life` is alive, silent or gone, `joined_ns` by the clock of its machine."""

    slot: int
    shown: str
    version: str
    life: str
    joined_ns: int
    memory: str = "unknown"  # whether it sees the same memory as the others
    rings: bool = False  # whether it rings waiters after each commit


class Bell(NamedTuple):
    """The doorbell of this machine for a region: what it is, or why it cannot be used."""

    shown: str = ""  # "" without one
    is_rung: bool = False  # whether waiters here can sleep on it
    fault: str = ""


class Facts(NamedTuple):
    """A region.  `unusable` says why it cannot be opened; then only `spec` is known beside it.

    `cas` is None when nothing could be stored, for the reason `unwritable`.  Times are in ns since
    1970; `committed_ns` is the time of the last commit, by the clock of its machine.
    """

    spec: str
    unusable: str = ""
    kind: str = "file"
    access: str = "cached"
    size: int = 0
    label: str = ""
    uuid: str = ""
    unformatted: str = ""  # why there is no filesystem that can be used
    instead: str = ""  # the command that helps, without the region; "": the text above says it
    file: File | None = None
    probe: Probe = Probe(True, None, 1e4, None)
    uncached: str = ""
    cas: bool | None = True
    unwritable: str = ""
    peers: tuple[Peer, ...] = ()
    repair: str = ""
    committed_ns: int = 0
    now_ns: int = 0
    troubles: tuple[str, ...] = ()
    bell: Bell = Bell()


# --- the machine ------------------------------------------------------------------------------


def machine() -> Machine:
    """Return what this machine has for mounts and for QEMU."""
    try:
        mountpoint.check_fuse_device()
        device = ""
    except MountError as error:
        device = str(error)
    return Machine(device, mountpoint.helper() is not None, _pyfuse3_problem(), _qemu_user())


def _pyfuse3_problem() -> str:
    try:
        importlib.import_module("ivshmemfs.fuse.session")  # which loads pyfuse3, libfuse and trio
    except ImportError as error:
        return str(error)
    return ""


def _qemu_user() -> QemuUser | None:
    for name in QEMU_USERS:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            gids = frozenset(os.getgrouplist(name, entry.pw_gid))
            return QemuUser(name, entry.pw_uid, group_name(entry.pw_gid), gids)
    return None


def group_name(gid: int) -> str:
    """Return the name of a group, or its number."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


# --- a region ---------------------------------------------------------------------------------


def facts(spec: str) -> Facts:
    """Return what can be found out about a region; becomes a peer of it for a moment."""
    try:
        name = region_of(spec)
        region = open_region(name, readonly=True, identify=superblock.identify)
    except (IvshmemfsError, OSError) as error:
        return Facts(spec, unusable=str(error))
    with region:
        try:
            found = _of(region)
        except (IvshmemfsError, OSError) as error:
            return Facts(spec, unusable=str(error))
    if found.unformatted:
        return found
    cas, unwritable = _compare_and_swap(region.spec)
    return found._replace(cas=cas, unwritable=unwritable, troubles=_troubles(region.spec))


def _instead(error: IvshmemfsError, raw: bytes, size: int) -> str:
    """Return the command that helps against `error`; never one that loses files."""
    if isinstance(error, NotFormatted):
        return "mkfs.ivshmemfs"
    if isinstance(error, Corrupt):
        return "fsck.ivshmemfs -y"
    if isinstance(error, GeometryMismatch):
        smaller = superblock.SUPERBLOCK.unpack(raw).region_size < size
        return "ivshmemfs resize" if smaller else ""
    return ""


def _of(region: Region) -> Facts:
    raw = region.memory.read(0, superblock.SUPERBLOCK.size)
    found = Facts(
        region.spec, kind=region.kind, access=ACCESS_NAMES[region.memory.access],
        size=region.size, file=_file(region), probe=probe(region.memory),
        uncached=uncached(region) or "",
    )  # fmt: skip
    try:
        checked = superblock.decode(raw, region.size)
    except IvshmemfsError as error:
        return found._replace(unformatted=str(error), instead=_instead(error, raw, region.size))
    names = superblock.identify(raw) or ("", "")
    table = PeerTable(region.memory, checked.geometry, CommitWord(region.memory))
    repair = describe(table.memory) if under_repair(table.commit_word.load()) else ""
    committed = 0
    if not repair:
        committed = enter(region, readonly=True).view().root.record.time_ns
    return found._replace(
        label=names[0], uuid=names[1], repair=repair, peers=_peers(table),
        committed_ns=committed, now_ns=time.time_ns(), bell=_bell(region),
    )  # fmt: skip


def _peers(table: PeerTable) -> tuple[Peer, ...]:
    present, watch = list(table.peers()), table.watch
    alive = watched_alive(watch, {peer.slot for peer in present})
    found = []
    for peer in present:
        life = "alive" if peer.slot in alive else "gone" if watch.absent(peer) else "silent"
        joined = peer.record.joined_ns if peer.identity_valid else 0
        found.append(
            Peer(
                peer.slot, peer.describe(), peer.version, life, joined, peer.coherence, rings(peer)
            )
        )  # fmt: skip
    return tuple(found)


def _bell(region: Region) -> Bell:
    """Return the doorbell that a mount of `region` here would have; connects for a moment."""
    place = usual_socket(region) if region.kind == "file" else None
    try:
        named = str(place) if place is not None and place.exists() else None
        doorbell = doorbell_of(region, named)
    except UsageError:  # the server of another file of that name
        return Bell()
    except (IvshmemfsError, OSError) as error:
        return Bell(fault=str(error))
    if doorbell is None:
        return Bell()
    try:
        where = "its device" if place is None else f"the server at {shown(os.fsencode(place))}"
        number = doorbell.number
        return Bell(f"{where}, number {number}" if number >= 0 else where, number >= 0)
    finally:
        doorbell.close()


def _compare_and_swap(spec: str) -> tuple[bool | None, str]:
    """Return whether a peer that writes can join, or None and why nothing can be stored."""
    try:
        with open_region(spec) as region:
            enter(region, readonly=False).unmount()
    except RegionUnfit:
        return False, ""
    except (IvshmemfsError, OSError) as error:
        return None, str(error)
    return True, ""


def _troubles(spec: str) -> tuple[str, ...]:
    """Return what is wrong with the mounts of a region on this machine."""
    pairs = [(entry, lifeline.condition(entry)) for entry in mounts_of(spec)]
    return tuple(f"{shown(os.fsencode(entry.path))}: {what}" for entry, what in pairs if what)


def _file(region: Region) -> File | None:
    if region.kind != "file":
        return None
    path = os.path.realpath(region.path)
    status, behind = os.stat(path), os.statvfs(path)
    return File(
        str(region.path), status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode),
        status.st_blocks * 512, _fstype(path), behind.f_bavail * behind.f_frsize,
    )  # fmt: skip


def _fstype(path: str) -> str:
    """Return the type of the file system that a resolved path is on; "" without /proc."""
    best, found = "", ""
    with suppress(MountError):
        for entry in mountpoint.mounted():
            above = entry.path.rstrip("/") + "/"
            if path.startswith(above) and len(entry.path) >= len(best):
                best, found = entry.path, entry.fstype
    return found
