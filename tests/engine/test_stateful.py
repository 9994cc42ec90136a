"""Several mounts of one region against a plain dictionary, while peers die, pause and return."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ivshmemfs.engine import ROOT_INO, Filesystem, Handle
from ivshmemfs.errors import FsError, NoSpace
from tests.engine.model import ROOT_ID, Model, Op
from tests.support.checks import assert_sound
from tests.support.laboratory import Death, Fates, Laboratory, Peer, recover
from tests.support.regions import ROOT, TestRegion, get

PEERS = 3
NAMES = [b"a", b"b", b"c", b"d", b"n" * 255, b"\xff\xfe"]
SIZES = [0, 1, 100, 831, 833, 1024, 1025, 4000]
DATA = b"".join(b"%07d " % n for n in range(1000))

names = st.sampled_from(NAMES)
contents = st.builds(
    lambda start, size: DATA[start * 8 :][:size], st.integers(0, 200), st.sampled_from(SIZES)
)
numbers = st.integers(0, 1 << 20)  # picks one of the existing nodes
peers = st.integers(0, PEERS - 1)
events = st.integers(0, 120)

FOLDER_OPS = ["create", "mkdir", "symlink", "link", "unlink", "rmdir", "rename"]
FILE_OPS = ["write", "append", "truncate", "chmod", "setxattr", "removexattr"]
# Removals are rarer, so that the tree grows.
KINDS = [*FOLDER_OPS, *FILE_OPS, "create", "create", "mkdir", "rename", "write", "append"]


class Wish(NamedTuple):
    """An operation before the test chooses the node for it."""

    kind: str
    a: int
    b: int
    data: bytes
    name: bytes
    name2: bytes


wishes = st.builds(Wish, st.sampled_from(KINDS), numbers, numbers, contents, names, names)


def real_tree(fs: Filesystem, ino: int = ROOT_INO) -> dict[bytes, object]:
    """Return what `Model.tree` returns, read from a mount."""
    found: dict[bytes, object] = {}
    for name, attr, _ in fs.readdir(fs.opendir(ino), 0):
        if name in (b".", b".."):
            continue
        mode = stat.S_IMODE(attr.mode)
        xattrs = tuple((n, fs.getxattr(attr.ino, n)) for n in sorted(fs.listxattr(attr.ino)))
        if stat.S_ISDIR(attr.mode):
            found[name] = "dir", mode, xattrs, real_tree(fs, attr.ino)
        elif stat.S_ISLNK(attr.mode):
            found[name] = "link", fs.readlink(attr.ino)
        else:
            found[name] = "file", mode, xattrs, attr.nlink, get(fs, ino, name)
    return found


class Machine(RuleBasedStateMachine):
    """One region, some peers, and the dictionary that each of them must equal."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        fates = Fates()
        fates.install(self._patch)
        self._folder = tempfile.mkdtemp(prefix="ivshmemfs-test-", dir="/dev/shm")
        made = TestRegion(Path(self._folder) / "region", 384 << 10, block_size=1024, peer_count=8)
        self.laboratory = Laboratory(made, fates)
        self.model = Model()
        self.peers: list[Peer] = []
        self.unburied: list[Peer] = []
        self.held: list[tuple[Peer, Handle, int]] = []  # open files and their nodes

    @initialize()
    def mount_all(self) -> None:
        self.peers = [self.laboratory.mounted() for _ in range(PEERS)]

    # --- operations on real mounts ------------------------------------------------------------

    def ino(self, peer: Peer, node: int) -> int:
        def walk(fs: Filesystem) -> int:
            at = ROOT_INO
            for name in self.model.linked()[node]:
                at = fs.lookup(at, name).ino
            return at

        return peer.run(walk)

    def ready(self, peer: Peer, op: Op) -> Callable[[Filesystem], object]:
        """Return the operation on a mount; it looks everything up first, as the kernel does."""
        ino = self.ino(peer, op.node)
        ino2 = self.ino(peer, op.node2) if op.node2 >= 0 else 0
        if op.kind in ("write", "append"):
            flags = os.O_WRONLY | (os.O_APPEND if op.kind == "append" else 0)
            handle = peer.run(lambda fs: fs.open(ino, flags, ROOT))
            self.held.append((peer, handle, -1))
            return lambda fs: fs.write(handle, op.number, op.data)
        calls: dict[str, Callable[[Filesystem], object]] = {
            "create": lambda fs: fs.create(ino, op.name, 0o644, os.O_RDWR | os.O_EXCL, ROOT),
            "mkdir": lambda fs: fs.mkdir(ino, op.name, 0o755, ROOT),
            "symlink": lambda fs: fs.symlink(ino, op.name, op.data, ROOT),
            "link": lambda fs: fs.link(ino2, ino, op.name, ROOT),
            "unlink": lambda fs: fs.unlink(ino, op.name, ROOT),
            "rmdir": lambda fs: fs.rmdir(ino, op.name, ROOT),
            "rename": lambda fs: fs.rename(ino, op.name, ino2, op.name2, op.number, ROOT),
            "truncate": lambda fs: fs.setattr(ino, ROOT, size=op.number),
            "chmod": lambda fs: fs.setattr(ino, ROOT, mode=op.number),
            "setxattr": lambda fs: fs.setxattr(ino, op.name, op.data, 0, ROOT),
            "removexattr": lambda fs: fs.removexattr(ino, op.name, ROOT),
        }
        return calls[op.kind]

    def perform(self, peer: Peer, call: Callable[[Filesystem], object]) -> bool | None:
        """Return whether it succeeded; None for NoSpace, after which nothing may have changed."""
        try:
            result = peer.run(call)
        except NoSpace:
            assert peer.fs.statfs().blocks_avail < 40
            return None
        except FsError:
            return False
        if isinstance(result, tuple) and isinstance(result[0], Handle):
            self.held.append((peer, result[0], -1))
        return True

    def close_temporary(self) -> None:
        """Close the files that operations opened."""
        for peer, handle, node in self.held:
            if node < 0 and peer in self.peers:
                peer.run(lambda fs: fs.release(handle))  # noqa: B023
        self.held = [h for h in self.held if h[2] >= 0]

    def picked(self, wish: Wish) -> Op | None:
        """Return the operation on existing nodes, or None when the model has none for it."""
        linked = sorted(self.model.linked())
        wanted = "dir" if wish.kind in FOLDER_OPS else "file"
        nodes = [n for n in linked if self.model.nodes[n].kind == wanted]
        if not nodes or (wish.kind in ("write", "append") and not wish.data):
            return None
        node = nodes[wish.a % len(nodes)]
        if wanted == "dir":
            return self._in_folder(wish, node, nodes, linked)
        number = 0o600 | wish.b % 0o100 if wish.kind == "chmod" else wish.b % 6 * 700
        name = b"user." + wish.name[:9] if "xattr" in wish.kind else b""
        return Op(wish.kind, node, name, number=number, data=wish.data)

    def _in_folder(self, wish: Wish, node: int, folders: list[int], linked: list[int]) -> Op:
        name, taken = wish.name, sorted(self.model.nodes[node].entries)
        if wish.kind in ("unlink", "rmdir", "rename") and taken:
            name = taken[wish.b % len(taken)]
        if wish.kind == "rename":
            second, flags = folders[wish.b % len(folders)], (0, 0, 1, 2)[wish.a % 4]
            return Op("rename", node, name, second, wish.name2, flags)
        second = linked[wish.b % len(linked)] if wish.kind == "link" else -1
        return Op(wish.kind, node, name, second, data=wish.data or b"to")

    def compare(self, at: int = 0) -> None:
        peer = self.peers[at % len(self.peers)]
        assert peer.run(real_tree) == self.model.tree()

    # --- rules --------------------------------------------------------------------------------

    @rule(at=peers, wish=wishes)
    def operate(self, at: int, wish: Wish) -> None:
        op = self.picked(wish)
        if op is None:
            return
        peer = self.peers[at]
        done = self.perform(peer, self.ready(peer, op))
        if done is None:
            self.settle_by_looking([self.model])
        else:
            assert self.model.apply(op) == done, op
        self.close_temporary()
        self.compare(wish.a)

    def settle_by_looking(self, candidates: list[Model]) -> None:
        """Replace the model by the one of `candidates` that the region shows."""
        shown = self.peers[0].run(real_tree)
        fitting = [model for model in candidates if model.tree() == shown]
        assert fitting, f"the tree is none of {len(candidates)} that it could be"
        self.model = fitting[0]

    @rule(at=peers, wish=wishes, event=events, known=st.booleans())
    def die(self, at: int, wish: Wish, event: int, known: bool) -> None:
        """A peer dies in the middle of an operation; another process continues as that peer."""
        op = self.picked(wish)
        if op is None or len(self.unburied) >= 3:
            return
        victim = self.peers[at]
        call = self.ready(victim, op)
        after = self.model.copy()
        possible = after.apply(op)
        victim.die_at(event)
        try:
            done = self.perform(victim, call)
        except Death:
            self._replace(at, known)
            self.settle_by_looking([self.model, after])
        else:
            victim.memory.trap(0, None)
            if done is None:
                self.settle_by_looking([self.model])
            else:
                assert possible == done
                self.model = after
        self.close_temporary()
        self.compare(wish.a)

    def _replace(self, at: int, known: bool) -> None:
        victim = self.peers[at]
        self.held = [h for h in self.held if h[0] is not victim]
        if known:
            victim.bury()
        else:
            self.unburied.append(victim)
        self.peers[at] = self.laboratory.mounted()

    @rule(
        at=peers,
        wish=wishes,
        wish2=wishes,
        event=st.integers(0, 250),
        loads=st.booleans(),
        upkeep=st.booleans(),
    )
    def pause(
        self, at: int, wish: Wish, wish2: Wish, event: int, loads: bool, upkeep: bool
    ) -> None:
        """A peer pauses in an operation while another one works; some order gives the result."""
        sleeper, worker = self.peers[at], self.peers[(at + 1) % PEERS]
        first, second = self.picked(wish), self.picked(wish2)
        if first is None or second is None:
            return
        call, call2 = self.ready(sleeper, first), self.ready(worker, second)
        outcomes: list[bool | None] = []

        def meanwhile() -> None:
            outcomes.append(self.perform(worker, call2))
            if upkeep:
                worker.tick(6)
                worker.run(lambda fs: fs.collect())

        sleeper.pause_at(event, meanwhile, loads)
        done = self.perform(sleeper, call)
        sleeper.memory.trap(0, None)
        if not outcomes:
            meanwhile()
        self._serialise(first, done, second, outcomes[0])
        self.close_temporary()
        self.compare(wish.b)

    def _serialise(self, first: Op, done: bool | None, second: Op, done2: bool | None) -> None:
        candidates = []
        for order in (((first, done), (second, done2)), ((second, done2), (first, done))):
            model, fits = self.model.copy(), True
            for op, result in order:
                if result is None:
                    continue
                gone = op.kind in FILE_OPS and op.node not in model.linked()
                fits &= model.apply(op) == result or gone
            if fits:
                candidates.append(model)
        self.settle_by_looking(candidates)

    @rule(at=peers, seconds=st.integers(1, 6))
    def tick(self, at: int, seconds: int) -> None:
        self.peers[at].tick(seconds)

    @rule(at=peers)
    def collect(self, at: int) -> None:
        self.peers[at].run(lambda fs: fs.collect())

    @rule(at=peers)
    def remount(self, at: int) -> None:
        leaving = self.peers[at]
        self.held = [h for h in self.held if h[0] is not leaving]
        leaving.run(lambda fs: fs.unmount())
        self.peers[at] = self.laboratory.mounted()
        self.compare(at)

    @precondition(lambda self: self.unburied)
    @rule()
    def news_of_a_death(self) -> None:
        self.unburied.pop().bury()

    # --- files that stay open -----------------------------------------------------------------

    @rule(at=peers, a=numbers)
    def open_file(self, at: int, a: int) -> None:
        linked = self.model.linked()
        files = [n for n in sorted(linked) if self.model.nodes[n].kind == "file"]
        if not files or len(self.held) > 6:
            return
        node, peer = files[a % len(files)], self.peers[at]
        ino = self.ino(peer, node)
        self.held.append((peer, peer.run(lambda fs: fs.open(ino, os.O_RDWR, ROOT)), node))

    @precondition(lambda self: self.held)
    @rule(a=numbers)
    def read_open_file(self, a: int) -> None:
        peer, handle, node = self.held[a % len(self.held)]
        assert (
            peer.run(lambda fs: bytes(fs.read(handle, 0, 1 << 16))) == self.model.nodes[node].data
        )

    @precondition(lambda self: self.held)
    @rule(a=numbers, data=contents)
    def write_open_file(self, a: int, data: bytes) -> None:
        peer, handle, node = self.held[a % len(self.held)]
        if not data:
            return
        if self.perform(peer, lambda fs: fs.write(handle, 500, data)):
            self.model.apply(Op("write", node, number=500, data=data))
        self.read_open_file(a)

    @precondition(lambda self: self.held)
    @rule(a=numbers)
    def close_file(self, a: int) -> None:
        peer, handle, _ = self.held.pop(a % len(self.held))
        peer.run(lambda fs: fs.release(handle))

    # --- in the end ---------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if self.peers:
                self._check_everything()
        finally:
            self.laboratory.close()
            self.laboratory.made.close()
            shutil.rmtree(self._folder)
            self._patch.undo()

    def _check_everything(self) -> None:
        for at in range(PEERS):
            self.compare(at)
        for peer, handle, _ in self.held:
            peer.run(lambda fs: fs.release(handle))  # noqa: B023
        for peer in self.unburied:
            peer.bury()
        for peer in self.peers[1:]:
            peer.run(lambda fs: fs.unmount())
        recover(self.peers[0])
        report = assert_sound(self.laboratory.memory)
        assert not report.findings, str(report)
        self.compare()
        assert set(self.model.linked()) >= {ROOT_ID}


def run(examples: int, steps: int, derandomize: bool) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    limits: Any = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=checks,
        print_blob=True,
        database=None,
        derandomize=derandomize,
    )
    run_state_machine_as_test(Machine, settings=limits)


@pytest.mark.slow
def test_mounts_match_a_dictionary(long_run: bool) -> None:
    if long_run:
        run(2000, 80, derandomize=False)
    else:
        run(60, 40, derandomize=True)
