"""A master target that goes by the book and keeps everything in memory; a test overrides one step of it.

And sources in memory, which read, fail and change as they are told.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Self, TypeVar

from xxhash import xxh3_128_digest

from protocol.connection import Data, End
from protocol.credit import ReceiveWindow
from protocol.messages import (
    NO_ID,
    Ack,
    Attach,
    Bye,
    Digests,
    DigestsWanted,
    DiskCoverage,
    Hello,
    Interval,
    Mode,
    Open,
    Opened,
    Seal,
    Sealed,
    Welcome,
)
from protocol.payload import Extent, new_decompressor, unpack
from protocol.state import Role
from replicator.adapt import FixedLevel
from replicator.clock import Clock
from replicator.errors import SourceError
from replicator.sender import DiskToSend, Sender
from replicator.sender_state import GroupMemory
from replicator.transport.dial import Address, dial
from replicator.workers import Workers
from tests.replicator.pipeline import HANGS_S, MIB, Peer, Reset, Site
from tests.replicator.pipeline import memory as remember

T = TypeVar("T")
SEED = 0x5EED
SESSION = bytes(range(16))


class FakeTarget:
    """Attributes say how it behaves; methods are its steps.

    Attributes:
        credit: what OPENED grants; `window` counts what was used of it.
        frames: every frame that came, in order of arrival.
        disks: what they make of the disks.
        mode, newest: what OPENED says of the epoch, and as the newest sealed one.
    """

    def __init__(self, path: Path, credit: int = 64 * MIB, streams_max: int = 16) -> None:
        self.path = path
        self.site = Site(path)
        self.credit = credit
        self.streams_max = streams_max
        self.window = ReceiveWindow(credit)
        self.frames: list[Data] = []
        self.disks: list[bytearray] = []
        self.opens: list[Open] = []
        self.seals: list[Seal] = []
        self.questions: list[DigestsWanted] = []
        self.mode = Mode.FULL
        self.newest = NO_ID
        self.control: Peer | None = None
        self.data: list[Peer] = []
        self.peers: list[Peer] = []
        self.broken: list[Exception] = []
        self.sequence = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.address = Address("127.0.0.1", 0)

    # -- steps ----

    async def opened(self, peer: Peer, wanted: Open) -> None:
        coverage = self.coverage(wanted)
        peer.send(Opened(SESSION, 1, self.credit, coverage, self.mode, self.newest))

    def coverage(self, wanted: Open) -> tuple[DiskCoverage, ...]:
        return tuple(DiskCoverage(number, ()) for number in range(1, len(wanted.disks) + 1))

    async def attached(self, peer: Peer) -> None:
        peer.connection.attach(self.window)
        peer.flush()

    async def arrived(self, peer: Peer, data: Data) -> None:
        self.store(data)
        self.acknowledge(data)

    async def asked(self, peer: Peer, wanted: DigestsWanted) -> None:
        peer.send(self.answer(wanted))

    async def sealing(self, peer: Peer, seal: Seal) -> None:
        peer.send(Sealed(seal.epoch, NO_ID))

    # -- what steps are made of ----

    def made(self, size: int) -> bytearray:
        """A disk that holds neither zeros nor anything that is sent."""
        return bytearray(b"\xaa") * size

    def store(self, data: Data) -> list[Extent]:
        into = memoryview(bytearray(data.header.raw_len))
        extents, raw = unpack(data.header, data.body.view, into, new_decompressor(), SEED)
        disk, position = self.disks[data.header.disk - 1], 0
        for extent in extents:
            length = 0 if extent.zero else extent.length
            found = bytes(extent.length) if extent.zero else raw[position : position + length]
            disk[extent.offset : extent.end] = found
            position += length
        return extents

    def answer(self, wanted: DigestsWanted) -> Digests:
        """All of it, without holes."""
        disk = memoryview(self.disks[wanted.disk - 1])
        digests = [
            xxh3_128_digest(disk[start : min(start + wanted.block, end)], SEED)
            for first, end in wanted.intervals
            for start in range(first, end, wanted.block)
        ]
        return Digests(wanted.request, wanted.intervals, (), b"".join(digests))

    def acknowledge(self, *frames: Data, grant: int | None = None) -> None:
        assert self.control is not None
        size = sum(72 + data.header.body_len for data in frames)
        self.sequence += 1
        coverage = tuple(
            DiskCoverage(data.header.disk, (Interval(data.header.cover_start, data.header.cover_end),))
            for data in frames
        )
        granted = self.window.grant(size if grant is None else grant)
        self.control.send(Ack(self.sequence, granted, coverage))

    # -- the book ----

    async def _serve(self, peer: Peer) -> None:
        await peer.expect(Hello)
        peer.send(Welcome(1, 0, SEED, self.streams_max))
        message = await peer.receive()
        if isinstance(message, Open):
            self.control = peer
            self.opens.append(message)
            self.disks = [self.made(disk.size) for disk in message.disks]
            await self.opened(peer, message)
        elif isinstance(message, Attach):
            assert message.session == SESSION
            self.data.append(peer)
            await self.attached(peer)
        while not isinstance(message, End | Reset | Bye):
            message = await peer.receive()
            if isinstance(message, Data):
                self.frames.append(message)
                await self.arrived(peer, message)
            elif isinstance(message, DigestsWanted):
                self.questions.append(message)
                await self.asked(peer, message)
            elif isinstance(message, Seal):
                self.seals.append(message)
                await self.sealing(peer, message)
        if peer.broken is not None:
            self.broken.append(peer.broken)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer, Role.RECEIVER)
        self.peers.append(peer)
        task = asyncio.ensure_future(self._serve(peer))
        self.tasks.add(task)
        task.add_done_callback(self._served)

    def _served(self, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception) and not isinstance(error, EOFError | OSError):
            self.broken.append(error)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Self]:
        server = await asyncio.start_server(self._take, "127.0.0.1", 0, ssl=self.site.context)
        self.address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        try:
            async with asyncio.timeout(HANGS_S):
                yield self
        finally:
            server.close()
            for task in self.tasks:
                task.cancel()
            for peer in self.peers:
                peer.writer.transport.abort()
            if self.tasks:
                await asyncio.wait(self.tasks)

    def sender(
        self, workers: Workers, *, level: int = 0, streams: int = 2, memory: GroupMemory | None = None
    ) -> Sender:
        """A sender with this memory; without one, with a memory of its own."""
        call = partial(
            dial,
            self.address,
            self.site.process_server().context,
            Role.SENDER,
            server_name=self.site.name,
            clock=Clock(),
        )
        remembered = memory or remember(self.path / f"state-{token_hex(4)}")
        return Sender(call, workers, FixedLevel(level), remembered, streams)


class MemorySource:
    """A disk in memory. `zeros`: stretches that it knows to be zero."""

    def __init__(
        self,
        data: bytes,
        *,
        name: str = "memory",
        zeros: Sequence[Interval] = (),
        fails_at: int | None = None,
        is_changed: bool = False,
    ) -> None:
        self.name = name
        self.size_bytes = len(data)
        self.data = data
        self.zeros = zeros
        self.fails_at = fails_at
        self.is_changed = is_changed
        self.reading = 0
        self.seen_as = "as it was"
        self.before_read: Callable[[int], None] = lambda offset: None

    async def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        position = start
        for first, end in self.zeros:
            if end <= start:
                continue
            if position < first:
                yield Extent(position, first - position)
            yield Extent(max(first, start), end - max(first, start), True)
            position = end
        if position < self.size_bytes:
            yield Extent(position, self.size_bytes - position)

    async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        position = 0
        self.reading += 1
        try:
            await asyncio.sleep(0)
            for extent in extents:
                self.before_read(extent.offset)
                if self.fails_at is not None and extent.offset <= self.fails_at < extent.end:
                    raise SourceError("source.read_failed", "bad sector", cause="age", fix="a new disk")
                view[position : position + extent.length] = self.data[extent.offset : extent.end]
                position += extent.length
            return then()
        finally:
            self.reading -= 1

    async def fingerprint(self) -> str:
        return self.seen_as

    async def changed(self) -> bool:
        return self.is_changed

    async def close(self) -> None: ...


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(size)


def to_send(source: MemorySource, name: str = "disk") -> DiskToSend:
    return DiskToSend(name, source)
