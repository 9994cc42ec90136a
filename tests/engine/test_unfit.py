"""A mount only reads through a mapping whose compare-and-swap does not work."""

from __future__ import annotations

import pytest

from ivshmemfs.engine import Filesystem, volume
from ivshmemfs.errors import RegionUnfit
from ivshmemfs.region import Memory, probe
from ivshmemfs.region.probe import Probe, Scratch
from tests.support.regions import new_region


def test_a_mapping_without_compare_and_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(memory: Memory, scratch: Scratch | None = None) -> Probe:
        return probe(memory)._replace(cas_ok=False)

    monkeypatch.setattr(volume, "cas_works", lambda memory, word: False)
    monkeypatch.setattr(volume, "probe", unfit)
    with new_region() as made:
        with pytest.raises(RegionUnfit, match="-o ro"):
            made.mount()
        looking = made.region()
        before = looking.memory.read(0, made.size)
        fs = Filesystem.mount(looking, readonly=True)
        assert fs.getattr(1).nlink == 2
        assert looking.memory.read(0, made.size) == before


def test_trying_leaves_no_trace() -> None:
    with new_region() as made:
        region = made.region()
        before = region.memory.read(0, 4096)
        made.mount().unmount()
        assert region.memory.read(0, 4096)[1280:2048] == before[1280:2048]
