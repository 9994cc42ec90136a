"""The identity of a peer's process, and `presence`: is that process still there?

GONE means: that incarnation cannot store anything any more.  Two facts prove it:

* The peer ran under this kernel (same boot id) in this pid namespace.  Its process id is now free
  (ESRCH), or belongs to a process with another start time.
* The peer ran on this machine (same hardware UUID) under another boot id.

Everything else is UNKNOWN.  Each peer states in its slot which proofs apply to it
(`peer.BOOT_PROVES` and the others), because only the peer itself can know:

* A boot id that is mounted over (systemd-nspawn does that) is not the kernel's own.
* A hardware UUID identifies a machine only in the initial pid namespace.  A container shares the
  UUID with its host, perhaps under an invented boot id.  Some makers give one UUID to all boards.
* A /proc of another pid namespace shows other processes under the same numbers.  The reader's
  time namespace shifts start times.  An unreadable /proc (hidepid) proves nothing.

Silence is not a proof, because a paused machine may wake up.  A proof without silence is not
enough either (`shm/watch.py`), because the compared values may have been cloned.
This module ignores /etc/machine-id: cloned images share it.
"""

from __future__ import annotations

import os
import time
import uuid as _uuid
from collections.abc import Container
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from ivshmemfs import __version__
from ivshmemfs.format import peer
from ivshmemfs.format.coherence import CHECKS
from ivshmemfs.format.peer import BOOT_PROVES, MACHINE_PROVES, START_PROVES

_UNKNOWN = bytes(16)
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_PRODUCT_UUID = "/sys/class/dmi/id/product_uuid"
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of the kernel
LAST_PID = 1 << 22  # PID_MAX_LIMIT of the kernel

#: Hardware UUIDs that makers put into many boards, in both byte orders.  A UUID that repeats one
#: byte is a placeholder too (`is_placeholder`).
PLACEHOLDERS: Final = frozenset(
    _uuid.UUID(text).bytes
    for text in (
        "03000200-0400-0500-0006-000700080009",
        "00020003-0004-0005-0006-000700080009",
        "12345678-1234-5678-90ab-cddeefaabbcc",
        "78563412-3412-7856-90ab-cddeefaabbcc",
        "12345678-1234-1234-1234-123456789abc",
        "00112233-4455-6677-8899-aabbccddeeff",
        "33221100-5544-7766-8899-aabbccddeeff",
        "11111111-2222-3333-4444-555555555555",
        "4c4c4544-0000-2010-8020-80c04f202020",
        "44454c4c-0000-1020-8020-80c04f202020",
    )
)


class Presence(Enum):
    """The state of a peer's process, judged from here."""

    GONE = "gone"
    ALIVE = "alive"
    UNKNOWN = "unknown"


class Surroundings(NamedTuple):
    """Where this process runs; fields as in `peer.SlotRecord`."""

    boot: bytes
    machine: bytes
    pid_namespace: int
    time_namespace: int
    proofs: int


# --- where this process runs ----------------------------------------------------------------


def _read_uuid(path: str) -> bytes:
    try:
        return _uuid.UUID(Path(path).read_text().strip()).bytes
    except (OSError, ValueError):
        return _UNKNOWN


def boot_id() -> bytes:
    """Return the boot id of the running kernel; 16 zero bytes if it cannot be read."""
    return _read_uuid(_BOOT_ID)


def machine_id() -> bytes:
    """Return the hardware UUID; 16 zero bytes if this process cannot read one."""
    return _read_uuid(_PRODUCT_UUID)


