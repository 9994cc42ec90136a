"""Whether QEMU can put a guest with an ivshmem device back into an older state."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest.harness import missing_parts

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason=f"{missing_parts()}"),
]
SIZE = 1 << 20
SECONDS = 60.0


class Monitor:
    """QMP commands to one QEMU."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        end = time.monotonic() + SECONDS
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < end, "QEMU did not start"
                time.sleep(0.02)
        self._stream = self._socket.makefile("rw")
        self._stream.readline()
        self.run("qmp_capabilities")

    def run(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command: {"return": ...} or {"error": ...}."""
        self._stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._stream.flush()
        while True:
            answer: dict[str, Any] = json.loads(self._stream.readline())
            if "event" not in answer:
                return answer

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


@contextmanager
def machine(device: str) -> Iterator[tuple[Monitor, Path]]:
    """A machine that never runs, with this device; also the file of its region."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        region, monitor = Path(name, "region"), Path(name, "qmp")
        region.write_bytes(bytes(SIZE))
        backend = f"memory-backend-file,id=shm,share=on,mem-path={region},size={SIZE}"
        command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-m", "16M",
                   "-object", backend, "-device", device,
                   "-qmp", f"unix:{monitor},server=on,wait=off"]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as qemu:
            try:
                made = Monitor(monitor)
                yield made, region
                made.close()
            finally:
                qemu.kill()


def saved(monitor: Monitor, to: Path) -> str:
    """Save the state of the machine; why QEMU will not, or how that ended."""
    answer = monitor.run("migrate", uri=f"exec:cat >{to}")
    if "error" in answer:
        return str(answer["error"]["desc"])
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        status = str(monitor.run("query-migrate")["return"].get("status"))
        if status in ("completed", "failed"):
            return status
        time.sleep(0.05)
    return "still at it"


def test_a_guest_with_the_usual_device_cannot_be_saved(tmp_path: Path) -> None:
    """So no snapshot of it is ever restored."""
    with machine("ivshmem-plain,memdev=shm") as (monitor, _):
        assert "peer mode" in saved(monitor, tmp_path / "state")


@pytest.mark.parametrize("apart", [False, True])
def test_a_saved_guest_contains_the_region_unless_told_otherwise(
    tmp_path: Path, apart: bool
) -> None:
    """With `master=on`; x-ignore-shared leaves the region to go on by itself."""
    mark = b"a region that QEMU may take along"
    with machine("ivshmem-plain,memdev=shm,master=on") as (monitor, region):
        with region.open("r+b") as file:
            file.write(mark)
        if apart:
            wanted = [{"capability": "x-ignore-shared", "state": True}]
            assert "error" not in monitor.run("migrate-set-capabilities", capabilities=wanted)
        assert saved(monitor, tmp_path / "state") == "completed"
    assert (mark in (tmp_path / "state").read_bytes()) is not apart
