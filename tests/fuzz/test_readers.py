"""What reads the format, on kept inputs and on others made from them; `--long`: guided fuzzing."""

from __future__ import annotations

import importlib.util
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ivshmemfs.engine.inode import parse
from ivshmemfs.errors import Corrupt
from ivshmemfs.format.inode import INODE, MAP, InodeRecord
from ivshmemfs.format.node import HEADER_SIZE
from tests.fuzz import corpus
from tests.fuzz.readers import READERS, seeds
from tests.support.figures import Figures
from tests.support.programs import missing

TOP = Path(__file__).parent.parent.parent
SHORT = {"check": 100, "mount": 60}  # inputs made in the short run
SECONDS = 60  # of guided fuzzing of each reader


@pytest.mark.parametrize(
    "fields",
    [
        {"blocks": 1 << 63},
        {"blocks": 1 << 32},
        {"rdev": 1 << 40},
        {"mode": stat.S_IFLNK | 0o777, "payload": MAP, "size": 1 << 60},
    ],
)
def test_what_stat_cannot_tell_is_damage(fields: dict[str, int]) -> None:
    """More blocks than numbers of blocks, a device number of 64 bits, an endless target."""
    blank = INODE.unpack(bytes(INODE.size))
    record = blank._replace(mode=stat.S_IFCHR | 0o600, nlink=1, blocks=1)
    assert parse(7, bytes(HEADER_SIZE) + INODE.pack(record), 1024).ino == 7
    wrong = InodeRecord(*{**record._asdict(), **fields}.values())
    with pytest.raises(Corrupt):
        parse(7, bytes(HEADER_SIZE) + INODE.pack(wrong), 1024)


@pytest.mark.parametrize("reader", READERS)
def test_readers_fail_only_as_documented(reader: str, figures: Figures) -> None:
    begin = corpus.load(reader) + seeds(reader)
    count = SHORT.get(reader, 2000)
    for data in [b"", *begin, *corpus.mutated(begin, count, 1)]:
        try:
            READERS[reader](data)
        except BaseException as error:
            error.add_note(f"replay: READERS[{reader!r}](bytes.fromhex({data.hex()!r}))")
            raise
    figures.add(f"fuzzing, {reader}: {len(begin)} kept inputs, {count:,} made from them")


def test_the_corpus_is_small_and_of_these_readers() -> None:
    kept = {path.stem: path.stat().st_size for path in corpus.HERE.glob("*")}
    assert set(kept) <= set(READERS)
    assert all(size <= corpus.LARGEST for size in kept.values())


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_guided_by_coverage(reader: str, figures: Figures) -> None:
    if importlib.util.find_spec("atheris") is None:
        missing("atheris is not installed: run 'sh scripts/setup --fuzz'")
    command = [sys.executable, "-m", "tests.fuzz", reader, "--seconds", str(SECONDS)]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    runs = next(line for line in said.splitlines() if line.startswith("Done ")).split()[1]
    last = [line for line in said.splitlines() if " cov: " in line][-1].split()
    figures.add(
        f"fuzzing, {reader}: {int(runs):,} inputs guided by coverage in {SECONDS} s, "
        f"{last[last.index('cov:') + 1]} places reached"
    )
