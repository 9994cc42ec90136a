"""Extended attributes as one string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.format import xattr

NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)
ATTRIBUTES = st.dictionaries(NAMES, st.binary(max_size=300), max_size=20)


@given(ATTRIBUTES)
def test_round_trip(attributes: dict[bytes, bytes]) -> None:
    blob = xattr.encode(attributes)
    assert xattr.decode(blob) == attributes
    assert list(xattr.decode(blob)) == sorted(attributes)
    assert blob == xattr.encode(dict(reversed(attributes.items())))


@given(ATTRIBUTES.filter(bool), st.data())
def test_a_part_is_noticed(attributes: dict[bytes, bytes], data: st.DataObject) -> None:
    blob = xattr.encode(attributes)
    cut = data.draw(st.integers(1, len(blob) - 1))
    try:
        found = xattr.decode(blob[:cut])
    except ValueError:
        return
    assert len(found) < len(attributes)  # cut exactly between two of them


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        found = xattr.decode(raw)
    except ValueError:
        return
    assert xattr.encode(found) == raw


def entry(name: bytes, value: bytes = b"", zero: bytes = bytes(3)) -> bytes:
    return xattr.XATTR.pack(xattr.XattrRecord(len(value), len(name), zero)) + name + value


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (entry(b"b") + entry(b"a"), "order"),
        (entry(b"a") + entry(b"a"), "order"),
        (entry(b""), "name"),
        (entry(b"a\0b"), "name"),
        (entry(b"a", zero=b"\0\1\0"), "runs to"),
        (entry(b"a", b"value")[:-1], "runs to 14 of 13"),
        (b"\0\0", "cut off"),
        (entry(b"a", bytes(65537)), "65537"),
        (bytes(xattr.BLOB_MAX + 1), "fit"),
    ],
)
def test_contradictions_are_refused(raw: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        xattr.decode(raw)


@pytest.mark.parametrize(
    "attributes",
    [
        {b"": b""},
        {b"n" * 256: b""},
        {b"a\0": b""},
        {b"a": bytes(65537)},
        {b"%d" % n: bytes(65536) for n in range(4)},
    ],
)
def test_what_could_not_be_read_is_not_written(attributes: dict[bytes, bytes]) -> None:
    with pytest.raises(ValueError):
        xattr.encode(attributes)


def test_golden() -> None:
    blob = xattr.encode({b"user.b": b"2", b"user.a": b""})
    assert blob.hex() == "0000000006000000757365722e610100000006000000757365722e6232"
