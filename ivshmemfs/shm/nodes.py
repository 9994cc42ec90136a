"""The record of one node, and the interface of what provides nodes."""

from __future__ import annotations

from typing import Any, Final

from ivshmemfs.format.words import block_of


class Node:
    """One metadata block in private memory.

    Immutable but for `parsed`, where a reader keeps the object that it made of the node.
    """

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
        """The block's number."""
        return block_of(self.pointer)


class NodeSource:
    """A provider of nodes: the region, or a transaction that adds private nodes to it."""

    def __init__(self, block_size: int, fanout: int) -> None:
        self.block_size: Final = block_size
        self.fanout: Final = fanout  # pointers in an index node

    def node(self, pointer: bytes, kind: int, level: int, owner: int | None) -> Node:
        """Return the node that a packed pointer leads to.

        The node must have this kind, level and owner; with `owner` None it may have any owner.
        Raises Restart when another peer has replaced it, or Corrupt.
        """
        raise NotImplementedError
