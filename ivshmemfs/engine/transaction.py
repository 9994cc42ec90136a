"""Snapshots and transactions: the only way to read the filesystem, and the only way to change it.

A `View` is the filesystem at one commit word.  A `Transaction` is a view with changes on top: new
inodes, and nodes and data in private blocks (`space`).

    PLANNING   the plan reads inodes and hands new ones to `put` and `remove`; directories and
               block maps write their nodes into `space`
    SEALED     `seal` has written the inode blocks, then the inode table's path, then the root
    ENDED      `Committer.change` has published the new root, or forgets this transaction and plans
               again in another

Only the caller's plan changes a transaction.  Nothing reaches the region before
`Workspace.publish`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final

from ivshmemfs.engine import inode as inodes
from ivshmemfs.engine import radix
from ivshmemfs.engine.clock import Clock
from ivshmemfs.engine.inode import Inode
from ivshmemfs.engine.radix import NULL, RadixTree
from ivshmemfs.errors import Corrupt, FsError, NoSpace, StaleHandle
from ivshmemfs.format import inode as fmt
from ivshmemfs.format import node as node_format
from ivshmemfs.format import words
from ivshmemfs.format.dirent import NODE_ENTRY, decode_interior
from ivshmemfs.format.inode import INODE as INODE_RECORD
from ivshmemfs.format.inode import InodeRecord
from ivshmemfs.format.node import (
    DIRLEAF,
    DIRNODE,
    HEADER_SIZE,
    INDEX,
    INODE,
    ROOT,
    ROOT_POINTERS,
    ROOT_RECORD,
    RootRecord,
)
from ivshmemfs.shm.nodes import Node, NodeSource
from ivshmemfs.shm.published import Store
from ivshmemfs.shm.workspace import Workspace

LARGEST_CLAIM: Final = 2048  # blocks; no request needs more: 1 MiB in blocks of 1 KiB, and its map
# The order in which `Transaction.seal` has the fields of the new root.
_SEALED: Final = ROOT_RECORD.plan_of(
    "fsid", "sequence", "next_ino", "used", "inodes", "orphans", "time_ns", "height", "slots"
)
_ROOT_SIZE: Final = ROOT_RECORD.size
_INODE_PLAN: Final = INODE_RECORD.plan
_INODE_SIZE: Final = INODE_RECORD.size
CACHED_MAX: Final = 8192  # inodes, and as many names, that a mount caches beside the node cache


class RootNode:
    """A parsed root block; `table` is the inode table.

    The numbers are fields of `record`.  They are here for transactions, which read them all: a
    look-up in a record takes 30 ns.
    """

    __slots__ = (
        "data",
        "fsid",
        "inodes",
        "next_ino",
        "orphans",
        "pointer",
        "sequence",
        "table",
        "time_ns",
        "used",
    )

    def __init__(
        self,
        node: Node,
        table: RadixTree,
        fsid: int,
        sequence: int,
        next_ino: int,
        used: int,
        inodes: int,
        orphans: int,
        time_ns: int,
    ) -> None:
        self.pointer: Final = node.pointer
        self.data: Final = node.data
        self.table: Final = table
        self.fsid: Final = fsid
        self.sequence: Final = sequence
        self.next_ino: Final = next_ino
        self.used: Final = used
        self.inodes: Final = inodes
        self.orphans: Final = orphans
        self.time_ns: Final = time_ns

    @property
    def record(self) -> RootRecord:
        """All fields of the root."""
        return ROOT_RECORD.unpack(self.data, HEADER_SIZE)


def parse_root(node: Node) -> RootNode:
    """Return the parsed root; raises Corrupt when the root contradicts itself."""
    if len(node.data) < ROOT_POINTERS:
        raise Corrupt(f"the root in block {node.block} is cut short")
    record = ROOT_RECORD.unpack(node.data, HEADER_SIZE)
    slots = node.data[ROOT_POINTERS:]
    if len(slots) != record.slots * words.POINTER_SIZE or record.height > node_format.MAX_HEIGHT:
        raise Corrupt(f"the root in block {node.block} has {record.slots} pointers, "
                      f"{len(slots)} bytes of them, height {record.height}")  # fmt: skip
    return RootNode(
        node, RadixTree(record.height, slots), record.fsid, record.sequence, record.next_ino,
        record.used, record.inodes, record.orphans, record.time_ns,
    )  # fmt: skip


class CommitCache:
    """Inodes of one commit, and the inodes that names lead to, by directory.

    Views fill it.  A commit of this mount carries it over to the next commit word (`apply`); after
    a commit of another peer the mount drops it.
    """

    __slots__ = ("inodes", "names", "room")

    def __init__(self) -> None:
        self.inodes: Final[dict[int, Inode]] = {}
        self.names: Final[dict[int, dict[bytes, int]]] = {}
        self.room = CACHED_MAX  # for more names

    def find_name(self, folder: int, name: bytes) -> int:
        """Return the number of the inode that a name leads to; 0 when it is not cached."""
        inside = self.names.get(folder)
        return 0 if inside is None else inside.get(name, 0)

    def add_name(self, folder: int, name: bytes, ino: int) -> None:
        """Cache a name, unless the cache is full."""
        if self.room > 0:
            self.room -= 1
            inside = self.names.get(folder)
            if inside is None:
                self.names[folder] = {name: ino}
            else:
                inside[name] = ino

    def apply(self, inodes: dict[int, Inode | None]) -> None:
        """Take over a commit that changed these inodes, or removed those that are None.

        The cache forgets all names in these directories.
        """
        known, names = self.inodes, self.names
        if len(known) + len(inodes) > CACHED_MAX:
            known.clear()
        for ino, inode in inodes.items():
            if ino in names:
                self.room += len(names.pop(ino))
            if inode is not None:
                known[ino] = inode
            else:
                known.pop(ino, None)


class BlockCount:
    """The number of blocks of one inode during a change of it.

    It begins before the change claims or replaces its first block, and ends (`total`) after the
    last.  Between these, the transaction claims and replaces no blocks of another inode.
    """

    __slots__ = ("_others", "_space")

    def __init__(self, space: Workspace, inode: Inode) -> None:
        self._space: Final = space
        self._others: Final = space.balance - inode.record.blocks

    def total(self) -> int:
        """Return the number of blocks that the inode has now, its inode block included."""
        return self._space.balance - self._others


class View:
    """The filesystem at one commit word."""

    def __init__(
        self,
        store: Store,
        word: int,
        root: Node,
        cache: CommitCache,
        before: RadixTree | None = None,
    ) -> None:
        self.store = store
        self.nodes: NodeSource = store
        self.word = word
        self.block_size = store.block_size
        self.secret = store.seed
        if root.parsed is None:
            root.parsed = parse_root(root)
        self.root: RootNode = root.parsed
        self._cache: CommitCache | None = cache
        # The inode table that this mount knew before commits of other peers; None without any.
        self.before = before
        self.tables: dict[bytes, Any] | None = None  # `xattr.Table`s of this plan, by their key

    @property
    def cache(self) -> CommitCache:
        """What the mount knows of this commit; empty after `hand_over`."""
        if self._cache is None:
            self._cache = CommitCache()
        return self._cache

    def inode(self, ino: int) -> Inode:
        """Return an inode; raises StaleHandle when none has that number, Corrupt."""
        found = self.find_inode(ino)
        if found is None:
            raise StaleHandle(f"inode {ino} is gone")
        return found

    def find_inode(self, ino: int) -> Inode | None:
        """Return an inode, or None; raises Corrupt."""
        inodes = self.cache.inodes
        found = inodes.get(ino)
        if found is None:
            pointer = self.pointer_to(ino)
            if pointer == NULL:
                return None
            found = self._parsed(self.nodes.node(pointer, INODE, 0, ino))
            if len(inodes) < CACHED_MAX:
                inodes[ino] = found
        return found

    def hand_over(self) -> CommitCache:
        """Return the cache to the view of the next commit; this view goes on with an empty one."""
        cache = self.cache
        self._cache = None
        return cache

    def pointer_to(self, ino: int) -> bytes:
        """Return the packed pointer to an inode block; NULL when there is no such inode."""
        table, before = self.root.table, self.before
        if before is None:
            return radix.find(self.nodes, table, 0, ino)
        return radix.find_again(self.nodes, self.store.cache, table, before, 0, ino)

    def _parsed(self, node: Node) -> Inode:
        if node.parsed is None:
            node.parsed = inodes.parse(node.owner, node.data, self.block_size)
        found: Inode = node.parsed
        return found

    def inode_at(self, pointer: bytes) -> Inode:
        """Return the inode that a pointer of the inode table leads to; raises Corrupt."""
        return self._parsed(self.nodes.node(pointer, INODE, 0, None))

    def directory(self, ino: int) -> Inode:
        """Return a directory; raises ENOTDIR, StaleHandle, Corrupt."""
        found = self.inode(ino)
        if not found.is_dir:
            raise FsError(errno.ENOTDIR)
        return found


class Transaction(View):
    """A plan of changes on top of a snapshot."""

    def __init__(
        self,
        store: Store,
        word: int,
        root: Node,
        space: Workspace,
        in_use: Callable[[int], bool],
        removal: bool,
        clock: Clock,
        cache: CommitCache,
        before: RadixTree | None,
    ) -> None:
        super().__init__(store, word, root, cache, before)
        self.in_use = in_use  # whether a peer has an inode open; announces the intent to free it
        self.space = space
        self.nodes = space
        self.removal = removal
        space.keep = 0 if removal else self._kept_free()
        space.used = self.root.used
        self.clock = clock
        clock.committed(self.root.time_ns)
        self.now = clock.now()
        self.next_ino = self.root.next_ino
        self.orphans = self.root.orphans
        self._inodes = self.root.inodes
        self.removed: list[Inode] = []
        self._dirty: dict[int, Inode | None] = {}

    # --- reading on top of the changes ---

    def find_inode(self, ino: int) -> Inode | None:
        """Return an inode with the changes of the plan, or None; raises Corrupt."""
        found = self._dirty.get(ino)
        if found is not None:
            return found
        if self.removed and ino in self._dirty:
            return None
        return super().find_inode(ino)

    def hand_over(self) -> CommitCache:
        """Return the cache of the new root; the caller has published it."""
        cache = super().hand_over()
        cache.apply(self._dirty)
        if self.tables is not None:
            for key, table in self.tables.items():
                self.store.recent.put(key, table)
        return cache

    # --- changes ---

    def new_inode(self, record: InodeRecord) -> Inode:
        """Return a new inode with the next number and an empty payload; raises NoSpace."""
        ino = self.next_ino
        if ino > fmt.MAX_INO:
            raise NoSpace("all inode numbers are used up: make a new filesystem")
        self.next_ino += 1
        self._inodes += 1
        inode = Inode(ino, record, b"", b"")
        self._dirty[ino] = inode
        return inode

    def put(self, inode: Inode) -> Inode:
        """Put `inode` into the new root and return it."""
        self._dirty[inode.ino] = inode
        return inode

    def modified(self, mtime_ns: int) -> int:
        """Return the mtime of changed contents whose mtime was `mtime_ns`.

        It differs from the old one even within a step of the clock.  A kernel compares mtimes to
        find out that its cached pages are stale.
        """
        if self.now <= mtime_ns:
            self.now = self.clock.between()
        return self.now

    def keep_table(self, key: bytes, table: Any) -> None:
        """Keep an `xattr.Table` that the plan has made, for it and for later views."""
        if self.tables is None:
            self.tables = {}
        self.tables[key] = table

    def touch(self, ino: int, **changes: Any) -> Inode:
        """Change fields of an inode's record, and its ctime; raises StaleHandle."""
        changes["ctime_ns"] = self.now
        return self.put(self.inode(ino).changed(changes))

    def remove(self, inode: Inode) -> None:
        """Leave `inode` out of the new root; the mount releases its blocks after the commit."""
        self._inodes -= 1
        self.removed.append(inode)
        self._dirty[inode.ino] = None
        record = inode.record
        if record.payload == fmt.MAP:
            self._drop_slots(inode.data, record.height, inode.ino)
        elif record.payload == fmt.DIRTREE:
            pointers = decode_interior(inode.data, len(inode.data) // NODE_ENTRY).pointers
            self._drop_children(pointers, record.height, inode.ino)
        if record.xattr_pointer != NULL:
            self._drop_slots(record.xattr_pointer, record.xattr_height, inode.ino)

    def _drop_slots(self, slots: bytes, height: int, owner: int) -> None:
        """Drop what the top slots of a radix tree lead to."""
        if height == 0:
            self.space.replace_many(slots, radix.count_pointers(slots))
            return
        for at in range(0, len(slots), radix.SIZE):
            pointer = slots[at : at + radix.SIZE]
            if pointer != NULL:
                self.space.drop(pointer, INDEX, height - 1, owner)

    def _drop_children(self, pointers: bytes, height: int, owner: int) -> None:
        """Drop the nodes of a directory's tree."""
        for at in range(0, len(pointers), radix.SIZE):
            kind = DIRNODE if height > 1 else DIRLEAF
            self.space.drop(pointers[at : at + radix.SIZE], kind, height - 1, owner)

    # --- ending ---

    @property
    def changed(self) -> bool:
        """Whether the plan has changed an inode."""
        return bool(self._dirty)

    def _kept_free(self) -> int:
        """Return how many free blocks this transaction, which removes nothing, must leave.

        It is 0 while the region is far from full, because counting free blocks takes time.  The
        other half of the reserve is for overwriting: new blocks come before old ones are free.
        """
        reserve = self.store.reserve
        near = self.store.block_count - 4 * reserve - LARGEST_CLAIM
        return reserve // 2 if self.root.used > near else 0

    def seal(self) -> Node:
        """Write the changed inodes, the inode table and the new root into `space`.

        Returns the root.  Raises NoSpace when more blocks are in use than the limit; only removals
        may use the reserve.
        """
        if self.before is not None and self.next_ino != self.root.next_ino:
            self.pointer_to(self.next_ino - 1)  # the cache forgets what was there
        leaves = [(ino, self._seal_inode(ino)) for ino in sorted(self._dirty)]
        store, space, root = self.store, self.space, self.root
        table = radix.store_some(space, root.table, 0, leaves, store.root_capacity)
        used = root.used + space.balance
        room = store.block_count - (0 if self.removal else store.reserve)
        if used > room and used > root.used:
            raise NoSpace("the region is full")
        sequence, next_ino, now = self._next_sequence(root.sequence), self.next_ino, self.now
        used = used if used > 1 else 1
        inodes = self._inodes if self._inodes > 0 else 0
        orphans = self.orphans if self.orphans > 0 else 0
        values = (
            root.fsid, sequence, next_ino, used, inodes, orphans, now,
            table.height, len(table.slots) // radix.SIZE,
        )  # fmt: skip
        space.replace(root.pointer)
        node = space.add_record(ROOT, 0, values, _SEALED, _ROOT_SIZE, table.slots)
        node.parsed = RootNode(
            node, table, root.fsid, sequence, next_ino, used, inodes, orphans, now
        )
        return node

    def _next_sequence(self, last: int) -> int:
        """Return the sequence number of this commit; `last` is that of the root before.

        It also counts fences, which make no root.
        """
        fences = ((self.word >> words.BLOCK_BITS) - last) & words.SEQUENCE_MASK
        return words.next_sequence(last + fences)

    def _seal_inode(self, ino: int) -> bytes:
        inode = self._dirty[ino]
        if inode is None:
            return NULL
        node = self.space.add_record(
            INODE, ino, inode.record, _INODE_PLAN, _INODE_SIZE, inode.data, inode.xattr
        )
        node.parsed = inode
        return node.pointer
