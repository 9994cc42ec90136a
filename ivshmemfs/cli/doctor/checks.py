"""The checks of `doctor`: each judges one thing from the facts, and says what to type."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ivshmemfs import __version__
from ivshmemfs.cli.doctor.facts import Facts, File, Machine, group_name
from ivshmemfs.region import exact_size, readable_size
from ivshmemfs.region.mapped import SHORT

OK, WARN, FAIL = "ok", "warn", "fail"
LEVELS = (OK, WARN, FAIL)  # from good to bad

#: File systems that keep a file in memory.
MEMORY = ("tmpfs", "hugetlbfs", "ramfs", "devtmpfs")
#: Seconds that a clock may be ahead: unnoticed, and before others ignore it (`engine/clock.py`).
AHEAD, FAR_AHEAD = 1.0, 10.0


class Finding(NamedTuple):
    """The result of one check; `do` is a command or a piece of advice, empty when all is well."""

    check: str
    level: str
    why: str
    do: str = ""


# --- the machine ------------------------------------------------------------------------------


def check_machine(machine: Machine) -> list[Finding]:
    """Return what this machine lacks for mounting."""
    if machine.fuse_device:
        what, _, do = machine.fuse_device.partition(": ")
        return [Finding("fuse", FAIL, what, do)]
    if machine.pyfuse3:
        return [Finding("fuse", FAIL, machine.pyfuse3, "apt-get install libfuse3-3")]
    if not machine.has_helper:
        do = "apt-get install fuse3"
        return [Finding("fuse", WARN, "fusermount3 is missing, so only root can mount", do)]
    return [Finding("fuse", OK, "/dev/fuse and fusermount3 are usable")]


# --- a region ---------------------------------------------------------------------------------


def check_region(facts: Facts, machine: Machine) -> list[Finding]:
    """Return a finding for each check of a region, in the order in which to act on them."""
    if facts.unusable:
        return [Finding("region", FAIL, facts.unusable, "ivshmemfs list")]
    found = [Finding("region", OK, f"{facts.kind}, {readable_size(facts.size)}"), _size(facts)]
    if facts.file is not None:
        found += [
            _access(facts.file, machine),
            _storage(facts.file),
            _reserved(facts.file, facts.size),
        ]
    found += [_mapping(facts), _alignment(facts), _format(facts)]
    if not facts.unformatted:
        checks: tuple[Callable[[Facts], Finding], ...] = (
            _cas, _coherence, _repair, _versions, _peers, _clocks, _bells, _mounts,
        )  # fmt: skip
        found += [check(facts) for check in checks]
    return found


def _size(facts: Facts) -> Finding:
    size = facts.size
    if size & (size - 1):
        above = exact_size(1 << size.bit_length())
        why = f"{size} bytes are not a power of two, and QEMU takes no other size"
        do = f"mkfs.ivshmemfs --force --size {above} {shlex.quote(facts.spec)}  # erases it"
        return Finding("size", WARN, why, do)
    return Finding("size", OK, f"{exact_size(size)}, a power of two")


def _access(file: File, machine: Machine) -> Finding:
    """Judge owner and mode: QEMU opens the file read-write, under libvirt as a user of its own."""
    path, owner = shlex.quote(file.path), f"owner {file.uid}, group {group_name(file.gid)}"
    shown = f"mode {file.mode:04o}, {owner}"
    qemu = machine.qemu
    if file.mode & 0o002:
        why = f"{shown}: every user of this machine can destroy it"
        return Finding("access", WARN, why, f"chmod o-w {path}")
    if qemu is None:
        return Finding("access", OK, f"{shown}; there is no libvirt here")
    if qemu.uid == file.uid:
        bits = file.mode >> 6
    elif file.gid in qemu.gids:
        bits = file.mode >> 3
    else:
        bits = file.mode
    if bits & 0o6 == 0o6:
        return Finding("access", OK, f"{shown}; libvirt's user {qemu.name} can write it")
    why = f"{shown}: libvirt's user {qemu.name} cannot write it"
    return Finding("access", WARN, why, f"chgrp {qemu.group} {path} && chmod g+rw {path}")


def _storage(file: File) -> Finding:
    if file.fstype in MEMORY:
        free = readable_size(file.free)
        return Finding("storage", OK, f"{file.fstype}, {free} of it free")
    if not file.fstype:
        return Finding(
            "storage", WARN, "the type of its file system is unknown", "mount -t proc proc /proc"
        )
    why = f"the file is on {file.fstype}, so the kernel writes each change to a disk"
    return Finding("storage", WARN, why, "make the region in /dev/shm")


def _reserved(file: File, size: int) -> Finding:
    """Judge whether the file has all its memory: a store to memory it cannot get is a SIGBUS."""
    missing = max(size - file.allocated, 0)
    if not missing:
        return Finding("reserved", OK, "the file has all its memory")
    do = f"fallocate --length {size} {shlex.quote(file.path)}"
    why = f"{readable_size(missing)} of the file have no memory yet"
    if missing + SHORT > file.free:
        why += (
            f", and its file system has only {readable_size(file.free)}: QEMU would die of SIGBUS"
        )
        return Finding("reserved", FAIL, why, f"make room there, then: {do}")
    return Finding("reserved", WARN, why, do)


def _mapping(facts: Facts) -> Finding:
    if not facts.uncached:
        return Finding("mapping", OK, f"{facts.access}, reads {facts.probe.read_mbps:.0f} MB/s")
    why, _, do = facts.uncached.partition("; ")
    return Finding("mapping", WARN, why, do)


def _alignment(facts: Facts) -> Finding:
    if facts.probe.unaligned_ok:
        return Finding("alignment", OK, "accesses of any alignment work")
    why = "only aligned accesses work, so short copies are slow"
    return Finding("alignment", WARN, why, "map resource2_wc, or through a kernel driver")


def _format(facts: Facts) -> Finding:
    if facts.unformatted:
        if facts.instead:
            do = f"{facts.instead} {shlex.quote(facts.spec)}"
            return Finding("format", FAIL, facts.unformatted, do)
        why, _, do = facts.unformatted.rpartition(": ")
        return Finding("format", FAIL, why or do, do)
    label = f"label {facts.label}, " if facts.label else ""
    return Finding("format", OK, f"{label}UUID {facts.uuid}")


def _cas(facts: Facts) -> Finding:
    if facts.cas is None:
        return Finding(
            "compare-and-swap", WARN, f"not tested: {facts.unwritable}", "run this as root"
        )
    if not facts.cas:
        why = "it does not work on this mapping, so writing would destroy data"
        do = "mount with -o ro, or map it cached (resource2_wc, a kernel driver)"
        return Finding("compare-and-swap", FAIL, why, do)
    return Finding("compare-and-swap", OK, "it works; a peer joined and left")


def _repair(facts: Facts) -> Finding:
    if facts.repair:
        return Finding("repair", FAIL, facts.repair, f"fsck.ivshmemfs -y {shlex.quote(facts.spec)}")
    return Finding("repair", OK, "no repair is under way")


def _coherence(facts: Facts) -> Finding:
    """Judge by what the mounts have found out; a mount without others has checked nothing."""
    apart = [peer for peer in facts.peers if peer.memory.startswith("differs")]
    if apart:
        told = "; ".join(f"{peer.shown} {peer.memory}" for peer in apart)
        do = "map the device cached there (a kernel driver), or mount it with -o ro"
        return Finding("coherence", FAIL, f"machines do not see the same memory: {told}", do)
    agree = sum(peer.memory == "agrees" for peer in facts.peers)
    return Finding("coherence", OK, f"{agree} of {len(facts.peers)} mounts checked it with others")


def _versions(facts: Facts) -> Finding:
    others = [f"{peer.shown} runs {peer.version}" for peer in facts.peers
              if peer.version and peer.version != __version__]  # fmt: skip
    if others:
        why = f"this is {__version__}, and {', '.join(others)}"
        return Finding("versions", WARN, why, "install one version on all machines")
    return Finding("versions", OK, f"all peers run {__version__}" if facts.peers else __version__)


def _peers(facts: Facts) -> Finding:
    if not facts.peers:
        return Finding("peers", OK, "no peer writes to it")
    quiet = [peer for peer in facts.peers if peer.life != "alive"]
    if not quiet:
        return Finding("peers", OK, f"{len(facts.peers)} alive")
    named = ", ".join(f"{peer.shown} is {peer.life}" for peer in quiet)
    silent = [peer for peer in quiet if peer.life == "silent"]
    if not silent:  # the next tick of any mount retires them
        return Finding("peers", OK, f"{named}; the next mount frees it")
    lines = " && ".join(f"ivshmemfs evict {shlex.quote(facts.spec)} {p.slot}" for p in silent)
    return Finding("peers", WARN, named, f"if its machine is off for good: {lines}")


def _clocks(facts: Facts) -> Finding:
    """Judge clocks: the times in the region come from others' clocks, and lie in the past."""
    latest = max((facts.committed_ns, *(peer.joined_ns for peer in facts.peers)), default=0)
    ahead = (latest - facts.now_ns) / 1e9
    if ahead <= AHEAD:
        return Finding("clocks", OK, "no time in the region is ahead of this machine's clock")
    why = f"times in the region are {ahead:.0f} s ahead of this machine's clock"
    do = "synchronise the clocks of all machines, for example with chrony"
    return Finding("clocks", FAIL if ahead > FAR_AHEAD else WARN, why, do)


