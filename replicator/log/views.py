"""Views: a disk as it was at a retained point, read without moving the image.

::

    view at a point = image, painted over with the undo of every later epoch, the newest first,
                      and with what is not applied of the redo up to the point, the oldest epoch first

The undo of the epoch next to the point is painted last: the *older* pre-image wins. It works while epochs are
being applied, since a pre-image is in its log before the image changes where it comes from, and redo stays in
its log until the image holds it. Not here: which points there are (``points.py``).
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from threading import Lock
from typing import Final, TypeAlias, TypeVar

from protocol.constants import MIB, SECTOR_BYTES
from protocol.errors import RemoteProtocolError
from protocol.header import Flags
from protocol.messages import Interval
from protocol.payload import Extent, new_decompressor, unpack
from replicator.errors import ReplicatorError
from replicator.extents import Coverage
from replicator.log.index import CoverIndex, Place, entry_at
from replicator.log.log import Kind, Log
from replicator.log.records import record_bytes
from replicator.log.workspace import broken
from replicator.sources.base import Source
from replicator.workers import Workers

T = TypeVar("T")
Generation: TypeAlias = tuple[int, tuple[int, ...]]
"""As ``Past`` has it, and the oldest segment of each redo log: what goes from there is in the image."""

_KEEP_BYTES: Final = 16 * MIB  # of unpacked records: those that the next read is likely to touch again
_HOLE_BYTES: Final = 256 * MIB  # of a hole, looked at in one go


@dataclass(frozen=True, slots=True)
class Past:
    """What leads from an image back to a point. Its functions are called from any thread.

    Attributes:
        logs: the undo logs of all epochs after the point, oldest first; they stay open while they are listed.
        redo: the redo logs of the epochs up to the point that are not yet applied whole, oldest first; they
            stay open while they are listed.
        generation: changes before an image is written by an epoch that ``logs`` did not list, and before a
            log that was listed is closed or removed, at which time the image holds what makes it needless.
    """

    logs: Callable[[], Sequence[Log]]
    generation: Callable[[], int]
    redo: Callable[[], Sequence[Log]] = tuple


class PointView:
    """A disk at a retained point: a ``Source``, which it makes of ``base``, the image as it is now.

    Args:
        base: closed with the view; that it changes is no harm.
        disk: its number.
        point: id of the point, in hex.
        past: what leads there.
        workers: where blocking calls go.
        seed: the installation's hash seed.

    Attributes:
        name, size_bytes: see ``Source``.
    """

    def __init__(self, base: Source, disk: int, point: str, past: Past, workers: Workers, seed: int) -> None:
        self.name = f"{base.name} at {point}"
        self.size_bytes = base.size_bytes
        self._base = base
        self._disk = disk
        self._point = point
        self._past = past
        self._workers = workers
        self._layers = _Layers(past, disk)
        self._records = _Records(seed)

    async def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        """See ``Source.extents``. A hole of the image is one of the point where no log has data for it."""
        if start % SECTOR_BYTES or not 0 <= start <= self.size_bytes:
            raise ValueError(f"position {start} is not a sector of a disk of {self.size_bytes} bytes")
        position, generation = start, None
        while self._generation() != generation:
            generation = self._generation()
            async with aclosing(self._parts(position, generation)) as parts:
                async for part in parts:
                    yield part
                    position = part.end

    async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        """See ``Source.read_into``; also StateError ``log.damaged``, TargetError ``log.read_failed``."""
        while True:
            finish = partial(self._finish, extents, view, self._generation(), then)
            answer = await self._base.read_into(extents, view, finish)
            if answer is not None:
                return answer[0]

    async def fingerprint(self) -> str:
        """See ``Source.fingerprint``: a point never changes."""
        return self._point

    async def changed(self) -> bool:
        """See ``Source.changed``: never."""
        await self._base.changed()  # for its errors: no log leads back from another size
        return False

    async def close(self) -> None:
        """See ``Source.close``. The logs are not its own."""
        await self._base.close()

    async def _parts(self, start: int, generation: Generation) -> AsyncGenerator[Extent, None]:
        """The disk from ``start`` on, as far as the generation lasts."""
        async for extent in self._base.extents(start):
            position = extent.offset
            while extent.zero and position < extent.end:
                look = partial(self._hole, position, extent.end, generation)
                found = await self._workers.run(self._if_still, generation, look)
                if found is None:
                    return
                for part in found[0]:
                    yield part
                    position = part.end
            if not extent.zero:
                yield extent

    def _generation(self) -> Generation:
        return self._past.generation(), tuple(min(log.segments(), default=0) for log in self._past.redo())

    # What follows blocks and runs in a worker.

    def _if_still(self, generation: Generation, look: Callable[[], T]) -> tuple[T] | None:
        """What ``look`` returns; None if the generation is over, and it may have seen anything."""
        try:
            seen = look()
        except (LookupError, ReplicatorError):
            if self._generation() == generation:
                raise
            return None  # a log went away meanwhile
        return (seen,) if self._generation() == generation else None

    def _finish(
        self, extents: Sequence[Extent], view: memoryview, generation: Generation, then: Callable[[], T]
    ) -> tuple[T] | None:
        """``view`` holds what the image did: make it the point's, and go on. None: to be read once more."""
        painted = self._if_still(generation, partial(self._paint, extents, view, generation))
        return None if painted is None else (then(),)

    def _paint(self, extents: Sequence[Extent], view: memoryview, generation: Generation) -> None:
        position = 0
        for extent, places in zip(extents, self._layers.records(generation, extents), strict=True):
            part = view[position : position + extent.length]
            position += extent.length
            for log, place in places:
                self._records.load(log, place).paint(part, extent.offset)

    def _hole(self, start: int, end: int, generation: Generation) -> list[Extent]:
        """A hole of the image as extents of the point, from its start on, at least one."""
        first = self._layers.next_cover(generation, start)
        if first is None or first >= end:
            return [Extent(start, end - start, zero=True)]
        if first > start:
            return [Extent(start, first - start, zero=True)]
        end = min(end, start + _HOLE_BYTES)
        data = Coverage()
        for log, place in self._layers.records(generation, [Extent(start, end - start)])[0]:
            for stretch in self._records.load(log, place).data(start, end):
                data.add(*stretch)
        found = []
        for gap in [*data.gaps(start, end), Interval(end, end)]:
            if start < gap.start:
                found.append(Extent(start, gap.start - start))
            if gap.start < gap.end:
                found.append(Extent(gap.start, gap.end - gap.start, zero=True))
            start = gap.end
        return found


