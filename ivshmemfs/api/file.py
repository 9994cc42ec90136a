"""Open files of a region, as the module `io` has them.

`RegionFile` is the raw file: each call of `readinto` reads one snapshot, and each call of `write`
is one commit of up to 1 MiB.  `opened` puts the buffers of `io` on top.

    OPEN      the engine lists the inode as open: no machine frees it, though all remove its name
    CLOSED    `close`, the end of the client or the collection of the file released it
"""

from __future__ import annotations

import errno
import io
import os
import stat
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ivshmemfs.api.walk import place_of
from ivshmemfs.errors import FsError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from ivshmemfs.api.client import Client
    from ivshmemfs.engine import Attr, Context, Filesystem, Handle

#: Bytes of one read or write of the region; more would keep other threads and the beat waiting.
MOST = 1 << 20
#: Bytes of a buffer by default.
BUFFER = 64 << 10


class Mode(NamedTuple):
    """A mode string of `open`, parsed; `flags` as for open(2)."""

    flags: int
    text: bool
    plain: str  # as the attribute `mode` of a raw file


_FLAGS = {
    "r": 0,
    "w": os.O_CREAT | os.O_TRUNC,
    "a": os.O_CREAT | os.O_APPEND,
    "x": os.O_CREAT | os.O_EXCL,
}


def parse_mode(mode: str) -> Mode:
    """Return what a mode string means; raises ValueError."""
    kinds = [letter for letter in mode if letter in _FLAGS]
    if len(set(mode)) != len(mode) or set(mode) - set("rwaxbt+") or len(kinds) != 1:
        raise ValueError(f"invalid mode: {mode!r}")
    if "b" in mode and "t" in mode:
        raise ValueError("can't have text and binary mode at once")
    kind, plus = kinds[0], "+" in mode
    access = os.O_RDWR if plus else os.O_RDONLY if kind == "r" else os.O_WRONLY
    return Mode(_FLAGS[kind] | access, "b" not in mode, f"{kind}b{'+' * plus}")


def open_handle(
    fs: Filesystem, path: str, flags: int, mode: int, ctx: Context
) -> tuple[Handle, Attr]:
    """Open or make the file at `path` in the engine; raises as open(2), Busy."""
    place = place_of(fs, path, follow=not flags & os.O_EXCL)
    attr = place.attr
    if attr is None:
        if not flags & os.O_CREAT:
            raise FsError(errno.ENOENT)
        if path.endswith("/"):
            raise FsError(errno.EISDIR)
        return fs.create(place.parent, place.name, mode, flags, ctx)
    if flags & os.O_EXCL:
        raise FsError(errno.EEXIST)
    if stat.S_ISDIR(attr.mode):
        raise FsError(errno.EISDIR)
    if not stat.S_ISREG(attr.mode):
        raise FsError(errno.EOPNOTSUPP, "only a mount opens fifos, sockets and device nodes")
    return fs.open(attr.ino, flags, ctx), attr


