"""What commits changed in watched directories: a comparison with what a watcher remembers.

Trees are copy-on-write, so two nodes with one pointer are equal.  A watcher compares pointers and
reads only what differs: a change costs one path of nodes, also in a large directory.

Peers reuse the blocks of an older root at once.  So a watcher cannot read the older tree any more;
it remembers what it needs of it:

    slots    of the inode table's nodes that lead to watched inodes: they tell which inodes changed
    leaves   of each watched directory, by pointer: they tell which names came and went
    details  of the inodes with a name there: they tell what changed in a file

States of one watched directory:

    added      `watch` noted it; the next `changes` remembers its names and reports nothing of them
    current    its names are remembered
    changed    its inode changed since; `changes` compares it, and it is current again
    gone       it was removed; the watcher forgot it

Only `Watcher.watch`, `unwatch` and `changes` change these states.  `changes` may end early (Busy,
Unfinished): it keeps what it has finished, and the next call goes on from there.

Changes between two calls come as their sum.  A name that came and went again leaves no trace.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final, NamedTuple

from ivshmemfs.engine import btree, directory, radix
from ivshmemfs.engine.directory import Dirent
from ivshmemfs.engine.filesystem import Filesystem
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.transaction import View
from ivshmemfs.format import inode as fmt

NAMES_MAX = (
    1 << 18
)  # names that one watcher remembers; beyond, it reports OVERFLOW; tests change it
DETAILS_MAX: Final = 1 << 14  # inodes whose details it remembers
COMPARED_AT_ONCE: Final = 100  # inodes that one look reads
_DIRECTORY: Final = 4  # the kind of a dirent that names a directory


class Kind(enum.Enum):
    """What happened to a name, or to the inode behind it."""

    CREATED = "created"
    REMOVED = "removed"
    MOVED = "moved"
    CHANGED = "changed"  # contents
    ATTRIBUTES = "attributes"  # mode, owner, times, links, extended attributes
    OVERFLOW = "overflow"  # changes are missing: list the directories again


class Change(NamedTuple):
    """One change of a name.  `folder` is the inode of its directory."""

    kind: Kind
    folder: int
    name: bytes
    ino: int
    is_dir: bool
    to: tuple[int, bytes] | None = None  # MOVED: the new directory and name


class _Details(NamedTuple):
    """What of an inode's record tells changes of contents from changes of attributes."""

    contents: tuple[int, int]  # mtime in ns, size in bytes
    attributes: tuple[int, ...]


class _Kept:
    """A remembered node of a directory: the names in a leaf, or the nodes below an interior one."""

    __slots__ = ("below", "names")

    def __init__(self, names: tuple[Dirent, ...], below: dict[bytes, _Kept]) -> None:
        self.names: Final = names
        self.below: Final = below  # by pointer

    def all_names(self) -> Iterator[Dirent]:
        """Yield the names below."""
        yield from self.names
        for kept in self.below.values():
            yield from kept.all_names()


class _Folder:
    """A watched directory."""

    __slots__ = ("below", "level", "pointer")

    def __init__(self) -> None:
        self.pointer = b""  # of the inode block; empty while nothing is remembered
        self.level = 0  # of the nodes in `below`; leaves have 0
        self.below: dict[bytes, _Kept] = {}  # by pointer

    def all_names(self) -> Iterator[Dirent]:
        """Yield all remembered names."""
        for kept in self.below.values():
            yield from kept.all_names()


class _Names:
    """Names that came to directories, and went, in one comparison."""

    def __init__(self) -> None:
        self.come: dict[tuple[int, bytes], Dirent] = {}
        self.gone: dict[tuple[int, bytes], Dirent] = {}


