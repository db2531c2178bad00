"""A packed frame, applied to what the target holds, gives what the source holds."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.constants import HEADER_BYTES, SECTOR_BYTES
from protocol.messages import Interval
from protocol.payload import Extent, new_compressor, new_decompressor, unpack
from replicator.buffers import ZERO_BLOCK_BYTES, BufferPool
from replicator.digest import BLOCK_BYTES, DIGEST_BYTES, FINE_BYTES, digests_of
from replicator.extents import Piece
from replicator.packing import Packed, pack

SEED = 7
POOL = BufferPool(1 << 24)


def packed(piece: Piece, new: bytes, theirs: dict[int, bytes], level: int = 0) -> Packed:
    buffer = POOL.take(piece.raw_bytes)
    position = 0
    for extent in piece.extents:
        if not extent.zero:
            buffer.view[position : position + extent.length] = new[extent.offset : extent.end]
            position += extent.length
    return pack(3, 1, piece, buffer, new_compressor(level) if level else None, SEED, theirs)


def applied(found: Packed, old: bytes) -> bytes:
    """What the target then holds."""
    frame = found.frame
    body = memoryview(frame.table + bytes(frame.payload))
    into = memoryview(bytearray(frame.header.raw_len))
    extents, raw = unpack(frame.header, body, into, new_decompressor(), SEED)
    disk, position = bytearray(old), 0
    for extent in extents:
        disk[extent.offset : extent.end] = (
            bytes(extent.length) if extent.zero else raw[position : position + extent.length]
        )
        position += 0 if extent.zero else extent.length
    return bytes(disk)


def fine_digests(old: bytes, size: int) -> dict[int, bytes]:
    return {
        at: digests_of(memoryview(old[at : min(at + BLOCK_BYTES, size)]), SEED, FINE_BYTES)
        for at in range(0, size, BLOCK_BYTES)
    }


@st.composite
def disks(draw: st.DrawFn) -> tuple[bytes, bytes, Piece]:
    """Old content, new content, and a piece that says all of the new one (its holes as zeros)."""
    sectors = draw(st.integers(1, 4 * BLOCK_BYTES // SECTOR_BYTES))
    rng = random.Random(draw(st.integers(0, 2**32)))
    size = sectors * SECTOR_BYTES
    old = bytearray(rng.randbytes(size))
    for at in range(0, size, FINE_BYTES):  # a target that holds zeros, too
        if rng.random() < 0.2:
            old[at : at + FINE_BYTES] = bytes(len(old[at : at + FINE_BYTES]))
    new, extents, position = bytearray(old), [], 0
    while position < sectors:
        count = min(draw(st.sampled_from([1, 3, 8, 16, 128, 200])), sectors - position)
        kind = draw(st.sampled_from(["same", "same", "data", "sector", "stored zeros", "hole"]))
        start, length = position * SECTOR_BYTES, count * SECTOR_BYTES
        if kind == "data":
            new[start : start + length] = rng.randbytes(length)
        elif kind == "sector":
            new[start : start + SECTOR_BYTES] = rng.randbytes(SECTOR_BYTES)
        elif kind in {"stored zeros", "hole"}:
            new[start : start + length] = bytes(length)
        extents.append(Extent(start, length, kind == "hole"))
        position += count
    raw = sum(extent.length for extent in extents if not extent.zero)
    return bytes(old), bytes(new), Piece(Interval(0, size), tuple(extents), raw)


@given(disks(), st.sampled_from([0, 1]), st.booleans())
def test_old_content_and_the_frame_make_the_new_content(
    disk: tuple[bytes, bytes, Piece], level: int, fine: bool
) -> None:
    old, new, piece = disk
    theirs = fine_digests(old, len(old)) if fine else {}
    found = packed(piece, new, theirs, level)
    assert applied(found, old) == new
    row = bytearray(-(-len(new) // BLOCK_BYTES) * DIGEST_BYTES)
    for start, digests in found.digests.rows:
        at = start // BLOCK_BYTES * DIGEST_BYTES
        row[at : at + len(digests)] = digests
    for start, end in found.digests.zeros:
        zeros = digests_of(memoryview(bytes(end - start)), SEED)
        at = start // BLOCK_BYTES * DIGEST_BYTES
        row[at : at + len(zeros)] = zeros
    assert row == digests_of(memoryview(new), SEED)
    assert 0 <= found.matched_bytes <= len(new)
    assert fine or not found.matched_bytes


def test_equal_blocks_of_4_kib_do_not_travel() -> None:
    rng = random.Random(1)
    old = rng.randbytes(BLOCK_BYTES)
    new = bytearray(old)
    new[5 * FINE_BYTES + 9] ^= 1
    piece = Piece(Interval(0, BLOCK_BYTES), (Extent(0, BLOCK_BYTES),), BLOCK_BYTES)
    found = packed(piece, bytes(new), fine_digests(old, BLOCK_BYTES))
    assert found.frame.header.raw_len == FINE_BYTES
    assert found.matched_bytes == BLOCK_BYTES - FINE_BYTES
    assert found.frame.wire_bytes < HEADER_BYTES + FINE_BYTES + 64
    assert applied(found, old) == new


@pytest.mark.parametrize("hole", [True, False])
def test_zeros_are_not_said_where_there_are_zeros_already(hole: bool) -> None:
    size = 2 * BLOCK_BYTES
    old = bytearray(size)
    old[BLOCK_BYTES + FINE_BYTES : BLOCK_BYTES + 2 * FINE_BYTES] = random.Random(1).randbytes(FINE_BYTES)
    piece = Piece(Interval(0, size), (Extent(0, size, zero=hole),), 0 if hole else size)
    found = packed(piece, bytes(size), fine_digests(bytes(old), size))
    assert (found.frame.header.raw_len, found.matched_bytes) == (0, size - FINE_BYTES)
    assert applied(found, bytes(old)) == bytes(size)


def test_a_short_last_block_is_compared_as_it_is() -> None:
    old = random.Random(1).randbytes(BLOCK_BYTES + FINE_BYTES + SECTOR_BYTES)
    piece = Piece(Interval(0, len(old)), (Extent(0, len(old)),), len(old))
    found = packed(piece, old, fine_digests(old, len(old)))
    assert (found.frame.header.raw_len, found.matched_bytes) == (0, len(old))


def test_digests_of_an_installation_with_another_seed_match_nothing() -> None:
    old = random.Random(1).randbytes(BLOCK_BYTES)
    piece = Piece(Interval(0, BLOCK_BYTES), (Extent(0, BLOCK_BYTES),), BLOCK_BYTES)
    theirs = {0: digests_of(memoryview(old), SEED + 1, FINE_BYTES)}
    assert packed(piece, old, theirs).matched_bytes == 0


@pytest.mark.parametrize(("level", "lies"), [(0, True), (1, False)])
def test_the_buffer_is_kept_only_while_the_payload_lies_in_it(level: int, lies: bool) -> None:
    new = b"compressible" * (BLOCK_BYTES // 12 + 1)
    piece = Piece(Interval(0, BLOCK_BYTES), (Extent(0, BLOCK_BYTES),), BLOCK_BYTES)
    assert (packed(piece, new, {}, level).buffer is not None) is lies
    assert packed(piece, bytes(BLOCK_BYTES), {}, level).buffer is None


# ------------------------------------------------------------------ without digests of the target: everything


SECTORS = 40 * 128  # 2.5 MiB: room for a piece of 1 MiB of data with gaps


@st.composite
def pieces(draw: st.DrawFn) -> tuple[Piece, bytes]:
    """A piece of random extents, known zeros among them, and a disk whose data has zero stretches too."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    disk = bytearray(chance.randbytes(SECTORS * 512))
    for _ in range(draw(st.integers(0, 12))):
        first = draw(st.integers(0, SECTORS - 1))
        length = draw(st.sampled_from([1, 8, 127, 128, 129, 256, 700]))
        disk[first * 512 : (first + length) * 512] = bytes(min(length, SECTORS - first) * 512)
    position = draw(st.integers(0, 2)) * BLOCK_BYTES // 512
    extents: list[Extent] = []
    raw = 0
    for _ in range(draw(st.integers(1, 10))):
        length = min(draw(st.integers(1, 600)), SECTORS - position)
        zero = draw(st.booleans())
        if not length or (not zero and raw + length > 2048):
            break
        extents.append(Extent(position * 512, length * 512, zero))
        raw += 0 if zero else length
        position += length
    for extent in extents:
        if extent.zero:
            disk[extent.offset : extent.end] = bytes(extent.length)
    cover = Interval(extents[0].offset, extents[-1].end)
    return Piece(cover, tuple(extents), raw * 512), bytes(disk)


