"""Deciding which names of a damaged region are kept, so that they make one tree again.

Starting at the root directory, every name that leads to an inode of its type is kept; of several
names of one directory the first.  What no kept name leads to goes to /lost+found, except inodes
without links: those that are listed as such stay so, the others are dropped.
"""

from __future__ import annotations

import stat
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from ivshmemfs.format import inode as ino_format
from ivshmemfs.format import node as node_format
from ivshmemfs.format.dirent import (
    COLLISIONS,
    INO_MASK,
    NODE_ENTRY,
    TYPE_SHIFT,
    Leaf,
    decode_interior,
    decode_leaf,
    name_key,
)
from ivshmemfs.format.inode import orphan_name
from ivshmemfs.format.node import HEADER, HEADER_SIZE
from ivshmemfs.fsck import invariants as inv
from ivshmemfs.fsck.mend import Mended, mend
from ivshmemfs.fsck.survey import Survey, pointers_in
from ivshmemfs.fsck.walk import KEY_END, names_of

DIRECTORY = stat.S_IFDIR >> 12
LOST_AND_FOUND = b"lost+found"
ROOT, ORPHANS = ino_format.ROOT_INO, ino_format.ORPHANS_INO


class Entry(NamedTuple):
    """One name; `kind` is mode >> 12 of what it leads to."""

    key: int
    ino: int
    kind: int
    name: bytes


