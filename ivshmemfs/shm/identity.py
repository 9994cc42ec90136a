"""Who a peer is, and whether its process is there: `presence`, by which everybody decides.

GONE means that no store of that incarnation can come any more.  Two things prove it:

* ESRCH: it ran under this very kernel (same boot id) in this pid namespace, and its process id is
  nobody's now, or somebody's who started at another time;
* it ran on this machine (same hardware UUID) under another boot id.

Everything else is UNKNOWN, and each side says of itself which of these it may be judged by
(`peer.BOOT_PROVES` and the others), because it alone can know:

* a boot id that is mounted over (systemd-nspawn does that) is not the kernel's own;
* a hardware UUID speaks for whoever is in the initial pid namespace.  A container shares it with
  its host, under a boot id that may be made up.  Some makers give one to all their boards;
* a /proc of another pid namespace shows other processes under the same numbers, and start times
  are shifted by the reader's time namespace.  One that may not be read (hidepid) says nothing.

Silence is no proof, because a paused machine may wake up; but nobody is taken for dead without
it either (`shm/watch.py`), because what is compared here may have been cloned.
/etc/machine-id is not looked at: cloned images share it.
"""

from __future__ import annotations

import os
import socket
import time
import uuid as _uuid
from collections.abc import Container
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from ivshmemfs import __version__
from ivshmemfs.format import peer
from ivshmemfs.format.peer import BOOT_PROVES, MACHINE_PROVES, START_PROVES

_UNKNOWN = bytes(16)
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_PRODUCT_UUID = "/sys/class/dmi/id/product_uuid"
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # the kernel's own constant
LAST_PID = 1 << 22  # Linux hands out none above

#: Hardware UUIDs that makers put into every board, in both orders of bytes; besides, those of
#: one byte repeated.
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
    """What is known of a peer's process."""

    GONE = "gone"
    ALIVE = "alive"
    UNKNOWN = "unknown"


class Surroundings(NamedTuple):
    """What this process knows of its own surroundings; the fields as in a slot's record."""

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
    """What stands for the running kernel's boot id; 16 zero bytes if it cannot be read."""
    return _read_uuid(_BOOT_ID)


def machine_id() -> bytes:
    """The hardware UUID; 16 zero bytes if there is none or it is readable by root alone."""
    return _read_uuid(_PRODUCT_UUID)


def _namespace(kind: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return 0


def pid_namespace() -> int:
    """Inode number of this process's pid namespace; 0 if unknown."""
    return _namespace("pid")


def time_namespace() -> int:
    """Inode number of this process's time namespace; 0 if unknown, or if there is no such thing."""
    return _namespace("time")


def boot_id_is_genuine() -> bool:
    """Whether nothing is mounted over the kernel's boot id."""
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
    """Whether /proc lists the processes of this process's own pid namespace."""
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return False
    for line in status.splitlines():
        if line.startswith(b"NSpid:"):
            return line.split()[1:] == [str(os.getpid()).encode()]
    return False


def is_placeholder(machine: bytes) -> bool:
    """Whether a hardware UUID is one that many machines have."""
    return len(set(machine)) == 1 or machine in PLACEHOLDERS


def surroundings() -> Surroundings:
    """Where this process runs."""
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
    """Whether this pid namespace has a process `pid`; None when that is not to be known."""
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
    """Start time of a process in clock ticks since boot; 0 if it cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        return int(stat.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def current(incarnation: int) -> peer.SlotRecord:
    """The identity of this process, for a slot's record; state and hot words are zero."""
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
        host=os.fsencode(socket.gethostname())[: peer.HOST_SIZE],
        joined_ns=time.time_ns(),
        capabilities=0,
        version=__version__.encode()[:16],
        time_namespace=here.time_namespace,
        proofs=here.proofs,
        crc=0,
    )


# --- the decision ---------------------------------------------------------------------------


def presence(
    record: peer.SlotRecord, here: Surroundings | None = None, shared: Container[bytes] = ()
) -> Presence:
    """What is known of the process that `record` speaks of.

    `record` must be whole (its checksum right) and of the slot's present incarnation; the caller
    checks both, and that its owner shows no life (`shm/watch.py` does).  `shared` are hardware
    UUIDs that were seen on two machines.
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
