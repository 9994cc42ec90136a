"""The superblock: the format's version, the filesystem's identity, and the geometry.

mkfs writes it.  Only an amendment changes it afterwards (`shm/amendment.py`): another label,
another UUID, a larger region.  fsck can restore it from the copy at `COPY_OFFSET`.
"""

import uuid as _uuid
from _blake2 import blake2b  # hashlib has the same, and loads OpenSSL before it
from typing import Annotated, NamedTuple

from ivshmemfs import __version__
from ivshmemfs.errors import (
    Corrupt,
    ForeignFormat,
    GeometryMismatch,
    NotFormatted,
    UnsupportedVersion,
)
from ivshmemfs.format import open_filter, peer, words
from ivshmemfs.format.geometry import CONTROL_SIGNATURE, Geometry
from ivshmemfs.format.record import At, Buffer, Layout
from ivshmemfs.native import crc32c
from ivshmemfs.printing import shown

MAGIC = b"IVSHMFS\x01"
MAJOR = 1
MINOR = 0
LABEL_SIZE = 64
MAKER_SIZE = 16

# Feature bits that this version knows.  It ignores an unknown compat bit, mounts read-only with an
# unknown ro_compat bit, and refuses an unknown incompat bit.
#: ro_compat: writers keep each other's locks (`format/lock.py`).  Older programs may only read.
LOCKS = 1
#: ro_compat: writers change the data of fixed files in place, and never move it.
FIXED = 2
KNOWN_COMPAT = 0
KNOWN_RO_COMPAT = LOCKS | FIXED
#: incompat: the tag table lies behind the blocks, because the filesystem was made larger.
TAGS_BEHIND = 1
KNOWN_INCOMPAT = TAGS_BEHIND

OFFSET = 0
COPY_OFFSET = 2048


class SuperblockRecord(NamedTuple):
    """The superblock on the region."""

    magic: Annotated[bytes, At(0, "8s", "names the format")]
    major: Annotated[int, At(8, "H", "version; another major is refused")]
    minor: Annotated[int, At(10, "H", "version; a newer minor is refused")]
    size: Annotated[int, At(12, "I", "bytes of this record")]
    compat: Annotated[int, At(16, "Q", "features that any version may ignore")]
    ro_compat: Annotated[int, At(24, "Q", "features that a reader may ignore")]
    incompat: Annotated[int, At(32, "Q", "features that must be understood")]
    uuid: Annotated[bytes, At(40, "16s", "identity of this filesystem")]
    label: Annotated[bytes, At(56, "64s", "name given by the user, UTF-8, zero-padded")]
    region_size: Annotated[int, At(120, "Q", "bytes of the region")]
    block_size: Annotated[int, At(128, "I", "bytes of a block, a power of two")]
    peer_count: Annotated[int, At(132, "I", "slots of the peer table, 1 to 255")]
    block_count: Annotated[int, At(136, "Q", "blocks")]
    peers_offset: Annotated[int, At(144, "Q", "where the peer table starts")]
    tags_offset: Annotated[int, At(152, "Q", "where the block tags start")]
    data_offset: Annotated[int, At(160, "Q", "where block 0 starts")]
    reserve: Annotated[int, At(168, "Q", "blocks that only removals may use")]
    layout_signature: Annotated[int, At(176, "Q", "folds the layout of all that changes in place")]
    created_ns: Annotated[int, At(184, "q", "when it was formatted, ns since 1970 by that clock")]
    seed: Annotated[bytes, At(192, "16s", "the first UUID, which root blocks and names depend on")]
    maker: Annotated[bytes, At(208, "16s", "version of the program that made it, zero-padded")]
    crc: Annotated[int, At(508, "I", "CRC32C of bytes 0 to 507")]


SUPERBLOCK = Layout(SuperblockRecord, 512)


