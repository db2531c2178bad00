"""Makes the frame of a piece: what turns out to be zero or equal is left out, the rest is hashed and
compressed.

Pure but for the memory that it is given; runs in worker threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from zstandard import ZstdCompressor

from protocol.payload import DataFrame, Extent, build
from replicator.buffers import Buffer, zero_runs
from replicator.digest import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    FINE_BYTES,
    Digester,
    differing,
    digests_of,
    zero_digests,
)
from replicator.extents import Piece


@dataclass(frozen=True, slots=True)
class Packed:
    """A frame, the digests of the blocks that it is about, and the buffer that its payload may lie in."""

    frame: DataFrame
    digests: Digester
    matched_bytes: int
    buffer: Buffer | None


def pack(
    disk: int,
    epoch: int,
    piece: Piece,
    buffer: Buffer,
    compressor: ZstdCompressor | None,
    seed: int,
    theirs: Mapping[int, bytes],
) -> Packed:
    """The frame of a piece whose data lies in ``buffer``, extent after extent.

    Args:
        disk, epoch: their numbers. piece: what it is about. buffer: moved together in place: blocks of zeros
        and of equal content leave it. compressor: None for raw. seed: of hashes and digests. theirs: what the
        target holds: digests of 4 KiB for blocks of 64 KiB, by the block's offset; may be empty.
    """
    said: list[Extent] = []
    matched = position = kept = 0
    digests = _digests(piece, buffer, seed)

    def data(first: int, end: int) -> bytes:
        return digests_of(buffer.view[first:end], seed, FINE_BYTES)

    def zeros(first: int, end: int) -> bytes:
        return zero_digests(end - first, seed, FINE_BYTES)

    for extent in piece.extents:
        if extent.zero:
            for first, end in _unequal(extent.offset, extent.end, 0, theirs, zeros):
                said.append(Extent(first, end - first, zero=True))
                matched -= end - first
            matched += extent.length
            continue
        for run in zero_runs(buffer, position, position + extent.length):
            shift = extent.offset - position
            for first, end in _unequal(run.start, run.end, shift, theirs, zeros if run.zero else data):
                said.append(Extent(first + shift, end - first, run.zero))
                matched -= end - first
                if run.zero:
                    continue
                if first != kept:
                    buffer.view[kept : kept + end - first] = buffer.view[first:end]
                kept += end - first
            matched += run.end - run.start
        position += extent.length
    frame = build(disk, epoch, piece.cover, said, buffer.view[:kept], compressor, seed)
    lies_in_buffer = frame.header.raw_len and not frame.header.flags
    return Packed(frame, digests, matched, buffer if lies_in_buffer else None)


def _digests(piece: Piece, buffer: Buffer, seed: int) -> Digester:
    digests = Digester(seed)
    position = 0
    for extent in piece.extents:
        digests.at(extent.offset)
        if extent.zero:
            digests.zero(extent.length)
        else:
            digests.data(buffer.view[position : position + extent.length])
            position += extent.length
    digests.finish()
    return digests


def _unequal(
    start: int, end: int, shift: int, theirs: Mapping[int, bytes], ours: Callable[[int, int], bytes]
) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) that differ from what the target holds, neighbours joined.

    Position ``start`` is byte ``start + shift`` of the disk; ``ours`` gives the digests of 4 KiB between two
    positions.
    """
    if not theirs:
        yield start, end
        return
    first = last = start  # of the stretch that was found last
    for position, behind in _unequal_by_block(start, end, shift, theirs, ours):
        if position > last:
            if first < last:
                yield first, last
            first = position
        last = behind
    if first < last:
        yield first, last


def _unequal_by_block(
    start: int, end: int, shift: int, theirs: Mapping[int, bytes], ours: Callable[[int, int], bytes]
) -> Iterator[tuple[int, int]]:
    """As ``_unequal``, neighbours in different blocks of 64 KiB not joined."""
    while start < end:
        offset = start + shift
        behind = min(end, start + BLOCK_BYTES - offset % BLOCK_BYTES)
        row = theirs.get(offset - offset % BLOCK_BYTES)
        aligned = start + -offset % FINE_BYTES if row is not None else behind
        if start < aligned:
            yield start, min(aligned, behind)
        if row is not None and aligned < behind:
            known = ours(aligned, behind)
            at = (aligned + shift) % BLOCK_BYTES // FINE_BYTES * DIGEST_BYTES
            yield from differing(known, row[at : at + len(known)], aligned, behind, FINE_BYTES)
        start = behind
