"""A disk that lies in a page blob's snapshot, or in the export of a managed disk; only read.

What was never written is a hole, and is neither asked for nor transferred. Not here: how snapshots come and
go and what changed between them (``azure/cycle.py``), requests and their repetition (``azure/blob.py``).
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Self, TypeVar

from protocol.constants import KIB, MIB, SECTOR_BYTES
from protocol.messages import Interval
from protocol.payload import Extent
from replicator.azure.blob import PageBlob, Section
from replicator.errors import SourceError, cause_of
from replicator.formats.vhd import FOOTER_BYTES, parse_footer
from replicator.workers import Workers

T = TypeVar("T")

# A page blob takes 500 requests and gives 60 MiB in a second: where a gap is shorter, reading it costs less
# than another request.
GAP_BYTES: Final = 120 * KIB
REQUEST_BYTES: Final = 4 * MIB
REQUESTS: Final = 16  # of one disk at the same time


@dataclass(slots=True)
class _Request:
    """One range to be asked for, and where its bytes go."""

    offset: int
    end: int
    sections: list[Section] = field(default_factory=list)


class PageBlobSource:
    """A page blob that does not change, as a ``Source`` (``base.py``). Made by ``open``.

    Attributes:
        name, size_bytes: see ``Source``; without a VHD's footer.
        listed: what of the blob was ever written and not cleared, in order, apart; with a footer's pages.
        identity: what ``fingerprint`` tells.
    """

    def __init__(
        self, blob: PageBlob, workers: Workers, size_bytes: int, listed: Sequence[Interval], identity: str
    ) -> None:
        self.name = str(blob)
        self.size_bytes = size_bytes
        self.listed = tuple(listed)
        self.identity = identity
        self._data = tuple(_merged(self.listed, size_bytes))
        self._blob = blob
        self._workers = workers
        self._requests = asyncio.Semaphore(REQUESTS)
        self._closed = False

    @classmethod
    async def open(cls, blob: PageBlob, workers: Workers, identity: str = "") -> Self:
        """Open a snapshot or an export; the way to it stays the caller's to close.

        Args:
            blob: what it is read from. workers: where what follows a read goes.
            identity: what no other content of the disk is known by; empty: the snapshot's id.

        Raises:
            SourceError: ``source.empty``: nothing is left beside a footer. Others as ``PageBlob``.
        """
        size = await blob.size_bytes()
        tail = bytearray(min(size, FOOTER_BYTES))
        if tail:
            await blob.read(size - len(tail), [memoryview(tail)])
        if parse_footer(bytes(tail)) is not None:
            size -= FOOTER_BYTES
        if size <= 0:
            raise SourceError(
                "source.empty",
                f"{blob} has no bytes",
                cause="the blob was created and never given a size, or is a footer alone",
                fix="check that this is the disk that was meant",
            )
        return cls(blob, workers, size, await blob.ranges(), identity or blob.snapshot or "")

    async def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        """See ``Source.extents``. Short gaps between pages count as data."""
        self._check_open()
        if start % SECTOR_BYTES or not 0 <= start <= self.size_bytes:
            raise ValueError(f"position {start} is not a sector of a disk of {self.size_bytes} bytes")
        for begin, end in self._data_in(start, self.size_bytes):
            if start < begin:
                yield Extent(start, begin - start, zero=True)
            yield Extent(begin, end - begin)
            start = end
        if start < self.size_bytes:
            yield Extent(start, self.size_bytes - start, zero=True)

    async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        """See ``Source.read_into``. At most ``REQUESTS`` ranges of a disk are asked for at once."""
        self._check_open()
        if sum(extent.length for extent in extents) != len(view):
            raise ValueError(f"extents and memory of {len(view)} bytes differ in length")
        if any(not 0 <= extent.offset < extent.end <= self.size_bytes for extent in extents):
            raise ValueError(f"an extent is outside a disk of {self.size_bytes} bytes")
        requests = list(self._plan(extents, view))
        if len(requests) == 1:
            await self._ask(requests[0])
        elif requests:
            try:
                async with asyncio.TaskGroup() as asking:
                    for request in requests:
                        asking.create_task(self._ask(request))
            except BaseExceptionGroup as group:
                raise cause_of(group) from None
        return await self._workers.run(then)

    async def fingerprint(self) -> str:
        """See ``Source.fingerprint``: a snapshot's id, or what was given for it."""
        return self.identity

    async def changed(self) -> bool:
        """See ``Source.changed``: never."""
        self._check_open()
        return False

    async def close(self) -> None:
        """See ``Source.close``."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.name} is closed")

    async def _ask(self, request: _Request) -> None:
        async with self._requests:
            await self._blob.read(request.offset, request.sections)

    def _plan(self, extents: Sequence[Extent], view: memoryview) -> Iterator[_Request]:
        """The ranges to be asked for, neighbours joined over short gaps; zeros are filled in here."""
        request: _Request | None = None
        for offset, part in self._parts(extents, view):
            gap = offset - request.end if request is not None else -1
            end = offset + len(part)
            if request is not None and 0 <= gap <= GAP_BYTES and end - request.offset <= REQUEST_BYTES:
                if gap:
                    request.sections.append(gap)
            else:
                if request is not None:
                    yield request
                request = _Request(offset, end)
            request.sections.append(part)
            request.end = end
        if request is not None:
            yield request

    def _parts(self, extents: Sequence[Extent], view: memoryview) -> Iterator[tuple[int, memoryview]]:
        """(offset, memory) of what holds data, in pieces of a request's size at most."""
        at = 0
        for extent in extents:
            shift = at - extent.offset
            position = extent.offset
            for start, end in (*self._data_in(extent.offset, extent.end), (extent.end, extent.end)):
                if position < start:
                    view[position + shift : start + shift] = bytes(start - position)
                for first in range(start, end, REQUEST_BYTES):
                    behind = min(first + REQUEST_BYTES, end)
                    yield first, view[first + shift : behind + shift]
                position = end
            at += extent.length

    def _data_in(self, start: int, end: int) -> Iterator[Interval]:
        at = bisect_right(self._data, start, key=lambda interval: interval.end)
        while at < len(self._data) and self._data[at].start < end:
            yield Interval(max(self._data[at].start, start), min(self._data[at].end, end))
            at += 1


def _merged(listed: Sequence[Interval], size_bytes: int) -> Iterator[Interval]:
    """What of the list is inside, joined over short gaps: many single pages make one long stretch."""
    joined: Interval | None = None
    for start, stop in listed:
        end = min(stop, size_bytes)
        if start >= end:
            break
        if joined is not None and start - joined.end <= GAP_BYTES:
            joined = Interval(joined.start, end)
            continue
        if joined is not None:
            yield joined
        joined = Interval(start, end)
    if joined is not None:
        yield joined
