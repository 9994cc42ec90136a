"""The daemon's log: its destination and its rate limit.

A foreground daemon logs to stderr, with priorities if that is systemd's journal.  A background
daemon logs to the file of the option `log=`, else to syslog, else (a guest without syslog) to the
kernel's log.

A damaged region or a hostile peer can make every request fail, each time with another name or
number in the line.  So the rate of lines is limited by kind.  Lines that differ only in quoted text
and in numbers are of one kind.

    unseen      the next line of the kind is written          -> counting
    counting    for REPEAT_SECONDS its lines are counted      -> unseen; the count is written
"""

from __future__ import annotations

import itertools
import logging
import logging.handlers
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

from ivshmemfs.errors import MountError
from ivshmemfs.printing import printable

SYSLOG_SOCKET = "/dev/log"
KERNEL_LOG = "/dev/kmsg"
#: Seconds in which further lines of one kind are only counted.
REPEAT_SECONDS = 60.0
#: Maximum number of kinds with a count of their own; further kinds share one count.
KINDS = 1000

#: The parts that differ between lines of one kind: bytes and text in repr() form, and numbers.
_VARYING = re.compile(
    r"""b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*"|0x[0-9a-fA-F]+|[0-9a-fA-F]*[0-9][0-9a-fA-F]*"""
)


@dataclass
class _Kind:
    """One kind in state counting: its end (monotonic seconds), its first line, lines since then."""

    until: float
    first: logging.LogRecord
    more: int = 0


class Limited(logging.Handler):
    """Passes one record of each kind in REPEAT_SECONDS to another handler, and then the count."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self._target = target
        self._kinds: dict[tuple[str, int, str], _Kind] = {}  # in the order of their ends
        self._others: _Kind | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record*, or count it."""
        now = time.monotonic()
        self.tell(now)
        key = record.name, record.levelno, _VARYING.sub("#", record.getMessage())
        kind = self._kinds.get(key)
        if kind is None and len(self._kinds) >= KINDS:
            if self._others is None:
                self._others = _Kind(now + REPEAT_SECONDS, record)
            kind = self._others
        if kind is not None:
            kind.more += 1
            return
        self._kinds[key] = _Kind(now + REPEAT_SECONDS, record)
        self._target.handle(record)

    def tell(self, now: float) -> None:
        """Write the counts of the kinds that ended before *now*."""
        for key, kind in list(
            itertools.takewhile(lambda k: k[1].until <= now, self._kinds.items())
        ):
            del self._kinds[key]
            self._count(kind, "like it in the last %.0f s: ")
        others = self._others
        if others is not None and others.until <= now:
            self._others = None
            self._count(others, "of other kinds in the last %.0f s, such as: ")

    def _count(self, kind: _Kind, what: str) -> None:
        if kind.more:
            first = kind.first
            text = f"{kind.more} more {what % REPEAT_SECONDS}"
            told = logging.makeLogRecord({"name": first.name, "levelno": first.levelno})
            told.levelname, told.process = first.levelname, first.process
            told.msg = text + first.getMessage()
            self._target.handle(told)

    def flush(self) -> None:
        """Write all counts."""
        self.tell(math.inf)
        self._target.flush()

    def close(self) -> None:
        """Close the other handler, too."""
        self._target.close()
        super().close()


def tell() -> None:
    """Write the counts that are due; call it about once a second."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Limited):
            handler.tell(time.monotonic())


class Escaped(logging.Formatter):
    """Escapes control characters: names, labels and messages come from a region."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Return the traceback with its line breaks; all else is escaped."""
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class Prefixed(Escaped):
    """Begins each line with its priority, as systemd reads it from a service (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of *record*."""
        priority = (
            3 if record.levelno >= logging.ERROR else 4 if record.levelno > logging.INFO else 6
        )
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class KernelLog(logging.Handler):
    """Writes to /dev/kmsg with the priorities of syslog."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.open(KERNEL_LOG, os.O_WRONLY | os.O_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line of the kernel's log for each line of *record*."""
        priority = 3 if record.levelno >= logging.ERROR else 6
        try:
            for line in self.format(record).splitlines():
                os.write(self._fd, f"<{priority}>{line[:900]}\n".encode(errors="replace"))
        except OSError:
            self.handleError(record)


def configure(path: str | None, *, foreground: bool) -> None:
    """Set up logging for the process.  Raises MountError if *path* cannot be written."""
    root = logging.getLogger()
    root.handlers[:] = [Limited(_handler(path, foreground))]
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # the mount goes on when the log's disk is full


def _stderr_is_the_journal() -> bool:
    """Return whether systemd has connected stderr to its journal, which adds time and name."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _handler(path: str | None, foreground: bool) -> logging.Handler:
    handler: logging.Handler
    timed = Escaped("%(asctime)s %(levelname)s %(name)s: %(message)s")
    named = Escaped("ivshmemfs[%(process)d]: %(levelname)s: %(message)s")
    if path is not None:
        try:
            handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise MountError(f"log file {path} cannot be written: {error.strerror}") from None
        handler.setFormatter(timed)
    elif foreground:
        handler = logging.StreamHandler(sys.stderr)
        in_journal = Prefixed("%(levelname)s: %(message)s")
        handler.setFormatter(in_journal if _stderr_is_the_journal() else timed)
    elif os.path.exists(SYSLOG_SOCKET):
        handler = logging.handlers.SysLogHandler(
            SYSLOG_SOCKET, logging.handlers.SysLogHandler.LOG_DAEMON
        )
        handler.setFormatter(named)
    elif os.access(KERNEL_LOG, os.W_OK):
        handler = KernelLog()
        handler.setFormatter(named)
    else:
        handler = logging.NullHandler()
    return handler
