"""`Client.map`: a fixed file as memory of this process (see `engine/fixed.py`).

    OPEN     `load`, `store`, `cas`, `read`, `write` reach the file's bytes in the region at once,
             without a commit; the file is listed as open, so no peer releases it
    LOST     the upkeep thread, or a waiting queue, found that the file was released all the same,
             or the region formatted anew: each of them raises OSError ESTALE
    CLOSED   after `close`, or the end of the client: each of them raises ValueError

While the client may not write because its machine does not share the memory (`shm/coherence.py`),
an OPEN file can be read only.
A peer that was evicted, or whose slot another peer took while it was silent, lists nothing.  So the
file may be released while that peer sleeps.  When it wakes up, it may still store for up to BEAT
seconds (`api/session.py`).
All machines see the same bytes.  Words of 64 bits are loaded, stored and swapped whole.  Everything
else is not atomic, and nothing tells the kernel or other programs of a change: programs agree among
themselves.  All calls work on ARM64 device memory as well.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
import time
from typing import TYPE_CHECKING, Final

from ivshmemfs.api import walk
from ivshmemfs.api.closing import Closing
from ivshmemfs.engine import fixed, names
from ivshmemfs.errors import FsError, StaleHandle
from ivshmemfs.shm.commit import LOOKS

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from ivshmemfs.api.client import Client
    from ivshmemfs.engine import Filesystem, Handle
    from ivshmemfs.engine.transaction import Transaction

WORD: Final = 8  # bytes
NAP: Final = 50_000  # ns between two looks of `wait`; the kernel adds about as much
_SECOND: Final = 10**9


class MappedFile(Closing):
    """A fixed file of a region; a context manager.  Thread-safe.

    `offset` is its place in the region (so in the BAR), `size` its size.  Both are in bytes, and
    multiples of 4096.  `made` tells whether this call made the file; it then holds zeros.
    """

    def __init__(
        self,
        client: Client,
        path: str,
        create: int | None,
        *,
        head: bytes = b"",
        any_size: bool = False,
    ) -> None:
        """Open the file, or make it with `create` bytes that begin with `head`.

        With `any_size` one that is there may have another size.
        """
        self._session = client.session
        self._memory = client.session.region.memory
        self.path: Final = path
        handle, made = self._session.call(lambda fs: _opened(client, fs, path, create, head), path)
        self.made: Final[bool] = made
        self.ino: Final[int] = handle.ino
        self._handle: Handle | None = handle
        try:
            place = self._session.call(
                lambda fs: fs.look(lambda view: fixed.extent(view, handle.ino)), path
            )
            if create is not None and not any_size and place.size != fixed.whole_pages(create):
                text = f"it is there already, and has {place.size} bytes"
                raise FileExistsError(errno.EEXIST, text, path)
        except BaseException:
            self.close()
            raise
        self.place: Final = place
        self._lost = ""  # why the file is lost, or ""
        self._unfit = ""  # why this machine may not store, or ""
        self._seen = 0  # the commit word at the last look; 0 before it
        self._session.maps.add(self)
        self.offset: Final[int] = place.offset
        self.size: Final[int] = place.size

    def __repr__(self) -> str:
        return f"<MappedFile {self.path!r}: {self.size} bytes at {self.offset:#x}>"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._handle is None

    def close(self) -> None:
        """Let go of the file; once.  The memory that `mmap` returned stays mapped."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._session.release(handle)

    def _at(self, at: int, length: int) -> int:
        """Return the place of `length` bytes in the region; raises ValueError outside the file."""
        self.refuse_lost()
        if not 0 <= at <= self.size - length:
            raise ValueError(f"{length} bytes at {at} are not within the file's {self.size}")
        return self.offset + at

    def refuse_lost(self) -> None:
        """Raise ValueError after `close`, OSError ESTALE once the file is lost."""
        if self._handle is None:
            raise ValueError("the mapped file is closed")
        if self._lost:
            raise OSError(errno.ESTALE, self._lost, self.path)

    def lose(self, why: str) -> None:
        """Let all calls from now on raise OSError ESTALE that says `why`."""
        self._lost = why

    def look_again(self, fs: Filesystem) -> None:
        """Look whether this machine may store, and whether the file is lost.  Raises Busy.

        The file is looked at once for each commit word.
        """
        self._unfit = fs.unfit
        word = fs.commit_word()
        if word == self._seen:
            return
        try:
            fs.look(lambda view: fixed.expect(view, self.ino, self.place))
        except StaleHandle as error:
            self.lose(str(error))
        except FsError:
            return  # damage, or no access: the calls themselves tell
        self._seen = word

    def _word(self, at: int) -> int:
        """Return the place of a word; raises ValueError also where none can be."""
        place = self._at(at, WORD)
        if at % WORD:
            raise ValueError(f"byte {at} is not a multiple of {WORD}")
        return place

    def _refuse_unfit(self) -> None:
        if self._unfit:
            raise OSError(errno.EROFS, self._unfit, self.path)

    # --- words ----------------------------------------------------------------------------------

    def load(self, at: int) -> int:
        """Return the word of 64 bits at byte `at`, a multiple of 8 (acquire).

        All methods raise ValueError for a place outside the file, and OSError when the region is
        gone.  Those that store raise OSError EROFS if the client only reads, or once it is known
        that its machine does not share the memory.
        """
        return self._memory.load(self._word(at))

    def store(self, at: int, value: int) -> None:
        """Store a word; all that this thread stored before is visible before it (release)."""
        place = self._word(at)
        self._refuse_unfit()
        self._memory.store(place, value)

    def cas(self, at: int, expected: int, new: int) -> int:
        """Store `new` if the word is `expected`; returns the word as it was before."""
        place = self._word(at)
        self._refuse_unfit()
        return self._memory.cas(place, expected, new)

    def fence(self) -> None:
        """Order all loads and stores before it and after it."""
        self._memory.fence()

    def wait(self, at: int, value: int, timeout: float | None = None) -> int:
        """Return the word once it is not `value`, or `value` after `timeout` seconds.

        None waits for ever.  It sleeps between looks, and wakes about 0.1 ms late.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            place, left = self._word(at), end - time.monotonic()
            looks = min(max(int(left * _SECOND / NAP), 0), LOOKS) if left < math.inf else LOOKS
            word = self._memory.await_change(place, value, NAP, looks)
            if word != value or not looks:
                return word

    # --- bytes ----------------------------------------------------------------------------------

    def read(self, at: int = 0, length: int | None = None) -> bytes:
        """Return `length` bytes from byte `at` on; by default all that follow."""
        length = self.size - at if length is None else length
        return self._memory.read(self._at(at, length), length)

    def write(self, at: int, data: ReadableBuffer) -> None:
        """Store bytes from byte `at` on."""
        content = memoryview(data).cast("B")
        place = self._at(at, len(content))
        self._refuse_unfit()
        self._memory.write(place, content)

    def mmap(self) -> mmap.mmap:
        """Return the file as memory of the module mmap, for numpy and the like.

        It stays mapped until its own `close`.  Use it for memory that is cached: on ARM64 device
        memory unaligned copies end the process.  Raises OSError; ENODEV for a device behind vfio,
        where the other methods work.
        """
        self._at(0, 0)
        self._session.refuse_closed()
        region = self._session.region
        reads = region.readonly or self._unfit
        access = mmap.ACCESS_READ if reads else mmap.ACCESS_WRITE
        fd = region.descriptor()
        try:
            start = (region.start or 0) + self.offset
            return mmap.mmap(fd, self.size, access=access, offset=start)
        except ValueError as error:  # the region's file is shorter than when it was opened
            raise OSError(
                errno.EIO, region.condition().explained or str(error), self.path
            ) from None
        finally:
            os.close(fd)


def _opened(
    client: Client, fs: Filesystem, path: str, create: int | None, head: bytes
) -> tuple[Handle, bool]:
    """Open the file at `path`, which is made if need be; returns (handle, whether it was made)."""
    place, made = walk.place_of(fs, path), False
    ino = 0 if place.attr is None else place.attr.ino
    if place.attr is None:
        if create is None:
            raise FsError(errno.ENOENT)
        size, me = fixed.whole_pages(create), client.context

        def plan(tx: Transaction) -> tuple[int, bool]:
            return names.make_fixed(tx, place.parent, place.name, 0o666, size, me, head)

        ino, made = fs.change(plan)
    elif not stat.S_ISREG(place.attr.mode):
        raise FsError(errno.EISDIR if stat.S_ISDIR(place.attr.mode) else errno.EINVAL)
    return fs.open(ino, os.O_RDONLY if client.readonly else os.O_RDWR), made
