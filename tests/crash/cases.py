"""Running one case of a campaign, and asking everything that must hold afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ivshmemfs.engine import ROOT_INO
from ivshmemfs.errors import FsError
from ivshmemfs.format import words
from tests.crash.workloads import WORKLOADS, Scene, pattern
from tests.support.checks import Detail, assert_sound, detailed_tree, unreachable
from tests.support.laboratory import Death, Laboratory, Peer, recover
from tests.support.regions import ROOT, get, put

Tree = dict[bytes, Detail]
SURPLUS = 10  # blocks that a transaction may claim and not need


@dataclass(frozen=True)
class State:
    """The filesystem when everything has settled."""

    tree: Tree
    used: int  # blocks


@dataclass(frozen=True)
class Reference:
    """What a sequence of operations does without a death: the state before and after each."""

    states: tuple[State, ...]
    stores: int  # in all
    touched: int  # blocks that it claims or gives back, and what was lost before it began


def set_up(laboratory: Laboratory, world: bytes, *names: str) -> Scene:
    """The world with two peers, prepared for workloads."""
    laboratory.restore(world)
    other = laboratory.mounted()
    mounted = all(WORKLOADS[name].mounted for name in names)
    victim = laboratory.mounted() if mounted else laboratory.newcomer()
    scene = Scene(laboratory, victim, other)
    for name in names:
        WORKLOADS[name].prepare(scene)
    return scene


def act(scene: Scene, names: list[str]) -> None:
    """Run the operations; that one fails with an errno is as good an outcome as any."""
    for name in names:
        with suppress(FsError):
            WORKLOADS[name].act(scene)


def tags(peer: Peer) -> list[int]:
    """The whole tag table."""
    geometry = peer.fs.superblock.geometry
    raw = peer.memory.read(geometry.tags_offset, geometry.block_count * words.WORD)
    return memoryview(raw).cast("Q").tolist()


def differing(one: list[int], other: list[int]) -> int:
    """How many tags are not the same."""
    return sum(a != b for a, b in zip(one, other, strict=True))


def settled_state(peer: Peer) -> State:
    """What a peer sees."""
    tree = peer.run(detailed_tree)
    return State(tree, peer.fs.view().root.record.used)


def make_reference(laboratory: Laboratory, world: bytes, names: list[str]) -> Reference:
    """Run the operations undisturbed, stopping after each."""
    states, stores, touched = [], 0, 0
    for done in range(len(names) + 1):
        scene = set_up(laboratory, world, *names)
        before, lost = tags(scene.other), unreachable(scene.other.fs)
        stored = scene.victim.memory.stores
        act(scene, names[:done])
        stores = scene.victim.memory.stores - stored
        after = tags(scene.other)
        scene.victim.bury()
        close_others(scene)
        recover(scene.other)
        touched = lost + differing(before, after) + differing(after, tags(scene.other))
        states.append(settled_state(scene.other))
    return Reference(tuple(states), stores, touched)


# --- what must hold -------------------------------------------------------------------------


def go_on(peer: Peer) -> None:
    """Another peer works, and no dead one delays it; leaves no trace."""
    folder = peer.quick(lambda fs: fs.mkdir(ROOT_INO, b"going on", 0o755, ROOT)).ino
    content = pattern(5000, 99)
    peer.quick(lambda fs: put(fs, folder, b"file", content))
    assert peer.quick(lambda fs: get(fs, folder, b"file")) == content
    peer.quick(lambda fs: fs.rename(folder, b"file", ROOT_INO, b"going on too", 0, ROOT))
    peer.quick(lambda fs: fs.unlink(ROOT_INO, b"going on too", ROOT))
    peer.quick(lambda fs: fs.rmdir(ROOT_INO, b"going on", ROOT))


def claims(peer: Peer, slot: int, word: int) -> list[int]:
    """Blocks that a slot in state `word` claimed in the transaction under way."""
    state, _, _ = words.split_state(word)
    if state != words.ACTIVE:
        return []
    mask = (1 << words.SLOT_SHIFT) - 1
    held = slot << words.SLOT_SHIFT | word & mask
    return [block for block, tag in enumerate(tags(peer)) if tag == held]


def check_quarantine(peer: Peer) -> None:
    """Collection takes nothing from a peer that is silent but not surely gone."""
    held = {p: claims(peer, p.slot, p.word) for p in peer.fs.table.peers()}
    peer.quick(lambda fs: fs.collect())
    for other, blocks in held.items():
        assert claims(peer, other.slot, other.word) == blocks


def close_others(scene: Scene) -> None:
    """What the other peer held open is still readable, and then closed."""
    handle = scene.handles.pop("other", None)
    if handle is not None:
        size = scene.other.run(lambda fs: fs.getattr(handle.ino)).size
        content = scene.other.run(lambda fs: bytes(fs.read(handle, 0, size)))
        assert content in (pattern(3500, 2)[:size], pattern(70 * 1024 + 100, 3)[:size])
        scene.other.run(lambda fs: fs.release(handle))


def check_aftermath(survivor: Peer, reference: Reference, dead: list[Peer]) -> State:
    """Everything that must hold once peers have died; returns the state that was found."""
    memory = survivor.memory
    tree = survivor.quick(detailed_tree)
    assert tree in [state.tree for state in reference.states]
    assert_sound(memory)
    assert unreachable(survivor.fs) <= reference.touched + SURPLUS * len(dead)
    go_on(survivor)
    check_quarantine(survivor)
    for peer in dead:
        peer.bury()
    recover(survivor)
    found = settled_state(survivor)
    assert found in reference.states
    assert found.tree == tree
    report = assert_sound(memory)
    assert not report.findings, str(report)
    return found


def die(scene: Scene, names: list[str], store: int) -> bool:
    """Let the victim die before a store; False when it got through."""
    scene.victim.die_at(store)
    try:
        act(scene, names)
    except Death:
        return True
    return False


def replayable(test: str, case: str, run: Callable[[], object]) -> None:
    """Run a case; when it fails, say how to run it again."""
    try:
        run()
    except BaseException as error:
        error.add_note(f"replay: .venv/bin/python -m pytest {test} --case {case!r}")
        raise
