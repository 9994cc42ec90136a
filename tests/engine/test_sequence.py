"""Numbers that wrap: the sequence of commits, and the tags of claims."""

from __future__ import annotations

import pytest

from ivshmemfs.engine import ROOT_INO, Filesystem
from ivshmemfs.engine.transaction import Transaction
from ivshmemfs.errors import Busy
from ivshmemfs.format import words
from ivshmemfs.format.geometry import COMMIT_OFFSET
from tests.support.checks import assert_adds_up, assert_clean
from tests.support.damage import Knife
from tests.support.regions import TestRegion, get, new_region, put


def assert_numbered(fs: Filesystem) -> None:
    """Assert that the root's number is the low part of the commit word that published it."""
    view = fs.view()
    number = words.split_commit(view.word)[0]
    assert view.root.record.sequence & words.SEQUENCE_MASK == number


def test_fences_count_as_commits() -> None:
    with new_region() as region:
        fs = region.mount()
        for _ in range(3):
            fs.store.commit_word.fence()
            put(fs, 1, b"file", b"x")
            assert_numbered(fs)


def at_the_last_number(made: TestRegion) -> None:
    """Set the commit's sequence to the last number before it wraps."""
    memory = made.region().memory
    knife = Knife(memory)
    knife.edit_root(sequence=words.SEQUENCE_MASK)
    memory.store(COMMIT_OFFSET, words.make_commit(words.SEQUENCE_MASK, knife.root))


def test_the_commit_word_is_never_0() -> None:
    """Commit word 0 means that there is no filesystem; a new one has its root in block 0."""
    with new_region() as made:
        at_the_last_number(made)
        fs = made.mount()
        assert words.split_commit(fs.store.commit_word.load()) == (words.SEQUENCE_MASK, 0)
        fs.store.commit_word.fence()
        assert words.split_commit(fs.store.commit_word.load()) == (1, 0)
        put(fs, 1, b"file", b"x")
        assert_numbered(fs)
        assert_clean(made)


def test_commits_go_on_when_their_number_wraps() -> None:
    with new_region() as made:
        at_the_last_number(made)
        fs, other = made.mount(), made.mount()
        for turn in range(5):
            put(fs, 1, b"file", b"%d" % turn)
            assert get(other, 1, b"file") == b"%d" % turn
            assert_numbered(fs)
        assert_clean(made)


def go_back_to(fs: Filesystem, incarnation: int, counter: int) -> None:
    """Give the next claims the tags of an earlier transaction, as after 2^20 mounts of the slot."""
    member = fs._volume.member
    assert member is not None
    member.incarnation, member.counter = incarnation, counter - 1
    member._word = words.make_state(words.IDLE, incarnation, counter - 1)
    fs.store.memory.store(fs.table.offset(member.slot), member._word)


def replace_and_claim(tx: Transaction) -> None:
    """Replace a published block and an own claim; the transaction reuses only the claim."""
    root = tx.root.pointer
    tx.space.replace(root)
    mine = tx.space.claim(1)
    tx.space.replace(mine)
    got = tx.space.claim(5)  # those that the first claim took in advance, and that one
    blocks = [got[at : at + 4] for at in range(0, len(got), words.POINTER_SIZE)]
    assert root[:4] not in blocks
    assert mine[:4] in blocks


def test_a_tag_that_came_back_is_no_claim() -> None:
    """A replaced block whose tag equals that of an own claim is not reused before the commit."""
    with new_region() as made:
        fs = made.mount()
        member = fs._volume.member
        assert member is not None
        for name, value in (("small", b"s" * 100), ("large", b"l" * 9000), ("other", b"o" * 3000)):
            put(fs, 1, name.encode(), value)
        incarnation, counter = member.incarnation, member.counter
        fs.unmount()
        fs = made.mount()
        assert fs.peer_id[0] == 1
        go_back_to(fs, incarnation, counter)
        fs.change(replace_and_claim)
        put(made.mount(), 1, b"between", b"b" * 5000)
        assert_adds_up(fs)
        assert get(made.mount(), 1, b"large") == b"l" * 9000
        assert get(made.mount(), 1, b"small") == b"s" * 100
        go_back_to(fs, incarnation, counter + 2)  # for fsck a later counter is damage
        fs.unmount()
        assert_clean(made)


def test_an_incarnation_begins_to_count_anywhere() -> None:
    """Otherwise an incarnation that comes back after 2^20 mounts would reuse its tags."""
    with new_region() as made:
        starts = set()
        for _ in range(20):
            fs = made.mount()
            starts.add(words.split_state(fs.table.state(1))[2])
            fs.unmount()
        assert len(starts) == 20
        assert max(starts) < words.COUNTER_MASK // 2


def test_a_plan_that_joins_again_releases_none_of_its_claims(fs: Filesystem) -> None:
    """Another peer ended the transaction, so a collection decides about its claims."""
    tags: list[tuple[int, int]] = []

    def plan(tx: Transaction) -> None:
        block, _, tag = words.POINTER.unpack(tx.space.claim(1))
        tags.append((block, tag))
        assert fs.table.retire(fs.peer_id[0], fs.table.state(fs.peer_id[0]))
        fs._openfiles.hold(77)
        tx.touch(ROOT_INO, mode=0o040700)

    with pytest.raises(Busy):
        fs.change(plan)
    fs._openfiles.let_go(77)
    assert len(tags) == 1
    assert all(fs.store.blocks.tag(block) == tag for block, tag in tags)
    while fs.tick():
        pass
    assert all(fs.store.blocks.tag(block) != tag for block, tag in tags)
