"""examples/memcached_frontend.py: its protocol by raw sockets, and two front ends on one region."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from pymemcache.client.base import Client as Memcache
from pymemcache.exceptions import MemcacheClientError, MemcacheServerError

import ivshmemfs
from tests.support.checks import assert_clean
from tests.support.mounts import ENVIRONMENT, PATIENCE, TOP
from tests.support.regions import TestRegion, new_region

SCRIPT = TOP / "examples" / "memcached_frontend.py"
VALUE_MAX = 1 << 20


@contextmanager
def frontend(region: Path) -> Iterator[int]:
    """Run a front end; its port."""
    words = [sys.executable, str(SCRIPT), str(region), "/cache", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().rpartition(" ")[2])
            assert process.poll() is None
        finally:
            process.terminate()


class Wire:
    """A connection, byte by byte."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._file = self.socket.makefile("rb")

    def ask(self, text: bytes) -> bytes:
        """Send bytes and return one line of the answer."""
        self.socket.sendall(text)
        return self.line()

    def line(self) -> bytes:
        return self._file.readline()

    def get(self, command: bytes) -> list[bytes]:
        """Send a command and return the lines of its answer up to END."""
        self.socket.sendall(command + b"\r\n")
        lines = []
        while (line := self.line()) != b"END\r\n":
            assert line, "the connection ended"
            lines.append(line)
        return lines

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@pytest.fixture
def region() -> Iterator[TestRegion]:
    with new_region(16 << 20) as made:
        yield made
        assert_clean(made)


@pytest.fixture
def wires(region: TestRegion) -> Iterator[tuple[Wire, Wire]]:
    """Connections to two front ends, which are two processes."""
    with ExitStack() as stack:
        ports = [stack.enter_context(frontend(region.path)) for _ in range(2)]
        one, other = Wire(ports[0]), Wire(ports[1])
        stack.callback(one.close)
        stack.callback(other.close)
        yield one, other


def test_each_command(wires: tuple[Wire, Wire]) -> None:
    wire, other = wires
    assert wire.get(b"get k") == []
    assert wire.ask(b"set k 5 0 3\r\nabc\r\n") == b"STORED\r\n"
    assert other.get(b"get k none") == [b"VALUE k 5 3\r\n", b"abc\r\n"]
    assert wire.ask(b"add k 0 0 1\r\nx\r\n") == b"NOT_STORED\r\n"
    assert wire.ask(b"add new 0 0 1\r\nx\r\n") == b"STORED\r\n"
    assert wire.ask(b"replace none 0 0 1\r\nx\r\n") == b"NOT_STORED\r\n"
    assert wire.ask(b"replace k 7 0 0\r\n\r\n") == b"STORED\r\n"
    assert other.get(b"get k new") == [b"VALUE k 7 0\r\n", b"\r\n", b"VALUE new 0 1\r\n", b"x\r\n"]
    assert wire.ask(b"delete k\r\n") == b"DELETED\r\n"
    assert other.ask(b"delete k\r\n") == b"NOT_FOUND\r\n"
    assert wire.ask(b"version\r\n") == f"VERSION {ivshmemfs.__version__}\r\n".encode()
    assert b"STAT curr_items 1\r\n" in wire.get(b"stats")
    assert other.ask(b"flush_all\r\n") == b"OK\r\n"
    assert wire.get(b"get new") == []
    assert wire.ask(b"quit\r\n") == b""


def test_counting(wires: tuple[Wire, Wire]) -> None:
    wire, other = wires
    assert wire.ask(b"incr n 1\r\n") == b"NOT_FOUND\r\n"
    wire.ask(b"set n 3 0 2\r\n10\r\n")
    assert wire.ask(b"incr n 5\r\n") == b"15\r\n"
    assert other.ask(b"decr n 20\r\n") == b"0\r\n"
    assert other.ask(b"incr n 18446744073709551615\r\n") == b"18446744073709551615\r\n"
    assert other.ask(b"incr n 1\r\n") == b"0\r\n"
    assert wire.get(b"get n") == [b"VALUE n 3 1\r\n", b"0\r\n"]
    wire.ask(b"set n 0 0 5000\r\n" + b"1" * 5000 + b"\r\n")
    for text, by in ((b"word", b"1"), (b"5", b"word"), (b"5", b"-1"), (b"5", b"1" * 5000)):
        wire.ask(b"set n 0 0 %d\r\n%s\r\n" % (len(text), text))
        assert wire.ask(b"incr n %s\r\n" % by).startswith(b"CLIENT_ERROR ")