class Watcher:
    """Compares watched directories of `fs` with what they were; not thread-safe.

    With `recursive`, directories below a watched one are watched as they come.
    """

    def __init__(self, fs: Filesystem, *, recursive: bool = False) -> None:
        self._fs: Final = fs
        self._recursive: Final = recursive
        self._folders: dict[int, _Folder] = {}
        self._places: dict[int, set[tuple[int, bytes]]] = {}  # remembered names, by inode
        self._details: dict[int, _Details] = {}
        self._slots: dict[tuple[int, int], bytes] = {}  # of the inode table, by level and start
        self._names = 0  # that are remembered
        self._word = 0  # the commit word of the last comparison that was finished
        self._added: list[int] = []
        self._changed: list[int] = []  # inodes that are still to be compared
        self._comparing = 0  # the commit word of the comparison under way; 0: none
        self._found: list[Change] = []  # to be reported

    # --- what is watched --------------------------------------------------------------------

    def watch(self, folder: int) -> None:
        """Watch the directory with inode number `folder` from the next call of `changes` on."""
        if folder not in self._folders:
            self._folders[folder] = _Folder()
            self._added.append(folder)

    def unwatch(self, folder: int) -> None:
        """Forget a directory."""
        kept = self._folders.pop(folder, None)
        if kept is not None:
            for entry in kept.all_names():
                self._forget_name(folder, entry)

    def _unwatch_tree(self, folder: int) -> None:
        kept = self._folders.get(folder)
        if kept is not None:
            below = [entry.ino for entry in kept.all_names() if entry.kind == _DIRECTORY]
            self.unwatch(folder)
            for ino in below:
                self._unwatch_tree(ino)

    @property
    def folders(self) -> frozenset[int]:
        """The inode numbers of the watched directories."""
        return frozenset(self._folders)

    def names_of(self, ino: int) -> frozenset[tuple[int, bytes]]:
        """The remembered (directory, name) pairs that lead to an inode."""
        return frozenset(self._places.get(ino, ()))

    # --- changes ----------------------------------------------------------------------------

    def changes(self) -> list[Change]:
        """Return what changed since the last call; costs one load if there was no commit.

        Raises Busy and Unfinished: call again.  Raises what a look raises for a region that is
        damaged, formatted anew or cannot be read.
        """
        word = self._fs.commit_word()
        if word != self._word or self._added or self._comparing:
            self._compare(word)
        found, self._found = self._found, []
        return found

    def _compare(self, word: int) -> None:
        self._remember_added()
        if not self._comparing:
            self._comparing = word
        changed = set(self._changed)
        changed.update(self._fs.look(self._changed_inodes))
        self._changed = sorted(changed)
        names = _Names()
        try:
            self._compare_folders(names)
            self._compare_details(names)
        finally:
            self._report(names)
        self._remember_added()
        self._word, self._comparing = self._comparing, 0

    def _remember_added(self) -> None:
        while self._added:
            self._remember(self._added[0])
            self._added.pop(0)

    def _remember(self, ino: int, report: _Names | None = None) -> None:
        """Remember a directory's names; with `report`, note there that they came."""
        if ino not in self._folders:
            return
        names = _Names() if report is None else report
        self._fs.look(lambda view: self._cover(view, ino))
        if not self._compare_folder(ino, names):
            return
        entries = list(names.come.values())
        for start in range(0, len(entries), COMPARED_AT_ONCE):
            some = entries[start : start + COMPARED_AT_ONCE]
            self._fs.look(lambda view, some=some: self._learn(view, some))  # type: ignore[misc]
        if self._recursive and report is None:
            for entry in entries:
                if entry.kind == _DIRECTORY:
                    self.watch(entry.ino)

    def _learn(self, view: View, entries: list[Dirent]) -> None:
        """Remember the paths to inodes in the inode table, and details of some inodes."""
        for entry in entries:
            self._cover(view, entry.ino)
            if len(self._details) < DETAILS_MAX and entry.ino not in self._details:
                inode = view.find_inode(entry.ino)
                if inode is not None:
                    self._details[entry.ino] = _details_of(inode)

    # --- which inodes changed ---------------------------------------------------------------

    def _cover(self, view: View, ino: int) -> None:
        """Remember the slots on the path to an inode in the inode table."""
        table = view.root.table
        level, start, slots = table.height, 0, table.slots
        while True:
            self._slots.setdefault((level, start), slots)
            if not level:
                return
            span = radix.span_of(view.nodes.fanout, level)
            at = (ino - start) // span * radix.SIZE
            pointer = slots[at : at + radix.SIZE]
            if len(pointer) < radix.SIZE or pointer == radix.NULL:
                return
            start += (ino - start) // span * span
            level -= 1
            slots = radix.slots_at(view.nodes, pointer, level, 0)

    def _changed_inodes(self, view: View) -> list[int]:
        """Return the watched inodes whose pointers changed; the new slots are remembered."""
        table, changed, slots = view.root.table, list[int](), dict(self._slots)
        tops = [level for level, start in self._slots if not start]
        if tops and max(tops) > table.height:  # cut: all that is left is below the first slot
            slots = {key: value for key, value in slots.items() if key[0] <= table.height}
        self._compare_slots(view, table.height, 0, table.slots, slots, changed)
        self._slots = slots
        return [ino for ino in changed if ino in self._folders or ino in self._places]

    def _compare_slots(
        self,
        view: View,
        level: int,
        start: int,
        new: bytes,
        kept: dict[tuple[int, int], bytes],
        changed: list[int],
    ) -> None:
        old = kept.get((level, start))
        kept[level, start] = new
        span = radix.span_of(view.nodes.fanout, level)
        for at in range(0, max(len(old or b""), len(new)), radix.SIZE):
            pointer = new[at : at + radix.SIZE]
            if old is not None and pointer == old[at : at + radix.SIZE]:
                continue
            first = start + at // radix.SIZE * span
            if not level:
                changed.append(first)
            elif (level - 1, first) in kept:
                empty = not pointer or pointer == radix.NULL
                below = b"" if empty else radix.slots_at(view.nodes, pointer, level - 1, 0)
                self._compare_slots(view, level - 1, first, below, kept, changed)

    # --- what changed in them ---------------------------------------------------------------

    def _compare_folders(self, names: _Names) -> None:
        """Compare the changed directories that are watched."""
        for ino in [ino for ino in self._changed if ino in self._folders]:
            self._compare_folder(ino, names)
            if ino not in self._places:
                self._changed.remove(ino)
        if self._recursive:
            self._follow_directories(names)

    def _follow_directories(self, names: _Names) -> None:
        """Watch directories that came, and note the names that are in them already."""
        coming = list(names.come.values())
        while coming:
            entry = coming.pop()
            if entry.kind != _DIRECTORY or entry.ino in self._folders:
                continue
            self.watch(entry.ino)
            inside = _Names()
            self._remember(entry.ino, inside)
            self._added.remove(entry.ino)
            names.come.update(inside.come)
            coming += inside.come.values()

    def _compare_folder(self, ino: int, names: _Names) -> bool:
        """Compare one directory; whether it is still there."""
        folder = self._folders[ino]
        found = _Names()

        def read(view: View) -> _Folder | None:
            found.come.clear()
            found.gone.clear()
            inode = view.find_inode(ino)
            if inode is None or not inode.is_dir:
                return None
            return _folder_now(view, inode, folder, found)

        now = self._fs.look(read)
        if now is None:
            for entry in folder.all_names():
                found.gone[ino, entry.name] = entry
            del self._folders[ino]
        else:
            self._folders[ino] = now
        for place, entry in list(found.come.items()):
            before = found.gone.get(place)
            if before is not None and before.ino == entry.ino:  # only its leaf is another one
                del found.come[place], found.gone[place]
        self._note(found, names)
        return now is not None

    def _note(self, found: _Names, names: _Names) -> None:
        """Remember names that came and forget those that went."""
        for place, entry in found.gone.items():
            self._forget_name(place[0], entry)
        for place, entry in found.come.items():
            self._names += 1
            self._places.setdefault(entry.ino, set()).add(place)
        names.gone.update(found.gone)
        names.come.update(found.come)
        if self._names > NAMES_MAX:
            self._forget_all()

    def _forget_name(self, folder: int, entry: Dirent) -> None:
        self._names -= 1
        places = self._places.get(entry.ino)
        if places is not None:
            places.discard((folder, entry.name))
            if not places:
                del self._places[entry.ino]

    def _forget_all(self) -> None:
        """Give up the names of all directories; they are remembered anew, one by one."""
        self._found.append(Change(Kind.OVERFLOW, 0, b"", 0, False))
        self._folders = {}
        self._places, self._details, self._names = {}, {}, 0
        self._slots = {}

    def _compare_details(self, names: _Names) -> None:
        """Compare the changed inodes that have a remembered name."""
        fresh = {entry.ino for entry in names.come.values()}
        while self._changed:
            some = self._changed[:COMPARED_AT_ONCE]
            now = self._fs.look(
                lambda view, some=some: [  # type: ignore[misc]
                    (ino, inode) for ino in some if (inode := view.find_inode(ino)) is not None
                ]
            )
            for ino, inode in now:
                self._compare_inode(ino, inode, new=ino in fresh)
            for ino in set(some) - {ino for ino, _ in now}:
                self._details.pop(ino, None)
            del self._changed[: len(some)]
        self._learn_fresh(names)

    def _learn_fresh(self, names: _Names) -> None:
        entries = list(names.come.values())
        for start in range(0, len(entries), COMPARED_AT_ONCE):
            some = entries[start : start + COMPARED_AT_ONCE]
            self._fs.look(lambda view, some=some: self._learn(view, some))  # type: ignore[misc]

    def _compare_inode(self, ino: int, inode: Inode, *, new: bool) -> None:
        before, now = self._details.get(ino), _details_of(inode)
        if before is not None or len(self._details) < DETAILS_MAX:
            self._details[ino] = now
        if new or before == now or ino in self._folders:
            return  # a directory's own record changes with its names
        if before is None:  # a write sets both times to one moment
            contents = inode.record.mtime_ns == inode.record.ctime_ns
        else:
            contents = before.contents != now.contents
        kind = Kind.CHANGED if contents else Kind.ATTRIBUTES
        for folder, name in sorted(self._places.get(ino, ())):
            self._found.append(Change(kind, folder, name, ino, inode.is_dir))

    def _report(self, names: _Names) -> None:
        """Report names that came and went: an inode that did both has moved."""
        going: dict[int, list[tuple[int, bytes]]] = {}
        for place, entry in names.gone.items():
            going.setdefault(entry.ino, []).append(place)
        kinds = {entry.ino: entry.kind for entry in names.gone.values()}
        created: list[Change] = []
        moved: list[Change] = []
        for place, entry in names.come.items():
            is_dir, old = entry.kind == _DIRECTORY, going.get(entry.ino)
            if old:
                moved.append(Change(Kind.MOVED, *old.pop(0), entry.ino, is_dir, to=place))
            else:
                created.append(Change(Kind.CREATED, *place, entry.ino, is_dir))
        removed = [
            Change(Kind.REMOVED, *place, ino, kinds[ino] == _DIRECTORY)
            for ino, places in going.items()
            for place in places
        ]
        self._found[:0] = [*removed, *moved, *created]
        if self._recursive:
            for change in removed:
                if change.is_dir:
                    self._unwatch_tree(change.ino)


