"""`metrics`: the state of regions and their peers in the text format of Prometheus."""

from __future__ import annotations

import uuid as _uuid
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import click

from ivshmemfs.cli.attach.complete import complete_any_region
from ivshmemfs.cli.attach.names import region_of
from ivshmemfs.cli.exits import EXIT_PARTLY, exits
from ivshmemfs.cli.readings import Readings
from ivshmemfs.errors import IvshmemfsError
from ivshmemfs.format import superblock, words
from ivshmemfs.format.peer import Occupant
from ivshmemfs.fuse.mountpoint import ours
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.printing import printable, say, shown
from ivshmemfs.region import discover, identified, open_region

MANUAL = Manual(
    examples=(
        Example("ivshmemfs metrics", "Print the metrics of all regions here."),
        Example(
            "ivshmemfs metrics pci > /run/new && mv /run/new /run/pci.prom",
            "Write them for the textfile collector of node_exporter.",
        ),
    ),
    exits=exits({0: "done, also if there is no region", EXIT_PARTLY: "a region cannot be read"}),
)


class Metric(NamedTuple):
    """The name of a metric without its prefix, its type, and what it counts."""

    name: str
    kind: str
    help: str


REGION_METRICS = (
    Metric("up", "gauge", "Whether the region can be read."),
    Metric("info", "gauge", "Label, UUID and format version of the filesystem; always 1."),
    Metric("size_bytes", "gauge", "Size of the region."),
    Metric("used_bytes", "gauge", "Bytes in blocks that the root reaches."),
    Metric("available_bytes", "gauge", "Bytes in free blocks, without the reserve."),
    Metric("inodes", "gauge", "Inodes in use."),
    Metric("commits_total", "counter", "Commit sequence; it starts at a random number."),
    Metric("under_repair", "gauge", "Whether a repair shuts all peers out."),
    Metric("peers", "gauge", "Peer slots in use; readers leave no trace."),
    Metric("peer_slots", "gauge", "Peer slots."),
)
PEER_METRICS = (
    Metric("peer_operations_total", "counter", "Looks and changes of a peer."),
    Metric("peer_read_bytes_total", "counter", "Bytes of files that a peer has read."),
    Metric("peer_written_bytes_total", "counter", "Bytes of files that a peer has written."),
    Metric("peer_retries_total", "counter", "Commits that a peer lost to another one."),
    Metric("peer_locks", "gauge", "Locks that programs of a peer hold."),
    Metric("peer_open_files", "gauge", "Inodes that a peer holds open."),
    Metric("peer_heartbeats_total", "counter", "Signs of life of a peer: about one a second."),
    Metric("peer_joined_seconds", "gauge", "When a peer joined, since 1970 by its own clock."),
)
Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Labels, int]  # name of the metric, labels, value


@click.command("metrics", cls=Command, manual=MANUAL)
@click.argument("regions", nargs=-1, metavar="[REGION]...", shell_complete=complete_any_region)
def metrics_command(regions: tuple[str, ...]) -> int:
    """Print the state of each REGION in the text format of Prometheus.

    Without REGION these are all formatted regions of this machine.  Nothing is stored in a region.
    A region that cannot be read has the metric ivshmemfs_up 0, and a line on standard error.
    """
    specs = [region_of(region) for region in regions] or _regions_here()
    samples: list[Sample] = []
    failed = False
    for spec in dict.fromkeys(specs):
        try:
            samples += _samples(spec)
        except (IvshmemfsError, OSError) as error:
            failed = True
            samples.append(("up", (("region", spec),), 0))
            told = str(error)
            say(f"ivshmemfs: {told if spec in told else f'{spec}: {told}'}", err=True)
    for line in lines(samples):
        say(line)
    return EXIT_PARTLY if failed else 0


def _regions_here() -> list[str]:
    found, unreadable = identified(discover(), superblock.identify)
    for one in unreadable:
        if one.candidate.device:
            say(f"ivshmemfs: {one.candidate.spec}: {one.error}", err=True)
    return [candidate.spec for candidate, _ in found] + [entry.source for entry in ours()]


def lines(samples: Iterable[Sample]) -> Iterator[str]:
    """Yield the lines of the text format: each metric's help and type, then its samples."""
    known = list(samples)
    for metric in (*REGION_METRICS, *PEER_METRICS):
        here = [sample for sample in known if sample[0] == metric.name]
        if not here:
            continue
        yield f"# HELP ivshmemfs_{metric.name} {metric.help}"
        yield f"# TYPE ivshmemfs_{metric.name} {metric.kind}"
        for _, labels, value in here:
            named = ",".join(f'{name}="{escaped(text)}"' for name, text in labels)
            yield f"ivshmemfs_{metric.name}{{{named}}} {value}"


def escaped(text: str) -> str:
    """Return the value of a label as the format has it; control characters become printable."""
    return printable(text).replace("\\", r"\\").replace('"', r"\"")


def _samples(spec: str) -> Iterator[Sample]:
    with open_region(spec, readonly=True, identify=superblock.identify) as region:
        readings = Readings(region)
        now = readings.read()
        found, geometry = readings.superblock, readings.superblock.geometry
        here: Labels = (("region", region.spec),)
        size = geometry.block_size
        yield "up", here, 1
        names = (("label", found.label), ("uuid", str(_uuid.UUID(bytes=found.uuid))))
        version = (("format", f"{superblock.MAJOR}.{superblock.MINOR}"),)
        yield "info", here + names + version, 1
        yield "size_bytes", here, geometry.region_size
        if now.root is not None:
            free = geometry.block_count - geometry.reserve - now.root.used
            yield "used_bytes", here, now.root.used * size
            yield "available_bytes", here, max(free, 0) * size
            yield "inodes", here, now.root.inodes
        yield "commits_total", here, words.split_commit(now.commit)[0]
        yield "under_repair", here, int(words.under_repair(now.commit))
        yield "peers", here, len(now.peers)
        yield "peer_slots", here, geometry.peer_count
        for peer in now.peers:
            yield from _of_peer(here, peer)


def _of_peer(here: Labels, peer: Occupant) -> Iterator[Sample]:
    record, known = peer.record, peer.identity_valid
    labels: Labels = (
        *here,
        ("slot", str(peer.slot)),
        ("host", shown(record.host.rstrip(b"\0")) if known else ""),
        ("pid", str(record.pid) if known else ""),
        ("version", peer.version),
        ("mount_point", peer.mount_point),
    )
    values = (
        record.operations, record.bytes_read, record.bytes_written, record.retries, record.locks,
        record.open_files, record.heartbeat, record.joined_ns // 10**9 if known else 0,
    )  # fmt: skip
    for metric, value in zip(PEER_METRICS, values, strict=True):
        yield metric.name, labels, value
