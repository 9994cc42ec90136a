"""A peer and its watcher, each a real process in real namespaces.

The peer stops in the middle of a transaction and shows no life, as a paused machine does.  In all
surroundings of either: while its process is there, the watcher never concludes that it is gone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.regions import TestRegion, new_region

TOP = Path(__file__).resolve().parents[2]
NOBODY = 65534
PEER = """
import os, sys
from ivshmemfs.engine import Filesystem
from ivshmemfs.region import open_region
from ivshmemfs.shm import identity
identity.machine_id = lambda: b"machine of tests"
fs = Filesystem.mount(open_region(sys.argv[1]))
fs._volume.member.begin()
print(fs.peer_id[0], flush=True)
sys.stdin.read()
os._exit(0)
"""
OBSERVER = """
import sys
from ivshmemfs.format import superblock
from ivshmemfs.region import open_region
from ivshmemfs.shm import identity, watch
identity.machine_id = lambda: b"machine of tests"
watch.SILENCE = 0.3
memory = open_region(sys.argv[1], readonly=True).memory
geometry = superblock.decode(memory.read(0, 512)).geometry
for peer in watch.Watch(memory, geometry).decide():
    print(peer.slot, identity.presence(peer.record).name)
"""
MOUNTS = "mount --make-rprivate / && "
OTHER_BOOT_ID = (
    MOUNTS + "cat /proc/sys/kernel/random/uuid > {tmp}/boot && "
    "mount --bind {tmp}/boot /proc/sys/kernel/random/boot_id && "
)
SHELL = ["sh", "-c"]


class Case(NamedTuple):
    """How each of the two is started, and what is known while the peer lives and after."""

    peer: str
    observer: str
    alive: str
    dead: str
    user: int = 0


CASES = {
    "plain": Case("", "", "ALIVE", ""),
    "another user": Case("", "", "ALIVE", "", NOBODY),
    "hidepid=1": Case("", "hidden 1", "UNKNOWN", "", NOBODY),
    "hidepid=2": Case("", "hidden 2", "UNKNOWN", "", NOBODY),
    "the peer in another time namespace": Case("time", "", "UNKNOWN", ""),
    "the observer in another time namespace": Case("", "time", "UNKNOWN", ""),
    "the peer in a pid namespace without its /proc": Case("pid", "", "UNKNOWN", "UNKNOWN"),
    "the observer in a pid namespace without its /proc": Case("", "pid", "UNKNOWN", "UNKNOWN"),
    "both in one pid namespace without its /proc": Case("join", "join", "UNKNOWN", ""),
    "the peer in a container": Case("container", "", "UNKNOWN", "UNKNOWN"),
    "the observer in a container": Case("", "container", "UNKNOWN", "UNKNOWN"),
    "the peer in a container with a boot id": Case("nspawn", "", "UNKNOWN", "UNKNOWN"),
    "the observer in a container with a boot id": Case("", "nspawn", "UNKNOWN", "UNKNOWN"),
    "two containers with boot ids": Case("nspawn", "nspawn", "UNKNOWN", "UNKNOWN"),
    "a boot id mounted over, for the peer": Case("boot", "", "UNKNOWN", "UNKNOWN"),
    "a boot id mounted over, for the observer": Case("", "boot", "UNKNOWN", "UNKNOWN"),
}


def namespaces_work() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    probe = ["unshare", "--mount", "--pid", "--fork", "--time", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not namespaces_work(), reason="needs root and namespaces")


@pytest.fixture
def made() -> Iterator[TestRegion]:
    with new_region(peer_count=4) as region:
        region.path.chmod(0o666)
        region.path.parent.chmod(0o755)
        yield region


@pytest.fixture
def holder() -> Iterator[int]:
    """A process that holds a pid namespace of its own; its pid here."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "sleep", "600"]
    with subprocess.Popen(command) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (found := children.read_text().split()):
            pass
        yield int(found[0])
        process.kill()


def started(how: str, holder: int, tmp: Path) -> list[str]:
    """The words before a command that runs it in such surroundings."""
    kind, _, value = how.partition(" ")
    mount = ["unshare", "--mount", "--propagation", "private"]
    over = [*SHELL, OTHER_BOOT_ID.format(tmp=tmp) + 'exec "$@"', "sh"]
    hidden = f'mount -t proc -o hidepid={value} proc /proc && exec "$@"'
    words = {
        "": [],
        "hidden": [*mount, *SHELL, hidden, "sh"],
        "time": ["unshare", "--time", "--fork", "--boottime", "5000"],
        "pid": ["unshare", "--pid", "--fork"],
        "join": ["nsenter", f"--pid=/proc/{holder}/ns/pid"],
        "container": ["unshare", "--pid", "--fork", "--mount-proc"],
        "nspawn": ["unshare", "--pid", "--fork", "--mount-proc", *over],
        "boot": [*mount, *over],
    }
    return words[kind]


def program(script: str, made: TestRegion, user: int = 0) -> list[str]:
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
    return [*drop, sys.executable, "-c", script, str(made.path)]


@contextmanager
def peer(prefix: list[str], made: TestRegion) -> Iterator[subprocess.Popen[str]]:
    """A peer that lives until its standard input ends."""
    process = subprocess.Popen(
        [*prefix, *program(PEER, made)],
        cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        yield process
    finally:
        process.communicate()


def observed(prefix: list[str], made: TestRegion, user: int) -> str:
    """What is known of the peer in slot 1, as others see it; nothing if it is surely gone."""
    done = subprocess.run(
        [*prefix, *program(OBSERVER, made, user)],
        cwd=TOP, check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    slot, _, known = done.stdout.strip().partition(" ")
    assert slot in ("", "1")
    return known


@pytest.mark.parametrize("name", CASES)
def test_who_lives_is_never_gone(name: str, made: TestRegion, holder: int, tmp_path: Path) -> None:
    case = CASES[name]
    prefix = started(case.observer, holder, tmp_path)
    with peer(started(case.peer, holder, tmp_path), made) as process:
        alive = observed(prefix, made, case.user)
        process.communicate()
        dead = observed(prefix, made, case.user)
    assert (alive, dead) == (case.alive, case.dead)


COMMANDS = {
    "fsck": (["-m", "ivshmemfs.fsck", "-y"], 8, "in use by 1 peer"),
    "mkfs": (["-m", "mkfs"], 1, "mounted now by 1 peer"),
    "peers": (["-m", "ivshmemfs.cli", "peers"], 0, "silent"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_takes_a_hidden_peer_for_dead(
    name: str, made: TestRegion, holder: int, tmp_path: Path
) -> None:
    words, code, says = COMMANDS[name]
    with peer([], made):
        before = made.path.read_bytes()
        user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        hidden = started("hidden 2", holder, tmp_path)
        done = subprocess.run(
            [*hidden, "setpriv", *user, sys.executable, *words, str(made.path)],
            cwd=TOP, check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == code
        assert says in done.stdout + done.stderr
        assert made.path.read_bytes() == before