def test_cas_takes_the_version_that_gets_told(wires: tuple[Wire, Wire]) -> None:
    wire, other = wires
    wire.ask(b"set k 0 0 1\r\na\r\n")
    version = wire.get(b"gets k")[0].split()[4]
    other.ask(b"set k 0 0 1\r\nb\r\n")
    assert wire.ask(b"cas k 0 0 1 %s\r\nc\r\n" % version) == b"EXISTS\r\n"
    version = wire.get(b"gets k")[0].split()[4]
    assert other.ask(b"cas k 0 0 1 %s\r\nd\r\n" % version) == b"STORED\r\n"
    assert wire.ask(b"cas none 0 0 1 %s\r\nd\r\n" % version) == b"NOT_FOUND\r\n"


def test_noreply_answers_nothing(wires: tuple[Wire, Wire]) -> None:
    wire, _ = wires
    wire.socket.sendall(b"set k 0 0 1 noreply\r\na\r\nincr k 1 noreply\r\nnonsense noreply\r\n")
    wire.socket.sendall(b"delete none noreply\r\nflush_all noreply\r\nset k 0 0 1 noreply\r\nz\r\n")
    assert wire.get(b"get k") == [b"VALUE k 0 1\r\n", b"z\r\n"]


def test_expiry(wires: tuple[Wire, Wire]) -> None:
    wire, other = wires
    assert wire.ask(b"set gone 0 -1 1\r\nx\r\n") == b"STORED\r\n"
    assert wire.ask(b"set past 0 %d 1\r\nx\r\n" % (int(time.time()) - 5)) == b"STORED\r\n"
    assert wire.ask(b"set later 0 %d 1\r\nx\r\n" % (int(time.time()) + 500)) == b"STORED\r\n"
    assert wire.ask(b"set soon 0 500 1\r\nx\r\n") == b"STORED\r\n"
    assert other.get(b"get gone past") == []
    assert len(other.get(b"get later soon")) == 4
    assert b"STAT curr_items 2\r\n" in wire.get(b"stats")  # what has expired was removed
    assert wire.ask(b"set gone 0 -1 1\r\nx\r\n") == b"STORED\r\n"
    assert wire.ask(b"incr gone 1\r\n") == b"NOT_FOUND\r\n"
    assert wire.ask(b"delete gone\r\n") == b"NOT_FOUND\r\n"
    assert wire.ask(b"add gone 0 0 1\r\ny\r\n") == b"STORED\r\n"


@pytest.mark.parametrize(
    "line",
    [b"", b"nonsense", b"get", b"set k 0 0", b"set k 0 0 1 2 3", b"incr k", b"delete",
     b"get " + b"k" * 251, b"delete a\x01b", b"set k 0 0 x", b"set k 0 0 -1", b"version 1",
     b"SET k 0 0 1", b"cas k 0 0 1"],
)  # fmt: skip
def test_wrong_lines_are_told_and_the_connection_goes_on(
    wires: tuple[Wire, Wire], line: bytes
) -> None:
    wire, _ = wires
    assert wire.ask(line + b"\r\n").split()[0] in (b"ERROR", b"CLIENT_ERROR")
    assert wire.ask(b"version\r\n").startswith(b"VERSION")


def test_wrong_blocks(wires: tuple[Wire, Wire]) -> None:
    wire, _ = wires
    assert wire.ask(b"set k 0 0 1\r\nabc") == b"CLIENT_ERROR bad data chunk\r\n"
    wire.socket.sendall(b"\r\n")
    wire.line()  # the rest counts as a command
    assert wire.ask(b"set %s 0 0 1\r\na\r\n" % (b"k" * 251)).startswith(b"CLIENT_ERROR")
    assert wire.ask(b"set k x 0 1\r\na\r\n").startswith(b"CLIENT_ERROR")
    assert wire.ask(b"set k 0 0 %d\r\n%s\r\n" % (VALUE_MAX, bytes(VALUE_MAX))) == b"STORED\r\n"
    large = bytes(VALUE_MAX + 1)
    assert wire.ask(b"set k 0 0 %d\r\n%s\r\n" % (len(large), large)).startswith(b"SERVER_ERROR")
    assert wire.ask(b"version\r\n").startswith(b"VERSION")
    assert len(wire.get(b"get k")) == 2


