"""What one thread is told for two names, when another machine renames between its look-ups."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from ivshmemfs.engine import ROOT_INO, Context
from ivshmemfs.errors import StaleHandle
from ivshmemfs.format.inode import MAX_INO
from ivshmemfs.fuse import walks
from ivshmemfs.fuse.operations import Operations
from ivshmemfs.fuse.walks import Walks
from tests.fuse.fake_engine import FakeFilesystem

ROOT = Context(0, 0)
ONE, TWO = 100, 200  # threads


class Machine:
    """One mount; the other machine changes its engine directly."""

    def __init__(self) -> None:
        self.engine = FakeFilesystem()
        self.operations = Operations(self.engine, None)  # type: ignore[arg-type]

    def look(self, name: bytes, thread: int = ONE) -> int:
        """The number that a thread is told for a name; 0 when there is none."""
        found = self.operations.lookup(ROOT_INO, name, ROOT._replace(pid=thread))
        return 0 if found is None else found[0]

    def opens(self, node: int, thread: int) -> None:
        number = self.operations.open(node, os.O_RDONLY, ROOT._replace(pid=thread))
        self.operations.release(number)

    def other_renames(self, old: bytes, new: bytes) -> None:
        self.engine.rename(ROOT_INO, old, ROOT_INO, new, 0, ROOT)


@pytest.fixture
def machine() -> Machine:
    one = Machine()
    one.engine.mknod(ROOT_INO, b"file", stat.S_IFREG | 0o644, 0, ROOT)
    one.engine.mkdir(ROOT_INO, b"folder", 0o755, ROOT)
    return one


@pytest.mark.parametrize("name", [b"file", b"folder"])
def test_two_names_at_two_moments_are_two_inodes(machine: Machine, name: bytes) -> None:
    old = machine.look(name)
    machine.other_renames(name, b"new")
    new = machine.look(b"new")
    assert new > MAX_INO >= old
    assert machine.look(b"new") == new  # the kernel asks twice when it believed something else
    assert machine.operations.inode_of(new) == old


def test_the_next_walk_leads_to_the_own_number(machine: Machine) -> None:
    own = machine.look(b"file")
    machine.other_renames(b"file", b"new")
    assert machine.look(b"new", TWO) == own  # a thread that never saw the old name
    assert machine.look(b"new") != own
    machine.look(b"folder")
    assert machine.look(b"new") == own


def test_two_renames_in_a_row(machine: Machine) -> None:
    """The name that was told the passing number is the source of the next rename."""
    own = machine.look(b"file")
    machine.other_renames(b"file", b"new")
    passing = machine.look(b"new")
    machine.other_renames(b"new", b"newer")
    assert machine.look(b"newer") == own != passing


def test_hard_links_are_one_inode(machine: Machine) -> None:
    own = machine.look(b"file")
    machine.engine.link(own, ROOT_INO, b"link", ROOT)
    assert machine.look(b"link") == own
    machine.engine.unlink(ROOT_INO, b"link", ROOT)
    assert machine.look(b"file") != own


def test_what_the_own_thread_renamed_stays_what_it_is(machine: Machine) -> None:
    own = machine.look(b"file")
    assert machine.look(b"new") == 0
    machine.operations.rename(ROOT_INO, b"file", ROOT_INO, b"new", 0, ROOT._replace(pid=ONE))
    assert machine.look(b"new") == own
    machine.engine.link(own, ROOT_INO, b"link", ROOT)
    assert machine.look(b"link") == own
    machine.operations.unlink(ROOT_INO, b"link", ROOT._replace(pid=ONE))
    assert machine.look(b"new") == own


@pytest.mark.parametrize("name", [b"file", b"folder"])
def test_what_another_thread_here_renamed_stays_what_it_is(machine: Machine, name: bytes) -> None:
    """A wait for a directory to get another name finds the one that others are in."""
    own = machine.look(name)
    machine.operations.rename(ROOT_INO, name, ROOT_INO, b"new", 0, ROOT._replace(pid=TWO))
    assert machine.look(name) == 0
    assert machine.look(b"new") == own
    machine.other_renames(b"new", b"newer")
    assert machine.look(b"newer") != own, "a change of before explains nothing"


def test_what_another_thread_here_removed(machine: Machine) -> None:
    own = machine.look(b"file")
    machine.engine.link(own, ROOT_INO, b"link", ROOT)
    machine.operations.unlink(ROOT_INO, b"file", ROOT._replace(pid=TWO))
    assert machine.look(b"link") == own


def test_the_other_machine_may_be_faster_than_a_rename_here(machine: Machine) -> None:
    """What this mount changed before the source was looked up does not count."""
    machine.operations.rename(ROOT_INO, b"file", ROOT_INO, b"new", 0, ROOT._replace(pid=TWO))
    own = machine.look(b"new")
    machine.other_renames(b"new", b"newer")
    assert machine.look(b"newer") != own


def test_opening_by_a_passing_number_walks_again(machine: Machine) -> None:
    """So that pages and locks are those of the file's own number."""
    own = machine.look(b"file")
    machine.other_renames(b"file", b"new")
    passing = machine.look(b"new")
    with pytest.raises(StaleHandle) as refused:
        machine.opens(passing, ONE)
    assert refused.value.errno == errno.ESTALE
    assert machine.look(b"new") == own
    machine.opens(own, ONE)
    machine.opens(passing, ONE)  # a path that leads nowhere else: /proc/self/fd


def test_threads_without_a_number(machine: Machine) -> None:
    """Those of other pid namespaces do not hide one another's steps."""
    own = machine.look(b"file", 0)
    assert machine.look(b"folder", 0)
    machine.other_renames(b"file", b"new")
    passing = machine.look(b"new", 0)
    assert passing != own
    with pytest.raises(StaleHandle):
        machine.opens(passing, 0)
    assert machine.look(b"new", 0) == own


def test_what_such_a_thread_renamed_itself(machine: Machine) -> None:
    own = machine.look(b"file", 0)
    machine.operations.rename(ROOT_INO, b"file", ROOT_INO, b"new", 0, ROOT)
    assert machine.look(b"new", 0) == own


def test_a_directory_of_the_old_name_that_is_forgotten(machine: Machine) -> None:
    folder = machine.look(b"folder")
    machine.engine.mknod(folder, b"file", stat.S_IFREG | 0o644, 0, ROOT)
    machine.other_renames(b"folder", b"elsewhere")
    there = machine.look(b"elsewhere")
    found = machine.operations.lookup(there, b"file", ROOT._replace(pid=ONE))
    assert found is not None
    machine.engine.rename(folder, b"file", ROOT_INO, b"out", 0, ROOT)
    machine.operations.forget(there, 5)
    assert machine.look(b"out") != found[0]


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, "MANY", 10)
    table = Walks()
    for thread in range(1, 1000):
        table.note(thread, (1, b"name", thread, thread, 0), None)
        table.change(1, b"%d" % thread)
        recent = range(max(thread - 9, 1), thread + 1)
        assert all(table.was_told(one, one, one) for one in recent)
    assert sum(table.was_told(one, one, one) for one in range(1, 1000)) <= 20
    assert len(table._changed) + len(table._changed_before) <= 20
    assert table.is_changed(1, (1, b"999", 5, 5, 998))
    assert not table.is_changed(1, (1, b"999", 5, 5, 999))
