"""What of a disk has to be said: windows of a source, and what in them differs from what the target holds.

A window is some 16 MiB of data with the holes in between. In a full epoch all of it is said. Otherwise its
digests are compared, with the map of the epoch before or with those that the target tells, and only blocks
that differ are; in those, digests of 4 KiB decide once more (``packing.py``). If somebody else has told what
changed, only that is looked at. Not here: frames and streams.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from protocol.constants import MIB
from protocol.messages import DIGEST_INTERVALS_MAX, Interval
from protocol.payload import Extent
from replicator.buffers import Buffer, BufferPool
from replicator.digest import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    FINE_BYTES,
    Digester,
    differing,
    zero_digests,
    zero_row,
)
from replicator.extents import Coverage, Cutter, Piece
from replicator.sources.base import Source

WINDOW_DATA_BYTES = 16 * MIB
WINDOW_SPAN_BYTES = 4096 * MIB  # of holes; 1 MiB of digests
LOOK_BYTES = 16 * MIB  # asking for holes costs some milliseconds: reading less than this costs no more
SCAN_BYTES = 2 * MIB  # read and digested in one go: the hand-over to a thread is paid for all of it

Ask = Callable[[Sequence[Interval], int], Awaitable[bytes]]
"""(intervals, block size) -> the target's digests of all their blocks, in order."""


class Window(NamedTuple):
    """A stretch of a disk and the touching extents that fill it, or those of it that may have changed."""

    cover: Interval
    extents: tuple[Extent, ...]


class Held(NamedTuple):
    """What the target holds in a window: digests of its blocks, of a disk of ``size`` bytes."""

    row: bytes
    size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Difference:
    """What of a window is to be said.

    Attributes:
        pieces: for frames; their covers fill the window.
        fine: the target's digests of 4 KiB in blocks that differ, by the block's offset.
        equal: digests of the blocks that need not be said.
        matched_bytes: size of these.
    """

    pieces: tuple[Piece, ...]
    fine: dict[int, bytes]
    equal: Digester
    matched_bytes: int


async def windows(source: Source, done: Coverage) -> AsyncIterator[Window]:
    """The windows of a disk, of what ``done`` does not cover; made as they are consumed."""
    for gap in list(done.gaps(0, source.size_bytes)):
        extents: list[Extent] = []
        data = 0
        async for found in source.extents(gap.start):
            position, end = found.offset, min(found.end, gap.end)
            while position < end:
                span = position - extents[0].offset if extents else 0
                room = WINDOW_SPAN_BYTES - span if found.zero else WINDOW_DATA_BYTES - data
                stop = min(end, _bound(position, room))
                extents.append(Extent(position, stop - position, found.zero))
                data += 0 if found.zero else stop - position
                position = stop
                full = data >= WINDOW_DATA_BYTES or stop - extents[0].offset >= WINDOW_SPAN_BYTES
                if full and stop % BLOCK_BYTES == 0:
                    yield _window(extents)
                    extents, data = [], 0
            if found.end >= gap.end:
                break
        if extents:
            yield _window(extents)


async def listed_windows(
    source: Source, done: Coverage, changed: Sequence[Interval]
) -> AsyncIterator[Window]:
    """As ``windows``, of a disk on which only the blocks ``changed`` can have changed.

    Their extents alone fill a window, which covers what is between them too. ``changed``: whole blocks,
    sorted, apart. The rest of the disk costs a window every ``WINDOW_SPAN_BYTES``.
    """
    for gap in list(done.gaps(0, source.size_bytes)):
        first, extents, data = gap.start, list[Extent](), 0
        async for found in _listed_extents(source, _clipped(changed, gap)):
            position = found.offset
            while position < found.end:
                while position >= first + WINDOW_SPAN_BYTES:
                    yield Window(Interval(first, first + WINDOW_SPAN_BYTES), tuple(extents))
                    first, extents, data = first + WINDOW_SPAN_BYTES, [], 0
                stop = min(found.end, first + WINDOW_SPAN_BYTES)
                if not found.zero:
                    stop = min(stop, _bound(position, WINDOW_DATA_BYTES - data))
                extents.append(Extent(position, stop - position, found.zero))
                data += 0 if found.zero else stop - position
                position = stop
                if data >= WINDOW_DATA_BYTES and stop % BLOCK_BYTES == 0:
                    yield Window(Interval(first, stop), tuple(extents))
                    first, extents, data = stop, [], 0
        while first < gap.end:
            stop = min(first + WINDOW_SPAN_BYTES, gap.end)
            yield Window(Interval(first, stop), tuple(extents))
            first, extents = stop, []


