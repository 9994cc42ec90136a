"""Host and guests mount one region and exchange files with ``cp``, ``mv``, ``rm`` and ``cat``."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from pathlib import Path

import pytest

from tests.guest.conftest import Shared
from tests.guest.harness import Guest, arm_parts
from tests.guest.machines import IVSHMEMFS, Host, Mount, manifest

pytestmark = pytest.mark.guest

STDLIB = Path(sysconfig.get_path("stdlib"))
LARGE = 56 << 20
MAKE_LARGE = f"import random, sys; sys.stdout.buffer.write(random.Random(1).randbytes({LARGE}))"


@pytest.fixture
def host_mount(shared: Shared, host: Host) -> Mount:
    return shared.on(host)


@pytest.fixture
def guest_mount(shared: Shared, guest: Guest) -> Mount:
    return shared.on(guest)


@pytest.fixture(params=["host to guest", "guest to host"])
def direction(
    request: pytest.FixtureRequest, host_mount: Mount, guest_mount: Mount
) -> tuple[Mount, Mount]:
    """The mount that writes and the mount that reads."""
    pair = (host_mount, guest_mount)
    return pair if request.param == "host to guest" else (pair[1], pair[0])


@pytest.fixture(scope="module")
def source_tree(workplace: Path) -> Path:
    """The standard library, at the same place in the guest; complete in a long run.

    ARM64 guests are always emulated and so get a part of it.
    """
    left_out = ["__pycache__", "config-*", "test"]
    if os.environ.get("IVSHMEMFS_TEST_LONG"):
        left_out = []
    elif arm_parts():
        left_out += ["[g-z]*", "[A-D]*", "ensurepip", "distutils", "ctypes", "dbm", "curses"]
    copy = workplace / "stdlib"
    shutil.copytree(STDLIB, copy, symlinks=True, ignore=shutil.ignore_patterns(*left_out))
    return copy


def test_a_source_tree(direction: tuple[Mount, Mount], host: Host, source_tree: Path) -> None:
    writer, reader = direction
    writer.sh(f"cp -a {source_tree} $M/tree", timeout=900)
    expected = manifest(host, str(source_tree))
    assert len(expected) > (100 if arm_parts() else 500)
    assert reader.manifest("tree", timeout=900) == expected


def test_a_file_that_fills_most_of_the_region(direction: tuple[Mount, Mount]) -> None:
    writer, reader = direction
    written = writer.sh(
        f"/usr/bin/python3 -c '{MAKE_LARGE}' | tee $M/large | sha256sum", timeout=600
    )
    assert reader.sh("stat -c %s $M/large") == f"{LARGE}\n"
    assert reader.sh("sha256sum <$M/large", timeout=600) == written
    reader.sh("rm $M/large")
    assert writer.sh("ls $M") == ""


def test_a_thousand_small_files(direction: tuple[Mount, Mount]) -> None:
    writer, reader = direction
    writer.sh(
        "mkdir $M/many; i=0; while [ $i -lt 1000 ]; do echo file $i >$M/many/$i; i=$((i+1)); done",
        timeout=600,
    )
    assert reader.sh("ls $M/many | sort -n | sha256sum; ls $M/many | wc -l").endswith("1000\n")
    assert reader.sh("cd $M/many; cat $(seq 0 999)", timeout=300) == "".join(
        f"file {number}\n" for number in range(1000)
    )
    reader.sh("rm -r $M/many", timeout=300)
    assert writer.sh("ls $M") == ""


def test_names_and_contents_change_for_the_other_side_at_once(
    direction: tuple[Mount, Mount],
) -> None:
    here, there = direction
    here.sh("echo one >$M/a; mkdir $M/d")
    assert there.sh("cat $M/a; ls $M") == "one\na\nd\n"
    here.sh("mv $M/a $M/d/b")
    assert (
        there.sh("ls $M $M/d; cat $M/d/b").split()
        == f"{there.place}: d {there.place}/d: b one".split()
    )
    there.sh("test ! -e $M/a; echo two >>$M/d/b")
    assert here.sh("cat $M/d/b") == "one\ntwo\n"
    here.sh("echo new >$M/c; mv $M/c $M/d/b")
    assert there.sh("cat $M/d/b; ls $M/d") == "new\nb\n"
    there.sh("ln -s d/b $M/link; ln $M/d/b $M/hard; chmod 640 $M/d/b; truncate -s 2 $M/hard")
    assert here.sh("readlink $M/link; stat -c '%h %a %s' $M/d/b; cat $M/hard") == "d/b\n2 640 2\nne"
    here.sh("rm $M/d/b $M/link $M/hard; rmdir $M/d")
    assert there.sh("ls -A $M; test ! -e $M/d") == ""


def test_an_unlinked_file_stays_readable_where_it_is_open(direction: tuple[Mount, Mount]) -> None:
    here, there = direction
    here.sh("echo kept >$M/f")
    reading = there.begin(
        "exec 3<$M/f; : >$M/opened; while [ -e $M/f ]; do sleep 0.1; done; cat <&3"
    )
    here.sh("while [ ! -e $M/opened ]; do sleep 0.1; done; rm $M/f")
    assert reading.wait().check().out == "kept\n"


def test_mkdir_is_a_lock_between_machines(host_mount: Mount, guest_mount: Mount) -> None:
    """Each adds to a plain counter file under the lock; no increment may be lost."""
    host_mount.sh("echo 0 >$M/count")
    add = (
        "n=0; while [ $n -lt 30 ]; do"
        " until mkdir $M/lock 2>/dev/null; do sleep 0.01; done;"
        " read c <$M/count; echo $((c+1)) >$M/count; rmdir $M/lock; n=$((n+1)); done"
    )
    running = [mount.begin(add) for mount in (host_mount, guest_mount)]
    for command in running:
        command.wait().check()
    assert host_mount.sh("cat $M/count") == guest_mount.sh("cat $M/count") == "60\n"


def test_appending_from_all_sides_loses_and_tears_no_line(
    host_mount: Mount, guest_mount: Mount
) -> None:
    append = "n=0; while [ $n -lt 200 ]; do echo {} $n >>$M/log; n=$((n+1)); done"
    running = [
        mount.begin(append.format(mount.machine.name)) for mount in (host_mount, guest_mount)
    ]
    for command in running:
        command.wait().check()
    lines = host_mount.sh("cat $M/log").splitlines()
    for name in ("host", guest_mount.machine.name):
        mine = [line for line in lines if line.startswith(name)]
        assert mine == [f"{name} {number}" for number in range(200)]
    assert len(lines) == 400


#: Stores a word, waits until the other one has changed it, and prints what it found.
SHARE = """
import json, mmap, subprocess, sys, time
ivshmemfs, file, mine, theirs = sys.argv[1:]
place = json.loads(subprocess.check_output([ivshmemfs, "map", "--json", file]))
with open(place["file"], "r+b") as region:
    memory = mmap.mmap(region.fileno(), place["size"], offset=place["offset"])
