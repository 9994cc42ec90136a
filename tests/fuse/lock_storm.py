"""A program of the lock campaign: it locks ranges at random and watches that no other shares them.

What each program believes to hold is in memory that all of them map: for each program and byte, how
it holds that byte.  A program stores to its own cells alone.  It takes a lock, marks its cells, and
then looks at the cells of the others.  Of two that hold one byte at once, one sees the other.

    python -m tests.fuse.lock_storm FILE ORACLE NUMBER SEED
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tests.fuse.locker import READ, SETLK, SETLKW, UNLOCK, WRITE, lock

PROGRAMS = 4
BYTES = 64
#: What a cell says: nothing, a read lock, a write lock.
FREE, READS, WRITES = 0, 1, 2
#: Behind the cells, for each program: whether it is about to die; counts of what its requests
#: came to.
DYING = PROGRAMS * BYTES
GOT = DYING + PROGRAMS
SIZE = GOT + 8 * 3 * PROGRAMS
#: Seconds that a wait may take: others hold for milliseconds, but may be stopped, or die.
LONGEST_WAIT = 60


class Oracle:
    """The memory that all programs of a campaign map."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.cells = mmap.mmap(file.fileno(), SIZE)

    def mark(self, program: int, start: int, end: int, how: int) -> None:
        """This program holds these bytes so."""
        at = program * BYTES
        self.cells[at + start : at + end] = bytes((how,)) * (end - start)

    def clear(self, program: int) -> None:
        """It is dead."""
        self.mark(program, 0, BYTES, FREE)

    def dying(self, program: int, flag: bool) -> None:
        """Whether what it holds counts no more."""
        self.cells[DYING + program] = flag

    def violation(self, program: int, start: int, end: int, how: int) -> str:
        """Another holder of one of these bytes; empty when there is none."""
        for other in range(PROGRAMS):
            theirs = self.cells[other * BYTES + start : other * BYTES + end]
            wrong = any(theirs) if how == WRITES else WRITES in theirs
            if other != program and wrong and not self.cells[DYING + other]:
                return f"{program} has {start}-{end} as {how}, {other} has {theirs.hex()}"
        return ""

    def count(self, program: int, which: int) -> None:
        """One more: 0 a lock, 1 a deadlock, 2 a refusal."""
        at = GOT + 8 * (3 * program + which)
        number = int.from_bytes(self.cells[at : at + 8], "little") + 1
        self.cells[at : at + 8] = number.to_bytes(8, "little")

    def counts(self, which: int) -> list[int]:
        """By program."""
        places = [GOT + 8 * (3 * program + which) for program in range(PROGRAMS)]
        return [int.from_bytes(self.cells[at : at + 8], "little") for at in places]


class Storm:
    """What one program does."""

    def __init__(self, path: str, oracle: Oracle, number: int, seed: int) -> None:
        self.oracle, self.number = oracle, number
        self.chance = random.Random(seed)
        self.fds = [os.open(path, os.O_RDWR) for _ in range(2)]
        self.held: list[tuple[int, int]] = []

    def fail(self, text: str) -> None:
        """Tell, and end."""
        print(f"program {self.number}: {text}", file=sys.stderr, flush=True)
        os._exit(3)

    def step(self) -> None:
        """Take one or two ranges, hold them, give them back."""
        for _ in range(self.chance.choice((1, 1, 2))):
            if not self.take():
                break
        if self.held and self.chance.random() < 0.3:
            start, end = self.held[0]
            os.pwrite(self.fds[0], bytes((self.number,)) * (end - start), start)
        time.sleep(self.chance.random() * 0.002)
        self.look()
        if self.held and self.chance.random() < 0.1:  # closing any file ends all of them
            self.forget()
            os.close(os.dup(self.fds[1]))
        for start, end in self.held:
            self.oracle.mark(self.number, start, end, FREE)
            lock(self.fds[0], SETLK, UNLOCK, start, end - start)
        self.held.clear()

    def take(self) -> bool:
        start = self.chance.randrange(BYTES - 1)
        end = self.chance.randrange(start + 1, min(start + 16, BYTES))
        if any(start < other_end and other_start < end for other_start, other_end in self.held):
            return True  # the oracle knows no conversions
        how = self.chance.choice((READ, WRITE, WRITE))
        signal.alarm(LONGEST_WAIT)
        try:
            command = SETLK if self.chance.random() < 0.2 else SETLKW
            lock(self.fds[0], command, how, start, end - start)
        except OSError as error:
            if error.errno == errno.EDEADLK:
                self.oracle.count(self.number, 1)
            elif error.errno in (errno.EAGAIN, errno.EACCES):
                self.oracle.count(self.number, 2)
            else:
                raise
            return False
        finally:
            signal.alarm(0)
        self.held.append((start, end))
        kind = READS if how == READ else WRITES
        self.oracle.mark(self.number, start, end, kind)
        if said := self.oracle.violation(self.number, start, end, kind):
            self.fail(said)
        self.oracle.count(self.number, 0)
        return True

    def look(self) -> None:
        """No other has joined meanwhile."""
        for start, end in self.held:
            mine = self.oracle.cells[self.number * BYTES + start]
            if said := self.oracle.violation(self.number, start, end, mine):
                self.fail(said)

    def forget(self) -> None:
        self.oracle.clear(self.number)
        self.held.clear()


def main() -> None:
    """Go on until the parent closes standard input."""
    path, oracle, number, seed = sys.argv[1:]
    storm = Storm(path, Oracle(Path(oracle)), int(number), int(seed))

    def ring(_number: int, _frame: FrameType | None) -> None:
        storm.fail(f"has waited for {LONGEST_WAIT} s")

    signal.signal(signal.SIGALRM, ring)
    os.set_blocking(0, False)
    while True:
        try:
            if os.read(0, 1) == b"":
                return
        except BlockingIOError:
            pass
        storm.step()


if __name__ == "__main__":
    main()
