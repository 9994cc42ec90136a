"""The host and the guests of a test under one interface, and their mounts of the shared region."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.guest.harness import BIN, COMMAND_SECONDS, Completed, Guest, GuestError

IVSHMEMFS = str(BIN / "ivshmemfs")
MKFS = str(BIN / "mkfs.ivshmemfs")
FSCK = str(BIN / "fsck.ivshmemfs")
MANIFEST = Path(__file__).with_name("manifest.py").resolve()
SCENES = Path(__file__).with_name("scenes.py").resolve()
SCENE_SECONDS = 1800.0


class Running(Protocol):
    """A command that goes on while the test does something else."""

    def done(self) -> bool: ...

    def wait(self) -> Completed: ...


class Machine(Protocol):
    """Where commands run."""

    name: str

    def begin(self, *argv: str | Path, timeout: float = ...) -> Running: ...

    def run(self, *argv: str | Path, timeout: float = ...) -> Completed: ...


class HostCommand:
    """A command that runs on this machine."""

    def __init__(self, argv: Sequence[str], timeout: float) -> None:
        self.argv = argv
        self._timeout = timeout
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def done(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> Completed:
        try:
            out, err = self._process.communicate(timeout=self._timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, err = self._process.communicate(timeout=30)
            return Completed(self.argv, None, out, err)
        return Completed(self.argv, self._process.returncode, out, err)


class Host:
    """This machine."""

    name = "host"

    def begin(self, *argv: str | Path, timeout: float = COMMAND_SECONDS) -> HostCommand:
        return HostCommand([str(word) for word in argv], timeout)

    def run(self, *argv: str | Path, timeout: float = COMMAND_SECONDS) -> Completed:
        return self.begin(*argv, timeout=timeout).wait()


class Mount:
    """The region mounted on one machine; ``$M`` is its mount point in shell text."""

    def __init__(self, machine: Machine, place: str) -> None:
        self.machine = machine
        self.place = place

    def begin(self, script: str, timeout: float = COMMAND_SECONDS) -> Running:
        """Begin shell text and return at once."""
        return self.machine.begin(
            "/usr/bin/env", f"M={self.place}", "/bin/sh", "-euc", script, timeout=timeout
        )

    def sh(self, script: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run shell text and return what it printed; GuestError when it fails."""
        return self.begin(script, timeout).wait().check().out

    def manifest(self, path: str, timeout: float = COMMAND_SECONDS) -> dict[str, Any]:
        """What this machine sees below `path`, with checksums."""
        return manifest(self.machine, f"{self.place}/{path}", timeout)

    def mounted(self) -> bool:
        """Whether it is still there: tests unmount, and kill guests."""
        if isinstance(self.machine, Guest) and not self.machine.running:
            return False
        table = self.machine.run("/bin/cat", "/proc/mounts").check().out
        return f" {self.place} " in table

    def unmount(self) -> None:
        """Leave in order."""
        self.machine.run(IVSHMEMFS, "umount", self.place).check()

    def abandon(self) -> None:
        """Make sure that nothing stays mounted, in any state that the test left."""
        try:
            if self.mounted():
                self.machine.run("/bin/umount", "-l", self.place).check()
        except GuestError:
            if not isinstance(self.machine, Guest):
                raise
            self.machine.kill()


def manifest(machine: Machine, top: str, timeout: float = COMMAND_SECONDS) -> dict[str, Any]:
    """What a machine sees below `top`, with checksums (see manifest.py)."""
    python = "/usr/bin/python3" if isinstance(machine, Guest) else sys.executable
    out = machine.run(python, "-I", MANIFEST, top, timeout=timeout).check().out
    found: dict[str, Any] = json.loads(out)
    return found


def play(*parts: tuple[Mount, str, int]) -> None:
    """Let each mount play its part, all at once: (mount, scene, count); see scenes.py."""
    running = []
    for number, (mount, scene, count) in enumerate(parts):
        words = f"/usr/bin/python3 {SCENES} {scene} $M {mount.machine.name}-{number} {count}"
        running.append(mount.begin(words, timeout=SCENE_SECONDS))
    for command in running:
        command.wait().check()
