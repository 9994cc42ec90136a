"""Where the daemon's log goes, and how it stays readable.

In the foreground to stderr; in the background to a file when one is named, else to syslog, else
(a guest without syslog) to the kernel's log.  A damaged region can make every request fail with
the same line, so a line that repeats is written once a minute, with a count.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
import time
from typing import Any

from ivshmemfs.errors import MountError
from ivshmemfs.printing import printable

SYSLOG_SOCKET = "/dev/log"
KERNEL_LOG = "/dev/kmsg"
#: Seconds during which an identical line is only counted.
REPEAT_SECONDS = 60.0
#: Different lines remembered at once.
REMEMBERED = 256


class Repeats(logging.Filter):
    """Drops a record whose text has been written a short while ago; says later how many it was."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write *record*."""
        text = record.getMessage()
        now = time.monotonic()
        since, dropped = self._seen.get(text, (-REPEAT_SECONDS, 0))
        if now - since < REPEAT_SECONDS:
            self._seen[text] = (since, dropped + 1)
            return False
        if len(self._seen) >= REMEMBERED:
            self._seen.clear()
        self._seen[text] = (now, 0)
        if dropped:
            record.msg = f"{text} (and {dropped} times more since)"
            record.args = None
        return True


class Escaped(logging.Formatter):
    """Escapes what a line must not contain: names, labels and messages come from a region."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Return the traceback, whose lines stay lines."""
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class KernelLog(logging.Handler):
    """Writes to /dev/kmsg, one record a line, with the priorities of syslog."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.open(KERNEL_LOG, os.O_WRONLY | os.O_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record*, a line of the kernel's log for each of its own."""
        priority = 3 if record.levelno >= logging.ERROR else 6
        try:
            for line in self.format(record).splitlines():
                os.write(self._fd, f"<{priority}>{line[:900]}\n".encode(errors="replace"))
        except OSError:
            self.handleError(record)


def configure(path: str | None, *, foreground: bool) -> None:
    """Set up logging for the whole process.  Raises MountError when *path* cannot be written."""
    handler = _handler(path, foreground)
    handler.addFilter(Repeats())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk must not matter to the mount


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
        handler.setFormatter(timed)
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
