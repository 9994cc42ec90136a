"""The Debian package under a running systemd: units, lines of fstab, boots, failures, shutdowns.

systemd is the first process of a Debian in namespaces of this machine (tests/support/booted.py).
The first boot installs the package; the second one finds what docs/setup.md tells a user to write.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.booted import Machine, missing_for_systemd
from tests.support.programs import find
from tests.support.roots import debian_root

TOP = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_for_systemd()), reason=missing_for_systemd()),
]

UUID = "5d1f8c2e-6f0e-4c1c-9a55-7b7a3c0b4c11"
REQUIRES = "x-systemd.requires=ivshmemfs-region@hello.service"
FSTAB = f"""
file:/dev/shm/hello  /mnt/shared  ivshmemfs  nofail,{REQUIRES}  0 0
label=hello          /mnt/label   ivshmemfs  nofail,{REQUIRES}  0 0
label=hello          /mnt/net     ivshmemfs  _netdev,nofail,allow_other,noatime,{REQUIRES}  0 0
uuid={UUID}          /mnt/auto    ivshmemfs  nofail,noauto,x-systemd.automount  0 0
"""
#: What the log of systemd says of one unit, as `systemctl status` shows it to a user.
STATUS = "systemctl status --no-pager --full"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package without the compiled engine, which takes seconds and not minutes to make."""
    if not sys.executable.startswith(str(TOP / ".venv")):
        pytest.skip("builds on the environment that scripts/setup makes")
    find("dpkg-deb")
    place = tmp_path_factory.mktemp("deb")
    subprocess.run(
        ["sh", TOP / "scripts/deb", place], check=True, timeout=1500, capture_output=True,
        env={**os.environ, "IVSHMEMFS_COMPILE": "0"},
    )  # fmt: skip
    (made,) = place.glob("ivshmemfs_0.1.0_*.deb")
    return made


