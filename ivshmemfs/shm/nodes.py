"""The node record: one parsed metadata block, and where nodes come from."""

from __future__ import annotations

from typing import Any, Final

from ivshmemfs.format.words import block_of


class Node:
    """One metadata block in private memory.  Immutable; `parsed` is what a reader made of it."""

    __slots__ = ("count", "data", "kind", "level", "owner", "parsed", "pointer")

    def __init__(
        self, pointer: bytes, kind: int, level: int, owner: int, count: int, data: bytes
    ) -> None:
        self.pointer: Final = pointer  # packed
        self.kind: Final = kind
        self.level: Final = level
        self.owner: Final = owner
        self.count: Final = count
        self.data: Final = data  # header included
        self.parsed: Any = None

    @property
    def block(self) -> int:
        """Where it stands."""
        return block_of(self.pointer)


class NodeSource:
    """Where nodes come from: the region, or a transaction with nodes of its own beside it."""

    def __init__(self, block_size: int, fanout: int) -> None:
        self.block_size: Final = block_size
        self.fanout: Final = fanout  # pointers in an index node

    def node(self, pointer: bytes, kind: int, level: int, owner: int | None) -> Node:
        """The node that a packed pointer leads to, of any owner if None.

        Raises Restart when it was replaced, or Corrupt.
        """
        raise NotImplementedError
