"""One process of the storm: works on the region as fast as it can and keeps a journal of it.

    python -m tests.crash.storm REGION JOURNAL NAME SEED READONLY

A journal line is written before an operation ("try") and after it has returned ("done").  So the
check knows what must be there, and what may be there.  The process ends when its standard input is
closed.
"""

from __future__ import annotations

import faulthandler
import os
import random
import select
import signal
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, cast

from ivshmemfs.engine import ROOT_INO, Filesystem, Handle
from ivshmemfs.errors import Busy, FsError, NoSpace, Unfinished
from ivshmemfs.region import open_region
from tests.support.regions import ROOT, put

T = TypeVar("T")
LOG = b"log"
MISSED = 20.0  # seconds after which the dead hold no space any more
MARK = b"storm "


def line_of(name: str, number: int, length: int) -> bytes:
    """A line of the log that shows by itself whether it is whole."""
    text = b"%s %d %s" % (name.encode(), number, b"." * length)
    return b"%s %08x\n" % (text, zlib.crc32(text))


def line_whole(line: bytes) -> bool:
    text, _, check = line.rpartition(b" ")
    return check == b"%08x" % zlib.crc32(text)


def content_of(name: str, number: int, length: int) -> bytes:
    """The contents of a file that show by themselves whether they are whole."""
    head = MARK + b"%s %d " % (name.encode(), number)
    body = (head + b"%d " % length) * (length // 8 + 1)
    text = head + body[:length]
    return text + b"%08x" % zlib.crc32(text)


def content_whole(content: bytes) -> bool:
    whole = content[-8:] == b"%08x" % zlib.crc32(content[:-8])
    return content.startswith(MARK) and whole


class Worker:
    """The life of one process."""

    def __init__(self, fs: Filesystem, journal: int, name: str, seed: int) -> None:
        self.fs = fs
        self.name = name
        self.chance = random.Random(seed)
        self.number = 0
        self.longest = 0.0
        self.waits_for = "nothing yet"
        self._journal = journal

    def note(self, text: str) -> None:
        os.write(self._journal, text.encode() + b"\n")

    def complain(self) -> None:
        """Say what it does, for a test that waits for its end."""
        root = self.fs.view().root
        print(
            f"{self.name} waited last for: {self.waits_for}; used {root.used}, "
            f"orphans {root.orphans}, peers {[hex(word) for word in self.fs.table.states()]}",
            file=sys.stderr,
        )

    def patiently(self, action: Callable[[], T]) -> T:
        """Do it again while the region is busy, or full of what the dead hold.

        A dead peer holds files until others miss it.  What it held is free soon after that.
        """
        began = time.monotonic()
        while True:
            try:
                result = action()
            except NoSpace as full:
                self.waits_for = str(full)
                if time.monotonic() - began > MISSED:
                    raise
                time.sleep(0.05)
                with suppress(Busy):
                    self.fs.tick()
            except Busy as busy:
                self.waits_for = str(busy)
                if isinstance(busy, Unfinished):
                    action = cast("Callable[[], T]", busy.go_on or action)
                time.sleep(0.0005)
            else:
                self.longest = max(self.longest, time.monotonic() - began)
                return result

    def append(self, handle: Handle) -> None:
        self.number += 1
        line = line_of(self.name, self.number, self.chance.randrange(300))
        self.note(f"try line {self.number}")
        written = self.patiently(lambda: self.fs.write(handle, 0, line))
        assert written == len(line)
        self.note(f"done line {self.number}")

    def replace(self) -> None:
        """Write a file anew and move it over the present one."""
        self.number += 1
        name, fresh = b"file-" + self.name.encode(), b"new-" + self.name.encode()
        content = content_of(self.name, self.number, self.chance.randrange(40_000))
        self.note(f"try file {self.number} {zlib.crc32(content)}")
        self.patiently(lambda: put(self.fs, ROOT_INO, fresh, content))
        self.patiently(lambda: self.fs.rename(ROOT_INO, fresh, ROOT_INO, name, 0, ROOT))
        self.note(f"done file {self.number} {zlib.crc32(content)}")

    def look(self) -> None:
        """A file that others replace is whole at every look."""
        found = self.patiently(lambda: list(self.fs.readdir(self.fs.opendir(ROOT_INO), 0)))
        files = [name for name, _, _ in found if name.startswith(b"file-")]
        if not files:
            return
        name = self.chance.choice(files)
        try:
            content = self.patiently(lambda: self._read(name))
        except FsError:
            return  # replaced in between; a read-only mount keeps nothing open
        if not content_whole(content):
            self.note(f"torn {name!r} {len(content)}")
        self.note("done look 0")

    def _read(self, name: bytes) -> bytes:
        ino = self.fs.lookup(ROOT_INO, name).ino
        handle = self.fs.open(ino, os.O_RDONLY, ROOT)
        try:
            return bytes(self.fs.read(handle, 0, 1 << 20))
        finally:
            self.fs.release(handle)

    def come_and_go(self) -> None:
        name = b"gone-%s-%d" % (self.name.encode(), self.chance.randrange(50))
        try:
            self.patiently(lambda: self.fs.mknod(ROOT_INO, name, 0o100600, 0, ROOT))
        except FsError:
            self.patiently(lambda: self.fs.unlink(ROOT_INO, name, ROOT))


def told_to_end() -> bool:
    return bool(select.select([0], [], [], 0)[0])


def work(worker: Worker) -> None:
    handle, _ = worker.patiently(
        lambda: worker.fs.create(ROOT_INO, LOG, 0o600, os.O_WRONLY | os.O_APPEND, ROOT)
    )
    ticked, more = time.monotonic(), False
    while not told_to_end():
        action = worker.chance.random()
        if action < 0.5:
            worker.append(handle)
        elif action < 0.65:
            worker.replace()
        elif action < 0.85:
            worker.look()
        else:
            worker.come_and_go()
        if time.monotonic() - ticked > 0.25:
            ticked = time.monotonic()
            more = worker.patiently(worker.fs.tick)
        elif more:
            more = worker.patiently(worker.fs.work)
    worker.fs.release(handle)


def main() -> None:
    region_path, journal_path, name, seed, readonly = sys.argv[1:]
    journal = os.open(journal_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open_region(region_path, readonly=readonly == "1") as region:
        fs = Filesystem.mount(region)
        worker = Worker(fs, journal, name, int(seed))
        signal.signal(signal.SIGUSR1, lambda *_: worker.complain())
        faulthandler.register(signal.SIGUSR1, chain=True)  # also in an endless loop of C
        if fs.readonly:
            while not told_to_end():
                worker.look()
            worker.note(f"stores {region.memory.stores}")
        else:
            work(worker)
        worker.note(f"longest {worker.longest:.4f}")
        worker.patiently(fs.unmount)


if __name__ == "__main__":
    assert Path(sys.argv[1]).exists()
    main()
