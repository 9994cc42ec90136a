"""Every turn is bounded: what each turn of each operation may cost on a region that is large in
every way.  The unit is that of the store, a node: see `shm/published.py`."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import pytest

from ivshmemfs.engine import COMPILED, ROOT_INO, Filesystem, fixed, names
from ivshmemfs.engine.collect import Collector
from ivshmemfs.engine.data import Buffer
from ivshmemfs.engine.dropped import RELEASED_AT_ONCE
from ivshmemfs.engine.filesystem import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from ivshmemfs.engine.garbage import COLLECTED_AT_ONCE
from ivshmemfs.engine.lifetimes import UNPINNED_AT_ONCE
from ivshmemfs.engine.names import DEPTH_MAX, RENAME_EXCHANGE
from ivshmemfs.engine.orphans import FREED_AT_ONCE
from ivshmemfs.engine.pieces import PIECES_AT_ONCE, Pieces
from ivshmemfs.engine.upkeep import RETIRE_TICKS
from ivshmemfs.engine.xattr import save
from ivshmemfs.errors import Busy, FsError, NoSpace, Unfinished
from ivshmemfs.format import queue
from ivshmemfs.format.peer import SlotRecord
from ivshmemfs.format.words import FREE, SLOT_SHIFT
from ivshmemfs.shm import identity, published
from ivshmemfs.shm.freelist import COUNTED_AT_ONCE, COUNTED_COST
from ivshmemfs.shm.identity import Presence
from ivshmemfs.shm.membership import Membership
from ivshmemfs.shm.peers import DECIDED_AT_ONCE
from ivshmemfs.shm.published import KNOWN_TURNS, READ_COST, TURN, NodeCache
from tests.support.checks import assert_adds_up, assert_clean, unreachable
from tests.support.figures import Figures
from tests.support.regions import ROOT, TestRegion, get, new_region, put
from tests.support.turns import Cost, cost_of, finish

NODE = 1 + READ_COST  # the cost of reading one node
LOOK = 12 * NODE  # the way to an inode, and through a directory of three levels
CHANGE = 3 * LOOK  # three such ways, each also looked at when its nodes are replaced
DATA = CHANGE + 24 * NODE  # 1 MiB in blocks of 1 KiB has 17 index nodes
PIECE = RELEASED_AT_ONCE * NODE  # released after the commit; data blocks do not count
MIB = 1 << 20
HUGE = 1 << 60  # bytes of a file
CROWD, ATTRIBUTES, ORPHANS, SILENT = 3000, 3000, 40, 40
PATH = b"user.%04d"

#: Operations without turns, for callers that serve no requests: commands, unmount, tests.
WHOLE = {"mount", "unmount", "collect", "reap"}
#: Attributes that are not operations, or are parts of operations.
PARTS = {
    "commit_word",
    "is_open",
    "name_mount_point",
    "only_own_commits",
    "look",
    "change",
    "view",
    "peer_id",
    "is_committing",
    "unattended",
}


class Scene:
    """A region that is large in every way, with the inode numbers of its contents."""

    def __init__(self, made: TestRegion) -> None:
        self.made = made
        fs = made.mount()
        self.crowd = fs.mkdir(ROOT_INO, b"crowd", 0o755, ROOT).ino
        self.child = put(fs, self.crowd, b"0", b"content").ino
        for number in range(1, CROWD):
            fs.link(self.child, self.crowd, b"%d" % number, ROOT)
        self.link = fs.symlink(self.crowd, b"link", b"t" * 4000, ROOT).ino
        for name in (b"folder", b"folder2", b"folder3"):
            fs.mkdir(self.crowd, name, 0o755, ROOT)
        self.full = self._full(fs, b"full")
        self.sparse = put(fs, ROOT_INO, b"sparse", b"").ino
        handle = fs.open(self.sparse, os.O_RDWR, ROOT)
        fs.setattr(self.sparse, ROOT, size=HUGE)
        for at in range(1, 300):
            fs.write(handle, at << 50, b"here")
        fs.release(handle)
        self.named = put(fs, ROOT_INO, b"named", b"").ino
        values = {PATH % at: b"%d" % at for at in range(ATTRIBUTES)}
        fs.change(lambda tx: tx.put(save(tx, tx.inode(self.named), values)))
        self.deep = self._deep(fs, 300)
        self.queue = self._queue(fs)
        self.fs = fs

    @staticmethod
    def _full(fs: Filesystem, name: bytes) -> int:
        """A file of 12 MiB without holes: 200 index nodes."""
        ino = put(fs, ROOT_INO, name, b"").ino
        handle = fs.open(ino, os.O_RDWR, ROOT)
        finish(lambda: fs.fallocate(handle, 0, 0, 12 * MIB))
        fs.release(handle)
        return ino

    @staticmethod
    def _queue(fs: Filesystem) -> int:
        """A queue of 4 MiB."""
        plan = queue.plan(queue.WORK, 4096, 1000)
        size, head = fixed.whole_pages(plan.size), queue.encode(plan)
        ino, _ = fs.change(
            lambda tx: names.make_fixed(tx, ROOT_INO, b"queue", 0o600, size, ROOT, head)
        )
        return ino

    @staticmethod
    def _deep(fs: Filesystem, levels: int) -> int:
        ino = ROOT_INO
        for _ in range(levels):
            ino = fs.mkdir(ino, b"d", 0o755, ROOT).ino
        return ino


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with new_region(64 * MIB, block_size=1024) as made:
        found = Scene(made)
        yield found
        found.fs.unmount()
        assert_clean(made)


@pytest.fixture
def cold(scene: Scene) -> Iterator[Filesystem]:
    """A mount with an empty cache."""
    fs = scene.made.mount()
    yield fs
    fs.unmount()


def opened(fs: Filesystem, ino: int, call: Callable[..., object], flags: int = os.O_RDWR) -> object:
    handle = fs.open(ino, flags, ROOT)
    try:
        return call(handle)
    finally:
        fs.release(handle)


class Row(NamedTuple):
    """An operation, the maximum cost of a turn, the maximum number of turns, and an example."""

    operation: str
    bound: int
    turns: int
    example: Callable[[Filesystem, Scene], object]


def _seek(ino: str, at: int, whence: int) -> Callable[[Filesystem, Scene], object]:
    return lambda fs, s: opened(fs, getattr(s, ino), lambda h: fs.seek(h, at, whence))


def _allocate(ino: str, mode: int, at: int, length: int) -> Callable[[Filesystem, Scene], object]:
    def example(fs: Filesystem, s: Scene) -> None:
        handle = fs.open(getattr(s, ino), os.O_RDWR, ROOT)
        fs.fallocate(handle, mode, at, length)

    return example


def _copied(fs: Filesystem, s: Scene) -> object:
    with open(s.made.path.parent / "copy", "w+b") as file:
        opened(fs, s.full, lambda h: fs.read_to(h, 0, MIB, file.fileno()))
        return opened(fs, s.full, lambda h: fs.write_from(h, 0, MIB, file.fileno()))


def _listed(fs: Filesystem, s: Scene) -> object:
    """Read one look's entries; a request may take several looks."""
    return len(list(fs.readdir(fs.opendir(s.crowd), 2, 1)))