words = memoryview(memory).cast("Q")
words[int(mine)] = 1000 + int(mine)
end = time.monotonic() + 60
while words[int(theirs)] != 1000 + int(theirs) and time.monotonic() < end:
    time.sleep(0.01)
print(place["region_offset"], words[int(theirs)])
"""


def test_programs_share_the_bytes_of_a_mapped_file(host_mount: Mount, guest_mount: Mount) -> None:
    """The host maps the region's file, the guest BAR 2 of the device; both find one extent."""
    host_mount.sh(f"{IVSHMEMFS} map --create 128K $M/words")
    running = [
        mount.begin(
            f'/usr/bin/python3 -c "$SHARE" {IVSHMEMFS} $M/words {mine} {1 - mine}'.replace(
                '"$SHARE"', shlex.quote(SHARE)
            )
        )
        for mine, mount in enumerate((host_mount, guest_mount))
    ]
    host, guest = (command.wait().check().out.split() for command in running)
    assert host[0] == guest[0]
    assert (host[1], guest[1]) == ("1001", "1000")
    words = guest_mount.sh("od -An -tu8 -N16 $M/words").split()
    assert words == ["1000", "1001"]
    assert guest_mount.machine.run("/bin/rm", f"{guest_mount.place}/words").exit == 1
    guest_mount.sh(f"{IVSHMEMFS} map --release $M/words; rm $M/words")
    host_mount.sh("test ! -e $M/words")
