"""Where the system's directories are; tests put others in their place."""

from __future__ import annotations

import platform
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
        """Where regions that guests share usually stand on a host."""
        return self.dev / "shm"

    @property
    def x86(self) -> bool:
        """Whether every mapping, device memory too, bears accesses of any alignment."""
        return self.machine in ("x86_64", "i686", "AMD64")


HERE = Roots()
