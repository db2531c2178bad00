"""The codec of control bodies: one encoding for every value, and a refusal for everything else."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any

import pytest

from protocol.constants import DISK_MAX_BYTES
from protocol.messages import COVERAGE_INTERVALS_MAX, NO_ID, DiskCoverage, Interval, Mode
from protocol.wire import (
    U8,
    U16,
    U32,
    U64,
    Choice,
    Fixed,
    Flag,
    Intervals,
    Items,
    Malformed,
    Opaque,
    Text,
    Unsigned,
    decode,
    encode,
    schema,
)


class Colour(IntEnum):
    RED = 1
    BLUE = 4


@dataclass(frozen=True, slots=True)
class Leaf:
    number: U8
    text: Annotated[str, Text(8)]


@dataclass(frozen=True, slots=True)
class Everything:
    a: U8
    b: U16
    c: U32
    d: U64
    flag: Flag
    colour: Annotated[Colour, Choice(Colour)]
    fixed: Annotated[bytes, Fixed(3)]
    opaque: Annotated[bytes, Opaque(5)]
    text: Annotated[str, Text(6)]
    leaves: Annotated[tuple[Leaf, ...], Items(Leaf, 2)]
    intervals: Annotated[tuple[Interval, ...], Intervals(2)]


VALUE = Everything(
    1,
    0x0203,
    0x04050607,
    0x08090A0B0C0D0E0F,
    True,
    Colour.BLUE,
    b"abc",
    b"de",
    "fög",
    (Leaf(7, "x"),),
    (Interval(512, 1024),),
)
BODY = bytes.fromhex(
    "01 0302 07060504 0f0e0d0c0b0a0908 01 04 616263 02000000 6465 0400 66c3b667"
    "01000000 07 0100 78 01000000 0002000000000000 0004000000000000"
)


def one(codec: Any) -> type:
    """A record with a single field."""

    @dataclass(frozen=True, slots=True)
    class One:
        field: Annotated[Any, codec]

    One.__annotations__["field"] = Annotated[Any, codec]
    return One


def test_every_kind_of_field_has_the_bytes_of_the_specification() -> None:
    assert encode(VALUE) == BODY
    assert decode(Everything, BODY) == VALUE
    assert decode(Everything, memoryview(bytearray(BODY))) == VALUE


def test_every_truncation_is_refused() -> None:
    for length in range(len(BODY)):
        with pytest.raises(Malformed):
            decode(Everything, BODY[:length])


def test_bytes_left_over_are_refused() -> None:
    with pytest.raises(Malformed, match="1 bytes left over"):
        decode(Everything, BODY + b"\0")


@pytest.mark.parametrize(
    ("codec", "body"),
    [
        (Choice(bool), "02"),
        (Choice(bool), "ff"),
        (Choice(Colour), "00"),
        (Choice(Colour), "02"),
        (Opaque(5), "06000000 000000000000"),
        (Opaque(5), "ffffffff"),
        (Text(6), "0700 61616161616161"),
        (Text(6), "ffff"),
        (Text(6), "0100 80"),  # a byte that begins nothing
        (Text(6), "0200 c080"),  # overlong NUL
        (Text(6), "0300 e08080"),  # overlong
        (Text(6), "0300 eda080"),  # a surrogate
        (Text(6), "0400 f4908080"),  # past U+10FFFF
        (Text(6), "0200 e282"),  # cut off
        (Text(6), "0100 ff"),
        (Items(Leaf, 2), "03000000 010000 010000 010000"),
        (Items(Leaf, 2), "ffffffff"),
        (Intervals(2), "03000000" + "00" * 48),
        (Intervals(2), "ffffffff"),
        (Intervals(2), "01000000" + f"{512:016x}"),
    ],
)
def test_a_field_that_does_not_fit_is_refused(codec: Any, body: str) -> None:
    with pytest.raises(Malformed):
        decode(one(codec), bytes.fromhex(body))


BAD_INTERVALS: list[tuple[str, list[tuple[int, int]]]] = [
    ("empty", [(512, 512)]),
    ("reversed", [(1024, 512)]),
    ("start inside a sector", [(1, 512)]),
    ("end inside a sector", [(0, 513)]),
    ("unsorted", [(1024, 1536), (0, 512)]),
    ("overlapping", [(0, 1024), (512, 1536)]),
    ("touching", [(0, 512), (512, 1024)]),
    ("twice the same", [(0, 512), (0, 512)]),
    ("past the largest disk", [(0, DISK_MAX_BYTES + 512)]),
]


@pytest.mark.parametrize(
    "pairs", [pairs for _, pairs in BAD_INTERVALS], ids=[name for name, _ in BAD_INTERVALS]
)
def test_intervals_have_one_order_and_one_form(pairs: list[tuple[int, int]]) -> None:
    body = len(pairs).to_bytes(4, "little")
    body += b"".join(bound.to_bytes(8, "little") for pair in pairs for bound in pair)
    with pytest.raises(Malformed):
        decode(one(Intervals(4)), body)
    with pytest.raises(Malformed):
        encode(one(Intervals(4))(tuple(Interval(*pair) for pair in pairs)))


def test_an_interval_may_reach_the_end_of_the_largest_disk() -> None:
    whole = DiskCoverage(1, (Interval(0, DISK_MAX_BYTES),))
    assert decode(DiskCoverage, encode(whole)) == whole


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        (Unsigned(1), 256),
        (Unsigned(1), -1),
        (Unsigned(8), 2**64),
        (Choice(Mode), 9),
        (Fixed(3), b"ab"),
        (Opaque(5), b"123456"),
        (Text(6), "1234567"),
        (Text(6), "äääö"),  # six is a number of bytes
        (Text(6), "\ud800"),
        (Items(Leaf, 2), (Leaf(1, ""),) * 3),
        (Items(Leaf, 2), (Leaf(256, ""),)),
        (Intervals(1), (Interval(0, 512), Interval(1024, 1536))),
    ],
)
def test_a_value_that_breaks_the_schema_is_malformed_on_our_side_too(codec: Any, value: object) -> None:
    with pytest.raises(Malformed):
        encode(one(codec)(value))


def test_the_longest_coverage_fits_and_one_more_does_not() -> None:
    most = tuple(Interval(at * 1024, at * 1024 + 512) for at in range(COVERAGE_INTERVALS_MAX))
    coverage = DiskCoverage(1, most)
    assert decode(DiskCoverage, encode(coverage)) == coverage
    with pytest.raises(Malformed):
        encode(DiskCoverage(1, (*most, Interval(1 << 40, (1 << 40) + 512))))


def test_a_list_over_its_limit_is_refused_though_all_of_it_is_there() -> None:
    three = tuple(Interval(at * 1024, at * 1024 + 512) for at in range(3))
    with pytest.raises(Malformed, match="2 allowed"):
        decode(one(Intervals(2)), encode(one(Intervals(3))(three)))
    leaves = tuple(Leaf(at, "") for at in range(3))
    with pytest.raises(Malformed, match="2 allowed"):
        decode(one(Items(Leaf, 2)), encode(one(Items(Leaf, 3))(leaves)))


def test_layouts_are_written_as_in_the_specification() -> None:
    layouts = [codec.layout() for _, codec in schema(Everything)]
    assert layouts == [
        "u8",
        "u16",
        "u32",
        "u64",
        "bool",
        "u8 Colour",
        "bytes[3]",
        "bytes<=5",
        "text<=6",
        "list<=2 of Leaf",
        "intervals<=2",
    ]
    assert len(NO_ID) == 16
