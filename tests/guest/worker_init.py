"""Process 1 of a guest that mounts its region and works on it until it finds a file `stop` there.

It replaces a few files again and again: it writes a new one and moves it over the old.  It checks
that all of them are whole.  What it finds goes to the console, which the test reads.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import time
import zlib

PLACE = "/mnt/region"
FILES = 6
RB_POWER_OFF = 0x4321FEDC
libc = ctypes.CDLL(None, use_errno=True)


def say(text: str) -> None:
    with open("/dev/console", "w", encoding="ascii") as console:
        console.write(f"worker: {text}\n")


def mount(kind: str, where: str) -> None:
    os.makedirs(where, exist_ok=True)
    if libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None):
        raise OSError(ctypes.get_errno(), where)


def content_of(number: int) -> bytes:
    body = b"%d %d " % (number, time.monotonic_ns()) * (1 + number * 7919 % 4000)
    return body + b"%08x" % zlib.crc32(body)


def whole(content: bytes) -> bool:
    return content[-8:] == b"%08x" % zlib.crc32(content[:-8])


def work(number: int) -> None:
    new = f"{PLACE}/guest/new-{number}"
    with open(new, "wb") as file:
        file.write(content_of(number))
    os.rename(new, f"{PLACE}/guest/file-{number % FILES}")
    for other in range(FILES):
        name = f"{PLACE}/guest/file-{other}"
        if os.path.exists(name):
            with open(name, "rb") as file:
                if not whole(file.read()):
                    say(f"TORN {other} in round {number}")


def main() -> None:
    for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")):
        mount(kind, where)
    mount("tmpfs", "/dev/shm")
    os.symlink("/proc/self/fd", "/dev/fd")
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", PYTHONDONTWRITEBYTECODE="1")
    subprocess.run(["modprobe", "fuse"], check=True)
    os.makedirs(PLACE)
    python = sys.executable
    run = "from ivshmemfs.cli.main import main; main()"
    subprocess.run([python, "-c", run, "mount", "pci", PLACE], check=True)
    os.makedirs(f"{PLACE}/guest", exist_ok=True)
    say("mounted")
    number = 0
    while not os.path.exists(f"{PLACE}/stop"):
        number += 1
        try:
            work(number)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            # This machine was put back: what it was at had been moved and replaced already.
            say(f"OVERTAKEN in round {number}")
    subprocess.run([python, "-c", run, "umount", PLACE], check=True)
    say(f"ended well after {number} rounds")


try:
    main()
except BaseException as error:
    say(f"FAILED {error!r}")
finally:
    libc.reboot(RB_POWER_OFF)