class RegionFile(io.RawIOBase):
    """An open file without a buffer.  One thread uses it at a time, as any raw file."""

    def __init__(self, client: Client, path: str, handle: Handle, mode: str) -> None:
        super().__init__()
        self._client = client  # which lives as long as its files
        self._session = client.session
        self._handle = handle
        self._at = 0
        self.name = path
        self.mode = mode

    def _check(self, *, readable: bool = False, writable: bool = False) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if readable and not self._handle.readable:
            raise io.UnsupportedOperation("not readable")
        if writable and not self._handle.writable:
            raise io.UnsupportedOperation("not writable")

    # --- what it is -----------------------------------------------------------------------------

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        self._check()
        return self._handle.readable

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        self._check()
        return self._handle.writable

    def seekable(self) -> bool:
        """Return True."""
        self._check()
        return True

    @property
    def ino(self) -> int:
        """The inode number of the file."""
        return self._handle.ino

    def stat(self) -> os.stat_result:
        """Return the attributes of the file, also after its name was removed."""
        from ivshmemfs.api.client import stat_result

        self._check()
        ino = self._handle.ino
        attr, unit = self._session.call(lambda fs: (fs.getattr(ino), fs.block_size), self.name)
        return stat_result(attr, unit)

    # --- the position ---------------------------------------------------------------------------

    def _size(self) -> int:
        ino = self._handle.ino
        return self._session.call(lambda fs: fs.getattr(ino).size, self.name)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position and return it, in bytes; knows SEEK_DATA and SEEK_HOLE.

        Raises OSError EINVAL for a negative position, ENXIO behind the last data.
        """
        self._check()
        handle = self._handle
        if whence == os.SEEK_SET:
            at = offset
        elif whence == os.SEEK_CUR:
            at = self._at + offset
        elif whence == os.SEEK_END:
            at = self._size() + offset
        elif whence in (os.SEEK_DATA, os.SEEK_HOLE):
            at = self._session.call(lambda fs: fs.seek(handle, offset, whence), self.name)
        else:
            raise ValueError(f"invalid whence ({whence})")
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        self._at = at
        return at

    def tell(self) -> int:
        """Return the position, in bytes."""
        self._check()
        return self._at

    # --- data -----------------------------------------------------------------------------------

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill `buffer` from the position on, up to MOST bytes; returns their number, 0 at the end.

        The bytes are those of one commit.
        """
        self._check(readable=True)
        into = memoryview(buffer).cast("B")[:MOST]
        handle, at = self._handle, self._at
        got = self._session.call(lambda fs: fs.read(handle, at, len(into), into), self.name)
        length = len(got)
        if not isinstance(got, memoryview):  # short contents come from the node cache
            into[:length] = got
        self._at += length
        return length

    def readall(self) -> bytes:
        """Return all bytes from the position on, read in pieces of up to MOST bytes."""
        self._check(readable=True)
        rest = bytearray(max(self._size() - self._at, 0))
        done = 0
        with memoryview(rest) as into:
            while done < len(into) and (got := self.readinto(into[done:])):
                done += got
        del rest[done:]
        while piece := self.read(MOST):  # it grew meanwhile
            rest += piece
        return bytes(rest)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write up to MOST bytes in one commit, appended by mode "a"; returns their number.

        Others see all of them or none.  Raises OSError ENOSPC.  A region that is nearly full takes
        several commits, and maybe fewer bytes.
        """
        self._check(writable=True)
        piece = memoryview(data).cast("B")[:MOST]
        handle, at = self._handle, self._at
        done = self._session.call(lambda fs: fs.write(handle, at, piece), self.name)
        self._at = self._size() if handle.append else at + done
        return done

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file, in bytes, to the position by default; returns it."""
        self._check(writable=True)
        wanted = self._at if size is None else size
        ino, me = self._handle.ino, self._client.context
        self._session.call(lambda fs: fs.setattr(ino, me, size=wanted), self.name)
        return wanted

    # --- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the file; closing twice is harmless."""
        if not self.closed:
            try:
                super().close()
            finally:
                self._session.release(self._handle)

    def __repr__(self) -> str:
        closed = " closed" if self.closed else ""
        return f"<ivshmemfs.RegionFile name={self.name!r} mode={self.mode!r}{closed}>"


def opened(
    client: Client,
    path: str,
    mode: str,
    buffering: int,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
) -> Any:
    """Open `path` as the built-in function open does; see `Client.open`."""
    parsed = parse_mode(mode)
    if not parsed.text and (encoding is not None or errors is not None or newline is not None):
        raise ValueError("binary mode takes no encoding, errors or newline argument")
    if parsed.text and buffering == 0:
        raise ValueError("can't have unbuffered text I/O")
    me = client.context
    handle, _ = client.session.call(lambda fs: open_handle(fs, path, parsed.flags, 0o666, me), path)
    raw = RegionFile(client, path, handle, parsed.plain)
    try:
        file = _wrapped(raw, parsed, buffering, encoding, errors, newline)
    except BaseException:
        raw.close()
        raise
    client.session.files.add(file)
    return file


def _wrapped(
    raw: RegionFile,
    mode: Mode,
    buffering: int,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
) -> Any:
    if handle_appends(mode):
        raw.seek(0, os.SEEK_END)
    if buffering == 0:
        return raw
    size = buffering if buffering > 1 else BUFFER
    if mode.flags & os.O_RDWR:
        buffered: Any = io.BufferedRandom(raw, size)
    elif mode.flags & os.O_WRONLY:
        buffered = io.BufferedWriter(raw, size)
    else:
        buffered = io.BufferedReader(raw, size)
    if not mode.text:
        return buffered
    text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
    text.mode = mode.plain.replace("b", "")  # type: ignore[misc]  # as the built-in open sets it
    return text


def handle_appends(mode: Mode) -> bool:
    """Whether writes go to the end of the file."""
    return bool(mode.flags & os.O_APPEND)


class Source(Protocol):
    """What `pour` reads from: a binary stream."""

    def read(self, size: int, /) -> bytes | memoryview:
        """Return the next bytes, up to `size`; none at the end."""


def pour(client: Client, handle: Handle, source: Source, path: str) -> int:
    """Write all bytes of `source` to a file that only this client writes; returns their number."""
    at = 0
    while piece := source.read(MOST):
        rest = memoryview(piece)
        while rest:
            done = client.session.call(partial(_write, handle, at, rest), path)
            at, rest = at + done, rest[done:]
    return at


def _write(handle: Handle, at: int, piece: memoryview, fs: Filesystem) -> int:
    return fs.write(handle, at, piece)
