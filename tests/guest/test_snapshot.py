"""Whether QEMU can put a guest with an ivshmem device back into an older state."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.guest.harness import dies_with_parent, kernel_root, kvm_works, missing_parts
from tests.guest.initramfs import write_initramfs
from tests.guest.machines import FSCK, IVSHMEMFS, MKFS, Host

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
        with suppress(OSError):  # QEMU has ended, with something unsent
            self._stream.close()
        self._socket.close()

    def until(self, command: str, key: str, *ends: str) -> str:
        """Ask again and again until the answer's field `key` is one of `ends`; the last answer."""
        end, found = time.monotonic() + SECONDS, ""
        while time.monotonic() < end and found not in ends:
            time.sleep(0.05)
            found = str(self.run(command)["return"].get(key))
        return found

    def keep_region_apart(self) -> None:
        """What is shared with others is neither saved nor restored with the machine."""
        wanted = [{"capability": "x-ignore-shared", "state": True}]
        assert "error" not in self.run("migrate-set-capabilities", capabilities=wanted)


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
    return monitor.until("query-migrate", "status", "completed", "failed")


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
            monitor.keep_region_apart()
        assert saved(monitor, tmp_path / "state") == "completed"
    assert (mark in (tmp_path / "state").read_bytes()) is not apart


class Worker:
    """A guest of its own memory that works on a region (see worker_init.py), run by one QEMU."""

    def __init__(self, initramfs: Path, region: Path, place: Path, *, restored: bool) -> None:
        self.console = place / "console"
        monitor = place / f"qmp-{restored:d}"
        kernel = next((kernel_root() / "boot").glob("vmlinuz-*"))
        backend = (
            f"memory-backend-file,id=shm,share=on,mem-path={region},size={region.stat().st_size}"
        )
        command = [
            "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot", "-m", "1G",
            "-accel", "kvm" if kvm_works() else "tcg", "-cpu", "max", "-smp", "2",
            "-kernel", str(kernel), "-initrd", str(initramfs),
            "-append", "console=ttyS0 quiet panic=-1 no_timer_check",
            "-chardev", f"file,id=console,path={self.console},append=on",
            "-serial", "chardev:console",
            "-object", backend, "-device", "ivshmem-plain,memdev=shm,master=on",
            "-qmp", f"unix:{monitor},server=on,wait=off",
            *(["-incoming", "defer"] if restored else []),
        ]  # fmt: skip
        self.qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=dies_with_parent)
        self.monitor = Monitor(monitor)
        self.monitor.keep_region_apart()

    def says(self, text: str) -> None:
        """Wait until it has said so."""
        end = time.monotonic() + 5 * SECONDS
        while text not in self.console.read_text(errors="replace"):
            assert self.qemu.poll() is None, self.console.read_text(errors="replace")
            assert time.monotonic() < end, self.console.read_text(errors="replace")
            time.sleep(0.1)

    def restore(self, state: Path) -> None:
        self.monitor.run("migrate-incoming", uri=f"exec:cat {state}")
        assert self.monitor.until("query-migrate", "status", "completed", "failed") == "completed"
        assert "error" not in self.monitor.run("cont")

    def kill(self) -> None:
        self.monitor.close()
        self.qemu.kill()
        self.qemu.wait()


def churn(mount: Path, rounds: int) -> None:
    """Use every free block and free it again."""
    for _ in range(rounds):
        with suppress(OSError), (mount / "filler").open("wb") as file:  # until the region is full
            while True:
                file.write(os.urandom(1 << 20))
        (mount / "filler").unlink()


def forget_address(state: Path, block: bytes) -> None:
    """Let a saved machine not say where its device's memory was.

    QEMU refuses a machine that has the memory elsewhere, and a new one has none mapped yet.  The
    state of the device, with its address, comes later.  Behind the first mention of the block are
    its size and this address, 8 bytes each.
    """
    with state.open("r+b") as file:
        at = file.read(1 << 20).index(block) + len(block) + 8
        file.seek(at)
        file.write(bytes(8))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in list(folder.glob("file-*"))}


