"""A filesystem as a plain dictionary: tests compare the real one with it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from ivshmemfs.engine import RENAME_EXCHANGE, RENAME_NOREPLACE

ROOT_ID = 0


@dataclass
class Node:
    """A file, directory or symlink."""

    kind: str  # "file", "dir" or "link"
    data: bytes = b""
    entries: dict[bytes, int] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    mode: int = 0o644


class Refused(Exception):
    """The operation fails, with any errno."""


@dataclass(frozen=True)
class Op:
    """One operation; it names nodes by their numbers in the model."""

    kind: str
    node: int = -1  # the node of the operation, or the directory of `name`
    name: bytes = b""
    node2: int = -1
    name2: bytes = b""
    number: int = 0  # offset, size, mode or flags
    data: bytes = b""

    def __repr__(self) -> str:
        shown = [f"{self.node}"]
        shown += [f"{value!r}" for value in (self.name, self.name2) if value]
        shown += [f"{value}" for value in (self.node2, self.number) if value not in (-1, 0)]
        return f"{self.kind}({', '.join(shown)}{f', {len(self.data)} B' if self.data else ''})"


class Model:
    """All nodes by number; no number is used twice."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {ROOT_ID: Node("dir")}
        self._next = 1

    def copy(self) -> Model:
        return copy.deepcopy(self)

    # --- looking ---

    def linked(self) -> dict[int, list[bytes]]:
        """Every node that has a name, with one path to it."""
        found: dict[int, list[bytes]] = {ROOT_ID: []}
        queue = [ROOT_ID]
        while queue:
            at = queue.pop(0)
            for name, child in self.nodes[at].entries.items():
                if child not in found:
                    found[child] = [*found[at], name]
                    if self.nodes[child].kind == "dir":
                        queue.append(child)
        return found

    def tree(self, at: int = ROOT_ID) -> dict[bytes, object]:
        return {name: self._shown(child) for name, child in self.nodes[at].entries.items()}

    def _shown(self, number: int) -> object:
        node = self.nodes[number]
        xattrs = tuple(sorted(node.xattrs.items()))
        if node.kind == "dir":
            return "dir", node.mode, xattrs, self.tree(number)
        if node.kind == "link":
            return "link", node.data
        return "file", node.mode, xattrs, self._links(number), node.data

    def _links(self, number: int) -> int:
        return sum(list(node.entries.values()).count(number) for node in self.nodes.values())

    # --- changing ---

    def apply(self, op: Op) -> bool:
        """Do the operation; False if the model refuses it, and then nothing changes."""
        try:
            getattr(self, "_" + op.kind)(op)
        except Refused:
            return False
        return True

    def _folder(self, number: int) -> Node:
        if number not in self.linked():
            raise Refused
        node = self.nodes[number]
        if node.kind != "dir":
            raise Refused
        return node

    def _make(self, op: Op, node: Node) -> None:
        folder = self._folder(op.node)
        if op.name in folder.entries:
            raise Refused
        self.nodes[self._next] = node
        folder.entries[op.name] = self._next
        self._next += 1

    def _create(self, op: Op) -> None:
        self._make(op, Node("file"))

    def _mkdir(self, op: Op) -> None:
        self._make(op, Node("dir", mode=0o755))

    def _symlink(self, op: Op) -> None:
        self._make(op, Node("link", data=op.data))

    def _link(self, op: Op) -> None:
        folder = self._folder(op.node)
        if op.node2 not in self.linked() or op.name in folder.entries:
            raise Refused
        if self.nodes[op.node2].kind == "dir":
            raise Refused
        folder.entries[op.name] = op.node2

    def _entry(self, number: int, name: bytes) -> int:
        folder = self._folder(number)
        if name not in folder.entries:
            raise Refused
        return folder.entries[name]

    def _unlink(self, op: Op) -> None:
        if self.nodes[self._entry(op.node, op.name)].kind == "dir":
            raise Refused
        del self.nodes[op.node].entries[op.name]

    def _rmdir(self, op: Op) -> None:
        node = self.nodes[self._entry(op.node, op.name)]
        if node.kind != "dir" or node.entries:
            raise Refused
        del self.nodes[op.node].entries[op.name]

    def _above(self, number: int, folder: int) -> bool:
        """Whether directory `number` is `folder` or above it."""
        if number == folder:
            return True
        children = self.nodes[number].entries.values()
        return any(self.nodes[c].kind == "dir" and self._above(c, folder) for c in children)

    def _rename(self, op: Op) -> None:
        moved = self._entry(op.node, op.name)
        target = self._folder(op.node2).entries.get(op.name2)
        if self.nodes[moved].kind == "dir" and self._above(moved, op.node2):
            raise Refused
        if op.number == RENAME_EXCHANGE:
            self._exchange(op, moved, target)
            return
        if target is not None:
            if op.number == RENAME_NOREPLACE:
                raise Refused
            if target == moved:
                return
            folders = [self.nodes[n].kind == "dir" for n in (moved, target)]
            if folders[0] != folders[1] or (folders[1] and self.nodes[target].entries):
                raise Refused
        del self.nodes[op.node].entries[op.name]
        self.nodes[op.node2].entries[op.name2] = moved

    def _exchange(self, op: Op, moved: int, target: int | None) -> None:
        if target is None:
            raise Refused
        if self.nodes[target].kind == "dir" and self._above(target, op.node):
            raise Refused
        self.nodes[op.node].entries[op.name] = target
        self.nodes[op.node2].entries[op.name2] = moved

    def _write(self, op: Op) -> None:
        node = self.nodes[op.node]
        old = node.data.ljust(op.number, b"\0")
        node.data = old[: op.number] + op.data + old[op.number + len(op.data) :]

    def _append(self, op: Op) -> None:
        self.nodes[op.node].data += op.data

    def _truncate(self, op: Op) -> None:
        node = self.nodes[op.node]
        node.data = node.data[: op.number].ljust(op.number, b"\0")

    def _chmod(self, op: Op) -> None:
        self.nodes[op.node].mode = op.number

    def _setxattr(self, op: Op) -> None:
        self.nodes[op.node].xattrs[op.name] = op.data

    def _removexattr(self, op: Op) -> None:
        if op.name not in self.nodes[op.node].xattrs:
            raise Refused
        del self.nodes[op.node].xattrs[op.name]