class Contents:
    """All readable entries of one directory, and whether it can stay as it is."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.nodes: dict[int, int] = {}  # block -> tag of every node of the tree
        self.intact = True

    def require(self, good: bool) -> None:
        """Rebuild the directory unless `good`."""
        self.intact = self.intact and good


class Reader:
    """Reads directories of a survey."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey

    def inode(self, row: int) -> Mended:
        """A kept inode, made sane."""
        rows = self._survey.rows
        data = self._survey.image.block(rows.blocks[row])
        return mend(data[: min(HEADER.unpack(data).used, len(data))])

    def contents(self, row: int) -> Contents:
        """The entries of the directory in `row`."""
        found, ino = Contents(), self._survey.rows.numbers[row]
        whole = self.inode(row)
        record = whole.record
        if record.payload == ino_format.DIRLEAF:
            self._leaf(found, whole.payload, record.entries, 0, KEY_END)
        elif record.payload == ino_format.DIRTREE:
            span = (0, KEY_END)
            self._interior(found, whole.payload, record.height, span, ino, True)
            found.require(ino not in self._survey.damaged_directories)
        return found  # a wrong count of entries alone is no reason to store the tree anew

    def _interior(
        self, found: Contents, raw: bytes, height: int, span: tuple[int, int], ino: int, top: bool
    ) -> int:
        """Read what is below an interior node; returns the number of blocks there."""
        try:
            node = decode_interior(raw, len(raw) // NODE_ENTRY)
        except ValueError:
            found.require(False)
            return 0
        found.require(not any(inv.check_directory_bounds(node.keys, *span, top)))
        bounds, below = inv.child_bounds(node.keys, *span), 0
        for (block, weight, tag), child in zip(pointers_in(node.pointers), bounds, strict=True):
            count = self._child(found, block, tag, height - 1, child, ino)
            found.require(count == weight)
            below += count
        return below

    def _child(
        self, found: Contents, block: int, tag: int, level: int, span: tuple[int, int], ino: int
    ) -> int:
        survey = self._survey
        kind = node_format.DIRNODE if level else node_format.DIRLEAF
        if not survey.mine(block, tag, ino) or block in found.nodes:
            found.require(False)
            return 0
        data = survey.read(block, tag, kind, level, ino)
        if data is None:
            found.require(False)
            return 0
        found.nodes[block] = tag
        count, body = HEADER.unpack(data).count, data[HEADER_SIZE:]
        if level:
            found.require(count == len(body) // NODE_ENTRY)
            return 1 + self._interior(found, body, level, span, ino, False)
        found.require(count > 0)
        self._leaf(found, body, count, *span)
        return 1

    def _leaf(self, found: Contents, raw: bytes, count: int, low: int, high: int) -> None:
        try:
            leaf = decode_leaf(raw, count)
        except ValueError:
            found.require(False)
            return
        found.require(not any(inv.check_directory_keys(leaf.keys, low, high)))
        found.entries += entries_of(leaf)


def entries_of(leaf: Leaf) -> Iterator[Entry]:
    """The entries in a leaf."""
    for key, both, name in zip(leaf.keys, leaf.inos, names_of(leaf), strict=True):
        yield Entry(key, both & INO_MASK, both >> TYPE_SHIFT, name)


class Graph:
    """The names that are kept, and what must be stored anew for it."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.rows = survey.rows
        self.reader = Reader(survey)
        self.secret = survey.image.superblock.uuid
        self.rewritten: dict[int, list[Entry]] = {}  # directories that cannot stay as they are
        self.created: list[int] = []  # directories that did not exist
        self._leaves = survey.search_leaves()
        self._seen: set[int] = set()
        self._next = 0

    def run(self) -> None:
        """Decide everything."""
        for ino in (ROOT, ORPHANS):
            self._ensure_directory(ino)
        self._spread(ROOT)
        listed = self._orphans()
        lost = list(self._lost_directories())
        lost += self._lost_files(listed)
        if lost:
            self._rescue(lost)

    # --- inodes that must exist ---

    def _ensure_directory(self, ino: int) -> None:
        at = self.rows.index(ino)
        if at < 0:
            self.survey.log.add(f"inode {ino} is made anew as an empty directory")
            self.rows.insert(ino, 0, 0, DIRECTORY, 2)
            self.created.append(ino)
            self.rewritten[ino] = []
        elif self.rows.kinds[at] != DIRECTORY:
            self.survey.log.add(f"inode {ino} was no directory; now it is an empty one")
            self.rows.kinds[at] = DIRECTORY
            self.created.append(ino)
            self.rewritten[ino] = []
        self.rows.parents[self.rows.index(ino)] = ino

    # --- spreading from a directory ---

    def _spread(self, start: int) -> None:
        """Keep the names of `start` and of every directory below it."""
        queue = deque([start])
        self._seen.add(start)
        while queue:
            ino = queue.popleft()
            for entry in self._keep_names(ino):
                if entry.kind == DIRECTORY and entry.ino not in self._seen:
                    self._seen.add(entry.ino)
                    queue.append(entry.ino)

    def _contents(self, ino: int) -> Contents:
        if ino in self.created:
            return Contents()
        found = self.reader.contents(self.rows.index(ino))
        for leaf in self._leaves.get(ino, ()):
            found.entries += entries_of(leaf)
            found.intact = False
        return found

    def _keep_names(self, ino: int) -> list[Entry]:
        found = self._contents(ino)
        kept: dict[bytes, Entry] = {}
        for entry in found.entries:
            mended = self._judge(ino, entry, kept)
            if mended is not None:
                kept[entry.name] = mended
                self._count(ino, mended)
            found.require(mended == entry)
        entries = list(kept.values())
        if not found.intact:
            self.rewritten[ino] = self.rewritten.get(ino, []) + entries
        return entries

    def _judge(self, parent: int, entry: Entry, kept: dict[bytes, Entry]) -> Entry | None:
        """The entry as it is kept, or None with a word in the log."""
        name, log = inv.show(entry.name), self.survey.log
        at = self.rows.index(entry.ino)
        base = name_key(entry.name, self.secret) if entry.name else 0
        problems = list(inv.check_name(entry.name, base, self.secret))
        found = self.rows.kinds[at] if at >= 0 else None
        problems += inv.check_target(entry.name, entry.ino, found or 0, found)
        if entry.name in kept:
            if kept[entry.name].ino == entry.ino:
                return None
            problems += inv.check_unique_name(entry.name)
        if problems:
            log.add(f"directory {parent}: {name} is dropped: {problems[0]}")
            return None
        if found == DIRECTORY and self.rows.parents[at]:
            other = self.rows.parents[at]
            log.add(f"directory {parent}: {name} is dropped: directory {entry.ino} stands in "
                    f"directory {other}")  # fmt: skip
            return None
        key = entry.key if 0 <= entry.key - base < COLLISIONS else base
        return entry._replace(key=key, kind=found or 0)

    def _count(self, parent: int, entry: Entry) -> None:
        at = self.rows.index(entry.ino)
        self.rows.links[at] += 1
        if entry.kind == DIRECTORY:
            self.rows.parents[at] = parent
            self.rows.subdirs[self.rows.index(parent)] += 1

    # --- what no name leads to ---

    def _orphans(self) -> set[int]:
        """Inodes that stay listed as without links."""
        found = self._contents(ORPHANS)
        listed: dict[int, Entry] = {}
        for entry in found.entries:
            at = self.rows.index(entry.ino)
            name = orphan_name(entry.ino)
            base = name_key(name, self.secret)
            good = at >= 0 and entry.ino not in (ROOT, ORPHANS) and entry.ino not in listed
            good = good and not self.rows.links[at] and not self.rows.nlinks[at]
            kind = self.rows.kinds[at] if at >= 0 else 0
            mended = Entry(entry.key if entry.key - base in range(COLLISIONS) else base,
                           entry.ino, kind, name)  # fmt: skip
            found.require(good and mended == entry)
            if good:
                listed[entry.ino] = mended
        if not found.intact:
            self.survey.log.add("the list of inodes without links is made anew")
            self.rewritten[ORPHANS] = list(listed.values())
        return set(listed)

    def _lost_directories(self) -> Iterator[Entry]:
        """Directories that hang in the air, tops of their trees first, then cycles."""
        rows = self.rows
        lost = [
            ino
            for ino, kind in zip(rows.numbers, rows.kinds, strict=True)
            if kind == DIRECTORY and ino not in (ROOT, ORPHANS) and ino not in self._seen
        ]
        below = {ino: self._subdirectories(ino) for ino in lost}
        held = {child for children in below.values() for child in children}
        for ino in sorted(lost, key=lambda ino: (ino in held, ino)):
            if ino not in self._seen:
                rows.parents[rows.index(ino)] = ROOT  # a place holder: nothing below may take it
                self._spread(ino)
                yield Entry(0, ino, DIRECTORY, b"#%d" % ino)

    def _subdirectories(self, ino: int) -> set[int]:
        entries = self._contents(ino).entries
        return {e.ino for e in entries if e.ino != ino and e.kind == DIRECTORY}

    def _lost_files(self, listed: set[int]) -> list[Entry]:
        rows, lost = self.rows, []
        for at, ino in enumerate(rows.numbers):
            if rows.links[at] or rows.kinds[at] == DIRECTORY or ino in listed:
                continue
            if rows.nlinks[at] == 0:
                self.survey.log.add(f"inode {ino} has no links and is dropped")
                rows.gone[at] = 1
            else:
                lost.append(Entry(0, ino, rows.kinds[at], b"#%d" % ino))
        return lost

    # --- /lost+found ---

    def _rescue(self, lost: list[Entry]) -> None:
        home, taken = self._lost_and_found()
        entries = self.rewritten[home]
        for entry in lost:
            name = entry.name
            while name in taken:
                name += b"_"
            taken.add(name)
            kept = entry._replace(name=name, key=name_key(name, self.secret))
            entries.append(kept)
            self._count(home, kept)
            self.survey.log.add(f"inode {entry.ino} goes to /lost+found/{name.decode()}")

    def _lost_and_found(self) -> tuple[int, set[bytes]]:
        """Inode of /lost+found (made if need be, and to be stored anew), and the names in it."""
        top = self._entries(ROOT)
        present = next((e for e in top if e.name == LOST_AND_FOUND), None)
        if present is not None and present.kind == DIRECTORY:
            entries = self._entries(present.ino)
            self.rewritten[present.ino] = entries
            return present.ino, {e.name for e in entries}
        name = LOST_AND_FOUND
        while name in {e.name for e in top}:
            name += b"_"
        ino = self.next_ino()
        self.rows.insert(ino, 0, 0, DIRECTORY, 2)
        self.created.append(ino)
        self._seen.add(ino)
        entry = Entry(name_key(name, self.secret), ino, DIRECTORY, name)
        self.rewritten[ROOT] = [*top, entry]
        self.rewritten[ino] = []
        self._count(ROOT, entry)
        return ino, set()

    def _entries(self, ino: int) -> list[Entry]:
        """The names that are kept of a directory that was decided already."""
        if ino in self.rewritten:
            return self.rewritten[ino]
        return self._contents(ino).entries

    def next_ino(self) -> int:
        """A number above all that are or were in use, as far as anybody can tell."""
        stated = self.survey.next_ino
        highest = max(self.rows.numbers, default=0)
        wanted = max(highest + 1, ino_format.FIRST_INO)
        return stated if wanted <= stated <= ino_format.MAX_INO else min(wanted, ino_format.MAX_INO)
