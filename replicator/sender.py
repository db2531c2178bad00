"""The sending pipeline: from a disk's extents to a sealed epoch.

::

    source.extents ─▶ cutter ─▶ packers: read + zero test + compress ─▶ queue ─▶ N streams, as credit allows
                                                          ACK ─▶ credit, progress ─▶ SEAL ─▶ SEALED

One TaskGroup an epoch. Memory is bounded by the packers and the queue, whatever the disk's size: a frame's
buffer is free again as soon as TLS has copied it, and what a break loses is read again from the source. In
this version an epoch is always a full one. Not here: connecting again, and what is shown to people.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from zstandard import ZstdCompressor

from protocol.constants import ID_BYTES
from protocol.credit import SendWindow
from protocol.header import Flags
from protocol.messages import (
    NO_ID,
    Ack,
    Attach,
    Attached,
    Bye,
    Consistency,
    DiskCoverage,
    Hello,
    Mode,
    Open,
    OpenDisk,
    Opened,
    Seal,
    Sealed,
    Welcome,
)
from protocol.payload import DataFrame, Extent, build, new_compressor
from replicator import __version__
from replicator.adapt import Level
from replicator.buffers import Buffer, BufferPool, zero_runs
from replicator.errors import LinkError, PeerError, cause_of
from replicator.extents import Coverage, Cutter, Piece
from replicator.sources.base import Source
from replicator.transport.stream import Stream
from replicator.workers import Workers

AGENT = f"replicator {__version__}"
STREAMS_DEFAULT = 4
KEEP_BYTES = 32 * 1024 * 1024
QUEUE_FRAMES = 8  # packed and not yet sent: 8 MiB at the most
VERDICT_S = 1.0  # how long a lost data stream waits for the control stream to say why


@dataclass(slots=True)
class Progress:
    """Counters of a send, in bytes; each byte of a disk counts once in ``done``, which ends at ``size``."""

    size: int = 0
    done: int = 0
    read: int = 0
    zero: int = 0
    matched: int = 0
    sent: int = 0
    resent: int = 0


@dataclass(frozen=True, slots=True)
class DiskToSend:
    """A disk of the group."""

    name: str
    source: Source


@dataclass(frozen=True, slots=True)
class Outcome:
    """A sealed epoch. ``fuzzy``: the source may have changed while it was read."""

    epoch: bytes
    recovery_point: bytes
    fuzzy: bool


class Sender:
    """Sends groups of disks to one master target.

    Args:
        dial: opens a stream to it, TLS up.
        workers: threads for disk and CPU work.
        level: picks the compression.
        streams: data streams per session, 1 to 16.
        progress: counters to keep, for whoever shows them.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[Stream]],
        workers: Workers,
        level: Level,
        streams: int = STREAMS_DEFAULT,
        progress: Progress | None = None,
    ) -> None:
        self.workers = workers
        self.level = level
        self.progress = progress or Progress()
        self.pool = BufferPool(KEEP_BYTES)
        self._dial = dial
        self._streams = streams

    async def send_full(self, group: str, disks: Sequence[DiskToSend]) -> Outcome:
        """Send every byte of the disks as one epoch; returns when it is sealed.

        Raises:
            SourceError, PeerError, TrustError, LinkError: what ended it. The target then holds what was
            sealed before, and files that are marked dirty; the same call again starts anew.
        """
        self.progress.size = sum(disk.source.size_bytes for disk in disks)
        epoch = secrets.token_bytes(ID_BYTES)
        control, welcome = await self.greet()
        try:
            control.send(
                Open(
                    group,
                    assignment=b"",
                    epoch=epoch,
                    parent=NO_ID,
                    mode=Mode.FULL,
                    consistency=Consistency.FUZZY,
                    last_ack=0,
                    disks=tuple(OpenDisk(disk.name, disk.source.size_bytes) for disk in disks),
                )
            )
            opened = await control.expect(Opened)
            if len({answer.disk for answer in opened.disks}) != len(disks):
                raise _defective(f"it opened {len(opened.disks)} disks of {len(disks)}")
            sending = [
                SendingDisk(answer.disk, disk.source)
                for answer, disk in zip(opened.disks, disks, strict=True)
            ]
            streams = min(self._streams, welcome.streams_max)
            return await SendingEpoch(self, control, epoch, opened, sending).run(streams)
        finally:
            await control.close()

    async def greet(self) -> tuple[Stream, Welcome]:
        """A stream on which the target has accepted us."""
        stream = await self._dial()
        try:
            stream.send(Hello(agent=AGENT))
            return stream, await stream.expect(Welcome)
        except BaseException:
            stream.abort()
            raise


@dataclass(slots=True)
class SendingDisk:
    """A disk of the epoch under way. ``number`` was assigned by the target."""

    number: int
    source: Source
    durable: Coverage = field(default_factory=Coverage)


@dataclass(slots=True)
class Packed:
    """A frame, and the buffer that its payload lies in if it was not compressed."""

    frame: DataFrame
    buffer: Buffer | None