def keep(folder: Path, to: Path) -> dict[str, bytes]:
    """Give the files of a folder further names in another; what is in them."""
    to.mkdir()
    for path in folder.glob("file-*"):
        (to / path.name).hardlink_to(path)
    return contents(to)


def wait_for_change(folder: Path, seen: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """What is in a folder once all of its files differ from what was `seen`, or there are some."""
    end = time.monotonic() + 5 * SECONDS
    while time.monotonic() < end:
        with suppress(OSError):
            found = contents(folder)
            if found and not found.items() & (seen or {}).items():
                return found
        time.sleep(0.1)
    pytest.fail(f"nothing changed in {folder}")


def silent_slots(host: Host, region: Path) -> list[tuple[str, str]]:
    """The slots of peers that show no life, and what they were doing."""
    lines = host.run(IVSHMEMFS, "peers", "--json", region).check().out.splitlines()
    peers = [json.loads(line) for line in lines]
    return [(str(peer["slot"]), peer["state"]) for peer in peers if peer["life"] != "alive"]


def stop_between_changes(worker: Worker, host: Host, region: Path) -> str:
    """Stop the machine while it is not filling blocks; the slot of its mount.

    Put back into the middle of that it might spoil one, whosever it is by then, as documented.
    """
    for _ in range(50):
        assert "error" not in worker.monitor.run("stop")
        ((slot, doing),) = silent_slots(host, region)
        if doing == "idle":
            return slot
        assert "error" not in worker.monitor.run("cont")
        time.sleep(0.05)
    pytest.fail("it never stops changing something")


@contextmanager
def mounted(place: Path) -> Iterator[tuple[Host, Path]]:
    """This machine, which has a new region mounted at `place`; and the region."""
    host = Host()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        region = Path(name, "region")
        host.run(MKFS, "--size", "16M", region).check()
        place.mkdir()
        host.run(IVSHMEMFS, "mount", region, place).check()
        try:
            yield host, region
        finally:
            host.run(IVSHMEMFS, "umount", place)
            host.run("/bin/umount", "-l", place)  # if that did not do


def run_and_put_back(host: Host, region: Path, place: Path, work: Path) -> dict[str, bytes]:
    """A guest works, is put back to where it was before the last part of that, and works on.

    Returns what was kept of its files before that.
    """
    initramfs, state = work / "initramfs", work / "state"
    write_initramfs(initramfs, Path(__file__).with_name("worker_init.py"))
    worker = Worker(initramfs, region, work, restored=False)
    try:
        worker.says("mounted")
        seen = wait_for_change(place / "guest")
        slot = stop_between_changes(worker, host, region)
        assert saved(worker.monitor, state) == "completed"
        forget_address(state, b"/shm")
        assert "error" not in worker.monitor.run("cont")
        seen = wait_for_change(place / "guest", seen)  # of which it will know nothing
        worker.kill()
        host.run(IVSHMEMFS, "evict", region, slot).check()
        churn(place, 3)
        kept = keep(place / "guest", place / "kept")
        worker = Worker(initramfs, region, work, restored=True)
        worker.restore(state)
        seen = wait_for_change(place / "guest", seen)
        churn(place, 1)
        wait_for_change(place / "guest", seen)
        (place / "stop").touch()
        worker.says("ended well")
    finally:
        worker.kill()
    return kept


def test_a_guest_that_is_put_back_while_the_region_went_on(tmp_path: Path) -> None:
    """Its files are whole, those of others do not change, and it goes on."""
    place = tmp_path / "host"
    with mounted(place) as (host, region):
        ours = os.urandom(3 << 20)
        (place / "ours").write_bytes(ours)
        kept = run_and_put_back(host, region, place, tmp_path)
        console = (tmp_path / "console").read_text(errors="replace")
        assert "TORN" not in console
        assert "FAILED" not in console
        assert console.count("OVERTAKEN") <= 1, "only what was at hand can have been overtaken"
        assert (place / "ours").read_bytes() == ours
        assert contents(place / "kept") == kept
        host.run(FSCK, "-n", region).check()
