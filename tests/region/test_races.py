"""Two processes on one mapping: what must never be lost or torn."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ivshmemfs.region import DEVICE, NORMAL, WRITE_COMBINING, Blocks
from tests.region.conftest import Place
from tests.region.model import unpack

BEGIN = """
import os, struct, sys
from ivshmemfs.region import Blocks, Memory
path, access, who = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
size = os.stat(path).st_size
memory = Memory(os.open(path, os.O_RDWR), size, access=access)
memory.cas(0, 0, 1) if who == 1 else memory.cas(8, 0, 1)
while not (memory.load(0) and memory.load(8)):
    pass
"""

INCREMENT = """
for _ in range(30000):
    seen = memory.load(64)
    while (before := memory.cas(64, seen, seen + 1)) != seen:
        seen = before
"""

CLAIM = """
blocks = Blocks(memory, 4096, 65536, 64, 2000)
mine, cursor = b"", 0
while True:
    got, cursor = blocks.claim(7, who << 56 | 1, cursor)
    mine += got
    if not got:
        break
sys.stdout.buffer.write(mine)
"""

PUBLISH = """
blocks = Blocks(memory, 4096, 65536, 1024, 8)
if who == 1:
    for n in range(1, 20000):
        got, _ = blocks.claim(1, n, n % 8)
        blocks.scatter(got, struct.pack("<Q", n) * 128)
        old = memory.load(64)
        memory.cas(64, old, struct.unpack_from("<I", got)[0] << 32 | n)
        if old:
            blocks.release(struct.pack("<IIQ", old >> 32, 1, old & 0xffffffff))
    memory.store(72, 1)
else:
    good = stale = torn = 0
    into = bytearray(1024)
    while not memory.load(72):
        word = memory.load(64)
        if not word:
            continue
        if blocks.gather(struct.pack("<IIQ", word >> 32, 1, word & 0xffffffff), 0, 1024, into):
            good += 1
            torn += into != struct.pack("<Q", word & 0xffffffff) * 128
        else:
            stale += 1
    print(good > 0, torn)
"""


def run_both(place: Place, body: str, access: int) -> list[bytes]:
    place.path.write_bytes(bytes(256 * 1024))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN + body, str(place.path), str(access), str(who)],
            stdout=subprocess.PIPE,
        )
        for who in (1, 2)
    ]
    answers = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return answers


@pytest.mark.parametrize("access", [NORMAL, DEVICE, WRITE_COMBINING])
def test_no_increment_is_lost(place: Place, access: int) -> None:
    run_both(place, INCREMENT, access)
    assert place.map().load(64) == 60000


@pytest.mark.parametrize("access", [NORMAL, DEVICE, WRITE_COMBINING])
def test_no_block_is_claimed_twice(place: Place, access: int) -> None:
    one, two = (unpack(answer) for answer in run_both(place, CLAIM, access))
    assert len(one) + len(two) == 2000
    assert {block for block, _ in one} | {block for block, _ in two} == set(range(2000))
    blocks = Blocks(place.map(), 4096, 65536, 64, 2000)
    assert all(blocks.tag(block) == tag for block, tag in one + two)


@pytest.mark.parametrize("access", [NORMAL, DEVICE, WRITE_COMBINING])
def test_no_copy_that_passes_its_check_is_torn(place: Place, access: int) -> None:
    answers = run_both(place, PUBLISH, access)
    assert answers[1] == b"True 0\n"
