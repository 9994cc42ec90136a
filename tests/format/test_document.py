"""docs/format.md says what the code declares."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ivshmemfs.format import geometry, inode, node, open_filter, peer, superblock, words, xattr
from ivshmemfs.format.tables import LAYOUTS

TOP = Path(__file__).resolve().parents[2]
TEXT = (TOP / "docs" / "format.md").read_text()


def test_the_tables_are_up_to_date() -> None:
    command = [sys.executable, str(TOP / "scripts" / "format-tables"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_record_has_its_table() -> None:
    assert set(re.findall(r"<!-- table: (\w+) -->", TEXT)) == {*LAYOUTS, "invariants"}


def test_the_numbers_in_the_text() -> None:
    for number, phrase in (
        (geometry.COMMIT_OFFSET, "| {} | 8 | commit word |"),
        (geometry.HINT_OFFSET, "| {} | 8 | hint word |"),
        (superblock.COPY_OFFSET, "| {} | 512 | copy of the superblock |"),
        (geometry.REPAIR_OFFSET, "| {} | 1024 | repair slot |"),
        (geometry.PEERS_OFFSET, "| {} = `peers_offset` |"),
        (geometry.MIN_BLOCKS, "at least {} and at most"),
        (node.ROOT_POINTERS, "inode table at byte {}"),
        (inode.PAYLOAD_OFFSET, "the payload at byte {}"),
        (inode.FIRST_INO, "Other inodes have numbers from {} to"),
        (peer.FILTER_OFFSET, "follows at byte {}"),
        (peer.SLOT_SIZE, "| `peer_count` × {} | peer table |"),
        (peer.STATISTICS_OFFSET, "Statistics (from byte {})"),
        (open_filter.WORDS, "byte 256: {} filter words"),
        (f"{open_filter.FACTOR:#X}".replace("X", "x"), "`(n * {} >> "),
        (open_filter.SHIFT, "C15 >> {}) mod "),
        (open_filter.SIZE, " mod {}` (bit"),
        (open_filter.BITS, "word `i div {}`"),
        (node.MAX_HEIGHT, "No tree is higher than {}"),
        (f"{xattr.BLOB_MAX:,}", "at most {} long"),
        (f"{xattr.VALUE_MAX:,}", "values up to {}"),
        (superblock.MAJOR, "version {}."),
    ):
        assert phrase.format(number) in TEXT, phrase
    assert inode.MAX_INO == (1 << 56) - 1
    assert words.MAX_BLOCKS == (1 << 28) - 1
