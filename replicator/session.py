"""One epoch of one group being received, from OPEN to SEALED: the receiving pipeline.

::

    stream ─ on_data ─▶ claimed ─▶ queue ─▶ verifiers: decompress, hash ─▶ committer: log or images ─▶ ACK
                                               └─▶ WANTED

One TaskGroup. The queue needs no bound of its own: what may be in it was granted as credit. An ACK names only
what was made durable, and known to be, before it: that is there after any crash. A frame whose content does
not verify is asked for again. Where data goes is the business of ``groups.py``, who may open a session is
``receiver.py``'s.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from protocol.connection import Data
from protocol.constants import HEADER_BYTES, MIB, STREAMS_MAX
from protocol.errors import RemoteProtocolError
from protocol.header import Flags
from protocol.messages import (
    Ack,
    Bye,
    Digests,
    DigestsWanted,
    DiskCoverage,
    Open,
    Opened,
    Seal,
    Sealed,
    Wanted,
)
from protocol.payload import new_decompressor, unpack
from protocol.state import State
from replicator import refusals
from replicator.credit_pool import Share
from replicator.digest import BLOCK_BYTES, FINE_BYTES
from replicator.errors import ReplicatorError, cause_of
from replicator.extents import Coverage, Relation
from replicator.failpoints import reach
from replicator.groups import GroupInHand
from replicator.images.directory import OpenedDisk
from replicator.images.reading import DIGESTS_A_PART
from replicator.receiving import ReceivingDisk, ReceivingParts, Verified
from replicator.transport.stream import Stream

log = logging.getLogger(__name__)

ACK_INTERVALS = 16 * 1024  # a quarter of a MiB: no ACK comes near the limit of a control message
COMMIT_BYTES = 8 * MIB  # a sync costs the disk a flush: not for every frame while more are at hand
WANTED_MAX = 64  # a session in which more fails to verify has another trouble than one bad frame
REQUESTS_MAX = 64  # a sender asks for windows of a disk, a few ahead
_LISTENING = (State.OPEN, State.SEALING)  # where ACK and DIGESTS are allowed


class Session:
    """One epoch of one group, from OPEN to its end."""

    def __init__(
        self, parts: ReceivingParts, control: Stream, peer: str, group: GroupInHand, share: Share
    ) -> None:
        self.id = secrets.token_bytes(16)
        self.peer = peer
        self._parts = parts
        self._control = control
        self._group = group
        self._disks = {
            disk.number: ReceivingDisk(
                disk, Coverage(disk.durable.intervals()), Coverage(disk.durable.intervals())
            )
            for disk in group.holding.disks
        }
        self._queue: asyncio.Queue[tuple[ReceivingDisk, Data]] = asyncio.Queue()
        self._asked: asyncio.Queue[DigestsWanted] = asyncio.Queue(REQUESTS_MAX)
        self._verified: list[Verified] = []
        self._verified_bytes = 0
        self._verifying = 0
        self._wanted = 0
        self._commit = asyncio.Event()
        self._pending: dict[int, Coverage] = {}
        self._sequence = 0
        self._told = 0
        self._streams: set[Stream] = set()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.current_task()
        self.ended = asyncio.Event()
        self.over = False
        self._share = share
        share.announce = self._commit.set

    async def run(self) -> None:
        """Serve the session until the sender leaves; returns after a goodbye, raises what else ended it."""
        try:
            self._tell_why()
            self._open()
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(self._verify()) for _ in range(self._parts.workers.threads)]
                background.append(tasks.create_task(self._commit_and_acknowledge()))
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

    def _tell_why(self) -> None:
        group = self._group.holding.group
        mode, why = group.epochs.mode.name.lower(), group.decision.why
        level = logging.WARNING if group.decision.diverged else logging.INFO
        name = group.epochs.name
        log.log(level, "%s: group %s, epoch %s: %s: %s", self.peer, name, group.epoch.hex(), mode, why)

    def _open(self) -> None:
        self._told = self._share.window.granted
        epochs = self._group.holding.group.epochs
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
        for verified in self._verified:
            self._parts.give(verified.data.body)

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
            or header.epoch != self._group.holding.group.epochs.number
            or header.cover_end > disk.size
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

    async def _verify(self) -> None:
        """Take queued frames, one at a time; several of these run side by side."""
        decompressor = new_decompressor()
        pool, workers, seed = self._parts.pool, self._parts.workers, self._parts.seed
        holding = self._group.holding

        def check(disk: OpenedDisk, data: Data, into: memoryview | None) -> None:
            extents, payload = unpack(data.header, data.body.view, into, decompressor, seed)
            holding.store(disk, extents, payload)

        while True:
            disk, data = await self._queue.get()
            self._verifying += 1
            raw = pool.take(data.header.raw_len) if data.header.flags & Flags.ZSTD else None
            try:
                await workers.run(check, disk.opened, data, raw.view if raw else None)
            except RemoteProtocolError as error:
                self._want(disk, data, error)
            except BaseException:
                self._parts.give(data.body)
                raise
            else:
                self._verified.append(Verified(disk, data))
                self._verified_bytes += self._verified[-1].wire_bytes
            finally:
                if raw is not None:
                    pool.give(raw)
                self._verifying -= 1
            idle = not self._verifying and self._queue.empty()
            if idle or self._verified_bytes >= COMMIT_BYTES:
                self._commit.set()

    def _want(self, disk: ReceivingDisk, data: Data, error: RemoteProtocolError) -> None:
        """A frame does not hold what was read: nothing of it is kept, and its stretch is asked for again."""
        start, end = data.header.cover_start, data.header.cover_end
        log.warning("%s: disk %d, [%d, %d): %s; wanted again", self.peer, disk.number, start, end, error)
        self._parts.give(data.body)
        self._share.release(HEADER_BYTES + data.header.body_len)
        self._wanted += 1
        askable = start % BLOCK_BYTES == 0 and (end % BLOCK_BYTES == 0 or end == disk.size)
        if self._wanted > WANTED_MAX or not askable:
            raise refusals.damaged(disk.number, error)
        disk.claimed.remove(start, end)
        if self._control.state in _LISTENING:
            self._control.send(Wanted(disk.number, start, end))

    async def _commit_and_acknowledge(self) -> None:
        """Group commit: one at a time, for all that was verified before it began."""
        while True:
            await self._commit.wait()
            self._commit.clear()
            batch, self._verified = self._verified, []
            size, self._verified_bytes = self._verified_bytes, 0
            try:
                if batch:
                    frames = [(verified.data.header, verified.data.body.view) for verified in batch]
                    await self._group.commit(frames)
            finally:
                for verified in batch:
                    self._parts.give(verified.data.body)
            reach("session.before_ack")
            for disk, header in ((verified.disk, verified.data.header) for verified in batch):
                disk.durable.add(header.cover_start, header.cover_end)
                pending = self._pending.setdefault(disk.number, Coverage())
                pending.add(header.cover_start, header.cover_end)
            self._share.release(size)
            if self._control.state is not State.CLOSED:
                await self._control.drain()  # a sender that reads no ACKs gets no more of them, and no credit
            self._acknowledge()
            reach("session.acked")

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
            elif isinstance(message, Open):
                await self._open_again(message)
            elif isinstance(message, Bye):
                return
            else:
                raise refusals.unsupported(type(message).__name__)

    async def _open_again(self, wanted: Open) -> None:
        """The epoch that was just sealed is opened: the answer says that the images hold it."""
        if wanted.epoch != self._group.holding.group.epoch:
            raise refusals.unsupported("OPEN of another epoch in the same session")
        await self._group.applied()
        self._open()

    def _ask(self, wanted: DigestsWanted) -> None:
        """Queue a request for digests, if it makes sense."""
        disk = self._disks.get(wanted.disk)
        known = wanted.block in (BLOCK_BYTES, FINE_BYTES)
        fits = (
            disk is not None
            and known
            and all(
                start % wanted.block == 0
                and (end % wanted.block == 0 or end == disk.size)
                and end <= disk.size
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
            await self._group.applied()  # what is asked for is the newest sealed epoch
            digests = self._disks[wanted.disk].opened.image.digests
            rest = wanted.intervals
            while rest:
                found = await self._parts.workers.run(
                    digests, rest, wanted.block, self._parts.seed, DIGESTS_A_PART
                )
                if self._control.state not in _LISTENING:  # sealed meanwhile, or gone
                    return
                self._control.send(Digests(wanted.request, *found))
                await self._control.drain()
                rest = found.left_of(rest)

    async def _seal(self, seal: Seal) -> None:
        for number, disk in self._disks.items():
            missing = next(disk.durable.gaps(0, disk.size), None)
            if seal.epoch != self._group.holding.group.epoch or missing is not None:
                raise refusals.incomplete(number, missing)
        reach("session.before_sealed")
        point = await self._group.seal(seal.fuzzy)
        self._control.send(Sealed(seal.epoch, point))
        reach("session.sealed")
        log.info("%s: epoch %s sealed%s", self.peer, seal.epoch.hex(), " (fuzzy)" if seal.fuzzy else "")
