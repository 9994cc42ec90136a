"""`peers` and `evict`: who has a region mounted, and letting go of one that will not come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ivshmemfs.cli.naming import mounts_of, region_of
from ivshmemfs.cli.output import table
from ivshmemfs.errors import InUse, UsageError
from ivshmemfs.format import superblock, words
from ivshmemfs.format.peer import printable
from ivshmemfs.fuse.mountpoint import condition
from ivshmemfs.region import open_region
from ivshmemfs.shm.control import Control
from ivshmemfs.shm.peers import Peer, PeerTable

#: Seconds in which a living mount shows life at least once.
PULSE_SECONDS = 2.5


@contextmanager
def _peer_table(spec: str, *, readonly: bool) -> Iterator[PeerTable]:
    with open_region(region_of(spec), readonly=readonly, identify=superblock.identify) as region:
        raw = region.memory.read(0, superblock.SUPERBLOCK.size)
        checked = superblock.decode(raw, region.size)
        yield PeerTable(region.memory, checked.geometry, Control(region.memory))


def _alive(peers: PeerTable, slots: set[int]) -> set[int]:
    """Those of *slots* that show life within some seconds."""
    before = peers.heartbeats()
    alive: set[int] = set()
    end = time.monotonic() + PULSE_SECONDS
    while alive != slots and time.monotonic() < end:
        time.sleep(0.05)
        now = peers.heartbeats()
        alive |= {slot for slot in slots if now.get(slot) != before.get(slot)}
    return alive


@click.command("peers")
@click.argument("region")
def peers_command(region: str) -> None:
    """Show who has REGION mounted, and who shows life."""
    region = region_of(region)
    _tell_trouble(region)
    with _peer_table(region, readonly=True) as peers:
        present = list(peers.peers())
        alive = _alive(peers, {peer.slot for peer in present if not peer.gone})
    if not present:
        click.echo("nobody has it mounted")
        return
    rows = [("SLOT", "HOST", "PID", "SINCE", "DOING", "LIFE")]
    rows += [_row(peer, peer.slot in alive) for peer in present]
    click.echo(table(rows))


def _tell_trouble(region: str) -> None:
    """Say what happened to the mounts of REGION here: they may be apart from what it is now."""
    for entry in mounts_of(region):
        if trouble := condition(entry):
            click.echo(f"ivshmemfs: mount {printable(entry.path)}: {trouble}", err=True)


def _row(peer: Peer, alive: bool) -> tuple[str, str, str, str, str, str]:
    life = "alive" if alive else "gone" if peer.gone else "silent"
    doing = words.STATE_NAMES[peer.state] if peer.state < len(words.STATE_NAMES) else "?"
    if not peer.identity_valid:
        return str(peer.slot), "?", "?", "?", doing, life
    host = peer.record.host.rstrip(b"\0").decode(errors="backslashreplace")
    return str(peer.slot), printable(host), str(peer.record.pid), _since(peer), doing, life


def _since(peer: Peer) -> str:
    try:
        return time.strftime("%m-%d %H:%M:%S", time.localtime(peer.record.joined_ns // 10**9))
    except (OverflowError, ValueError, OSError):
        return "?"


@click.command("evict", short_help="Declare the peer in SLOT gone.")
@click.argument("region")
@click.argument("slot", type=int)
@click.option("--force", is_flag=True, help="Even though it shows life; it will then rejoin.")
def evict_command(region: str, slot: int, force: bool) -> None:
    """Declare the peer in SLOT gone, so that others may use again what it had claimed.

    Say so only of a machine that is surely off: what it was writing may otherwise still arrive
    in blocks that somebody else uses by then.
    """
    with _peer_table(region, readonly=False) as peers:
        peer = next((peer for peer in peers.peers() if peer.slot == slot), None)
        if peer is None:
            raise UsageError(f"nobody is in slot {slot}: see 'ivshmemfs peers {region}'")
        if not force and slot in _alive(peers, {slot}):
            raise InUse(
                f"the peer in slot {slot} is alive: unmount it there (--force evicts it anyway)"
            )
        peers.retire(slot, peer.word)
        if peers.state(slot) == peer.word:
            raise InUse(f"the peer in slot {slot} is moving on: try again")
    click.echo(f"slot {slot} is free")
