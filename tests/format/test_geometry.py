"""Geometry: what plan() gives is possible and wastes little; what is impossible is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.format import geometry as geo
from ivshmemfs.format import words

SIZES = st.integers(128 << 10, 1 << 44)
BLOCK_SIZES = st.sampled_from([None, 1024, 2048, 4096, 65536])


@given(SIZES, BLOCK_SIZES, st.integers(1, 255))
def test_a_plan_is_possible(size: int, block_size: int | None, peers: int) -> None:
    try:
        plan = geo.plan(size, block_size, peers)
    except ValueError:
        assert size < 60 * 65536 + (256 << 10)  # only what is too small for its blocks
        return
    assert plan.problem() is None
    assert plan.data_offset + plan.block_count * plan.block_size <= size
    assert plan.tags_offset + 8 * plan.block_count <= plan.data_offset
    assert plan.reserve < plan.block_count


@given(SIZES)
def test_no_block_more_would_fit(size: int) -> None:
    plan = geo.plan(size)
    more = plan.block_count + 1
    if more <= words.MAX_BLOCKS:
        tags_end = plan.tags_offset + 8 * more
        start = -(-tags_end // plan.block_size) * plan.block_size
        assert start + more * plan.block_size > size


@pytest.mark.parametrize(("size", "share"), [(1 << 20, 0.85), (16 << 30, 0.95)])
def test_most_is_usable_for_data(size: int, share: float) -> None:
    plan = geo.plan(size)
    usable = (plan.block_count - plan.reserve - 3) * plan.block_size
    assert usable / size > share


def test_block_numbers_suffice_for_the_largest_region() -> None:
    for size in (1 << 40, 1 << 42, 1 << 43):
        plan = geo.plan(size)
        assert plan.block_count * plan.block_size > size * 0.95


def test_pinned_plans() -> None:
    assert geo.plan(1 << 20) == geo.Geometry(
        1 << 20, 1024, 16, 996, 4096, 20480, 28672, geo.reserve_blocks(996)
    )
    assert geo.plan(16 << 30).block_count == 4186122


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ((4096,), "blocks"),
        ((1 << 20, 3000), "block size 3000"),
        ((1 << 20, 512), "block size 512"),
        ((1 << 20, 131072), "block size 131072"),
        ((1 << 20, 1024, 0), "0 peers"),
        ((1 << 20, 1024, 256), "256 peers"),
    ],
)
def test_impossible_wishes_are_refused(arguments: tuple[int, ...], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        geo.plan(*arguments)


@pytest.mark.parametrize(
    "field", ["block_size", "peer_count", "block_count", "peers_offset", "tags_offset"]
)
@given(wild=st.integers(0, (1 << 64) - 1))
def test_wild_numbers_are_a_problem_or_harmless(field: str, wild: int) -> None:
    wrong = geo.plan(1 << 20)._replace(**{field: wild})
    if wrong.problem() is None:
        assert wrong.data_offset + wrong.block_count * wrong.block_size <= 1 << 20
        assert wrong.peers_offset + wrong.peer_count * 1024 <= wrong.tags_offset
        assert apart(wrong)


def apart(layout: geo.Geometry) -> bool:
    """Whether tags and blocks do not overlap, and both end within the region."""
    tags_end = layout.tags_offset + 8 * layout.block_count
    blocks_end = layout.data_offset + layout.block_count * layout.block_size
    inside = max(tags_end, blocks_end) <= layout.region_size
    return inside and (tags_end <= layout.data_offset or blocks_end <= layout.tags_offset)


@given(st.integers(1 << 18, 1 << 44), BLOCK_SIZES, st.lists(st.integers(1, 1 << 40), max_size=4))
def test_a_grown_geometry_keeps_all_blocks(
    size: int, block_size: int | None, steps: list[int]
) -> None:
    try:
        layout = geo.plan(size, block_size)
    except ValueError:
        return
    for step in steps:
        try:
            larger = geo.grown(layout, layout.region_size + step)
        except ValueError:
            spare = layout.block_size + 16 * layout.block_count + 1024
            assert step < spare or layout.block_count == words.MAX_BLOCKS
            continue
        assert larger.problem() is None
        assert apart(larger)
        assert (larger.data_offset, larger.block_size) == (layout.data_offset, layout.block_size)
        assert larger.block_count > layout.block_count
        assert larger.tags_offset >= layout.region_size  # nothing in use is stored over
        layout = larger


def test_nothing_shrinks() -> None:
    layout = geo.plan(1 << 20)
    for size in (1 << 20, 1 << 19):
        with pytest.raises(ValueError, match="has 1048576 bytes already"):
            geo.grown(layout, size)
