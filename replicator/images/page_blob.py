"""A page blob as an image: the disk, zeros up to a whole MiB, and the footer of a fixed VHD.

That is what Azure imports as a managed disk. The SDK's client lives on the event loop, where source and image
share it with its tries and renewed credentials; an image's methods block, in worker threads. So each of them
hands its requests to the loop and waits: one thread waits for many requests at a time, where the SDK's own
blocking client would need a thread for each. A page that Azure has confirmed is durable: ``sync`` has nothing
left to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Self, TypeVar
from uuid import UUID

from protocol.constants import KIB, MIB
from protocol.messages import Interval
from protocol.payload import Extent
from replicator.azure.blob import PUT_MAX_BYTES, PageBlob, Section
from replicator.errors import TargetError, cause_of
from replicator.extents import Coverage
from replicator.formats.vhd import ALIGNMENT_BYTES, FOOTER_BYTES, make_footer, parse_footer
from replicator.images.opening import refuse_size
from replicator.images.reading import Digested, Found, digest_found

T = TypeVar("T")

SIZE_KEY: Final = "replicator_disk_bytes"  # metadata: the disk's own size, before it was rounded up
REQUESTS_MAX: Final = 16  # under way at a time for one image
READ_BYTES: Final = 4 * MIB
GAP_BYTES: Final = 120 * KIB  # read and thrown away sooner than another request is made


class PageBlobImage:
    """An ``Image`` in a page blob. Made inside the event loop, on which its requests run.

    Attributes:
        name, size_bytes, blank: see ``Image``.
    """

    def __init__(self, blob: PageBlob, size_bytes: int, *, blank: bool) -> None:
        self.name = blob.name
        self.size_bytes = size_bytes
        self.blank = blank
        self._blob = blob
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(REQUESTS_MAX)
        self._written = Coverage()  # what is not known to be zeros, once Azure was asked what it holds
        self._listed = blank
        self._listing = asyncio.Lock()
        self._closed = False

    @classmethod
    async def create(
        cls, blob: PageBlob, size_bytes: int, identity: UUID, now: datetime, metadata: Mapping[str, str]
    ) -> Self:
        """A new, blank disk, in place of whatever is there.

        Args:
            blob: where.
            size_bytes: of the disk.
            identity: of the disk, for its footer. now: when it is made.
            metadata: of the blob, beside our own.

        Raises:
            TargetError: ``target.bad_size``. Others as ``tries.tried``.
        """
        refuse_size(size_bytes, blob.name)
        rounded = size_bytes + -size_bytes % ALIGNMENT_BYTES
        await blob.create(rounded + FOOTER_BYTES, {**metadata, SIZE_KEY: str(size_bytes)})
        await blob.put(rounded, make_footer(rounded, identity, now))
        return cls(blob, size_bytes, blank=True)

    @classmethod
    async def open(cls, blob: PageBlob) -> Self:
        """A disk that is there, ours or another's fixed VHD.

        Raises:
            TargetError: ``target.no_vhd``; ``azure.missing``. Others as ``tries.tried``.
        """
        found = await blob.properties()
        content = bytearray(FOOTER_BYTES)
        before = found.size_bytes - FOOTER_BYTES
        footer = None
        if before > 0:
            await blob.read(before, [memoryview(content)])
            footer = parse_footer(bytes(content))
        if footer is None or footer.disk_bytes != before:
            raise _no_vhd(blob.name)
        told = found.metadata.get(SIZE_KEY, "")
        size = int(told) if told.isdecimal() else before
        return cls(blob, size if before - ALIGNMENT_BYTES < size <= before else before, blank=False)

    def write(self, extents: Sequence[Extent], payload: memoryview) -> None:
        """See ``Image.write``.

        Raises:
            TargetError: ``azure.missing``, ``azure.refused``. LinkError, TrustError as ``tries.tried``.
        """
        self._check(extents, sum(extent.length for extent in extents if not extent.zero), len(payload))
        puts, cleared = _puts(extents, payload), [extent for extent in extents if extent.zero]
        blank = self.blank
        try:
            self._wait(self._write(list(puts), [] if blank else cleared))
        except BaseException:
            self.blank = False
            raise

    def read_ahead(self, extents: Sequence[Extent]) -> None:
        """See ``Image.read_ahead``: each read has many requests under way already."""

    def read_into(self, extents: Sequence[Extent], view: memoryview) -> None:
        """See ``Image.read_into``. Raises as ``write``."""
        self._check(extents, sum(extent.length for extent in extents), len(view))
        self._wait(self._together(self._blob.read(*request) for request in _reads(extents, view)))

    def digests(self, intervals: Sequence[Interval], block: int, seed: int, most: int) -> Digested:
        """See ``Image.digests``. Raises as ``write``."""
        written = self._wait(self._written_in(intervals))

        def find(position: int, end: int) -> Found:
            return Found(_hole_end(written, position, end, block), _data_end(written, position, end, block))

        def read(position: int, view: memoryview) -> None:
            self.read_into([Extent(position, len(view))], view)

        return digest_found(find, read, intervals, block, seed, most, READ_BYTES)

    def sync(self) -> None:
        """See ``Image.sync``: what ``write`` returned from, Azure has confirmed."""

    def close(self) -> None:
        """See ``Image.close``. The way to the blob stays its owner's."""
        self._closed = True

    # ------------------------------------------------------------------ on the loop

    async def _write(self, puts: Sequence[tuple[int, memoryview]], cleared: Sequence[Extent]) -> None:
        for offset, data in puts:  # before: a write that fails half-way may have left anything
            self._written.add(offset, offset + len(data))
        requests = [self._blob.put(offset, data) for offset, data in puts]
        requests += [self._blob.clear(extent.offset, extent.length) for extent in cleared]
        await self._together(requests)
        for extent in cleared:
            self._written.remove(extent.offset, extent.end)

    async def _together(self, requests: Iterable[Awaitable[None]]) -> None:
        async def one(request: Awaitable[None]) -> None:
            async with self._room:
                await request

        try:
            async with asyncio.TaskGroup() as tasks:
                for request in requests:
                    tasks.create_task(one(request))
        except BaseExceptionGroup as group:
            raise cause_of(group) from None

    async def _written_in(self, intervals: Sequence[Interval]) -> Coverage:
        """What of these intervals was written, as it is now."""
        async with self._listing:
            if not self._listed:
                for start, end in await self._blob.ranges():
                    self._written.add(start, end)
                self._listed = True
        known, found = self._written, Coverage()
        for start, end in intervals:
            position = start
            for gap in (*known.gaps(start, end), Interval(end, end)):
                if position < gap.start:
                    found.add(position, gap.start)
                position = gap.end
        return found

    # ------------------------------------------------------------------ in the caller's thread

    def _wait(self, requests: Coroutine[Any, Any, T]) -> T:
        """Have requests run on the loop and wait for them here."""
        return asyncio.run_coroutine_threadsafe(requests, self._loop).result()

    def _check(self, extents: Sequence[Extent], wanted: int, given: int) -> None:
        if wanted != given or any(extent.end > self.size_bytes for extent in extents):
            raise ValueError(f"extents and memory do not fit each other or {self.name}")
        if self._closed:
            raise ValueError(f"{self.name} is closed")


