"""A waiter in a guest: whether it has announced itself, and how often it wakes up meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ivshmemfs.format import bell
from tests.guest.harness import Guest, GuestError
from tests.guest.machines import Running

WATCHED_SECONDS = 3.0
#: Switches of a sleeper meanwhile; one that polls every 8 ms has 375, also under emulation.
MOST = 30
_ANNOUNCE_SECONDS = 240.0  # Python starts slowly without KVM


def announced(region: Path, waiting: Running) -> None:
    """Wait until a waiter has announced its doorbell in the region's file."""
    deadline = time.monotonic() + _ANNOUNCE_SECONDS
    with region.open("rb", buffering=0) as file:  # a buffer would keep what was there
        while time.monotonic() < deadline and not waiting.done():
            if any(os.pread(file.fileno(), 8, bell.BELLS_OFFSET)):
                return
            time.sleep(0.05)
    raise GuestError(f"the waiter has not announced itself: {waiting.done() and waiting.wait()}")


def switches(guest: Guest, words: str) -> int:
    """How often a process whose command line has `words` went to sleep; 0 without one."""
    pattern = f"[{words[0]}]{words[1:]}"  # which this shell's own command line does not match
    out = guest.sh(
        "for p in /proc/[0-9]*; do"
        f" if tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '{pattern}';"
        " then grep -h ^voluntary $p/task/*/status; fi; done"
    )
    return sum(int(line.split()[1]) for line in out.splitlines())


def asleep(guest: Guest, words: str) -> int:
    """How often that process wakes up in WATCHED_SECONDS."""
    before = switches(guest, words)
    assert before, f"no process {words}"
    time.sleep(WATCHED_SECONDS)
    return switches(guest, words) - before
