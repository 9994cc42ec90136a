"""A memcached whose values are files of a region: memcached clients of all machines share them.

    python examples/memcached_frontend.py REGION [DIRECTORY [PORT]]

Run it on the host and on each guest with the same DIRECTORY (/cache); it listens on loopback, port
11211.  Each command is one look or one commit: when the reply to `set` arrives, every machine gets
the new value.  Flags and expiry are in the note of an item; expiry counts by the clock of the
machine that reads.  Nothing is thrown out for want of room: SERVER_ERROR tells of a full region.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from functools import partial

import trio

import ivshmemfs
from ivshmemfs import Item

KEY_MAX, LINE_MAX, CHUNK, VALUE_MAX = 250, 64 << 10, 64 << 10, 1 << 20  # bytes
SPINS, TURNS = 30, 64  # tries to read before it waits, about 20 µs; reads before others have a turn
MONTH = 30 * 24 * 3600  # seconds; a larger exptime is a time since 1970
COUNTER = 1 << 64
STORING = {b"set": 0, b"add": 0, b"replace": 0, b"cas": 1}  # words behind the size
COMMANDS = b"get gets set add replace cas delete incr decr flush_all version stats".split()
VERSION = ivshmemfs.__version__.encode()


class ClientError(Exception):
    """The client broke the protocol."""


def fields(item: Item) -> tuple[int, int]:
    """Return flags and time of expiry, in seconds since 1970, 0 for never."""
    words = item.note.split()  # any machine may have written it
    good = len(words) == 2 and all(word.isdigit() and len(word) < 20 for word in words)
    return (int(words[0]), int(words[1])) if good else (0, 0)


def live(item: Item | None) -> Item | None:
    """Return the item, or None when it has expired."""
    return None if item is None or 0 < fields(item)[1] <= time.time() else item


class Frontend:
    """The commands of all connections."""

    def __init__(self, cache: ivshmemfs.KeyValue) -> None:
        self.cache = cache

    def get(self, keys: list[bytes], unique: bool) -> bytes:
        answer = b""
        for key in map(checked, keys):
            item = self.cache.get_item(key)
            if (shown := live(item)) is not None:
                version = b" %d" % shown.version if unique else b""
                head = b"VALUE %s %d %d%s" % (key, fields(shown)[0], len(shown.value), version)
                answer += b"%s\r\n%s\r\n" % (head, shown.value)
            elif item is not None:  # expired: make room, unless it was set again meanwhile
                self.cache.delete(key, item.version)
        return answer + b"END\r\n"

    def store(self, name: bytes, words: list[bytes], data: bytes) -> bytes:
        key, note = checked(words[0]), b"%d %d" % (number(words[1]), expiry(words[2]))
        unique, answer = number(words[-1]), b""

        def change(item: Item | None) -> Item | None:
            nonlocal answer
            old, answer = live(item), b"STORED\r\n"
            if (name == b"add" and old) or (name == b"replace" and not old):
                answer = b"NOT_STORED\r\n"
            elif name == b"cas" and (old is None or old.version != unique):
                answer = b"EXISTS\r\n" if old else b"NOT_FOUND\r\n"
            return Item(data, note) if answer == b"STORED\r\n" else None

        self.cache.update(key, change)
        return answer

    def count(self, key: bytes, by: int) -> bytes:
        def change(item: Item | None) -> Item | None:
            old = live(item)
            if old is not None and not (old.value.isdigit() and len(old.value) <= 20):
                raise ClientError("cannot increment or decrement non-numeric value")
            return old and old._replace(value=b"%d" % (max(int(old.value) + by, 0) % COUNTER))

        done = self.cache.update(checked(key), change)
        return b"NOT_FOUND\r\n" if done is None else done.value + b"\r\n"

    def delete(self, key: bytes) -> bytes:
        there = live(self.cache.get_item(checked(key)))
        return b"DELETED\r\n" if self.cache.delete(key) and there else b"NOT_FOUND\r\n"

    async def answer(self, words: list[bytes], lines: Lines) -> bytes:
        """Return the reply to one command line; raises ClientError, OSError."""
        match words:
            case [b"get" | b"gets" as name, *keys] if keys:
                return self.get(keys, unique=name == b"gets")
            case [name, _, _, _, size, *more] if len(more) == STORING.get(name):
                return self.store(name, words[1:], await lines.block(number(size)))
            case [b"incr" | b"decr" as name, key, by]:
                return self.count(key, number(by) if name == b"incr" else -number(by))
            case [b"delete", key]:
                return self.delete(key)
            case [b"stats"]:
                items = sum(1 for _ in self.cache.scan())
                return b"STAT version %s\r\nSTAT curr_items %d\r\nEND\r\n" % (VERSION, items)
            case [b"version"]:
                return b"VERSION %s\r\n" % VERSION
            case [b"flush_all"] | [b"flush_all", b"0"]:
                self.cache.clear()
                return b"OK\r\n"
            case [name, *_] if name in COMMANDS:
                raise ClientError("bad command line format")
        return b"ERROR\r\n"

    async def serve(self, connection: trio.SocketStream) -> None:
        lines = Lines(connection)
        with suppress(trio.BrokenResourceError, ConnectionError):  # the client is gone
            while (line := await lines.line()) is not None and line != b"quit":
                words = line.split()
                quiet = words[-1:] == [b"noreply"]
                try:
                    reply = await self.answer(words[:-1] if quiet else words, lines)
                except ClientError as error:
                    reply = b"CLIENT_ERROR %s\r\n" % str(error).encode()
                except OSError as error:
                    reply = b"SERVER_ERROR %s\r\n" % (error.strerror or str(error)).encode()
                await lines.reply(b"" if quiet else reply)


class Lines:
    """What a client sends, as lines and blocks.  A client that asks at once costs no scheduling."""

    def __init__(self, connection: trio.SocketStream) -> None:
        self.connection, self.fd = connection, connection.socket.fileno()
        self.rest, self.spins, self.turns = bytearray(), 1, 0

    async def more(self) -> bool:
        self.turns += 1
        for _ in range(self.spins if self.turns % TURNS else 0):
            with suppress(BlockingIOError):
                got, self.spins = os.read(self.fd, CHUNK), SPINS
                break
        else:
            got, self.spins = await self.connection.receive_some(CHUNK), 2
        self.rest += got
        return bool(got)

    async def reply(self, text: bytes) -> None:
        with suppress(BlockingIOError):
            text = text[os.write(self.fd, text) :]
        if text:
            await self.connection.send_all(text)

    def take(self, length: int) -> bytes:
        got, self.rest = bytes(self.rest[:length]), self.rest[length:]
        return got

    async def line(self) -> bytes | None:
        """Return the next line without its end; None at the end, or when it is too long."""
        while (at := self.rest.find(b"\n")) < 0:
            if len(self.rest) > LINE_MAX or not await self.more():
                return None
        return self.take(at + 1).rstrip(b"\r\n")

    async def block(self, length: int) -> bytes:
        """Return a block of data; raises ClientError for a wrong end, OSError when too large."""
        left = length + 2
        while length > VALUE_MAX and (left := left - len(self.take(left))) and await self.more():
            pass
        if length > VALUE_MAX:
            raise OSError("object too large for cache")
        while len(self.rest) < left and await self.more():
            pass
        if (data := self.take(left))[length:] != b"\r\n":
            raise ClientError("bad data chunk")
        return data[:length]


def checked(key: bytes) -> bytes:
    """Return a key that memcached allows; raises ClientError."""
    if len(key) > KEY_MAX or min(key) <= 32:
        raise ClientError("bad command line format")
    return key


def number(word: bytes) -> int:
    """Return an unsigned number of 64 bits; raises ClientError."""
    if not word.isdigit() or len(word) > 20 or int(word) >= COUNTER:
        raise ClientError("bad command line format")
    return int(word)


def expiry(word: bytes) -> int:
    """Return the time of expiry for an exptime, in seconds since 1970; 0 for never."""
    seconds = -1 if word.startswith(b"-") else number(word)
    now = int(time.time()) if seconds <= MONTH else 0
    return max(now + seconds, 1) if seconds else 0


async def main(region: str, directory: str = "/cache", port: str = "11211") -> None:
    """Serve until the process ends."""
    with ivshmemfs.open(region) as fs:
        frontend = Frontend(fs.kv(directory))
        listeners = await trio.open_tcp_listeners(int(port), host="127.0.0.1")
        print("listening on port", listeners[0].socket.getsockname()[1], flush=True)
        await trio.serve_listeners(frontend.serve, listeners)


if __name__ == "__main__":
    trio.run(partial(main, *sys.argv[1:]))