def layout_signature() -> int:
    """Return one number for the layout of everything that peers store to in place.

    Builds with different numbers would misread each other's words, so they refuse each other.  The
    idea is LMDB's lock format number.
    """
    text = "|".join(
        (
            peer.SLOT.signature(),
            words.POINTER_LAYOUT.signature(),
            CONTROL_SIGNATURE,
            f"tag 8/20/36 commit 36/{words.BLOCK_BITS} filter {open_filter.BITS}",
            f"filter words {open_filter.WORDS} at {peer.FILTER_OFFSET}",
            f"seed {SUPERBLOCK.offset('seed')}",
        )
    )
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def fsid_of(seed: bytes) -> int:
    """Return the number that every root block repeats: the first eight bytes of the first UUID."""
    return int.from_bytes(seed[:8], "little")


class Superblock(NamedTuple):
    """A checked superblock."""

    uuid: bytes
    label: str
    geometry: Geometry
    created_ns: int
    read_only: bool  # an unknown ro_compat feature forbids writing
    shares_locks: bool  # every writer knows of the locks of inodes
    keeps_fixed: bool  # every writer knows of fixed files
    seed: bytes  # the UUID that mkfs gave; root blocks and the hashes of names depend on it

    @property
    def fsid(self) -> int:
        """The first eight bytes of the seed, which every root block repeats."""
        return fsid_of(self.seed)

    def same_filesystem(self, other: "Superblock") -> bool:
        """Return whether both are of one filesystem of one size; its names may have changed."""
        return self == other._replace(uuid=self.uuid, label=self.label)


def encode(
    uuid: bytes, label: str, geometry: Geometry, created_ns: int, maker: str = __version__
) -> bytes:
    """Return the 512 bytes of a new superblock; ValueError when the label is too long."""
    name = encode_label(label)
    record = SuperblockRecord(
        MAGIC, MAJOR, MINOR, SUPERBLOCK.size, 0, LOCKS | FIXED, 0, uuid, name,
        geometry.region_size, geometry.block_size, geometry.peer_count, geometry.block_count,
        geometry.peers_offset, geometry.tags_offset, geometry.data_offset, geometry.reserve,
        layout_signature(), created_ns, uuid, maker.encode()[:MAKER_SIZE], 0,
    )  # fmt: skip
    return seal(record)


def amended(
    raw: Buffer,
    *,
    uuid: bytes | None = None,
    label: str | None = None,
    geometry: Geometry | None = None,
) -> bytes:
    """Return a superblock with some fields changed; ValueError when the label is too long."""
    record = SUPERBLOCK.unpack(raw)
    if uuid is not None:
        record = record._replace(uuid=uuid)
    if label is not None:
        record = record._replace(label=encode_label(label))
    if geometry is not None:
        behind = geometry.tags_offset > geometry.data_offset
        record = record._replace(
            **geometry._asdict(), incompat=record.incompat | (TAGS_BEHIND if behind else 0)
        )
    return seal(record)


def encode_label(label: str) -> bytes:
    """Return the bytes of a label; ValueError when it is too long, or not UTF-8 text."""
    try:
        name = label.encode()
    except UnicodeEncodeError:
        raise ValueError("a label is UTF-8 text") from None
    if len(name) > LABEL_SIZE:
        raise ValueError(f"a label has at most {LABEL_SIZE} bytes; this one has {len(name)}")
    if b"\0" in name:
        raise ValueError("a label has no NUL byte")
    return name


def seal(record: SuperblockRecord) -> bytes:
    """Return the bytes of `record` with the right checksum."""
    raw = SUPERBLOCK.pack(record)
    return SUPERBLOCK.pack(record._replace(crc=crc32c(raw[: SUPERBLOCK.offset("crc")])))


def geometry_of(record: SuperblockRecord) -> Geometry:
    """Return the geometry that a superblock states, unchecked."""
    return Geometry(
        record.region_size, record.block_size, record.peer_count, record.block_count,
        record.peers_offset, record.tags_offset, record.data_offset, record.reserve,
    )  # fmt: skip


def crc_valid(raw: Buffer) -> bool:
    """Return whether the checksum in a superblock's 512 bytes is right."""
    crc_at = SUPERBLOCK.offset("crc")
    return crc32c(bytes(raw[:crc_at])) == SUPERBLOCK.unpack(raw).crc


