"""How many requests the kernel sends for each file that a program copies or removes.

The kernel's event `fuse_request_send` tells of every request; so the daemons need not count.  It
takes root, and a kernel with tracing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.peers import PATIENCE, Peer

TRACING = Path("/sys/kernel/tracing")
EVENT = TRACING / "events" / "fuse" / "fuse_request_send"
BUFFER_KIB = 16 << 10  # of each CPU; an event takes 40 bytes
LINE = re.compile(r"fuse_request_send: connection (\d+) req \d+ opcode \d+ \(FUSE_(\w+)\)")
#: A difference below this, in requests per file, is noise.
NOISE = 0.02

Counts = Counter[str]


def missing() -> str:
    """Why nothing can be counted here; empty if it can."""
    if os.geteuid() != 0:
        return "it takes root"
    return "" if EVENT.exists() else f"{EVENT} is not there: mount tracefs"


def programs(source: Path) -> Iterator[tuple[str, Sequence[object]]]:
    """The name and words of each installed program; it runs in a directory of the peer."""
    archive, bare = source / "tree.tar", source / "tree.git"
    subprocess.run(["tar", "-C", source, "-cf", archive, "tree"], check=True)
    found: dict[str, Sequence[object]] = {
        "cp -a": ["cp", "-a", source / "tree", "copy"],
        "tar x": ["tar", "-xf", archive],
        "rsync -a": ["rsync", "-a", source / "tree", "synced"],
        "git clone": ["git", "-c", "safe.directory=*", "clone", "-q", bare, "clone"],
        "rm -r": ["rm", "-r", "copy"],
    }
    if shutil.which("git"):
        _commit(source / "tree", bare)
    for name, words in found.items():
        if shutil.which(str(words[0])):
            yield name, words


def _commit(tree: Path, bare: Path) -> None:
    def git(*words: object) -> None:
        identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
        command = ["git", *identity, f"--git-dir={bare}", f"--work-tree={tree}", *map(str, words)]
        subprocess.run(command, check=True, timeout=PATIENCE, cwd=tree)

    subprocess.run(["git", "init", "-q", "--bare", bare], check=True, timeout=PATIENCE)
    git("add", "-A")
    git("commit", "-q", "-m", "tree")


def requests(peers: Sequence[Peer], source: Path, files: int) -> dict[str, float]:
    """Requests per file of each program on each peer, and where the first differs from the others.

    *source* has a directory `tree` of so many files.
    """
    found: dict[str, float] = {}
    for name, words in programs(source):
        counts = {peer.name: counted(peer, words) for peer in peers}
        for peer, by_opcode in counts.items():
            found[f"{name}: {peer}"] = by_opcode.total() / files
        ours, *others = counts.items()
        for other, theirs in others:
            found |= differences(f"{name}: {ours[0]} - {other}", ours[1], theirs, files)
    return found


def differences(
    what: str, ours: Mapping[str, int], theirs: Mapping[str, int], files: int
) -> dict[str, float]:
    """Which opcodes one side sends more often, in requests per file."""
    found = {
        opcode: (ours.get(opcode, 0) - theirs.get(opcode, 0)) / files
        for opcode in sorted({*ours, *theirs})
    }
    return {f"{what}: {opcode}": value for opcode, value in found.items() if abs(value) > NOISE}


def counted(peer: Peer, words: Sequence[object]) -> Counts:
    """The requests of each opcode that the kernel sends to *peer* while a program runs there."""
    device = peer.path.stat().st_dev
    connection = os.major(device) << 20 | os.minor(device)
    with _tracing():
        subprocess.run(
            [*map(str, words)], cwd=peer.path, check=True, timeout=PATIENCE,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return read(TRACING / "trace", connection)


def read(trace: Path, connection: int) -> Counts:
    """The requests of one connection in a trace; raises RuntimeError when the buffer ran over."""
    found = Counts()
    with trace.open() as lines:
        for line in lines:
            if (event := LINE.search(line)) and int(event[1]) == connection:
                found[event[2]] += 1
            elif "LOST" in line:
                raise RuntimeError("the kernel's trace buffer is too small")
    return found


@contextmanager
def _tracing() -> Iterator[None]:
    size = TRACING / "buffer_size_kb"
    before = size.read_text().split()[0]
    size.write_text(str(BUFFER_KIB))
    (TRACING / "trace").write_text("")
    (EVENT / "enable").write_text("1")
    try:
        yield
    finally:
        (EVENT / "enable").write_text("0")
        (TRACING / "trace").write_text("")
        size.write_text(before)
