"""What is concluded from an identity and from one's own place: a table, and real surroundings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ivshmemfs.format import peer
from ivshmemfs.format.peer import ALL_PROOFS, BOOT_PROVES, MACHINE_PROVES, START_PROVES
from ivshmemfs.shm import identity
from ivshmemfs.shm.identity import Presence, Surroundings

ALIVE, GONE, UNKNOWN = Presence.ALIVE, Presence.GONE, Presence.UNKNOWN
HERE = Surroundings(b"b" * 16, b"machine of tests", 40, 50, ALL_PROOFS)
OTHER_BOOT = {"boot": b"o" * 16}

# What differs in the record, what differs here, whether such a process exists, its start time.
TABLE = [
    # under one kernel, in one pid namespace
    ({}, {}, True, 7, ALIVE),
    ({}, {}, False, 0, GONE),
    ({}, {}, None, 0, UNKNOWN),
    ({}, {}, True, 8, GONE),  # the number belongs to another process now
    ({}, {}, True, 0, UNKNOWN),  # its start time may not be read: hidepid
    # start times that do not compare
    ({}, {"time_namespace": 51}, True, 8, UNKNOWN),
    ({"time_namespace": 0}, {}, True, 8, UNKNOWN),
    ({"proofs": BOOT_PROVES}, {}, True, 8, UNKNOWN),
    ({}, {"proofs": BOOT_PROVES}, True, 8, UNKNOWN),  # a foreign /proc
    ({}, {"proofs": BOOT_PROVES}, False, 0, GONE),  # which ESRCH does not ask
    ({"pid_start": 0}, {}, True, 8, UNKNOWN),
    # other pid namespaces
    ({"pid_namespace": 41}, {}, False, 0, UNKNOWN),
    ({"pid_namespace": 0}, {}, False, 0, UNKNOWN),
    ({"pid_namespace": 0}, {"pid_namespace": 0}, False, 0, UNKNOWN),
    # a boot id that is not the kernel's own, on either side
    ({"proofs": 0}, {}, False, 0, UNKNOWN),
    ({}, {"proofs": 0}, False, 0, UNKNOWN),
    ({"proofs": START_PROVES | MACHINE_PROVES}, {}, False, 0, UNKNOWN),
    # another boot of this machine, or not
    (OTHER_BOOT, {}, True, 7, GONE),
    ({**OTHER_BOOT, "machine": b"other machine..."}, {}, False, 0, UNKNOWN),
    ({**OTHER_BOOT, "proofs": BOOT_PROVES | START_PROVES}, {}, False, 0, UNKNOWN),
    (OTHER_BOOT, {"proofs": BOOT_PROVES | START_PROVES}, False, 0, UNKNOWN),
    ({**OTHER_BOOT, "proofs": MACHINE_PROVES}, {}, False, 0, UNKNOWN),
    # a second owner was found
    ({"nonce": peer.TWIN_MARK}, {}, False, 0, UNKNOWN),
    ({**OTHER_BOOT, "nonce": peer.TWIN_MARK}, {}, False, 0, UNKNOWN),
]


@pytest.mark.parametrize(("record", "here", "exists", "start", "expected"), TABLE)
def test_the_decision(
    record: dict[str, object],
    here: dict[str, object],
    exists: bool | None,
    start: int,
    expected: Presence,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(identity, "process_exists", lambda _: exists)
    monkeypatch.setattr(identity, "start_time", lambda _: start)
    known = identity.current(1)._replace(
        boot=HERE.boot, machine=HERE.machine, pid_namespace=40, time_namespace=50,
        pid_start=7, proofs=ALL_PROOFS,
    )  # fmt: skip
    told = known._replace(**record)  # type: ignore[arg-type]
    standing = HERE._replace(**here)  # type: ignore[arg-type]
    assert identity.presence(told, standing) is expected


def test_a_uuid_of_two_machines_proves_nothing() -> None:
    told = identity.current(1)._replace(
        boot=b"o" * 16, machine=HERE.machine, proofs=ALL_PROOFS
    )  # fmt: skip
    assert identity.presence(told, HERE) is GONE
    assert identity.presence(told, HERE, {HERE.machine}) is UNKNOWN


@pytest.mark.parametrize("pid", [0, -1, 1 << 31, (1 << 64) - 1, (1 << 22) + 1])
def test_a_number_that_is_no_pid_is_never_signalled(
    pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signalled"))
    assert identity.process_exists(pid) is None


@pytest.mark.parametrize(
    ("error", "exists"),
    [(ProcessLookupError, False), (PermissionError, True), (OSError, None), (None, True)],
)
def test_what_a_signal_tells(
    error: type[OSError] | None, exists: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: int) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    assert identity.process_exists(os.getpid()) is exists


def test_uuids_that_many_machines_have() -> None:
    for machine in (bytes(16), b"\xff" * 16, b"\xfe" * 16, *identity.PLACEHOLDERS):
        assert identity.is_placeholder(machine)
    assert not identity.is_placeholder(os.urandom(16))


PROC = "22 1 0:21 / /proc rw,nosuid - proc proc rw\n"
ROOT = "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
BOOT_ID = "/proc/sys/kernel/random/boot_id"


@pytest.mark.parametrize(
    ("mounts", "genuine"),
    [
        (ROOT + PROC, True),
        (PROC + ROOT, True),
        (ROOT + PROC + "30 22 0:21 /sys /proc/sys ro - proc proc rw\n", True),
        (ROOT + PROC + f"30 22 0:25 /run/boot_id {BOOT_ID} ro - tmpfs tmpfs rw\n", False),
        (ROOT + PROC + f"30 22 0:21 /sys/kernel/random/uuid {BOOT_ID} ro - proc p rw\n", False),
        (ROOT + PROC + "30 22 0:25 / /proc/sys/kernel/random ro shared:1 - tmpfs t rw\n", False),
        (ROOT + PROC + "30 22 0:25 / /proc/sys/kernel/ran ro - tmpfs t rw\n", True),
        (ROOT + "22 1 0:21 / /proc rw - fuse.lxcfs lxcfs rw\n", False),
        (ROOT, False),
        ("", False),
        ("nonsense\n", False),
    ],
)
def test_a_boot_id_that_is_mounted_over(
    mounts: str, genuine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda _: mounts.encode())
    assert identity.boot_id_is_genuine() is genuine


@pytest.mark.parametrize(
    ("line", "own"),
    [("NSpid:\t{pid}", True), ("NSpid:\t4711\t{pid}", False), ("NSpid:\t4711", False), ("", False)],
)
def test_a_proc_of_another_pid_namespace(
    line: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = f"Name:\tpython\n{line.format(pid=os.getpid())}\nUid:\t0\n"
    monkeypatch.setattr(Path, "read_bytes", lambda _: status.encode())
    assert identity.proc_is_own() is own
