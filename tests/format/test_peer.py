"""Peer slots as others see them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.format import peer, words

BLANK = peer.SLOT.unpack(bytes(peer.SLOT_SIZE))


def slot(state: int, incarnation: int = 7, host: bytes = b"guest") -> bytes:
    record = BLANK._replace(
        state=words.make_state(state, 7, 1), incarnation=incarnation, pid=12, host=host
    )
    raw = bytearray(peer.SLOT.pack(record))
    raw[peer.IDENTITY_OFFSET : peer.FILTER_OFFSET] = peer.encode_identity(record)
    return bytes(raw)


def test_identity_is_checked() -> None:
    raw = slot(words.IDLE)
    assert peer.identity_valid(raw)
    for at in range(peer.IDENTITY_OFFSET, peer.FILTER_OFFSET):
        assert not peer.identity_valid(raw[:at] + bytes((raw[at] ^ 1,)) + raw[at + 1 :])
    assert peer.identity_valid(bytes(64) + raw[64:256] + b"\1" * 256)


def test_occupants() -> None:
    table = slot(words.FREE) + slot(words.ACTIVE) + slot(words.IDLE, incarnation=6) + slot(9)
    found = list(peer.occupants(table, 4))
    assert [p.slot for p in found] == [2, 3, 4]
    assert [p.identity_valid for p in found] == [True, False, True]
    assert [p.describe() for p in found] == [
        "slot 2 (active, pid 12 on guest)",
        "slot 3 (idle, identity unknown)",
        "slot 4 (?, pid 12 on guest)",
    ]


def test_a_hostile_host_name_cannot_drive_a_terminal() -> None:
    (found,) = peer.occupants(slot(words.IDLE, host=b"\x1b[2Jevil\n\xff"), 1)
    assert found.describe() == "slot 1 (idle, pid 12 on \\x1b[2Jevil\\n\\xff)"


@given(st.binary(min_size=peer.SLOT_SIZE, max_size=peer.SLOT_SIZE))
def test_any_bytes_are_a_slot(raw: bytes) -> None:
    for found in peer.occupants(raw, 1):
        assert found.describe().isprintable()
