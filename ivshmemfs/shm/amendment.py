"""Amendments: another label, another UUID, or a larger region, for a filesystem that exists.

An amendment changes the superblock and its copy, and no block.  It excludes all peers as a repair
does (`shm/repair.py`), because a superblock cannot be stored in one piece:

    open     -> (take the repair slot, mark)   peers wait; the commit word before is kept
    marked   -> (store what the new superblock needs: a tag table)
    marked   -> (store the copy, then the superblock)
    marked   -> (clear the former tag table, publish the former root)   peers go on
    open

A death before the mark leaves the filesystem as it was.  A death after it leaves the mark.  At each
moment the superblock or its copy is whole.  The same amendment, run again, goes on from there, and
so does fsck.  Only `enlarge` can go on before it has stored the copy: until then no superblock has
the region's size.

A larger region gets its tag table at its end.  Nothing that is in use moves, and nothing is stored
over it before both superblocks are new.  The former tag table is cleared last: a mount for reading
that still uses the former geometry finds no block there, and reads nothing wrong.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from ivshmemfs.errors import (
    Corrupt,
    GeometryMismatch,
    InUse,
    IvshmemfsError,
    NotFormatted,
    RegionSize,
    UnsupportedVersion,
)
from ivshmemfs.format import geometry as geo
from ivshmemfs.format import superblock, words
from ivshmemfs.format.geometry import COMMIT_OFFSET
from ivshmemfs.shm.exclusion import count_and_names
from ivshmemfs.shm.repair import RepairSession, repairing
from ivshmemfs.shm.watch import living

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ivshmemfs.format.geometry import Geometry
    from ivshmemfs.format.superblock import Superblock
    from ivshmemfs.region import Memory

_SIZE: Final = superblock.SUPERBLOCK.size
PIECE: Final = 1 << 20  # bytes of a tag table that are copied between two signs of life


def rename(
    memory: Memory, *, label: str | None = None, uuid: bytes | None = None, force: bool = False
) -> None:
    """Give the filesystem on a region another label or UUID.

    With `force` also under living peers: they go on, and show the former names.  Raises ValueError
    for a label that is too long, InUse, and what `superblock.decode` raises.
    """
    raw, found = _present(memory)
    new = superblock.amended(raw, label=label, uuid=uuid)
    advice = " (--force changes it under them, and they go on)"
    with _session(memory, found.geometry, force=force, advice=advice) as turn:
        _store_both(memory, turn, new)


def enlarged(memory: Memory, size: int) -> Geometry:
    """Return the geometry that the filesystem on a region gets with `size` bytes; stores nothing.

    Raises RegionSize when that is impossible, and what `superblock.decode` raises.
    """
    _, found = _present(memory, any_size=True)
    return _grown(found.geometry, size)


def enlarge(memory: Memory) -> Geometry | None:
    """Give the filesystem all the bytes of its region; return its geometry before.

    Returns None if it has them already.  Raises InUse when peers may be alive, RegionSize when that
    is impossible, and what `superblock.decode` raises.
    """
    raw, found = _present(memory, any_size=True)
    old = found.geometry
    if old.region_size == memory.length:
        if not words.under_repair(memory.load(COMMIT_OFFSET)):
            return None
        with _session(memory, old) as turn:  # of an amendment that died
            _store_both(memory, turn, raw)
        return old
    new = _grown(old, memory.length)
    with _session(memory, old) as turn:
        _copy_tags(memory, turn, old, new)
        _store_both(memory, turn, superblock.amended(raw, geometry=new))
        turn.check()
        memory.zero(old.tags_offset, old.block_count * words.WORD)
    return old


def needs_size(page: bytes, size: int) -> bool:
    """Return whether the first page of a region allows no other size than `size` any more.

    An amendment is under way then, or a superblock states that size.
    """
    for at in (superblock.OFFSET, superblock.COPY_OFFSET):
        raw = page[at : at + _SIZE]
        if superblock.crc_valid(raw) and superblock.SUPERBLOCK.unpack(raw).region_size == size:
            return True
    return repairing(page)


def refuse_living(
    memory: Memory, found: Geometry, *, force: bool = False, advice: str = ""
) -> None:
    """Raise InUse with the names of all peers that may be alive, unless `force`."""
    if force:
        return
    if live := living(memory, found):
        raise InUse(
            f"the region is in use by {count_and_names(live)}; unmount it there first, or let go "
            f"of a machine that is gone with ivshmemfs evict{advice}"
        )


def _grown(old: Geometry, size: int) -> Geometry:
    try:
        return geo.grown(old, size)
    except ValueError as error:
        raise RegionSize(f"the filesystem cannot have {size} bytes: {error}") from None


def _present(memory: Memory, *, any_size: bool = False) -> tuple[bytes, Superblock]:
    """Return the superblock to go on from, as bytes and decoded.

    Its copy counts only under a mark: then an amendment died while it stored the superblock.
    `any_size` admits a superblock that states fewer bytes than the region has.
    """
    raw = memory.read(superblock.OFFSET, _SIZE)
    candidates = [raw]
    if words.under_repair(memory.load(COMMIT_OFFSET)):
        candidates.append(memory.read(superblock.COPY_OFFSET, _SIZE))
    good: list[tuple[bytes, Superblock]] = []
    errors: list[IvshmemfsError] = []
    for candidate in candidates:
        try:
            good.append((candidate, superblock.decode(candidate)))
        except IvshmemfsError as error:
            errors.append(error)
    good.sort(key=lambda pair: pair[1].geometry.region_size != memory.length)  # stable
    if not good:
        raise errors[0]
    chosen, found = good[0]
    stated = found.geometry.region_size
    if stated > memory.length or (stated < memory.length and not any_size):
        superblock.decode(chosen, memory.length)  # raises, and says what to do
        raise GeometryMismatch(f"the filesystem has {stated} bytes")
    if found.read_only:
        raise UnsupportedVersion(
            "the filesystem has features that this program may not write: use a newer version of "
            "ivshmemfs"
        )
    return chosen, found


@contextmanager
def _session(
    memory: Memory, found: Geometry, *, force: bool = False, advice: str = ""
) -> Iterator[RepairSession]:
    """Exclude all peers meanwhile; they find the root as it was."""
    if memory.load(COMMIT_OFFSET) == 0:
        raise NotFormatted("the region is being formatted, or its mkfs died: run mkfs.ivshmemfs")
    refuse_living(memory, found, force=force, advice=advice)
    turn = RepairSession(memory, found, amends=True)
    turn.take(force=False)
    try:
        refuse_living(
            memory, found, force=force, advice=advice
        )  # a peer may have joined before the mark
        if not turn.former:
            raise Corrupt(
                "the repair slot does not say which root was there: run fsck.ivshmemfs -y"
            )
        yield turn
    except BaseException:  # also a signal
        if not turn.must_end:
            turn.give_up()
        raise
    turn.publish(words.split_commit(turn.former)[1])


def _store_both(memory: Memory, turn: RepairSession, new: bytes) -> None:
    """Store the copy, then the superblock.  From here on there is no way back."""
    turn.must_end = True
    for offset in (superblock.COPY_OFFSET, superblock.OFFSET):
        turn.check()
        memory.write(offset, new)
        memory.fence()


def _copy_tags(memory: Memory, turn: RepairSession, old: Geometry, new: Geometry) -> None:
    size = old.block_count * words.WORD
    for at in range(0, size, PIECE):
        turn.check()
        turn.beat()
        memory.write(new.tags_offset + at, memory.read(old.tags_offset + at, min(PIECE, size - at)))
    turn.check()
    memory.zero(new.tags_offset + size, new.block_count * words.WORD - size)
    memory.fence()
