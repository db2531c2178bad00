"""The declarative codec of control-message bodies: a dataclass's annotations are its layout.

Little-endian, no padding, fields in order of declaration. Fixed schemas: a body has exactly one encoding, and
bytes left over are refused. Counts and lengths are checked against their limit and against what is left of
the body before anything is built from them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cache
from itertools import chain
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar, get_type_hints

from protocol.constants import DISK_MAX_BYTES, ID_BYTES, NAME_MAX_BYTES, SECTOR_BYTES

T = TypeVar("T")


class Interval(NamedTuple):
    """Bytes [start, end) of a disk; multiples of 512."""

    start: int
    end: int


class Malformed(ValueError):
    """A body does not fit its schema; the text says where and why."""


class Reader:
    """A cursor over a body that refuses to read past its end."""

    __slots__ = ("_position", "_view")

    def __init__(self, body: bytes | bytearray | memoryview) -> None:
        self._view = memoryview(body)
        self._position = 0

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self._view) - self._position

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes."""
        if count > self.left:
            raise Malformed(f"{count} bytes announced, {self.left} left")
        start = self._position
        self._position += count
        return self._view[start : self._position]


class Codec(Protocol):
    """How one field is laid out."""

    def encode(self, value: Any, out: bytearray) -> None:
        """Append the field; ``Malformed`` if the value does not fit."""

    def decode(self, reader: Reader) -> Any:
        """Read the field; ``Malformed`` if the bytes do not fit."""

    def layout(self) -> str:
        """The field's type in SPEC.md's notation."""


@dataclass(frozen=True, slots=True)
class Unsigned:
    """An unsigned integer of 1, 2, 4 or 8 bytes."""

    width: int

    def encode(self, value: int, out: bytearray) -> None:  # noqa: D102 - Codec
        try:
            out += value.to_bytes(self.width, "little")
        except OverflowError:
            raise Malformed(f"{value} does not fit {self.layout()}") from None

    def decode(self, reader: Reader) -> int:  # noqa: D102
        return int.from_bytes(reader.take(self.width), "little")

    def layout(self) -> str:  # noqa: D102
        return f"u{self.width * 8}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One byte that is a member of an enumeration (or a boolean)."""

    kind: type[IntEnum] | type[bool]

    def encode(self, value: int, out: bytearray) -> None:  # noqa: D102
        try:
            out.append(self.kind(value))
        except ValueError:
            raise Malformed(f"{value} is no {self.kind.__name__}") from None

    def decode(self, reader: Reader) -> IntEnum | bool:  # noqa: D102
        value = reader.take(1)[0]
        if self.kind is bool and value > 1:
            raise Malformed(f"{value} is neither 0 nor 1")
        try:
            return self.kind(value)
        except ValueError:
            raise Malformed(f"{value} is no {self.kind.__name__}") from None

    def layout(self) -> str:  # noqa: D102
        return "bool" if self.kind is bool else f"u8 {self.kind.__name__}"


@dataclass(frozen=True, slots=True)
class Fixed:
    """Exactly ``size`` bytes."""

    size: int

    def encode(self, value: bytes, out: bytearray) -> None:  # noqa: D102
        if len(value) != self.size:
            raise Malformed(f"{len(value)} bytes given, {self.size} wanted")
        out += value

    def decode(self, reader: Reader) -> bytes:  # noqa: D102
        return bytes(reader.take(self.size))

    def layout(self) -> str:  # noqa: D102
        return f"bytes[{self.size}]"


@dataclass(frozen=True, slots=True)
class Opaque:
    """A u32 length and that many bytes, at most ``limit``."""

    limit: int

    def encode(self, value: bytes, out: bytearray) -> None:  # noqa: D102
        if len(value) > self.limit:
            raise Malformed(f"{len(value)} bytes given, {self.limit} allowed")
        out += len(value).to_bytes(4, "little")
        out += value

    def decode(self, reader: Reader) -> bytes:  # noqa: D102
        length = int.from_bytes(reader.take(4), "little")
        if length > self.limit:
            raise Malformed(f"{length} bytes announced, {self.limit} allowed")
        return bytes(reader.take(length))

    def layout(self) -> str:  # noqa: D102
        return f"bytes<={self.limit}"


