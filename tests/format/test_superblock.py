"""Superblocks: versions, features, and refusals that say what to do."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.errors import (
    Corrupt,
    ForeignFormat,
    GeometryMismatch,
    IvshmemfsError,
    NotFormatted,
    UnsupportedVersion,
)
from ivshmemfs.format import superblock as sb
from ivshmemfs.format.geometry import plan

UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff").bytes
SIZE = 1 << 20
GOOD = sb.encode(UUID, "a label", plan(SIZE), 1_700_000_000_000_000_000)


def changed(**fields: int | bytes) -> bytes:
    return sb.seal(sb.SUPERBLOCK.unpack(GOOD)._replace(**fields))  # type: ignore[arg-type]


def test_round_trip() -> None:
    found = sb.decode(GOOD, SIZE)
    assert found == sb.Superblock(
        UUID, "a label", plan(SIZE), 1_700_000_000_000_000_000, False, True, True, UUID
    )
    assert found.fsid == 0x7766554433221100
    assert sb.identify(GOOD) == ("a label", str(uuid.UUID(bytes=UUID)))


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=16))
def test_labels(label: str) -> None:
    raw = sb.encode(UUID, label, plan(SIZE), 0)
    assert sb.decode(raw, SIZE).label == label


def test_a_label_that_is_too_long_is_refused() -> None:
    assert sb.decode(sb.encode(UUID, "é" * 32, plan(SIZE), 0)).label == "é" * 32
    with pytest.raises(ValueError, match="at most 64 bytes; this one has 66"):
        sb.encode(UUID, "é" * 33, plan(SIZE), 0)


@pytest.mark.parametrize(
    ("raw", "kind", "says"),
    [
        (bytes(4096), NotFormatted, "which begins with zeros"),
        (b"", NotFormatted, "too small"),
        (b"\xff" * 4096, ForeignFormat, "nothing but ones"),
        (b"\x53\xef" * 400, ForeignFormat, "is it the right file or device"),
        (
            changed(major=2),
            UnsupportedVersion,
            r"2\.0, made by ivshmemfs .* which knows 1\.0",
        ),
        (changed(major=0), UnsupportedVersion, "matching version"),
        (changed(minor=sb.MINOR + 1), UnsupportedVersion, "matching version"),
        (changed(incompat=2), UnsupportedVersion, "incompat 0x2"),
        (changed(incompat=1 << 63), UnsupportedVersion, "newer version"),
        (changed(layout_signature=1), UnsupportedVersion, "laid out differently"),
        (changed(block_size=3000), Corrupt, "block size 3000"),
        (changed(block_count=1 << 40), Corrupt, "impossible"),
        (changed(data_offset=0), Corrupt, "impossible"),
        (GOOD[:100] + b"!" + GOOD[101:], Corrupt, "run fsck.ivshmemfs -y"),
    ],
)
def test_what_cannot_be_used_is_refused(raw: bytes, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        sb.decode(raw, SIZE)


@pytest.mark.parametrize(("size", "says"), [(SIZE - 4096, "smaller"), (SIZE + 4096, "larger")])
def test_another_size_is_refused(size: int, says: str) -> None:
    with pytest.raises(GeometryMismatch, match=says):
        sb.decode(GOOD, size)


def test_features() -> None:
    assert not sb.decode(changed(compat=(1 << 64) - 1), SIZE).read_only
    assert sb.decode(changed(ro_compat=4), SIZE).read_only


@given(st.binary(max_size=600))
def test_any_bytes_are_refused_in_order(raw: bytes) -> None:
    with pytest.raises(IvshmemfsError):
        sb.decode(raw, SIZE)
    assert sb.identify(raw) is None


@given(st.integers(0, 511), st.integers(1, 255))
def test_any_changed_byte_is_noticed(at: int, flip: int) -> None:
    raw = bytearray(GOOD)
    raw[at] ^= flip
    with pytest.raises((Corrupt, ForeignFormat)):
        sb.decode(bytes(raw), SIZE)


def test_the_layout_signature_is_pinned() -> None:
    # It may change only together with the version: peers of one region must agree on it.
    assert sb.layout_signature() == 0x84739A0446E3954B
