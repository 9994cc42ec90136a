"""Two guests and the host on one region at once, and the death or pause of one of them."""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path

import pytest

from tests.guest.conftest import Shared
from tests.guest.harness import COMMAND_SECONDS, Guest, GuestError
from tests.guest.machines import IVSHMEMFS, Host, Machine, Mount

pytestmark = pytest.mark.guest

LIBRARY = sysconfig.get_path("stdlib")
# Others wait a blink (0.1 s) for a machine that is stopped; this one may be busy with guests.
PATIENCE = 5.0

# In each round: writes a file, a larger one than before, and reads what the others wrote in that
# round.  A finished file appears by a rename, with its checksum in its name.
TRAFFIC = r"""
me=$1; rounds=$2; others=$3
mkdir "$M/$me"
seen=0; n=0
while [ $n -lt $rounds ]; do
    head -c $((n*n*1997+n)) /dev/urandom >"$M/$me/part"
    sum=$(sha256sum <"$M/$me/part"); sum=${sum%% *}
    mv "$M/$me/part" "$M/$me/$n-$sum.done"
    for other in $others; do
        set -- "$M/$other/$n-"*.done
        until [ -e "$1" ]; do sleep 0.1; set -- "$M/$other/$n-"*.done; done
        sum=${1##*-}
        [ "$(sha256sum <"$1")" = "${sum%.done}  -" ] || { echo "bad: $1"; exit 1; }
        seen=$((seen+1))
    done
    n=$((n+1))
done
echo $seen
"""


def traffic(mount: Mount, names: list[str], rounds: int) -> str:
    """Shell text of one machine's part."""
    me = mount.machine.name
    others = " ".join(name for name in names if name != me)
    return f"set -- {me} {rounds} '{others}'\n{TRAFFIC}"


def test_each_writes_and_reads_the_files_of_the_others(
    shared: Shared, host: Host, guests: list[Guest]
) -> None:
    rounds = 12
    machines: list[Machine] = [host, *guests]
    mounts = [shared.on(machine) for machine in machines]
    names = [mount.machine.name for mount in mounts]
    peers = host.run(IVSHMEMFS, "peers", guests[0].regions[0]).check().out
    for guest in guests:
        assert guest.name in peers
    running = [mount.begin(traffic(mount, names, rounds), timeout=300) for mount in mounts]
    for command in running:
        assert int(command.wait().check().out) == 2 * rounds
    seen = [mount.manifest(".") for mount in mounts]
    assert len(seen[0]) == 3 + 3 * rounds
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("how", ["QEMU stands still", "QEMU stops the machine"])
def test_a_guest_paused_in_the_middle_of_a_copy_delays_nobody_and_goes_on(
    how: str, shared: Shared, host: Host, guest: Guest
) -> None:
    here, sleeper = shared.on(host), shared.on(guest)
    copying = sleeper.begin(f"cp -a {LIBRARY}/asyncio $M/")
    deadline = time.monotonic() + COMMAND_SECONDS
    while len(here.sh("ls $M/asyncio 2>/dev/null || true").split()) < 5:
        assert time.monotonic() < deadline, "the copy did not begin"
    pause, resume = guest.pause, guest.resume
    if how == "QEMU stops the machine":
        pause, resume = (lambda: guest.qmp("stop")), (lambda: guest.qmp("cont"))  # type: ignore[assignment]
    pause()
    try:
        slowest = 0.0
        for number in range(50):
            begin = time.monotonic()
            (Path(here.place) / f"file{number}").write_text("written meanwhile")
            slowest = max(slowest, time.monotonic() - begin)
        here.sh(f"cp -a {LIBRARY}/json $M/json; rm $M/file?; mv $M/file10 $M/ten")
    finally:
        resume()
    assert slowest < PATIENCE
    copying.wait().check()
    assert here.manifest("asyncio") == sleeper.manifest("asyncio")
    assert sleeper.sh("cat $M/ten; ls $M | wc -l") == "written meanwhile42\n"


def test_a_guest_killed_in_the_middle_of_a_copy_harms_nobody(
    shared: Shared, host: Host, guests: list[Guest]
) -> None:
    here, victim, witness = (shared.on(machine) for machine in (host, guests[1], guests[0]))
    victim.sh("mkdir $M/copy; echo before >$M/copy/done")
    copying = victim.begin(f"cp -a {LIBRARY}/asyncio $M/copy/; sleep 600")
    deadline = time.monotonic() + COMMAND_SECONDS
    while len(here.sh("ls $M/copy/asyncio 2>/dev/null || true").split()) < 5:
        assert time.monotonic() < deadline, "the copy did not begin"
    guests[1].kill()
    with pytest.raises(GuestError, match="no answer"):
        copying.wait()

    begin = time.monotonic()
    here.sh("echo after >$M/after")
    assert time.monotonic() - begin < PATIENCE
    assert witness.sh("cat $M/after $M/copy/done") == "after\nbefore\n"
    here.sh(f"cp -a {LIBRARY}/json $M/json; rm -r $M/copy")
    assert witness.sh("ls $M") == "after\njson\n"
    assert witness.manifest("json") == here.manifest("json")
    shared.check(host)