def _puts(extents: Sequence[Extent], payload: memoryview) -> Iterator[tuple[int, memoryview]]:
    """What is put where, neighbours joined, as large as Azure takes it."""
    first = position = 0
    offset = behind = -1
    for extent in extents:
        if extent.zero:
            continue
        if extent.offset != behind:
            yield from _cut(offset, payload[first:position])
            first, offset = position, extent.offset
        position += extent.length
        behind = extent.end
    yield from _cut(offset, payload[first:position])


def _cut(offset: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
    for start in range(0, len(data), PUT_MAX_BYTES):
        yield offset + start, data[start : start + PUT_MAX_BYTES]


def _reads(extents: Sequence[Extent], view: memoryview) -> Iterator[tuple[int, list[Section]]]:
    """One request for what lies close together, about ``READ_BYTES`` at most: where, and what goes where."""
    position, first, end = 0, 0, -GAP_BYTES - 1
    sections: list[Section] = []
    for extent in extents:
        for start in range(0, extent.length, READ_BYTES):
            length = min(READ_BYTES, extent.length - start)
            offset = extent.offset + start
            gap = offset - end
            if sections and not (0 <= gap <= GAP_BYTES and offset + length - first <= READ_BYTES):
                yield first, sections
                sections = []
            if not sections:
                first = offset
            elif gap:
                sections.append(gap)
            sections.append(view[position : position + length])
            position += length
            end = offset + length
    if sections:
        yield first, sections


def _hole_end(written: Coverage, position: int, end: int, block: int) -> int:
    """How far the blocks from ``position`` on are known to be zeros; ``position`` if the first is not."""
    gap = next(written.gaps(position, end), None)
    if gap is None or gap.start > position:
        return position
    return end if gap.end == end else gap.end - gap.end % block


def _data_end(written: Coverage, position: int, end: int, block: int) -> int:
    """Where, behind the block at ``position``, the next block begins that is known to be zeros."""
    for gap in written.gaps(position, end):
        start = gap.start + -gap.start % block
        if start > position and (start + block <= gap.end or gap.end == end > start):
            return start
    return end


def _no_vhd(name: str) -> TargetError:
    return TargetError(
        "target.no_vhd",
        f"{name} does not end in the footer of a fixed VHD that fits its size",
        cause="it is another blob, or the upload of it was not finished",
        fix="give the name of a blob that is not there, or delete this one",
    )