def everything(window: Window) -> Difference:
    """All of a window is said: the target holds nothing that counts."""
    return Difference(tuple(_pieces(window, [window.cover])), {}, Digester(0), 0)


async def compared(
    window: Window,
    source: Source,
    theirs: Callable[[Interval], Awaitable[bytes]],
    ask: Ask,
    pool: BufferPool,
    seed: int,
) -> Difference:
    """What of a window differs from the row of digests that ``theirs`` gives for it.

    Raises:
        SourceError: it cannot be read. Whatever ``theirs`` and ``ask`` raise.
    """
    row = await theirs(window.cover)
    ours = await _digested(window, source, pool, seed)
    said = list(differing(ours, row, *window.cover))
    return await _stated(window, said, ours, Held(row, source.size_bytes, seed), ask)


async def listed(window: Window, before: Held | None, ask: Ask | None) -> Difference:
    """The blocks of a window of ``listed_windows``; nothing is read for it.

    Args:
        window: what is outside its extents has not changed.
        before: what the target holds in the whole window, if that is known.
        ask: None: nobody can be asked, so that the blocks are said as they are.

    Raises:
        Whatever ``ask`` raises.
    """
    said = list(Coverage((extent.offset, extent.end) for extent in window.extents).intervals())
    return await _stated(window, said, before.row if before is not None else None, before, ask)


async def _stated(
    window: Window, said: Sequence[Interval], row: bytes | None, before: Held | None, ask: Ask | None
) -> Difference:
    """These blocks of a window, after a closer look where it may pay; ``row``: digests of all others.

    Where small writes are scattered, most blocks differ and few of their bytes do. Only where every block
    that holds data differs, something else was written, and a closer look would find nothing.
    """
    size, said_bytes = window.cover.end - window.cover.start, _bytes(said)
    close = _holding_data(window, said)
    some = 2 * said_bytes <= size or _bytes(close) < _bytes(_holding_data(window, [window.cover]))
    fine: dict[int, bytes] = {}
    if before is not None and close:
        fine, close = _blank(before, window.cover, close)
    if ask is not None and some and 0 < len(close) <= DIGEST_INTERVALS_MAX:
        fine |= _by_block(close, await ask(close, FINE_BYTES))
    equal = _equal(row, window.cover, said) if row is not None else Digester(0)
    return Difference(tuple(_pieces(window, said)), fine, equal, size - said_bytes)


def _blank(
    before: Held, cover: Interval, intervals: Sequence[Interval]
) -> tuple[dict[int, bytes], list[Interval]]:
    """What of a window's intervals is zero at the target, as digests of 4 KiB, by block; and the rest."""
    blank: list[Interval] = []
    rest: list[Interval] = []
    for start, end in intervals:
        first, behind = _in_row(cover, start), _in_row(cover, end)
        zeros = zero_row(Interval(start, end), before.size, before.seed)
        data = Coverage(differing(before.row[first:behind], zeros, start, end))
        blank.extend(data.gaps(start, end))
        rest.extend(data.intervals())
    digests = b"".join(zero_digests(end - start, before.seed, FINE_BYTES) for start, end in blank)
    return dict(_by_block(blank, digests)), rest


async def _digested(window: Window, source: Source, pool: BufferPool, seed: int) -> bytes:
    """The digests of a window's blocks, read from the source."""
    digester = Digester(seed)
    digester.at(window.cover.start)
    buffer = pool.take(SCAN_BYTES)
    try:
        for batch in _batches(window.extents):
            data = [extent for extent in batch if not extent.zero]
            size = sum(extent.length for extent in data)
            await source.read_into(data, buffer.view[:size], partial(_digest, digester, batch, buffer))
    finally:
        pool.give(buffer)
    digester.finish()
    row = bytearray(zero_row(window.cover, source.size_bytes, seed))
    for start, digests in digester.rows:
        at = _in_row(window.cover, start)
        row[at : at + len(digests)] = digests
    return bytes(row)


def _batches(extents: Sequence[Extent]) -> Iterator[list[Extent]]:
    """The extents in groups, each with up to ``SCAN_BYTES`` of data; long ones are split."""
    batch: list[Extent] = []
    room = SCAN_BYTES
    for extent in extents:
        offset = extent.offset
        while offset < extent.end:
            length = extent.end - offset if extent.zero else min(room, extent.end - offset)
            batch.append(Extent(offset, length, extent.zero))
            offset += length
            room -= 0 if extent.zero else length
            if not room:
                yield batch
                batch, room = [], SCAN_BYTES
    if batch:
        yield batch


