"""Directory entries: keys, leaves and interior nodes of the directory tree.

A directory is a B+tree ordered by key.  A key is a 55-bit hash of the name, then 8 bits that
distinguish names of equal hash.  It is unique in its directory and stays with the entry for life,
so it serves as the cookie of readdir.  A reader of a changing directory sees each entry that is
there throughout exactly once.

A leaf stores its `n` entries by columns, so slices of its bytes do all the work:

    keys   n x u64, ascending
    inos   n x u64, inode number | file type << 56
    sizes  n x u8, length of each name
    names  the names in the same order, without separators

An interior node stores `n` lower-bound keys (u64 each), then `n` pointers.  The first bound of a
tree is 0.  Bounds are multiples of 256, so names of equal hash are in one leaf.
"""

import struct
import sys
from _blake2 import blake2b  # hashlib has the same, and loads OpenSSL before it
from array import array
from functools import lru_cache
from typing import Final

from ivshmemfs import native
from ivshmemfs.errors import NoSpace
from ivshmemfs.format.words import POINTER_SIZE, WORD
from ivshmemfs.native import ascending, is_name, lower_bound, sum_bytes

assert sys.byteorder == "little", "columns are used without conversion"

NAME_MAX: Final = 255
ENTRY_FIXED: Final = 17  # bytes of an entry besides its name
NODE_ENTRY: Final = 24  # a key and a pointer
COLLISIONS: Final = 256  # keys of one hash: most names of equal hash in one directory
TYPE_SHIFT: Final = 56
INO_MASK: Final = (1 << 56) - 1
FIRST_KEY: Final = COLLISIONS  # smaller keys are cookies of "." and ".."
LAST_KEY: Final = (1 << 63) - 1
# The compiler looks an imported function up at each call, but not a constant.
_leaf_find: Final = native.leaf_find
_leaf_insert: Final = native.leaf_insert
_leaf_move: Final = native.leaf_move
_leaf_remove: Final = native.leaf_remove
_put_bytes: Final = native.put_bytes
_range_of: Final = native.range_of
_word_at: Final = native.word_at
_CROWDED = "the directory holds too many names of the same hash"
_pack_word = struct.Struct("<Q").pack


@lru_cache(maxsize=4096)  # the engine looks a name up before it makes or removes it
def name_key(name: bytes, secret: bytes) -> int:
    """Return the lowest key that `name` may have.

    `secret` is the filesystem's UUID; without it an attacker cannot construct collisions.
    """
    digest = blake2b(name, digest_size=8, key=secret).digest()
    return max(int.from_bytes(digest, "little") >> 9, 1) << 8


def column(raw: bytes = b"") -> "array[int]":
    """Return a column of u64 words from its bytes."""
    words_of = array("Q")
    words_of.frombytes(raw)
    return words_of


