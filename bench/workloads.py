"""What is run on every peer, through its mount."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.peers import Peer
from bench.runner import Client, Sample


@dataclass(frozen=True)
class Scale:
    """How much is done in one run; small for a quick look."""

    rounds: int = 5
    looks: int = 1500
    names: int = 500
    random: int = 1000
    random_mib: int = 16
    large_mib: int = 64
    small_blocks_mib: int = 4
    tree_files: int = 5000
    listed: int = 10_000
    region: str = "256M"


#: In an emulated guest every instruction costs some thirty times as much.
EMULATED = Scale(
    looks=150, names=50, random=100, random_mib=4, large_mib=16, small_blocks_mib=1,
    tree_files=100, listed=300, region="64M",
)  # fmt: skip
QUICK_EMULATED = Scale(
    rounds=1, looks=20, names=10, random=20, random_mib=1, large_mib=2, small_blocks_mib=1,
    tree_files=20, listed=50, region="64M",
)  # fmt: skip
QUICK = Scale(
    rounds=3, looks=300, names=100, random=200, random_mib=4, large_mib=8, small_blocks_mib=1,
    tree_files=200, listed=500, region="64M",
)  # fmt: skip

Measure = Callable[[Peer], dict[str, Sample]]
#: A peer without a file system: memcpy to and from a mapping.
MEMCPY = "memcpy"


class Workloads:
    """Every group of measurements by name; *source* is a folder for what is copied from."""

    def __init__(self, client: Client, scale: Scale, source: Path) -> None:
        self._client = client
        self._scale = scale
        self._source = source
        self.groups: dict[str, Measure] = {
            "look": self._simple("look", scale.looks),
            "names": self._simple("names", scale.names),
            "random": self._simple("random", scale.random_mib, scale.random),
            "sequential": self._sequential,
            "readdir": self._readdir,
            "cp": self._copy,
            "tree": self._tree,
        }

    def prepare(self, place: Path | None = None) -> None:
        """Make what is copied, one large file and a tree of small ones; elsewhere if *place*."""
        source = place or self._source
        source.mkdir()
        with (source / "large").open("wb") as file:
            for number in range(self._scale.large_mib):
                file.write(bytes([number % 251, 7, 13, 19]) * (1 << 18))
        tree = source / "tree"
        for number in range(self._scale.tree_files):
            folder = tree / f"folder{number // 100}"
            if number % 100 == 0:
                folder.mkdir(parents=True)
            (folder / f"file{number}").write_bytes(bytes(200 + number * 37 % 4000))

    def _simple(self, *words: object) -> Measure:
        return lambda peer: self._client.run(self._folder(peer, str(words[0])), *words)

    def _sequential(self, peer: Peer) -> dict[str, Sample]:
        group = "mapping" if peer.name == MEMCPY else "sequential"
        folder = self._folder(peer, "sequential")
        found: dict[str, Sample] = {}
        for kib in (4, 128, 1024):
            mib = self._scale.small_blocks_mib if kib == 4 else self._scale.large_mib // 2
            found |= self._client.run(folder, group, mib, kib)
        return found

    def _readdir(self, peer: Peer) -> dict[str, Sample]:
        folder = self._folder(peer, "listed")
        self._client.run(folder, "fill", self._scale.listed, 0)
        found = self._client.run(folder, "list", self._scale.listed, 3)
        return {f"readdir-{self._scale.listed}": found["readdir"]}

    def _copy(self, peer: Peer) -> dict[str, Sample]:
        folder = self._folder(peer, "copied", empty=True)
        done = self._client.run(folder, "run", "cp", self._source / "large", "large")
        back = self._client.run(folder, "run", "cp", "large", self._source / "back")
        self._folder(peer, "copied", empty=True)
        return {"cp in": done["run"], "cp out": back["run"]}

    def _tree(self, peer: Peer) -> dict[str, Sample]:
        folder = self._folder(peer, "trees", empty=True)
        copied = self._client.run(folder, "run", "cp", "-a", self._source / "tree", "tree")
        removed = self._client.run(folder, "run", "rm", "-r", "tree")
        return {"cp -a tree": copied["run"], "rm -r tree": removed["run"]}

    def _folder(self, peer: Peer, name: str, *, empty: bool = False) -> Path:
        return self._client.folder(peer.path / name, empty=empty)
