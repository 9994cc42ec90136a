"""What commits changed in watched directories: a comparison with what a watcher remembers.

Trees are copy-on-write, so two nodes with one pointer are equal.  A watcher compares pointers and
reads only what differs: a change costs one path of nodes, also in a large directory.

Peers reuse the blocks of an older root at once.  So a watcher cannot read the older tree any more;
it remembers what it needs of it:

    slots    of the inode table's nodes that lead to watched inodes: they tell which inodes changed
    leaves   of each watched directory, by pointer: they tell which names came and went
    details  of the inodes with a name there: they tell what changed in a file

States of one watched directory:

    added      `watch` noted it; `changes` remembers its names and reports nothing of them
    current    its names are remembered
    changed    its inode changed since; `changes` compares it, and it is current again
    in pieces  as added or changed, and `changes` has read a part of its leaves
    gone       it was removed; the watcher forgot it

Only `Watcher.watch`, `unwatch` and `changes` change these states.  `changes` may end early: Busy,
or Unfinished after NAMES_AT_ONCE names.  It keeps what it has finished, and the next call goes on
from there.

Changes between two calls come as their sum.  A name that came and went again leaves no trace.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from ivshmemfs.engine import btree, directory, radix
from ivshmemfs.engine.directory import Dirent
from ivshmemfs.engine.filesystem import Filesystem
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.transaction import View
from ivshmemfs.errors import Unfinished
from ivshmemfs.format import inode as fmt

NAMES_MAX = (
    1 << 18
)  # names that one watcher remembers; beyond, it reports OVERFLOW; tests change it
DETAILS_MAX: Final = 1 << 14  # inodes whose details it remembers
COMPARED_AT_ONCE: Final = 100  # inodes that one look reads
NAMES_AT_ONCE = 1000  # names and inodes that one call of `changes` reads; tests change it
GOING_PER_NAME: Final = 4  # names that are forgotten in the time that one takes to be read
_DIRECTORY: Final = 4  # the kind of a dirent that names a directory
_LASTING: Final = 3  # of a directory's attributes: mode, uid and gid


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

    __slots__ = ("below", "names", "whole")

    def __init__(
        self, names: tuple[Dirent, ...], below: dict[bytes, _Kept], *, whole: bool = True
    ) -> None:
        self.names: Final = names
        self.below: Final = below  # by pointer
        self.whole: Final = whole  # whether everything below is remembered

    def all_names(self) -> Iterator[Dirent]:
        """Yield the names below."""
        yield from self.names
        for kept in self.below.values():
            yield from kept.all_names()


class _Names:
    """Names that came to directories, and went, in one comparison."""

    __slots__ = ("come", "gone")

    def __init__(self) -> None:
        self.come: dict[tuple[int, bytes], Dirent] = {}
        self.gone: dict[tuple[int, bytes], Dirent] = {}

    def add(self, later: _Names) -> None:
        """Add what came and went after this.

        A name that went and came back for the same inode is left out: its leaf is another one.
        """
        for place, entry in later.gone.items():
            before = self.come.pop(place, None)
            if before is None or before.ino != entry.ino:
                self.gone.setdefault(place, entry)
        for place, entry in later.come.items():
            before = self.gone.get(place)
            if before is not None and before.ino == entry.ino:
                del self.gone[place]
            else:
                self.come[place] = entry

    def cancel(self) -> None:
        """Leave out names that went and came back for the same inode: their leaf is another one."""
        for place, entry in list(self.come.items()):
            before = self.gone.get(place)
            if before is not None and before.ino == entry.ino:
                del self.come[place], self.gone[place]


class _Turn:
    """How many names the present call of `changes` may still read."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = 0

    def take(self, count: int) -> None:
        """Count names that were read."""
        self.left -= count

    def end_if_over(self) -> None:
        """Raise Unfinished when the turn is over."""
        if self.left <= 0:
            raise Unfinished("some names are still to be compared")


