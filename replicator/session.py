"""One epoch of one group being received, from OPEN to SEALED: the receiving pipeline.

::

    stream ─ on_data ─▶ claimed ─▶ queue ─▶ writers: decompress + verify + write ─▶ committer: sync ─▶ ACK

One TaskGroup. The queue needs no bound of its own: what may be in it was granted as credit. An ACK names only
what was written before the sync that it follows began, and only after the coverage journal holds it too: what
was acknowledged is there, and known to be there, after any crash. Who may open a session is the business of
``receiver.py``.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from protocol.connection import Body, Data
from protocol.constants import HEADER_BYTES, MIB, STREAMS_MAX
from protocol.errors import RemoteProtocolError
from protocol.header import Flags, Header
from protocol.messages import (
    NO_ID,
    Ack,
    Bye,
    Digests,
    DigestsWanted,
    DiskCoverage,
    Interval,
    Opened,
    Seal,
    Sealed,
)
from protocol.payload import new_decompressor, unpack
from protocol.state import State
from replicator import refusals
from replicator.buffers import BufferPool
from replicator.credit_pool import CreditPool, Share
from replicator.digest import BLOCK_BYTES, FINE_BYTES
from replicator.errors import ReplicatorError, cause_of
from replicator.extents import Coverage, Relation
from replicator.failpoints import reach
from replicator.images.base import Image
from replicator.images.directory import ImageDirectory, OpenedGroup
from replicator.transport.stream import Stream
from replicator.workers import Workers

log = logging.getLogger(__name__)

ACK_INTERVALS = 16 * 1024  # a quarter of a MiB: no ACK comes near the limit of a control message
COMMIT_BYTES = 8 * MIB  # a sync costs the disk a flush: not for every frame while more are at hand
REQUESTS_MAX = 64  # a sender asks for windows of a disk, a few ahead
_LISTENING = (State.OPEN, State.SEALING)  # where ACK and DIGESTS are allowed
DIGESTS_A_PART = 4096  # 64 KiB of digests, 256 MiB of disk: small enough to come while the next are read


@dataclass(frozen=True, slots=True)
class ReceivingParts:
    """What a daemon's sessions share.

    Attributes:
        directory: where the images are.
        workers: threads for disk and CPU work.
        seed: the installation's hash seed.
        credit: the daemon's pool of credit, which bounds its memory.
        pool: memory for frames.
        give: takes the memory of a DATA body back.
    """

    directory: ImageDirectory
    workers: Workers
    seed: int
    credit: CreditPool
    pool: BufferPool
    give: Callable[[Body], None]


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

    @property
    def wire_bytes(self) -> int:
        """What it cost of the credit."""
        return HEADER_BYTES + self.header.body_len


class Session:
    """One epoch of one group, from OPEN to its end."""

    def __init__(self, parts: ReceivingParts, control: Stream, peer: str, group: OpenedGroup) -> None:
        self.id = secrets.token_bytes(16)
        self.peer = peer
        self._parts = parts
        self._control = control
        self._group = group
        self._disks = {
            disk.number: ReceivingDisk(
                disk.number,
                disk.image,
                Coverage(disk.durable.intervals()),
                Coverage(disk.durable.intervals()),
            )
            for disk in group.disks
        }
        self._queue: asyncio.Queue[tuple[ReceivingDisk, Data]] = asyncio.Queue()
        self._asked: asyncio.Queue[DigestsWanted] = asyncio.Queue(REQUESTS_MAX)
        self._written: list[Written] = []
        self._writing = 0
        self._commit = asyncio.Event()
        self._pending: dict[int, Coverage] = {}
        self._sequence = 0
        self._told = 0
        self._streams: set[Stream] = set()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.current_task()
        self.ended = asyncio.Event()
        self.over = False
        self._share: Share = parts.credit.join(self._commit.set)

    async def run(self) -> None:
        """Serve the session until the sender leaves; returns after a goodbye, raises what else ended it."""
        try:
            self._open()
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(self._write()) for _ in range(self._parts.workers.threads)]
                background.append(tasks.create_task(self._sync_and_acknowledge()))
                background.append(tasks.create_task(self._answer()))
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
            self._parts.credit.leave(self._share)

    async def stop(self) -> None:
        """End the session from outside: its identity opens the group anew."""
        if self._task is not None and not self.over:  # else it is closing its images: that must go on
            self._control.fail(refusals.replaced())
            self._task.cancel()
        await self.ended.wait()

    def _open(self) -> None:
        self._told = self._share.window.granted
        epochs = self._group.epochs
        disks = tuple(DiskCoverage(disk.number, disk.durable.intervals()) for disk in self._disks.values())
        self._control.send(Opened(self.id, epochs.number, self._told, disks, epochs.mode, epochs.sealed))

    def _drop_streams(self) -> None:
        """The session is over: nobody is left to serve its data streams, or to write what they brought."""
        self.over = True
        for stream in self._streams:
            stream.on_data = lambda data: self._parts.give(data.body)
            stream.abort()
        while not self._queue.empty():
            self._parts.give(self._queue.get_nowait()[1].body)

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
            or header.epoch != self._group.epochs.number
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
            self._parts.give(data.body)
            self._share.release(HEADER_BYTES + header.body_len)
        else:
            disk.claimed.add(header.cover_start, header.cover_end)
            self._queue.put_nowait((disk, data))

    def _refuse(self, data: Data, reason: str) -> None:
        self._parts.give(data.body)
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
        pool, workers, seed = self._parts.pool, self._parts.workers, self._parts.seed

        def store(image: Image, data: Data, into: memoryview | None) -> None:
            extents, payload = unpack(data.header, data.body.view, into, decompressor, seed)
            image.write(extents, payload)

        while True:
            disk, data = await self._queue.get()
            self._writing += 1
            raw = pool.take(data.header.raw_len) if data.header.flags & Flags.ZSTD else None
            try:
                await workers.run(store, disk.image, data, raw.view if raw else None)
            except RemoteProtocolError as error:
                raise refusals.damaged(disk.number, error) from None
            finally:
                if raw is not None:
                    pool.give(raw)
                self._parts.give(data.body)
            self._writing -= 1
            self._written.append(Written(disk, data.header))
            idle = not self._writing and self._queue.empty()
            if idle or sum(written.wire_bytes for written in self._written) >= COMMIT_BYTES:
                self._commit.set()

    async def _sync_and_acknowledge(self) -> None:
        """Group commit: one sync per disk under way at a time, for all that was written before it began."""
        while True:
            await self._commit.wait()
            self._commit.clear()
            batch, self._written = self._written, []
            await self._parts.workers.run(self._make_durable, batch)
            reach("session.before_ack")
            for disk, header in ((written.disk, written.header) for written in batch):
                disk.durable.add(header.cover_start, header.cover_end)
                pending = self._pending.setdefault(disk.number, Coverage())
                pending.add(header.cover_start, header.cover_end)
            self._share.release(sum(written.wire_bytes for written in batch))
            if self._control.state is not State.CLOSED:
                await self._control.drain()  # a sender that reads no ACKs gets no more of them, and no credit
            self._acknowledge()
            reach("session.acked")

    def _make_durable(self, batch: list[Written]) -> None:
        """Sync the images, then note it. Runs in a worker thread."""
        for disk in {written.disk.number: written.disk for written in batch}.values():
            disk.image.sync()
        if batch and self._group.journal is not None:
            self._group.journal.append(
                (written.disk.number, written.header.cover_start, written.header.cover_end)
                for written in batch
            )

    def _acknowledge(self) -> None:
        """Tell the sender what has become durable and what it may send, if there is news and it listens."""
        granted = self._share.window.granted
        if self._control.state not in _LISTENING or not (self._pending or granted > self._told):
            return
        self._told = granted
        pending, self._pending = self._pending, {}
        parts = [
            DiskCoverage(number, intervals[first : first + ACK_INTERVALS])
            for number, intervals in ((number, coverage.intervals()) for number, coverage in pending.items())
            for first in range(0, len(intervals), ACK_INTERVALS)
        ]
        for part in parts:
            self._sequence += 1
            self._control.send(Ack(self._sequence, granted, (part,)))
        if not parts:  # news of credit alone repeats the number
            self._control.send(Ack(self._sequence, granted, ()))

    # -- the conversation -----

    async def _converse(self) -> None:
        """The control stream from OPENED to the goodbye."""
        while True:
            message = await self._control.receive()
            if isinstance(message, Seal):
                await self._seal(message)
            elif isinstance(message, DigestsWanted):
                self._ask(message)
            elif isinstance(message, Bye):
                return
            else:
                raise refusals.unsupported(type(message).__name__)

    def _ask(self, wanted: DigestsWanted) -> None:
        """Queue a request for digests, if it makes sense."""
        disk = self._disks.get(wanted.disk)
        known = wanted.block in (BLOCK_BYTES, FINE_BYTES)
        fits = (
            disk is not None
            and known
            and all(
                start % wanted.block == 0
                and (end % wanted.block == 0 or end == disk.image.size_bytes)
                and end <= disk.image.size_bytes
                for start, end in wanted.intervals
            )
        )
        if not fits or self._asked.full():
            raise refusals.bad_question(wanted.disk, wanted.block)
        self._asked.put_nowait(wanted)

    async def _answer(self) -> None:
        """Answer requests for digests, one after the other, in parts."""
        while True:
            wanted = await self._asked.get()
            digests = self._disks[wanted.disk].image.digests
            rest = wanted.intervals
            while rest:
                found = await self._parts.workers.run(
                    digests, rest, wanted.block, self._parts.seed, DIGESTS_A_PART
                )
                if self._control.state not in _LISTENING:  # sealed meanwhile, or gone
                    return
                self._control.send(Digests(wanted.request, *found))
                await self._control.drain()
                reached = found.intervals[-1].end
                rest = tuple(Interval(max(start, reached), end) for start, end in rest if end > reached)

    async def _seal(self, seal: Seal) -> None:
        for number, disk in self._disks.items():
            missing = next(disk.durable.gaps(0, disk.image.size_bytes), None)
            if seal.epoch != self._group.epoch or missing is not None:
                raise refusals.incomplete(number, missing)
        reach("session.before_sealed")
        await self._parts.workers.run(self._parts.directory.seal, self._group)
        self._control.send(Sealed(seal.epoch, NO_ID))
        reach("session.sealed")
        log.info("%s: epoch %s sealed%s", self.peer, seal.epoch.hex(), " (fuzzy)" if seal.fuzzy else "")
