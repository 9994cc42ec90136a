"""Decides which names of a damaged region a repair keeps, so that they make one tree again.

The repair starts at the root directory.  It keeps every name that leads to an inode of the name's
type; of several equal names in one directory it keeps the first.  Inodes that no kept name leads
to go to /lost+found.  An inode with link count 0 is different: the repair keeps it if the list of
inodes without links has it, and drops it otherwise.
"""

from __future__ import annotations

import stat
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

from ivshmemfs.format import inode as ino_format
from ivshmemfs.format.dirent import (
    COLLISIONS,
    INO_MASK,
    TYPE_SHIFT,
    Interior,
    Leaf,
    decode_leaf,
    name_key,
)
from ivshmemfs.format.node import HEADER
from ivshmemfs.fsck import invariants as inv
from ivshmemfs.fsck.repair.inodes import SoundInode, make_sound
from ivshmemfs.fsck.repair.survey import LenientDirectory, NodeReader, Settled, Survey
from ivshmemfs.fsck.walk import KEY_END, KeyRange, Pointer, names_of

DIRECTORY = stat.S_IFDIR >> 12
LOST_AND_FOUND = b"lost+found"
ROOT, ORPHANS = ino_format.ROOT_INO, ino_format.ORPHANS_INO


class FoundName(NamedTuple):
    """One name in a directory; `kind` is mode >> 12 of the inode that it leads to."""

    key: int
    ino: int
    kind: int
    name: bytes


class DirectoryContents:
    """All readable names of one directory, and whether its tree can stay as it is.

    It is the keeper of the walk of that directory.
    """

    def __init__(self) -> None:
        self.names: list[FoundName] = []
        self.nodes: dict[int, int] = {}  # tag by block, of every node of the tree
        self.intact = True

    def require(self, good: bool) -> None:
        """Mark the directory for rebuilding unless `good`."""
        self.intact = self.intact and good

    def lost(self) -> None:
        """See DirectoryKeeper."""
        self.intact = False

    def node(self, block: int, tag: int) -> None:
        """See DirectoryKeeper."""
        self.nodes[block] = tag

    def subtree(self, pointer: Pointer, blocks: int) -> None:
        """See DirectoryKeeper."""
        self.require(pointer[1] == blocks)

    def interior(self, node: Interior, count: int, keys: KeyRange, top: bool) -> None:
        """See DirectoryKeeper."""
        self.require(count == node.count)
        self.require(not any(inv.check_directory_bounds(node.keys, *keys, top)))

    def leaf(self, raw: bytes, count: int, keys: KeyRange) -> None:
        """See DirectoryKeeper; a leaf block has at least one name."""
        self.require(count > 0)
        self.add_leaf(raw, count, keys)

    def add_leaf(self, raw: bytes, count: int, keys: KeyRange) -> None:
        """Take the names of a leaf, if its bytes can be read."""
        try:
            leaf = decode_leaf(raw, count)
        except ValueError:
            self.intact = False
            return
        self.require(not any(inv.check_directory_keys(leaf.keys, *keys)))
        self.names += names_in(leaf)