def _namespace(kind: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return 0


def pid_namespace() -> int:
    """Return the inode number of this process's pid namespace; 0 if unknown."""
    return _namespace("pid")


def time_namespace() -> int:
    """Return the inode number of this process's time namespace; 0 if unknown or not supported."""
    return _namespace("time")


def boot_id_is_genuine() -> bool:
    """Return whether the boot id file is the kernel's own: no mount covers it."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    path, covering, genuine = _BOOT_ID.encode(), -1, False
    for line in mounts:
        before, _, after = line.partition(b" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            return False
        root, point = fields[3].rstrip(b"/"), fields[4].rstrip(b"/")
        below = path[len(point) :]
        if len(point) >= covering and path.startswith(point) and below[:1] in (b"/", b""):
            covering = len(point)
            genuine = after.split()[0] == b"proc" and root + below == path[len("/proc") :]
    return genuine


def proc_is_own() -> bool:
    """Return whether /proc lists the processes of this process's own pid namespace."""
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return False
    for line in status.splitlines():
        if line.startswith(b"NSpid:"):
            return line.split()[1:] == [str(os.getpid()).encode()]
    return False


def is_placeholder(machine: bytes) -> bool:
    """Return whether many machines have this hardware UUID."""
    return len(set(machine)) == 1 or machine in PLACEHOLDERS


def surroundings() -> Surroundings:
    """Return where this process runs, and which proofs apply to it."""
    here = Surroundings(boot_id(), machine_id(), pid_namespace(), time_namespace(), 0)
    if here.boot == _UNKNOWN or not boot_id_is_genuine():
        return here
    proofs = BOOT_PROVES
    if here.pid_namespace == INITIAL_PID_NAMESPACE and not is_placeholder(here.machine):
        proofs |= MACHINE_PROVES
    if proc_is_own():
        proofs |= START_PROVES
    return here._replace(proofs=proofs)


# --- processes ------------------------------------------------------------------------------


def process_exists(pid: int) -> bool | None:
    """Return whether this pid namespace has a process `pid`; None when kill(2) cannot tell."""
    if not 0 < pid <= LAST_PID:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    except OSError:
        return None
    return True


def start_time(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot; 0 if it cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        return int(stat.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def current(incarnation: int) -> peer.SlotRecord:
    """Return the slot record of this process; its state and hot words are zero."""
    here, pid = surroundings(), os.getpid()
    start = start_time(pid) if here.proofs & START_PROVES else 0
    return peer.SlotRecord(
        state=0,
        heartbeat=0,
        intent=0,
        nonce=0,
        incarnation=incarnation,
        pid=pid,
        pid_start=start,
        pid_namespace=here.pid_namespace,
        machine=here.machine,
        boot=here.boot,
        host=os.fsencode(os.uname().nodename)[: peer.HOST_SIZE],
        joined_ns=time.time_ns(),
        capabilities=CHECKS,
        version=__version__.encode()[:16],
        time_namespace=here.time_namespace,
        proofs=here.proofs,
        crc=0,
        operations=0,
        bytes_read=0,
        bytes_written=0,
        retries=0,
        locks=0,
        open_files=0,
        mount_point=b"",
    )


# --- the decision ---------------------------------------------------------------------------


def presence(
    record: peer.SlotRecord, here: Surroundings | None = None, shared: Container[bytes] = ()
) -> Presence:
    """Return the state of the process that `record` describes.

    The caller (`shm/watch.py`) has checked the record's checksum and incarnation, and that the
    slot's owner is silent.  `shared` holds the hardware UUIDs that were seen on two machines.
    """
    here = here or surroundings()
    both = record.proofs & here.proofs
    if not both & BOOT_PROVES or record.nonce == peer.TWIN_MARK:
        return Presence.UNKNOWN
    if record.boot == here.boot:
        return _under_this_kernel(record, here, bool(both & START_PROVES))
    same_machine = both & MACHINE_PROVES and record.machine == here.machine
    if same_machine and record.machine not in shared:
        return Presence.GONE
    return Presence.UNKNOWN


def _under_this_kernel(record: peer.SlotRecord, here: Surroundings, starts_known: bool) -> Presence:
    if not record.pid_namespace or record.pid_namespace != here.pid_namespace:
        return Presence.UNKNOWN
    exists = process_exists(record.pid)
    if exists is None:
        return Presence.UNKNOWN
    if not exists:
        return Presence.GONE
    if not starts_known or record.time_namespace != here.time_namespace:
        return Presence.UNKNOWN
    start = start_time(record.pid)
    if not start or not record.pid_start:
        return Presence.UNKNOWN
    return Presence.ALIVE if start == record.pid_start else Presence.GONE
