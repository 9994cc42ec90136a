"""The declaration of a record: a NamedTuple whose annotations give offset, code and meaning.

    class Sample(NamedTuple):
        length: Annotated[int, At(0, "Q", "bytes in use")]

    SAMPLE = Layout(Sample, size=16)

`Layout` makes one `struct.Struct` of the declaration (little-endian, gaps zero-filled), so packing
and unpacking cost one struct call each.  `dump` and docs/format.md print their tables from the same
fields.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final, Generic, NamedTuple, TypeVar, get_args, get_origin

from ivshmemfs.native import changed_tuple, packed_tuple, placed_tuple

T = TypeVar("T", bound=tuple[Any, ...])
Buffer = bytes | bytearray | memoryview
# Names of this module are bound by the compiler; those of others are looked up at each use.
_changed_tuple: Final = changed_tuple
_packed_tuple: Final = packed_tuple
_placed_tuple: Final = placed_tuple


class At(NamedTuple):
    """The place of a field: byte offset in its record, struct code, meaning."""

    offset: int
    code: str
    doc: str


class Field(NamedTuple):
    """One row of a field table; offset and width in bytes."""

    name: str
    offset: int
    width: int
    code: str
    doc: str


def _fields(cls: type) -> Iterator[Field]:
    for name, annotation in cls.__annotations__.items():
        origin: object = get_origin(annotation)
        if origin is not Annotated:
            raise TypeError(f"{cls.__name__}.{name} has no offset (At)")
        at = next(a for a in get_args(annotation)[1:] if isinstance(a, At))
        yield Field(name, at.offset, struct.calcsize("<" + at.code), at.code, at.doc)


def _row(field: Field) -> bytes:
    """Return a field's row in the plan of `packed_tuple`: offset, width, kind of value."""
    code = field.code[-1:]
    kind = b"b" if code == "s" else b"s" if code.islower() else b"u"
    return struct.pack("<HHcx", field.offset, field.width, kind)


class Layout(Generic[T]):
    """Packs and unpacks one record type; `size` in bytes."""

    def __init__(self, cls: type[T], size: int) -> None:
        self.cls = cls
        self.name = cls.__name__
        self.size: Final = size
        self.fields = tuple(_fields(cls))
        self._struct = struct.Struct(self._format())
        if self._struct.size != size:
            raise TypeError(f"{self.name} takes {self._struct.size} bytes, not {size}")
        self.plan: Final = b"".join(map(_row, self.fields))  # of `packed_tuple` and `record_node`
        self.unpack_values = self._struct.unpack_from
        self._offsets = {field.name: field.offset for field in self.fields}
        self._places = {field.name: place for place, field in enumerate(self.fields)}

    def _format(self) -> str:
        parts, at = ["<"], 0
        for field in self.fields:
            if field.offset < at:
                raise TypeError(f"{self.name}.{field.name} overlaps the field before it")
            if field.code in "QqIiHh" and field.offset % field.width:
                raise TypeError(f"{self.name}.{field.name} is not aligned")
            if field.offset > at:
                parts.append(f"{field.offset - at}x")
            parts.append(field.code)
            at = field.offset + field.width
        if self.size > at:
            parts.append(f"{self.size - at}x")
        return "".join(parts)

    def unpack(self, buffer: Buffer, offset: int = 0) -> T:
        """Return the record at `offset` of `buffer`; raises struct.error if it is too short."""
        return self._made(self._struct.unpack_from(buffer, offset))

    def _made(self, values: Iterable[Any]) -> T:
        record: T = tuple.__new__(self.cls, values)
        return record

    def changed(self, record: T, changes: dict[str, Any]) -> T:
        """Return the record with other values in the fields that `changes` names."""
        new: T = _changed_tuple(record, self._places, changes)
        return new

    def pack(self, record: T) -> bytes:
        """Return `size` bytes; raises struct.error if a value does not fit its field."""
        return _packed_tuple(record, self.plan, self.size)

    def plan_of(self, *names: str) -> bytes:
        """Return the plan of these fields in this order, for `record_node`."""
        return b"".join([_row(self.fields[self._places[name]]) for name in names])

    def places(self, *names: str) -> tuple[int, ...]:
        """Return the places of these fields in the record, for `placed`."""
        return tuple([self._places[name] for name in names])

    def placed(self, record: T, places: tuple[int, ...], values: tuple[Any, ...]) -> T:
        """Return the record with other values at these places; `changed` for hot paths."""
        return _placed_tuple(record, places, values)

    def offset(self, name: str) -> int:
        """Return the byte offset of a field in the record."""
        return self._offsets[name]

    def signature(self) -> str:
        """Return a text that changes with any field's name, place or width."""
        columns = ",".join(f"{f.name}@{f.offset}:{f.code}" for f in self.fields)
        return f"{self.name}[{self.size}]({columns})"
