"""The places of all tables and blocks on a region of a given size.

    0      superblock (its copy at 2048)
    1024   commit word, alone in its cache lines but for the bell words (`bell`), at 1032
    1152   hint word, alone in its cache lines
    1280   scratch words without meaning: a mount tests its mapping with one
    3072   repair slot: slot 0, before the peer table (`repair`)
    4096   peer table: peer_count slots of 1024 bytes
    ...    block tags: one word per block
    ...    blocks, the first aligned to the block size

A filesystem that was made larger has its block tags behind the blocks, at the end of the region
(`grown`).  No block moves when it grows.

The two words have cache lines of their own, because every mount reads or swaps them often.
"""

from typing import Final, NamedTuple

from ivshmemfs.format import peer, words

COMMIT_OFFSET: Final = 1024
HINT_OFFSET: Final = 1152
SCRATCH_OFFSET: Final = 1280
SCRATCH_SIZE: Final = 768
PEERS_OFFSET: Final = 4096
REPAIR_OFFSET: Final = PEERS_OFFSET - peer.SLOT_SIZE
CONTROL_SIGNATURE = f"commit@{COMMIT_OFFSET} hint@{HINT_OFFSET} peers@{PEERS_OFFSET}"

MIN_BLOCK_SIZE = 1024
MAX_BLOCK_SIZE = 65536
MIN_BLOCKS = 48
MAX_PEERS = 255
DEFAULT_PEERS = 16
SMALL_REGION = 16 << 20  # bytes; smaller regions get the smallest blocks, to waste less


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


class Geometry(NamedTuple):
    """The geometry of one region; sizes and offsets in bytes."""

    region_size: int
    block_size: int
    peer_count: int
    block_count: int
    peers_offset: int
    tags_offset: int
    data_offset: int
    reserve: int

    def problem(self) -> str | None:
        """Return what is impossible about these numbers, or None.

        The numbers may come from a hostile region.
        """
        size = self.block_size
        if not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE or size & (size - 1):
            return f"block size {size}"
        if not 1 <= self.peer_count <= MAX_PEERS:
            return f"{self.peer_count} peers"
        if not MIN_BLOCKS <= self.block_count <= words.MAX_BLOCKS:
            return f"{self.block_count} blocks"
        if self.peers_offset != PEERS_OFFSET or self.reserve >= self.block_count:
            return f"peer table at {self.peers_offset}, reserve {self.reserve}"
        peers_end = self.peers_offset + self.peer_count * peer.SLOT_SIZE
        tags_end = self.tags_offset + self.block_count * words.WORD
        blocks_end = self.data_offset + self.block_count * size
        if self.tags_offset % 64 or self.data_offset % size:
            return "misaligned tables"
        in_front = peers_end <= self.tags_offset and tags_end <= self.data_offset
        behind = peers_end <= self.data_offset and blocks_end <= self.tags_offset
        if not in_front and not behind:
            return "overlapping tables"
        if max(blocks_end, tags_end) > self.region_size:
            return f"blocks end at {blocks_end}, tags at {tags_end} of {self.region_size}"
        return None


def default_block_size(region_size: int) -> int:
    """1 KiB for small regions, 4 KiB otherwise, more where block numbers would run out."""
    size = 1024 if region_size < SMALL_REGION else 4096
    while region_size // size >= words.MAX_BLOCKS and size < MAX_BLOCK_SIZE:
        size *= 2
    return size


def reserve_blocks(block_count: int) -> int:
    """Return the number of blocks that only removals may use.

    It is at most 1/32 of all, and enough for the paths that a removal copies.
    """
    return min(64, max(12, block_count // 32))


def plan(
    region_size: int, block_size: int | None = None, peer_count: int = DEFAULT_PEERS
) -> Geometry:
    """Return the geometry for a region of `region_size` bytes; ValueError says what is wrong."""
    size = block_size or default_block_size(region_size)
    tags_offset = _align(PEERS_OFFSET + peer_count * peer.SLOT_SIZE, 64)
    count = min(max(0, region_size - tags_offset) // (size + words.WORD), words.MAX_BLOCKS)
    while count and _align(tags_offset + count * words.WORD, size) + count * size > region_size:
        count -= 1
    geometry = Geometry(
        region_size, size, peer_count, count, PEERS_OFFSET, tags_offset,
        _align(tags_offset + count * words.WORD, size), reserve_blocks(count),
    )  # fmt: skip
    if problem := geometry.problem():
        raise ValueError(f"a region of {region_size} bytes cannot be formatted so: {problem}")
    return geometry


def grown(old: Geometry, region_size: int) -> Geometry:
    """Return the geometry of `old` on a larger region; ValueError says what is wrong.

    Blocks keep their places, and there are more of them.  The new tag table is at the end of the
    region, behind everything that `old` has, so nothing that is in use is stored over.
    """
    if region_size <= old.region_size:
        raise ValueError(f"it has {old.region_size} bytes already, and never becomes smaller")
    room = region_size - old.data_offset
    count = min(room // (old.block_size + words.WORD), words.MAX_BLOCKS)
    while True:
        tags_offset = (region_size - count * words.WORD) & -64
        if old.data_offset + count * old.block_size <= tags_offset:
            break
        count -= 1
    if count <= old.block_count or tags_offset < old.region_size:
        least = 2 * words.WORD * (old.block_count + 64) + old.region_size
        raise ValueError(
            f"{region_size - old.region_size} more bytes are too few for its tag table; "
            f"{least} bytes in all are enough"
        )
    geometry = old._replace(
        region_size=region_size,
        block_count=count,
        tags_offset=tags_offset,
        reserve=reserve_blocks(count),
    )
    if problem := geometry.problem():
        raise ValueError(f"it cannot have {region_size} bytes: {problem}")
    return geometry