class DirectoryReader:
    """Reads the directories of a survey that has ended."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey

    def inode(self, row: int) -> SoundInode:
        """Return a kept inode, without contradictions."""
        data = self._survey.image.block(self._survey.inodes.blocks[row])
        return make_sound(data[: min(HEADER.unpack(data).used, len(data))])

    def contents(self, row: int) -> DirectoryContents:
        """Return the names of the directory in `row`."""
        survey, found = self._survey, DirectoryContents()
        ino, sound = survey.inodes.numbers[row], self.inode(row)
        record = sound.record
        if record.payload == ino_format.DIRLEAF:
            found.add_leaf(sound.payload, record.entries, (0, KEY_END))
        elif record.payload == ino_format.DIRTREE:
            reader = NodeReader(survey.image, Settled(survey.claims, Counter()))
            LenientDirectory(reader, ino, found).walk(sound.payload, record.height)
            found.require(ino not in survey.damaged_directories)
        return found  # the repair corrects a wrong count of names without a new tree


def names_in(leaf: Leaf) -> Iterator[FoundName]:
    """Return the names in a leaf."""
    for key, both, name in zip(leaf.keys, leaf.inos, names_of(leaf), strict=True):
        yield FoundName(key, both & INO_MASK, both >> TYPE_SHIFT, name)


class KeptNames:
    """The names that a repair keeps, and the directories that it must store anew for them."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.inodes = survey.inodes
        self.reader = DirectoryReader(survey)
        self.secret = survey.image.superblock.seed
        self.rewritten: dict[int, list[FoundName]] = {}  # names of directories to store anew
        self.created: list[int] = []  # directories that the repair adds
        self._leaves = survey.search_leaves()
        self._seen: set[int] = set()  # directories whose names are decided

    def run(self) -> None:
        """Decide about all names."""
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
        at = self.inodes.index(ino)
        if at < 0:
            self.survey.log.add(f"inode {ino} is now a new empty directory")
            self.inodes.insert(ino, 0, 0, DIRECTORY, 2)
            self.created.append(ino)
            self.rewritten[ino] = []
        elif self.inodes.kinds[at] != DIRECTORY:
            self.survey.log.add(f"inode {ino} was not a directory; now it is an empty one")
            self.inodes.kinds[at] = DIRECTORY
            self.created.append(ino)
            self.rewritten[ino] = []
        self.inodes.parents[self.inodes.index(ino)] = ino

    # --- spreading from a directory ---

    def _spread(self, start: int) -> None:
        """Keep the names of `start` and of every directory below it."""
        queue = deque([start])
        self._seen.add(start)
        while queue:
            ino = queue.popleft()
            for kept in self._keep_names(ino):
                if kept.kind == DIRECTORY and kept.ino not in self._seen:
                    self._seen.add(kept.ino)
                    queue.append(kept.ino)

    def _contents(self, ino: int) -> DirectoryContents:
        if ino in self.created:
            return DirectoryContents()
        found = self.reader.contents(self.inodes.index(ino))
        for leaf in self._leaves.get(ino, ()):
            found.names += names_in(leaf)
            found.intact = False
        return found

    def _keep_names(self, ino: int) -> list[FoundName]:
        found = self._contents(ino)
        kept: dict[bytes, FoundName] = {}
        for entry in found.names:
            kept_name = self._judge(ino, entry, kept)
            if kept_name is not None:
                kept[entry.name] = kept_name
                self._count(ino, kept_name)
            found.require(kept_name == entry)
        names = list(kept.values())
        if not found.intact:
            self.rewritten[ino] = self.rewritten.get(ino, []) + names
        return names

    def _judge(
        self, parent: int, entry: FoundName, kept: dict[bytes, FoundName]
    ) -> FoundName | None:
        """Return `entry` as the repair keeps it; None, and a line in the log, if it drops it."""
        name, log = inv.show(entry.name), self.survey.log
        at = self.inodes.index(entry.ino)
        base = name_key(entry.name, self.secret) if entry.name else 0
        problems = list(inv.check_name(entry.name, base, self.secret))
        found = self.inodes.kinds[at] if at >= 0 else None
        problems += inv.check_target(entry.name, entry.ino, found or 0, found)
        if entry.name in kept:
            if kept[entry.name].ino == entry.ino:
                return None
            problems += inv.check_unique_name(entry.name)
        if problems:
            log.add(f"directory {parent}: {name} is dropped: {problems[0]}")
            return None
        if found == DIRECTORY and self.inodes.parents[at]:
            other = self.inodes.parents[at]
            log.add(f"directory {parent}: {name} is dropped: directory {entry.ino} is in "
                    f"directory {other}")  # fmt: skip
            return None
        key = entry.key if 0 <= entry.key - base < COLLISIONS else base
        return entry._replace(key=key, kind=found or 0)

    def _count(self, parent: int, entry: FoundName) -> None:
        at = self.inodes.index(entry.ino)
        self.inodes.links[at] += 1
        if entry.kind == DIRECTORY:
            self.inodes.parents[at] = parent
            self.inodes.subdirs[self.inodes.index(parent)] += 1

    # --- inodes that no kept name leads to ---

    def _orphans(self) -> set[int]:
        """Return the inodes that stay in the list of inodes without links."""
        found = self._contents(ORPHANS)
        listed: dict[int, FoundName] = {}
        for entry in found.names:
            at = self.inodes.index(entry.ino)
            name = ino_format.orphan_name(entry.ino)
            base = name_key(name, self.secret)
            good = at >= 0 and entry.ino not in (ROOT, ORPHANS) and entry.ino not in listed
            good = good and not self.inodes.links[at] and not self.inodes.nlinks[at]
            kind = self.inodes.kinds[at] if at >= 0 else 0
            key = entry.key if entry.key - base in range(COLLISIONS) else base
            kept_name = FoundName(key, entry.ino, kind, name)
            found.require(good and kept_name == entry)
            if good:
                listed[entry.ino] = kept_name
        if not found.intact:
            self.survey.log.add("the list of inodes without links is stored anew")
            self.rewritten[ORPHANS] = list(listed.values())
        return set(listed)

    def _lost_directories(self) -> Iterator[FoundName]:
        """Return the directories that no kept name leads to: tops of trees first, then cycles."""
        inodes = self.inodes
        lost = [
            ino
            for ino, kind in zip(inodes.numbers, inodes.kinds, strict=True)
            if kind == DIRECTORY and ino not in (ROOT, ORPHANS) and ino not in self._seen
        ]
        below = {ino: self._subdirectories(ino) for ino in lost}
        held = {child for children in below.values() for child in children}
        for ino in sorted(lost, key=lambda ino: (ino in held, ino)):
            if ino not in self._seen:
                inodes.parents[inodes.index(ino)] = (
                    ROOT  # a place holder: nothing below may take it
                )
                self._spread(ino)
                yield FoundName(0, ino, DIRECTORY, b"#%d" % ino)

    def _subdirectories(self, ino: int) -> set[int]:
        names = self._contents(ino).names
        return {e.ino for e in names if e.ino != ino and e.kind == DIRECTORY}

    def _lost_files(self, listed: set[int]) -> list[FoundName]:
        inodes, lost = self.inodes, []
        for at, ino in enumerate(inodes.numbers):
            if inodes.links[at] or inodes.kinds[at] == DIRECTORY or ino in listed:
                continue
            if inodes.nlinks[at] == 0:
                self.survey.log.add(f"inode {ino} has no links and is dropped")
                inodes.dropped[at] = 1
            else:
                lost.append(FoundName(0, ino, inodes.kinds[at], b"#%d" % ino))
        return lost

    # --- /lost+found ---

    def _rescue(self, lost: list[FoundName]) -> None:
        home, taken = self._lost_and_found()
        names = self.rewritten[home]
        for entry in lost:
            name = entry.name
            while name in taken:
                name += b"_"
            taken.add(name)
            kept = entry._replace(name=name, key=name_key(name, self.secret))
            names.append(kept)
            self._count(home, kept)
            self.survey.log.add(f"inode {entry.ino} goes to /lost+found/{name.decode()}")

    def _lost_and_found(self) -> tuple[int, set[bytes]]:
        """Return the inode of /lost+found and the names in it; create it if it does not exist.

        The repair stores this directory anew.
        """
        top = self._decided(ROOT)
        present = next((e for e in top if e.name == LOST_AND_FOUND), None)
        if present is not None and present.kind == DIRECTORY:
            names = self._decided(present.ino)
            self.rewritten[present.ino] = names
            return present.ino, {e.name for e in names}
        name = LOST_AND_FOUND
        while name in {e.name for e in top}:
            name += b"_"
        ino = self.next_ino()
        self.inodes.insert(ino, 0, 0, DIRECTORY, 2)
        self.created.append(ino)
        self._seen.add(ino)
        entry = FoundName(name_key(name, self.secret), ino, DIRECTORY, name)
        self.rewritten[ROOT] = [*top, entry]
        self.rewritten[ino] = []
        self._count(ROOT, entry)
        return ino, set()

    def _decided(self, ino: int) -> list[FoundName]:
        """Return the names that the repair keeps in a directory, once they are decided."""
        if ino in self.rewritten:
            return self.rewritten[ino]
        return self._contents(ino).names

    def next_ino(self) -> int:
        """Return a number above all inode numbers in use, and above those once in use if known."""
        stated = self.survey.next_ino
        highest = max(self.inodes.numbers, default=0)
        wanted = max(highest + 1, ino_format.FIRST_INO)
        return stated if wanted <= stated <= ino_format.MAX_INO else min(wanted, ino_format.MAX_INO)
