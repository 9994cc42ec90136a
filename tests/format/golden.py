"""The golden images: regions of format 1.0 that every later version must read as they are.

    python -m tests.format.golden    make them anew; only when the format itself changes

`empty` is what mkfs makes of fixed parameters and must always make.  `tree` was filled by a
mount; it holds one of everything, and `TREE` says what.
"""

from __future__ import annotations

import lzma
import os
import random
import uuid
from pathlib import Path

from ivshmemfs.engine import Context, Filesystem
from ivshmemfs.engine.names import make_fixed
from ivshmemfs.format.geometry import Geometry, plan
from mkfs.initial import Parameters
from mkfs.writer import format_region
from tests.support.regions import new_region

SIZE = 128 << 10
HERE = Path(__file__).parent
PARAMETERS = Parameters(
    uuid=uuid.UUID("6f1e9a3c-52b7-4d08-9c7e-0123456789ab").bytes,
    label="golden",
    uid=1000,
    gid=1001,
    now_ns=1_750_000_000_123_456_789,
    maker="golden",
)
GEOMETRY: Geometry = plan(SIZE, 1024, 4)
SEED = 20250615

INLINE = b"a small file\n"
FIXED = b"in place"
MAPPED = bytes(range(256)) * 12
ATTRIBUTE = b"value" * 300
NAMES = [b"a rather long name to fill some leaves %02d" % at for at in range(60)]
FAR = 2_000_000


def load(name: str) -> bytes:
    """One of the images."""
    return lzma.decompress((HERE / f"golden-{name}.xz").read_bytes())


def fill(fs: Filesystem) -> None:
    """One of everything."""
    me = Context(1000, 1001)
    for name, content in ((b"inline", INLINE), (b"mapped", MAPPED), (b"sparse", b"")):
        handle, attr = fs.create(1, name, 0o640, os.O_WRONLY, me)
        fs.write(handle, 0, content)
        if name == b"sparse":
            fs.write(handle, FAR, b"end")
        fs.release(handle)
    fs.setxattr(attr.ino, b"user.far", ATTRIBUTE, 0, me)
    fs.setxattr(fs.lookup(1, b"inline").ino, b"user.near", b"1", 0, me)
    folder = fs.mkdir(1, b"folder", 0o755, me)
    for name in NAMES:
        fs.mknod(folder.ino, name, 0o100600, 0, me)
    for name in NAMES[1:]:
        fs.unlink(folder.ino, name, me)
        fs.link(fs.lookup(1, b"inline").ino, folder.ino, name, me)
    fs.symlink(folder.ino, b"to inline", b"../inline", me)
    fs.symlink(folder.ino, b"to nowhere", b"n" * 1500, me)
    fs.mknod(1, b"pipe", 0o010644, 0, me)
    fs.mknod(1, b"device", 0o020600, 0x103, me)
    fixed, _ = fs.change(lambda tx: make_fixed(tx, 1, b"fixed", 0o100600, 4096, me))
    handle = fs.open(fixed, os.O_RDWR, me)
    fs.write(handle, 0, FIXED)
    fs.release(handle)


def make(tree: bool) -> bytes:
    """The bytes of an image."""
    with new_region(SIZE) as made:
        made.path.write_bytes(bytes(SIZE))
        region = made.region()
        format_region(region.memory, GEOMETRY, PARAMETERS, fresh=True, chance=random.Random(SEED))
        if tree:
            fs = made.mount()
            fill(fs)
            fs.unmount()
        return region.memory.read(0, SIZE)


def main() -> None:
    """Store both images."""
    for name, tree in (("empty", False), ("tree", True)):
        packed = lzma.compress(make(tree), preset=9 | lzma.PRESET_EXTREME)
        (HERE / f"golden-{name}.xz").write_bytes(packed)


if __name__ == "__main__":
    main()
