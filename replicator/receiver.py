"""The receiving pipeline: frames from N streams, verified, written, made durable, acknowledged.

::

    stream ─ on_data ─▶ claimed ─▶ queue ─▶ writers: decompress + verify + write ─▶ committer: sync ─▶ ACK

One ``Receiver`` serves a daemon's data conversations; each OPEN is a ``Session`` with one TaskGroup. The
queue needs no bound of its own: what may be in it was granted as credit. An ACK names only what was written
before the sync that it follows began. In this version an epoch is always a full one and goes straight to the
images.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from weakref import WeakValueDictionary

from protocol.connection import Body, Data, plain_allocate
from protocol.constants import HEADER_BYTES, KIB, STREAMS_MAX, VERSION
from protocol.errors import RemoteProtocolError
from protocol.header import Flags, Header
from protocol.messages import (
    NO_ID,
    Ack,
    Attach,
    Bye,
    DiskCoverage,
    Hello,
    Mode,
    Open,
    Opened,
    Seal,
    Sealed,
    Welcome,
)
from protocol.payload import new_decompressor, unpack
from protocol.state import State
from replicator import __version__, refusals
from replicator.buffers import Buffer, BufferPool
from replicator.credit_pool import CreditPool, Share
from replicator.errors import ReplicatorError, cause_of
from replicator.extents import Coverage, Relation
from replicator.failpoints import reach
from replicator.images.base import Image
from replicator.images.directory import ImageDirectory, OpenedGroup
from replicator.transport.stream import Stream
from replicator.workers import Workers

log = logging.getLogger(__name__)

CREDIT_BYTES = 96 * 1024 * 1024  # half of it to one session: 48 MiB is 1.9 Gbit/s at 200 ms
KEEP_BYTES = 64 * 1024 * 1024
ALIGNED_MIN_BYTES = 16 * KIB  # an aligned buffer of less would cost many times its credit
ACK_INTERVALS = 16 * 1024  # a quarter of a MiB: no ACK comes near the limit of a control message
AGENT = f"replicator {__version__}"


@dataclass(slots=True)
class ReceivingDisk:
    """A disk of the epoch under way. ``claimed``: arrived; ``durable``: of it, what a sync has covered."""

    number: int
    image: Image
    claimed: Coverage
    durable: Coverage


@dataclass(frozen=True, slots=True)
class Written:
    """A frame that is written but not yet durable."""

    disk: ReceivingDisk
    header: Header


class Session:
    """One epoch of one group, from OPEN to its end."""

    def __init__(self, receiver: Receiver, control: Stream, peer: str, group: OpenedGroup) -> None:
        self.id = secrets.token_bytes(16)
        self.peer = peer
        self._receiver = receiver
        self._control = control
        self._group = group
        self._disks = {
            disk.number: ReceivingDisk(disk.number, disk.image, Coverage(), Coverage())
            for disk in group.disks
        }
        self._queue: asyncio.Queue[tuple[ReceivingDisk, Data]] = asyncio.Queue()
        self._written: list[Written] = []
        self._commit = asyncio.Event()
        self._pending: dict[int, Coverage] = {}
        self._sequence = 0
        self._told = 0
        self._streams: set[Stream] = set()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.current_task()
        self.ended = asyncio.Event()
        self.over = False
        self._share: Share = receiver.credit.join(self._commit.set)

    async def run(self) -> None:
        """Serve the session until the sender leaves; returns after a goodbye, raises what else ended it."""
        try:
            self._open()
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(self._write()) for _ in range(self._receiver.workers.threads)]
                background.append(tasks.create_task(self._sync_and_acknowledge()))
                background.append(tasks.create_task(self._watch()))
                await self._converse()
                for task in background:
                    task.cancel()
        except BaseExceptionGroup as group:
            error = cause_of(group)
            if isinstance(error, ReplicatorError):
                self._control.fail(error)  # before the data streams go: their loss says less
            raise error from None
        finally:
            self._drop_streams()
            self._receiver.credit.leave(self._share)

    async def stop(self) -> None:
        """End the session from outside: its identity opens the group anew."""
        if self._task is not None and not self.over:  # else it is closing its images: that must go on
            self._control.fail(refusals.replaced())
            self._task.cancel()
        await self.ended.wait()

    def _open(self) -> None:
        self._told = self._share.window.granted
        disks = tuple(DiskCoverage(disk.number, disk.durable.intervals()) for disk in self._disks.values())
        self._control.send(Opened(self.id, self._group.epoch_number, self._told, disks))

    def _drop_streams(self) -> None:
        """The session is over: nobody is left to serve its data streams, or to write what they brought."""
        self.over = True
        for stream in self._streams:
            stream.on_data = lambda data: self._receiver.give(data.body)
            stream.abort()
        while not self._queue.empty():
            self._receiver.give(self._queue.get_nowait()[1].body)

    async def carry(self, stream: Stream) -> None:
        """Serve one data stream of the session until it ends. Losing it ends the session."""
        if len(self._streams) >= STREAMS_MAX:
            raise refusals.too_many_streams()
        stream.on_data = self._take
        self._streams.add(stream)
        try:
            stream.attach(self._share.window)
            await stream.expect(Bye)
        except ReplicatorError as error:
            self._break(error)
            raise
        finally:
            self._streams.discard(stream)

    # -- arrival -----

    def _take(self, data: Data) -> None:
        """A frame arrived: claim its cover and queue it. Called by the event loop, so it does not raise."""
        header = data.header
        disk = self._disks.get(header.disk)
        if (
            disk is None
            or header.epoch != self._group.epoch_number
            or header.cover_end > disk.image.size_bytes
        ):
            self._refuse(
                data,
                f"a frame for [{header.cover_start}, {header.cover_end}) of disk {header.disk}, "
                f"epoch {header.epoch}, which is not open",
            )
            return
        relation = disk.claimed.relation(header.cover_start, header.cover_end)
        if relation is Relation.PARTIAL:
            self._refuse(
                data,
                f"[{header.cover_start}, {header.cover_end}) of disk {disk.number} is partly covered already",
            )
        elif relation is Relation.COVERED:
            self._receiver.give(data.body)
            self._share.release(HEADER_BYTES + header.body_len)
        else:
            disk.claimed.add(header.cover_start, header.cover_end)
            self._queue.put_nowait((disk, data))

    def _refuse(self, data: Data, reason: str) -> None:
        self._receiver.give(data.body)
        self._break(refusals.bad_coverage(reason))

    def _break(self, error: ReplicatorError) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)

    async def _watch(self) -> None:
        await self._broken

    # -- the pipeline -----

    async def _write(self) -> None:
        """Write queued frames, one at a time; several of these run side by side."""
        decompressor = new_decompressor()
        pool, workers, seed = self._receiver.pool, self._receiver.workers, self._receiver.seed

        def store(image: Image, data: Data, into: memoryview | None) -> None:
            extents, payload = unpack(data.header, data.body.view, into, decompressor, seed)
            image.write(extents, payload)

        while True:
            disk, data = await self._queue.get()
            raw = pool.take(data.header.raw_len) if data.header.flags & Flags.ZSTD else None
            try:
                await workers.run(store, disk.image, data, raw.view if raw else None)
            except RemoteProtocolError as error:
                raise refusals.damaged(disk.number, error) from None
            finally:
                if raw is not None:
                    pool.give(raw)
                self._receiver.give(data.body)
            self._written.append(Written(disk, data.header))
            self._commit.set()

    async def _sync_and_acknowledge(self) -> None:
        """Group commit: one sync per disk under way at a time, for all that was written before it began."""
        while True:
            await self._commit.wait()
            self._commit.clear()
            batch, self._written = self._written, []
            for disk in {written.disk.number: written.disk for written in batch}.values():
                await self._receiver.workers.run(disk.image.sync)
            reach("session.before_ack")
            for disk, header in ((written.disk, written.header) for written in batch):
                disk.durable.add(header.cover_start, header.cover_end)
                pending = self._pending.setdefault(disk.number, Coverage())
                pending.add(header.cover_start, header.cover_end)
            self._share.release(sum(HEADER_BYTES + written.header.body_len for written in batch))
            if self._control.state is not State.CLOSED:
                await self._control.drain()  # a sender that reads no ACKs gets no more of them, and no credit
            self._acknowledge()
            reach("session.acked")

    def _acknowledge(self) -> None:
        """Tell the sender what has become durable and what it may send, if there is news and it listens."""
        granted = self._share.window.granted
        if self._control.state not in (State.OPEN, State.SEALING) or not (
            self._pending or granted > self._told
        ):
            return
        self._told = granted
        pending, self._pending = self._pending, {}
        parts = [
            DiskCoverage(number, intervals[first : first + ACK_INTERVALS])
            for number, intervals in ((number, coverage.intervals()) for number, coverage in pending.items())
            for first in range(0, len(intervals), ACK_INTERVALS)
        ]
        messages: list[tuple[DiskCoverage, ...]] = [(part,) for part in parts]
        for disks in messages or [()]:
            self._sequence += 1
            self._control.send(Ack(self._sequence, granted, disks))

    # -- the conversation -----

    async def _converse(self) -> None:
        """The control stream from OPENED to the goodbye."""
        while True:
            message = await self._control.receive()
            if isinstance(message, Seal):
                await self._seal(message)
            elif isinstance(message, Bye):
                return
            else:
                raise refusals.unsupported(type(message).__name__)

    async def _seal(self, seal: Seal) -> None:
        for number, disk in self._disks.items():
            missing = next(disk.durable.gaps(0, disk.image.size_bytes), None)
            if seal.epoch != self._group.epoch or missing is not None:
                raise refusals.incomplete(number, missing)
        reach("session.before_sealed")
        await self._receiver.workers.run(self._receiver.directory.seal, self._group)
        self._control.send(Sealed(seal.epoch, NO_ID))
        reach("session.sealed")
        log.info("%s: epoch %s sealed%s", self.peer, seal.epoch.hex(), " (fuzzy)" if seal.fuzzy else "")


class Receiver:
    """Serves the data conversations of a daemon.

    Args:
        directory: where the images are.
        workers: threads for disk and CPU work.
        seed: the installation's hash seed.
        identify: peer certificate (DER) -> identity id; raises TrustError for what it does not accept.
        credit_bytes: the daemon's pool of credit, which bounds its memory.
    """

    def __init__(
        self,
        directory: ImageDirectory,
        workers: Workers,
        seed: int,
        identify: Callable[[bytes], str],
        credit_bytes: int = CREDIT_BYTES,
    ) -> None:
        self.directory = directory
        self.workers = workers
        self.seed = seed
        self.credit = CreditPool(credit_bytes)
        self.pool = BufferPool(KEEP_BYTES)
        self._identify = identify
        self._sessions: dict[bytes, Session] = {}
        self._groups: dict[str, Session] = {}
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def allocate(self, size: int, lead: int) -> Body:
        """Memory for a DATA body, for ``Connection``; aligned where that serves O_DIRECT."""
        return self.pool.take(size, lead) if size >= ALIGNED_MIN_BYTES else plain_allocate(size, lead)

    def give(self, body: Body) -> None:
        """Take the memory of a DATA body back."""
        if isinstance(body, Buffer):
            self.pool.give(body)

    async def serve(self, stream: Stream) -> None:
        """Serve one accepted stream: OPEN makes it a session's control stream, ATTACH a data stream."""
        if stream.peer_certificate is None:
            raise refusals.no_certificate()
        peer = self._identify(stream.peer_certificate)
        await stream.expect(Hello)
        stream.send(Welcome(VERSION, 0, self.seed, STREAMS_MAX, AGENT))
        message = await stream.receive()
        if isinstance(message, Open):
            await self._run_session(stream, peer, message)
        elif isinstance(message, Attach):
            await self._session_of(message, peer).carry(stream)
        elif not isinstance(message, Bye):
            raise refusals.unsupported(type(message).__name__)

    async def _run_session(self, stream: Stream, peer: str, wanted: Open) -> None:
        """Serve an OPEN to the end of its session."""
        if wanted.mode is not Mode.FULL:
            raise refusals.unsupported(f"mode {wanted.mode.name.lower()}")
        async with AsyncExitStack() as ending:
            # Of two OPENs at once, each would find the group free and write its images.
            async with self._opening.setdefault(wanted.group, asyncio.Lock()):
                older = self._groups.get(wanted.group)
                if older is not None and older.peer != peer:
                    raise refusals.busy(wanted.group)
                if older is not None:
                    await older.stop()
                group = await self.workers.run(
                    self.directory.open_group, peer, wanted.group, wanted.epoch, wanted.disks
                )
                try:
                    session = Session(self, stream, peer, group)
                except BaseException:
                    await self.workers.run(group.close)
                    raise
                self._sessions[session.id] = self._groups[wanted.group] = session
                ending.callback(self._forget, wanted.group, session)  # last: until then its images are locked
                ending.push_async_callback(self.workers.run, group.close)
            await session.run()

    def _forget(self, group: str, session: Session) -> None:
        del self._sessions[session.id]
        del self._groups[group]
        session.ended.set()

    def _session_of(self, attach: Attach, peer: str) -> Session:
        session = self._sessions.get(attach.session)
        if session is None or session.over or session.peer != peer:
            raise refusals.unknown_session()
        return session
