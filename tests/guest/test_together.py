"""Host and guests at the same names at the same time; see ``scenes.py``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.guest.conftest import Shared
from tests.guest.harness import Guest
from tests.guest.machines import Host, Machine, Mount, play

pytestmark = pytest.mark.guest


@pytest.fixture
def host_mount(shared: Shared, host: Host) -> Mount:
    return shared.on(host)


@pytest.fixture(params=["host first", "guest first"])
def two(request: pytest.FixtureRequest, shared: Shared, host: Host, guest: Guest) -> list[Mount]:
    """Two machines, each once in either part."""
    machines: list[Machine] = [host, guest]
    mounts = [shared.on(machine) for machine in machines]
    return mounts if request.param == "host first" else mounts[::-1]


def test_three_machines_append(
    shared: Shared, host: Host, guests: list[Guest], long_run: bool
) -> None:
    count = 10_000 if long_run else 60
    machines: list[Machine] = [host, *guests]
    mounts = [shared.on(machine) for machine in machines]
    play(*[(mount, "append", count) for mount in mounts])
    seen: Counter[str] = Counter()
    for line in (Path(mounts[0].place) / "log").read_text().splitlines():
        who, number, *_, end = line.split(" ")
        assert (int(number), end) == (seen[who], "end")
        seen[who] += 1
    assert sorted(seen.values()) == [count] * 3


@pytest.mark.parametrize("how", ["exclusive", "made", "linked", "renamed", "flock", "fcntl"])
def test_exactly_one_machine_gets_a_lock(
    shared: Shared, host: Host, guest: Guest, how: str, long_run: bool
) -> None:
    rounds = 300 if long_run else 10
    machines: list[Machine] = [host, guest]
    mounts = [shared.on(machine) for machine in machines]
    place = Path(mounts[0].place)
    (place / "counter").write_text("0")
    (place / "token").touch()
    play(*[(mount, how, rounds) for mount in mounts])
    assert (place / "counter").read_text() == f"{2 * rounds}"


def test_both_replace_one_name(shared: Shared, host: Host, guest: Guest, long_run: bool) -> None:
    rounds = 2000 if long_run else 25
    here, there = shared.on(host), shared.on(guest)
    (Path(here.place) / "name").write_bytes(b"0" * 5000)
    play((here, "replace", rounds), (there, "replace", rounds), (here, "watch", 2),
         (there, "watch", 2))  # fmt: skip


def test_one_truncates_what_the_other_writes(two: list[Mount], long_run: bool) -> None:
    rounds = 2000 if long_run else 25
    here, there = two
    here.sh(": >$M/file")
    play((here, "write", rounds), (there, "cut", rounds), (here, "read", 2), (there, "read", 2))


def test_one_removes_what_all_read(two: list[Mount], host_mount: Mount) -> None:
    here, there = two
    (Path(host_mount.place) / "kept").write_bytes(bytes(range(256)) * 4000)
    play((here, "hold", 1), (there, "hold", 1), (there, "remove", 2))


def test_one_copies_what_the_other_removes(two: list[Mount], host_mount: Mount) -> None:
    here, there = two
    top = Path(host_mount.place)
    for folder in range(6):
        (top / "tree" / f"d{folder}").mkdir(parents=True)
        for number in range(12):
            (top / "tree" / f"d{folder}" / f"f{number}").write_bytes(b"%d" % number * 300)
    play((here, "copy", 1), (there, "prune", 1))
    assert not (top / "tree").exists()
    for path in top.glob("copy-*/**/f*"):
        assert path.read_bytes() in (b"", path.name[1:].encode() * 300)


def test_names_that_were_not_there_are_found_at_once(two: list[Mount], long_run: bool) -> None:
    rounds = 300 if long_run else 8
    here, there = two
    play((here, "ask", rounds), (there, "answer", rounds))