def _digest(digester: Digester, batch: Sequence[Extent], buffer: Buffer) -> None:
    """Tell the digester a group of extents, whose data lies in the buffer."""
    position = 0
    for extent in batch:
        if extent.zero:
            digester.zero(extent.length)
        else:
            digester.data(buffer.view[position : position + extent.length])
            position += extent.length


def _bound(position: int, room: int) -> int:
    """The last end of a block within ``room``, at least the next one: a window ends with a block."""
    behind = position + max(room, 0)
    return max(behind - behind % BLOCK_BYTES, position + BLOCK_BYTES - position % BLOCK_BYTES)


def _clipped(intervals: Sequence[Interval], gap: Interval) -> Iterator[Interval]:
    """What of sorted intervals lies in a gap."""
    at = bisect_right(intervals, gap.start, key=lambda interval: interval.end)
    while at < len(intervals) and intervals[at].start < gap.end:
        yield Interval(max(intervals[at].start, gap.start), min(intervals[at].end, gap.end))
        at += 1


async def _listed_extents(source: Source, intervals: Iterable[Interval]) -> AsyncIterator[Extent]:
    """The extents of these stretches: in long ones the source is asked for holes, short ones are read."""
    for start, end in intervals:
        if end - start < LOOK_BYTES:
            yield Extent(start, end - start)
            continue
        async for found in source.extents(start):
            yield Extent(found.offset, min(found.end, end) - found.offset, found.zero)
            if found.end >= end:
                break


def _window(extents: Sequence[Extent]) -> Window:
    return Window(Interval(extents[0].offset, extents[-1].end), tuple(extents))


def _pieces(window: Window, said: Sequence[Interval]) -> Iterator[Piece]:
    """Pieces that say the intervals and cover the rest of the window without a word."""
    cutter = Cutter()
    position = window.cover.start
    extents = iter(window.extents)
    extent = next(extents, None)
    for start, end in said:
        if position < start:
            cutter.skip(position, start)
        while extent is not None and extent.offset < end:
            first, behind = max(extent.offset, start), min(extent.end, end)
            if first < behind:
                yield from cutter.add(Extent(first, behind - first, extent.zero))
            if extent.end > end:
                break
            extent = next(extents, None)
        position = end
    if position < window.cover.end:
        cutter.skip(position, window.cover.end)
    yield from cutter.finish()


def _equal(ours: bytes, cover: Interval, said: Sequence[Interval]) -> Digester:
    """The digests of a window's blocks outside the intervals."""
    found = Digester(0)
    position = cover.start
    for start, end in [*said, Interval(cover.end, cover.end)]:
        if position < start:
            found.rows.append((position, ours[_in_row(cover, position) : _in_row(cover, start)]))
        position = end
    return found


def _in_row(cover: Interval, position: int) -> int:
    """Where in a row of digests of ``cover`` the block that begins, or the row that ends, there does."""
    return -(-(position - cover.start) // BLOCK_BYTES) * DIGEST_BYTES


def _holding_data(window: Window, said: Sequence[Interval]) -> list[Interval]:
    """The blocks of the intervals in which the source has data: zeros are said without a second look."""
    data = Coverage()
    for extent in window.extents:
        if not extent.zero:
            behind = extent.end + -extent.end % BLOCK_BYTES
            data.add(extent.offset - extent.offset % BLOCK_BYTES, min(behind, window.cover.end))
    found = []
    for start, end in said:
        position = start
        for gap in (*data.gaps(start, end), Interval(end, end)):
            if position < gap.start:
                found.append(Interval(position, gap.start))
            position = gap.end
    return found


def _bytes(intervals: Sequence[Interval]) -> int:
    return sum(end - start for start, end in intervals)


def _by_block(intervals: Sequence[Interval], digests: bytes) -> Iterator[tuple[int, bytes]]:
    """A row of digests of 4 KiB, by block of 64 KiB."""
    at = 0
    for start, end in intervals:
        for offset in range(start, end, BLOCK_BYTES):
            size = -(-min(BLOCK_BYTES, end - offset) // FINE_BYTES) * DIGEST_BYTES
            yield offset, digests[at : at + size]
            at += size
