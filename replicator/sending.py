"""One epoch being sent over one session, from OPENED to SEALED: the sending pipeline.

::

    windows ─▶ packers: compare, read, zero test, compress ─▶ queue ─▶ N streams, as credit allows
                                                   ACK ─▶ credit, progress ─▶ SEAL ─▶ SEALED

One TaskGroup. Memory is bounded by the packers and the queue, whatever the disk's size: a frame's buffer is
free again as soon as TLS has copied it, and what a break loses is read again from the source. Not here:
connecting again (``retrying.py``) and which epoch it is (``sender.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from zstandard import ZstdCompressor

from protocol.credit import SendWindow
from protocol.messages import (
    Ack,
    Attach,
    Attached,
    Bye,
    Digests,
    DiskCoverage,
    Interval,
    Mode,
    Opened,
    Seal,
    Sealed,
    Welcome,
)
from protocol.payload import new_compressor
from replicator.adapt import Level
from replicator.asking import Questions
from replicator.buffers import BufferPool
from replicator.differ import Difference, Window, compared, everything, windows
from replicator.digest import BLOCK_BYTES
from replicator.digest_map import DigestMap, DigestMapBuilder
from replicator.errors import LinkError, PeerError, cause_of
from replicator.extents import Coverage, Piece, Relation
from replicator.failpoints import reach
from replicator.packing import Packed, pack
from replicator.sources.base import Source
from replicator.transport.stream import Stream
from replicator.workers import Workers

QUEUE_FRAMES = 8  # packed and not yet sent: 8 MiB at the most
PACKERS_A_THREAD = 2  # while one waits for digests from far away, another computes
VERDICT_S = 1.0  # how long a lost data stream waits for the control stream to say why


@dataclass(slots=True)
class Progress:
    """Counters of a send, in bytes.

    Attributes:
        size: of all disks.
        done: of it, what is durable at the target or was found equal; each byte once. Ends at ``size``.
        read: from the source to be sent. zero: of it and of the holes, what is zero.
        matched: found equal, so not sent.
        sent: on the wire; resent: of it, what a break made necessary.
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
        known: what the target holds, if we know it without asking.
        building: the map of this epoch.
        number: assigned by the target.
        durable: what the target has acknowledged; sent: what has gone out, in this process.
    """

    name: str
    source: Source
    known: DigestMap | None = None
    building: DigestMapBuilder | None = None
    number: int = 0
    durable: Coverage = field(default_factory=Coverage)
    sent: Coverage = field(default_factory=Coverage)


@dataclass(frozen=True, slots=True)
class SendingParts:
    """What all epochs of a sender share; ``greet`` opens a stream on which the target has accepted us."""

    greet: Callable[[], Awaitable[tuple[Stream, Welcome]]]
    workers: Workers
    level: Level
    progress: Progress
    pool: BufferPool


class SendingEpoch:
    """One session of an epoch, from OPENED to SEALED."""

    def __init__(
        self,
        parts: SendingParts,
        control: Stream,
        epoch: bytes,
        opened: Opened,
        disks: Sequence[SendingDisk],
    ) -> None:
        self._parts = parts
        self._control = control
        self._epoch = epoch
        self._opened = opened
        self._disks = {disk.number: disk for disk in disks}
        self._seed = control.connection.seed
        self._window = SendWindow(opened.credit)
        self._credit = asyncio.Event()
        self._questions = Questions(control, {disk.number: disk.source.size_bytes for disk in disks})
        self._windows = self._all_windows()
        self._cutting = asyncio.Lock()
        self._queue: asyncio.Queue[tuple[SendingDisk, Packed]] = asyncio.Queue(QUEUE_FRAMES)
        self._whole = asyncio.Event()
        self._sealed: asyncio.Future[Sealed] = asyncio.get_running_loop().create_future()
        self._listener: asyncio.Task[None] | None = None

    async def run(self, stream_count: int, stale: bool) -> tuple[Sealed, bool]:
        """Send what is missing and have it sealed. True: the source changed meanwhile.

        ``stale``: it had changed before, since the epoch was begun.
        """
        streams: list[Stream] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                self._listener = tasks.create_task(self._listen())
                async with asyncio.TaskGroup() as attaching:
                    for _ in range(stream_count):
                        attaching.create_task(self._attach(streams))
                packers = PACKERS_A_THREAD * self._parts.workers.threads
                background = [tasks.create_task(self._pack()) for _ in range(packers)]
                for stream in streams:
                    background.append(tasks.create_task(self._transmit(stream)))
                    background.append(tasks.create_task(self._watch(stream)))
                self._count()
                await self._whole.wait()
                for task in background:
                    task.cancel()
                return await self._seal(stale)
        except BaseException as error:
            for stream in streams:  # a line that stalls shall not hold up whoever gives up
                stream.abort()
            raise (cause_of(error) if isinstance(error, BaseExceptionGroup) else error) from None
        finally:
            while not self._queue.empty():
                self._give(self._queue.get_nowait()[1])
            await self._windows.aclose()
            await asyncio.gather(*(stream.close() for stream in streams))

    # -- out -----

    async def _all_windows(self) -> AsyncGenerator[tuple[SendingDisk, Window], None]:
        """What is to be looked at, disk after disk, made as it is consumed."""
        for disk in self._disks.values():
            async for window in windows(disk.source, disk.durable):
                yield disk, window

    async def _pack(self) -> None:
        """Take one window after the other; several of these run side by side."""
        compressors: dict[int, ZstdCompressor] = {}
        loop = asyncio.get_running_loop()
        while True:
            async with self._cutting:
                job = await anext(self._windows, None)
            if job is None:
                return
            disk, window = job
            difference = await self._difference(disk, window)
            self._parts.progress.matched += difference.matched_bytes
            if disk.building is not None:
                await self._parts.workers.run(disk.building.take, difference.equal)
            for piece in difference.pieces:
                level = self._parts.level.level
                if level and level not in compressors:
                    compressors[level] = new_compressor(level)
                packed = await self._packed(disk, piece, difference, compressors.get(level))
                queued, now = self._queue.qsize(), loop.time()
                self._parts.level.observe(queued, QUEUE_FRAMES, piece.raw_bytes, now)
                try:
                    await self._queue.put((disk, packed))
                except asyncio.CancelledError:
                    self._give(packed)
                    raise

    async def _difference(self, disk: SendingDisk, window: Window) -> Difference:
        if self._opened.mode is Mode.FULL:
            return everything(window)
        known, workers = disk.known, self._parts.workers

        async def ask(intervals: Sequence[Interval], block: int) -> bytes:
            return await self._questions.ask(disk.number, intervals, block, self._seed)

        async def theirs(cover: Interval) -> bytes:
            # What an earlier session sent may be there, acknowledged or not: the map knows nothing of it.
            untouched = disk.sent.relation(*cover) is Relation.NEW
            if known is not None and untouched and self._opened.mode is Mode.INCREMENTAL:
                with suppress(OSError):  # then the target is asked
                    return await workers.run(known.digests, *cover)
            return await ask([cover], BLOCK_BYTES)

        return await compared(window, disk.source, theirs, ask, self._parts.pool, self._seed)

    async def _packed(
        self, disk: SendingDisk, piece: Piece, difference: Difference, compressor: ZstdCompressor | None
    ) -> Packed:
        parts = self._parts
        buffer = parts.pool.take(piece.raw_bytes)
        data = [extent for extent in piece.extents if not extent.zero]
        epoch = self._opened.epoch_number

        def make() -> Packed:
            made = pack(disk.number, epoch, piece, buffer, compressor, self._seed, difference.fine)
            if disk.building is not None:
                disk.building.take(made.digests)
            return made

        try:
            packed = await disk.source.read_into(data, buffer.view, make)
        except BaseException:  # cancelled too
            parts.pool.give(buffer)
            raise
        said = sum(extent.length for extent in piece.extents)
        parts.progress.read += piece.raw_bytes
        parts.progress.matched += packed.matched_bytes
        parts.progress.zero += said - packed.matched_bytes - packed.frame.header.raw_len
        if packed.buffer is None:
            parts.pool.give(buffer)
        return packed

    def _give(self, packed: Packed) -> None:
        if packed.buffer is not None:
            if isinstance(packed.frame.payload, memoryview):
                packed.frame.payload.release()  # else the pool could not hand this memory out again
            self._parts.pool.give(packed.buffer)

    async def _transmit(self, stream: Stream) -> None:
        """Send packed frames over one data stream, as credit and the stream allow."""
        while True:
            disk, packed = await self._queue.get()
            size, header = packed.frame.wire_bytes, packed.frame.header
            try:
                try:
                    while self._window.room < size:
                        self._credit.clear()
                        await self._credit.wait()
                    self._window.take(size)
                    again = disk.sent.relation(header.cover_start, header.cover_end) is not Relation.NEW
                    disk.sent.add(header.cover_start, header.cover_end)  # even if the stream fails just now
                    stream.send_data(packed.frame)
                finally:  # TLS has copied it, or nobody will
                    self._give(packed)
                self._parts.progress.sent += size
                self._parts.progress.resent += size if again else 0
                await stream.drain()
            except LinkError:
                await self._verdict()
                raise

    async def _attach(self, streams: list[Stream]) -> None:
        try:
            stream, _ = await self._parts.greet()
            streams.append(stream)
            stream.send(Attach(self._opened.session))
            await stream.expect(Attached)
        except LinkError:
            await self._verdict()
            raise

    # -- in -----

    async def _watch(self, stream: Stream) -> None:
        """Notice the end of a data stream even while nothing is written to it."""
        try:
            message = await stream.receive()
            if isinstance(message, Bye):
                await stream.receive()  # which says that the stream is lost
        except LinkError:
            await self._verdict()
            raise
        raise _defective(f"it sent {type(message).__name__} on a data stream")

    async def _verdict(self) -> None:
        """A data stream is lost: give the control stream a moment to bring the target's reason."""
        if self._listener is not None:
            await asyncio.wait([self._listener], timeout=VERDICT_S)

    async def _listen(self) -> None:
        """Take what the control stream brings, until SEALED."""
        while True:
            message = await self._control.receive()
            if isinstance(message, Ack):
                self._acknowledged(message)
                reach("send.acknowledged")
            elif isinstance(message, Digests):
                if not self._questions.answered(message):
                    raise _defective("it gave digests that were not asked for")
            elif isinstance(message, Sealed):
                self._sealed.set_result(message)
                return
            elif isinstance(message, Bye):
                raise LinkError(
                    "link.lost",
                    f"{self._control.peer_address} stopped receiving",
                    cause="the master target is being stopped",
                    fix="run the same command again when it is back",
                )
            else:
                raise _defective(f"it sent {type(message).__name__}, which was not asked for")

    def _acknowledged(self, ack: Ack) -> None:
        self._window.raise_to(ack.credit)
        self._credit.set()
        for number, intervals in ((answer.disk, answer.intervals) for answer in ack.disks):
            disk = self._disks.get(number)
            if disk is None or (intervals and intervals[-1].end > disk.source.size_bytes):
                raise _defective(f"it acknowledged what disk {number} does not have")
            for start, end in intervals:
                disk.durable.add(start, end)
        self._count()

    def _count(self) -> None:
        progress = self._parts.progress
        progress.done = sum(disk.durable.covered_bytes for disk in self._disks.values())
        if progress.done == progress.size:
            self._whole.set()

    async def _seal(self, stale: bool) -> tuple[Sealed, bool]:
        changed = any([await disk.source.changed() for disk in self._disks.values()])
        coverage = tuple(DiskCoverage(disk.number, disk.durable.intervals()) for disk in self._disks.values())
        self._control.send(Seal(self._epoch, changed or stale, coverage))
        sealed = await self._sealed
        if sealed.epoch != self._epoch:
            raise _defective("it sealed another epoch")
        return sealed, changed


def _defective(what: str) -> PeerError:
    return PeerError(
        "peer.protocol",
        f"the master target misbehaved: {what}",
        cause="a defect on one of the two sides",
        fix="report it with the logs of both sides",
    )
