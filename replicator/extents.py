"""Intervals and extents of a disk: coverage algebra, and the cutting of extents into frames.

Pure: no I/O, no clock. All numbers are bytes. Coverage in practice is a few long intervals, so sorted lists
and binary search beat any tree.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

from protocol.constants import EXTENT_BYTES, EXTENT_MAX_BYTES, KIB, MIB
from protocol.messages import Interval
from protocol.payload import Extent

FRAME_RAW_BYTES = MIB  # design: about 1 MiB of raw data a frame
GRAIN_BYTES = 64 * KIB  # the block of a digest (``digest.py``)
FRAME_TABLE_BYTES = 16 * 1024  # 1,024 extents: keeps a frame of tiny extents from becoming mostly table


class Relation(Enum):
    """How an interval stands to what is already covered."""

    NEW = "new"
    COVERED = "covered"
    PARTIAL = "partial"


class Coverage:
    """A set of bytes of one disk, kept as sorted, disjoint, non-touching intervals."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in intervals:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Add bytes [start, end); what was there already stays."""
        if start >= end:
            raise ValueError(f"interval [{start}, {end}) is empty")
        first = bisect_left(self._ends, start)  # the first interval that overlaps or touches
        behind = bisect_right(self._starts, end)
        if first < behind:
            start = min(start, self._starts[first])
            end = max(end, self._ends[behind - 1])
        self._starts[first:behind] = [start]
        self._ends[first:behind] = [end]

    def remove(self, start: int, end: int) -> None:
        """Take bytes [start, end) out; what of them is not there does not matter."""
        if start >= end:
            raise ValueError(f"interval [{start}, {end}) is empty")
        first = bisect_right(self._ends, start)  # the first interval that ends behind start
        behind = bisect_left(self._starts, end)
        if first >= behind:
            return
        before, after = (self._starts[first], start), (end, self._ends[behind - 1])
        kept = [(begin, stop) for begin, stop in (before, after) if begin < stop]
        self._starts[first:behind] = [begin for begin, _ in kept]
        self._ends[first:behind] = [stop for _, stop in kept]

    def relation(self, start: int, end: int) -> Relation:
        """Whether [start, end) is all new, all covered, or partly covered."""
        at = bisect_right(self._ends, start)  # the first interval that ends behind start
        if at == len(self._starts) or self._starts[at] >= end:
            return Relation.NEW
        if self._starts[at] <= start and end <= self._ends[at]:
            return Relation.COVERED
        return Relation.PARTIAL

    def gaps(self, start: int, end: int) -> Iterator[Interval]:
        """What of [start, end) is missing, in order. With ``add`` called meanwhile: as it then is."""
        while start < end:
            at = bisect_right(self._ends, start)
            if at == len(self._starts) or self._starts[at] >= end:
                yield Interval(start, end)
                return
            gap = Interval(start, self._starts[at])
            start = self._ends[at]
            if gap.start < gap.end:
                yield gap

    def intervals(self) -> tuple[Interval, ...]:
        """All of it, in order."""
        return tuple(map(Interval, self._starts, self._ends))

    @property
    def covered_bytes(self) -> int:
        """How many bytes are covered, each counted once."""
        return sum(self._ends) - sum(self._starts)

    def is_whole(self, size: int) -> bool:
        """Whether all of [0, size) is covered."""
        return self.relation(0, size) is Relation.COVERED


class Piece(NamedTuple):
    """What one frame will say: a cover and what differs in it; ``raw_bytes`` counts the extents with data."""

    cover: Interval
    extents: tuple[Extent, ...]
    raw_bytes: int


class Cutter:
    """Cuts touching stretches of a disk into pieces of about ``FRAME_RAW_BYTES`` of data and a bounded table.

    Small extents share a piece; long ones are split. A piece ends at a multiple of ``grain`` (or where the
    input does), so that every block of that size is whole in one piece: its digest can be made there. A piece
    may therefore be larger than the limits by what one grain holds. Feed it with ``add`` and ``skip``, end
    with ``finish``; after that it may go on anywhere else on the disk.
    """

    __slots__ = ("_end", "_extents", "_extents_max", "_grain", "_raw", "_raw_max", "_start")

    def __init__(
        self,
        raw_max: int = FRAME_RAW_BYTES,
        extents_max: int = FRAME_TABLE_BYTES // EXTENT_BYTES,
        grain: int = GRAIN_BYTES,
    ) -> None:
        self._raw_max = raw_max
        self._extents_max = extents_max
        self._grain = grain
        self._extents: list[Extent] = []
        self._raw = 0
        self._start = self._end = -1

    def add(self, extent: Extent) -> Iterator[Piece]:
        """Take the next extent, which touches what came before; yields the pieces that became full.

        Raises:
            ValueError: it does not touch, so that a piece would cover bytes of which nothing was said.
        """
        offset, end = extent.offset, extent.end
        while offset < end:
            self._touch(offset)
            length = min(end - offset, self._room(offset, extent.zero))
            self._extents.append(Extent(offset, length, extent.zero))
            self._raw += 0 if extent.zero else length
            offset += length
            self._end = offset
            if self._full and offset % self._grain == 0:
                yield self._cut()

    def skip(self, start: int, end: int) -> None:
        """[start, end) is as it was: it is covered without a word. ``ValueError`` as ``add``."""
        self._touch(start)
        self._end = end

    def finish(self) -> Iterator[Piece]:
        """The last piece, if anything is left."""
        if self._start >= 0:
            yield self._cut()

    def _touch(self, offset: int) -> None:
        if self._start < 0:
            self._start = self._end = offset
        if offset != self._end:
            raise ValueError(f"what begins at {offset} does not touch what ended at {self._end}")

    @property
    def _full(self) -> bool:
        return self._raw >= self._raw_max or len(self._extents) >= self._extents_max

    def _room(self, offset: int, zero: bool) -> int:
        """How long an extent from ``offset`` this piece takes: to its limit, at least to the next grain."""
        to_grain = self._grain - offset % self._grain
        if self._full:
            return to_grain
        if zero:
            return EXTENT_MAX_BYTES
        behind = offset + self._raw_max - self._raw
        return max(behind - behind % self._grain - offset, to_grain)

    def _cut(self) -> Piece:
        piece = Piece(Interval(self._start, self._end), tuple(self._extents), self._raw)
        self._extents, self._raw, self._start, self._end = [], 0, -1, -1
        return piece