@dataclass(frozen=True, slots=True)
class Text:
    """A u16 length and that many bytes of UTF-8, at most ``limit`` bytes."""

    limit: int

    def encode(self, value: str, out: bytearray) -> None:  # noqa: D102
        try:
            data = value.encode()
        except UnicodeEncodeError:
            raise Malformed("text has lone surrogates, which UTF-8 cannot say") from None
        if len(data) > self.limit:
            raise Malformed(f"text of {len(data)} bytes given, {self.limit} allowed")
        out += len(data).to_bytes(2, "little")
        out += data

    def decode(self, reader: Reader) -> str:  # noqa: D102
        length = int.from_bytes(reader.take(2), "little")
        if length > self.limit:
            raise Malformed(f"text of {length} bytes announced, {self.limit} allowed")
        try:
            return str(reader.take(length), "utf-8")
        except UnicodeDecodeError:
            raise Malformed("text is not UTF-8") from None

    def layout(self) -> str:  # noqa: D102
        return f"text<={self.limit}"


@dataclass(frozen=True, slots=True)
class Items:
    """A u32 count and that many records of one dataclass, at most ``limit``."""

    kind: type
    limit: int

    def encode(self, value: tuple[Any, ...], out: bytearray) -> None:  # noqa: D102
        if len(value) > self.limit:
            raise Malformed(f"{len(value)} items given, {self.limit} allowed")
        out += len(value).to_bytes(4, "little")
        for item in value:
            _encode_into(item, out)

    def decode(self, reader: Reader) -> tuple[Any, ...]:  # noqa: D102
        count = int.from_bytes(reader.take(4), "little")
        if count > min(self.limit, reader.left):  # every record has at least one byte
            raise Malformed(f"{count} items announced, {self.limit} allowed, {reader.left} bytes left")
        return tuple(_decode_from(self.kind, reader) for _ in range(count))

    def layout(self) -> str:  # noqa: D102
        return f"list<={self.limit} of {self.kind.__name__}"


@dataclass(frozen=True, slots=True)
class Intervals:
    """A u32 count and that many (u64 start, u64 end): sorted, disjoint, not touching, whole sectors."""

    limit: int

    def encode(self, value: tuple[Interval, ...], out: bytearray) -> None:  # noqa: D102
        if len(value) > self.limit:
            raise Malformed(f"{len(value)} intervals given, {self.limit} allowed")
        _check_intervals(value)
        out += len(value).to_bytes(4, "little")
        out += struct.pack(f"<{2 * len(value)}Q", *chain.from_iterable(value))

    def decode(self, reader: Reader) -> tuple[Interval, ...]:  # noqa: D102
        count = int.from_bytes(reader.take(4), "little")
        if count > self.limit:
            raise Malformed(f"{count} intervals announced, {self.limit} allowed")
        found = tuple(map(Interval._make, struct.iter_unpack("<QQ", reader.take(count * 16))))
        _check_intervals(found)
        return found

    def layout(self) -> str:  # noqa: D102
        return f"intervals<={self.limit}"


def _check_intervals(intervals: Iterable[Interval]) -> None:
    last = -1
    for start, end in intervals:
        if not last < start < end <= DISK_MAX_BYTES or start % SECTOR_BYTES or end % SECTOR_BYTES:
            raise Malformed(f"interval [{start}, {end}) after {last}: unsorted, touching, empty, not sectors")
        last = end


U8 = Annotated[int, Unsigned(1)]
U16 = Annotated[int, Unsigned(2)]
U32 = Annotated[int, Unsigned(4)]
U64 = Annotated[int, Unsigned(8)]
Flag = Annotated[bool, Choice(bool)]
Id = Annotated[bytes, Fixed(ID_BYTES)]
Name = Annotated[str, Text(NAME_MAX_BYTES)]


@cache
def schema(kind: type) -> tuple[tuple[str, Codec], ...]:
    """(field name, codec) of a message or record dataclass, in wire order."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple((field.name, hints[field.name].__metadata__[0]) for field in fields(kind))


def _encode_into(record: Any, out: bytearray) -> None:
    kind: type = type(record)
    for name, codec in schema(kind):
        codec.encode(getattr(record, name), out)


def _decode_from(kind: type, reader: Reader) -> Any:
    return kind(*[codec.decode(reader) for _, codec in schema(kind)])


def encode(message: Any) -> bytes:
    """The body of a control message; ``Malformed`` if a value breaks the schema."""
    out = bytearray()
    _encode_into(message, out)
    return bytes(out)


def decode(kind: type[T], body: bytes | bytearray | memoryview) -> T:
    """A message from its body; ``Malformed`` says what does not fit, bytes left over included."""
    reader = Reader(body)
    message: T = _decode_from(kind, reader)
    if reader.left:
        raise Malformed(f"{reader.left} bytes left over")
    return message