def _made_by(record: SuperblockRecord) -> str:
    """Return which version made the filesystem, as a part of a sentence."""
    maker = shown(record.maker.rstrip(b"\0"))
    return f", made by ivshmemfs {maker}" if maker else ", made by another build"


def check_version(record: SuperblockRecord) -> None:
    """Raise UnsupportedVersion unless this program can use the filesystem of `record`."""
    if record.major != MAJOR or record.minor > MINOR:
        raise UnsupportedVersion(
            f"the filesystem has format {record.major}.{record.minor}{_made_by(record)}, and "
            f"this is ivshmemfs {__version__}, which knows {MAJOR}.{MINOR}: use a matching "
            "version of ivshmemfs"
        )
    if unknown := record.incompat & ~KNOWN_INCOMPAT:
        raise UnsupportedVersion(
            f"the filesystem uses features (incompat {unknown:#x}) that this ivshmemfs "
            f"{__version__} does not know{_made_by(record)}: use a newer version of ivshmemfs"
        )
    if record.layout_signature != layout_signature():
        raise UnsupportedVersion(
            f"the shared words of the filesystem{_made_by(record)}, are laid out differently from "
            f"those of this ivshmemfs {__version__}: use the same version of ivshmemfs on all "
            "machines"
        )


def decode(raw: Buffer, region_size: int | None = None) -> Superblock:
    """Check the superblock at the start of `raw` (at least 512 bytes).

    `region_size` is the size of the mapping in bytes.  Raises NotFormatted, ForeignFormat,
    UnsupportedVersion, GeometryMismatch or Corrupt; each message says what to do.
    """
    if len(raw) < SUPERBLOCK.size:
        raise NotFormatted("the region is too small to carry a filesystem")
    record = SUPERBLOCK.unpack(raw)
    if record.magic != MAGIC:
        if not any(bytes(raw[: SUPERBLOCK.size])):
            raise NotFormatted(
                "no filesystem on the region, which begins with zeros (mkfs.ivshmemfs makes one "
                "where there is nothing)"
            )
        if not bytes(raw[: SUPERBLOCK.size]).strip(b"\xff"):
            raise ForeignFormat(
                "the region reads as nothing but ones: its device is switched off or gone, or "
                "it was overwritten; look at it from another machine"
            )
        raise ForeignFormat(
            "the region carries something else than an ivshmemfs filesystem: is it the right "
            "file or device? ('ivshmemfs list' shows what there is)"
        )
    if not crc_valid(raw):
        raise Corrupt("the superblock's checksum is wrong: run fsck.ivshmemfs -y on the region")
    check_version(record)
    geometry = geometry_of(record)
    if problem := geometry.problem():
        raise Corrupt(f"the superblock's geometry is impossible: {problem}")
    if region_size is not None and region_size != geometry.region_size:
        if region_size > geometry.region_size:
            relation, advice = "larger", "run 'ivshmemfs resize' on it, or give it its old size"
        else:  # a file that was cut, or a guest from before the host made the file larger
            relation = "smaller"
            advice = (
                "give a file its old size with 'truncate'; start a guest again with the size of "
                "the host's file in QEMU's options"
            )
        raise GeometryMismatch(
            f"the region has {region_size} bytes, {relation} than the {geometry.region_size} "
            f"bytes of its filesystem: {advice}"
        )
    label = record.label.rstrip(b"\0").decode(errors="replace")
    read_only = bool(record.ro_compat & ~KNOWN_RO_COMPAT)
    return Superblock(
        record.uuid, label, geometry, record.created_ns, read_only,
        shares_locks=bool(record.ro_compat & LOCKS),
        keeps_fixed=bool(record.ro_compat & FIXED),
        seed=record.seed,
    )  # fmt: skip


def identify(raw: Buffer) -> tuple[str, str] | None:
    """Return (label, UUID text) of the filesystem that starts with `raw`, or None."""
    if len(raw) < SUPERBLOCK.size:
        return None
    record = SUPERBLOCK.unpack(raw)
    if record.magic != MAGIC or not crc_valid(raw):
        return None
    return record.label.rstrip(b"\0").decode(errors="replace"), str(_uuid.UUID(bytes=record.uuid))
