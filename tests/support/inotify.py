"""inotify(7) without a library: watches, and the events of a time."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

ACCESS, MODIFY, ATTRIB, CLOSE_WRITE, CLOSE_NOWRITE, OPEN = 1, 2, 4, 8, 0x10, 0x20
MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x40, 0x80, 0x100, 0x200
DELETE_SELF, MOVE_SELF = 0x400, 0x800
IGNORED, ISDIR = 0x8000, 0x40000000
NAMES = {
    MODIFY: "MODIFY", ATTRIB: "ATTRIB", CLOSE_WRITE: "CLOSE_WRITE", OPEN: "OPEN",
    MOVED_FROM: "MOVED_FROM", MOVED_TO: "MOVED_TO", CREATE: "CREATE", DELETE: "DELETE",
    DELETE_SELF: "DELETE_SELF", MOVE_SELF: "MOVE_SELF", ACCESS: "ACCESS",
    CLOSE_NOWRITE: "CLOSE_NOWRITE", IGNORED: "IGNORED",
}  # fmt: skip
EVERYTHING = 0xFFF
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    """One event.  `place` is what was watched; `name` is empty for that itself."""

    place: str
    kind: str
    name: str
    is_dir: bool
    cookie: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.place}/{self.name}{'/' if self.is_dir else ''}"


class Inotify:
    """An inotify descriptor with its watches."""

    def __init__(self, *paths: Path, mask: int = EVERYTHING) -> None:
        self._fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0
        self._places: dict[int, str] = {}
        for path in paths:
            self.watch(path, mask)

    def watch(self, path: Path, mask: int = EVERYTHING) -> None:
        """Watch a path; its last component names it in events."""
        watch = _libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
        assert watch >= 0, os.strerror(ctypes.get_errno())
        self._places[watch] = path.name

    def read(self) -> list[Event]:
        """The events that are queued."""
        found: list[Event] = []
        while True:
            try:
                raw = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return found
            at = 0
            while at < len(raw):
                watch, mask, cookie, length = _EVENT.unpack_from(raw, at)
                at += _EVENT.size
                name = os.fsdecode(raw[at : at + length].rstrip(b"\0"))
                at += length
                kind = NAMES.get(mask & ~ISDIR, hex(mask))
                found.append(Event(self._places[watch], kind, name, bool(mask & ISDIR), cookie))

    def until(self, *wanted: tuple[str, str], seconds: float = 20.0) -> list[Event]:
        """The events until each (kind, name) in *wanted* has come, or the time is over."""
        found: list[Event] = []
        missing, end = set(wanted), time.monotonic() + seconds
        while missing and time.monotonic() < end:
            fresh = self.read()
            found += fresh
            missing -= {(event.kind, event.name) for event in fresh}
            time.sleep(0.002)
        assert not missing, (missing, found[-20:])
        return found

    def close(self) -> None:
        """Give up all watches."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
