"""Regions that grow between two boots of a guest: the host's way, and the guest's own.

One guest with two regions.  The host grows the first with `ivshmemfs resize`, while the guest still
has the old device, and then boots it with a larger one.  The second region's file grows alone; the
guest finds a device that is larger than its filesystem, and resizes it itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import ready
from tests.guest.harness import Guest, Recipe
from tests.guest.machines import FSCK, IVSHMEMFS, MKFS, Host, Mount

#: Three boots, 10 minutes under emulation.
pytestmark = [pytest.mark.guest, pytest.mark.long]

SMALL, LARGE = 8 << 20, 32 << 20  # bytes
#: A file that the small region has no room for; bytes.
BIG = 12_000_000


@pytest.fixture
def growing(regions: list[Path], host: Host) -> Iterator[list[Path]]:
    """Two small formatted regions."""
    paths = [Path(f"{regions[0]}-grows-{who}") for who in ("on-host", "in-guest")]
    for path in paths:
        host.run(MKFS, "--size", str(SMALL), path).check()
    yield paths
    for path in paths:
        path.unlink()


@pytest.fixture
def guest(workplace: Path, recipe: Recipe, growing: list[Path]) -> Iterator[Guest]:
    """A guest with both, booted with the sizes that their files have."""
    guest = Guest(recipe, "grows", growing, workplace)
    try:
        ready(guest)
        yield guest
    finally:
        guest.close()


def available(mount: Mount) -> int:
    """Bytes that a file may still take, as df(1) sees it."""
    return int(mount.sh("df -B1 --output=avail $M | tail -n 1"))


def one_line(*said: str) -> str:
    """The only line that a command printed."""
    (line,) = "".join(said).splitlines()
    return line


def test_a_region_grows_between_two_boots(
    guest: Guest, growing: list[Path], host: Host, tmp_path: Path
) -> None:
    by_host, by_guest = growing
    mounts = [Mount(guest, f"/run/grow{index}") for index in range(2)]
    there = Mount(host, str(tmp_path))
    try:
        _before(guest, mounts, by_host, host)
        _old_device(guest, mounts[0], by_host, host, there)
        guest.close()
        with by_guest.open("r+b") as file:  # as a user does that gives QEMU another size
            file.truncate(LARGE)
        ready(guest)
        _larger_device(guest, mounts, there)
    finally:
        for mount in (there, *mounts):
            mount.abandon()
    for path in growing:
        assert "clean" in host.run(FSCK, "-n", path).check().out
        info = json.loads(host.run(IVSHMEMFS, "info", "--json", path).check().out)
        assert info["blocks"] * info["block_size"] > LARGE * 9 // 10


def _before(guest: Guest, mounts: list[Mount], region: Path, host: Host) -> None:
    """The guest writes to both; a region that a guest has mounted does not grow."""
    for index, mount in enumerate(mounts):
        guest.run("/bin/mkdir", "-p", mount.place).check()
        guest.run(IVSHMEMFS, "mount", guest.device(index), mount.place).check()
        mount.sh("head -c 1000000 /dev/urandom >$M/old; mkdir $M/tree; echo text >$M/tree/file")
        assert available(mount) < BIG
    refused = host.run(IVSHMEMFS, "resize", region, str(LARGE))
    assert refused.exit == 1
    assert "is in use by" in one_line(refused.out, refused.err)
    assert region.stat().st_size == SMALL
    for mount in mounts:
        mount.unmount()


def _old_device(guest: Guest, mount: Mount, region: Path, host: Host, there: Mount) -> None:
    """The host grows it and fills the new room; the guest's old device shows a part of it."""
    host.run(IVSHMEMFS, "resize", region, str(LARGE)).check()
    host.run(IVSHMEMFS, "mount", region, there.place).check()
    there.sh(f"head -c {BIG} /dev/urandom >$M/big; echo more >>$M/tree/file")
    refused = guest.run(IVSHMEMFS, "mount", guest.device(0), mount.place)
    assert refused.exit == 32
    line = one_line(refused.out, refused.err)
    assert f"the region has {SMALL} bytes, smaller than the {LARGE} bytes" in line
    assert "start a guest again with the size of the host's file in QEMU's options" in line
    refused = guest.run(IVSHMEMFS, "resize", guest.device(0))
    assert refused.exit != 0
    assert f"{LARGE}" in one_line(refused.out, refused.err)
    checked = guest.run(FSCK, "-y", guest.device(0))
    assert checked.exit not in (0, 1)
    assert "Traceback" not in checked.err
    there.sh("test $(cat $M/tree/file | wc -l) = 2")


def _larger_device(guest: Guest, mounts: list[Mount], there: Mount) -> None:
    """Both devices are larger now: one has the files that the host added, one is resized here."""
    guest.run("/bin/mkdir", "-p", *(mount.place for mount in mounts)).check()
    guest.run(IVSHMEMFS, "mount", "-o", "notify", guest.device(0), mounts[0].place).check()
    sums = "cd $M; sha256sum big old tree/file"
    assert mounts[0].sh(sums) == there.sh(sums)
    waiting = mounts[0].begin(f"{IVSHMEMFS} wait --timeout 60 $M/told && cat $M/told")
    there.sh("rm $M/big; echo told >$M/.told; mv $M/.told $M/told")
    assert waiting.wait().check().out == "told\n"
    mounts[0].sh(f"head -c {BIG} /dev/zero >$M/mine")
    assert there.sh("stat -c %s $M/mine") == f"{BIG}\n"
    there.unmount()
    resized = guest.run(IVSHMEMFS, "resize", guest.device(1)).check().out
    assert "8 MiB -> 32 MiB" in resized
    guest.run(IVSHMEMFS, "mount", guest.device(1), mounts[1].place).check()
    assert mounts[1].sh("cat $M/tree/file; stat -c %s $M/old") == "text\n1000000\n"
    assert available(mounts[1]) > BIG
    mounts[1].sh(f"head -c {BIG} /dev/urandom >$M/big")
    for mount in mounts:
        mount.unmount()