class Leaf:
    """The packed columns of one leaf.  Immutable."""

    __slots__ = ("count", "raw")

    def __init__(self, raw: bytes, count: int) -> None:
        self.raw: Final = raw
        self.count: Final = count

    @property
    def keys(self) -> "array[int]":
        """The first column."""
        return column(self.raw[: WORD * self.count])

    @property
    def inos(self) -> "array[int]":
        """The second column, with the type in the top byte."""
        return column(self.raw[WORD * self.count : 2 * WORD * self.count])

    @property
    def sizes(self) -> bytes:
        """The third column."""
        return self.raw[2 * WORD * self.count : ENTRY_FIXED * self.count]

    @property
    def names(self) -> bytes:
        """The fourth column."""
        return self.raw[ENTRY_FIXED * self.count :]

    def unfit(self) -> bytes:
        """Return the first name that is invalid (see `is_name`); b"" if all are valid.

        `decode_leaf` refuses empty names.
        """
        raw, sizes, start = self.raw, 2 * WORD * self.count, ENTRY_FIXED * self.count
        short = raw.find(b"\1", sizes, start) >= 0 or raw.find(b"\2", sizes, start) >= 0
        dots = short and raw.find(b".", start) >= 0
        if not dots and raw.find(b"/", start) < 0 and raw.find(b"\0", start) < 0:
            return b""  # the usual case, without a look at each name
        for size in self.sizes:
            name = raw[start : start + size]
            if not is_name(name):
                return name
            start += size
        return b""

    def lower(self, key: int) -> int:
        """Return the index of the first entry whose key is not below `key`."""
        return lower_bound(self.raw, self.count, key)

    def key(self, at: int) -> int:
        """Return the key of entry `at`."""
        return _word_at(self.raw, at)

    def ino(self, at: int) -> int:
        """Return the inode number and type of entry `at`."""
        return _word_at(self.raw, self.count + at)

    def name_at(self, at: int) -> int:
        """Return the byte at which the name of entry `at` begins."""
        sizes = 2 * WORD * self.count
        return ENTRY_FIXED * self.count + sum_bytes(self.raw, sizes, sizes + at)

    def find(self, key: int, name: bytes) -> int:
        """Return the index of `name`, whose lowest possible key is `key`; -1 if it is not here."""
        return _leaf_find(self.raw, self.count, key, COLLISIONS, name)

    def insert(self, base: int, ino_and_type: int, name: bytes) -> "Leaf":
        """Return a leaf with this entry added, under the lowest free key from `base` on.

        Raises NoSpace when no key of this hash is free.
        """
        raw = _leaf_insert(self.raw, self.count, base, COLLISIONS, ino_and_type, name)
        if raw is None:
            raise NoSpace(_CROWDED)
        return Leaf(raw, self.count + 1)

    def move(self, at: int, base: int, ino_and_type: int, name: bytes) -> "Leaf":
        """Return a leaf with this entry instead of entry `at`, whose key is free for it."""
        raw = _leaf_move(self.raw, self.count, at, base, COLLISIONS, ino_and_type, name)
        if raw is None:
            raise NoSpace(_CROWDED)
        return Leaf(raw, self.count)

    def remove(self, at: int) -> "Leaf":
        """Return a leaf without entry `at`."""
        return Leaf(_leaf_remove(self.raw, self.count, at), self.count - 1)

    def replace(self, at: int, ino_and_type: int) -> "Leaf":
        """Return a leaf whose entry `at` leads to another inode."""
        place = WORD * (self.count + at)
        return Leaf(_put_bytes(self.raw, place, _pack_word(ino_and_type)), self.count)

    def part(self, start: int, stop: int) -> "Leaf":
        """Return a leaf of the entries [start, stop)."""
        raw, inos = self.raw, WORD * self.count
        sizes = 2 * inos
        parts = (
            raw[WORD * start : WORD * stop],
            raw[inos + WORD * start : inos + WORD * stop],
            raw[sizes + start : sizes + stop],
            raw[self.name_at(start) : self.name_at(stop)],
        )
        return Leaf(b"".join(parts), stop - start)

    def join(self, other: "Leaf") -> "Leaf":
        """Return a leaf of the entries of both; all keys of `other` are larger."""
        parts = (
            self.raw[: WORD * self.count],
            other.raw[: WORD * other.count],
            self.raw[WORD * self.count : 2 * WORD * self.count],
            other.raw[WORD * other.count : 2 * WORD * other.count],
            self.sizes,
            other.sizes,
            self.names,
            other.names,
        )
        return Leaf(b"".join(parts), self.count + other.count)

    @property
    def size(self) -> int:
        """Bytes when encoded."""
        return len(self.raw)


EMPTY_LEAF: Final = Leaf(b"", 0)


def decode_leaf(raw: bytes, count: int) -> Leaf:
    """Parse `count` entries.  Raises ValueError, with the contradiction in the bytes."""
    if len(raw) < ENTRY_FIXED * count:
        raise ValueError(f"{count} entries do not fit into {len(raw)} bytes")
    sizes = raw[16 * count : 17 * count]
    if sum_bytes(sizes, 0, count) != len(raw) - ENTRY_FIXED * count or 0 in sizes:
        raise ValueError("name lengths do not add up")
    if not ascending(raw, count):
        raise ValueError("keys are not in order")
    return Leaf(raw, count)