def _named(fs: Filesystem, s: Scene) -> object:
    return len(list(chain.from_iterable(fs.entries(fs.opendir(s.crowd), 2, 1))))


TABLE = [
    Row("getattr", LOOK, 1, lambda fs, s: fs.getattr(s.child)),
    Row("lookup_number", LOOK, 1, lambda fs, s: fs.lookup_number(s.child)),
    Row("birth_time", LOOK, 1, lambda fs, s: fs.birth_time(s.child)),
    Row("readlink", LOOK, 1, lambda fs, s: fs.readlink(s.link)),
    Row("lookup", 2 * LOOK, 1, lambda fs, s: fs.lookup(s.crowd, b"2345")),
    Row("find", 2 * LOOK, 1, lambda fs, s: fs.find(s.crowd, b"none")),
    Row("statfs", LOOK, 1, lambda fs, s: fs.statfs()),
    Row("forget", 0, 1, lambda fs, s: fs.forget(s.child)),
    Row("setattr", CHANGE, 1, lambda fs, s: fs.setattr(s.child, ROOT, mode=0o600)),
    Row("setattr", CHANGE + PIECE, 1, lambda fs, s: fs.setattr(s.full, ROOT, size=5)),
    Row("setattr", CHANGE + PIECE, 1, lambda fs, s: fs.setattr(s.sparse, ROOT, size=HUGE // 2 + 9)),
    Row("setattr", CHANGE, 1, lambda fs, s: fs.setattr(s.sparse, ROOT, size=HUGE)),
    Row("mknod", CHANGE, 1, lambda fs, s: fs.mknod(s.crowd, b"pipe", stat.S_IFIFO, 0, ROOT)),
    Row("mkdir", CHANGE, 1, lambda fs, s: fs.mkdir(s.crowd, b"new", 0o755, ROOT)),
    Row("symlink", CHANGE, 1, lambda fs, s: fs.symlink(s.crowd, b"sym", b"t" * 4000, ROOT)),
    Row("link", CHANGE, 1, lambda fs, s: fs.link(s.child, s.crowd, b"more", ROOT)),
    Row("rename", 2 * CHANGE, 1, lambda fs, s: fs.rename(s.crowd, b"7", s.crowd, b"8", 0, ROOT)),
    Row("rename", 2 * CHANGE, 1,
        lambda fs, s: fs.rename(s.crowd, b"folder2", s.crowd, b"11", RENAME_EXCHANGE, ROOT)),
    Row("rename", TURN + CHANGE, 5,
        lambda fs, s: fs.rename(s.crowd, b"folder3", s.deep, b"new", 0, ROOT)),
    Row("unlink", CHANGE, 1, lambda fs, s: fs.unlink(s.crowd, b"9", ROOT)),
    Row("rmdir", CHANGE, 1, lambda fs, s: fs.rmdir(s.crowd, b"folder", ROOT)),
    Row("open", 2 * LOOK, 1, lambda fs, s: opened(fs, s.child, lambda h: h)),
    Row("release", 2 * LOOK, 1, lambda fs, s: fs.release(fs.open(s.child, os.O_RDONLY, ROOT))),
    Row("create", CHANGE, 1, lambda fs, s: fs.create(s.crowd, b"c", 0o644, os.O_RDWR, ROOT)[1]),
    Row("tmpfile", 2 * CHANGE, 1, lambda fs, s: fs.release(fs.tmpfile(s.crowd, 0o644, 2, ROOT)[0])),
    Row("make_nameless", 2 * CHANGE, 1,
        lambda fs, s: fs.release(fs.make_nameless(s.crowd, stat.S_IFIFO | 0o600, 0, ROOT)[0])),
    Row("names_lead_to", 4 * LOOK, 1,
        lambda fs, s: fs.names_lead_to(s.child, ((s.crowd, b"2345"), (s.crowd, b"none")))),
    Row("messages", 2 * LOOK, 1, lambda fs, s: fs.messages(s.queue)),
    Row("condition", 0, 1, lambda fs, s: fs.condition()),
    Row("read", DATA, 1, lambda fs, s: opened(fs, s.full, lambda h: fs.read(h, 99, MIB))),
    Row("read", DATA, 1, lambda fs, s: opened(fs, s.sparse, lambda h: fs.read(h, 1 << 50, MIB))),
    Row("write", DATA, 1, lambda fs, s: opened(fs, s.full, lambda h: fs.write(h, 99, bytes(MIB)))),
    Row("write", DATA, 1,
        lambda fs, s: opened(fs, s.queue, lambda h: fs.write(h, 2 * MIB, bytes(MIB)))),
    Row("write", DATA, 1, lambda fs, s: opened(fs, s.sparse, lambda h: fs.write(h, 1 << 61, b"x"))),
    Row("value", 2 * LOOK, 1, lambda fs, s: fs.value(s.crowd, b"2345", MIB)),
    Row("read_to", 2 * DATA, 1, _copied),
    Row("write_from", 2 * DATA, 1, _copied),
    Row("fsync", LOOK, 1, lambda fs, s: opened(fs, s.child, fs.fsync)),
    Row("seek", 3 * LOOK, 1, _seek("sparse", 0, os.SEEK_DATA)),
    Row("seek", 3 * LOOK, 1, _seek("sparse", (9 << 50) + 5000, os.SEEK_DATA)),
    Row("seek", 3 * LOOK, 1, _seek("sparse", 299 << 50, os.SEEK_HOLE)),
    Row("seek", 3 * LOOK, 1, _seek("full", 0, os.SEEK_HOLE)),
    Row("fallocate", DATA, 1, _allocate("sparse", PUNCH_HOLE | KEEP_SIZE, 12345, 1 << 40)),
    Row("fallocate", 2 * DATA, 1, _allocate("sparse", ZERO_RANGE, (1 << 50) + 1, HUGE)),
    Row("fallocate", DATA + PIECE, 1, _allocate("full", PUNCH_HOLE | KEEP_SIZE, 1, 12 * MIB - 2)),
    Row("fallocate", DATA, 15, _allocate("full", 0, 0, 12 * MIB)),
    Row("fallocate", DATA, 1, _allocate("full", KEEP_SIZE, 0, HUGE // 8)),
    Row("opendir", LOOK, 1, lambda fs, s: fs.opendir(s.crowd)),
    Row("releasedir", LOOK, 1, lambda fs, s: fs.releasedir(fs.opendir(s.crowd))),
    Row("entries", 2 * LOOK, 1, _named),
    Row("readdir", 2 * LOOK + 62 * NODE, 1, _listed),
    Row("getxattr", DATA, 2, lambda fs, s: fs.getxattr(s.named, PATH % 77)),
    Row("listxattr", DATA, 2, lambda fs, s: len(fs.listxattr(s.named))),
    Row("access_list", DATA, 2, lambda fs, s: len(fs.access_list(s.named))),
    Row("mode_without_list", DATA, 2, lambda fs, s: fs.mode_without_list(fs.getattr(s.named))),
    Row("setxattr", DATA, 2, lambda fs, s: fs.setxattr(s.named, PATH % 78, b"", 0, ROOT)),
    Row("removexattr", DATA, 2, lambda fs, s: fs.removexattr(s.named, PATH % 79, ROOT)),
    Row("tick", CHANGE, 1, lambda fs, s: fs.tick()),
    Row("work", CHANGE, 1, lambda fs, s: fs.work()),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{TABLE.index(row)}-{row.operation}")
def test_every_operation_is_bounded(cold: Filesystem, scene: Scene, row: Row) -> None:
    cost = cost_of(cold, lambda: row.example(cold, scene))
    if isinstance(cost.result, NoSpace):
        assert row.operation == "fallocate"
    elif isinstance(cost.result, Exception):
        raise cost.result
    assert cost.work <= row.bound
    assert cost.turns <= row.turns


def test_the_table_has_every_operation() -> None:
    public = {name for name in dir(Filesystem) if not name.startswith("_")}
    operations = {name for name in public if callable(getattr(Filesystem, name))}
    assert operations - WHOLE - PARTS == {row.operation for row in TABLE}


@pytest.mark.parametrize("attributes", [False, True])
def test_a_listing_goes_on_where_a_request_ended(
    cold: Filesystem, scene: Scene, attributes: bool
) -> None:
    handle, cookie, names = cold.opendir(scene.crowd), 0, list[bytes]()
    while True:
        if attributes:
            found = [(name, key) for name, _, key in cold.readdir(handle, cookie, 2)]
        else:
            listed = chain.from_iterable(cold.entries(handle, cookie, 2))
            found = [(entry.name, entry.key) for entry in listed]
        if not found:
            break
        names += [name for name, _ in found]
        cookie = found[-1][1]
    assert sorted(names) == sorted(name for name, _, _ in cold.readdir(handle, 0))
    assert len(names) == len(set(names)) > CROWD - 10


# --- what is done in pieces -------------------------------------------------------------------


def pieces(fs: Filesystem) -> list[Cost]:
    """Return the cost of each piece of work until there is none left."""
    found = [cost_of(fs, fs.tick)]
    while found[-1].result is True:
        found.append(cost_of(fs, fs.work))
        assert len(found) < 1000
    return found


@pytest.fixture
def roomy() -> Iterator[TestRegion]:
    with new_region(64 * MIB, block_size=1024) as made:
        yield made
        assert_clean(made)


@pytest.fixture
def tight() -> Iterator[Filesystem]:
    """Mount a region with few free blocks, of which one file has most."""
    with new_region(4 * MIB, block_size=1024) as made:
        fs = made.mount()
        handle, _ = fs.create(ROOT_INO, b"full", 0o644, os.O_RDWR, ROOT)
        done = 0
        with suppress(NoSpace):
            while True:
                done += finish(lambda: fs.write(handle, done, bytes(MIB)))  # noqa: B023
        fs.release(handle)
        yield fs
        pieces(fs)
        assert_adds_up(fs)
        fs.unmount()
        assert_clean(made)


def _commits(fs: Filesystem) -> int:
    return fs.view().root.record.sequence


def test_overwriting_with_little_room_takes_turns(tight: Filesystem) -> None:
    fs, content = tight, os.urandom(MIB)
    handle = fs.open(fs.lookup(ROOT_INO, b"full").ino, os.O_RDWR, ROOT)
    began, turns = _commits(fs), [0]
    request = bytearray(content)
    call: Callable[[], object] | None = partial(fs.write, handle, 5, memoryview(request))
    while call is not None:
        before, work = _commits(fs), fs.store.work
        call, so_far = _one_turn(call)
        assert _commits(fs) - before <= PIECES_AT_ONCE
        assert fs.store.work - work <= PIECES_AT_ONCE * DATA
        assert get(fs, ROOT_INO, b"full")[5 : 5 + so_far] == content[:so_far]
        assert so_far > turns[-1]
        turns.append(so_far)
        request[:] = bytes(MIB)  # the next request reuses the buffer
    assert turns[-1] == MIB
    assert len(turns) > 3
    assert _commits(fs) - began <= PIECES_AT_ONCE * len(turns)
    fs.release(handle)


def _one_turn(call: Callable[[], Any]) -> tuple[Callable[[], object] | None, Any]:
    """Return how a write continues after a turn (None: it ended), and how many bytes it wrote."""
    try:
        return None, call()
    except Unfinished as turn:
        return turn.go_on, turn.so_far


def test_a_write_that_was_begun_is_short_when_the_rest_fails(tight: Filesystem) -> None:
    fs = tight
    handle = fs.open(fs.lookup(ROOT_INO, b"full").ino, os.O_RDWR, ROOT)
    with pytest.raises(Unfinished) as turn:
        fs.write(handle, 0, b"x" * MIB)
    fs.unlink(ROOT_INO, b"full", ROOT)
    fs.release(handle)
    assert turn.value.go_on is not None
    assert turn.value.go_on() == turn.value.so_far


def test_a_write_that_was_begun_waits_for_others() -> None:
    """A write that gets Busy between pieces writes nothing twice and does not end early."""
    stored, busy = list[bytes](), [False, True, False, True, True, False]

    def store(_at: int, piece: Buffer) -> None:
        if len(piece) > 10:
            raise NoSpace()
        if busy and busy.pop(0):
            raise Busy("another peer")
        stored.append(bytes(piece))

    pieces = Pieces(store, 0, bytes(range(40)), 1, appending=False)
    told = list[int | None]()
    while not told or told[-1] != 40:
        try:
            told.append(_one_turn(pieces.turn)[1])
        except Busy:
            told.append(None)
    assert told == [10, 20, None, 40]
    assert b"".join(stored) == bytes(range(40))


# --- counting free blocks ---------------------------------------------------------------------


@pytest.fixture
def large() -> Iterator[TestRegion]:
    """More blocks than one turn counts."""
    with new_region(192 * MIB, block_size=1024) as made:
        yield made


def _claim_all_but(fs: Filesystem, left: int) -> bytes:
    """Claim blocks under a tag that is not settled, as a silent peer has them."""
    blocks = fs.store.blocks
    claims, _ = blocks.claim(blocks.free_count() - left, fs._volume.joined().begin(), 0)
    return claims


def test_free_blocks_are_counted_in_turns(large: TestRegion) -> None:
    fs, other = large.mount(), large.mount()
    put(fs, ROOT_INO, b"file", b"x" * 9000)
    count = fs.superblock.geometry.block_count
    assert count > 2 * COUNTED_AT_ONCE
    _claim_all_but(other, 5000)
    used = fs.view().root.record.used
    cost = cost_of(fs, lambda: fs._volume.supply.free(used))
    assert cost == Cost(-(-count // COUNTED_AT_ONCE), COUNTED_COST, 5000)
    assert cost_of(fs, lambda: fs._volume.supply.free(used - 7)) == Cost(1, 0, 5007)
    assert fs._volume.supply.lacking(used)
    fs._volume.supply.recount()
    assert cost_of(fs, lambda: fs._volume.supply.free(used)).turns == cost.turns


def test_a_count_hides_no_block_that_is_freed_meanwhile(large: TestRegion) -> None:
    """At every turn of the count: an outdated count must not cause ENOSPC."""
    fs, other = large.mount(), large.mount()
    claims = _claim_all_but(other, 5000)
    used, size = fs.view().root.record.used, 16 * 3000
    for at in (0, len(claims) - size):
        fs._volume.supply.recount()
        with pytest.raises(Unfinished):
            fs._volume.supply.free(used)
        fs.store.blocks.release(claims[at : at + size])
        free = finish(partial(fs._volume.supply.free, used - 3000))
        assert free >= fs.store.blocks.free_count()
        assert fs._volume.supply.lacking(used - 3000), "who is not sure looks for lost blocks"
        used -= 3000


def test_a_full_large_region_is_full_in_turns(large: TestRegion) -> None:
    """Each turn of a write that ends with NoSpace is bounded."""
    fs, other = large.mount(), large.mount()
    handle, _ = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    fs.write(handle, 0, bytes(4 * 1024))
    _claim_all_but(other, 2)
    costs = [cost_of(fs, lambda: fs.write(handle, 0, bytes(MIB)))]
    while not isinstance(costs[-1].result, NoSpace):
        assert isinstance(costs[-1].result, Busy), "the other may give its blocks back"
        costs.append(cost_of(fs, lambda: fs.write(handle, 0, bytes(MIB))))
    assert costs[0].turns > 2
    assert (
        max(cost.work for cost in costs)
        <= PIECES_AT_ONCE * DATA + COLLECTED_AT_ONCE * NODE + COUNTED_COST
    )


def test_a_large_file_is_released_in_pieces(roomy: TestRegion) -> None:
    fs = roomy.mount()
    Scene._full(fs, b"full")
    Scene._full(fs, b"other")
    used = fs.view().root.record.used
    for name in (b"full", b"other"):
        assert cost_of(fs, lambda name=name: fs.unlink(ROOT_INO, name, ROOT)).work <= CHANGE + PIECE  # type: ignore[misc]
    assert fs.view().root.record.used < used - 2 * 12 * 1024, "what was removed is free to others"
    assert unreachable(fs) > 1000, "it was all released at once"
    costs = pieces(fs)
    assert len(costs) > 1
    assert max(cost.work for cost in costs) <= PIECE + CHANGE
    assert_adds_up(fs)


def test_what_waits_to_be_released_is_room(roomy: TestRegion) -> None:
    """The mount that removed a file finds its blocks at once, others when they collect."""
    fs, other = roomy.mount(), roomy.mount()
    for mount in (fs, other):
        ino = put(fs, ROOT_INO, b"large", b"").ino
        handle = fs.open(ino, os.O_RDWR, ROOT)
        finish(lambda h=handle: fs.fallocate(h, 0, 0, 50 * MIB))  # type: ignore[misc]
        fs.release(handle)
        fs.unlink(ROOT_INO, b"large", ROOT)
        assert unreachable(fs) > 40_000
        ino = put(mount, ROOT_INO, b"next", b"").ino
        handle = mount.open(ino, os.O_RDWR, ROOT)
        finish(lambda m=mount, h=handle: m.fallocate(h, 0, 0, 50 * MIB))  # type: ignore[misc]
        mount.release(handle)
        mount.unlink(ROOT_INO, b"next", ROOT)
        for each in (fs, other):
            pieces(each)


def test_what_a_dead_mount_had_to_release_is_collected(roomy: TestRegion) -> None:
    fs, other = roomy.mount(), roomy.mount()
    Scene._full(fs, b"full")
    fs.unlink(ROOT_INO, b"full", ROOT)
    assert unreachable(fs) > 1000
    assert other.table.retire(fs.peer_id[0], fs.table.state(fs.peer_id[0]))
    assert other._volume.member is not None
    other._volume.member.must_collect = True
    costs = pieces(other)
    assert len(costs) > 1
    assert max(cost.work for cost in costs) <= COLLECTED_AT_ONCE * NODE + CHANGE
    assert_adds_up(other)


def test_a_sleeper_releases_nothing_that_is_used_again(roomy: TestRegion) -> None:
    """It wakes with blocks in its queue that others have collected and claimed meanwhile."""
    fs, other = roomy.mount(), roomy.mount()
    Scene._full(fs, b"full")
    fs.unlink(ROOT_INO, b"full", ROOT)
    assert unreachable(fs) > 1000
    assert other.table.retire(fs.peer_id[0], fs.table.state(fs.peer_id[0]))
    other.collect()
    content = {b"%d" % number: os.urandom(5 * MIB) for number in range(10)}
    for name, data in content.items():
        put(other, ROOT_INO, name, data)
    assert fs._garbage.dropped.pending
    pieces(fs)
    assert not fs._garbage.dropped.pending
    for name, data in content.items():
        assert get(fs, ROOT_INO, name) == get(other, ROOT_INO, name) == data
    assert_adds_up(other)


def test_collecting_for_want_of_room_takes_turns(roomy: TestRegion) -> None:
    fs, other = roomy.mount(), roomy.mount()
    ino = put(fs, ROOT_INO, b"large", b"").ino
    handle = fs.open(ino, os.O_RDWR, ROOT)
    finish(lambda: fs.fallocate(handle, 0, 0, 50 * MIB))
    fs.release(handle)
    fs.unlink(ROOT_INO, b"large", ROOT)
    assert other.table.retire(fs.peer_id[0], fs.table.state(fs.peer_id[0]))
    put(other, ROOT_INO, b"next", b"")
    handle = other.open(other.lookup(ROOT_INO, b"next").ino, os.O_RDWR, ROOT)
    cost = cost_of(other, lambda: other.fallocate(handle, 0, 0, 50 * MIB))
    assert cost.result is None
    assert cost.work <= DATA + COLLECTED_AT_ONCE * NODE
    other.release(handle)
    assert_adds_up(other)


def test_what_is_lost_is_looked_for_when_what_was_removed_is_not_enough(
    roomy: TestRegion,
) -> None:
    fs, other = roomy.mount(), roomy.mount()
    Scene._full(fs, b"full")
    fs.unlink(ROOT_INO, b"full", ROOT)
    assert fs._garbage.dropped.pending
    assert other._volume.member is not None
    tag = other._volume.member.begin()
    assert len(other.store.blocks.claim(40 * 1024, tag, 0)[0]) == 40 * 1024 * 16
    assert fs.table.retire(other.peer_id[0], fs.table.state(other.peer_id[0]))
    ino = put(fs, ROOT_INO, b"next", b"").ino
    handle = fs.open(ino, os.O_RDWR, ROOT)
    assert cost_of(fs, lambda: fs.fallocate(handle, 0, 0, 50 * MIB)).result is None
    fs.release(handle)
    assert_adds_up(fs)


def test_orphans_of_a_dead_peer_are_freed_some_at_a_time(roomy: TestRegion) -> None:
    fs, other = roomy.mount(), roomy.mount()
    for number in range(ORPHANS):
        other.create(ROOT_INO, b"%d" % number, 0o644, os.O_RDWR, ROOT)
        fs.unlink(ROOT_INO, b"%d" % number, ROOT)
    assert other.table.retire(other.peer_id[0], other.table.state(other.peer_id[0]))
    left = [fs.view().root.record.orphans]
    costs = [cost_of(fs, fs.tick)]
    while costs[-1].result is True:
        left.append(fs.view().root.record.orphans)
        costs.append(cost_of(fs, fs.work))
    assert left[0] == ORPHANS
    assert all(before - after <= FREED_AT_ONCE for before, after in pairwise(left))
    assert max(cost.work for cost in costs) <= FREED_AT_ONCE * CHANGE
    assert fs.view().root.record.orphans == 0
    assert_adds_up(fs)


def test_a_piece_of_a_collection_is_bounded(scene: Scene, cold: Filesystem) -> None:
    collector, most, steps = Collector(cold.store, cold.table), 0, 0
    while not collector.done:
        before = cold.store.work
        collector.step(COLLECTED_AT_ONCE)
        most, steps = max(most, cold.store.work - before), steps + 1
    assert steps > 3
    assert most <= (COLLECTED_AT_ONCE + 12) * NODE


@pytest.mark.skipif(COMPILED, reason="the limit is compiled in")
def test_a_collection_that_found_no_root_is_not_over(
    roomy: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may commit faster than it reads; then it starts again."""
    fs = roomy.mount()
    assert fs._volume.member is not None
    tag = fs._volume.member.begin()
    fs.store.blocks.claim(3, tag, 0)
    fs._volume.member.end()
    collector = Collector(fs.store, fs.table)
    fs.store._root = None  # as before the first look
    with monkeypatch.context() as patch:
        patch.setattr(published, "ROOT_TRIES", 0)
        assert not collector.step(3)
    assert collector.step()
    assert collector.released == 3


def test_filling_goes_on_beside_a_writer(roomy: TestRegion) -> None:
    """Busy before each turn does not undo what earlier turns filled."""
    fs, other = roomy.mount(), roomy.mount()
    handle, attr = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
    call: Callable[[], object] = lambda: fs.fallocate(handle, 0, 0, 4 * MIB)  # noqa: E731
    sizes: list[int] = []
    while not sizes or sizes[-1] < 4 * MIB:
        assert other._committer.hint.take(other.peer_id[0])
        with pytest.raises(Busy) as refused:
            call()
        assert not isinstance(refused.value, Unfinished)
        other._committer.hint.give()
        try:
            call()
        except Unfinished as turn:
            call = turn.go_on or call
        sizes.append(fs.getattr(attr.ino).size)
    assert sizes == [MIB, 2 * MIB, 3 * MIB, 4 * MIB]
    fs.release(handle)


def test_pins_are_let_go_some_at_a_time(roomy: TestRegion) -> None:
    fs = roomy.mount()
    for number in range(3 * UNPINNED_AT_ONCE):
        ino = put(fs, ROOT_INO, b"%d" % number, b"").ino
        fs._openfiles.hold(ino)
        fs._lifetimes.pins[ino] = 0.0, 1
    before = len(fs._lifetimes.pins)
    fs.tick()
    assert len(fs._lifetimes.pins) == before - UNPINNED_AT_ONCE


# --- a table that is full of silent peers ------------------------------------------------------


class Crowd:
    """A mount beside many silent peers; it counts the checks of their processes."""

    def __init__(self, made: TestRegion, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fs = made.mount()
        self.looked_for: list[int] = []
        self.members = [Membership(self.fs.table) for _ in range(SILENT)]
        for member in self.members:
            member.join()
        self.fs.table.watch.look()
        for slot in self.fs.table.watch._silence:
            self.fs.table.watch._silence[slot] = 60.0
        self.gone: set[int] = set()

        def presence(record: SlotRecord, *_: object) -> Presence:
            slot = next(at for at, nonce in self.nonces.items() if nonce == record.nonce)
            self.looked_for.append(slot)
            return Presence.GONE if slot in self.gone else Presence.UNKNOWN

        self.nonces = {at.slot: self.fs.table.peer(at.slot).record.nonce for at in self.members}
        monkeypatch.setattr(identity, "presence", presence)


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crowd]:
    with new_region(64 * MIB, block_size=1024, peer_count=255) as made:
        yield Crowd(made, monkeypatch)


def test_who_is_gone_is_decided_some_at_a_time(crowded: Crowd) -> None:
    """One round decides about each silent peer, including the last one."""
    fs = crowded.fs
    crowded.gone = {min(crowded.nonces), max(crowded.nonces)}
    for _ in range(RETIRE_TICKS):
        more = fs.tick()
    decided = [len(crowded.looked_for)]
    while more:
        before = len(crowded.looked_for)
        more = fs.work()
        decided.append(len(crowded.looked_for) - before)
    assert max(decided) == DECIDED_AT_ONCE
    assert sorted(crowded.looked_for) == sorted(crowded.nonces)
    states = fs.table.states()
    assert [states[slot - 1] >> SLOT_SHIFT for slot in crowded.gone] == [FREE, FREE]
    assert fs.tick() is False, "the next round is some ticks away"


def test_a_request_looks_for_nobody(crowded: Crowd) -> None:
    """A change without space makes the upkeep decide at its next tick."""
    fs = crowded.fs
    dead = crowded.members[0]
    fs.store.blocks.claim(fs.store.blocks.free_count() - 1, dead.begin(), 0)
    fs.table.watch.look()
    fs.table.watch._silence[dead.slot] = 60.0
    crowded.gone = {dead.slot}
    failed = cost_of(fs, lambda: fs.mkdir(ROOT_INO, b"new", 0o755, ROOT))
    assert isinstance(failed.result, NoSpace | Busy)
    assert not crowded.looked_for
    pieces(fs)
    assert crowded.looked_for
    fs.mkdir(ROOT_INO, b"new", 0o755, ROOT)


# --- a place that is too deep ------------------------------------------------------------------


def test_moving_below_very_many_directories(roomy: TestRegion) -> None:
    fs = roomy.mount()
    deep = Scene._deep(fs, DEPTH_MAX + 1)
    fs.mkdir(ROOT_INO, b"moved", 0o755, ROOT)
    put(fs, ROOT_INO, b"file", b"")
    cost = cost_of(fs, lambda: fs.rename(ROOT_INO, b"moved", deep, b"moved", 0, ROOT))
    assert isinstance(cost.result, FsError)
    assert cost.result.errno == errno.ENAMETOOLONG
    assert cost.work <= TURN + CHANGE
    above = fs.lookup(deep, b"..").ino
    finish(lambda: fs.rename(ROOT_INO, b"moved", above, b"moved", 0, ROOT))
    finish(lambda: fs.rename(ROOT_INO, b"file", deep, b"file", 0, ROOT))


@pytest.mark.parametrize("warm", [False, True])
def test_exchanging_below_very_many_directories(roomy: TestRegion, warm: bool) -> None:
    """Such a rename visits more nodes than any other operation, and reads each of them once."""
    fs = roomy.mount()
    places = []
    for top in (b"one", b"other"):
        ino = fs.mkdir(ROOT_INO, top, 0o755, ROOT).ino
        for _ in range(DEPTH_MAX - 2):
            ino = fs.mkdir(ino, b"d", 0o755, ROOT).ino
        fs.mkdir(ino, b"moved", 0o755, ROOT)
        places.append(ino)
    one, other = places
    mount = fs if warm else roomy.mount()
    for _ in range(2):
        cost = cost_of(
            mount, lambda: mount.rename(one, b"moved", other, b"moved", RENAME_EXCHANGE, ROOT)
        )
        assert isinstance(cost.result, tuple)
        assert cost.work <= KNOWN_TURNS * TURN


def test_a_cache_that_is_too_small_for_an_operation(roomy: TestRegion) -> None:
    """A change of several turns makes progress in each, also with a cache that is too small."""
    fs = roomy.mount()
    deep = Scene._deep(fs, DEPTH_MAX - 10)
    fs.mkdir(ROOT_INO, b"moved", 0o755, ROOT)
    cold = roomy.mount()
    cold.store.cache = NodeCache(1 << 20)
    cost = cost_of(cold, lambda: cold.rename(ROOT_INO, b"moved", deep, b"moved", 0, ROOT))
    assert isinstance(cost.result, tuple)
    assert 1 < cost.turns < 20


# --- by the clock -------------------------------------------------------------------------------


@pytest.mark.long
def test_by_the_clock(figures: Figures) -> None:
    """Measure the slowest turn on a region of 16 GiB of which 2 GiB are used."""
    slowest = 0.0

    def timed(call: Callable[[], object]) -> None:
        nonlocal slowest
        more: object = True
        while more:
            began = time.thread_time()
            try:
                more = call() is True
            except Unfinished as turn:
                call = turn.go_on or call
            slowest = max(slowest, time.thread_time() - began)

    with new_region(16 << 30) as made:
        fs = made.mount()
        handle, attr = fs.create(ROOT_INO, b"file", 0o644, os.O_RDWR, ROOT)
        timed(lambda: fs.fallocate(handle, 0, 0, 2 << 30))
        timed(lambda: fs.seek(handle, 5, os.SEEK_HOLE))
        timed(lambda: fs.fallocate(handle, PUNCH_HOLE | KEEP_SIZE, 5, 1 << 30))
        timed(fs.work)
        timed(lambda: fs.setattr(attr.ino, ROOT, size=1 << 40))
        timed(lambda: fs.write(handle, (1 << 40) - 1, b"x"))
        fs.unlink(ROOT_INO, b"file", ROOT)
        timed(lambda: fs.release(handle))
        timed(fs.work)
        assert fs._volume.member is not None
        fs._volume.member.must_collect = True
        timed(fs.tick)
        timed(fs.work)
        assert_adds_up(fs)
        fs.unmount()
    figures.add(f"turns on a region of 16 GiB: the slowest computed for {1000 * slowest:.1f} ms")
    assert slowest < 0.2, "ten times what is wanted, for a machine that is busy"
