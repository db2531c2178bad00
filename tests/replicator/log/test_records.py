"""The log's own blocks: what is packed is found again, in its place only, and no flipped bit passes."""

import random
from dataclasses import replace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.header import Flags, FrameType, Header, pack
from replicator.log import records
from replicator.log.records import (
    ALIGN,
    Batch,
    BlockType,
    Entry,
    Identity,
    Kind,
    Mark,
    Position,
    Trailer,
    index_bytes,
    pack_row,
    padded,
    parse_name,
    segment_name,
)

SEED = 99
HERE = Identity(Kind.UNDO, bytes(range(16)), 1 << 40, 12)
POSITION = 5 * ALIGN
BATCH = Batch(3, Position(12, 4 * ALIGN), 77)
HEADERS = [
    Header(FrameType.DATA, 16, table_len=16, disk=4, epoch=9, cover_start=512, cover_end=1 << 50),
    Header(FrameType.DATA, 116, Flags.ZSTD, 1, 16, 512, 1, 2, 0, 4096, 2**64 - 1, 2**63),
]
ROWS = b"".join(pack_row(ALIGN * number, pack(header, SEED)) for number, header in enumerate(HEADERS, 1))
MARKS = (Mark(3 * ALIGN, 0), Mark(4 * ALIGN, 2**64 - 1))
TRAILER = Trailer(POSITION, 2, 2, True)
TRAILER_AT = POSITION + ALIGN

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)


def unpackers(identity: Identity, position: int, seed: int):
    """Each block's bytes, and what reads them at this place."""
    return {
        "segment": (
            records.pack_segment(HERE, 4096, SEED),
            lambda block: records.unpack_segment(block, seed),
        ),
        "batch": (
            records.pack_batch(HERE, POSITION, BATCH, SEED),
            lambda block: records.unpack_batch(block, identity, position, seed),
        ),
        "index": (
            records.pack_index(HERE, POSITION, ROWS, MARKS, SEED),
            lambda block: records.unpack_index(block, identity, position, seed),
        ),
        "trailer": (
            records.pack_trailer(HERE, TRAILER, SEED),
            lambda block: records.unpack_trailer(block, identity, position + ALIGN, seed),
        ),
    }


@pytest.mark.parametrize("kind", ["segment", "batch", "index", "trailer"])
def test_a_block_is_found_again(kind: str) -> None:
    block, unpack = unpackers(HERE, POSITION, SEED)[kind]
    expected = {
        "segment": (HERE, 4096),
        "batch": BATCH,
        "index": records.Index(ROWS, MARKS),
        "trailer": TRAILER,
    }
    assert unpack(block) == expected[kind]
    assert len(block) == ALIGN


@pytest.mark.parametrize("kind", ["segment", "batch", "index", "trailer"])
def test_no_flipped_bit_of_a_block_passes(kind: str, seed: int) -> None:
    block, unpack = unpackers(HERE, POSITION, SEED)[kind]
    rng = random.Random(seed)
    for at in range(len(block)):
        damaged = bytearray(block)
        damaged[at] ^= 1 << rng.randrange(8)
        assert unpack(damaged) is None, f"a flip in byte {at}"


@pytest.mark.parametrize("kind", ["batch", "index", "trailer"])
@pytest.mark.parametrize(
    "elsewhere",
    [
        {"identity": replace(HERE, log=bytes(16))},
        {"identity": replace(HERE, epoch=3)},
        {"identity": replace(HERE, segment=13)},
        {"identity": replace(HERE, kind=Kind.REDO)},
        {"position": POSITION + ALIGN},
        {"seed": 98},
    ],
    ids=["log", "epoch", "segment", "kind", "position", "seed"],
)
def test_a_block_counts_in_its_own_place_only(kind: str, elsewhere: dict) -> None:
    place = {"identity": HERE, "position": POSITION, "seed": SEED, **elsewhere}
    block, unpack = unpackers(**place)[kind]
    assert unpack(block) is None


@pytest.mark.parametrize("kind", ["segment", "batch", "index", "trailer"])
@pytest.mark.parametrize("content", [b"", bytes(8), bytes(100), bytes(ALIGN), b"\xff" * ALIGN])
def test_what_is_no_block_is_none(kind: str, content: bytes) -> None:
    _, unpack = unpackers(HERE, POSITION, SEED)[kind]
    assert unpack(content) is None


