"""How `wait` and `watch` reach a path and notice commits: they look, and store nothing.

    looking    after a commit, or at the start: the caller looks at what it waits for
    awake      AWAKE seconds after a commit: naps of SHORT_NAP, since commits come in rows
    asleep     naps of LONG_NAP; each ends in one load of the commit word

A nap of 3 ms costs 0.3 % of a CPU, and gives a latency of 1.5 ms at the median.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from ivshmemfs.cli.attach.peering import peer
from ivshmemfs.errors import RegionMissing, UsageError

if TYPE_CHECKING:
    from ivshmemfs.engine import Filesystem

#: Seconds between two loads of the commit word: usually, and soon after a commit.
LONG_NAP, SHORT_NAP = 0.003, 0.0005
#: Seconds for which naps are short after a commit.
AWAKE = 0.02
#: Seconds between two looks at whether the region still is what was opened.
CONDITION_SECONDS = 1.0


class Target(NamedTuple):
    """A path in a region."""

    region: str  # as the user or the mount names it
    path: bytes  # from the region's root, "/" first
    shown: bytes  # the user's own way to say it

    def named(self, inside: bytes) -> bytes:
        """How the user would name what is at `inside`, a path below this one."""
        return self.shown.rstrip(b"/") + b"/" + inside if inside else self.shown


def target_of(argument: str) -> Target:
    """The path that an argument names: on a mount, or REGION:/path.  Raises UsageError."""
    from ivshmemfs.fuse.mountpoint import enclosing, refuse_hung

    start = len("file:/") if argument.startswith("file:/") else 0
    at = argument.find(":/", start)
    if at >= 0 and not os.path.lexists(argument):
        region, path = argument[:at], os.fsencode(argument[at + 1 :])
        if not region:
            raise UsageError(f"{argument}: no region before the colon")
        return Target(region, os.path.normpath(path), os.fsencode(argument))
    entry = enclosing(argument)
    if entry is None:
        raise UsageError(
            f"{argument} is not on an ivshmemfs mount: name a path on one, or REGION:/path"
        )
    refuse_hung(entry)
    absolute = os.path.abspath(argument)
    inside = os.path.normpath("/" + os.path.relpath(absolute, entry.path))
    return Target(entry.source, os.fsencode(inside), os.fsencode(argument))


@contextmanager
def looking(target: Target) -> Iterator[Filesystem]:
    """The filesystem on the region of `target`, for looking only.  Raises RegionError."""
    from ivshmemfs.format.superblock import identify
    from ivshmemfs.region import open_region

    try:
        region = open_region(target.region, readonly=True, identify=identify)
    except RegionMissing:
        raise RegionMissing(f"{target.region}: there is no such region") from None
    with region, peer(region, readonly=True) as fs:
        yield fs


def commits(fs: Filesystem, end: float = float("inf")) -> Iterator[None]:
    """Yield at once, and after each commit, until the monotonic time `end`.

    Raises RegionError when the region is not the one any more that was opened.
    """
    from ivshmemfs.region import Condition

    load, sleep, clock = fs.store.commit_word.load, time.sleep, time.monotonic
    word, awake_until, next_check = -1, 0.0, 0.0
    while True:
        now = clock()
        if now >= next_check:
            condition = fs.condition()
            if condition not in (Condition.SOUND, Condition.RENAMED):
                raise RegionMissing(condition.explained)
            next_check = now + CONDITION_SECONDS
        seen = load()
        if seen != word:
            word, awake_until = seen, now + AWAKE
            yield
        elif now >= end:
            return
        if now < awake_until:
            sleep(SHORT_NAP)
            continue
        for _ in range(max(int((min(end, next_check) - now) / LONG_NAP), 1)):
            sleep(LONG_NAP)  # with as little else as possible: this is what waiting costs
            if load() != word:
                break
