"""The block operations in plain Python on a bytearray, to compare the extension with."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from ivshmemfs.region import crc32c

POINTER = struct.Struct("<IIQ")
COUNTER = (1 << 36) - 1
INCARNATION = (1 << 20) - 1


def pointer(block: int, tag: int, weight: int = 1) -> bytes:
    return POINTER.pack(block, weight, tag)


NULL = bytes(16)
TAG = (3 << 56) | (2 << 36) | 1


def table(words: list[int]) -> bytes:
    """Words as they are stored."""
    return struct.pack(f"<{len(words)}Q", *words)


def unpack(pointers: bytes) -> list[tuple[int, int]]:
    """(block, tag) of each packed pointer."""
    return [(block, tag) for block, _, tag in POINTER.iter_unpack(pointers)]


def settled(tag: int, limits: list[int]) -> bool:
    limit = limits[tag >> 56]
    age = ((limit >> 36) - (tag >> 36)) & INCARNATION
    if limit == 0:
        return True
    if age:
        return age < 1 << 19  # incarnations count modulo 2 ** 20
    return (tag & COUNTER) < (limit & COUNTER)


@dataclass
class ModelBlocks:
    """As Blocks, slow and obvious."""

    block_size: int
    block_count: int
    tags: list[int] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.tags = [0] * self.block_count
        self.data = bytearray(self.block_size * self.block_count)

    def claim(self, count: int, tag: int, cursor: int) -> tuple[bytes, int]:
        got = b""
        for _ in range(self.block_count):
            if len(got) == 16 * count:
                break
            if self.tags[cursor] == 0:
                self.tags[cursor] = tag
                got += pointer(cursor, tag)
            cursor = (cursor + 1) % self.block_count
        return got, cursor

    def reclaim(self, pointers: bytes, tag: int) -> bytes:
        got = b""
        for block, old in unpack(pointers):
            if old and self.tags[block] == 0:
                self.tags[block] = tag
                got += pointer(block, tag)
        return got

    def release(self, pointers: bytes) -> int:
        released = 0
        for block, tag in unpack(pointers):
            if tag and self.tags[block] == tag:
                self.tags[block] = 0
                released += 1
        return released

    def check(self, pointers: bytes) -> bool:
        return all(not tag or self.tags[block] == tag for block, tag in unpack(pointers))

    def _at(self, block: int) -> slice:
        return slice(block * self.block_size, (block + 1) * self.block_size)

    def gather(self, pointers: bytes, skip: int, length: int) -> tuple[bytes, bool]:
        whole = b"".join(
            bytes(self.data[self._at(block)]) if tag else bytes(self.block_size)
            for block, tag in unpack(pointers)
        )
        first, last = skip // self.block_size, -(-(skip + length) // self.block_size)
        touched = pointers[16 * first : 16 * last] if length else b""
        return whole[skip : skip + length], self.check(touched)

    def scatter(self, pointers: bytes, data: bytes) -> None:
        for index, (block, _) in enumerate(unpack(pointers)):
            piece = data[index * self.block_size : (index + 1) * self.block_size]
            if piece:
                self.data[self._at(block)] = piece.ljust(self.block_size, b"\0")

    def write_node(self, block: int, node: bytes) -> None:
        start = block * self.block_size
        whole = struct.pack("<I", crc32c(node[4:])) + node[4:]
        self.data[start : start + len(node)] = whole

    def sweep(self, marks: list[int], limits: list[int], start: int, stop: int) -> bytes:
        return b"".join(
            pointer(block, self.tags[block])
            for block in range(start, stop)
            if self.tags[block]
            and marks[block] != self.tags[block]
            and settled(self.tags[block], limits)
        )


def make_node(tag: int, payload: bytes) -> bytes:
    """A metadata node whose checksum is still missing."""
    used = 32 + len(payload)
    return struct.pack("<IBBHIIQQ", 0, 1, 0, 0, used, 0, 0, tag) + payload
