"""`peers` lists the mounts of a region; `evict` declares one gone that will not come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ivshmemfs.cli.attach.complete import complete_any_region
from ivshmemfs.cli.attach.names import mounts_of, region_of
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.output import JSON_HELP, show, show_json
from ivshmemfs.errors import InUse, UsageError
from ivshmemfs.format import superblock, words
from ivshmemfs.format.peer import Occupant
from ivshmemfs.format.words import under_repair
from ivshmemfs.fuse.lifeline import condition
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say, shown
from ivshmemfs.region import open_region
from ivshmemfs.shm.commit import CommitWord
from ivshmemfs.shm.peers import PeerTable
from ivshmemfs.shm.repair import describe
from ivshmemfs.shm.watch import POLL, SILENCE, Watch

PEERS = Manual(
    examples=(
        Example("ivshmemfs peers /dev/shm/hello", "Show the mounts on all machines."),
        Example("ivshmemfs peers /mnt/shared", "The same for the region that is mounted there."),
    ),
    exits=exits(),
)
EVICT = Manual(
    examples=(Example("ivshmemfs evict /dev/shm/hello 3", "Declare the peer in slot 3 gone."),),
    exits=exits({1: "wrong usage, or the peer is alive"}),
)


@contextmanager
def _peer_table(spec: str, *, readonly: bool) -> Iterator[PeerTable]:
    with open_region(region_of(spec), readonly=readonly, identify=superblock.identify) as region:
        raw = region.memory.read(0, superblock.SUPERBLOCK.size)
        checked = superblock.decode(raw, region.size)
        yield PeerTable(region.memory, checked.geometry, CommitWord(region.memory))


def watched_alive(watch: Watch, slots: set[int]) -> set[int]:
    """Return those of *slots* that show life within SILENCE seconds."""
    watch.look()
    end = time.monotonic() + SILENCE + 2 * POLL
    while True:
        alive = {slot for slot in slots if watch.beats(slot)}
        if alive == slots or time.monotonic() > end:
            return alive
        time.sleep(POLL)
        watch.look()


@click.command("peers", cls=Command, manual=PEERS)
@click.argument("region", shell_complete=complete_any_region)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def peers_command(region: str, as_json: bool) -> None:
    """List the mounts of REGION on all machines, and which of them show signs of life."""
    region = region_of(region)
    _tell_trouble(region)
    with _peer_table(region, readonly=True) as peers:
        present, watch = list(peers.peers()), peers.watch
        alive = watched_alive(watch, {peer.slot for peer in present})
        rows = [(peer, _life(watch, peer, alive)) for peer in present]
        repaired = under_repair(peers.commit_word.load())
        told = describe(peers.memory) if repaired else ""
    if told:
        say(told, err=as_json)
    if as_json:
        for peer, life in rows:
            show_json(_described(peer, life))
    elif not present:
        say("no machine has it mounted for writing")
    else:
        titles = (
            "SLOT", "HOST", "PID", "SINCE", "DOING", "LIFE", "MEMORY", "VERSION", "MOUNTED ON"
        )  # fmt: skip
        show([titles, *(_row(peer, life) for peer, life in rows)])
    if not as_json:
        _tell_readers(region)
    for machine in watch.machines.shared:
        name = watch.machines.name(machine)
        say(f"two machines go by the hardware UUID {name}: it proves no death", err=True)


def _life(watch: Watch, peer: Occupant, alive: set[int]) -> str:
    if peer.slot in alive:
        return "alive"
    return "gone" if watch.absent(peer) else "silent"


def _tell_trouble(region: str) -> None:
    """Say what happened to the mounts of REGION here: they may be apart from what it is now."""
    for entry in mounts_of(region):
        if trouble := condition(entry):
            say(f"ivshmemfs: mount {entry.path}: {trouble}", err=True)


def _tell_readers(region: str) -> None:
    """Say that readers are missing above, and which there are on this machine."""
    here = [entry.path for entry in mounts_of(region) if "ro" in entry.options.split(",")]
    known = f"; on this machine: {', '.join(here)}" if here else ""
    say(f"readers leave no trace: a read-only mount stores nothing{known}")


def _doing(peer: Occupant) -> str:
    return words.STATE_NAMES[peer.state] if peer.state < len(words.STATE_NAMES) else "?"


def _described(peer: Occupant, life: str) -> dict[str, object]:
    """The members of a peer's JSON object; without a sound identity some are null."""
    record = peer.record if peer.identity_valid else None
    return {
        "slot": peer.slot,
        "host": None if record is None else record.host.rstrip(b"\0").decode(errors="replace"),
        "pid": None if record is None else record.pid,
        "joined_ns": None if record is None else record.joined_ns,
        "state": _doing(peer),
        "life": life,
        "memory": peer.coherence,
        "version": peer.version or None,
        "mount_point": peer.mount_point or None,
    }


def _row(peer: Occupant, life: str) -> tuple[str, ...]:
    doing = _doing(peer)
    if not peer.identity_valid:
        return str(peer.slot), "?", "?", "?", doing, life, peer.coherence, "?", "?"
    host = shown(peer.record.host.rstrip(b"\0"))
    who = str(peer.slot), host, str(peer.record.pid), _since(peer)
    return *who, doing, life, peer.coherence, peer.version or "?", peer.mount_point or "-"


def _since(peer: Occupant) -> str:
    try:
        return time.strftime("%m-%d %H:%M:%S", time.localtime(peer.record.joined_ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return "?"


@click.command("evict", cls=Command, manual=EVICT)
@click.argument("region", shell_complete=complete_any_region)
@click.argument("slot", type=int)
@click.option("--force", is_flag=True, help="Even though it shows life; it will then rejoin.")
def evict_command(region: str, slot: int, force: bool) -> None:
    """Declare the peer in SLOT gone, so that others may use again what it had claimed.

    Evict only a machine that is surely off.  Otherwise its writes may still arrive, in blocks that
    another peer uses by then.
    """
    with _peer_table(region, readonly=False) as peers:
        peer = next((peer for peer in peers.peers() if peer.slot == slot), None)
        if peer is None:
            raise UsageError(f"there is no peer in slot {slot}: see 'ivshmemfs peers {region}'")
        if not force and slot in watched_alive(peers.watch, {slot}):
            raise InUse(
                f"the peer in slot {slot} is alive: unmount it there (--force evicts it anyway)"
            )
        peers.retire(slot, peer.word)
        if peers.state(slot) == peer.word:
            raise InUse(f"the peer in slot {slot} is moving on: try again")
    say(f"slot {slot} is free")
