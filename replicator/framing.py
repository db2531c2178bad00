"""Makes the frames of one session: windows of a disk, what of them is to be said, read and packed.

Not here: where a frame goes once it is made, and what is acknowledged of it (``sending.py``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from zstandard import ZstdCompressor

from protocol.messages import Interval, Mode
from protocol.payload import new_compressor
from replicator.adapt import Level
from replicator.buffers import BufferPool
from replicator.differ import (
    Difference,
    Held,
    Window,
    compared,
    everything,
    listed,
    listed_windows,
    windows,
)
from replicator.digest import BLOCK_BYTES
from replicator.digest_map import DigestMap, DigestMapBuilder
from replicator.extents import Coverage, Piece, Relation
from replicator.packing import Packed, pack
from replicator.sources.base import Source
from replicator.workers import Workers


@dataclass(slots=True)
class Progress:
    """Counters of a send, in bytes.

    Attributes:
        size: of all disks.
        done: of it, what is durable at the target or was found equal; each byte once. Ends at ``size``.
        read: from the source to be sent. zero: of it and of the holes, what is zero.
        matched: found equal, so not sent.
        sent: on the wire; resent: of it, what a break or a damaged frame made necessary.
    """

    size: int = 0
    done: int = 0
    read: int = 0
    zero: int = 0
    matched: int = 0
    sent: int = 0
    resent: int = 0


@dataclass(slots=True)
class SendingDisk:
    """A disk of the epoch under way, kept over all its sessions.

    Attributes:
        name: at the target.
        source: where it is read.
        snapshot_ns: the moment whose content it shows, 0 if there is none.
        known: what the target holds, if we know it without asking.
        listed: the blocks outside which nothing has changed since the target's epoch, if somebody told us.
        building: the map of this epoch.
        number: assigned by the target.
        durable: what the target has acknowledged; claimed: of this session, what it was sent or held before.
        sent: what has gone out, in this process.
    """

    name: str
    source: Source
    snapshot_ns: int = 0
    known: DigestMap | None = None
    listed: Sequence[Interval] | None = None
    building: DigestMapBuilder | None = None
    number: int = 0
    durable: Coverage = field(default_factory=Coverage)
    claimed: Coverage = field(default_factory=Coverage)
    sent: Coverage = field(default_factory=Coverage)


@dataclass(frozen=True, slots=True)
class SendingParts:
    """What all epochs of a sender share."""

    workers: Workers
    level: Level
    progress: Progress
    pool: BufferPool

    def give(self, packed: Packed) -> None:
        """Take back the memory of a frame that is done with."""
        if packed.buffer is not None:
            if isinstance(packed.frame.payload, memoryview):
                packed.frame.payload.release()  # else the pool could not hand this memory out again
            self.pool.give(packed.buffer)


def windows_of(disk: SendingDisk, done: Coverage) -> AsyncIterator[Window]:
    """The windows of what ``done`` does not cover of a disk; of what somebody listed alone, if they did."""
    if disk.listed is None:
        return windows(disk.source, done)
    return listed_windows(disk.source, done, disk.listed)


class Asks(Protocol):
    """Where the target's digests are had: over a session (``asking.py``), or of images in this process."""

    async def ask(self, disk: int, intervals: Sequence[Interval], block: int, seed: int) -> bytes:
        """The digests of all blocks of the intervals of disk number ``disk``, in order."""
        ...


class Framer:
    """Makes frames; one for each who makes them, so that compressors are not shared.

    Args:
        parts: the sender's.
        mode: what the epoch has to say. epoch: its number, in frames.
        questions: for the target's digests.
        may_ask: whether the session's state still allows a question.
        seed: of hashes and digests.
        progress: counts what is read, zero and matched.
    """

    def __init__(
        self,
        parts: SendingParts,
        mode: Mode,
        epoch: int,
        questions: Asks,
        may_ask: Callable[[], bool],
        seed: int,
        progress: Progress,
    ) -> None:
        self._parts = parts
        self._mode = mode
        self._epoch = epoch
        self._questions = questions
        self._may_ask = may_ask
        self._seed = seed
        self._progress = progress
        self._compressors: dict[int, ZstdCompressor] = {}

    async def difference(self, disk: SendingDisk, window: Window) -> Difference:
        """What of a window is to be said; what need not be is counted and recorded in the disk's map.

        Raises:
            SourceError: it cannot be read. Whatever a lost connection raises.
        """
        difference = await self._difference(disk, window)
        self._progress.matched += difference.matched_bytes
        if disk.building is not None:
            await self._parts.workers.run(disk.building.take, difference.equal)
        return difference

    async def packed(self, disk: SendingDisk, piece: Piece, fine: Mapping[int, bytes]) -> Packed:
        """The frame of a piece; ``fine`` as ``Difference``. Whoever takes it gives its memory back.

        Raises:
            SourceError: it cannot be read.
        """
        parts, level = self._parts, self._parts.level.level
        buffer = parts.pool.take(piece.raw_bytes)
        data = [extent for extent in piece.extents if not extent.zero]
        if level and level not in self._compressors:
            self._compressors[level] = new_compressor(level)
        compressor = self._compressors.get(level)

        def make() -> Packed:
            made = pack(disk.number, self._epoch, piece, buffer, compressor, self._seed, fine)
            if disk.building is not None:
                disk.building.take(made.digests)
            return made

        try:
            packed = await disk.source.read_into(data, buffer.view, make)
        except BaseException:  # cancelled too
            parts.pool.give(buffer)
            raise
        said = sum(extent.length for extent in piece.extents)
        self._progress.read += piece.raw_bytes
        self._progress.matched += packed.matched_bytes
        self._progress.zero += said - packed.matched_bytes - packed.frame.header.raw_len
        if packed.buffer is None:
            parts.pool.give(buffer)
        return packed

    async def _difference(self, disk: SendingDisk, window: Window) -> Difference:
        if self._mode is Mode.FULL:
            return everything(window)
        known, workers = disk.known, self._parts.workers

        async def ask(intervals: Sequence[Interval], block: int) -> bytes:
            return await self._questions.ask(disk.number, intervals, block, self._seed)

        async def theirs(cover: Interval) -> bytes:
            # What an earlier session sent may be there, acknowledged or not: the map knows nothing of it.
            untouched = disk.sent.relation(*cover) is Relation.NEW
            if known is not None and untouched and self._mode is Mode.INCREMENTAL:
                with suppress(OSError):  # then the target is asked
                    return await workers.run(known.digests, *cover)
            return await ask([cover], BLOCK_BYTES)

        if disk.listed is not None:
            before = None
            if known is not None:
                with suppress(OSError):  # then this epoch has no whole map
                    row = await workers.run(known.digests, *window.cover)
                    before = Held(row, disk.source.size_bytes, self._seed)
            return await listed(window, before, ask if self._may_ask() else None)
        if not self._may_ask():
            return everything(window)
        return await compared(window, disk.source, theirs, ask, self._parts.pool, self._seed)
