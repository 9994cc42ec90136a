"""For each invariant: it is found when it is violated, repaired, and then all is clean."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest

from ivshmemfs import fsck
from ivshmemfs.format import inode, lock, node, words, xattr
from ivshmemfs.format.dirent import name_key
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.fsck import INVARIANTS
from tests.support.damage import BIG, LONG_NAMES, Knife, Names, names_in
from tests.support.regions import ROOT, TestRegion, get

DIR, REG = 4 << 56, 8 << 56


class Case(NamedTuple):
    """One damage, and which invariant must tell of it."""

    number: int
    name: str
    do: Callable[[Knife], None]


CASES: list[Case] = []


def violates(number: int) -> Callable[[Callable[[Knife], None]], Callable[[Knife], None]]:
    def register(do: Callable[[Knife], None]) -> Callable[[Knife], None]:
        CASES.append(Case(number, do.__name__, do))
        return do

    return register


def each(number: int, name: str, do: Callable[[Knife], None]) -> None:
    CASES.append(Case(number, name, do))


# --- I1 to I4: superblock and root ----------------------------------------------------------


@violates(1)
def superblock_checksum(k: Knife) -> None:
    k.memory.write(60, b"another label")


@violates(1)
def superblock_overwritten(k: Knife) -> None:
    k.memory.write(0, b"\xff" * 512)


@violates(1)
def superblock_of_another_version(k: Knife) -> None:
    k.edit_superblock(minor=7)


@violates(2)
def copy_overwritten(k: Knife) -> None:
    k.memory.zero(2048, 512)


@violates(2)
def superblock_of_another_filesystem(k: Knife) -> None:
    k.edit_superblock(uuid=b"another one here")


@violates(3)
def size_of_the_region(k: Knife) -> None:
    k.edit_superblock(region_size=k.geometry.region_size + 4096)


@violates(3)
def impossible_geometry(k: Knife) -> None:
    k.edit_superblock(block_size=1000)


for _word in (0, (1 << 64) - 1, words.make_commit(5, 400), words.make_commit(5, 1 << 20)):
    each(4, f"commit_word_{_word:#x}", lambda k, w=_word: k.memory.store(COMMIT_OFFSET, w))  # type: ignore[misc]


@violates(4)
def commit_word_to_an_inode(k: Knife) -> None:
    word = k.memory.load(COMMIT_OFFSET)
    k.memory.store(COMMIT_OFFSET, word & ~words.BLOCK_MASK | k.block_of(1))


@violates(4)
def root_from_the_future(k: Knife) -> None:
    k.edit_root(sequence=k.root_record().sequence + 1000)


@violates(4)
def root_of_another_filesystem(k: Knife) -> None:
    k.edit_root(fsid=1)


@violates(4)
def root_that_is_too_high(k: Knife) -> None:
    k.edit_root(height=13)


# --- I5 to I10: blocks, pointers, trees -----------------------------------------------------


@violates(5)
def root_checksum(k: Knife) -> None:
    k.flip(k.root, 100, seal=False)


@violates(5)
def inode_checksum(k: Knife) -> None:
    k.flip(k.block_of(Names.link), 50, seal=False)


@violates(5)
def index_of_another_inode(k: Knife) -> None:
    k.header(k.pointers(Names.big)[0][0], owner=Names.small)


@violates(5)
def index_of_another_level(k: Knife) -> None:
    k.header(k.pointers(Names.big)[0][0], level=3)


@violates(5)
def inode_of_another_kind(k: Knife) -> None:
    k.header(k.block_of(Names.link), kind=9)


@violates(5)
def inode_of_another_tag(k: Knife) -> None:
    k.header(k.block_of(Names.link), tag=1)


@violates(5)
def more_in_use_than_a_block(k: Knife) -> None:
    k.header(k.block_of(Names.link), used=1 << 20)


@violates(5)
def leaf_of_a_directory(k: Knife) -> None:
    k.flip(k.leaf_of(Names.crowd), 40, seal=False)


@violates(5)
def interior_node_of_a_directory(k: Knife) -> None:
    k.flip(k.interior_of(Names.crowd), 40, seal=False)


@violates(5)
def part_of_the_inode_table(k: Knife) -> None:
    k.flip(k.place_of(Names.link)[0], 40, seal=False)


@violates(6)
def tag_of_data(k: Knife) -> None:
    k.set_tag(k.data_block(Names.big)[1], 0)


@violates(6)
def tag_of_an_inode(k: Knife) -> None:
    block = k.block_of(Names.big)
    k.set_tag(block, k.tag(block) - 1)


@violates(6)
def all_tags(k: Knife) -> None:
    k.memory.zero(k.geometry.tags_offset, k.geometry.block_count * 8)
    k.set_tag(k.root, node.HEADER.unpack(k.read(k.root)).tag)


@violates(7)
def pointer_past_the_end(k: Knife) -> None:
    index, _ = k.data_block(Names.big)
    k.edit(index, 32, words.POINTER.pack(1 << 31, 1, 5))


@violates(7)
def null_pointer_with_a_block(k: Knife) -> None:
    index, _ = k.data_block(Names.big)
    k.edit(index, 32, words.POINTER.pack(77, 1, 0))


@violates(8)
def data_twice_in_one_file(k: Knife) -> None:
    index, _ = k.data_block(Names.big)
    k.edit(index, 48, k.read(index)[32:48])


@violates(8)
def data_in_two_files(k: Knife) -> None:
    index, _ = k.data_block(Names.big)
    k.set_payload(Names.sparse, k.read(index)[32:48], height=0, size=1000)


@violates(8)
def inode_as_its_own_data(k: Knife) -> None:
    block = k.block_of(Names.small)
    pointer = words.POINTER.pack(block, 1, k.tag(block))
    k.set_payload(Names.small, pointer, payload=inode.MAP, size=500)


@violates(9)
def weight_of_an_index_block(k: Knife) -> None:
    block, weight, tag = k.pointers(Names.big)[0]
    k.edit_payload(Names.big, 0, words.POINTER.pack(block, weight + 1, tag))


@violates(9)
def weight_of_data(k: Knife) -> None:
    index, _ = k.data_block(Names.big)
    k.edit(index, 36, b"\x02")


@violates(9)
def weight_of_a_directory_node(k: Knife) -> None:
    start = len(k.payload(Names.crowd)) // 24 * 8
    k.edit_payload(Names.crowd, start + 4, b"\xff")


@violates(10)
def null_pointers_at_the_end(k: Knife) -> None:
    k.set_payload(Names.big, k.payload(Names.big) + bytes(16))


@violates(10)
def index_block_without_pointers(k: Knife) -> None:
    k.resize(k.pointers(Names.big)[0][0], 32)


@violates(10)
def half_a_pointer(k: Knife) -> None:
    index, _ = k.data_block(Names.big)
    k.resize(index, 32 + 40)


# --- I11 and I12: counters, inodes that must be there ---------------------------------------


for _field in ("used", "inodes", "orphans"):
    each(11, f"root_{_field}", lambda k, f=_field: k.edit_root(**{f: 4000}))  # type: ignore[misc]
each(11, "root_next_ino_too_low", lambda k: k.edit_root(next_ino=4))
each(11, "root_next_ino_too_high", lambda k: k.edit_root(next_ino=1 << 60))


@violates(12)
def no_root_directory(k: Knife) -> None:
    block, offset = k.place_of(1)
    k.edit(block, offset, bytes(16))


@violates(12)
def no_list_of_orphans(k: Knife) -> None:
    k.flip(k.block_of(2), 100, seal=False)


@violates(12)
def root_directory_is_a_file(k: Knife) -> None:
    k.set_payload(1, b"", mode=0o100644, payload=inode.EMPTY, parent=0, entries=0, nlink=1)


@violates(12)
def inode_zero(k: Knife) -> None:
    block, offset = k.place_of(0)
    k.header(k.block_of(Names.link), owner=0)
    old, at = k.place_of(Names.link)
    pointer = k.read(old)[at : at + 16]
    k.edit(old, at, bytes(16))
    k.edit(block, offset, pointer)


# --- I13 to I16: inodes ---------------------------------------------------------------------


for _name, _ino, _fields in (
    ("no_type", "link", {"mode": 0o644}),
    ("unknown_bits", "small", {"mode": 0o1100644}),
    ("file_that_is_a_directory", "small", {"mode": 0o040755}),
    ("directory_that_is_a_file", "folder", {"mode": 0o100644}),
    ("unknown_payload", "small", {"payload": 77}),
    ("payload_too_long", "small", {"payload_size": 5000}),
    ("inline_of_another_size", "small", {"size": 1 << 40}),
    ("negative_size", "sparse", {"size": (1 << 64) - 1}),
    ("size_beyond_the_limit", "sparse", {"size": inode.MAX_FILE_SIZE + 1}),
    ("device_number_of_a_file", "small", {"rdev": 5}),
    ("device_number_of_64_bits", "device", {"rdev": 1 << 40}),
    ("parent_of_a_file", "small", {"parent": 1}),
    ("symlink_to_nothing", "link", {"size": 0, "payload_size": 0}),
    ("levels_without_pointers", "small", {"height": 1}),
    ("too_many_levels", "big", {"height": 200}),
    ("tree_without_levels", "crowd", {"height": 0}),
    ("size_of_a_directory", "folder", {"size": 5}),
    ("size_of_a_device", "device", {"size": 5}),
):
    each(13, _name, lambda k, i=_ino, f=_fields: k.edit_inode(getattr(Names, i), **f))  # type: ignore[misc]


@violates(13)
def inode_cut_short(k: Knife) -> None:
    k.resize(k.block_of(Names.link), 100)


@violates(14)
def blocks_beyond_the_end(k: Knife) -> None:
    k.edit_inode(Names.big, size=len(BIG) - 5000)


@violates(14)
def index_blocks_beyond_the_end(k: Knife) -> None:
    k.edit_inode(Names.sparse, size=10)


each(15, "no_blocks", lambda k: k.edit_inode(Names.big, blocks=0))
each(15, "many_blocks", lambda k: k.edit_inode(Names.folder, blocks=1 << 63))


@violates(16)
def attributes_out_of_order(k: Knife) -> None:
    end = inode.PAYLOAD_OFFSET + k.record(Names.near).payload_size
    k.edit(k.block_of(Names.near), end, b"\xff\xff\xff\xff")


@violates(16)
def attributes_elsewhere_cut_short(k: Knife) -> None:
    k.edit_inode(Names.far, xattr_size=600)


@violates(16)
def attributes_without_a_pointer(k: Knife) -> None:
    k.edit_inode(Names.far, xattr_pointer=words.NULL)


@violates(16)
def attributes_of_absurd_size(k: Knife) -> None:
    k.edit_inode(Names.far, xattr_size=0xFFFFFFFF)


@violates(16)
def attributes_of_absurd_height(k: Knife) -> None:
    k.edit_inode(Names.far, xattr_height=99)


# --- I17 to I23: directories ----------------------------------------------------------------


def edit_bound(k: Knife, at: int, key: int) -> None:
    k.edit_payload(Names.crowd, 8 * at, struct.pack("<Q", key))


each(17, "first_bound", lambda k: edit_bound(k, 0, 256))
each(17, "bound_out_of_order", lambda k: edit_bound(k, 1, (1 << 64) - 256))
each(17, "bound_within_a_hash", lambda k: edit_bound(
    k, 1, struct.unpack_from("<Q", k.payload(Names.crowd), 8)[0] + 1))  # fmt: skip


@violates(17)
def bounds_beyond_the_range(k: Knife) -> None:
    k.edit(k.interior_of(Names.crowd), 32 + 8, struct.pack("<Q", (1 << 64) - 512))


@violates(18)
def keys_out_of_order(k: Knife) -> None:
    entries = k.entries(1)
    k.set_entries(1, [entries[1], entries[0], *entries[2:]])


@violates(18)
def keys_beyond_the_range(k: Knife) -> None:
    leaf = k.leaf_of(Names.crowd)
    count = node.HEADER.unpack(k.read(leaf)).count
    k.edit(leaf, 32 + 8 * (count - 1), struct.pack("<Q", (1 << 63) - 1))


@violates(18)
def lengths_that_do_not_add_up(k: Knife) -> None:
    k.edit_payload(1, 16 * k.record(1).entries, b"\xff")


@violates(18)
def leaf_without_names(k: Knife) -> None:
    leaf = k.leaf_of(Names.crowd)
    k.header(leaf, count=0)
    k.resize(leaf, 32)


def renamed(k: Knife, name: bytes) -> None:
    """Another name for the first entry of /folder/inner, with its right key."""
    entries = k.entries(Names.inner)
    changed = [(name_key(name, k.uuid), entries[0][1], name), *entries[1:]]
    k.set_entries(Names.inner, sorted(changed))


for _bad in (b".", b"..", b"a/b", b"/", b"nul\0", b"\0"):
    each(19, f"name_{_bad!r}", lambda k, n=_bad: renamed(k, n))  # type: ignore[misc]


@violates(19)
def key_of_another_name(k: Knife) -> None:
    k.edit_entry(Names.inner, 0, lambda key, both: (key - 512, both))


@violates(20)
def name_twice(k: Knife) -> None:
    entries = k.entries(Names.inner)
    key, _, name = entries[0]
    twice = (key + 1, Names.small | REG, name)
    k.set_entries(Names.inner, sorted([*entries, twice]))


def retarget(k: Knife, name: bytes, both: int, directory: int = 1) -> None:
    entries = k.entries(directory)
    k.set_entries(directory, [(key, both if n == name else b, n) for key, b, n in entries])


each(21, "name_of_nothing", lambda k: retarget(k, b"near", REG | 5000))
each(21, "name_of_inode_0", lambda k: retarget(k, b"near", REG))
each(21, "name_of_the_root", lambda k: retarget(k, b"near", DIR | 1))
each(21, "name_of_the_orphans", lambda k: retarget(k, b"near", DIR | 2))
each(21, "name_of_another_type", lambda k: retarget(k, b"small", DIR | Names.small))
each(21, "name_of_a_huge_inode", lambda k: retarget(k, b"near", REG | (1 << 56) - 1))

each(22, "entries_too_many", lambda k: k.edit_inode(Names.crowd, entries=5000))
each(22, "entries_none", lambda k: k.edit_inode(Names.crowd, entries=0))

each(23, "another_parent", lambda k: k.edit_inode(Names.inner, parent=Names.crowd))
each(23, "directory_with_two_names", lambda k: retarget(k, b"near", DIR | Names.inner))


@violates(23)
def directory_that_contains_its_parent(k: Knife) -> None:
    entries = k.entries(Names.inner)
    above = (name_key(b"above", k.uuid), DIR | Names.folder, b"above")
    k.set_entries(Names.inner, sorted([*entries, above]))


@violates(23)
def cycle_in_the_air(k: Knife) -> None:
    directory_that_contains_its_parent(k)
    k.set_entries(1, [e for e in k.entries(1) if e[2] != b"folder"])


@violates(23)
def directory_that_contains_itself(k: Knife) -> None:
    entries = k.entries(Names.inner)
    itself = (name_key(b"self", k.uuid), DIR | Names.inner, b"self")
    k.set_entries(Names.inner, sorted([*entries, itself]))


# --- I24 to I26: links ----------------------------------------------------------------------


each(24, "too_few_links", lambda k: k.edit_inode(Names.small, nlink=1))
each(24, "too_many_links", lambda k: k.edit_inode(Names.near, nlink=0xFFFFFFFF))
each(24, "links_of_a_directory", lambda k: k.edit_inode(1, nlink=2))


@violates(25)
def inode_without_a_name(k: Knife) -> None:
    k.set_entries(1, [e for e in k.entries(1) if e[2] != b"near"])


@violates(25)
def directory_without_a_name(k: Knife) -> None:
    k.set_entries(1, [e for e in k.entries(1) if e[2] != b"folder"])


@violates(25)
def orphan_that_is_not_listed(k: Knife) -> None:
    k.set_entries(2, [])


@violates(25)
def orphan_that_has_a_name(k: Knife) -> None:
    name = b"%016x" % Names.near
    k.set_entries(2, sorted([*k.entries(2), (name_key(name, k.uuid), REG | Names.near, name)]))


@violates(26)
def orphan_under_another_name(k: Knife) -> None:
    name = b"%016X" % (Names.orphan + 0xABCDEF)
    k.set_entries(2, [(name_key(name, k.uuid), REG | Names.orphan, name)])


# --- I27 to I30: peers, tags, notes ---------------------------------------------------------


each(27, "state_that_does_not_exist", lambda k: k.set_slot(3, 200 << 56))
each(27, "peer_without_identity", lambda k: k.set_slot(3, words.make_state(words.IDLE, 77, 1)))


@violates(28)
def tag_of_no_slot(k: Knife) -> None:
    index, block = k.data_block(Names.big)
    tag = words.make_tag(200, 1, 1)
    k.set_tag(block, tag)
    k.edit(index, 40, struct.pack("<Q", tag))


@violates(28)
def tag_from_the_future(k: Knife) -> None:
    _, incarnation, counter = words.split_state(k.slot(1))
    k.set_slot(1, words.make_state(words.FREE, (incarnation - 9) & words.INCARNATION_MASK, counter))


@violates(28)
def claim_from_the_future(k: Knife) -> None:
    _, incarnation, counter = words.split_state(k.slot(1))
    k.set_tag(k.free_block(), words.make_tag(1, incarnation, counter + 5))


@violates(29)
def leak(k: Knife) -> None:
    for _ in range(7):
        k.set_tag(k.free_block(), k.tag(k.root) - 1)


@violates(30)
def bytes_beyond_the_end(k: Knife) -> None:
    index, _ = k.data_block(Names.big)
    last = len(BIG) // 1024
    block = words.POINTER.unpack_from(k.read(index), 32 + 16 * last)[0]
    k.memory.write(k.at(block, 1000), b"secret")


# --- the test -------------------------------------------------------------------------------


# --- I31: locks -----------------------------------------------------------------------------


@violates(31)
def locks_that_cannot_be(k: Knife) -> None:
    raw = xattr.encode({lock.LOCKS: b"\xff" * 56, b"user.colour": b"red"})
    block, record = k.block_of(Names.near), k.record(Names.near)
    k.edit_inode(Names.near, xattr_size=len(raw), xattr_inline=len(raw))
    k.resize(block, inode.PAYLOAD_OFFSET + record.payload_size, raw)


# --- I32: fixed files -------------------------------------------------------------------------


@violates(32)
def row_with_a_hole(k: Knife) -> None:
    k.edit_payload(Names.fixed, 16, bytes(16))


@violates(32)
def row_out_of_order(k: Knife) -> None:
    raw = k.payload(Names.fixed)
    k.edit_payload(Names.fixed, 0, raw[16:32] + raw[:16])


@violates(32)
def row_that_ends_early(k: Knife) -> None:
    k.edit_inode(Names.fixed, size=k.record(Names.fixed).size + 4096)


@violates(13)
def fixed_without_blocks(k: Knife) -> None:
    k.edit_inode(Names.small, fixed=1)


@violates(13)
def fixed_twice(k: Knife) -> None:
    k.edit_inode(Names.fixed, fixed=2)


def test_what_a_repair_of_locks_keeps(made: TestRegion) -> None:
    region = made.region()
    locks_that_cannot_be(Knife(region.memory))
    fsck.repair(region, force=True)
    assert made.mount(readonly=True).getxattr(Names.near, b"user.colour") == b"red"


def test_every_invariant_has_its_cases() -> None:
    assert {case.number for case in CASES} == set(INVARIANTS)


def test_the_sample_is_clean(made: TestRegion) -> None:
    report = fsck.check(made.region(readonly=True))
    assert not report.findings, str(report)
    fs = made.mount(readonly=True)
    assert get(fs, Names.folder, b"big") == BIG
    assert names_in(fs, Names.crowd) == set(LONG_NAMES)
    knife = Knife(made.region().memory)
    assert knife.record(Names.crowd).height == 2
    assert knife.record(Names.big).height == 1
    assert knife.root_record().height == 1
    assert knife.root_record().orphans == 1
    assert knife.record(Names.far).xattr_pointer != words.NULL


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"I{case.number}-{case.name}")
def test_found_repaired_and_clean(case: Case, made: TestRegion) -> None:
    region = made.region()
    case.do(Knife(region.memory))
    report = fsck.check(region)
    found = [f for f in report.findings if f.invariant == case.number]
    assert found, f"I{case.number} is silent:\n{report}"
    assert all(f.note == INVARIANTS[case.number].note for f in found)

    repaired = fsck.repair(region, force=True)
    assert repaired.repairs, "it did not say what it did"
    assert repaired.before is not None
    assert not repaired.findings, f"left:\n{repaired}\ndone:\n{repaired.repairs}"
    assert not fsck.check(region).findings

    still_of_use(made)


def still_of_use(made: TestRegion) -> None:
    """The filesystem mounts, can be changed and is clean afterwards."""
    fs = made.mount()
    for ino in (1, *(a.ino for n, a, _ in fs.readdir(fs.opendir(1), 0) if n == b"lost+found")):
        for name, attr, _ in fs.readdir(fs.opendir(ino), 0):
            assert fs.getattr(attr.ino).ino == attr.ino, name
    folder = fs.mkdir(1, b"new folder", 0o755, ROOT)
    fs.mknod(folder.ino, b"new file", 0o100644, 0, ROOT)
    fs.unlink(folder.ino, b"new file", ROOT)
    fs.rmdir(1, b"new folder", ROOT)
    fs.tick()
    fs.unmount()
    report = fsck.check(made.region(readonly=True))
    assert not report.findings, str(report)
