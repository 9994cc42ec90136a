"""Which region a guest finds: ``ivshmemfs mount`` without one, ``list``, and labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.harness import Guest
from tests.guest.machines import IVSHMEMFS, MKFS, Host

pytestmark = pytest.mark.guest


def test_the_one_formatted_device_is_found(guest: Guest, region: Path) -> None:
    assert region  # the other device carries no filesystem
    guest.sh(f"mkdir -p /run/found; {IVSHMEMFS} mount /run/found")
    try:
        assert guest.sh("grep -c ' /run/found fuse' /proc/mounts") == "1\n"
    finally:
        guest.sh(f"{IVSHMEMFS} umount /run/found")


def test_of_several_it_asks_which(guest: Guest, region: Path, host: Host) -> None:
    other = guest.regions[1]
    host.run(MKFS, "--label", "second", other).check()
    guest.sh("mkdir -p /run/found")
    asked = guest.run(IVSHMEMFS, "mount", "/run/found")
    assert asked.exit == 32
    assert "Traceback" not in asked.err
    for index, label in enumerate(("guest-test", "second")):
        line = next(line for line in asked.err.splitlines() if guest.device(index) in line)
        assert label in line
    assert guest.sh("grep -c /run/found /proc/mounts || true") == "0\n"


def test_no_formatted_device_says_what_to_do(guest: Guest, blank: list[Path]) -> None:
    assert blank
    guest.sh("mkdir -p /run/found")
    refused = guest.run(IVSHMEMFS, "mount", "/run/found")
    assert refused.exit == 32
    assert "mkfs.ivshmemfs" in refused.err
    assert "Traceback" not in refused.err


def test_list_shows_each_device_with_size_and_label(guest: Guest, region: Path) -> None:
    lines = guest.run(IVSHMEMFS, "list").check().out.splitlines()
    formatted = next(line for line in lines if guest.device(0) in line)
    assert "guest-test" in formatted
    assert any(guest.device(1) in line for line in lines)


def test_the_label_names_the_device(guest: Guest, region: Path) -> None:
    guest.sh(f"mkdir -p /run/found; {IVSHMEMFS} mount label=guest-test /run/found")
    guest.sh(f"{IVSHMEMFS} umount /run/found")
