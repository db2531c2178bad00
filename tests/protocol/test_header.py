"""The header: its exact bytes, every rule that refuses one, and their order."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from protocol import header as head
from protocol.constants import (
    DISK_MAX_BYTES,
    EXTENT_BYTES,
    HEADER_BYTES,
    RAW_MAX_BYTES,
    SECTOR_BYTES,
    TABLE_MAX_BYTES,
)
from protocol.errors import RemoteProtocolError, WireCode
from protocol.header import UNSEEDED, Flags, FrameType, Header, invalid, pack, unpack

SEED = 0xFEDC_BA98_7654_3210
DATA = Header(
    FrameType.DATA,
    body_len=48 + 1024,
    table_len=48,
    raw_len=1024,
    disk=3,
    epoch=2**40,
    cover_start=512,
    cover_end=8192,
    raw_hash=0x1111_1111_1111_1111,
    body_hash=0x2222_2222_2222_2222,
)


def forged(offset: int, layout: str, value: object, *, header: Header = DATA) -> bytes:
    """A header with one field overwritten and the hash made right again."""
    fields = bytearray(pack(header, SEED)[:64])
    struct.pack_into("<" + layout, fields, offset, value)
    return bytes(fields) + xxh3_64_intdigest(fields, head.seed_for(fields[6], SEED)).to_bytes(8, "little")


def code_of(data: bytes, seed: int = SEED) -> WireCode:
    with pytest.raises(RemoteProtocolError) as caught:
        unpack(data, seed)
    return caught.value.code


def test_every_field_is_where_the_specification_puts_it() -> None:
    data = pack(DATA, SEED)
    assert len(data) == HEADER_BYTES
    assert data[0:4] == b"RPLF"
    assert data[4:6] == b"\x01\x00"
    assert data[6] == 7
    assert data[7] == 0
    read = [int.from_bytes(data[at : at + 4], "little") for at in (8, 12, 16, 20)]
    assert read == [DATA.body_len, DATA.table_len, DATA.raw_len, DATA.disk]
    read = [int.from_bytes(data[at : at + 8], "little") for at in (24, 32, 40, 48, 56)]
    assert read == [DATA.epoch, DATA.cover_start, DATA.cover_end, DATA.raw_hash, DATA.body_hash]
    assert int.from_bytes(data[64:72], "little") == xxh3_64_intdigest(data[:64], SEED)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    kind = draw(st.sampled_from(FrameType))
    body_hash = draw(st.integers(0, 2**64 - 1))
    if kind is not FrameType.DATA:
        return Header(kind, draw(st.integers(0, 2**32 - 1)), body_hash=body_hash)
    table_len = draw(st.integers(0, TABLE_MAX_BYTES // EXTENT_BYTES)) * EXTENT_BYTES
    flags = draw(st.sampled_from([Flags.NONE, Flags.ZSTD]))
    least = 1 if flags else 0
    raw_len = draw(st.integers(least, RAW_MAX_BYTES // SECTOR_BYTES)) * SECTOR_BYTES
    payload_len = draw(st.integers(1, raw_len - 1)) if flags else raw_len
    start = draw(st.integers(0, DISK_MAX_BYTES // SECTOR_BYTES - 1))
    end = draw(st.integers(start + 1, DISK_MAX_BYTES // SECTOR_BYTES))
    return Header(
        kind,
        table_len + payload_len,
        flags,
        table_len=table_len,
        raw_len=raw_len,
        disk=draw(st.integers(0, 2**32 - 1)),
        epoch=draw(st.integers(0, 2**64 - 1)),
        cover_start=start * SECTOR_BYTES,
        cover_end=end * SECTOR_BYTES,
        raw_hash=draw(st.integers(0, 2**64 - 1)),
        body_hash=body_hash,
    )


@given(header=headers(), seed=st.integers(0, 2**64 - 1))
def test_what_is_packed_is_unpacked(header: Header, seed: int) -> None:
    assert invalid(header) is None
    data = pack(header, seed)
    assert unpack(data, seed) == header
    assert unpack(memoryview(bytearray(data)), seed) == header


@pytest.mark.parametrize("header", [DATA, Header(FrameType.PING, 8, body_hash=1)], ids=["DATA", "PING"])
def test_every_flipped_bit_is_detected(header: Header) -> None:
    data = pack(header, SEED)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        code = code_of(bytes(damaged))
        assert code is (WireCode.MAGIC if bit < 32 else WireCode.HEADER_HASH), bit


@pytest.mark.parametrize("kind", FrameType)
def test_only_frames_that_must_be_read_before_welcome_ignore_the_seed(kind: FrameType) -> None:
    header = replace(DATA, type=kind) if kind is FrameType.DATA else Header(kind, 0)
    data = pack(header, SEED)
    if kind in UNSEEDED:
        assert unpack(data, 0) == unpack(data, SEED) == header
    else:
        assert code_of(data, 0) is WireCode.HEADER_HASH


REFUSED = [
    ("magic", 0, "4s", b"RPLG", WireCode.MAGIC),
    ("older version", 4, "H", 0, WireCode.VERSION),
    ("newer version", 4, "H", 2, WireCode.VERSION),
    ("type 0", 6, "B", 0, WireCode.HEADER),
    ("type of no conversation", 6, "B", 18, WireCode.HEADER),
    ("type of the log", 6, "B", 64, WireCode.HEADER),
    ("highest type", 6, "B", 255, WireCode.HEADER),
    ("unknown flag", 7, "B", 2, WireCode.HEADER),
    ("unknown flag beside a known one", 7, "B", 3, WireCode.HEADER),
    ("body shorter than the table", 8, "I", 47, WireCode.HEADER),
    ("raw payload longer than announced", 8, "I", 48 + 1025, WireCode.HEADER),
    ("raw payload shorter than announced", 8, "I", 48 + 1023, WireCode.HEADER),
    ("broken extent in the table", 12, "I", 47, WireCode.HEADER),
    ("table over the limit", 12, "I", TABLE_MAX_BYTES + 16, WireCode.HEADER),
    ("longest table", 12, "I", 2**32 - 16, WireCode.HEADER),
    ("raw length not whole sectors", 16, "I", 1023, WireCode.HEADER),
    ("raw length over the limit", 16, "I", RAW_MAX_BYTES + 512, WireCode.HEADER),
    ("compressed payload as large as raw", 7, "B", 1, WireCode.HEADER),
    ("cover starts inside a sector", 32, "Q", 513, WireCode.HEADER),
    ("cover ends inside a sector", 40, "Q", 8191, WireCode.HEADER),
    ("empty cover", 40, "Q", 512, WireCode.HEADER),
    ("reversed cover", 40, "Q", 0, WireCode.HEADER),
    ("cover past the largest disk", 40, "Q", DISK_MAX_BYTES + 512, WireCode.HEADER),
    ("cover to the end of 64 bits", 40, "Q", 2**64 - 512, WireCode.HEADER),
]


@pytest.mark.parametrize(
    ("offset", "layout", "value", "code"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_a_header_that_breaks_a_rule_is_refused_though_its_hash_is_right(
    offset: int, layout: str, value: object, code: WireCode
) -> None:
    assert code_of(forged(offset, layout, value)) is code


def test_an_empty_compressed_payload_is_refused() -> None:
    assert invalid(replace(DATA, flags=Flags.ZSTD, body_len=48)) is not None


@pytest.mark.parametrize(
    ("offset", "layout"),
    [(7, "B"), (12, "I"), (16, "I"), (20, "I"), (24, "Q"), (32, "Q"), (40, "Q"), (48, "Q")],
    ids=["flags", "table_len", "raw_len", "disk", "epoch", "cover_start", "cover_end", "raw_hash"],
)
def test_a_control_frame_has_no_fields_of_data(offset: int, layout: str) -> None:
    ping = Header(FrameType.PING, 8, body_hash=5)
    assert code_of(forged(offset, layout, 1, header=ping)) is WireCode.HEADER


def test_refusals_come_in_the_order_of_the_specification() -> None:
    data = bytearray(pack(DATA, SEED))
    steps = [(12, "I", 1), (7, "B", 4), (6, "B", 99), (4, "H", 9)]
    expected = [WireCode.HEADER, WireCode.HEADER, WireCode.HEADER, WireCode.VERSION]
    for (offset, layout, value), code in zip(steps, expected, strict=True):
        struct.pack_into("<" + layout, data, offset, value)
        data[64:] = xxh3_64_intdigest(data[:64], SEED).to_bytes(8, "little")
        assert code_of(bytes(data)) is code
    data[64] ^= 1
    assert code_of(bytes(data)) is WireCode.HEADER_HASH
    data[0] ^= 1
    assert code_of(bytes(data)) is WireCode.MAGIC
