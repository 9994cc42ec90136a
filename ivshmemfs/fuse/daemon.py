"""The process that serves a mount.

A background mount forks once.  The parent waits on a pipe for the child's report: the mount can be
used, or one line with the reason why not.  The child has its own session, / as its directory and
/dev/null as its standard streams.  So it survives its terminal, and keeps no other mount busy.

The report is `<exit code> <text>`.  With exit code 0 the text is a notice for the user, or empty.
A pipe that closes without a report means that the child died.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ivshmemfs.errors import Interrupted, IvshmemfsError, MountError, UsageError
from ivshmemfs.fuse import lifeline, logs, mountpoint
from ivshmemfs.fuse.options import MountOptions, mount_flags

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.fuse.session import Session

log = logging.getLogger(__name__)

#: Retries of an unmount of a mount in use, and the longest pause before each, in seconds.
BUSY_RETRIES = 10
BUSY_SECONDS = 0.02
EXIT_SYSTEM = 2
EXIT_INTERNAL = 4
EXIT_INTERRUPTED = 8
#: The same as in pyproject.toml.  3.2 answers EIO to all requests; 3.4.0 hangs at the first one.
PYFUSE3_NEEDED = (3, 4, 2)


class Attached(NamedTuple):
    """An engine that has joined its region."""

    fs: Filesystem
    source: str  # the device in the output of df(1)
    notice: str = ""  # one line for the user


#: Joins a region; leaves it at the end of the context.
Attach = Callable[[], AbstractContextManager[Attached]]


class DaemonError(MountError):
    """The daemon could not start; it reported this text and exit code."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def mount(
    attach: Attach,
    path: str,
    options: MountOptions,
    *,
    foreground: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> str:
    """Mount on *path*; return when the mount can be used, or with *foreground* after its end.

    With *foreground*, *on_ready* is called when the mount can be used.
    Returns a notice for the user, or "".  Raises IvshmemfsError.
    """
    target = mountpoint.check(path)
    mountpoint.check_fuse_device()
    if options.log is not None:
        options.log = mountpoint.absolute(options.log, "log file")
    if foreground:
        logs.configure(options.log, foreground=True)
        try:
            _serve(attach, target, options, lambda _notice: on_ready())
        except IvshmemfsError:
            raise
        except Exception as error:
            raise _bug(target, error) from error
        return ""
    return _in_background(attach, target, options)


def _in_background(attach: Attach, target: str, options: MountOptions) -> str:
    receiving, sending = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        _be_daemon(attach, target, options, sending)
    os.close(sending)
    try:
        with os.fdopen(receiving, "rb") as pipe:
            report = pipe.read().decode(errors="surrogateescape")
    except BaseException:  # the user interrupts the command
        os.kill(child, signal.SIGTERM)
        raise
    if not report:
        _pid, status = os.waitpid(child, 0)
        raise DaemonError(EXIT_INTERNAL, f"the daemon died before it was ready: {_death(status)}")
    code, _blank, text = report.partition(" ")
    if code != "0":
        raise DaemonError(int(code), text)
    return text


def _bug(target: str, error: BaseException) -> DaemonError:
    """Log the traceback of an error that ends the daemon; return the error for the user."""
    log.critical("%s: the daemon ends", target, exc_info=error)
    if isinstance(error, MemoryError):
        return DaemonError(EXIT_SYSTEM, "the daemon ran out of memory")
    if isinstance(error, OSError) and error.strerror:  # a limit of this system
        name = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return DaemonError(EXIT_SYSTEM, f"the daemon cannot continue: {name}{error.strerror}")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return DaemonError(
            EXIT_SYSTEM, "the daemon cannot start a thread: raise the limits on processes or memory"
        )
    return DaemonError(EXIT_INTERNAL, f"internal error: {type(error).__name__}: {error}")


