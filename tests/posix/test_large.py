"""Many names, many inodes, deep trees, large files and regions; the full sizes with --long."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.support.figures import Figures
from tests.support.lab import needs_fuse, needs_root, new_lab

pytestmark = [needs_fuse, needs_root, pytest.mark.slow]

MIB, GIB = 1 << 20, 1 << 30


def test_many_names_in_one_directory(long_run: bool, figures: Figures) -> None:
    count = 100_000 if long_run else 1500
    with new_lab(512 * MIB if long_run else 32 * MIB, 2) as lab:
        one, two = (path / "dir" for path in lab.paths)
        one.mkdir()
        started = time.monotonic()
        for number in range(count):
            os.mknod((two if number % 2 else one) / f"name-{number}")
        made = time.monotonic()
        found = os.listdir(two)
        listed = time.monotonic()
        assert len(found) == count
        assert set(found) == {f"name-{number}" for number in range(count)}
        for number in random.Random(1).sample(range(count), 1000):
            assert (one / f"name-{number}").exists()
            assert not (two / f"none-{number}").exists()
        asked = time.monotonic()
        for number in range(count):
            os.unlink((one if number % 2 else two) / f"name-{number}")
        ended = time.monotonic()
        assert os.listdir(one) == []
        assert one.stat().st_blocks <= 8
    figures.add(
        f"{count} names in one directory, two mounts in turn: "
        f"{count / (made - started):.0f}/s made, "
        f"{count / (listed - made):.0f}/s listed, {2000 / (asked - listed):.0f}/s looked up, "
        f"{count / (ended - asked):.0f}/s removed"
    )


def test_many_inodes(long_run: bool, figures: Figures) -> None:
    folders, files = (1000, 1000) if long_run else (20, 100)
    with new_lab(6 * GIB if long_run else 64 * MIB, 2) as lab:
        one, two = lab.paths
        empty = os.statvfs(one)
        started = time.monotonic()
        for folder in range(folders):
            path = one / f"d{folder}"
            path.mkdir()
            below = os.open(path, os.O_RDONLY)
            for number in range(files):
                os.mknod(f"f{number}", dir_fd=below)
            os.close(below)
        seconds = time.monotonic() - started
        used = os.statvfs(two)
        assert used.f_files - used.f_ffree - (empty.f_files - empty.f_ffree) == folders * (
            files + 1
        )
        chance = random.Random(2)
        for _ in range(500):
            path = two / f"d{chance.randrange(folders)}" / f"f{chance.randrange(files)}"
            assert path.stat().st_nlink == 1
        assert len(os.listdir(two / f"d{folders - 1}")) == files
        for folder in range(0, folders, max(folders // 20, 1)):
            shutil.rmtree(two / f"d{folder}")
    figures.add(f"{folders * (files + 1)} inodes: {folders * (files + 1) / seconds:.0f}/s made")


def test_a_large_region(long_run: bool, figures: Figures) -> None:
    """Sparse memory stays sparse: formatting and mounting touch what they need."""
    size = 16 * GIB if long_run else 2 * GIB
    started = time.monotonic()
    with new_lab(size, 2) as lab:
        mounted = time.monotonic() - started
        one, two = lab.paths
        space = os.statvfs(one)
        assert space.f_blocks * space.f_frsize > 0.99 * size
        assert lab.region.stat().st_blocks * 512 < size // 100
        content = os.urandom(20 * MIB)
        (one / "file").write_bytes(content)
        assert (two / "file").read_bytes() == content
        (two / "file").unlink()
        assert os.statvfs(one).f_bfree == space.f_bfree
    figures.add(f"region of {size // GIB} GiB: made and mounted twice in {mounted:.1f} s")


def test_a_large_file(long_run: bool, figures: Figures) -> None:
    size = 5 * GIB if long_run else 96 * MIB
    with new_lab(6 * GIB if long_run else 128 * MIB, 2) as lab:
        one, two = (path / "file" for path in lab.paths)
        piece = bytearray(random.Random(3).randbytes(MIB))
        started = time.monotonic()
        with one.open("wb", buffering=0) as file:
            for number in range(size // MIB):
                piece[:8] = number.to_bytes(8, "little")
                assert file.write(piece) == MIB
        written = time.monotonic()
        with two.open("rb", buffering=0) as file:
            for number in range(size // MIB):
                piece[:8] = number.to_bytes(8, "little")
                assert _read(file.fileno(), MIB) == piece
        read = time.monotonic()
        status = two.stat()
        assert status.st_size == size
        assert size <= status.st_blocks * 512 < size * 1.02
        started_cut = time.monotonic()
        os.truncate(one, size // 2 + 5)
        cut = time.monotonic() - started_cut
        assert two.stat().st_size == size // 2 + 5
        one.unlink()
    figures.add(
        f"file of {size // MIB} MiB: written at {size / MIB / (written - started):.0f} MiB/s, "
        f"read on another mount at {size / MIB / (read - written):.0f} MiB/s, "
        f"half of it cut off in {cut * 1000:.0f} ms"
    )


def _read(fd: int, length: int) -> bytes:
    parts = []
    while length:
        parts.append(os.read(fd, length))
        assert parts[-1]
        length -= len(parts[-1])
    return b"".join(parts)


def test_deep_paths(long_run: bool) -> None:
    """As deep as one path can name; deeper ones in test_names.py."""
    with new_lab(64 * MIB, 2) as lab:
        deep = Path(*["d" * 10] * 200)
        (lab.paths[0] / deep).mkdir(parents=True)
        (lab.paths[0] / deep / "file").write_bytes(b"down here")
        assert (lab.paths[1] / deep / "file").read_bytes() == b"down here"
        os.rename(lab.paths[1] / ("d" * 10), lab.paths[1] / "moved")
        assert (lab.paths[0] / "moved" / Path(*deep.parts[1:]) / "file").exists()
        shutil.rmtree(lab.paths[0] / "moved")
