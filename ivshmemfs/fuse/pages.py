"""Pages that the kernel keeps of files, and how they follow what other machines change.

The kernel keeps pages of a file in three cases: the file is mapped, sendfile(2) or splice(2) reads
it, or the mount has `-o mmap`.  The kernel asks for such pages by a READ that names no lock owner;
every other READ names one.  So the daemon knows which files to watch:

    unwatched   no page of the file was asked for since it was opened
    watched     the kernel may keep pages; `check` compares the inode's pointer with the last one
                after each commit: every LOOK_SECONDS, or after a ring where bells work (`wakeups`)
    changed     another machine changed the file; the invalidator tells the kernel, and the file
                is watched again
    closed      this mount has no handle any more; the next open drops all pages by itself

The front end calls `note`, a task of the session `check` and `tidy`, all in the one thread of the
event loop.  `Invalidator` has a thread of its own, because the kernel first writes dirty pages
back.  The event loop answers these WRITE requests meanwhile.

A dirty page counts as written at that moment: later than the other machine's change.  It replaces
that whole page.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import trio

from ivshmemfs.engine import Filesystem, data
from ivshmemfs.engine.transaction import View
from ivshmemfs.errors import Busy, IvshmemfsError
from ivshmemfs.fuse import protocol
from ivshmemfs.fuse.wakeups import Naps, Wakeups

log = logging.getLogger(__name__)

#: Seconds between two looks at the commit word while a file is watched.
LOOK_SECONDS = 0.025
#: Looks between two of `tidy`.
TIDY_LOOKS = 64
#: Watched files that one look compares.
COMPARED_AT_ONCE = 500
#: Seconds that the end of a mount waits for an invalidation in progress.
END_SECONDS = 1.0


class Watched(NamedTuple):
    """A file of which the kernel may keep pages, when it was last compared."""

    pointer: bytes  # of the inode block; it changes with every change of the file
    size: int  # bytes


class Invalidation(NamedTuple):
    """What the kernel is told about one file."""

    node: int
    size: int  # bytes
    last: bytes  # the last byte; empty in an empty file


class Pages:
    """The files of one mount that are watched.

    *nodes_of* returns the numbers by which the kernel knows a file.
    """

    def __init__(
        self,
        fs: Filesystem,
        nodes_of: Callable[[int], Iterable[int]],
        invalidate: Callable[[list[Invalidation]], None],
        wakeups: Wakeups | None = None,
    ) -> None:
        self._fs = fs
        self._nodes_of = nodes_of
        self._invalidate = invalidate
        self._watched: dict[int, Watched] = {}
        self._word = 0  # the commit word when all files were last compared
        self._any = trio.Event()  # set while a file is watched
        self._naps = Naps(fs, LOOK_SECONDS, wakeups)

    def note(self, ino: int) -> None:
        """The kernel is about to keep pages of inode *ino*; call it before reading them."""
        if ino not in self._watched:
            if not self._watched:
                self._word = self._fs.commit_word()
                self._any.set()
            found = self._look([ino]).get(ino)
            if found is not None:
                self._watched[ino] = found

    def tidy(self) -> None:
        """Stop watching files that are closed."""
        for ino in [ino for ino in self._watched if not self._fs.is_open(ino)]:
            del self._watched[ino]

    async def run(self) -> None:
        """Compare the watched files for as long as the mount lives."""
        for looks in itertools.count():
            await self._any.wait()
            if await self._naps.nap(self._word) or not looks % TIDY_LOOKS:
                self.tidy()
            if not self._watched:
                self._any = trio.Event()
                continue
            try:
                for _ in self.check():
                    await trio.lowlevel.checkpoint()
            except Busy:
                continue  # next time
            except (IvshmemfsError, OSError) as error:
                log.debug("pages are not compared: %s", error)  # the upkeep says why

    def check(self) -> Iterator[None]:
        """Compare the watched files if there was a commit, COMPARED_AT_ONCE between two yields.

        Raises what a look at the filesystem raises; all files are then compared next time.
        """
        word = self._fs.commit_word()
        if word == self._word:
            return
        others = not self._fs.only_own_commits(self._word, word)
        inodes = iter(list(self._watched))
        while some := list(itertools.islice(inodes, COMPARED_AT_ONCE)):
            self._compare(some, tell=others)
            yield
        self._word = word
        self._naps.wake()

    def _compare(self, inodes: list[int], *, tell: bool) -> None:
        found = self._look(inodes)
        told: list[Invalidation] = []
        for ino in inodes:
            before, now = self._watched.get(ino), found.get(ino)
            if before is None or before == now:
                continue
            if now is None:  # freed: no machine can change it any more
                del self._watched[ino]
                continue
            self._watched[ino] = now
            if tell:
                last = self._last_byte(ino, now.size) if now.size else b""
                told += [Invalidation(node, now.size, last) for node in self._nodes_of(ino)]
        if told:
            self._invalidate(told)

    def _look(self, inodes: list[int]) -> dict[int, Watched]:
        def read(view: View) -> dict[int, Watched]:
            found: dict[int, Watched] = {}
            for ino in inodes:
                inode = view.find_inode(ino)
                if inode is not None:
                    found[ino] = Watched(view.pointer_to(ino), inode.record.size)
            return found

        return self._fs.look(read)

    def _last_byte(self, ino: int, size: int) -> bytes:
        """The byte before *size*; empty if the file has been cut since."""

        def read(view: View) -> bytes:
            inode = view.find_inode(ino)
            return b"" if inode is None else bytes(data.read(view, inode, size - 1, 1))

        return self._fs.look(read)


class Invalidator:
    """Tells the kernel, on a thread of its own, to drop the pages of files.

    A file that is told again while it waits is told once.
    """

    def __init__(self) -> None:
        self._device = -1
        self._waiting: dict[int, Invalidation] = {}  # by node
        self._changed = threading.Condition()
        self._ending = False
        self._thread: threading.Thread | None = None

    def use(self, device: int) -> None:
        """Write to the FUSE descriptor *device* from now on."""
        self._device = device

    def tell(self, invalidations: list[Invalidation]) -> None:
        """Hand *invalidations* over to the thread; never blocks for long."""
        with self._changed:
            self._waiting.update((told.node, told) for told in invalidations)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pages", daemon=True)
                self._thread.start()
            self._changed.notify()

    def stop(self) -> None:
        """End the thread; it may be inside the kernel, so wait END_SECONDS at most."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(END_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._ending:
                    self._changed.wait()
                if self._ending:
                    return
                node, size, last = self._waiting.pop(next(iter(self._waiting)))
            try:
                # A page fault beyond the size that the kernel knows ends in SIGBUS.  The kernel may
                # know a smaller one than the last look found.  It ignores the size in the answer to
                # a GETATTR that crosses the invalidation.
                if last:
                    self._send(protocol.store(node, size - 1, last))
                self._send(protocol.inval_inode(node))
            except OSError as error:
                if error.errno in protocol.ENDED:
                    return
                log.error("the kernel did not drop the pages of a file: %s", error)

    def _send(self, message: bytes) -> None:
        """Raises OSError, but not for a file that the kernel does not know."""
        try:
            os.write(self._device, message)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