def _details_of(inode: Inode) -> _Details:
    record = inode.record
    attributes = (
        record.mode, record.uid, record.gid, record.nlink, record.atime_ns, record.ctime_ns,
    )  # fmt: skip
    return _Details((record.mtime_ns, record.size), attributes)


def _folder_now(view: View, inode: Inode, before: _Folder, names: _Names) -> _Folder:
    """Return a directory as it is now; note the names that came and went since `before`."""
    now = _Folder()
    now.pointer = view.pointer_to(inode.ino)
    old, level = before.below, before.level
    if inode.record.payload == fmt.DIRTREE:
        now.level = inode.record.height - 1
        pointers = btree.top_pointers(inode)
    else:
        pointers = [now.pointer]
    while level > now.level:  # the tree became lower
        old = {key: kept for above in old.values() for key, kept in above.below.items()}
        level -= 1
    while level < now.level:  # it became higher
        old = {b"": _Kept((), old)}
        level += 1
    wanted = set(pointers)
    fresh = [pointer for pointer in pointers if pointer not in old]
    stale = [kept for pointer, kept in old.items() if pointer not in wanted]
    now.below = _read(view, inode, now.level, fresh, stale, names)
    now.below.update((pointer, old[pointer]) for pointer in pointers if pointer in old)
    return now


def _read(
    view: View,
    inode: Inode,
    level: int,
    fresh: list[bytes],
    stale: list[_Kept],
    names: _Names,
) -> dict[bytes, _Kept]:
    """Return the nodes at the pointers `fresh`, which replaced the remembered nodes `stale`."""
    found: dict[bytes, _Kept] = {}
    if not level:
        for kept in stale:
            for entry in kept.names:
                names.gone[inode.ino, entry.name] = entry
        for pointer in fresh:
            entries = directory.entries_at(view, inode, pointer)
            found[pointer] = _Kept(tuple(entries), {})
            for entry in entries:
                names.come[inode.ino, entry.name] = entry
        return found
    pool: dict[bytes, _Kept] = {}
    for kept in stale:
        pool.update(kept.below)
    inside = {at: btree.pointers_at(view, inode, at, level) for at in fresh}
    wanted = {pointer for pointers in inside.values() for pointer in pointers}
    missing = [pointer for pointer in wanted if pointer not in pool]
    unwanted = [kept for pointer, kept in pool.items() if pointer not in wanted]
    pool.update(_read(view, inode, level - 1, missing, unwanted, names))
    for at, pointers in inside.items():
        found[at] = _Kept((), {pointer: pool[pointer] for pointer in pointers})
    return found
