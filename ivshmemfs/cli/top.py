"""`top`: what all machines do with a region, again and again."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Final

import click

from ivshmemfs.cli.attach.complete import complete_any_region
from ivshmemfs.cli.attach.names import region_of
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.output import show_json, table
from ivshmemfs.cli.readings import Reading, Readings, commits
from ivshmemfs.cli.seconds import Seconds
from ivshmemfs.errors import Interrupted, UsageError
from ivshmemfs.format import words
from ivshmemfs.format.peer import Occupant
from ivshmemfs.format.superblock import identify
from ivshmemfs.fuse.mountpoint import ours
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import say, shown
from ivshmemfs.region import open_region, readable_size

DELAY: Final = 2.0  # seconds between two frames
MEGABYTE: Final = 1e6
TITLES: Final = (
    "SLOT", "HOST", "PID", "OPS/S", "READ MB/S", "WRITE MB/S", "RETRIES/S", "LOCKS", "OPEN",
    "SILENT", "MOUNTED ON",
)  # fmt: skip
MANUAL = Manual(
    examples=(
        Example("ivshmemfs top", "Watch the region that is mounted here.  Ctrl-C ends it."),
        Example("ivshmemfs top -b -n 1 label=hello", "Print one frame, for a script."),
        Example("ivshmemfs top --json -d 5 pci", "Print JSON every 5 s: one object a peer."),
    ),
    exits=exits({0: "done, also when Ctrl-C ended it"}),
)


@click.command("top", cls=Command, manual=MANUAL)
@click.argument("region", required=False, shell_complete=complete_any_region)
@click.option("-n", "frames", type=click.IntRange(min=1), metavar="N", help="End after N frames.")
@click.option("-d", "delay", type=Seconds(0.1), default=DELAY, metavar="SECONDS",
              show_default=True, help="Seconds between two frames.")  # fmt: skip
@click.option("-b", "--batch", is_flag=True,
              help="One frame below the other, as where the output is no terminal.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True,
              help="Print JSON: one object for each peer of a frame, one a line.")  # fmt: skip
def top_command(
    region: str | None, frames: int | None, delay: float, batch: bool, as_json: bool
) -> None:
    """Show what each peer of REGION does, once in some seconds.

    Without REGION it is the one that is mounted here, or the one device.  A frame has operations,
    MB read and written, and commits lost to other peers (retries), all per second.  Then locks and
    open files now, and for how many seconds the peer has shown no life.

    Readers leave no trace: a read-only mount stores nothing in the region.  Members of a JSON
    object: time, region, commits_per_s, slot, host, pid, version, mount_point, operations_per_s,
    bytes_read_per_s, bytes_written_per_s, retries_per_s, locks, open_files, silent_s.
    """
    spec = region_of(region if region is not None else the_region_here())
    screen = not batch and not as_json and sys.stdout.isatty()
    with open_region(spec, readonly=True, identify=identify) as opened:
        readings = Readings(opened)
        before, began = readings.read(), time.monotonic()
        for peer in before.peers:
            readings.rates(peer)
        try:
            while frames is None or frames > 0:
                readings.wait(delay)
                now, moment = readings.read(), time.monotonic()
                done = commits(before.commit, now.commit) / (moment - began)
                if as_json:
                    _print_json(opened.spec, readings, now, done)
                else:
                    _print(opened.spec, readings, now, done, screen=screen)
                before, began = now, moment
                frames = None if frames is None else frames - 1
        except (KeyboardInterrupt, Interrupted):  # the usual end
            return


def the_region_here() -> str:
    """Return the region that is mounted here, or else the one device.

    Raises UsageError when several regions are mounted.
    """
    mounted = sorted({entry.source for entry in ours()})
    if len(mounted) > 1:
        raise UsageError(f"{len(mounted)} regions are mounted here, name one: {', '.join(mounted)}")
    if mounted:
        return mounted[0]
    from ivshmemfs.cli.mount import the_one_device

    return the_one_device()


def _print(spec: str, readings: Readings, now: Reading, done: float, *, screen: bool) -> None:
    found, geometry = readings.superblock, readings.superblock.geometry
    label = f" ({found.label})" if found.label else ""
    if now.root is None:
        room = "under repair" if words.under_repair(now.commit) else "damaged: run fsck.ivshmemfs"
    else:
        used = readable_size(now.root.used * geometry.block_size)
        room = f"{used} of {readable_size(geometry.region_size)} used"
    peers = sorted(now.peers, key=lambda peer: (-readings.rates(peer).operations, peer.slot))
    rows = [_row(readings, peer) for peer in peers]
    count = f"{len(peers)} of {geometry.peer_count} peers"
    lines = [
        f"{time.strftime('%H:%M:%S')}  {spec}{label}: {room}, {done:.1f} commits/s, {count}",
        *table([TITLES, *rows]),
        "readers leave no trace: a read-only mount stores nothing",
    ]
    if screen:
        click.clear()
        lines = lines[: max(shutil.get_terminal_size().lines - 1, 2)]
    else:
        lines.append("")
    for line in lines:
        say(line)
    sys.stdout.flush()


def _row(readings: Readings, peer: Occupant) -> tuple[str, ...]:
    rates, record = readings.rates(peer), peer.record
    known = peer.identity_valid
    return (
        str(peer.slot),
        shown(record.host.rstrip(b"\0")) if known else "?",
        str(record.pid) if known else "?",
        f"{rates.operations:.1f}",
        f"{rates.bytes_read / MEGABYTE:.2f}",
        f"{rates.bytes_written / MEGABYTE:.2f}",
        f"{rates.retries:.1f}",
        str(record.locks),
        str(record.open_files),
        f"{readings.silence(peer):.0f} s",
        peer.mount_point or "-",
    )


def _print_json(spec: str, readings: Readings, now: Reading, done: float) -> None:
    for peer in now.peers:
        rates, record = readings.rates(peer), peer.record
        known = peer.identity_valid
        show_json(
            {
                "time": time.time(), "region": spec, "commits_per_s": done, "slot": peer.slot,
                "host": record.host.rstrip(b"\0").decode(errors="replace") if known else None,
                "pid": record.pid if known else None, "version": peer.version or None,
                "mount_point": peer.mount_point or None,
                "operations_per_s": rates.operations, "bytes_read_per_s": rates.bytes_read,
                "bytes_written_per_s": rates.bytes_written, "retries_per_s": rates.retries,
                "locks": record.locks, "open_files": record.open_files,
                "silent_s": readings.silence(peer),
            }
        )  # fmt: skip
    sys.stdout.flush()
