"""Add to a counter in shared memory by compare-and-swap; run on several machines at once.

Arguments: path, length in bytes, index of this party, number of parties, increments.  All start
together, when each has raised its flag.  Prints how many races were lost.
"""

from __future__ import annotations

import os
import sys
import time

from ivshmemfs.native import Memory

COUNTER = 64
FLAGS = 128  # one word for each party


def increment(memory: Memory, party: int, parties: int, times: int) -> int:
    """Returns the number of lost races."""
    memory.store(FLAGS + 8 * party, 1)
    deadline = time.monotonic() + 60
    while not all(memory.load(FLAGS + 8 * other) for other in range(parties)):
        if time.monotonic() > deadline:
            raise SystemExit("the others did not come")
    lost = 0
    for _ in range(times):
        expected = memory.load(COUNTER)
        while (found := memory.cas(COUNTER, expected, expected + 1)) != expected:
            expected = found
            lost += 1
    return lost


def main() -> None:
    path, *numbers = sys.argv[1:]
    length, party, parties, times = map(int, numbers)
    fd = os.open(path, os.O_RDWR)
    print(increment(Memory(fd, length), party, parties, times))


if __name__ == "__main__":
    main()
