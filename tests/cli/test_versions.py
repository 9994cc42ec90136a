"""Several versions of the program on one region."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivshmemfs import __version__
from ivshmemfs.cli.attach.peer import older_peers
from ivshmemfs.format import peer, superblock
from tests.cli.conftest import complains, ivshmemfs
from tests.support.mounts import needs_fuse
from tests.support.regions import TestRegion


def say_version(made: TestRegion, slot: int, version: bytes) -> None:
    """Another version in the identity of a slot."""
    memory, at = made.region().memory, 4096 + (slot - 1) * peer.SLOT_SIZE
    record = peer.SLOT.unpack(memory.read(at, peer.SLOT_SIZE))._replace(version=version)
    memory.write(at + peer.IDENTITY_OFFSET, peer.encode_identity(record))


@needs_fuse
def test_a_mount_tells_which_peers_are_older(formatted: TestRegion, place: Path) -> None:
    formatted.mount()
    say_version(formatted, 1, b"0.0.9")
    result = ivshmemfs("mount", formatted.path, place)
    assert result.returncode == 0
    assert f"this is ivshmemfs {__version__} and slot 1 (idle, pid " in result.stderr
    assert "runs 0.0.9: use one version on all machines" in result.stderr
    assert result.stderr.count("\n") == 1
    lines = ivshmemfs("peers", formatted.path).stdout.splitlines()
    cells = [line.split()[-2:] for line in lines[1:3]]
    assert cells == [["0.0.9", "-"], [__version__, str(place)]]
    assert lines[3] == "readers leave no trace: a read-only mount stores nothing"
    assert ivshmemfs("umount", place).returncode == 0


@pytest.mark.parametrize("version", [__version__.encode(), b"99.1", b"", b"\x1b[31m"])
def test_others_are_not_spoken_of(version: bytes, formatted: TestRegion) -> None:
    fs = formatted.mount()
    say_version(formatted, 1, version)
    told = older_peers(fs.table.peers())
    assert "\x1b" not in told
    assert not told or b"\x1b" in version


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"minor": superblock.MINOR + 1}, "use a matching version"),
        ({"layout_signature": 1}, "use the same version of ivshmemfs on all machines"),
        (
            {"layout_signature": 1, "maker": b"0.0.7"},
            f"0.0.7, are laid out differently from those of this ivshmemfs {__version__}",
        ),
        ({"layout_signature": 1, "maker": b""}, "made by another build, are laid out differently"),
        (
            {"minor": 9, "maker": b"7.1"},
            f"1.9, made by ivshmemfs 7.1, and this is ivshmemfs {__version__}",
        ),
    ],
)
def test_what_is_incompatible_is_refused(
    change: dict[str, object], says: str, formatted: TestRegion, tmp_path: Path
) -> None:
    memory = formatted.region().memory
    whole = superblock.SUPERBLOCK.unpack(memory.read(0, superblock.SUPERBLOCK.size))
    memory.write(0, superblock.seal(superblock.SUPERBLOCK.changed(whole, change)))
    (tmp_path / "place").mkdir()
    complains(ivshmemfs("mount", formatted.path, tmp_path / "place"), 32, says)