@given(pieces(), st.sampled_from([0, 1]), st.integers(1, 9), st.integers(1, 99))
def test_a_packed_piece_says_exactly_what_the_disk_holds(
    made: tuple[Piece, bytes], level: int, disk: int, epoch: int
) -> None:
    piece, content = made
    pool = BufferPool(0)
    buffer = pool.take(piece.raw_bytes)
    position = 0
    for extent in piece.extents:
        if not extent.zero:
            buffer.view[position : position + extent.length] = content[extent.offset : extent.end]
            position += extent.length
    compressor = new_compressor(level) if level else None
    frame = pack(disk, epoch, piece, buffer, compressor, SEED, {}).frame
    body = memoryview(bytes(frame.table) + bytes(frame.payload))
    into = memoryview(bytearray(frame.header.raw_len))
    extents, raw = unpack(frame.header, body, into, new_decompressor(), SEED)

    assert (frame.header.disk, frame.header.epoch) == (disk, epoch)
    assert Interval(frame.header.cover_start, frame.header.cover_end) == piece.cover
    rebuilt = bytearray(b"\xaa" * len(content))
    position, end = 0, piece.cover.start
    for extent in extents:
        assert extent.offset == end  # a full frame says something of every byte of its cover
        end = extent.end
        length = 0 if extent.zero else extent.length
        rebuilt[extent.offset : end] = (
            bytes(extent.length) if extent.zero else raw[position : position + length]
        )
        position += length
    assert end == piece.cover.end and position == len(raw)
    assert rebuilt[piece.cover.start : end] == content[piece.cover.start : end]
    for extent in extents:  # no block that the zero test looks at is sent as zeros
        if not extent.zero:
            inside = next(wide for wide in piece.extents if wide.offset <= extent.offset < wide.end)
            for start in range(extent.offset, extent.end, ZERO_BLOCK_BYTES):
                assert (start - inside.offset) % ZERO_BLOCK_BYTES == 0
                assert content[start : min(start + ZERO_BLOCK_BYTES, extent.end)].strip(b"\0")
    pool.give(buffer)
    assert pool.taken == 0
