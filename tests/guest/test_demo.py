"""The demonstration that the README begins with: it must work, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def leftovers() -> list[str]:
    """Regions, mounts and QEMUs of a demonstration."""
    found = [str(path) for path in Path("/dev/shm").glob("ivshmemfs-demo*")]
    found += [str(path) for path in Path("/tmp").glob("ivshmemfs-demo*")]
    mounts = Path("/proc/mounts").read_text(errors="surrogateescape").splitlines()
    found += [line for line in mounts if "/ivshmemfs-demo" in line]
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_bytes().split(b"\0")
        except OSError:
            continue
        found += [word.decode() for word in words if b"mem-path=/dev/shm/ivshmemfs-demo" in word]
    return found


@pytest.fixture
def clean() -> Iterator[None]:
    assert leftovers() == []
    yield
    assert leftovers() == []


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(clean: None) -> Iterator[Start]:
    """Starts a demonstration, and ends it when the test could not."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        demo = subprocess.Popen(
            ["sh", str(ROOT / "scripts/demo"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(demo)
        return demo

    yield run
    for demo in started:
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGTERM)
            demo.communicate(timeout=60)


def test_two_mounts_on_this_machine(start: Start) -> None:
    demo = start()
    out, _ = demo.communicate(timeout=300)
    assert demo.returncode == 0, out
    assert "Hello from A" in out
    assert out.endswith("The demo passed.\n")


@pytest.mark.guest
@pytest.mark.usefixtures("workplace")
def test_the_host_and_a_guest(start: Start) -> None:
    demo = start("--guest")
    out, _ = demo.communicate(timeout=900)
    assert demo.returncode == 0, out
    assert "host |   Hello from the guest" in out
    assert "guest |   Hello from the host" in out


@pytest.mark.guest
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("workplace")
def test_an_interrupted_demonstration_cleans_up(start: Start, number: signal.Signals) -> None:
    demo = start("--guest")
    assert demo.stdout is not None
    for line in demo.stdout:
        if "A QEMU guest boots" in line:
            break
    time.sleep(3)
    assert any("mem-path" in trace for trace in leftovers())
    os.killpg(demo.pid, number)
    demo.communicate(timeout=60)
    assert demo.returncode == 128 + number
