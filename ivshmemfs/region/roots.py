"""The system's directories, which tests replace."""

from __future__ import annotations

import os
import platform
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Roots:
    """Directories and the machine type that devices are looked up with."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")
    machine: str = platform.machine()

    @property
    def shm(self) -> Path:
        """The usual directory of regions on a host."""
        return self.dev / "shm"

    @property
    def has_sysfs(self) -> bool:
        """Whether sysfs is mounted: without it no PCI device can be found."""
        return (self.sys / "bus").is_dir()

    def device_number(self, path: Path) -> str | None:
        """Return "major:minor" of a character device, None for any other file; raises OSError."""
        status = path.stat()
        if not stat.S_ISCHR(status.st_mode):
            return None
        return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"

    @property
    def x86(self) -> bool:
        """Whether every mapping, also of device memory, allows unaligned accesses."""
        return self.machine in ("x86_64", "i686", "AMD64")


HERE = Roots()
