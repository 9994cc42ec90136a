"""One data set for many readers: values by key beside memcached and beside plain files.

The same client asks memcached and the front end of `examples/`, over loopback.  All rates are of
one process that asks for one value after the other.
"""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median

import ivshmemfs
from bench.peers import ENVIRONMENT, PATIENCE, TOP, available_cpus, make_region, ours

MEMCACHED = "memcached"
SIZE = 100  # bytes of a value
Store = Callable[[bytes, bytes], None]


class MemcachedClient:
    """One connection that sends a command and waits for its reply."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def get(self, key: bytes) -> bytes:
        """The value of a key; raises LookupError when the server has none."""
        reply = self._ask(b"get %s\r\n" % key, b"END\r\n")
        head, _line, rest = reply.partition(b"\r\n")
        if not head.startswith(b"VALUE"):
            raise LookupError(key)
        return rest[: int(head.split()[3])]

    def set(self, key: bytes, value: bytes) -> None:
        """Store a value; raises OSError when the server refuses it."""
        reply = self._ask(b"set %s 0 0 %d\r\n%s\r\n" % (key, len(value), value), b"\r\n")
        if reply != b"STORED\r\n":
            raise OSError(reply.decode(errors="replace"))

    def _ask(self, command: bytes, end: bytes) -> bytes:
        self._socket.sendall(command)
        reply = b""
        while not reply.endswith(end):
            got = self._socket.recv(65536)
            if not got:
                raise OSError("the server has closed the connection")
            reply += got
        return reply


def values(shm: Path, work: Path, *, rounds: int, count: int) -> dict[str, float]:
    """Gets and sets per second of *count* values of 100 bytes, and the ratios to memcached.

    "in process" is `fs.kv`; "front end" is examples/memcached_frontend.py; "files" opens, reads and
    closes plain files on a mount.  Without memcached there are no ratios.
    """
    region = make_region(shm / "values.region", "64M")
    keys = [b"key-%06d" % number for number in range(count)]
    data = {key: random.Random(key).randbytes(SIZE) for key in keys}
    with ExitStack() as stack:
        fs = stack.enter_context(ivshmemfs.open(str(region)))
        kv = fs.kv("/cache")
        batch = 1000
        for first in range(0, count, batch):
            kv.set_many({key: data[key] for key in keys[first : first + batch]})
        mount = stack.enter_context(ours(region, work / "values", available_cpus()))
        front = stack.enter_context(_front_end(region))
        readers: dict[str, Callable[[bytes], bytes | None]] = {
            "in process": kv.get,
            "front end": front.get,
            "files": lambda key: (mount.path / "cache" / key.decode()).read_bytes(),
        }
        writers: dict[str, Store] = {"in process": kv.set, "front end": front.set}
        if shutil.which(MEMCACHED):
            theirs = stack.enter_context(_memcached())
            for key in keys:
                theirs.set(key, data[key])
            readers[MEMCACHED], writers[MEMCACHED] = theirs.get, theirs.set
        found: dict[str, list[float]] = {}
        for turn in range(rounds):
            asked = random.Random(turn).choices(keys, k=count)
            for name, get in readers.items():
                found.setdefault(f"gets: {name}", []).append(_gets(get, asked, data))
            for name, store in writers.items():
                rate = _sets(store, asked[: count // 4], data)
                found.setdefault(f"sets: {name}", []).append(rate)
    rates = {name: median(found[name]) for name in found}
    ratios = {
        f"{name} / {MEMCACHED}": median(
            ours / theirs
            for ours, theirs in zip(
                found[name], found[f"{name.split(':')[0]}: {MEMCACHED}"], strict=True
            )
        )
        for name in found
        if not name.endswith(MEMCACHED) and f"gets: {MEMCACHED}" in found
    }
    return rates | ratios


def _gets(
    get: Callable[[bytes], bytes | None], asked: list[bytes], data: dict[bytes, bytes]
) -> float:
    started = time.perf_counter()
    for key in asked:
        if get(key) != data[key]:
            raise LookupError(f"a wrong value for {key!r}")
    return len(asked) / (time.perf_counter() - started)


def _sets(store: Store, asked: list[bytes], data: dict[bytes, bytes]) -> float:
    started = time.perf_counter()
    for key in asked:
        store(key, data[key])
    return len(asked) / (time.perf_counter() - started)


@contextmanager
def _front_end(region: Path) -> Iterator[MemcachedClient]:
    script = TOP / "examples" / "memcached_frontend.py"
    command = [sys.executable, str(script), str(region), "/cache", "0"]
    with _server(command) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[-1])
        with closing(MemcachedClient(port)) as client:
            yield client


@contextmanager
def _memcached() -> Iterator[MemcachedClient]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [MEMCACHED, "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "nobody"]
    with _server(command), closing(_connected(port)) as client:
        yield client


def _connected(port: int) -> MemcachedClient:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return MemcachedClient(port)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


@contextmanager
def _server(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=TOP
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)
        if process.stdout is not None:
            process.stdout.close()