class _Layers:
    """The logs that make a point of an image, indexed, in the order of painting. For any thread."""

    def __init__(self, past: Past, disk: int) -> None:
        self._past = past
        self._disk = disk
        self._indexes: list[CoverIndex] = []
        self._generation: Generation | None = None
        self._lock = Lock()

    def records(self, generation: Generation, extents: Sequence[Extent]) -> list[list[tuple[Log, Place]]]:
        """For each extent the records that may have a byte of it, in the order of painting."""
        with self._lock:
            self._refresh(generation)
            return [
                [(index.log, place) for index in self._indexes for place in self._places(index, extent)]
                for extent in extents
            ]

    def _places(self, index: CoverIndex, extent: Extent) -> Iterator[Place]:
        places = index.records(self._disk, extent.offset, extent.end)
        if index.log.kind is Kind.UNDO:
            yield from reversed(places)
        else:  # in any order: they never overlap
            there = index.log.segments()
            yield from (place for place in places if place.segment in there)

    def next_cover(self, generation: Generation, position: int) -> int | None:
        """The first byte at or behind ``position`` that any log may have."""
        with self._lock:
            self._refresh(generation)
            found = [index.next_cover(self._disk, position) for index in self._indexes]
            return min((first for first in found if first is not None), default=None)

    def _refresh(self, generation: Generation) -> None:
        if self._generation != generation:
            known = {id(index.log): index for index in self._indexes}
            logs = [*reversed(self._past.logs()), *self._past.redo()]
            self._indexes = [known.get(id(log)) or CoverIndex(log) for log in logs]
            self._generation = generation
        for index in self._indexes:
            index.refresh()


class _Record:
    """A record of a log, unpacked."""

    __slots__ = ("_extents", "_positions", "_raw", "_starts", "size_bytes")

    def __init__(self, extents: Sequence[Extent], raw: memoryview) -> None:
        self.size_bytes = len(raw) + 256 * len(extents)  # what an extent takes as Python has it
        self._extents = extents
        self._raw = raw
        self._starts = [extent.offset for extent in extents]
        self._positions = list(accumulate((0 if zero else length for _, length, zero in extents), initial=0))

    def paint(self, view: memoryview, offset: int) -> None:
        """Put the bytes that it has into ``view``, which stands for the disk from ``offset`` on."""
        end = offset + len(view)
        for at in self._within(offset, end):
            extent = self._extents[at]
            first, behind = max(offset, extent.offset), min(end, extent.end)
            if extent.zero:
                view[first - offset : behind - offset] = bytes(behind - first)
            else:
                shift = self._positions[at] - extent.offset
                view[first - offset : behind - offset] = self._raw[first + shift : behind + shift]

    def data(self, start: int, end: int) -> Iterator[Interval]:
        """What it has of [start, end), as far as it is not known to be zero."""
        for at in self._within(start, end):
            extent = self._extents[at]
            if not extent.zero:
                yield Interval(max(start, extent.offset), min(end, extent.end))

    def _within(self, start: int, end: int) -> range:
        """The extents that have a byte of [start, end)."""
        first = bisect_right(self._starts, start)
        if first and self._extents[first - 1].end > start:
            first -= 1
        return range(first, bisect_left(self._starts, end))


class _Records:
    """Reads records of logs, and keeps those that were used last. For any thread."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._kept: OrderedDict[tuple[Log, Place], _Record] = OrderedDict()
        self._kept_bytes = 0
        self._lock = Lock()

    def load(self, log: Log, place: Place) -> _Record:
        """The record there.

        Raises:
            LookupError, StateError, TargetError: as ``Log.read``.
        """
        key = log, place
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        record = self._read(log, place)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = record
                self._kept_bytes += record.size_bytes
            while self._kept_bytes > _KEEP_BYTES and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].size_bytes
        return record

    def _read(self, log: Log, place: Place) -> _Record:
        entry = entry_at(log, place)
        header = entry.header
        body = log.read(place.segment, entry, memoryview(mmap.mmap(-1, record_bytes(header))))
        into = memoryview(bytearray(header.raw_len)) if header.flags & Flags.ZSTD else None
        try:
            return _Record(*unpack(header, body, into, new_decompressor(), self._seed))
        except RemoteProtocolError as error:
            raise broken(header, error) from None
