"""Memory access: a C kernel without Python (native.h) and its one binding (_native.pyx).

The lowest layer: format, region, shm and engine may import it.  It makes no decisions of policy.
Its constants of the format come from layout.h, which scripts/format-tables generates.
"""

import ivshmemfs.native.machine  # noqa: F401  raises UnfitMachine before the extension is loaded
from ivshmemfs.native._native import (
    DEVICE,
    NORMAL,
    WRITE_COMBINING,
    Blocks,
    Memory,
    ascending,
    changed_tuple,
    crc32c,
    filter_index,
    is_name,
    leaf_find,
    leaf_insert,
    leaf_remove,
    lower_bound,
    packed_node,
    packed_tuple,
    picked_tuple,
    placed_tuple,
    put_slots,
    record_node,
    split_pointers,
    sum_bytes,
    swap_slots,
    swapped_node,
    weight_of,
    with_weight,
)

__all__ = [
    "DEVICE",
    "NORMAL",
    "WRITE_COMBINING",
    "Blocks",
    "Memory",
    "ascending",
    "changed_tuple",
    "crc32c",
    "filter_index",
    "is_name",
    "leaf_find",
    "leaf_insert",
    "leaf_remove",
    "lower_bound",
    "packed_node",
    "packed_tuple",
    "picked_tuple",
    "placed_tuple",
    "put_slots",
    "record_node",
    "split_pointers",
    "sum_bytes",
    "swap_slots",
    "swapped_node",
    "weight_of",
    "with_weight",
]
