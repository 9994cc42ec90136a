"""The repair slot: slot 0 of the peer table, before all others.

A repair takes it as a mount takes a slot.  Its state word, heartbeat and identity are those of a
peer slot, and the blocks that a repair writes have tags of slot 0.  `shm/repair.py` gives the order
of all stores.
"""

from typing import Annotated, Final, NamedTuple

from ivshmemfs.format import peer
from ivshmemfs.format.record import At, Layout

SLOT: Final = 0
#: Bit of `capabilities` in the repair slot: no repair, an amendment of the superblock.
AMENDS: Final = 1
FORMER_OFFSET: Final = 256


class RepairRecord(NamedTuple):
    """The repair slot."""

    state: Annotated[int, At(0, "Q", "state word, as in a peer slot; free unless a repair runs")]
    heartbeat: Annotated[int, At(8, "Q", "grows while the repair runs")]
    identity: Annotated[
        bytes, At(64, "192s", "the repairing process, as bytes 64 to 255 of a slot")
    ]
    former: Annotated[int, At(FORMER_OFFSET, "Q", "commit word that the repair started from")]


REPAIR = Layout(RepairRecord, peer.SLOT_SIZE)
