"""The probe: what it finds, what it stores, what it refuses."""

from __future__ import annotations

import pytest

from ivshmemfs.errors import RegionUnfit
from ivshmemfs.region import Memory, Probe, Scratch, probe, refuse_unfit
from tests.region.conftest import SIZE, Place


def test_ordinary_memory_can_do_everything(memory: Memory) -> None:
    memory.write(8192, b"\x77" * 8192)
    before = memory.read(0, SIZE)
    found = probe(memory, Scratch(8192, 8192))
    assert found.unaligned_ok
    assert found.cas_ok
    assert found.read_mbps > 100
    assert found.write_mbps is not None
    assert found.write_mbps > 100
    assert memory.read(0, SIZE) == before


def test_a_readonly_mapping_is_probed_without_a_store(place: Place) -> None:
    memory = place.map(writable=False)
    found = probe(memory, Scratch(8192, 8192))
    assert found.cas_ok is None
    assert found.write_mbps is None
    assert found.read_mbps > 100
    assert memory.stores == 0


def test_a_word_is_enough_to_try_cas(memory: Memory) -> None:
    found = probe(memory, Scratch(64, 8))
    assert found.cas_ok
    assert found.write_mbps is None


class BrokenSwap:
    """A memory whose compare-and-swap does what `lie` says."""

    def __init__(self, memory: Memory, lie: str) -> None:
        self._memory = memory
        self._lie = lie

    def __getattr__(self, name: str) -> object:
        return getattr(self._memory, name)

    def cas(self, offset: int, expected: int, new: int) -> int:
        match self._lie:
            case "stores nothing":
                return expected
            case "stores always":
                before = self._memory.load(offset)
                self._memory.store(offset, new)
                return before
        raise OSError(5, "compare-and-swap does not work on this mapping")


@pytest.mark.parametrize("lie", ["stores nothing", "stores always", "raises"])
def test_a_broken_cas_is_found_and_refused(place: Place, lie: str) -> None:
    broken = BrokenSwap(place.map(), lie)
    found = probe(broken, Scratch(64, 8))  # type: ignore[arg-type]
    assert found.cas_ok is False
    assert "compare-and-swap does not work" in found.describe()
    with pytest.raises(RegionUnfit, match="mount it with -o ro"):
        refuse_unfit(found, "pci:0000:00:04.0")


def test_what_works_is_not_refused(memory: Memory) -> None:
    refuse_unfit(probe(memory, Scratch(64, 8)), "region")
    refuse_unfit(probe(memory), "region")


def test_findings_read_well() -> None:
    fast = Probe(True, True, 12345.6, 9876.5)
    assert fast.describe() == "reads 12346 MB/s, writes 9876 MB/s, compare-and-swap works"
    slow = Probe(False, None, 42.4, None)
    assert slow.describe() == "reads 42 MB/s, aligned accesses only"