def encode_leaf(entries: list[tuple[int, int, bytes]]) -> bytes:
    """Return the columns of (key, inode number and type, name) entries, which ascend by key."""
    keys = array("Q", [key for key, _, _ in entries]).tobytes()
    inos = array("Q", [ino_and_type for _, ino_and_type, _ in entries]).tobytes()
    sizes = bytes([len(name) for _, _, name in entries])
    return keys + inos + sizes + b"".join([name for _, _, name in entries])


class Interior:
    """An interior node: packed lower-bound keys, then as many pointers.  Immutable."""

    __slots__ = ("count", "raw")

    def __init__(self, raw: bytes, count: int) -> None:
        self.raw: Final = raw
        self.count: Final = count

    @property
    def keys(self) -> "array[int]":
        """The first column."""
        return column(self.raw[: WORD * self.count])

    @property
    def pointers(self) -> bytes:
        """The second column."""
        return self.raw[WORD * self.count :]

    def key(self, at: int) -> int:
        """Return the lower bound of child `at`."""
        return _word_at(self.raw, at)

    def pointer(self, at: int) -> bytes:
        """Return the pointer to child `at`."""
        place = WORD * self.count + POINTER_SIZE * at
        return self.raw[place : place + POINTER_SIZE]

    def pick(self, key: int) -> int:
        """Return the index of the child whose range holds `key`."""
        return _range_of(self.raw, self.count, key)

    def replace(self, at: int, children: "Interior") -> "Interior":
        """Return the node with `children` in the place of child `at`."""
        raw, old, new = self.raw, WORD * self.count, WORD * children.count
        place = old + POINTER_SIZE * at
        parts = (
            raw[: WORD * at],
            children.raw[:new],
            raw[WORD * (at + 1) : place],
            children.raw[new:],
            raw[place + POINTER_SIZE :],
        )
        return Interior(b"".join(parts), self.count - 1 + children.count)

    def with_pointer(self, at: int, pointer: bytes) -> "Interior":
        """Return the node with another pointer to child `at`."""
        place = WORD * self.count + POINTER_SIZE * at
        return Interior(_put_bytes(self.raw, place, pointer), self.count)

    def part(self, start: int, stop: int) -> "Interior":
        """Return a node of the children [start, stop)."""
        keys, pointers = self.raw[WORD * start : WORD * stop], WORD * self.count
        low, high = pointers + POINTER_SIZE * start, pointers + POINTER_SIZE * stop
        return Interior(keys + self.raw[low:high], stop - start)

    def from_bound(self, bound: int) -> "Interior":
        """Return the node with another bound of its first child."""
        return Interior(_pack_word(bound) + self.raw[WORD:], self.count)

    @property
    def size(self) -> int:
        """Bytes when encoded."""
        return len(self.raw)


NO_CHILDREN: Final = Interior(b"", 0)


def only_child(bound: int, pointer: bytes) -> Interior:
    """Return the node of one child."""
    return Interior(_pack_word(bound) + pointer, 1)


def interior_of(children: list[tuple[int, bytes]]) -> Interior:
    """Return the node of these (lower bound, pointer) pairs."""
    keys = b"".join([_pack_word(key) for key, _ in children])
    return Interior(keys + b"".join([pointer for _, pointer in children]), len(children))


def decode_interior(raw: bytes, count: int) -> Interior:
    """Parse `count` (key, pointer) pairs.  Raises ValueError, with the contradiction."""
    if len(raw) != NODE_ENTRY * count or not count:
        raise ValueError(f"{count} entries do not fit {len(raw)} bytes")
    if not ascending(raw, count):
        raise ValueError("keys are not in order")
    return Interior(raw, count)