def test_a_client_that_leaves_and_one_that_never_ends_its_line(wires: tuple[Wire, Wire]) -> None:
    wire, _ = wires
    port = wire.socket.getpeername()[1]
    leaving = Wire(port)
    leaving.socket.sendall(b"set k 0 0 100\r\nabc")
    leaving.close()
    endless = Wire(port)
    endless.socket.sendall(b"g" * (66 << 10))
    assert endless.line() == b""
    endless.close()
    assert wire.ask(b"version\r\n").startswith(b"VERSION")


def test_pieces_of_any_size_mean_the_same(wires: tuple[Wire, Wire]) -> None:
    wire, _ = wires
    for byte in b"set k 0 0 4\r\na\r\nb\r\nget k\r\n":
        wire.socket.sendall(bytes([byte]))
    assert [wire.line() for _ in range(5)] == [
        b"STORED\r\n", b"VALUE k 0 4\r\n", b"a\r\n", b"b\r\n", b"END\r\n",
    ]  # fmt: skip


def test_a_full_region_is_told(wires: tuple[Wire, Wire]) -> None:
    wire, other = wires
    answers = {
        wire.ask(b"set k%d 0 0 %d\r\n%s\r\n" % (n, VALUE_MAX, bytes(VALUE_MAX))) for n in range(20)
    }
    assert len(answers) == 2
    assert any(answer.startswith(b"SERVER_ERROR") for answer in answers)
    other.ask(b"flush_all\r\n")
    assert wire.ask(b"set k 0 0 1\r\na\r\n") == b"STORED\r\n"


def test_no_value_is_stale_on_the_other_front_end(wires: tuple[Wire, Wire]) -> None:
    for number in range(200):
        for writer, reader in (wires, wires[::-1]):
            text = b"%d" % number
            assert writer.ask(b"set k 0 0 %d\r\n%s\r\n" % (len(text), text)) == b"STORED\r\n"
            assert reader.get(b"get k")[1] == text + b"\r\n"
            assert reader.ask(b"incr k 1\r\n") == b"%d\r\n" % (number + 1)


def test_values_are_files_and_hostile_notes_are_harmless(
    region: TestRegion, wires: tuple[Wire, Wire]
) -> None:
    wire, _ = wires
    wire.ask(b"set a/b 1 0 1\r\nx\r\n")
    with ivshmemfs.open(region.path) as fs:
        assert fs.listdir("/cache") == ["a%2Fb"]
        fs.write_bytes("/cache/plain", b"from a file")
        cache = fs.kv("/cache")
        for number, note in enumerate((b"x", b"1", b"1 2 3", b"9" * 5000 + b" 1", b"\xff \xff")):
            cache.set(f"n{number}", b"v", note)
    assert wire.get(b"get plain") == [b"VALUE plain 0 11\r\n", b"from a file\r\n"]
    for number in range(5):
        assert wire.get(b"get n%d" % number) == [b"VALUE n%d 0 1\r\n" % number, b"v\r\n"]


def test_a_memcached_client(region: TestRegion) -> None:
    with frontend(region.path) as port:
        client = Memcache(("127.0.0.1", port), timeout=PATIENCE, default_noreply=False)
        assert client.set("k", b"value", flags=9)
        assert client.get("k") == b"value"
        _, version = client.gets("k")
        assert client.cas("k", b"next", version)
        assert not client.cas("k", b"late", version)
        assert client.set_many({"a": b"1", "b": b"2"}) == []
        assert client.get_many(["a", "b", "none"]) == {"a": b"1", "b": b"2"}
        assert client.incr("a", 4) == 5
        assert client.delete("b")
        assert client.stats()[b"curr_items"] == 2
        with pytest.raises(MemcacheClientError):
            client.incr("k", 1)
        with pytest.raises(MemcacheServerError):
            client.set("k", bytes(VALUE_MAX + 1))
        assert client.flush_all()
        client.close()


def test_the_example_is_short() -> None:
    lines = [line for line in SCRIPT.read_text().splitlines() if line.strip()]
    assert len(lines) <= 200
