"""What the other tests of this folder take for granted when their guests are ARM64 machines.

`scripts/aarch64-check --exchange` runs them so: with the wheel that a user would install there, and
with every exchange once through write-combining and once through device memory.
"""

from __future__ import annotations

import os

import pytest

from tests.guest.conftest import Shared
from tests.guest.harness import Guest, arm_parts
from tests.guest.machines import FSCK, IVSHMEMFS, Host, Mount, play

pytestmark = pytest.mark.guest

if arm_parts() is None:
    pytest.skip("boots ARM64 guests: run scripts/aarch64-check", allow_module_level=True)

ACCESS = {"pci": "resource2_wc, 64 MiB, write-combining", "resource2": "64 MiB, device memory"}

#: One machine waits for a name, a change and records, all at once.  What it was told is in the
#: directory as well.
WAITER = """
$I receive -n 2 -t 250 $M/queue >$M/received & receive=$!
$I wait -t 250 $M/ready & wait=$!
$I watch $M/box >$M/told
wait $wait
wait $receive
"""
#: The other one makes names until the first sees them, and then all else that it waits for.
TELLER = """
n=0
until [ -s $M/told ]; do : >$M/box/$n; n=$((n+1)); sleep 0.2; done
: >$M/ready
$I send $M/queue 'one record' another
rm -r $M/box
"""
#: A lock that another machine holds is refused, and waited for.
HOLDER = """
$I lock $M/lock -- /bin/sh -c ': >$0/held; until [ -e $0/refused ]; do sleep 0.1; done
echo holder >>$0/order' $M
"""
FOLLOWER = """
until [ -e $M/held ]; do sleep 0.1; done
$I lock -n -E 75 $M/lock true || [ $? = 75 ]
[ ! -e $M/order ]
: >$M/refused
$I lock -w 250 $M/lock -- /bin/sh -c 'echo follower >>$0/order' $M
"""


@pytest.fixture(params=["host first", "guest first"])
def two(request: pytest.FixtureRequest, shared: Shared, host: Host, guest: Guest) -> list[Mount]:
    """Two machines, each once in either part."""
    mounts = [shared.on(host), shared.on(guest)]
    return mounts if request.param == "host first" else mounts[::-1]


def at_once(mounts: list[Mount], *scripts: str) -> None:
    """Run a script on each mount, where $I is the command."""
    running = [
        mount.begin(f"I={IVSHMEMFS}\n{script}")
        for mount, script in zip(mounts, scripts, strict=True)
    ]
    for command in running:
        command.wait().check()


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


def test_one_waits_for_names_changes_and_records_of_the_other(two: list[Mount]) -> None:
    waiter, _ = two
    waiter.sh("mkdir $M/box")
    at_once(two, WAITER, TELLER)
    assert waiter.sh("cat $M/received") == "one record\nanother\n"
    assert "created" in waiter.sh("cat $M/told")
    waiter.sh(f"{IVSHMEMFS} map --release $M/queue")


def test_a_lock_of_one_excludes_the_other(two: list[Mount]) -> None:
    at_once(two, HOLDER, FOLLOWER)
    assert two[0].sh("cat $M/order") == "holder\nfollower\n"


@pytest.mark.parametrize("how", ["flock", "fcntl"])
def test_programs_lock_files_on_two_mounts(
    shared: Shared, host: Host, guest: Guest, how: str
) -> None:
    here, there = shared.on(host), shared.on(guest)
    here.sh("echo 0 >$M/counter; : >$M/token")
    play((here, how, 10), (there, how, 10))
    assert there.sh("cat $M/counter") == "20"