class _Folder:
    """A watched directory."""

    __slots__ = ("below", "level", "pieces", "pointer", "told", "whole")

    def __init__(self) -> None:
        self.pointer = b""  # of the inode block; empty while nothing is remembered
        self.level = 0  # of the nodes in `below`; leaves have 0
        self.below: dict[bytes, _Kept] = {}  # by pointer
        self.whole = True  # whether all names are remembered
        self.pieces = _Names()  # what came and went in the pieces of this comparison so far
        self.told = False  # whether names are reported that are remembered for the first time

    def all_names(self) -> Iterator[Dirent]:
        """Yield all remembered names."""
        for kept in self.below.values():
            yield from kept.all_names()


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
        self._fresh: set[int] = set()  # inodes that got a name in the comparison under way
        self._departed: set[int] = set()  # directories that lost a name in it
        self._unlearnt: list[Dirent] = []  # names whose inodes are still to be remembered
        self._turn: Final = _Turn()

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

    def _unwatch_tree(self, top: int) -> None:
        todo = [top]
        while todo:  # a hostile tree may be of any depth
            ino = todo.pop()
            kept = self._folders.get(ino)
            if kept is not None:
                todo += [entry.ino for entry in kept.all_names() if entry.kind == _DIRECTORY]
                self.unwatch(ino)

    def _unwatch_departed(self) -> None:
        """Forget directories that have left the watched ones, once all names are compared."""
        for ino in self._departed if self._recursive else ():
            if not self._places.get(ino):
                self._unwatch_tree(ino)
        self._departed.clear()

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
        if word != self._word or self._added or self._comparing or self._unlearnt:
            self._turn.left = NAMES_AT_ONCE
            self._compare(word)
        found, self._found = self._found, []
        return found

    def _compare(self, word: int) -> None:
        self._remember_added()
        self._learn_all()
        if not self._comparing:
            self._comparing = word
        changed = set(self._changed)
        changed.update(self._fs.look(self._changed_inodes))
        self._changed = sorted(changed)
        names = _Names()
        try:
            self._compare_folders(names)
        finally:
            self._watch_later(names.come.values())  # those that an exception left out
            self._fresh.update(entry.ino for entry in names.come.values())
            self._unlearnt += names.come.values()
            self._report(names)
        self._compare_details()
        self._unwatch_departed()
        self._remember_added()
        self._word, self._comparing = self._comparing, 0
        self._fresh.clear()
        self._learn_all()

    def _remember_added(self) -> None:
        while self._added:
            ino = self._added[0]
            folder = self._folders.get(ino)
            if folder is not None:
                names = self._remember(ino)
                if folder.told and ino in self._folders:
                    self._follow_directories(names)
                    self._report(names)
            if self._added[:1] == [ino]:
                self._added.pop(0)

    def _remember(self, ino: int) -> _Names:
        """Remember a directory's names; return them as names that came."""
        names = _Names()
        self._fs.look(lambda view: self._cover(view, ino))
        if not self._compare_folder(ino, names):
            return names
        self._unlearnt += names.come.values()
        if self._recursive and not self._folders[ino].told:
            for entry in names.come.values():
                if entry.kind == _DIRECTORY:
                    self.watch(entry.ino)
        return names

    def _learn_all(self) -> None:
        """Remember what `_learn` does of the names that are new; raises Unfinished."""
        while self._unlearnt:
            self._turn.end_if_over()
            some = self._unlearnt[:COMPARED_AT_ONCE]
            self._fs.look(lambda view, some=some: self._learn(view, some))  # type: ignore[misc]
            self._turn.take(len(some))
            del self._unlearnt[: len(some)]

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

    def _watch_later(self, entries: Iterable[Dirent]) -> None:
        """Watch directories that came; their names are reported when they are remembered."""
        for entry in entries if self._recursive else ():
            if entry.kind == _DIRECTORY and entry.ino not in self._folders:
                self.watch(entry.ino)
                self._folders[entry.ino].told = True

    def _follow_directories(self, names: _Names) -> None:
        """Watch directories that came, and note the names that are in them already."""
        coming = [entry for entry in names.come.values() if entry.kind == _DIRECTORY]
        while coming:
            entry = coming.pop()
            if entry.ino in self._folders:
                continue
            self.watch(entry.ino)
            self._folders[entry.ino].told = True
            try:
                inside = self._remember(entry.ino)
            except Unfinished:
                self._watch_later(coming)
                return
            self._added.remove(entry.ino)
            names.come.update(inside.come)
            coming += [found for found in inside.come.values() if found.kind == _DIRECTORY]

    def _compare_folder(self, ino: int, names: _Names) -> bool:
        """Compare one directory; whether it is still there.  Raises Unfinished after a piece."""
        folder = self._folders[ino]
        found = _Names()
        self._turn.end_if_over()
        allowed = self._turn.left

        def read(view: View) -> _Folder | None:
            found.come.clear()
            found.gone.clear()
            self._turn.left = allowed
            inode = view.find_inode(ino)
            if inode is None or not inode.is_dir:
                return None
            return _folder_now(view, inode, folder, found, self._turn)

        now = self._fs.look(read)
        if now is None:
            for entry in folder.all_names():
                found.gone[ino, entry.name] = entry
            del self._folders[ino]
        else:
            now.told, now.pieces = folder.told, folder.pieces
            self._folders[ino] = now
        found.cancel()
        folder.pieces.add(found)
        self._note(found)
        if now is not None and not now.whole and ino in self._folders:
            raise Unfinished("a part of the directory's names is still to be read")
        names.gone.update(folder.pieces.gone)
        names.come.update(folder.pieces.come)
        if now is not None:
            now.pieces = _Names()
        return now is not None

    def _note(self, found: _Names) -> None:
        """Remember names that came and forget those that went."""
        for place, entry in found.gone.items():
            self._forget_name(place[0], entry)
        for place, entry in found.come.items():
            self._names += 1
            self._places.setdefault(entry.ino, set()).add(place)
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
        self._slots, self._unlearnt = {}, []

    def _compare_details(self) -> None:
        """Compare the changed inodes that have a remembered name; raises Unfinished."""
        while self._changed:
            self._turn.end_if_over()
            some = self._changed[:COMPARED_AT_ONCE]
            now = self._fs.look(
                lambda view, some=some: [  # type: ignore[misc]
                    (ino, inode) for ino in some if (inode := view.find_inode(ino)) is not None
                ]
            )
            self._turn.take(len(some))
            for ino, inode in now:
                self._compare_inode(ino, inode)
            for ino in set(some) - {ino for ino, _ in now}:
                self._details.pop(ino, None)
            del self._changed[: len(some)]

    def _compare_inode(self, ino: int, inode: Inode) -> None:
        before, now = self._details.get(ino), _details_of(inode)
        if before is not None or len(self._details) < DETAILS_MAX:
            self._details[ino] = now
        if ino in self._fresh or before == now:
            return
        if inode.is_dir:  # its times and links change with its names
            if before is None or before.attributes[:_LASTING] == now.attributes[:_LASTING]:
                return
            contents = False
        elif before is None:  # a write sets both times to one moment
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
        self._found += [*removed, *moved, *created]
        self._departed.update(change.ino for change in removed if change.is_dir)


