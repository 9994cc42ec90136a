"""What fsck and mkfs share when they take a region from its peers.

Each of them first changes the commit word, so that no peer can publish any more.  A peer with a
transaction in flight finds that out, releases its claims and goes back to IDLE.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from ivshmemfs.format import words
from ivshmemfs.format.peer import Occupant

GRACE = 1.0  # seconds that peers get to end their transactions
NAP = 0.01  # seconds between two looks at their slots


def wait_for_transactions(
    peers: Callable[[], Iterable[Occupant]], beat: Callable[[], None] | None = None
) -> None:
    """Wait until no peer is ACTIVE, at most GRACE seconds; call `beat` before each nap."""
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        if not any(peer.state == words.ACTIVE for peer in peers()):
            return
        if beat is not None:
            beat()
        time.sleep(NAP)


def count_and_names(live: Sequence[Occupant]) -> str:
    """Return peers as a message has them: "2 peer(s): ..., ..."."""
    return f"{len(live)} peer(s): {', '.join(peer.describe() for peer in live)}"
