"""Intervals and extents of a disk: coverage algebra, and the cutting of extents into frames.

Pure: no I/O, no clock. All numbers are bytes. Coverage in practice is a few long intervals, so sorted lists
and binary search beat any tree.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

from protocol.constants import EXTENT_BYTES, EXTENT_MAX_BYTES, MIB
from protocol.messages import Interval
from protocol.payload import Extent

FRAME_RAW_BYTES = MIB  # design: about 1 MiB of raw data a frame
FRAME_TABLE_BYTES = 16 * 1024  # 1,024 extents: keeps a frame of tiny extents from becoming mostly table


class Relation(Enum):
    """How an interval stands to what is already covered."""

    NEW = "new"
    COVERED = "covered"
    PARTIAL = "partial"


class Coverage:
    """A set of bytes of one disk, kept as sorted, disjoint, non-touching intervals."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
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
    """What one frame will say: a cover and the extents that fill it; ``raw_bytes`` counts those with data."""

    cover: Interval
    extents: tuple[Extent, ...]
    raw_bytes: int


class Cutter:
    """Cuts touching extents into pieces of at most ``FRAME_RAW_BYTES`` of data and a bounded table.

    Small extents share a piece; long ones are split. Feed it with ``add``, end with ``finish``; after that it
    may go on anywhere else on the disk.
    """

    __slots__ = ("_extents", "_extents_max", "_raw", "_raw_max")

    def __init__(
        self, raw_max: int = FRAME_RAW_BYTES, extents_max: int = FRAME_TABLE_BYTES // EXTENT_BYTES
    ) -> None:
        self._raw_max = raw_max
        self._extents_max = extents_max
        self._extents: list[Extent] = []
        self._raw = 0

    def add(self, extent: Extent) -> Iterator[Piece]:
        """Take the next extent, which touches the one before; yields the pieces that became full.

        Raises:
            ValueError: it does not touch, so that a piece would cover bytes of which nothing was said.
        """
        offset, end = extent.offset, extent.end
        if self._extents and offset != self._extents[-1].end:
            raise ValueError(f"extent at {offset} does not touch {self._extents[-1]}")
        while offset < end:
            room = EXTENT_MAX_BYTES if extent.zero else self._raw_max - self._raw
            length = min(end - offset, room)
            self._extents.append(Extent(offset, length, extent.zero))
            self._raw += 0 if extent.zero else length
            offset += length
            if self._raw >= self._raw_max or len(self._extents) >= self._extents_max:
                yield self._cut()

    def finish(self) -> Iterator[Piece]:
        """The last piece, if anything is left."""
        if self._extents:
            yield self._cut()

    def _cut(self) -> Piece:
        cover = Interval(self._extents[0].offset, self._extents[-1].end)
        piece = Piece(cover, tuple(self._extents), self._raw)
        self._extents, self._raw = [], 0
        return piece