def _details_of(inode: Inode) -> _Details:
    record = inode.record
    attributes = (
        record.mode, record.uid, record.gid, record.nlink, record.atime_ns, record.ctime_ns,
    )  # fmt: skip
    return _Details((record.mtime_ns, record.size), attributes)


def _folder_now(view: View, inode: Inode, before: _Folder, names: _Names, turn: _Turn) -> _Folder:
    """Return a directory as it is now; note the names that came and went since `before`.

    It is not `whole` when the turn was over before all leaves were read.
    """
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
    known = {pointer for pointer in wanted if pointer in old and old[pointer].whole}
    fresh = [pointer for pointer in pointers if pointer not in known]
    stale = [kept for pointer, kept in old.items() if pointer not in known]
    now.below = _read(view, inode, now.level, fresh, stale, names, turn)
    now.below.update((pointer, old[pointer]) for pointer in known)
    now.whole = len(now.below) == len(wanted) and all(kept.whole for kept in now.below.values())
    return now


def _read(
    view: View,
    inode: Inode,
    level: int,
    fresh: list[bytes],
    stale: list[_Kept],
    names: _Names,
    turn: _Turn,
) -> dict[bytes, _Kept]:
    """Return the nodes at the pointers `fresh`, which replaced the remembered nodes `stale`.

    Leaves that are read after the end of the turn are missing.  Names that are still to go then are
    in a node that is not whole, with an empty pointer.
    """
    found: dict[bytes, _Kept] = {}
    if not level:
        going = [entry for kept in stale for entry in kept.names]
        some = going[: max(turn.left, 1) * GOING_PER_NAME]
        for entry in some:
            names.gone[inode.ino, entry.name] = entry
        turn.take(len(some) // GOING_PER_NAME)
        if len(some) < len(going):  # no name comes before all have gone
            return {b"": _Kept(tuple(going[len(some) :]), {}, whole=False)}
        for pointer in fresh:
            if turn.left <= 0:
                break
            entries = directory.entries_at(view, inode, pointer)
            turn.take(len(entries) + 1)
            found[pointer] = _Kept(tuple(entries), {})
            for entry in entries:
                names.come[inode.ino, entry.name] = entry
        return found
    pool: dict[bytes, _Kept] = {}
    for kept in stale:
        pool.update(kept.below)
    inside = {at: btree.pointers_at(view, inode, at, level) for at in fresh}
    wanted = {pointer for pointers in inside.values() for pointer in pointers}
    missing = [at for at in wanted if at not in pool or not pool[at].whole]
    unwanted = [kept for at, kept in pool.items() if at not in wanted or not kept.whole]
    for at in missing:
        pool.pop(at, None)
    pool.update(_read(view, inode, level - 1, missing, unwanted, names, turn))
    going_on = pool.pop(b"", None)
    if going_on is not None:
        found[b""] = _Kept((), {b"": going_on}, whole=False)
    for at, pointers in inside.items():
        below = {pointer: pool[pointer] for pointer in pointers if pointer in pool}
        whole = len(below) == len(pointers) and all(kept.whole for kept in below.values())
        found[at] = _Kept((), below, whole=whole)
    return found
