"""Messages between two processes: a queue beside a Unix socket and MPI over shared memory.

Latency is half of the time from a message to the answer to it, of which there is one at a time.
Rates are of messages that one process sends and the other receives.  Both processes are awake.
"""

from __future__ import annotations

import json
import queue
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import ivshmemfs
from bench.peers import ENVIRONMENT, PATIENCE, TOP, make_region

SIZES: Final = (64, 64 << 10)
MICROSECOND: Final = 1e-6


class Channel(NamedTuple):
    """One side of a way between two processes; `receive` waits."""

    send: Callable[[bytes], object]
    receive: Callable[[], bytes]


def messages(shm: Path, *, rounds: int, count: int) -> dict[str, float]:
    """Median latencies in microseconds and rates in messages per second, by way and size.

    A way that is not installed has no figures; a line says so.
    """
    region = make_region(shm / "messages.region", "64M")
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for size in SIZES:
            for name, figures in (
                ("queue", _of_queue(region, size, count)),
                ("socket", _of_socket(size, count)),
                ("MPI", _of_mpi(size, count)),
            ):
                for what, value in figures.items():
                    found.setdefault(f"{what} of {_named(size)}: {name}", []).append(value)
    figures = {name: median(values) for name, values in found.items()}
    ratios = {
        f"{name} / {other}": median(
            mine / theirs
            for mine, theirs in zip(values, found[f"{name.split(':')[0]}: {other}"], strict=True)
        )
        for name, values in found.items()
        for other in ("socket", "MPI")
        if name.endswith("queue") and f"{name.split(':')[0]}: {other}" in found
    }
    return figures | ratios


def _named(size: int) -> str:
    return f"{size >> 10} KiB" if size >= 1 << 10 else f"{size} B"


def measure(here: Channel, size: int, count: int) -> dict[str, float]:
    """Ask the other side, which runs `answer`, for a latency and a rate."""
    message, times = b"x" * size, list[float]()
    for _ in range(count):
        began = time.perf_counter()
        here.send(message)
        here.receive()
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(count):
        here.send(message)
    here.send(b"")
    here.receive()
    rate = count / (time.perf_counter() - began)
    return {"latency in us": median(times) / 2 / MICROSECOND, "messages per second": rate}


def answer(there: Channel, count: int) -> None:
    """Answer the first `count` messages, then one for all that come up to an empty one."""
    for _ in range(count):
        there.send(there.receive())
    while there.receive():
        pass
    there.send(b"done")


# --- the ways -----------------------------------------------------------------------------------


def queues(region: str, size: int, *, first: bool) -> Iterator[Channel]:
    """Yield the channel of one side: two queues, one for each direction."""
    with ivshmemfs.open(region) as fs:
        ways = [
            fs.queue(f"/{name}-{size}", records=64, record_size=size) for name in ("there", "back")
        ]
        out, back = ways if first else ways[::-1]
        yield Channel(out.put, lambda: back.get(timeout=PATIENCE))
        for way in ways:
            way.close()


def _of_queue(region: Path, size: int, count: int) -> dict[str, float]:
    with _other_side("queue", str(region), str(size), str(count)) as process:
        for channel in queues(str(region), size, first=True):
            found = measure(channel, size, count)
        _ended(process)
    return found


def _of_socket(size: int, count: int) -> dict[str, float]:
    """A stream socket, since packets have a limit of size; each message is as long as agreed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with (
        closing(ours), closing(theirs),
        _other_side("socket", str(theirs.fileno()), str(size), str(count),
                    keep=theirs.fileno()) as process,
    ):  # fmt: skip
        theirs.close()
        found = measure(stream(ours), size, count)
        _ended(process)
    return found


def stream(one: socket.socket) -> Channel:
    """A channel over a stream socket: length, then contents."""

    def exactly(length: int) -> bytes:
        parts, missing = list[bytes](), length
        while missing:
            part = one.recv(missing)
            if not part:
                raise EOFError("the other side has gone")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    return Channel(
        lambda message: one.sendall(len(message).to_bytes(4, "little") + message),
        lambda: exactly(int.from_bytes(exactly(4), "little")),
    )


def _of_mpi(size: int, count: int) -> dict[str, float]:
    starter = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which(
        "mpiexec"
    )
    if find_spec("mpi4py") is None:
        starter = None
    if starter is None:
        return {}
    done = subprocess.run(
        [starter, "-n", "2", sys.executable, "-m", "bench.messages", "mpi", str(size), str(count)],
        capture_output=True, text=True, cwd=TOP, env=ENVIRONMENT, timeout=PATIENCE, check=True,
    )  # fmt: skip
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _mpi(size: int, count: int) -> None:
    """Both sides of MPI: it starts two of this process."""
    MPI = import_module("mpi4py.MPI")  # it is not installed everywhere
    world = MPI.COMM_WORLD
    other, buffer = 1 - world.Get_rank(), bytearray(size)
    state = MPI.Status()

    def receive() -> bytes:
        world.Recv([buffer, MPI.BYTE], source=other, status=state)
        return bytes(memoryview(buffer)[: state.Get_count(MPI.BYTE)])

    channel = Channel(lambda message: world.Send([message, MPI.BYTE], dest=other), receive)
    if world.Get_rank():
        answer(channel, count)
    else:
        print(json.dumps(measure(channel, size, count)))


@contextmanager
def _other_side(*words: str, keep: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.messages", *words],
        cwd=TOP, env=ENVIRONMENT, pass_fds=() if keep is None else (keep,),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)


def _ended(process: subprocess.Popen[bytes]) -> None:
    if process.wait(PATIENCE):
        raise OSError("the other side failed")


def main(way: str, *words: str) -> None:
    """Be the other side of a way."""
    if way == "mpi":
        _mpi(int(words[0]), int(words[1]))
    elif way == "socket":
        with socket.socket(fileno=int(words[0])) as one:
            answer(stream(one), int(words[2]))
    else:
        for channel in queues(words[0], int(words[1]), first=False):
            answer(channel, int(words[2]))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except queue.Empty:
        sys.exit("no message came")