def _bells(facts: Facts) -> Finding:
    """Judge the doorbell; without one nothing is wrong, because waiters poll."""
    bell = facts.bell
    if bell.fault:
        why, _, do = bell.fault.rpartition("; ")
        return Finding("bells", WARN, f"waiters poll: {why or do}", do if why else "")
    if not bell.shown:
        return Finding("bells", OK, "no doorbell here, so waiters poll")
    if not bell.is_rung:
        why = f"{bell.shown} rings; waiters poll, as no uio or VFIO driver takes its interrupts"
        return Finding("bells", OK, why)
    mute = [peer.shown for peer in facts.peers if not peer.rings]
    if mute:
        why = f"{bell.shown} works; waiters poll, as these have none: {', '.join(mute)}"
        return Finding("bells", OK, why)
    return Finding("bells", OK, f"{bell.shown} works; waiters sleep until a commit rings")


def _mounts(facts: Facts) -> Finding:
    if facts.troubles:
        return Finding(
            "mounts", FAIL, "; ".join(facts.troubles), "ivshmemfs umount the mount point"
        )
    return Finding("mounts", OK, "no mount of it here has a fault")


def worst(findings: list[Finding]) -> str:
    """Return the worst level among findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default=OK)


def as_rows(findings: list[Finding]) -> Iterator[tuple[str, str]]:
    """Yield (level and check, text) for each finding."""
    for finding in findings:
        text = finding.why + (f" -> {finding.do}" if finding.do else "")
        yield f"{finding.level:4}  {finding.check}", text