def _death(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit code {os.waitstatus_to_exitcode(status)}"


# --- the child --------------------------------------------------------------------------------


def _be_daemon(attach: Attach, target: str, options: MountOptions, pipe: int) -> NoReturn:
    """Serve the mount in this process, then end the process; never returns."""
    reported = False

    def report(code: int, text: str) -> None:
        nonlocal reported
        if not reported:
            reported = True
            line = " ".join(text.split())
            with suppress(OSError):  # the parent may be gone
                os.write(pipe, f"{code} {line}".encode(errors="surrogateescape"))
            os.close(pipe)

    code = 0
    try:
        # An automounter's process group must not change before the mount is there.
        asked_for = mountpoint.is_asked_for(target)
        if not asked_for:
            os.setsid()
        _detach(pipe)
        logs.configure(options.log, foreground=False)

        def ready(notice: str) -> None:
            if asked_for:
                os.setsid()
            report(0, notice)

        _serve(attach, target, options, ready)
    except IvshmemfsError as error:
        code = error.exit_code
        log.error("%s: %s", target, error)
        report(code, str(error) or type(error).__name__)
    except (KeyboardInterrupt, Interrupted):  # before the session watches signals
        code = EXIT_INTERRUPTED
        report(code, "interrupted")
    except BaseException as error:
        wrong = _bug(target, error)
        code = wrong.exit_code
        report(code, str(wrong))
    finally:
        logging.shutdown()  # writes the counts of the rate limit
        os._exit(code)


def _detach(pipe: int) -> None:
    """Leave the standard streams, and close all inherited descriptors but *pipe*."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))


def _serve(
    attach: Attach, target: str, options: MountOptions, on_ready: Callable[[str], None]
) -> None:
    """Join the region, mount, serve, leave; *on_ready* gets the notice for the user."""
    session_of = _load_session()
    faulthandler.enable()
    with attach() as attached:
        os.chdir("/")
        if attached.notice:
            log.warning("%s: %s", target, attached.notice)
        attached.fs.name_mount_point(os.fsencode(target))
        session = session_of(attached.fs, target, attached.source, options)
        held = lifeline.hold(session.device or "")
        if held is not None:
            session.hold(held)
        try:
            session.run(lambda: on_ready(attached.notice))
        except OSError as error:
            raise MountError(f"the FUSE connection broke: {error}") from error
    # The daemon has left the region; clients that wait for the end of this mount may continue.
    if held is not None:
        held.close()


def _load_session() -> type[Session]:
    """Return the class `Session`; raises MountError if pyfuse3 or libfuse3 is unusable.

    trio and pyfuse3 take longer to load than all other modules.  The parent process of a background
    mount does not need them.
    """
    try:
        import pyfuse3
    except ImportError as error:
        missing = "libfuse3" if "libfuse3" in str(error) else "pyfuse3"
        package = {"libfuse3": "fuse3", "pyfuse3": "pyfuse3"}[missing]
        raise MountError(
            f"{missing} cannot be loaded ({error}): install {package}, or use 'ivshmemfs get' and "
            "'ivshmemfs put', which need no mount"
        ) from None
    version = str(getattr(pyfuse3, "__version__", "0"))
    if _numbers(version) < PYFUSE3_NEEDED:
        needed = ".".join(str(number) for number in PYFUSE3_NEEDED)
        raise MountError(
            f"pyfuse3 {version} is too old, {needed} or newer is needed: "
            "install it in the environment of ivshmemfs"
        )
    from ivshmemfs.fuse.session import Session

    return Session


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version."""
    return tuple(int(number) for number in re.findall(r"[0-9]+", version)[:3])


def remount(path: str, options: MountOptions) -> None:
    """Change the kernel's mount at *path* to the flags in *options*.

    The daemon keeps its options.  Raises MountError, UsageError.
    """
    if os.geteuid() != 0:
        raise UsageError("mount option 'remount' is for root alone: unmount and mount again")
    entry = _ours(path)
    mountpoint.refuse_hung(entry)
    mountpoint.remount(entry.path, mount_flags(options))
    if not options.readonly and mountpoint.refuses_changes(entry.path):
        options.readonly = True
        mountpoint.remount(entry.path, mount_flags(options))
        raise MountError(
            f"{path} was mounted read-only and has no place among the peers that write: "
            "unmount it and mount it again"
        )


def _ours(path: str) -> mountpoint.MountEntry:
    """Return the ivshmemfs mount at *path*; raises MountError."""
    entry = mountpoint.find(mountpoint.resolve(path))
    if entry is None:
        raise MountError(f"{path} is not mounted")
    if entry.fstype != mountpoint.FSTYPE:
        raise MountError(f"{path} is not an ivshmemfs mount but {entry.fstype}")
    return entry


def _unmount(path: str, *, lazy: bool) -> None:
    """Unmount; retry if the mount is in use: a user's replayer (`-o notify`) uses it briefly."""
    for _ in range(BUSY_RETRIES):
        try:
            mountpoint.unmount(path, lazy=lazy)
            return
        except mountpoint.BusyMount:
            time.sleep(BUSY_SECONDS * random.random())
    mountpoint.unmount(path, lazy=lazy)


def umount(path: str, *, lazy: bool = False, seconds: float = 30.0) -> str:
    """Unmount *path* and wait until its daemon has left the region.

    Detaches a mount with a dead or stopped daemon.  Returns a notice for the user, or "".  Raises
    MountError.
    """
    entry = _ours(path)
    grip = lifeline.grasp(entry.device)
    with grip or nullcontext():
        server = lifeline.serving(grip) if grip is not None else None
        stopped = server is not None and server.stopped
        try:
            _unmount(entry.path, lazy=lazy or grip is None or stopped)
        except mountpoint.BusyMount:
            raise mountpoint.BusyMount(
                f"{path} is in use: end what uses it ('fuser -vm {path}' tells), "
                f"or detach it now with 'ivshmemfs umount --lazy {path}'"
            ) from None
        if grip is None or lazy:
            return ""
        if (other := mountpoint.of_device(entry.device)) is not None:  # so the daemon goes on
            return f"{path} is unmounted; the filesystem is still mounted at {other.path}"
        if server is not None and stopped:
            raise MountError(
                f"{path} is unmounted, but its daemon (process {server.pid}) is stopped and still "
                f"in the region: 'kill -CONT {server.pid}' lets it leave"
            )
        if not lifeline.wait_for_end(grip, seconds):
            raise MountError(
                f"{path} is unmounted, but its daemon has not ended yet: a container or service "
                "that was started meanwhile may still have it mounted; "
                f"'ivshmemfs peers {entry.source}' shows when it has left"
            )
    return ""
