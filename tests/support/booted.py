"""A Debian that systemd boots: in namespaces and a control group of this machine, without a guest.

    state     what ends it
    off       `boot` mounts the root, with what earlier boots wrote, and starts systemd
    booting   systemd has reached its default target, or given up
    up        the script has ended; systemd stops all units and the first process ends
    off       as before: nothing is left but the root's changes and what is in `shm`

systemd takes the machine for a container.  So it starts no udev, loads no module and makes no
device unit.  What it does with mounts, units, their order and their logs is as on a real machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.roots import PATH, missing

_BOOT_SECONDS = 600.0
#: Enters the control group in $1, then the namespaces, then the root, where systemd starts.
_ENTER = """set -eu
echo 0 >"$1/cgroup.procs"
shift
exec unshare -m -p -f -C -u -i -n --kill-child --propagation private sh -euc '
lower=$1 upper=$2 shm=$3 console=$4
hostname debian
mount -t tmpfs none /mnt
mkdir /mnt/root
mount -t overlay -o "lowerdir=$lower,upperdir=$upper/changes,workdir=$upper/work" none /mnt/root
cd /mnt/root
mount -t proc proc proc
mount -t sysfs -o ro sys sys
mount -t cgroup2 cgroup sys/fs/cgroup
mount -t tmpfs -o mode=755 dev dev
node() { mknod -m 666 "dev/$1" c "$2" "$3"; }
node null 1 3; node zero 1 5; node full 1 7; node random 1 8; node urandom 1 9; node tty 5 0
node fuse 10 229; node autofs 10 235
ln -s /proc/self/fd dev/fd
mkdir dev/shm
mount --bind "$shm" dev/shm
touch dev/console
mount --bind "$console" dev/console
exec env -i container=lxc PATH="$PATH" setpriv --bounding-set=-sys_module,-sys_time \\
    chroot . /sbin/init --show-status=0 --log-target=null
' sh "$@"
"""
_SERVICE = """[Unit]
After=default.target
[Service]
Type=exec
StandardOutput=append:/dev/console
StandardError=append:/dev/console
ExecStart=/bin/sh -euc 'systemctl is-system-running --wait || true; . /root/script'
ExecStopPost=/bin/sh -c 'echo "exit $EXIT_STATUS" >>/dev/console'
ExecStopPost=systemctl --no-block --job-mode=replace-irreversibly start poweroff.target
"""


def missing_for_systemd() -> str:
    """What this machine lacks for a `Machine`, or ""."""
    if lacking := missing():
        return lacking
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "this kernel has no overlayfs"
    try:
        with _control_group():
            return ""
    except OSError as error:
        return f"no control group can be made here: {error}"


@contextlib.contextmanager
def _control_group() -> Iterator[Path]:
    """A control group (version 2) with nothing in it, removed at the end."""
    mounts = (
        line.split()
        for line in Path("/proc/mounts").read_text(errors="surrogateescape").splitlines()
    )
    top = next((Path(place) for _, place, kind, *_ in mounts if kind == "cgroup2"), None)
    if top is None:
        raise OSError("none of version 2 is mounted")
    group = Path(tempfile.mkdtemp(prefix="ivshmemfs-test-", dir=top))
    try:
        yield group
    finally:
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):  # a process of it may need a moment to go
                os.rmdir(folder)


@dataclass(frozen=True)
class Boot:
    """What a boot brought: the state of the system before the script, and what the script did."""

    state: str
    exit: str
    out: str


class Machine:
    """A root that is booted, once or several times; *shm* is what its /dev/shm shows.

    Its files are those of *lower* (the first of several counts) until it changes them.
    """

    def __init__(self, lower: Sequence[Path], place: Path, shm: Path) -> None:
        self._lower = ":".join(map(str, lower))
        self._upper = place / "upper"
        self._console = place / "console"
        self.shm = shm
        self.changes = self._upper / "changes"
        for folder in ("changes/root", "changes/etc/systemd/system/default.target.wants", "work"):
            (self._upper / folder).mkdir(parents=True)
        self.write("etc/systemd/system/script.service", _SERVICE)
        link = self.changes / "etc/systemd/system/default.target.wants/script.service"
        link.symlink_to("../script.service")

    def write(self, name: str, text: str) -> None:
        """Write a file of the root while the machine is off."""
        path = self.changes / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def boot(self, script: str, files: Sequence[Path] = ()) -> Boot:
        """Boot, run shell text, power off; *files* are in its /root.

        The text runs when all jobs of the boot have ended, in the way that they have.
        """
        for file in files:
            shutil.copy(file, self.changes / "root")
        self.write("root/script", script)
        self._console.write_text("")
        with _control_group() as group:
            subprocess.run(
                ["sh", "-c", _ENTER, "sh", group, self._lower, self._upper, self.shm,
                 self._console],
                stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_BOOT_SECONDS,
                env={"PATH": PATH},
            )  # fmt: skip
        text = self._console.read_text(errors="replace")
        state, _, rest = text.partition("\n")
        out, found, status = rest.rpartition("exit ")
        assert found, f"the script did not end:\n{text}"
        return Boot(state, status.strip(), out)
