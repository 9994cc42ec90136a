"""`send` and `receive`: records between shells on all machines, through a queue in a file.

A command that waits is a peer all the time, so it beats.  `shm/queue.py` says what a queue is, and
`await_cell` how a command sleeps.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ivshmemfs.cli.attach.complete import complete_path
from ivshmemfs.cli.attach.making import make_fixed
from ivshmemfs.cli.attach.names import region_of
from ivshmemfs.cli.attach.paths import about, attributes, target_of
from ivshmemfs.cli.attach.peer import Pulse, patiently, peer
from ivshmemfs.cli.exits import exits
from ivshmemfs.cli.seconds import Seconds
from ivshmemfs.errors import RegionMissing, UsageError
from ivshmemfs.manual import Command, Example, Manual
from ivshmemfs.region import Condition, open_region, parse_size

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem
    from ivshmemfs.engine.messages import Messages
    from ivshmemfs.format.queue import QueueGeometry

#: Exit code when the time is over, as timeout(1) has it.
TIMED_OUT = 124
#: Seconds between two signs of life, and two looks at the region.
CHECK = 0.5
_DONE = exits({0: "done", TIMED_OUT: "the time is over"})
SEND = Manual(
    examples=(
        Example("ivshmemfs send /mnt/shared/jobs 'build 17'", "Give one reader a record."),
        Example(
            "ivshmemfs send --broadcast label=hello:/news 'it is noon'",
            "Show a record to all readers, without a mount.",
        ),
        Example("ivshmemfs send pci:/jobs", "Send each line of the standard input."),
    ),
    exits=_DONE,
)
RECEIVE = Manual(
    examples=(
        Example("ivshmemfs receive /mnt/shared/jobs", "Wait for a record, and print it."),
        Example("ivshmemfs receive -f pci:/news", "Print all records as they come."),
        Example(
            "ivshmemfs receive -t 0 -n 100 /mnt/shared/jobs",
            "Take what is there, 100 records at most.",
        ),
    ),
    exits=_DONE,
)


@click.command("send", cls=Command, manual=SEND)
@click.argument("file", shell_complete=complete_path)
@click.argument("text", nargs=-1)
@click.option("--whole", is_flag=True, help="The standard input is one record.")
@click.option("--broadcast", is_flag=True, help="A queue that is made shows records to all.")
@click.option("--records", type=click.IntRange(1, 1 << 20), default=256, show_default=True,
              metavar="N", help="A queue that is made holds so many.")  # fmt: skip
@click.option("--record-size", default="4K", show_default=True, metavar="SIZE",
              help="Its records have so many bytes at most.")  # fmt: skip
@click.option("-t", "--timeout", type=Seconds(), metavar="SECONDS",
              help=f"Give up on a full queue then, with exit code {TIMED_OUT}.")  # fmt: skip
def send_command(
    file: str,
    text: tuple[str, ...],
    whole: bool,
    broadcast: bool,
    records: int,
    record_size: str,
    timeout: float | None,
) -> int:
    """Send each TEXT, or each line of the standard input, through the queue FILE.

    FILE is on a mount, or REGION:/path.  It is made if there is none.  Each record goes to one
    reader; of a queue that was made with `--broadcast`, to all.  Waits while the queue is full.
    """
    if whole and text:
        raise UsageError("--whole reads the standard input: leave out TEXT")
    plan = (records, parse_size(record_size), broadcast)
    with _opened(file, plan) as (fs, queue):
        pulse = _Waiting(fs)
        for record in _records(text, whole=whole):
            end = _end_of(timeout)
            while True:
                at = queue.ring.cell_at(queue.ring.tail)
                word = fs.region.memory.load(at)  # before the look: a change after it ends the wait
                if patiently(lambda: queue.put(record)):  # noqa: B023
                    break
                if not pulse.wait(at, word, end):
                    return TIMED_OUT
            pulse.rest()
    return 0


def _records(text: tuple[str, ...], *, whole: bool) -> Iterator[bytes]:
    if text:
        yield from (os.fsencode(one) for one in text)
        return
    try:
        if whole:
            yield sys.stdin.buffer.read()
        else:
            for line in sys.stdin.buffer:
                yield line.rstrip(b"\n")
    except OSError as error:
        raise UsageError(f"standard input: {error.strerror}") from None


@click.command("receive", cls=Command, manual=RECEIVE)
@click.argument("file", shell_complete=complete_path)
@click.option("-n", "--count", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="End after so many records.")  # fmt: skip
@click.option("-f", "--follow", is_flag=True, help="Go on for ever.")
@click.option("--replay", is_flag=True, help="Of a broadcast: begin with what is there.")
@click.option("--broadcast", is_flag=True, help="A queue that is made shows records to all.")
@click.option("-t", "--timeout", type=Seconds(), metavar="SECONDS",
              help=f"Give up after so long, with exit code {TIMED_OUT}.")  # fmt: skip
@click.option("-0", "--null", is_flag=True, help="End each record with NUL, not with a line end.")
def receive_command(
    file: str,
    count: int,
    follow: bool,
    replay: bool,
    broadcast: bool,
    timeout: float | None,
    null: bool,
) -> int:
    """Wait for records in the queue FILE, and print them.

    FILE is on a mount, or REGION:/path.  It is made if there is none.  A record of a work queue
    is taken: no other reader gets it.  One that cannot be printed is put back, behind the others.
    """
    from ivshmemfs.shm.queue import Reader

    end_mark = b"\0" if null else b"\n"
    with _opened(file, (256, 4096, broadcast)) as (fs, queue):
        pulse, reader = _Waiting(fs), Reader(queue.ring, replay=replay)
        done = 0
        while follow or done < count:
            end = _end_of(timeout)
            while True:
                _refuse_lost_output()
                at = queue.ring.cell_at(reader.number)
                word = fs.region.memory.load(at)
                if (record := patiently(lambda: reader.next(queue))) is not None:
                    break
                if not pulse.wait(at, word, end):
                    return TIMED_OUT
            pulse.rest()
            try:
                _print(record + end_mark)
            except BaseException:
                if not queue.ring.is_broadcast:
                    patiently(lambda: queue.put(record))
                raise
            done += 1
    return 0


def _refuse_lost_output() -> None:
    """Raise BrokenPipeError when nothing reads the standard output any more."""
    looked = select.poll()
    looked.register(1, 0)  # POLLERR comes unasked
    if any(events & select.POLLERR for _, events in looked.poll(0)):
        raise BrokenPipeError


def _print(record: bytes) -> None:
    out = sys.stdout.buffer
    out.write(record)
    out.flush()


class _Waiting:
    """Naps of a command, and its signs of life."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        self._pulse = Pulse(fs)
        self._began = 0.0  # when it began to wait for the present record; 0: it does not wait
        self._checked = time.monotonic()

    def rest(self) -> None:
        """Note that the wait is over."""
        self._began = 0.0
        self._pulse.beat()

    def wait(self, at: int, word: int, end: float) -> bool:
        """Wait until the word at `at` is not `word`, or for a while; False after `end`.

        Raises RegionMissing when the region is not the one any more that was opened.
        """
        from ivshmemfs.shm.queue import await_cell

        now = time.monotonic()
        if now >= end:
            return False
        self._began = self._began or now
        if now - self._checked > CHECK:
            self._checked = now
            self._pulse.beat()
            condition = self._fs.condition()
            if condition not in (Condition.SOUND, Condition.RENAMED):
                raise RegionMissing(condition.explained)
        until = min(end, now + CHECK)
        await_cell(self._fs.region.memory, at, word, self._began, until, time.monotonic)
        return True


def _end_of(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


@contextmanager
def _opened(file: str, plan: tuple[int, int, bool]) -> Iterator[tuple[Filesystem, Messages]]:
    """Be a peer, and open the queue FILE for the time of a `with`; make it if there is none."""
    from ivshmemfs.format.queue import encode
    from ivshmemfs.format.superblock import identify

    target = target_of(file)
    with (
        open_region(region_of(target.region), readonly=False, identify=identify) as region,
        peer(region, readonly=False) as fs,
        about(lambda: target.shown),
    ):
        geometry = _plan(*plan)
        make_fixed(fs, target, geometry.size, encode(geometry))
        ino = attributes(fs, target).ino
        handle = patiently(lambda: fs.open(ino, os.O_RDWR))
        try:
            yield fs, patiently(lambda: fs.messages(ino))
        finally:
            fs.release(handle)


def _plan(records: int, size: int, broadcast: bool) -> QueueGeometry:
    from ivshmemfs.format import queue as fmt

    try:
        return fmt.plan(fmt.BROADCAST if broadcast else fmt.WORK, size, records)
    except ValueError as error:
        raise UsageError(str(error)) from None
