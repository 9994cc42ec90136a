"""A waiter in a guest: whether it has announced itself, and how often it wakes up meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ivshmemfs.format import bell
from tests.guest.harness import Guest, GuestError
from tests.guest.machines import Running

WATCHED_SECONDS = 10.0
#: Switches of a sleeper in a second; one that polls every 3 or 8 ms has 100 and more.
MOST = 10
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


def process_of(guest: Guest, words: str) -> int:
    """Return the process whose command line has `words`."""
    pattern = f"[{words[0]}]{words[1:]}"  # which this shell's own command line does not match
    out = guest.sh(
        "for p in /proc/[0-9]*; do"
        f" if tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '{pattern}';"
        " then echo ${p#/proc/}; fi; done"
    )
    return int(out.split()[0])


def switches(guest: Guest, pid: int) -> int:
    """How often the threads of a process went to sleep."""
    out = guest.sh(f"cat /proc/{pid}/task/*/status")
    words = (line.split() for line in out.splitlines() if line.startswith("voluntary_ctxt"))
    return sum(int(word[1]) for word in words)


def wakes(guest: Guest, words: str) -> float:
    """How often that process wakes up in a second, watched for WATCHED_SECONDS."""
    pid = process_of(guest, words)
    start, before = time.monotonic(), switches(guest, pid)
    time.sleep(WATCHED_SECONDS)
    return (switches(guest, pid) - before) / (time.monotonic() - start)
