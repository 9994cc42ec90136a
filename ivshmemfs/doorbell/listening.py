"""The file of a server's socket: made with its final mode, stale ones replaced, removed at the end.

A socket's file outlives a server that was killed.  It is stale if connecting to it is refused.
A file that is not a socket, and a socket that answers, are never removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ivshmemfs.errors import InUse, IvshmemfsError, RegionDenied, UsageError
from ivshmemfs.printing import printable

LONGEST_PATH = 107  # bytes of a socket's path (unix(7)), without the zero at its end
WAITING = 128  # clients in the queue of connect(2): more than guests start at once


@contextmanager
def listening(path: Path, mode: int, group: str | None) -> Iterator[socket.socket]:
    """Listen on a Unix socket at `path`, non-blocking; its file is removed at the end.

    Raises UsageError, RegionDenied, or InUse for a path that another server or file has.
    """
    shown = printable(str(path))
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise UsageError(
            f"{shown}: a socket's path has at most {LONGEST_PATH} bytes; use a shorter one"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            _bind(listener, path, mode)
        except FileNotFoundError:
            parent = printable(str(path.parent))
            raise UsageError(f"{parent}: no such directory; create it first") from None
        except PermissionError:
            raise RegionDenied(
                f"{shown}: permission denied; run as root, or name a path in a directory of yours"
            ) from None
        made = os.lstat(path)
        try:
            if group is not None:
                _give(path, group)
            listener.listen(WAITING)
            listener.setblocking(False)
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(path), made):  # not that of a later server
                    os.unlink(path)


def _bind(listener: socket.socket, path: Path, mode: int) -> None:
    """Make the file with `mode` at once, so that at no time more users may connect."""
    before = os.umask(0o777 & ~mode)
    try:
        try:
            listener.bind(str(path))
        except OSError as error:
            if not os.path.lexists(path):
                raise
            _remove_stale(path, error)
            listener.bind(str(path))
    finally:
        os.umask(before)


def _remove_stale(path: Path, error: OSError) -> None:
    """Remove the file of a server that ended; raises InUse for any other."""
    shown = printable(str(path))
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        raise InUse(f"{shown}: exists and is not a socket; name another path") from error
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full queue must not hold up this process
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except PermissionError:
            raise
        except OSError:  # EAGAIN: its queue is full, so a server has it
            pass
    raise InUse(f"{shown}: another server listens there; end it, or name another path") from error


def _give(path: Path, group: str) -> None:
    try:
        shutil.chown(path, group=group)
    except LookupError:
        raise UsageError(f"--group: there is no group {printable(group)} here") from None
    except PermissionError:
        raise RegionDenied(
            f"--group: only root, or a member of {printable(group)}, can give the socket to it"
        ) from None


@contextmanager
def pid_file(path: Path | None) -> Iterator[None]:
    """Write the process id to `path`, and remove the file at the end.

    The caller has the socket, so an old file with a process id is stale.  Raises InUse for a file
    with anything else.
    """
    if path is None:
        yield
        return
    shown = printable(str(path))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise IvshmemfsError(f"--pidfile: {shown}: {error.strerror}") from None
    with open(descriptor, "r+b") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or file.read(64).strip().strip(
            b"0123456789"
        ):
            raise InUse(f"--pidfile: {shown} is not a process id's file; name another path")
        file.seek(0)
        file.truncate()
        file.write(b"%d\n" % os.getpid())
        file.flush()
        made = os.fstat(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(path), made):
                os.unlink(path)
