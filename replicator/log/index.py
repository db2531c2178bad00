"""Where in a log the records lie that may have a byte of a given stretch: by the covers in their headers.

Four numbers a record, so that days of history fit into memory; the extents stay on disk. Not here: what the
records say.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from replicator.log.log import Log
from replicator.log.records import Entry


class Place(NamedTuple):
    """Where a record lies in its log."""

    segment: int
    offset: int


class CoverIndex:
    """The records of a log by disk and stretch, as of the last ``refresh``; there is one in the making."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._disks: dict[int, _Covers] = {}
        self._segment = 0  # the last one seen, and how many of its records
        self._records = 0
        self._complete = False
        self.refresh()

    def refresh(self) -> None:
        """Take in what was written since.

        Raises:
            LookupError, StateError, TargetError: as ``Log.entries``.
        """
        if self._complete:
            return
        finished = self.log.finished  # asked first: what is written after it was asked is found next time
        for segment in self.log.segments():
            if segment < self._segment:
                continue
            entries = self.log.entries(segment)
            if segment > self._segment:
                self._segment, self._records = segment, 0
            for entry in entries[self._records :]:
                self._disks.setdefault(entry.header.disk, _Covers()).add(segment, entry)
            self._records = len(entries)
        self._complete = finished

    def records(self, disk: int, start: int, end: int) -> list[Place]:
        """Records whose cover has a byte of [start, end), in the order of the log."""
        covers = self._disks.get(disk)
        return sorted(covers.touching(start, end)) if covers else []

    def next_cover(self, disk: int, position: int) -> int | None:
        """The first byte at or behind ``position`` that lies in a cover; None if there is none."""
        covers = self._disks.get(disk)
        return covers.next(position) if covers else None


def entry_at(log: Log, place: Place) -> Entry:
    """The record there.

    Raises:
        LookupError, StateError, TargetError: as ``Log.entries``.
    """
    for entry in log.entries(place.segment):
        if entry.offset == place.offset:
            return entry
    raise LookupError(f"no record at {place}")


class _Covers:
    """The records of one disk, a column each for where they begin and end, and where they lie."""

    __slots__ = ("_ends", "_offsets", "_reach", "_segments", "_starts")

    def __init__(self) -> None:
        self._starts = array("Q")
        self._ends = array("Q")
        self._segments = array("Q")
        self._offsets = array("Q")
        self._reach = array("Q")  # how far the covers up to this one reach at most; shorter when out of date

    def add(self, segment: int, entry: Entry) -> None:
        self._starts.append(entry.header.cover_start)
        self._ends.append(entry.header.cover_end)
        self._segments.append(segment)
        self._offsets.append(entry.offset)

    def touching(self, start: int, end: int) -> Iterator[Place]:
        self._sort()
        at = bisect_left(self._starts, end) - 1
        while at >= 0 and self._reach[at] > start:
            if self._ends[at] > start:
                yield Place(self._segments[at], self._offsets[at])
            at -= 1

    def next(self, position: int) -> int | None:
        self._sort()
        at = bisect_left(self._starts, position)
        if at and self._reach[at - 1] > position:
            return position
        return self._starts[at] if at < len(self._starts) else None

    def _sort(self) -> None:
        if len(self._reach) == len(self._starts):
            return
        order = sorted(range(len(self._starts)), key=self._starts.__getitem__)
        for name in ("_starts", "_ends", "_segments", "_offsets"):
            column = getattr(self, name)
            setattr(self, name, array("Q", map(column.__getitem__, order)))
        self._reach = array("Q", accumulate(self._ends, max))
