"""What a repair keeps, where it puts what it found, and that it may be interrupted."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from ivshmemfs import fsck
from ivshmemfs.engine import Filesystem
from ivshmemfs.errors import Interrupted, InUse, NoSpace, UnderRepair
from ivshmemfs.format import inode, node, words
from ivshmemfs.format.dirent import name_key
from ivshmemfs.format.geometry import COMMIT_OFFSET, PEERS_OFFSET
from ivshmemfs.format.peer import SLOT_SIZE
from ivshmemfs.fsck.repair.run import _Repair
from ivshmemfs.fsck.repair.trees import TreeBuilder
from ivshmemfs.fsck.repair.writer import RepairedTree, RepairWriter
from ivshmemfs.region import Region, open_region
from ivshmemfs.shm import watch
from tests.support.checks import detailed_tree
from tests.support.damage import BIG, LONG_NAMES, Knife, Names, names_in
from tests.support.figures import Figures
from tests.support.regions import ROOT, TestRegion, get, put


def lost(fs: Filesystem) -> set[bytes]:
    return names_in(fs, fs.lookup(1, b"lost+found").ino)


def repaired(made: TestRegion) -> tuple[Filesystem, list[str]]:
    """A mount of the repaired region, and what the repair said."""
    with open_region(str(made.path)) as region:
        report = fsck.repair(region)
        assert not report.findings, str(report)
    return made.mount(), report.repairs


def whole(made: TestRegion) -> dict[bytes, object]:
    fs = made.mount(readonly=True)
    return dict(detailed_tree(fs))


# --- nothing is lost that need not be -------------------------------------------------------


def zero_tags(k: Knife) -> None:
    k.memory.zero(k.geometry.tags_offset, 8 * k.geometry.block_count)


def lose_the_commit_word(k: Knife) -> None:
    k.memory.store(COMMIT_OFFSET, 0)


def lose_the_root(k: Knife) -> None:
    k.flip(k.root, 70, seal=False)


def lose_a_part_of_the_inode_table(k: Knife) -> None:
    k.flip(k.place_of(Names.big)[0], 70, seal=False)


def lose_the_peer_table(k: Knife) -> None:
    k.memory.write(k.geometry.peers_offset, os.urandom(16 * SLOT_SIZE))


def lose_a_directory_node(k: Knife) -> None:
    k.flip(k.interior_of(Names.crowd), 70, seal=False)


def lose_a_pointer_to_an_inode(k: Knife) -> None:
    block, at = k.place_of(Names.big)
    k.edit(block, at, os.urandom(16))


def lose_all_counters(k: Knife) -> None:
    k.edit_root(used=1, inodes=1, orphans=7, next_ino=0)
    for ino in (Names.folder, Names.small, Names.big):
        k.edit_inode(ino, nlink=0x7FFFFFFF, blocks=3)


@pytest.mark.parametrize(
    "do",
    [
        zero_tags,
        lose_the_commit_word,
        lose_the_root,
        lose_a_part_of_the_inode_table,
        lose_the_peer_table,
        lose_a_directory_node,
        lose_a_pointer_to_an_inode,
        lose_all_counters,
    ],
    ids=lambda do: do.__name__,
)
def test_all_is_there_afterwards(do: Callable[[Knife], None], made: TestRegion) -> None:
    before = whole(made)
    with open_region(str(made.path)) as region:
        do(Knife(region.memory))
        if do is lose_the_peer_table:  # no proof whether these peers live
            assert fsck.repair(region, force=True).clean
    repaired(made)
    assert whole(made) == before


def test_the_other_files_of_a_lost_inode_are_there(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.flip(knife.block_of(Names.big), 60, seal=False)
    fs, told = repaired(made)
    dropped = f"'big' is dropped: 'big' leads to inode {Names.big}, which does not exist"
    assert f"directory {Names.folder}: {dropped}" in told
    assert names_in(fs, Names.folder) == {b"inner", *(b"file%02d" % at for at in range(70))}
    assert get(fs, Names.inner, b"sparse")[-3:] == b"end"


def test_a_lost_data_block_reads_as_zeros(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        index, _ = knife.data_block(Names.big)
        knife.edit(index, 32 + 16, words.POINTER.pack(1 << 30, 1, 1))
    fs, told = repaired(made)
    assert f"inode {Names.big}: 1 pieces of its contents are lost, now zeros" in told
    content = get(fs, Names.folder, b"big")
    assert content == BIG[:1024] + bytes(1024) + BIG[2048:]


# --- /lost+found ----------------------------------------------------------------------------


def test_what_has_no_name_goes_to_lost_and_found(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.set_entries(1, [e for e in knife.entries(1) if e[2] not in (b"near", b"folder")])
    fs, told = repaired(made)
    assert lost(fs) == {b"#%d" % Names.near, b"#%d" % Names.folder}
    assert f"inode {Names.near} goes to /lost+found/#{Names.near}" in told
    home = fs.lookup(1, b"lost+found")
    assert home.mode == 0o040700
    assert get(fs, home.ino, b"#%d" % Names.near) == b"1"
    folder = fs.lookup(home.ino, b"#%d" % Names.folder)
    assert fs.lookup(folder.ino, b"..").ino == home.ino
    assert get(fs, folder.ino, b"big") == BIG
    assert b"inner" in names_in(fs, folder.ino)  # what is below stays where it is


def test_lost_and_found_is_used_again(made: TestRegion) -> None:
    fs = made.mount()
    home = fs.mkdir(1, b"lost+found", 0o755, ROOT)
    put(fs, home.ino, b"#%d" % Names.near, b"in the way")
    fs.unmount()
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.set_entries(1, [e for e in knife.entries(1) if e[2] != b"near"])
    fs, _ = repaired(made)
    assert lost(fs) == {b"#%d" % Names.near, b"#%d_" % Names.near}
    assert get(fs, home.ino, b"#%d_" % Names.near) == b"1"
    assert get(fs, home.ino, b"#%d" % Names.near) == b"in the way"


def test_a_file_called_lost_and_found_stays(made: TestRegion) -> None:
    fs = made.mount()
    put(fs, 1, b"lost+found", b"a file")
    fs.unmount()
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.set_entries(1, [e for e in knife.entries(1) if e[2] != b"near"])
    fs, _ = repaired(made)
    assert get(fs, 1, b"lost+found") == b"a file"
    assert names_in(fs, fs.lookup(1, b"lost+found_").ino) == {b"#%d" % Names.near}


def test_a_cycle_in_the_air_is_cut(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        entries = [e for e in knife.entries(Names.inner) if e[2] == b"sparse"]
        above = (name_key(b"up", knife.uuid), 4 << 56 | Names.folder, b"up")
        knife.set_entries(Names.inner, sorted([*entries, above]))
        knife.set_entries(1, [e for e in knife.entries(1) if e[2] != b"folder"])
    fs, told = repaired(made)
    assert any("'up' is dropped" in line for line in told)
    assert b"#%d" % Names.folder in lost(fs)
    home = fs.lookup(1, b"lost+found").ino
    folder = fs.lookup(home, b"#%d" % Names.folder).ino
    assert fs.lookup(folder, b"inner").ino == Names.inner


def test_a_root_directory_that_is_lost_is_made_anew(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.flip(knife.block_of(1), 60, seal=False)
    fs, told = repaired(made)
    assert "inode 1 is now a new empty directory" in told
    assert names_in(fs, 1) == {b"lost+found"}
    assert {b"#%d" % Names.folder, b"#%d" % Names.crowd, b"#%d" % Names.near} <= lost(fs)
    assert b"#%d" % Names.small not in lost(fs)  # the crowd has names for it
    home = fs.lookup(1, b"lost+found").ino
    crowd = fs.lookup(home, b"#%d" % Names.crowd).ino
    assert names_in(fs, crowd) == set(LONG_NAMES)


# --- orphans --------------------------------------------------------------------------------


def test_an_orphan_that_is_not_listed_is_dropped(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.set_entries(2, [])
        knife.edit_root(orphans=0)
    fs, told = repaired(made)
    assert f"inode {Names.orphan} has no links and is dropped" in told
    assert fs.view().root.record.orphans == 0


def test_a_listed_orphan_is_left_to_the_next_mount(made: TestRegion) -> None:
    fs, told = repaired(made)
    assert told == []
    assert fs.view().root.record.orphans == 1
    fs.tick()
    assert fs.view().root.record.orphans == 0


# --- full regions, interruptions ------------------------------------------------------------


def fill_up(made: TestRegion) -> None:
    """Give every free block to one file, by hand: mounts would keep a reserve."""
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        count, fanout = knife.geometry.block_count, (1024 - node.HEADER_SIZE) // 16
        tag = knife.tag(knife.block_of(Names.big))
        free = [block for block in range(count) if not knife.tag(block)]
        slots = knife.payload(Names.big)  # one index block, not quite full
        while len(free) > 1:
            index, data, free = free[0], free[1 : 1 + fanout], free[1 + fanout :]
            for block in (index, *data):
                knife.set_tag(block, tag)
            body = b"".join(words.POINTER.pack(block, 1, tag) for block in data)
            used = node.HEADER_SIZE + len(body)
            header = node.HeaderRecord(0, node.INDEX, 0, 0, used, Names.big, tag)
            knife.write(index, (node.HEADER.pack(header) + body).ljust(1024, b"\0"))
            slots += words.POINTER.pack(index, 1 + len(data), tag)
        weights = [weight for _, weight, _ in words.POINTER.iter_unpack(slots)]
        size = len(weights) * fanout * 1024
        knife.set_payload(Names.big, slots, size=size, blocks=1 + sum(weights))
        knife.edit_root(used=sum(1 for block in range(count) if knife.tag(block)))


def test_the_largest_file_keeps_its_size(made: TestRegion) -> None:
    """Only a size beyond the limit is impossible: the block map then tells the size."""
    fs = made.mount()
    fs.setattr(Names.sparse, ROOT, size=inode.MAX_FILE_SIZE)
    fs.unmount()
    with open_region(str(made.path)) as region:
        report = fsck.check(region)
        assert report.clean, str(report)
        knife = Knife(region.memory)
        knife.edit_inode(Names.sparse, nlink=5)
        knife.edit_inode(Names.big, size=inode.MAX_FILE_SIZE + 1)
    fs, told = repaired(made)
    assert fs.getattr(Names.sparse).size == inode.MAX_FILE_SIZE
    assert fs.getattr(Names.sparse).nlink == 1
    rounded = -(-len(BIG) // 1024) * 1024
    assert fs.getattr(Names.big).size == rounded
    assert f"inode {Names.big}: its size was impossible; now {rounded}" in told


def test_a_full_region_is_repaired_in_place(made: TestRegion) -> None:
    fill_up(made)
    with open_region(str(made.path)) as region:
        report = fsck.check(region)
        assert report.clean, str(report)
        knife = Knife(region.memory)
        knife.edit_inode(Names.small, nlink=5)
        knife.edit_payload(Names.crowd, 0, b"\x01")
    fs, told = repaired(made)
    assert "the region is so full that replaced blocks were written over" in told
    assert names_in(fs, Names.crowd) == set(LONG_NAMES)


def test_what_does_not_fit_changes_nothing(made: TestRegion) -> None:
    fill_up(made)
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.set_entries(1, [e for e in knife.entries(1) if e[2] != b"near"])
        before, word = made.path.read_bytes(), region.memory.load(COMMIT_OFFSET)
        with pytest.raises(NoSpace, match="nothing was changed"):
            fsck.repair(region)  # /lost+found needs a block more than there are
        after = made.path.read_bytes()
        assert after[:COMMIT_OFFSET] == before[:COMMIT_OFFSET]
        assert after[PEERS_OFFSET:] == before[PEERS_OFFSET:]
        assert words.split_commit(region.memory.load(COMMIT_OFFSET)) == (
            words.split_commit(word)[0] + 2, words.split_commit(word)[1]
        )  # fmt: skip


def test_a_full_region_stays_shut_when_its_repair_is_interrupted(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former root is not given back once its blocks are written over."""
    fill_up(made)
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.edit_inode(Names.small, nlink=5)
        knife.edit_payload(Names.crowd, 0, b"\x01")

    def interrupted(_: RepairWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, open_region(str(made.path)) as region:
        patch.setattr(RepairWriter, "_free_slots", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fsck.repair(region)
    with pytest.raises(UnderRepair):
        made.mount()
    with open_region(str(made.path)) as region:
        assert fsck.repair(region, force=True).clean
    assert names_in(made.mount(), Names.crowd) == set(LONG_NAMES)


def repair_that_dies(region: Region, after: int) -> bool:
    """A process that repairs the region and is gone before store `after`; whether it was done."""
    child = os.fork()
    if child == 0:
        try:
            region.memory.trap(after, lambda: os._exit(7))
            fsck.repair(region)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 7)
    return code == 0


def names_and_leaks(knife: Knife) -> None:
    knife.edit_inode(Names.small, nlink=5)
    knife.set_entries(1, [e for e in knife.entries(1) if e[2] != b"folder"])
    for _ in range(5):
        knife.set_tag(knife.free_block(), knife.tag(knife.root))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "step"),
    [
        (names_and_leaks, 1),
        (lose_the_root, 3),
        (lose_a_directory_node, 7),
        (zero_tags, 31),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_interrupted_repair_is_run_again(
    do: Callable[[Knife], None],
    step: int,
    made: TestRegion,
    monkeypatch: pytest.MonkeyPatch,
    long_run: bool,
    figures: Figures,
) -> None:
    """It may die before any store, and so may the one that goes on."""
    monkeypatch.setattr(watch, "SILENCE", 0.0)  # no test waits for that of the dead
    with open_region(str(made.path)) as region:
        do(Knife(region.memory))
    damaged = made.path.read_bytes()
    expected: dict[bytes, object] | None = None
    points = 0
    for after in range(0, 10_000, 1 if long_run else step):
        made.path.write_bytes(damaged)
        with open_region(str(made.path)) as region:
            finished = repair_that_dies(region, after)
            if after % 2:
                repair_that_dies(region, after % 23)
        with open_region(str(made.path)) as region:
            report = fsck.repair(region)
            assert not report.findings, f"stopped before store {after}:\n{report}"
        if after % 10 == 0 or finished:
            found = whole(made)
            expected = expected or found
            assert found == expected
        points += 1
        if finished:
            break
    assert points > 5
    figures.count("repairs that died", points, do.__name__)


def test_a_repaired_region_needs_no_second_repair(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        Knife(region.memory).edit_inode(Names.small, nlink=5)
        assert fsck.repair(region).repairs
        before = made.path.read_bytes()
        again = fsck.repair(region)
        assert again.repairs == []
        assert made.path.read_bytes() == before


def test_a_zombie_from_before_the_repair_changes_nothing(made: TestRegion) -> None:
    zombie = made.mount()
    space = zombie.mkdir(1, b"before", 0o755, ROOT)
    with open_region(str(made.path)) as region:
        Knife(region.memory).edit_inode(Names.small, nlink=5)
        assert fsck.repair(region, force=True).clean
    put(zombie, space.ino, b"after", b"rejoined")
    zombie.unmount()
    with open_region(str(made.path)) as region:
        report = fsck.check(region)
        assert not report.findings, str(report)


def test_special_contents_survive(made: TestRegion) -> None:
    with open_region(str(made.path)) as region:
        knife = Knife(region.memory)
        knife.edit_root(used=1)
        knife.edit_inode(Names.far, nlink=3)
        knife.edit_inode(Names.link, nlink=3)
        knife.edit_inode(Names.device, nlink=3)
        assert knife.record(Names.link).payload == inode.INLINE
    fs, _ = repaired(made)
    assert fs.getxattr(Names.far, b"user.large") == b"value" * 500
    assert fs.readlink(Names.link) == b"../big"
    assert fs.getattr(Names.device).rdev == 0x103


def test_a_repair_whose_mark_is_overwritten_says_so(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = made.region()
    wound = Knife(region.memory)
    wound.edit_inode(Names.big, nlink=7)

    def overwrite(work: _Repair) -> None:
        region.memory.store(COMMIT_OFFSET, words.make_commit(99, wound.root))

    monkeypatch.setattr(_Repair, "_wait_for_transactions", overwrite)
    with pytest.raises(InUse, match="meanwhile"):
        fsck.repair(region, force=True)
    assert region.memory.load(COMMIT_OFFSET) == words.make_commit(99, wound.root)


@pytest.mark.parametrize("end", [Interrupted, KeyboardInterrupt, MemoryError])
def test_a_repair_that_is_ended_lets_everybody_in_again(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    region = made.region()
    wound = Knife(region.memory)
    wound.edit_inode(Names.big, nlink=7)

    def interrupt(work: _Repair) -> None:
        raise end

    monkeypatch.setattr(_Repair, "_wait_for_transactions", interrupt)
    with pytest.raises(end):
        fsck.repair(region, force=True)
    assert not words.under_repair(region.memory.load(COMMIT_OFFSET))


def test_a_block_that_changes_between_two_reads_is_surveyed_again(
    made: TestRegion, monkeypatch: pytest.MonkeyPatch
) -> None:
    wound = Knife(made.region().memory)
    wound.edit_inode(Names.big, nlink=7)
    build, calls = TreeBuilder.build, []

    def torn(builder: TreeBuilder) -> RepairedTree:
        calls.append(builder)
        if len(calls) < 3:
            inode.INODE.unpack(b"")
        return build(builder)

    monkeypatch.setattr(TreeBuilder, "build", torn)
    repaired(made)
    assert len(calls) >= 3
