"""Named damage: wrong pointers of every kind, impossible names, inodes, slots, tags and words."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ivshmemfs.format import inode, node, peer, superblock, words, xattr
from ivshmemfs.format.geometry import COMMIT_OFFSET, HINT_OFFSET
from tests.support.damage import Knife, Names

WORD = (1 << 64) - 1
VALUES = (0, 1, 2, 255, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, 1 << 63, WORD)
Damage = Callable[[Knife], None]


class Place(NamedTuple):
    """The place of a pointer: a block and an offset; `owner` and the level of its target."""

    block: int
    offset: int
    kind: int
    level: int
    owner: int


def _table(k: Knife) -> Place:
    block, offset = k.place_of(Names.big)
    return Place(block, offset, node.INODE, 0, Names.big)


def _table_top(k: Knife) -> Place:
    height = k.root_record().height
    kind = node.INDEX if height else node.INODE
    return Place(k.root, node.ROOT_POINTERS, kind, max(height - 1, 0), 0)


def _map(k: Knife) -> Place:
    return Place(k.block_of(Names.big), inode.PAYLOAD_OFFSET, node.INDEX, 0, Names.big)


def _index(k: Knife) -> Place:
    return Place(k.data_block(Names.big)[0], node.HEADER_SIZE, 0, 0, Names.big)


def _directory(k: Knife) -> Place:
    count = len(k.payload(Names.crowd)) // 24
    level = k.record(Names.crowd).height - 1
    at = inode.PAYLOAD_OFFSET + 8 * count
    return Place(k.block_of(Names.crowd), at, node.DIRNODE, level, Names.crowd)


def _interior(k: Knife) -> Place:
    block = k.interior_of(Names.crowd)
    at = node.HEADER_SIZE + 8 * node.HEADER.unpack(k.read(block)).count
    return Place(block, at, node.DIRLEAF, 0, Names.crowd)


def _attributes(k: Knife) -> Place:
    at = node.HEADER_SIZE + inode.INODE.offset("xattr_pointer")
    return Place(k.block_of(Names.far), at, node.INDEX, 0, Names.far)


def _attribute_data(k: Knife) -> Place:
    index = words.POINTER.unpack(k.record(Names.far).xattr_pointer)[0]
    return Place(index, node.HEADER_SIZE, 0, 0, Names.far)


def _direct(k: Knife) -> Place:
    return Place(k.block_of(Names.orphan), inode.PAYLOAD_OFFSET, 0, 0, Names.orphan)


PLACES: dict[str, Callable[[Knife], Place]] = {
    "inode table": _table, "root": _table_top, "block map": _map, "index": _index,
    "directory": _directory, "interior": _interior, "attributes": _attributes,
    "attribute data": _attribute_data, "direct data": _direct,
}  # fmt: skip


def _point(k: Knife, place: Place, block: int, tag: int, weight: int = 1) -> None:
    k.edit(place.block, place.offset, words.POINTER.pack(block, weight, tag))


def forge(k: Knife, block: int, place: Place, level: int, body: bytes, count: int = 0) -> None:
    """A node in a free block that looks as genuine as `place` can ask for."""
    tag = words.make_tag(1, 1, 1)
    k.set_tag(block, tag)
    header = node.HeaderRecord(
        0, place.kind, level, count, node.HEADER_SIZE + len(body), place.owner, tag
    )
    k.write(block, (node.HEADER.pack(header) + body).ljust(k.block_size, b"\0"))


def _free(k: Knife, count: int) -> list[int]:
    return [b for b in range(k.geometry.block_count) if not k.tag(b)][-count:]


def _full_body(k: Knife, kind: int, target: int, weight: int = 1) -> tuple[bytes, int]:
    pointer = words.POINTER.pack(target, weight, words.make_tag(1, 1, 1))
    if kind == node.DIRNODE:
        count = (k.block_size - node.HEADER_SIZE) // 24
        return struct.pack(f"<{count}Q", *range(0, 256 * count, 256)) + pointer * count, count
    count = (k.block_size - node.HEADER_SIZE) // words.POINTER_SIZE
    return pointer * count, 0


def cycle(k: Knife, place: Place, length: int) -> None:
    """Nodes of the wanted kind that lead to each other in a ring."""
    kind = place.kind if place.kind in (node.INDEX, node.DIRNODE) else node.INDEX
    ring = _free(k, length)
    for at, block in enumerate(ring):
        body, count = _full_body(k, kind, ring[(at + 1) % length])
        forge(k, block, place._replace(kind=kind), place.level, body, count)
    _point(k, place, ring[0], words.make_tag(1, 1, 1))


def ladder(k: Knife, number: int, height: int) -> None:
    """A tree of few blocks and endlessly many ways: each level leads to the next one only."""
    folder = number == Names.crowd
    kind = node.DIRNODE if folder else node.INDEX
    owner = Place(0, 0, kind, 0, number)
    rungs = _free(k, height + 1)
    leaf = Place(0, 0, node.DIRLEAF, 0, number)
    forge(k, rungs[0], leaf, 0, b"")
    first = 1 if folder else 0
    for level in range(first, height):
        body, count = _full_body(k, kind, rungs[level])
        forge(k, rungs[level + (0 if folder else 1)], owner, level, body, count)
    top = rungs[height - 1] if folder else rungs[height]
    pointer = words.POINTER.pack(top, 1, words.make_tag(1, 1, 1))
    payload = (bytes(8) if folder else b"") + pointer
    k.set_payload(number, payload, height=height, size=k.record(number).size)


def hollow(k: Knife, number: int, height: int, weight: int) -> None:
    """A tree of endlessly many ways that lead to nothing: its last nodes have no pointers."""
    rungs = _free(k, height)
    owner = Place(0, 0, node.INDEX, 0, number)
    for level, block in enumerate(rungs):
        body = b"" if not level else _full_body(k, node.INDEX, rungs[level - 1], weight)[0]
        forge(k, block, owner, level, body)
    pointer = words.POINTER.pack(rungs[-1], weight, words.make_tag(1, 1, 1))
    k.set_payload(number, pointer * 4, payload=inode.MAP, height=height, size=(1 << 62) - 1)


def bounds(k: Knife, number: int, height: int) -> None:
    """A directory tree whose many bounds lead to one leaf without names."""
    tag = words.make_tag(1, 1, 1)
    leaf, *rungs = _free(k, height + 8)
    forge(k, leaf, Place(0, 0, node.DIRLEAF, 0, number), 0, b"")
    below, step = leaf, 256
    for level in range(1, height):
        count = (k.block_size - node.HEADER_SIZE) // 24
        keys = struct.pack(f"<{count}Q", *range(0, step * count, step))
        body = keys + words.POINTER.pack(below, 1, tag) * count
        forge(k, rungs[level], Place(0, 0, node.DIRNODE, 0, number), level, body, count)
        below, step = rungs[level], step * count
    keys = struct.pack("<20Q", *range(0, 20 * step, step))
    k.set_payload(
        number, keys + words.POINTER.pack(below, 1, tag) * 20, payload=inode.DIRTREE, height=height
    )


def attributes(k: Knife, count: int, *, sound: bool) -> None:
    """As many extended attributes as there can be; with not `sound`, the last is out of order."""
    names = [b"a%07d" % number for number in range(count)]
    if not sound:
        names[-1] = names[0]
    raw = b"".join(xattr.encode_one(name, b"") for name in names)
    blocks = _free(k, -(-len(raw) // k.block_size) + 8)
    index, data = blocks[:8], blocks[8:]
    tag, fanout = words.make_tag(1, 1, 1), node.index_fanout(k.block_size)
    pointers = []
    for at, block in enumerate(data):
        k.set_tag(block, tag)
        piece = raw[at * k.block_size : (at + 1) * k.block_size]
        k.write(block, piece.ljust(k.block_size, b"\0"), seal=False)
        pointers.append(words.POINTER.pack(block, 1, tag))
    tops: list[bytes] = []
    owner = Place(0, 0, node.INDEX, 0, Names.far)
    for at in range(0, len(pointers), fanout):
        part = pointers[at : at + fanout]
        forge(k, index[len(tops)], owner, 0, b"".join(part))
        tops.append(words.POINTER.pack(index[len(tops)], 1 + len(part), tag))
    height, top = 1, tops[0]
    if len(tops) > 1:
        forge(k, index[-1], owner, 1, b"".join(tops))
        height, top = 2, words.POINTER.pack(index[-1], 1 + len(tops) + len(pointers), tag)
    k.edit_inode(
        Names.far, xattr_size=len(raw), xattr_inline=0, xattr_height=height, xattr_pointer=top
    )


def endless() -> Iterator[tuple[str, Damage]]:
    """What would take for ever to walk through, or very long."""
    for height in (1, 2, 5, 12):
        for weight in (1, 2, (1 << 32) - 1):
            for who in ("big", "sparse"):
                yield (
                    f"{who} hollow, height {height}, weight {weight:#x}",
                    lambda k, h=height, w=weight, who=who: hollow(k, getattr(Names, who), h, w),  # type: ignore[misc]
                )
    for height in (1, 2, 5):
        for number in ("crowd", "2"):
            yield (
                f"{number}: bounds without names, height {height}",
                lambda k, h=height, who=number: bounds(k, 2 if who == "2" else Names.crowd, h),  # type: ignore[misc]
            )
        yield f"orphans in a ladder of {height}", lambda k, h=height: _orphans(k, h)  # type: ignore[misc]
    for sound in (True, False):
        yield (
            f"attributes without number, sound: {sound}",
            lambda k, sound=sound: attributes(k, 5000, sound=sound),  # type: ignore[misc]
        )


def _orphans(k: Knife, height: int) -> None:
    bounds(k, 2, height)
    k.edit_root(orphans=1 << 40)


def pointers() -> Iterator[tuple[str, Damage]]:
    """Every kind of pointer × every wrong target."""
    for name, find in PLACES.items():
        for what, aim in TARGETS.items():
            yield f"{name} -> {what}", lambda k, find=find, aim=aim: aim(k, find(k))  # type: ignore[misc]


def _to(block: Callable[[Knife, Place], int]) -> Callable[[Knife, Place], None]:
    return lambda k, p: _point(k, p, block(k, p), k.tag(block(k, p)))


TARGETS: dict[str, Callable[[Knife, Place], None]] = {
    "self": _to(lambda k, p: p.block),
    "parent": _to(lambda k, p: k.block_of(p.owner) if p.owner else k.root),
    "root": _to(lambda k, p: k.root),
    "freed": lambda k, p: _point(k, p, k.free_block(), words.make_tag(1, 1, 1)),
    "freed, tag 0": lambda k, p: _point(k, p, k.free_block(), 0),
    "directory leaf": _to(lambda k, p: k.leaf_of(Names.crowd)),
    "data": _to(lambda k, p: k.data_block(Names.big)[1]),
    "another inode": _to(lambda k, p: k.block_of(Names.device)),
    "past the end": lambda k, p: _point(k, p, k.geometry.block_count, 1),
    "far past the end": lambda k, p: _point(k, p, (1 << 32) - 1, WORD),
    "2^63": lambda k, p: k.edit(p.block, p.offset, (1 << 63).to_bytes(8, "little") * 2),
    "huge weight": lambda k, p: k.edit(p.block, p.offset + 4, b"\xff" * 4),
    "cycle of 1": lambda k, p: cycle(k, p, 1),
    "cycle of 2": lambda k, p: cycle(k, p, 2),
    "cycle of 9": lambda k, p: cycle(k, p, 9),
}


def ladders() -> Iterator[tuple[str, Damage]]:
    for height in (2, 5, 12):
        yield f"file ladder of {height}", lambda k, h=height: ladder(k, Names.big, h)  # type: ignore[misc]
        yield f"directory ladder of {height}", lambda k, h=height: ladder(k, Names.crowd, h)  # type: ignore[misc]


def _rename(k: Knife, name: bytes) -> None:
    entries = k.entries(1)
    key, number, _ = entries[0]
    k.set_entries(1, [(key, number, name), *entries[1:]])


def _lead(k: Knife, folder: int, number: int, kind: int) -> None:
    k.edit_entry(folder, 0, lambda key, both: (key, kind << words.SLOT_SHIFT | number))


def _parents(k: Knife, *numbers: int) -> None:
    for at, number in enumerate(numbers):
        k.edit_inode(number, parent=numbers[(at + 1) % len(numbers)])


def names() -> Iterator[tuple[str, Damage]]:
    """Names that cannot be, and directories that contain what they must not."""
    for name in (b"a/b", b"nul\0", b".", b"..", b"/", b"\0", b"\xff" * 255, b"small", b""):
        yield f"name {name[:9]!r}", lambda k, name=name: _rename(k, name)  # type: ignore[misc]
    for what in ("1", "2", "folder", "inner", "gone"):
        number = int(what) if what.isdigit() else getattr(Names, what, 4711)
        yield f"inner contains {what}", lambda k, n=number: _lead(k, Names.inner, n, 4)  # type: ignore[misc]
        yield f"/ contains {what}", lambda k, n=number: _lead(k, 1, n, 8)  # type: ignore[misc]
    yield "own parent", lambda k: _parents(k, Names.inner)
    yield "ring of 2 parents", lambda k: _parents(k, Names.folder, Names.inner)
    yield "ring of 3 parents", lambda k: _parents(k, Names.folder, Names.inner, Names.crowd)
    yield "names of 256", lambda k: k.edit_inode(1, entries=k.record(1).entries + 1)
    yield "twice", lambda k: k.set_entries(1, [k.entries(1)[0], *k.entries(1)])
    yield "no entries", lambda k: k.edit_inode(1, entries=0)


ABSURD: dict[str, tuple[int, ...]] = {
    "mode": (0, 0o170000, 0o040755, 0o120777, 0o100644, 0o060600, (1 << 32) - 1),
    "nlink": (0, 1, 1 << 31, (1 << 32) - 1),
    "size": (0, 1, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, WORD),
    "blocks": (0, (1 << 63), WORD),
    "entries": (0, 1 << 31, (1 << 63), WORD),
    "parent": (0, 2, 1 << 63, WORD),
    "payload": (0, 1, 2, 3, 4, 5, 255),
    "height": (0, 1, 2, 12, 13, 255),
    "xattr_height": (1, 12, 255),
    "payload_size": (0, 1, 16, (1 << 31), (1 << 32) - 1),
    "xattr_size": (0, 1, 1 << 18, 1 << 31, (1 << 32) - 1),
    "xattr_inline": (1, 8, 1 << 31, (1 << 32) - 1),
    "mtime_ns": ((1 << 63) - 1, -(1 << 63)),
}


def inodes() -> Iterator[tuple[str, Damage]]:
    """Absurd inodes."""
    for field, values in ABSURD.items():
        for value in values:
            for who in ("big", "crowd", "far", "near"):
                change = {field: value}
                yield (
                    f"{who}.{field} = {value:#x}",
                    lambda k, who=who, change=change: k.edit_inode(getattr(Names, who), **change),  # type: ignore[misc]
                )

    for size in (4096, 1 << 40, (1 << 62) - 1):
        yield (
            f"link as a map of {size:#x}",
            lambda k, size=size: k.set_payload(  # type: ignore[misc]
                Names.link, words.POINTER.pack(0, 0, 0), payload=inode.MAP, height=12, size=size
            ),
        )


def headers() -> Iterator[tuple[str, Damage]]:
    """Every field of the superblock × ten values, its checksum made good."""
    for field in superblock.SUPERBLOCK.fields:
        for value in VALUES:
            raw = (value & (1 << 8 * min(field.width, 8)) - 1).to_bytes(field.width, "little")

            def damage(
                k: Knife, at: int = field.offset, name: str = field.name, raw: bytes = raw
            ) -> None:
                k.memory.write(at, raw)
                if name != "crc":
                    k.edit_superblock()

            yield f"{field.name} = {value:#x}", damage


def control() -> Iterator[tuple[str, Damage]]:
    """Forged commit and hint words, slots and tags."""
    for value in (*VALUES, words.make_commit(5, 3), words.make_hint(3, 255, 9)):
        for name, at in (("commit", COMMIT_OFFSET), ("hint", HINT_OFFSET)):
            yield f"{name} {value:#x}", lambda k, at=at, value=value: k.memory.store(at, value)  # type: ignore[misc]
        yield f"all slots {value:#x}", lambda k, value=value: _slots(k, value)  # type: ignore[misc]
        yield f"all tags {value:#x}", lambda k, value=value: _tags(k, value)  # type: ignore[misc]
    for state in range(7):
        for counter in (0, 1, words.COUNTER_MASK):
            word = words.make_state(state, words.INCARNATION_MASK, counter)
            yield f"all slots {word:#x}", lambda k, word=word: _slots(k, word)  # type: ignore[misc]
    yield "an older root", replay


def _slots(k: Knife, value: int) -> None:
    for slot in range(k.geometry.peer_count):
        at = k.geometry.peers_offset + slot * peer.SLOT_SIZE
        k.memory.write(at, value.to_bytes(8, "little") * (peer.SLOT_SIZE // 8))


def _tags(k: Knife, value: int) -> None:
    for block in range(k.geometry.block_count):
        k.set_tag(block, value)


def replay(k: Knife) -> None:
    """An older root, valid in all that it says of itself, published again."""
    sequence, root = words.split_commit(k.memory.load(COMMIT_OFFSET))
    for block in range(k.geometry.block_count):
        header = node.HEADER.unpack(k.read(block))
        if header.kind == node.ROOT and block != root:
            k.set_tag(block, header.tag)
            k.memory.store(COMMIT_OFFSET, words.make_commit(sequence + 1, block))
            return
    raise AssertionError("the sample has no older root")
