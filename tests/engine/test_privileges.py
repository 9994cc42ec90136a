"""Privileges of a file, and what a write or a change of owner removes."""

from __future__ import annotations

import errno

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.privileges import CAPABILITY, group_bit_alone, shed
from ivshmemfs.engine.transaction import Transaction
from tests.engine.asking import fails
from tests.support.regions import ROOT, put


def shed_by(fs: Filesystem, ino: int, *, unprivileged: bool, outsider: bool) -> int:
    """Let a caller change the file; return the permission and set-ID bits that are left."""

    def plan(tx: Transaction) -> Inode:
        inode = shed(tx, tx.inode(ino), unprivileged=unprivileged, outsider=outsider)
        return tx.put(inode)

    return fs.change(plan).record.mode & 0o7777


@pytest.mark.parametrize(
    ("mode", "member", "outsider"),
    [
        (0o0644, 0o0644, 0o0644),
        (0o4755, 0o0755, 0o0755),
        (0o2755, 0o0755, 0o0755),
        (0o6755, 0o0755, 0o0755),
        (0o2644, 0o2644, 0o0644),  # no program: only an outsider removes the bit
        (0o6644, 0o2644, 0o0644),
        (0o1644, 0o1644, 0o1644),
    ],
)
def test_set_id_bits(fs: Filesystem, mode: int, member: int, outsider: int) -> None:
    for is_outsider, left in ((False, member), (True, outsider)):
        attr = put(fs, ROOT_INO, b"file", b"contents")
        fs.setattr(attr.ino, ROOT, mode=mode)
        assert shed_by(fs, attr.ino, unprivileged=False, outsider=is_outsider) == mode
        assert shed_by(fs, attr.ino, unprivileged=True, outsider=is_outsider) == left
        fs.unlink(ROOT_INO, b"file", ROOT)


@pytest.mark.parametrize(
    ("mode", "alone"), [(0o644, False), (0o2644, True), (0o2654, False), (0o2645, True)]
)
def test_the_group_bit_of_a_file_that_is_no_program(mode: int, alone: bool) -> None:
    assert group_bit_alone(mode) is alone


def test_every_caller_removes_the_capabilities_alone(fs: Filesystem) -> None:
    attr = put(fs, ROOT_INO, b"file", b"contents")
    fs.setxattr(attr.ino, b"user.kept", b"1", 0, ROOT)
    fs.setxattr(attr.ino, CAPABILITY, b"c", 0, ROOT)
    shed_by(fs, attr.ino, unprivileged=False, outsider=False)
    fails(errno.ENODATA, lambda: fs.getxattr(attr.ino, CAPABILITY))
    assert fs.getxattr(attr.ino, b"user.kept") == b"1"
    shed_by(fs, attr.ino, unprivileged=False, outsider=False)  # none is left to remove
    assert fs.listxattr(attr.ino) == [b"user.kept"]