def test_an_index_that_claims_to_be_longer_than_the_file_is_none() -> None:
    block = records.pack_index(HERE, POSITION, ROWS * 100, MARKS, SEED)
    assert len(block) == 4 * ALIGN
    assert records.unpack_index(block, HERE, POSITION, SEED) is not None
    assert records.unpack_index(block[:-ALIGN], HERE, POSITION, SEED) is None
    assert records.unpack_index(block + bytes(ALIGN), HERE, POSITION, SEED) is not None


def block(kind: BlockType, position: int, fields: bytes, identity: Identity = HERE) -> bytes:
    """A block with a right hash, whatever its fields say."""
    return records._sealed(records._prefix(identity, kind, position) + fields, ALIGN, SEED)


def test_a_trailer_that_does_not_stand_behind_its_index_is_none() -> None:
    for end, position, finished, found in [
        (POSITION, TRAILER_AT, 1, TRAILER),
        (POSITION - ALIGN, TRAILER_AT, 1, None),
        (POSITION, TRAILER_AT + ALIGN, 1, None),
        (POSITION, TRAILER_AT, 2, None),
    ]:
        made = block(BlockType.TRAILER, position, records._TRAILER.pack(end, 2, 2, finished))
        assert records.unpack_trailer(made, HERE, position, SEED) == found


def test_a_segment_header_with_a_strange_field_is_none() -> None:
    strange = Identity(cast("Kind", 3), HERE.log, HERE.epoch, HERE.segment)
    fields = records._SEGMENT.pack(4096)
    assert records.unpack_segment(block(BlockType.SEGMENT, 0, fields), SEED) == (HERE, 4096)
    for made in (
        block(BlockType.SEGMENT, 0, fields, strange),
        block(BlockType.SEGMENT, ALIGN, fields),
        block(BlockType.BATCH, 0, fields),
    ):
        assert records.unpack_segment(made, SEED) is None


@given(
    st.lists(
        st.builds(
            Header,
            st.just(FrameType.DATA),
            u32,
            st.sampled_from([Flags.NONE, Flags.ZSTD]),
            st.integers(0, 2**16 - 1),
            u32,
            u32,
            u32,
            u64,
            u64,
            u64,
            u64,
            u64,
        )
    ),
    u64,
)
def test_rows_give_back_every_header(headers: list[Header], offset: int) -> None:
    rows = b"".join(pack_row(offset, pack(header, SEED)) for header in headers)
    assert records.entries(rows) == [Entry(header, offset) for header in headers]
    assert len(rows) == records.ROW_BYTES * len(headers)


@given(st.sampled_from(Kind), u64, st.integers(1, 2**32 - 1))
def test_names_are_read_back_and_sort_by_number(kind: Kind, epoch: int, segment: int) -> None:
    assert parse_name(segment_name(kind, epoch, segment)) == (kind, epoch, segment)


@pytest.mark.parametrize(
    "name",
    [
        "redo-0000000001-000000.seg",
        "redo-1-1.seg",
        "redo-00000000001-000001.seg",
        "redo-0000000001-0000001.seg",
        "undo-0000000001-000001.seg.new",
        ".undo-0000000001-000001.seg",
        "REDO-0000000001-000001.seg",
        "redo-000000000\u0661-000001.seg",
        "group.json",
        "",
    ],
)
def test_no_other_name_is_a_segments(name: str) -> None:
    assert parse_name(name) is None


def test_lengths_are_whole_blocks() -> None:
    assert [padded(length) for length in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert index_bytes(0, 0) == ALIGN
    assert index_bytes(50, 1) == ALIGN  # 56 + 4000 + 16 + 8
    assert index_bytes(50, 2) == ALIGN  # 56 + 4000 + 32 + 8 = 4096
    assert index_bytes(50, 3) == 2 * ALIGN


def test_a_blocks_type_is_none_of_the_wires() -> None:
    assert not {int(kind) for kind in BlockType} & {int(kind) for kind in FrameType}
    assert min(BlockType) >= 64