class SendingEpoch:
    """One epoch, from OPENED to SEALED."""

    def __init__(
        self, sender: Sender, control: Stream, epoch: bytes, opened: Opened, disks: Sequence[SendingDisk]
    ) -> None:
        self._sender = sender
        self._control = control
        self._epoch = epoch
        self._opened = opened
        self._disks = {disk.number: disk for disk in disks}
        self._seed = control.connection.seed
        self._window = SendWindow(opened.credit)
        self._credit = asyncio.Event()
        self._pieces = self._cut()
        self._cutting = asyncio.Lock()
        self._queue: asyncio.Queue[Packed] = asyncio.Queue(QUEUE_FRAMES)
        self._whole = asyncio.Event()
        self._sealed: asyncio.Future[Sealed] = asyncio.get_running_loop().create_future()
        self._listener: asyncio.Task[None] | None = None

    async def run(self, stream_count: int) -> Outcome:
        """Attach the data streams, send everything, have it sealed."""
        streams: list[Stream] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                self._listener = tasks.create_task(self._listen())
                async with asyncio.TaskGroup() as attaching:
                    for _ in range(stream_count):
                        attaching.create_task(self._attach(streams))
                background = [tasks.create_task(self._pack()) for _ in range(self._sender.workers.threads)]
                for stream in streams:
                    background.append(tasks.create_task(self._transmit(stream)))
                    background.append(tasks.create_task(self._watch(stream)))
                await self._whole.wait()
                for task in background:
                    task.cancel()
                return await self._seal()
        except BaseException as error:
            for stream in streams:  # a line that stalls shall not hold up whoever gives up
                stream.abort()
            raise (cause_of(error) if isinstance(error, BaseExceptionGroup) else error) from None
        finally:
            while not self._queue.empty():
                self._give(self._queue.get_nowait())
            await self._pieces.aclose()
            await asyncio.gather(*(stream.close() for stream in streams))

    # -- out -----

    async def _cut(self) -> AsyncGenerator[tuple[SendingDisk, Piece], None]:
        """What every frame will say, disk after disk, made as it is consumed."""
        for disk in self._disks.values():
            cutter = Cutter()
            async for extent in disk.source.extents():
                for piece in cutter.add(extent):
                    yield disk, piece
            for piece in cutter.finish():
                yield disk, piece

    async def _pack(self) -> None:
        """Read and pack one piece after the other; several of these run side by side."""
        sender = self._sender
        compressors: dict[int, ZstdCompressor] = {}
        while True:
            async with self._cutting:
                job = await anext(self._pieces, None)
            if job is None:
                return
            disk, piece = job
            level = sender.level.level
            if level and level not in compressors:
                compressors[level] = new_compressor(level)
            packed = await self._packed(disk, piece, compressors.get(level))
            sender.level.observe(self._queue.qsize(), QUEUE_FRAMES)
            try:
                await self._queue.put(packed)
            except asyncio.CancelledError:
                self._give(packed)
                raise

    async def _packed(self, disk: SendingDisk, piece: Piece, compressor: ZstdCompressor | None) -> Packed:
        sender = self._sender
        buffer = sender.pool.take(piece.raw_bytes)
        try:
            await disk.source.read_into([extent for extent in piece.extents if not extent.zero], buffer.view)
            frame = await sender.workers.run(
                pack_piece, disk.number, self._opened.epoch_number, piece, buffer, compressor, self._seed
            )
        except BaseException:  # cancelled too
            sender.pool.give(buffer)
            raise
        sender.progress.read += piece.raw_bytes
        sender.progress.zero += piece.cover.end - piece.cover.start - frame.header.raw_len
        if frame.header.flags & Flags.ZSTD or not frame.header.raw_len:
            sender.pool.give(buffer)
            return Packed(frame, None)
        return Packed(frame, buffer)

    def _give(self, packed: Packed) -> None:
        if packed.buffer is not None:
            self._sender.pool.give(packed.buffer)

    async def _transmit(self, stream: Stream) -> None:
        """Send packed frames over one data stream, as credit and the stream allow."""
        while True:
            packed = await self._queue.get()
            size = packed.frame.wire_bytes
            try:
                try:
                    while self._window.room < size:
                        self._credit.clear()
                        await self._credit.wait()
                    self._window.take(size)
                    stream.send_data(packed.frame)
                finally:  # TLS has copied it, or nobody will
                    self._give(packed)
                self._sender.progress.sent += size
                await stream.drain()
            except LinkError:
                await self._verdict()
                raise

    async def _attach(self, streams: list[Stream]) -> None:
        try:
            stream, _ = await self._sender.greet()
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
        self._sender.progress.done = sum(disk.durable.covered_bytes for disk in self._disks.values())
        if self._sender.progress.done == self._sender.progress.size:
            self._whole.set()

    async def _seal(self) -> Outcome:
        fuzzy = any([await disk.source.changed() for disk in self._disks.values()])
        coverage = tuple(DiskCoverage(disk.number, disk.durable.intervals()) for disk in self._disks.values())
        self._control.send(Seal(self._epoch, fuzzy, coverage))
        sealed = await self._sealed
        if sealed.epoch != self._epoch:
            raise _defective("it sealed another epoch")
        return Outcome(sealed.epoch, sealed.recovery_point, fuzzy)


def pack_piece(
    disk: int, epoch: int, piece: Piece, buffer: Buffer, compressor: ZstdCompressor | None, seed: int
) -> DataFrame:
    """The frame of a piece whose data lies in ``buffer``; blocks that turn out to be zero are left out."""
    extents: list[Extent] = []
    position = kept = 0
    for extent in piece.extents:
        if extent.zero:
            extents.append(extent)
            continue
        for run in zero_runs(buffer, position, position + extent.length):
            length = run.end - run.start
            extents.append(Extent(extent.offset + run.start - position, length, run.zero))
            if not run.zero:
                if run.start != kept:
                    buffer.view[kept : kept + length] = buffer.view[run.start : run.end]
                kept += length
        position += extent.length
    return build(disk, epoch, piece.cover, extents, buffer.view[:kept], compressor, seed)


def _defective(what: str) -> PeerError:
    return PeerError(
        "peer.protocol",
        f"the master target misbehaved: {what}",
        cause="a defect on one of the two sides",
        fix="report it with the logs of both sides",
    )
