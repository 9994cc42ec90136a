"""Clients of damaged regions: every call returns, or raises OSError with errno and filename."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable

import pytest

import ivshmemfs
from ivshmemfs import Client
from ivshmemfs.format import superblock
from tests.support.regions import TestRegion, new_region

SIZE = 512 << 10
FOUND = (
    errno.EUCLEAN, errno.EIO, errno.ESTALE, errno.ENOENT, errno.EINVAL, errno.ENOSPC, errno.ENODATA,
    errno.EUSERS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENOTEMPTY,
    errno.EPROTONOSUPPORT, errno.ETIMEDOUT, errno.EFBIG, errno.EMLINK, errno.EOPNOTSUPP,
)  # fmt: skip


def fill(region: TestRegion) -> None:
    """Put one of everything into a region."""
    with ivshmemfs.open(region.path) as fs:
        fs.makedirs("/d/e")
        fs.write_bytes("/d/small", b"small")
        fs.write_bytes("/d/large", bytes(60_000))
        fs.symlink("small", "/d/link")
        fs.kv("/kv").set_many({f"k{number}": b"v" * number for number in range(40)})
        fs.kv("/kv").set("noted", b"value", b"note")


def calls(fs: Client) -> list[Callable[[], object]]:
    """Calls of every kind."""
    cache = ivshmemfs.KeyValue(fs, "/kv")
    return [
        lambda: list(fs.walk()),
        lambda: fs.listdir("/d"),
        lambda: fs.read_bytes("/d/large"),
        lambda: fs.read_bytes("/d/link"),
        lambda: fs.stat("/d/small"),
        lambda: cache.get_item("noted"),
        lambda: list(cache.scan()),
        lambda: fs.write_bytes("/d/small", bytes(5000)),
        lambda: cache.set_many({"k1": b"1", "new": b"2"}),
        lambda: fs.lock("/d/small").acquire(0),
        lambda: fs.rename("/d/large", "/d/moved"),
        lambda: fs.rmtree("/kv"),
        lambda: fs.copy_in(__file__, "/copy"),
        lambda: fs.statvfs(),
    ]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("before", [True, False], ids=["damaged before", "damaged meanwhile"])
def test_damage_raises_oserror_and_nothing_else(seed: int, before: bool) -> None:
    chance, words = random.Random(seed), (3, 30, 300)[seed % 3]
    with new_region(SIZE, block_size=1024, peer_count=4) as region:
        fill(region)
        with region.region() as mapped:
            layout = superblock.decode(mapped.memory.read(0, 512), SIZE).geometry
            raw = mapped.memory.read(layout.tags_offset, 8 * layout.block_count)
            used = [block for block, (tag,) in enumerate(struct.iter_unpack("<Q", raw)) if tag]

            def damage() -> None:
                for _ in range(words):
                    at = layout.data_offset + chance.choice(used) * layout.block_size
                    value = chance.choice([0, (1 << 64) - 1, chance.getrandbits(64), 1])
                    mapped.memory.write(at + 8 * chance.randrange(16), struct.pack("<Q", value))

            told = []
            if before:
                damage()
            try:
                with ivshmemfs.open(region.path) as fs:
                    if not before:
                        list(fs.walk())
                        damage()
                    todo = calls(fs)
                    chance.shuffle(todo)
                    for call in todo:
                        try:
                            call()
                        except OSError as error:
                            told.append(error.errno)
            except OSError as error:
                told.append(error.errno)
            assert set(told) <= set(FOUND)
            assert not before or words < 300 or errno.EUCLEAN in told  # a cache hides later damage
