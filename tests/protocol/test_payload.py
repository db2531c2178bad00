"""DATA bodies: what is built unpacks; forged ones are refused though their hashes are right."""

import random
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from protocol.constants import (
    EXTENT_MAX_BYTES,
    MIB,
    RAW_MAX_BYTES,
    SECTOR_BYTES,
    TABLE_MAX_BYTES,
    ZSTD_BLOCKS_MAX,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.header import Flags, FrameType, Header
from protocol.header import unpack as unpack_header
from protocol.messages import Interval
from protocol.payload import (
    Extent,
    build,
    new_compressor,
    new_decompressor,
    pack_table,
    raw_hash,
    unpack,
    zstd_frame_length,
)
from tests.protocol.strategies import data

SEED = 0xABCD
COVER = Interval(0, 1 << 20)


def forged(
    table: bytes,
    payload: bytes,
    raw: bytes,
    *,
    flags: Flags = Flags.NONE,
    cover: Interval = COVER,
    disk: int = 1,
) -> tuple[Header, memoryview]:
    """A DATA header and body whose hashes are right, whatever is in it."""
    body = table + payload
    header = Header(
        FrameType.DATA,
        len(body),
        flags,
        table_len=len(table),
        raw_len=len(raw),
        disk=disk,
        cover_start=cover.start,
        cover_end=cover.end,
        raw_hash=raw_hash(disk, table, raw, SEED),
    )
    return header, memoryview(body)


def code_of(header: Header, body: memoryview) -> WireCode:
    with pytest.raises(RemoteProtocolError) as caught:
        unpack(header, body, memoryview(bytearray(header.raw_len)), new_decompressor(), SEED)
    return caught.value.code


# ------------------------------------------------------------------ round trips


@given(
    frame=data(),
    level=st.sampled_from([None, 1, 3, 19]),
    seed=st.one_of(st.just(0), st.integers(0, 2**64 - 1)),
)
def test_what_is_built_is_unpacked(
    frame: tuple[int, int, Interval, tuple[Extent, ...], bytes], level: int | None, seed: int
) -> None:
    disk, epoch, cover, extents, raw = frame
    compressor = None if level is None else new_compressor(level)
    built = build(disk, epoch, cover, extents, memoryview(raw), compressor, seed)
    header = unpack_header(built.header_bytes, seed)
    assert header == built.header
    assert (header.disk, header.epoch, header.cover_start, header.cover_end) == (disk, epoch, *cover)
    body = memoryview(built.table + bytes(built.payload))
    assert built.wire_bytes == 72 + len(body)
    into = memoryview(bytearray(header.raw_len)) if header.flags else None
    found, content = unpack(header, body, into, new_decompressor(), seed)
    assert tuple(found) == extents
    assert content == raw


def test_a_payload_that_does_not_pay_stays_as_it_is_and_uncopied() -> None:
    noise = memoryview(random.Random(1).randbytes(64 * 1024))
    for compressor in (new_compressor(3), None):
        built = build(1, 1, Interval(0, 1 << 20), (Extent(0, len(noise)),), noise, compressor, SEED)
        assert built.header.flags is Flags.NONE
        assert built.payload is noise
        body = memoryview(built.table + bytes(noise))
        _, content = unpack(built.header, body, None, new_decompressor(), SEED)
        assert content == noise
        assert content.obj is body.obj


def test_the_largest_frame_fits() -> None:
    sectors = RAW_MAX_BYTES // SECTOR_BYTES
    extents = tuple(Extent(2 * at * SECTOR_BYTES, SECTOR_BYTES) for at in range(sectors))
    raw = memoryview(bytes(RAW_MAX_BYTES))
    built = build(1, 1, Interval(0, 2 * RAW_MAX_BYTES), extents, raw, None, SEED)
    assert built.header.table_len == TABLE_MAX_BYTES // 2
    assert built.header.raw_len == RAW_MAX_BYTES


@pytest.mark.parametrize(
    ("disk", "cover", "extents", "raw_len"),
    [
        (1, Interval(0, 512), (Extent(0, 1024),), 1024),
        (1, Interval(512, 1024), (Extent(0, 512),), 512),
        (1, Interval(0, 4096), (Extent(512, 512), Extent(0, 512)), 1024),
        (1, Interval(0, 4096), (Extent(0, 512),), 1024),
        (1, Interval(0, 4096), (Extent(0, 100),), 100),
        (1, Interval(0, 100), (), 0),
        (1, Interval(512, 512), (), 0),
        (1, Interval(0, 2**40), (Extent(0, EXTENT_MAX_BYTES + 512, True),), 0),
        (1, Interval(0, 4096), (Extent(-512, 512),), 512),
        (2**32, Interval(0, 512), (Extent(0, 512),), 512),
        (-1, Interval(0, 512), (Extent(0, 512),), 512),
        (1, Interval(0, 2 * RAW_MAX_BYTES), (Extent(0, RAW_MAX_BYTES + 512),), RAW_MAX_BYTES + 512),
    ],
)
def test_a_frame_that_would_be_refused_is_not_built(
    disk: int, cover: Interval, extents: tuple[Extent, ...], raw_len: int
) -> None:
    with pytest.raises(LocalProtocolError):
        build(disk, 1, cover, extents, memoryview(bytes(raw_len)), None, SEED)


def test_a_compressed_frame_needs_memory_of_its_exact_size() -> None:
    built = build(
        1, 1, Interval(0, 4096), (Extent(0, 4096),), memoryview(bytes(4096)), new_compressor(1), SEED
    )
    body = memoryview(built.table + bytes(built.payload))
    for into in (None, memoryview(bytearray(4095)), memoryview(bytearray(4097))):
        with pytest.raises(LocalProtocolError):
            unpack(built.header, body, into, new_decompressor(), SEED)


# ------------------------------------------------------------------ forged tables


FORGED_TABLES: list[tuple[str, list[tuple[int, int, int]], int]] = [
    ("unsorted", [(1024, 512, 0), (0, 512, 0)], 1024),
    ("overlapping", [(0, 1024, 0), (512, 512, 0)], 1536),
    ("the same twice", [(0, 512, 0), (0, 512, 0)], 1024),
    ("empty extent", [(0, 0, 0), (0, 512, 0)], 512),
    ("before the cover", [(0, 512, 1), (4096, 512, 0)], 512),
    ("behind the cover", [(4096, 512, 0), (1 << 20, 512, 0)], 1024),
    ("across the cover's end", [((1 << 20) - 512, 1024, 0)], 1024),
    ("wraps around 64 bits", [(2**64 - 512, 1024, 0)], 1024),
    ("start inside a sector", [(4097, 512, 0)], 512),
    ("length inside a sector", [(4096, 511, 1), (8192, 512, 0)], 512),
    ("unknown flag", [(4096, 512, 2)], 512),
    ("all flags", [(4096, 512, 2**32 - 1)], 512),
    ("more bytes than the payload", [(4096, 1024, 0)], 512),
    ("fewer bytes than the payload", [(4096, 512, 0)], 1024),
    ("zeros counted as bytes", [(4096, 512, 1)], 512),
    ("bytes without extents", [], 512),
]


@pytest.mark.parametrize(
    ("entries", "raw_len"), [case[1:] for case in FORGED_TABLES], ids=[case[0] for case in FORGED_TABLES]
)
def test_a_forged_table_is_refused(entries: list[tuple[int, int, int]], raw_len: int) -> None:
    table = b"".join(struct.pack("<QII", *entry) for entry in entries)
    raw = bytes(raw_len)
    assert code_of(*forged(table, raw, raw, cover=Interval(512, 1 << 20))) is WireCode.TABLE


def test_the_content_hash_covers_disk_place_and_bytes() -> None:
    table, raw = pack_table((Extent(4096, 512),)), b"a" * 512
    header, body = forged(table, raw, raw)
    unpack(header, body, None, new_decompressor(), SEED)
    other_disk = Header(**{**{n: getattr(header, n) for n in header.__slots__}, "disk": 2})
    assert code_of(other_disk, body) is WireCode.RAW_HASH
    moved = memoryview(pack_table((Extent(8192, 512),)) + raw)
    assert code_of(header, moved) is WireCode.RAW_HASH
    zeroed = pack_table((Extent(4096, 512), Extent(8192, 512, True)))
    other_table = Header(**{**{n: getattr(header, n) for n in header.__slots__}, "table_len": 32})
    assert code_of(other_table, memoryview(zeroed + raw)) is WireCode.RAW_HASH
    assert code_of(header, memoryview(table + b"a" * 511 + b"b")) is WireCode.RAW_HASH


# ------------------------------------------------------------------ forged zstd payloads


SIZE = 4096
RAW = b"A" * SIZE
TABLE = pack_table((Extent(0, SIZE),))
MAGIC = b"\x28\xb5\x2f\xfd"


def zstd(
    blocks: bytes, *, size: int | None = SIZE, window: int | None = None, checksum: bytes = b""
) -> bytes:
    """A zstd frame by hand (RFC 8878): single segment unless a window descriptor is given."""
    descriptor = 0b100 if checksum else 0
    if window is None:
        assert size is not None
        return MAGIC + bytes([0b1010_0000 | descriptor]) + struct.pack("<I", size) + blocks + checksum
    if size is None:
        return MAGIC + bytes([descriptor, window]) + blocks + checksum
    return MAGIC + bytes([0b1000_0000 | descriptor, window]) + struct.pack("<I", size) + blocks + checksum


def block(kind: int, size: int, content: bytes, *, last: bool) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + content


def run(size: int, *, last: bool) -> bytes:
    return block(1, size, b"A", last=last)


GOOD = zstd(run(SIZE, last=True))
FORGED_PAYLOADS = {
    "size missing": zstd(run(SIZE, last=True), size=None, window=0x10),
    "size larger": zstd(run(SIZE, last=True), size=SIZE * 2),
    "size smaller": zstd(run(SIZE, last=True), size=SIZE // 2),
    "size of 4 GiB": zstd(run(SIZE, last=True), size=2**32 - 1),
    "content shorter than announced": zstd(run(SIZE - 512, last=True)),
    "content longer than announced": zstd(run(SIZE + 512, last=True)),
    "content goes on behind the announced end": zstd(run(SIZE, last=False) + run(512, last=True)),
    "two frames": GOOD + GOOD,
    "two half frames": zstd(run(SIZE // 2, last=True), size=SIZE // 2) * 2,
    "a frame and a skippable one": GOOD + b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
    "a skippable frame first": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + GOOD,
    "a skippable frame of the announced size": b"\x50\x2a\x4d\x18" + struct.pack("<I", SIZE) + b"x" * 200,
    "trailing byte": GOOD + b"\0",
    "cut in the block": GOOD[:-1],
    "cut in the block header": GOOD[:-2],
    "cut behind the frame header": GOOD[:9],
    "cut in the frame header": GOOD[:6],
    "cut in the magic": GOOD[:3],
    "no last block": zstd(run(SIZE, last=False)),
    "not zstd": b"A" * 100,
    "reserved block": zstd(block(3, 4, b"AAAA", last=True)),
    "block over 128 KiB": zstd(block(1, 2**21 - 1, b"A", last=True)),
    "reserved bit": GOOD[:4] + bytes([GOOD[4] | 0b1000]) + GOOD[5:],
    "dictionary": MAGIC + bytes([0b1010_0001]) + b"\x07" + GOOD[5:],
    "window of 16 MiB": zstd(run(SIZE, last=True), window=0x70),
    "largest window": zstd(run(SIZE, last=True), window=0xFF),
    "wrong checksum": zstd(run(SIZE, last=True), checksum=b"abcd"),
    "a thousand times too many blocks": zstd(
        block(0, 0, b"", last=False) * (ZSTD_BLOCKS_MAX + 1) + run(SIZE, last=True)
    ),
    "old format v0.7": b"\x27" + GOOD[1:],
    "rubbish in a compressed block": zstd(block(2, 40, bytes(range(40)), last=True)),
}


@pytest.mark.parametrize("payload", FORGED_PAYLOADS.values(), ids=FORGED_PAYLOADS.keys())
def test_a_forged_zstd_payload_is_refused_whatever_it_holds(payload: bytes) -> None:
    for raw in (RAW, RAW[: SIZE // 2] + bytes(SIZE // 2)):
        assert code_of(*forged(TABLE, payload, raw, flags=Flags.ZSTD)) is WireCode.PAYLOAD


def test_the_hand_made_frame_is_right_but_for_what_each_case_forges() -> None:
    for payload in (
        GOOD,
        zstd(run(SIZE, last=True), window=0x68),
        zstd(run(SIZE, last=False) + block(0, 0, b"", last=True)),
        zstd(block(0, 0, b"", last=False) * (ZSTD_BLOCKS_MAX - 1) + run(SIZE, last=True)),
        zstandard.ZstdCompressor(write_checksum=True).compress(RAW),
    ):
        header, body = forged(TABLE, payload, RAW, flags=Flags.ZSTD)
        into = memoryview(bytearray(SIZE))
        _, content = unpack(header, body, into, new_decompressor(), SEED)
        assert content == RAW
        assert zstd_frame_length(memoryview(payload)) == len(payload)


def test_a_frame_that_decodes_to_something_else_is_caught_by_the_content_hash() -> None:
    header, body = forged(TABLE, GOOD, b"B" * SIZE, flags=Flags.ZSTD)
    assert code_of(header, body) is WireCode.RAW_HASH


def test_a_decompressor_serves_on_after_every_forged_frame() -> None:
    decompressor = new_decompressor()
    into = memoryview(bytearray(SIZE))
    for payload in FORGED_PAYLOADS.values():
        with pytest.raises(RemoteProtocolError):
            unpack(*forged(TABLE, payload, RAW, flags=Flags.ZSTD), into, decompressor, SEED)
        unpack(*forged(TABLE, GOOD, RAW, flags=Flags.ZSTD), into, decompressor, SEED)
        assert into == RAW


@pytest.mark.parametrize(("level", "window_log"), [(1, 0), (3, 0), (9, 0), (3, 10)])
def test_honest_encoders_stay_below_the_limit_of_blocks(level: int, window_log: int) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(level, window_log=window_log)
    raw = random.Random(2).randbytes(1 << 12) + b"".join(b"%d %x|" % (at * at, at) for at in range(400_000))
    payload = memoryview(zstandard.ZstdCompressor(compression_params=parameters).compress(raw[: 4 * MIB]))
    assert zstd_frame_length(payload) == len(payload)
