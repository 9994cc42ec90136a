"""Every record: its size, its bytes, and that nothing is lost on the way there and back."""

import struct
from typing import Annotated, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmemfs.format import inode, node, peer, superblock, words, xattr
from ivshmemfs.format.record import At, Layout
from ivshmemfs.format.tables import LAYOUTS

SIZES = {
    "superblock": 512,
    "slot": 1024,
    "coherence": 24,
    "repair": 1024,
    "pointer": 16,
    "header": 32,
    "root": 96,
    "inode": 160,
    "xattr": 8,
    "lock": 48,
    "wait": 32,
    "lock_header": 8,
    "queue": 512,
}


def value(code: str, width: int) -> st.SearchStrategy[Any]:
    if code.endswith("s"):
        return st.binary(min_size=width, max_size=width)
    bits = 8 * width
    if code.islower():
        return st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)
    return st.integers(0, (1 << bits) - 1)


def records(layout: Layout[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(*(value(f.code, f.width) for f in layout.fields)).map(
        lambda values: layout.cls._make(values)
    )


def counted(layout: Layout[Any]) -> tuple[Any, bytes]:
    """A record whose every byte is its own offset, and these bytes."""
    raw = bytearray(layout.size)
    for field in layout.fields:
        for at in range(field.offset, field.offset + field.width):
            raw[at] = at & 0x7F
    return layout.unpack(bytes(raw)), bytes(raw)


def test_every_record_has_its_size() -> None:
    assert {name: layout.size for name, layout in LAYOUTS.items()} == SIZES


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip(name: str) -> None:
    layout = LAYOUTS[name]

    @given(records(layout))
    def check(record: Any) -> None:
        raw = layout.pack(record)
        assert len(raw) == layout.size
        assert layout.unpack(raw) == record
        assert layout.unpack(b"abc" + raw, 3) == record

    check()


@pytest.mark.parametrize("name", LAYOUTS)
def test_fields_stand_where_they_are_declared(name: str) -> None:
    layout = LAYOUTS[name]
    record, raw = counted(layout)
    assert layout.pack(record) == raw
    for field, held in zip(layout.fields, record, strict=True):
        piece = raw[field.offset : field.offset + field.width]
        expected = piece if isinstance(held, bytes) else int.from_bytes(piece, "little")
        assert held == expected, field.name
        assert layout.offset(field.name) == field.offset


@pytest.mark.parametrize("name", LAYOUTS)
def test_too_short_is_an_error(name: str) -> None:
    layout = LAYOUTS[name]
    with pytest.raises(struct.error):
        layout.unpack(bytes(layout.size - 1))


def test_golden_header() -> None:
    record = node.HeaderRecord(0x01020304, 2, 1, 0x0506, 0x0708090A, 0x1112131415161718, 0xFF << 56)
    expected = "04030201020106050a09080700000000181716151413121100000000000000ff"
    assert node.HEADER.pack(record).hex() == expected


def test_golden_root() -> None:
    record = node.RootRecord(1, 2, 3, 4, 5, 6, -1, 7, 8)
    expected = b"".join(n.to_bytes(8, "little") for n in (1, 2, 3, 4, 5, 6, (1 << 64) - 1))
    expected += b"\7\0\0\0\10\0\0\0" + bytes(32)
    assert node.ROOT_RECORD.pack(record) == expected


def test_golden_inode() -> None:
    pointer = words.POINTER.pack(1, 2, 3)
    record = inode.InodeRecord(
        mode=0o100644, nlink=1, uid=1000, gid=1001, size=5, blocks=1, atime_ns=1, mtime_ns=2,
        ctime_ns=3, btime_ns=4, rdev=0, parent=0, entries=0, payload=inode.INLINE, height=0,
        xattr_height=1, fixed=1, payload_size=5, xattr_size=9, xattr_inline=0,
        xattr_pointer=pointer,
    )  # fmt: skip
    expected = struct.pack("<4I", 0o100644, 1, 1000, 1001)
    expected += struct.pack("<2Q4q3Q", 5, 1, 1, 2, 3, 4, 0, 0, 0)
    expected += struct.pack("<BBBBIII", inode.INLINE, 0, 1, 1, 5, 9, 0) + pointer
    assert inode.INODE.pack(record) == expected + bytes(160 - len(expected))


def test_golden_slot() -> None:
    record = peer.SlotRecord(
        state=words.make_state(words.IDLE, 3, 9), heartbeat=2, intent=0, nonce=1, incarnation=3,
        pid=4, pid_start=5, pid_namespace=6, machine=b"m" * 16, boot=b"b" * 16, host=b"guest",
        joined_ns=7, capabilities=0, version=b"0.1.0", time_namespace=9, proofs=7, crc=8,
        operations=10, bytes_read=11, bytes_written=12, retries=13, locks=14, open_files=15,
        mount_point=b"/mnt/shared",
    )  # fmt: skip
    raw = peer.SLOT.pack(record)
    assert raw[:24].hex() == "090000003000000202000000000000000000000000000000"
    assert raw[24:32] == struct.pack("<Q", 1)
    assert raw[64:96] == struct.pack("<4Q", 3, 4, 5, 6)
    assert raw[96:133] == b"m" * 16 + b"b" * 16 + b"guest"
    assert raw[192:200] == struct.pack("<q", 7)
    assert raw[208:213] == b"0.1.0"
    assert raw[224:240] == struct.pack("<2Q", 9, 7)
    assert raw[252:256] == struct.pack("<I", 8)
    assert not any(raw[256:512])
    assert raw[512:560] == struct.pack("<6Q", 10, 11, 12, 13, 14, 15)
    assert raw[768:1024] == b"/mnt/shared".ljust(256, b"\0")


def test_golden_pointer_and_xattr() -> None:
    assert words.POINTER_LAYOUT.pack(words.PointerRecord(1, 2, 3)) == words.POINTER.pack(1, 2, 3)
    assert words.POINTER.pack(1, 2, 3).hex() == "01000000020000000300000000000000"
    assert xattr.XATTR.pack(xattr.XattrRecord(258, 3, bytes(3))).hex() == "0201000003000000"


def test_superblock_offsets_are_pinned() -> None:
    places = {f.name: f.offset for f in superblock.SUPERBLOCK.fields}
    assert places == {
        "magic": 0, "major": 8, "minor": 10, "size": 12, "compat": 16, "ro_compat": 24,
        "incompat": 32, "uuid": 40, "label": 56, "region_size": 120, "block_size": 128,
        "peer_count": 132, "block_count": 136, "peers_offset": 144, "tags_offset": 152,
        "data_offset": 160, "reserve": 168, "layout_signature": 176, "created_ns": 184,
        "seed": 192, "maker": 208, "crc": 508,
    }  # fmt: skip


class Overlapping(NamedTuple):
    one: Annotated[int, At(0, "Q", "")]
    two: Annotated[int, At(4, "I", "")]


class Crooked(NamedTuple):
    one: Annotated[int, At(2, "I", "")]


class Placeless(NamedTuple):
    one: int


@pytest.mark.parametrize(
    ("cls", "size", "wrong"),
    [
        (Overlapping, 8, "overlaps"),
        (Crooked, 8, "not aligned"),
        (Placeless, 8, "has no offset"),
        (words.PointerRecord, 12, "takes 16 bytes, not 12"),
    ],
)
def test_a_wrong_declaration_is_refused(cls: type[Any], size: int, wrong: str) -> None:
    with pytest.raises(TypeError, match=wrong):
        Layout(cls, size)


def test_signature_shows_each_change() -> None:
    class One(NamedTuple):
        a: Annotated[int, At(0, "Q", "one text")]

    class Same(NamedTuple):
        a: Annotated[int, At(0, "Q", "another text")]

    class Moved(NamedTuple):
        a: Annotated[int, At(8, "Q", "one text")]

    one = Layout(One, 16).signature().replace("One", "")
    assert Layout(Same, 16).signature().replace("Same", "") == one
    assert Layout(Moved, 16).signature().replace("Moved", "") != one
