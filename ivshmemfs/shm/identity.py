"""Who a peer is, and when it is surely gone.

"Surely gone" means that no store of that incarnation can come any more; silence is not enough,
because a paused machine may wake up.  Two proofs are accepted:

* it ran under this very kernel (same boot id) in this pid namespace, and its process is gone or
  is another one now (the start time differs);
* it ran on this machine (same hardware UUID, which hypervisors give to one machine only) under
  an earlier boot.

/etc/machine-id is no proof: cloned images share it.
"""

from __future__ import annotations

import os
import socket
import time
import uuid as _uuid
from pathlib import Path

from ivshmemfs import __version__
from ivshmemfs.format import peer

_UNKNOWN = bytes(16)


def _read_uuid(path: str) -> bytes:
    try:
        value = _uuid.UUID(Path(path).read_text().strip()).bytes
    except (OSError, ValueError):
        return _UNKNOWN
    return _UNKNOWN if value == b"\xff" * 16 else value


def boot_id() -> bytes:
    """The running kernel's boot id; 16 zero bytes if it cannot be read."""
    return _read_uuid("/proc/sys/kernel/random/boot_id")


def machine_id() -> bytes:
    """The hardware UUID; 16 zero bytes if there is none or it is readable by root alone."""
    return _read_uuid("/sys/class/dmi/id/product_uuid")


def pid_namespace() -> int:
    """Inode number of this process's pid namespace; 0 if unknown."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(stat.rpartition(b")")[2].split()[19])


def current(incarnation: int) -> peer.SlotRecord:
    """The identity of this process, for a slot's record; state and hot words are zero."""
    pid = os.getpid()
    return peer.SlotRecord(
        state=0,
        heartbeat=0,
        intent=0,
        incarnation=incarnation,
        pid=pid,
        pid_start=start_time(pid),
        pid_namespace=pid_namespace(),
        machine=machine_id(),
        boot=boot_id(),
        host=os.fsencode(socket.gethostname())[: peer.HOST_SIZE],
        joined_ns=time.time_ns(),
        capabilities=0,
        version=__version__.encode()[:16],
        crc=0,
    )


def gone(record: peer.SlotRecord) -> bool:
    """Whether the process that `record` speaks of can surely store no more.

    `record` must be whole (its checksum right) and of the slot's present incarnation; the caller
    checks both.
    """
    boot = boot_id()
    if record.boot == _UNKNOWN or boot == _UNKNOWN:
        return False
    if record.boot == boot:
        if record.pid_namespace == 0 or record.pid_namespace != pid_namespace():
            return False
        return start_time(record.pid) != record.pid_start
    machine = machine_id()
    return machine != _UNKNOWN and record.machine == machine
