"""What the filesystem takes for granted about an ivshmem device, seen from both sides.

No filesystem is involved: when one of these fails, nothing above can work on this machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ivshmemfs.native import Memory
from tests.guest.conftest import SIZES
from tests.guest.harness import Guest
from tests.guest.increment import COUNTER
from tests.guest.machines import IVSHMEMFS, Host, Machine

pytestmark = pytest.mark.guest

ROOT = Path(__file__).parents[2]
INCREMENT = "tests.guest.increment"


def python(script: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"]


def open_memory(path: str, size: int) -> str:
    """Python text that maps a BAR as ``m``."""
    return (
        "import os; from ivshmemfs.native import Memory\n"
        f"m = Memory(os.open({path!r}, os.O_RDWR), {size})\n"
    )


def test_bars_have_the_sizes_of_the_files_and_can_be_mapped_write_combining(guest: Guest) -> None:
    for index, size in enumerate(SIZES):
        for name in ("resource2", "resource2_wc"):
            assert guest.sh(f"stat -c '%s %a' {guest.bar(index)}/{name}") == f"{size} 600\n"


def test_the_guest_has_no_network(guest: Guest) -> None:
    """So everything that comes over has come through the shared memory."""
    assert guest.sh("ls /sys/class/net") == "lo\n"


@pytest.mark.parametrize("name", ["resource2", "resource2_wc"])
def test_stores_of_each_side_are_seen_by_the_other(
    guest: Guest, blank: list[Path], name: str
) -> None:
    with blank[0].open("r+b") as file:
        memory = Memory(file.fileno(), SIZES[0])
        memory.store(4096, 0x0123456789ABCDEF)
        memory.write(8192, b"from the host")
        seen = guest.run(
            *python(
                open_memory(f"{guest.bar(0)}/{name}", SIZES[0])
                + "print(hex(m.load(4096)), m.read(8192, 13))\n"
                + f"m.store({SIZES[0] - 8}, 0xfedcba9876543210); m.write(8192, b'from a guest!')\n"
            )
        ).check()
        assert seen.out == "0x123456789abcdef b'from the host'\n"
        assert memory.load(SIZES[0] - 8) == 0xFEDCBA9876543210
        assert memory.read(8192, 13) == b"from a guest!"
        memory.close()


def test_compare_and_swap_is_atomic_between_two_guests_and_the_host(
    guests: list[Guest], blank: list[Path], host: Host
) -> None:
    times = {"host": 300_000, "guest1": 20_000, "guest2": 20_000}
    size = SIZES[0]
    places = [str(blank[0]), *(f"{guest.bar(0)}/resource2_wc" for guest in guests)]
    machines: list[Machine] = [host, *guests]
    running = [
        machine.begin(
            "/usr/bin/env", "-C", ROOT, sys.executable, "-m", INCREMENT,
            place, str(size), str(party), "3", str(times[machine.name]),
        )
        for party, (machine, place) in enumerate(zip(machines, places, strict=True))
    ]  # fmt: skip
    lost = [int(command.wait().check().out) for command in running]
    with blank[0].open("r+b") as file:
        memory = Memory(file.fileno(), size)
        assert memory.load(COUNTER) == sum(times.values())
        memory.close()
    assert sum(lost) > 0, "they never met, so this shows nothing"


def test_a_device_that_does_not_decode_memory_is_enabled_before_use(
    guest: Guest, region: Path
) -> None:
    """Firmware may leave the device disabled; then loads give no error but nonsense."""
    bar = guest.bar(0)
    read = f"od -An -tx1 -j4 -N1 {bar}/config"
    write = f"dd of={bar}/config bs=1 seek=4 conv=notrunc status=none"
    guest.sh(f"if [ $(cat {bar}/enable) != 0 ]; then echo 0 >{bar}/enable; fi")
    assert guest.sh(f"printf '\\001' | {write}; {read}").strip() == "01"
    try:
        found = guest.run(IVSHMEMFS, "info", guest.device(0)).check()
        assert "guest-test" in found.out
    finally:
        guest.sh(f"printf '\\003' | {write}")
