"""`doctor`: a table of prepared conditions, and real regions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ivshmemfs import __version__
from ivshmemfs.cli.doctor import checks
from ivshmemfs.cli.doctor import facts as facts_module
from ivshmemfs.cli.doctor.checks import FAIL, OK, WARN, check_machine, check_region
from ivshmemfs.cli.doctor.commands import doctor_command
from ivshmemfs.cli.doctor.facts import Bell, Facts, File, Machine, Peer, QemuUser
from ivshmemfs.cli.doctor.hypervisor import lines
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.region import Candidate, Probe
from tests.cli.conftest import complains, ivshmemfs
from tests.support.doorbell import serving
from tests.support.mounts import needs_fuse, run
from tests.support.regions import TestRegion

MIB, NOW = 1 << 20, 1_800_000_000 * 10**9
QEMU = QemuUser("libvirt-qemu", 64055, "libvirt-qemu", frozenset((64055, 110)))
FILE = File("/dev/shm/hello", 0, 0, 0o660, MIB, "tmpfs", 100 * MIB)
ALIVE = Peer(1, "slot 1 (idle, pid 7 on host)", __version__, "alive", NOW)
GOOD = Facts(
    "/dev/shm/hello", size=MIB, label="hello", uuid="u", file=FILE, peers=(ALIVE,),
    committed_ns=NOW, now_ns=NOW,
)  # fmt: skip
HOST = Machine(qemu=None)
NAMES = [
    "region", "size", "access", "storage", "reserved", "mapping", "alignment", "format",
    "compare-and-swap", "coherence", "repair", "versions", "peers", "clocks", "bells", "mounts",
]  # fmt: skip


def test_a_good_region_passes_every_check() -> None:
    found = check_region(GOOD, HOST)
    assert [finding.check for finding in found] == NAMES
    assert {finding.level for finding in found} == {OK}
    assert not any(finding.do for finding in found)


CASES = [
    ("size", WARN, GOOD._replace(size=3 * MIB, file=FILE._replace(allocated=3 * MIB)),
     ["3145728", "power of two"], ["mkfs.ivshmemfs", "--size 4M"]),
    ("access", WARN, GOOD._replace(file=FILE._replace(mode=0o666)),
     ["0666", "every user"], ["chmod o-w /dev/shm/hello"]),
    ("storage", WARN, GOOD._replace(file=FILE._replace(fstype="ext4")),
     ["ext4", "disk"], ["/dev/shm"]),
    ("storage", WARN, GOOD._replace(file=FILE._replace(fstype="")), ["unknown"], ["proc"]),
    ("reserved", WARN, GOOD._replace(file=FILE._replace(allocated=MIB // 2)),
     ["512 KiB"], ["fallocate --length 1048576 /dev/shm/hello"]),
    ("reserved", FAIL, GOOD._replace(file=FILE._replace(allocated=0, free=MIB // 2)),
     ["1 MiB", "512 KiB", "SIGBUS"], ["make room"]),
    ("mapping", WARN, GOOD._replace(uncached="it is not cached; a kernel driver"),
     ["not cached"], ["kernel driver"]),
    ("alignment", WARN, GOOD._replace(probe=Probe(False, None, 9000.0, None)),
     ["aligned"], ["resource2_wc"]),
    ("compare-and-swap", FAIL, GOOD._replace(cas=False), ["does not work"], ["-o ro"]),
    ("compare-and-swap", WARN, GOOD._replace(cas=None, unwritable="may only read it"),
     ["not tested", "may only read it"], ["root"]),
    ("repair", FAIL, GOOD._replace(repair="fsck on host is repairing it"),
     ["repairing"], ["fsck.ivshmemfs -y"]),
    ("coherence", FAIL, GOOD._replace(peers=(ALIVE._replace(memory="differs from slot 2"),)),
     ["same memory", "differs from slot 2", "pid 7"], ["-o ro"]),
    ("versions", WARN, GOOD._replace(peers=(ALIVE._replace(version="0.0.9"),)),
     ["0.0.9", "pid 7"], ["one version"]),
    ("peers", WARN, GOOD._replace(peers=(ALIVE, ALIVE._replace(slot=4, life="silent"))),
     ["silent"], ["ivshmemfs evict /dev/shm/hello 4"]),
    ("clocks", WARN, GOOD._replace(committed_ns=NOW + 5 * 10**9), ["5 s ahead"], ["chrony"]),
    ("clocks", FAIL, GOOD._replace(committed_ns=NOW + 3600 * 10**9), ["3600 s"], ["chrony"]),
    ("clocks", WARN, GOOD._replace(peers=(ALIVE._replace(joined_ns=NOW + 2 * 10**9),)),
     ["2 s ahead"], ["chrony"]),
    ("bells", WARN, GOOD._replace(bell=Bell(fault="/run/x.sock: permission denied; run as root")),
     ["waiters poll", "permission denied"], ["run as root"]),
    ("mounts", FAIL, GOOD._replace(troubles=("/mnt/x: daemon dead",)),
     ["/mnt/x: daemon dead"], ["umount"]),
    ("format", FAIL, GOOD._replace(unformatted="no filesystem: format it"),
     ["no filesystem"], ["format it"]),
    ("format", FAIL, GOOD._replace(unformatted="too large", instead="ivshmemfs resize"),
     ["too large"], ["ivshmemfs resize /dev/shm/hello"]),
    ("region", FAIL, Facts("/dev/shm/none", unusable="no such file"), ["no such file"], ["list"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "level", "facts", "why", "do"), CASES,
    ids=[f"{case[0]}-{case[1]}-{at}" for at, case in enumerate(CASES)],
)  # fmt: skip
def test_one_condition_gives_one_finding(
    name: str, level: str, facts: Facts, why: list[str], do: list[str]
) -> None:
    (finding,) = [one for one in check_region(facts, HOST) if one.level != OK]
    assert (finding.check, finding.level) == (name, level)
    assert [word for word in why if word not in finding.why] == []
    assert [word for word in do if word not in finding.do] == []


@pytest.mark.parametrize(
    ("bell", "rings", "words"),
    [
        (Bell(), True, ["no doorbell here"]),
        (Bell("its device"), True, ["its device rings", "waiters poll", "no uio or VFIO driver"]),
        (Bell("its device, number 3", True), True, ["sleep until a commit rings"]),
        (Bell("its device, number 3", True), False, ["waiters poll", "slot 1"]),
    ],
)
def test_what_is_said_of_bells(bell: Bell, rings: bool, words: list[str]) -> None:
    facts = GOOD._replace(bell=bell, peers=(ALIVE._replace(rings=rings),))
    (finding,) = [one for one in check_region(facts, HOST) if one.check == "bells"]
    assert finding.level == OK
    assert [word for word in words if word not in finding.why] == []


def test_the_bells_of_a_real_server(
    formatted: TestRegion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    monkeypatch.setattr(facts_module, "usual_socket", lambda _region: path)
    assert facts_module.facts(str(formatted.path)).bell == Bell()
    with serving(path, formatted.path):
        found = facts_module.facts(str(formatted.path)).bell
        assert found.is_rung
        assert str(path) in found.shown
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert "no server listens" in facts_module.facts(str(formatted.path)).bell.fault


def test_every_check_can_go_wrong() -> None:
    assert {case[0] for case in CASES} == set(NAMES)


def test_a_peer_that_is_gone_needs_no_eviction() -> None:
    facts = GOOD._replace(peers=(ALIVE._replace(life="gone"),))
    (finding,) = [one for one in check_region(facts, HOST) if one.check == "peers"]
    assert (finding.level, "evict" in finding.do) == (OK, False)


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "level"),
    [
        (0, 0, 0o660, WARN),
        (0, 64055, 0o660, OK),
        (0, 110, 0o660, OK),  # another group of that user
        (0, 64055, 0o640, WARN),
        (64055, 0, 0o600, OK),
        (64055, 64055, 0o060, WARN),  # the owner's bits count for the owner alone
    ],
)
def test_what_the_user_of_libvirt_may_do(uid: int, gid: int, mode: int, level: str) -> None:
    facts = GOOD._replace(file=FILE._replace(uid=uid, gid=gid, mode=mode))
    found = {one.check: one for one in check_region(facts, Machine(qemu=QEMU))}
    assert found["access"].level == level
    assert ("chgrp libvirt-qemu /dev/shm/hello" in found["access"].do) is (level == WARN)


@pytest.mark.parametrize(
    ("machine", "level", "why", "do"),
    [
        (Machine(), OK, "usable", ""),
        (Machine(fuse_device="/dev/fuse is missing: modprobe fuse"), FAIL, "missing", "modprobe"),
        (Machine(pyfuse3="libfuse3.so.3: cannot open"), FAIL, "libfuse3", "apt-get"),
        (Machine(has_helper=False), WARN, "fusermount3", "fuse3"),
    ],
)
def test_the_machine(machine: Machine, level: str, why: str, do: str) -> None:
    (finding,) = check_machine(machine)
    assert finding.level == level
    assert why in finding.why
    assert do in finding.do


def test_the_worst_level_counts() -> None:
    findings = check_region(GOOD._replace(cas=False, size=3 * MIB), HOST)
    assert checks.worst(findings) == FAIL
    assert checks.worst([]) == OK


# --- the command ------------------------------------------------------------------------------


def report(*words: object) -> tuple[int, dict[str, dict[str, str]]]:
    """Run `doctor --json`; its exit code and the findings by check."""
    result = ivshmemfs("doctor", "--json", *words)
    assert result.stderr == ""
    told = json.loads(result.stdout)
    found = {one["check"]: one for region in told["regions"] for one in region["findings"]}
    return result.returncode, found | {one["check"]: one for one in told["machine"]}


@needs_fuse
def test_a_real_region(formatted: TestRegion) -> None:
    subprocess.run(["fallocate", "-l", str(formatted.size), formatted.path], check=True)
    formatted.path.chmod(0o600)
    result = ivshmemfs("doctor", formatted.path)
    assert result.stderr == ""
    levels = {
        line.split()[1]: line.split()[0] for line in result.stdout.splitlines() if "  " in line
    }
    wrong = {check for check, level in levels.items() if level != OK}
    assert wrong <= {"access"}  # a machine with libvirt
    assert set(levels) == {*NAMES, "fuse"}
    assert result.returncode == (64 if wrong else 0)


def test_a_sparse_region_and_a_silent_peer(formatted: TestRegion) -> None:
    fs = formatted.mount()  # and no tick
    code, found = report(formatted.path)
    assert code == 64
    assert found["reserved"]["level"] == WARN
    assert found["peers"]["level"] == WARN
    assert f"ivshmemfs evict {formatted.path} {fs.peer_id[0]}" in found["peers"]["do"]
    fs.unmount()
    subprocess.run(found["reserved"]["do"], shell=True, check=True)
    _, found = report(formatted.path)
    assert (found["reserved"]["level"], found["peers"]["level"]) == (OK, OK)


def test_what_is_no_region(tmp_path: Path, formatted: TestRegion) -> None:
    code, found = report(tmp_path / "none")
    assert (code, found["region"]["level"]) == (32, FAIL)
    (tmp_path / "empty").write_bytes(bytes(MIB))
    code, found = report(tmp_path / "empty")
    assert (code, found["format"]["level"]) == (32, FAIL)
    assert "mkfs.ivshmemfs" in found["format"]["do"]
    with formatted.path.open("r+b") as file:  # a commit word that a repair left
        file.seek(COMMIT_OFFSET)
        file.write(b"\xff" * 8)
    code, found = report(formatted.path)
    assert code == 32
    assert FAIL in {one["level"] for one in found.values()}


def test_it_leaves_no_trace(formatted: TestRegion) -> None:
    def tree() -> tuple[object, ...]:
        fs = formatted.mount(readonly=True)
        return list(fs.table.peers()), fs.view().root.record.inodes, fs.statfs().blocks_free

    before = tree()
    report(formatted.path)
    assert tree() == before


def test_a_region_that_this_user_cannot_write(formatted: TestRegion) -> None:
    formatted.path.chmod(0o444)
    formatted.path.parent.chmod(0o755)
    if os.geteuid() == 0:
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        if run(*user, "test", "-r", __file__).returncode:
            pytest.skip("another user cannot read this source tree")
    else:
        user = []
    result = run(
        *user, sys.executable, "-m", "ivshmemfs.cli", "doctor", "--json", formatted.path, timeout=60
    )
    told = json.loads(result.stdout)["regions"][0]["findings"]
    found = {one["check"]: one for one in told}
    assert found["compare-and-swap"]["level"] == WARN
    assert "only read" in found["compare-and-swap"]["why"]


def test_wrong_use(formatted: TestRegion) -> None:
    complains(ivshmemfs("doctor", "--qemu"), 1, "--qemu", "REGION")
    complains(ivshmemfs("doctor", "--qemu", "--json", formatted.path), 1, "--json")
    complains(ivshmemfs("doctor", "--qemu", "/dev/shm/ivshmemfs-none"), 32, "no such file")


# --- the lines for QEMU and libvirt -----------------------------------------------------------


def test_the_lines_of_a_plain_region() -> None:
    text = "\n".join(lines(GOOD._replace(size=64 * MIB)))
    assert "mem-path=/dev/shm/hello,size=64M" in text
    after = "x-systemd.after=ivshmemfs-region@hello.service"
    assert f"file:/dev/shm/hello  /mnt/hello  ivshmemfs  nofail,{after}  0 0" in text
    assert "label=hello  /mnt/hello  ivshmemfs  nofail  0 0" in text
    assert 'ATTR{device}=="0x1110"' in text
    xml = ElementTree.fromstring(text[text.index("<shmem") : text.index("</shmem>") + 8])
    assert xml.get("name") == "hello"
    assert xml.findtext("size") == "64"


def test_odd_names_are_quoted_for_each_reader() -> None:
    path = "/dev/shm/a b,c<d>'"
    facts = GOOD._replace(file=FILE._replace(path=path), label="two words")
    told = lines(facts)
    text = "\n".join(told)
    backend = subprocess.run(
        ["sh", "-c", f"printf '%s' {told[1].removesuffix(chr(92))}"],
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert backend.endswith("mem-path=/dev/shm/a b,,c<d>',size=1M")
    xml = ElementTree.fromstring(text[text.index("<shmem") : text.index("</shmem>") + 8])
    assert xml.get("name") == "a b,c<d>'"
    assert "file:/dev/shm/a\\040b,c<d>'  /mnt/two-words  ivshmemfs" in text
    assert "label=two\\040words  /mnt/two-words" in text


def test_a_guests_lines_leave_out_the_host() -> None:
    text = "\n".join(lines(GOOD._replace(file=None, label="", spec="pci:0000:00:04.0")))
    assert "QEMU" not in text
    assert "uuid=u  /mnt/shared" in text


def test_the_command_prints_the_lines(formatted: TestRegion) -> None:
    result = ivshmemfs("doctor", "--qemu", formatted.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"mem-path={formatted.path},size=1M" in result.stdout


def test_without_a_region_it_checks_all_that_carry_a_filesystem(
    formatted: TestRegion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "plain").write_bytes(bytes(MIB))
    paths = [str(formatted.path), str(tmp_path / "plain")]
    candidates = [Candidate(path, "file", MIB) for path in paths]
    monkeypatch.setattr("ivshmemfs.cli.doctor.commands.discover", lambda: candidates)
    doctor_command.main([], standalone_mode=False)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"this machine, ivshmemfs {__version__}"
    assert str(formatted.path) in told
    assert str(tmp_path / "plain") not in told
    monkeypatch.setattr("ivshmemfs.cli.doctor.commands.discover", list)
    doctor_command.main([], standalone_mode=False)
    assert "no region with a filesystem" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "command"),
    [
        (lambda path: os.truncate(path, 2 << 20), "ivshmemfs resize"),
        (lambda path: path.write_bytes(bytes(1 << 20)), "mkfs.ivshmemfs"),
        (lambda path: path.write_bytes(path.read_bytes()[:500] + bytes(1 << 20)), "fsck.ivshmemfs"),
        (lambda path: path.write_bytes(b"something else" + bytes(1 << 20)), "is it the right file"),
    ],
)
def test_no_advice_loses_files(
    spoil: Callable[[Path], object], command: str, formatted: TestRegion
) -> None:
    spoil(formatted.path)
    lines = ivshmemfs("doctor", formatted.path).stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("fail  format")]
    assert command in line.partition(" -> ")[2]
