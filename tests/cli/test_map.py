"""`ivshmemfs map`, without and with a mount."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys

import pytest

from tests.support.lab import needs_fuse, new_lab
from tests.support.mounts import ENVIRONMENT, PATIENCE
from tests.support.regions import ROOT, new_region, put


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a subcommand."""
    return subprocess.run(
        [sys.executable, "-m", "ivshmemfs", *map(str, words)],
        capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT, check=False,
    )  # fmt: skip


def place(file: str) -> tuple[str, int, int]:
    """Where `map --json` says that a file is: path, offset, size."""
    done = run("map", "--json", file)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    return found["file"], found["offset"], found["size"]


def test_made_found_and_released() -> None:
    with new_region(4 << 20) as made:
        file = f"{made.path}:/shared"
        first = run("map", "--create", "10K", file)
        assert (first.returncode, first.stderr) == (0, "")
        assert run("map", "--create", "10K", file).stdout == first.stdout
        path, offset, size = place(file)
        assert (path, size) == (str(made.path), 12288)
        assert first.stdout.splitlines()[1].split() == ["offset", str(offset), f"({offset:#x})"]
        with open(path, "r+b") as region, mmap.mmap(region.fileno(), size, offset=offset) as view:
            view[:5] = b"hello"
        assert run("cat", file).stdout[:5] == "hello"
        header = run("map", "--c", file).stdout.splitlines()
        assert header[1:] == [
            f'#define SHARED_FILE "{path}"',
            f"#define SHARED_OFFSET {offset:#x}ULL",
            f"#define SHARED_SIZE {size:#x}ULL",
        ]
        refused = run("rm", file)
        assert refused.returncode == 2
        assert "'ivshmemfs map --release' makes it an ordinary file" in refused.stderr
        assert run("map", "--release", file).returncode == 0
        assert run("rm", file).returncode == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/plain"], "it is an ordinary file: "),
        (["--create", "4K", "/plain"], "makes a mapped file, under a new name"),
        (["--create", "4K", "/link"], "it is a symbolic link: name the file that it leads to"),
        (["/"], "Is a directory"),
        (["--create", "4K", "/"], "Is a directory"),
        (["/nothing"], "No such file"),
        (["--create", "8K", "/shared"], "it is there already, with 4K"),
        (["--create", "1G", "/new"], "no room for"),
        (["--create", "none", "/new"], "is not a size"),
        (["--release", "/plain"], "it is an ordinary file already"),
        (["--release", "--json", "/shared"], "--release goes with no option but --force"),
        (["--force", "/shared"], "--force goes with --release"),
    ],
)
def test_refusals(words: list[str], told: str) -> None:
    with new_region(4 << 20) as made:
        assert run("map", "--create", "4K", f"{made.path}:/shared").returncode == 0
        fs = made.mount()
        put(fs, 1, b"plain", b"contents")
        fs.symlink(1, b"link", b"shared", ROOT)
        done = run("map", *words[:-1], f"{made.path}:{words[-1]}")
        assert done.returncode in (1, 2)
        assert done.stdout == ""
        assert told in done.stderr
        assert len(done.stderr.splitlines()) == 1


@needs_fuse
def test_programs_and_a_mount_share_the_bytes() -> None:
    with new_lab(mounts=2) as lab:
        mount, other = lab.mounts
        file = mount.path / "shared"
        assert run("map", "--create", "64K", file).returncode == 0
        path, offset, size = place(str(file))
        assert file.stat().st_size == size
        with open(path, "r+b") as region, mmap.mmap(region.fileno(), size, offset=offset) as view:
            view[100:106] = b"memory"
            assert (other.path / "shared").read_bytes()[100:106] == b"memory"
            subprocess.run(
                ["dd", "of=shared", "bs=1", "seek=3000", "conv=notrunc", "status=none"],
                cwd=other.path, input=b"through a mount", check=True,
            )  # fmt: skip
            assert view[3000:3015] == b"through a mount"
        with open(file, "r+b", buffering=0) as opened:
            os.pwrite(opened.fileno(), b"x" * size, 0)
            refused = run("map", "--release", file)
            assert refused.returncode == 1
            assert "has it open" in refused.stderr
        for command in (["rm", "-f", "shared"], ["cp", "/dev/null", "shared"]):
            done = subprocess.run(command, cwd=mount.path, capture_output=True, check=False)
            assert done.returncode == 1
        assert run("map", "--release", file).returncode == 0
        file.unlink()
        assert not (other.path / "shared").exists()


@needs_fuse
def test_changed_pages_of_a_mount_go_back_whole() -> None:
    """As docs/uses/shared-memory.md says; the region mapped itself is the way."""
    with new_lab(32 << 20, 1, "allow_other,mmap") as lab:
        file = lab.mounts[0].path / "shared"
        assert run("map", "--create", "4K", file).returncode == 0
        path, offset, size = place(str(file))
        with (
            open(path, "r+b") as region,
            mmap.mmap(region.fileno(), size, offset=offset) as memory,
            open(file, "r+b") as opened,
            mmap.mmap(opened.fileno(), size) as pages,
        ):
            pages[:5] = b"pages"  # the kernel has the page now, and writes it back at `flush`
            memory[100:106] = b"memory"
            assert pages[100:106] == bytes(6)
            pages.flush()
            assert memory[:5] == b"pages"
            assert memory[100:106] == bytes(6)