@pytest.fixture(scope="module", params=["bookworm", pytest.param("trixie", marks=pytest.mark.long)])
def installed(
    request: pytest.FixtureRequest, package: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The layers of a Debian on which a boot has installed the package."""
    root, place = debian_root(request.param, "systemd-sysv"), tmp_path_factory.mktemp("installed")
    machine = Machine([root], place, place)
    done = machine.boot(
        "dpkg -i /root/*.deb >/dev/null; systemctl enable ivshmemfs-region@hello", [package]
    )
    assert (done.state, done.exit) == ("running", "0"), done.out
    return [machine.changes, root]


@pytest.fixture
def machine(installed: list[Path], tmp_path: Path) -> Iterator[Machine]:
    """A Debian that has the package, switched off; its /dev/shm is seen from here as well."""
    shm = Path(tempfile.mkdtemp(prefix="ivshmemfs-test-", dir="/dev/shm"))
    made = Machine(installed, tmp_path, shm)
    made.write("etc/ivshmemfs/hello.conf", f"SIZE=8M\nMKFS=-U {UUID}\n")
    made.write("etc/fstab", FSTAB)
    yield made
    shutil.rmtree(shm)


def test_a_boot_mounts_what_fstab_says_and_a_shutdown_takes_it_down(machine: Machine) -> None:
    machine.write(  # the mounts have to wait for it, however slow it is
        "etc/systemd/system/ivshmemfs-region@.service.d/late.conf",
        "[Service]\nExecStartPre=sleep 2\n",
    )
    done = machine.boot(f"""
        systemctl enable --now ivshmemfs-server@hello ivshmemfs@hello 2>/dev/null
        {STATUS} mnt-shared.mount ivshmemfs-server@hello ivshmemfs@hello >/root/statuses
        ! grep FAILURE /root/statuses
        grep -c 'active (' /root/statuses
        echo text >/mnt/shared/file
        for place in label net auto hello; do cat /mnt/$place/file; done
        test -S /run/ivshmemfs/hello.sock
        cat /proc/mounts
        journalctl -p info -u ivshmemfs@hello -o cat | grep mounted
        mkdir /mnt/hand
        ivshmemfs mount -o notify label=hello /mnt/hand
        sleep 1000 </mnt/shared/file &
        sleep 1000 </mnt/hello/file &
    """)
    assert done.exit == "0", done.out
    assert done.state == "running"
    assert done.out.splitlines()[:5] == ["3", *["text"] * 4]
    places = re.findall(r"^/dev/shm/hello (\S+) fuse\.ivshmemfs ", done.out, re.MULTILINE)
    assert sorted(places) == [
        f"/mnt/{name}" for name in ("auto", "hello", "label", "net", "shared")
    ]
    assert re.search(r"^INFO: /mnt/hello: mounted; ", done.out, re.MULTILINE)
    region = machine.shm / "hello"
    left = subprocess.run(
        [BIN / "ivshmemfs", "peers", region], capture_output=True, text=True, check=True
    )
    assert "no machine has it mounted for writing" in left.stdout
    checked = subprocess.run(
        [BIN / "fsck.ivshmemfs", "-n", region], capture_output=True, text=True, check=True
    )
    assert ": clean" in checked.stdout
    said = log_of_shutdown(machine)
    assert len(re.findall(r"/mnt/\S+: unmounted$", said, re.MULTILINE)) == 6, said
    assert "its open files fail" not in said
    assert "Failed unmounting" not in said
    assert "SIGKILL" not in said


def log_of_shutdown(machine: Machine) -> str:
    """What the machine's journal has of all boots."""
    done = machine.boot("journalctl --no-pager -o short")
    assert done.exit == "0", done.out
    return done.out


def test_a_mount_comes_again_when_its_daemon_dies(machine: Machine) -> None:
    done = machine.boot("""
        systemctl start ivshmemfs@hello
        echo text >/mnt/hello/file
        kill -9 $(systemctl show -P MainPID ivshmemfs@hello)
        for n in $(seq 600); do cat /mnt/hello/file 2>/dev/null && break; sleep 0.1; done
        systemctl stop ivshmemfs@hello
        grep -c /mnt/hello /proc/mounts || true
        systemctl is-failed ivshmemfs@hello || true
    """)
    assert (done.exit, done.out.split()[-3:]) == ("0", ["text", "0", "inactive"]), done.out


#: unit, file in /etc/ivshmemfs, its text, what the status says.
FAILURES = [
    ("ivshmemfs-region@x", "x.conf", "SIZE=3M", "QEMU refuses a device of 3 MiB; use 2M or 4M"),
    ("ivshmemfs-region@x", "x.conf", "SIZE=1T", "do not fit there"),
    ("ivshmemfs-region@x", "x.conf", "SIZE=some", "some"),
    ("ivshmemfs-region@x", "x.conf", "GROUP=none", "invalid group: ‘none’"),
    ("ivshmemfs-region@hello", "hello.conf", "SIZE=16M", "'ivshmemfs resize' makes it larger"),
    ("ivshmemfs-region@junk", "junk.conf", "SIZE=1M", "is not an ivshmemfs filesystem"),
    ("ivshmemfs-server@x", "x.server.conf", "VECTORS=2", "/dev/shm/x: no such file"),
    ("ivshmemfs-server@hello", "hello.server.conf", "GROUP=none", "none"),
    ("ivshmemfs-server@hello", "hello.server.conf", "VECTORS=0", "vectors"),
    ("ivshmemfs@x", "x.mount.conf", "OPTIONS=ro", "no region is label=x"),
    ("ivshmemfs@hello", "hello.mount.conf", "OPTIONS=nonsense", "nonsense"),
    ("mnt-bad.mount", "x.conf", "", "no region is label=bad"),
]


def test_a_failure_says_its_reason_in_the_status(machine: Machine) -> None:
    machine.write("etc/fstab", FSTAB + "label=bad /mnt/bad ivshmemfs noauto 0 0\n")
    steps = "".join(
        f"""
        printf '{text}\\n' >/etc/ivshmemfs/{name}
        systemctl restart {unit} >/dev/null 2>&1 && echo started
        sleep 1.5; journalctl --sync
        echo '=== {number}'
        {STATUS} {unit} || true
        systemctl stop {unit}; systemctl reset-failed {unit}
        rm -f /dev/shm/x /etc/ivshmemfs/{name}
        """
        for number, (unit, name, text, _) in enumerate(FAILURES)
    )
    done = machine.boot("set +e; head -c 1048576 /dev/urandom >/dev/shm/junk" + steps)
    parts = re.split(r"^=== \d+\n", done.out, flags=re.MULTILINE)[1:]
    assert len(parts) == len(FAILURES), done.out
    for (unit, _, _, wanted), said in zip(FAILURES, parts, strict=True):
        logged = said.partition("\n\n")[2]
        assert wanted in logged, (unit, wanted, said)
        assert "Traceback" not in said
        assert "failed (Result: exit-code)" in said, (unit, said)
    assert "started" not in done.out


def test_a_failing_region_holds_up_no_boot(machine: Machine) -> None:
    machine.write("etc/ivshmemfs/hello.conf", "SIZE=3M\n")
    done = machine.boot("""
        systemctl --failed --plain --no-legend --no-pager | cut -d' ' -f1
        echo --- ; grep -c fuse.ivshmemfs /proc/mounts || true
        systemctl is-active multi-user.target
    """)
    assert done.exit == "0", done.out
    assert done.out.splitlines() == ["ivshmemfs-region@hello.service", "---", "0", "active"]
