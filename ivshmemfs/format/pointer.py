"""The pointer, 16 bytes; `words` exports it together with the words."""

import struct
from typing import Annotated, Final, NamedTuple

from ivshmemfs.format.record import At, Layout


class PointerRecord(NamedTuple):
    """A block number and the tag that the block must still have; all zero is the null pointer."""

    block: Annotated[int, At(0, "I", "block number")]
    weight: Annotated[int, At(4, "I", "blocks in the subtree, this one included (1 for a leaf)")]
    tag: Annotated[int, At(8, "Q", "tag that the block has while the pointer is valid")]


POINTER_SIZE: Final = 16
POINTER_LAYOUT = Layout(PointerRecord, POINTER_SIZE)
POINTER = struct.Struct("<IIQ")
NULL: Final = bytes(POINTER_SIZE)
WEIGHT_AT: Final = 4
TAG_AT: Final = 8
WEIGHT: Final = slice(WEIGHT_AT, TAG_AT)  # its bytes
TAG: Final = slice(TAG_AT, POINTER_SIZE)
