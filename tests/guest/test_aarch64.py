"""What the other tests of this folder take for granted when their guests are ARM64 machines.

`scripts/aarch64-check --exchange` runs them so: with the wheel that a user would install there, and
with every exchange once through write-combining and once through device memory.
"""

from __future__ import annotations

import os

import pytest

from tests.guest.conftest import Shared
from tests.guest.harness import Guest, arm_parts
from tests.guest.machines import FSCK, IVSHMEMFS, Host

pytestmark = pytest.mark.guest

if arm_parts() is None:
    pytest.skip("boots ARM64 guests: run scripts/aarch64-check", allow_module_level=True)

ACCESS = {"pci": "resource2_wc, 64 MiB, write-combining", "resource2": "64 MiB, device memory"}


def test_the_guest_is_an_arm64_machine_with_the_projects_wheel(guest: Guest) -> None:
    assert guest.sh("uname -m") == "aarch64\n"
    tag = "grep ^Tag /usr/local/lib/python3.11/dist-packages/ivshmemfs-*.dist-info/WHEEL"
    abi = "abi3" if os.environ.get("IVSHMEMFS_COMPILE") == "0" else "cp311"
    assert guest.sh(tag) == f"Tag: cp311-{abi}-linux_aarch64\n"


def test_the_mapping_is_the_one_that_was_asked_for(shared: Shared, guest: Guest) -> None:
    found = guest.run(IVSHMEMFS, "info", shared.source(guest)).check().out
    assert ACCESS[shared.route] in found
    assert ("aligned accesses only" in found) == (shared.route == "resource2")


def test_both_sides_call_it_clean(shared: Shared, guest: Guest, host: Host) -> None:
    here, there = shared.on(host), shared.on(guest)
    here.sh("cp -a /usr/lib/python3.11/json $M/one")
    there.sh("cp -a /usr/lib/python3.11/json $M/two")
    assert "peers    2 of" in host.run(IVSHMEMFS, "info", shared.region).check().out
    here.unmount()
    there.unmount()
    for machine, source in ((host, str(shared.region)), (guest, shared.source(guest))):
        assert "clean; " in machine.run(FSCK, "-n", source).check().out
