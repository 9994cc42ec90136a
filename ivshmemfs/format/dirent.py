"""Directory entries: keys, leaves and interior nodes of the directory tree.

A directory is a B+tree ordered by key.  A key is a 55-bit hash of the name followed by 8 bits
that tell apart names of equal hash, so it is unique in its directory, stays with the entry for
life and serves as the cookie of readdir: reading a directory while it changes misses and
doubles nothing that was there throughout.

A leaf stores its `n` entries by columns, so that all its work is done by slices:

    keys   n x u64, ascending
    inos   n x u64, inode number | file type << 56
    sizes  n x u8, length of each name
    names  the names in the same order, without separators

An interior node stores `n` lower-bound keys (u64 each), then `n` pointers.  The first bound of a
tree is 0, and bounds are multiples of 256, so that names of equal hash stand in one leaf.
"""

import hashlib
import sys
from array import array
from bisect import bisect_left
from typing import NamedTuple

from ivshmemfs.format import words

assert sys.byteorder == "little", "columns are taken as they stand"

NAME_MAX = 255
ENTRY_FIXED = 17  # bytes of an entry besides its name
NODE_ENTRY = 8 + words.POINTER_SIZE
COLLISIONS = 256
TYPE_SHIFT = 56
INO_MASK = (1 << TYPE_SHIFT) - 1
FIRST_KEY = COLLISIONS  # keys below are free for readdir's own cookies


def name_key(name: bytes, secret: bytes) -> int:
    """The lowest key that `name` may have; `secret` (the UUID) keeps collisions from being made."""
    digest = hashlib.blake2b(name, digest_size=8, key=secret).digest()
    return max(int.from_bytes(digest, "little") >> 9, 1) << 8


class Leaf(NamedTuple):
    """The entries of one leaf; all columns have the same length.  Never modified."""

    keys: "array[int]"  # u64
    inos: "array[int]"  # u64, with the type in the top byte
    sizes: bytes
    names: bytes

    def find(self, key: int, name: bytes) -> int:
        """Index of `name`, whose first possible key is `key`; -1 if it is not here."""
        keys = self.keys
        at = bisect_left(keys, key)
        while at < len(keys) and keys[at] < key + COLLISIONS:
            if self.sizes[at] == len(name) and self.name(at) == name:
                return at
            at += 1
        return -1

    def name(self, at: int) -> bytes:
        """Name of entry `at`."""
        start = sum(self.sizes[:at])
        return self.names[start : start + self.sizes[at]]

    def insert(self, key: int, ino_and_type: int, name: bytes) -> "Leaf":
        """A leaf with one entry more."""
        at = bisect_left(self.keys, key)
        cut = sum(self.sizes[:at])
        keys, inos = self.keys[:], self.inos[:]
        keys.insert(at, key)
        inos.insert(at, ino_and_type)
        return Leaf(
            keys,
            inos,
            self.sizes[:at] + bytes((len(name),)) + self.sizes[at:],
            self.names[:cut] + name + self.names[cut:],
        )

    def remove(self, at: int) -> "Leaf":
        """A leaf without entry `at`."""
        cut = sum(self.sizes[:at])
        return Leaf(
            self.keys[:at] + self.keys[at + 1 :],
            self.inos[:at] + self.inos[at + 1 :],
            self.sizes[:at] + self.sizes[at + 1 :],
            self.names[:cut] + self.names[cut + self.sizes[at] :],
        )

    def replace(self, at: int, ino_and_type: int) -> "Leaf":
        """A leaf whose entry `at` leads to another inode."""
        inos = self.inos[:]
        inos[at] = ino_and_type
        return self._replace(inos=inos)

    def part(self, start: int, stop: int) -> "Leaf":
        """Entries [start, stop)."""
        cut = sum(self.sizes[:start])
        end = cut + sum(self.sizes[start:stop])
        return Leaf(
            self.keys[start:stop],
            self.inos[start:stop],
            self.sizes[start:stop],
            self.names[cut:end],
        )

    def join(self, other: "Leaf") -> "Leaf":
        """The entries of both; all keys of `other` are larger."""
        return Leaf(
            self.keys + other.keys,
            self.inos + other.inos,
            self.sizes + other.sizes,
            self.names + other.names,
        )

    @property
    def size(self) -> int:
        """Bytes when encoded."""
        return ENTRY_FIXED * len(self.keys) + len(self.names)

    def encode(self) -> bytes:
        """The four columns."""
        return b"".join((self.keys.tobytes(), self.inos.tobytes(), self.sizes, self.names))


def column(raw: bytes = b"") -> "array[int]":
    """A column of u64 words from its bytes."""
    words_of = array("Q")
    words_of.frombytes(raw)
    return words_of


EMPTY_LEAF = Leaf(column(), column(), b"", b"")


def _ascending(keys: "array[int]") -> bool:
    listed = keys.tolist()
    return listed == sorted(set(listed))


def decode_leaf(raw: bytes, count: int) -> Leaf:
    """Parse `count` entries; ValueError says how the bytes contradict themselves."""
    if len(raw) < ENTRY_FIXED * count:
        raise ValueError(f"{count} entries do not fit into {len(raw)} bytes")
    sizes = raw[16 * count : 17 * count]
    names = raw[17 * count :]
    if sum(sizes) != len(names) or 0 in sizes:
        raise ValueError("name lengths do not add up")
    keys = column(raw[: 8 * count])
    if not _ascending(keys):
        raise ValueError("keys are not in order")
    return Leaf(keys, column(raw[8 * count : 16 * count]), sizes, names)


class Interior(NamedTuple):
    """An interior node: lower-bound keys and as many pointers (packed, 16 bytes each)."""

    keys: "array[int]"  # u64
    pointers: bytes

    def encode(self) -> bytes:
        """The two columns."""
        return self.keys.tobytes() + self.pointers

    @property
    def size(self) -> int:
        """Bytes when encoded."""
        return NODE_ENTRY * len(self.keys)


def decode_interior(raw: bytes, count: int) -> Interior:
    """Parse `count` (key, pointer) pairs; ValueError when the bytes contradict themselves."""
    if len(raw) != NODE_ENTRY * count or not count:
        raise ValueError(f"{count} entries do not fit {len(raw)} bytes")
    keys = column(raw[: 8 * count])
    if not _ascending(keys):
        raise ValueError("keys are not in order")
    return Interior(keys, raw[8 * count :])
