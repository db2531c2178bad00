"""One epoch being sent over one session, from OPENED to SEALED: the sending pipeline.

::

    windows ─▶ packers: compare, read, zero test, compress ─▶ queue ─▶ N streams, as credit allows
       ▲                                 ACK ─▶ credit, progress ─▶ SEAL ─▶ SEALED
       └──────── WANTED: a stretch that is to be sent again

One TaskGroup. Memory is bounded by the packers and the queue, whatever the disk's size: a frame's buffer is
free again as soon as TLS has copied it, and what a break loses is read again from the source. Not here: how
frames are made (``framing.py``), connecting again (``retrying.py``), and which epoch it is (``sender.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence

from protocol.credit import SendWindow
from protocol.messages import (
    Ack,
    Attach,
    Attached,
    Bye,
    Digests,
    DiskCoverage,
    Interval,
    Opened,
    Seal,
    Sealed,
    Wanted,
)
from protocol.state import State
from replicator.adapt import Limit
from replicator.asking import Questions
from replicator.differ import Window
from replicator.digest import BLOCK_BYTES
from replicator.errors import LinkError, PeerError, cause_of
from replicator.extents import Coverage, Relation
from replicator.failpoints import reach
from replicator.framing import Framer, SendingDisk, SendingParts, windows_of
from replicator.framing import Progress as Progress
from replicator.packing import Packed
from replicator.transport.stream import Stream

QUEUE_FRAMES = 8  # packed and not yet sent: 8 MiB at the most
PACKERS_A_THREAD = 2  # while one waits for digests from far away, another computes
VERDICT_S = 1.0  # how long a lost data stream waits for the control stream to say why
WANTED_MAX = 1000  # a session: a flipped bit is healed, a machine that flips them is not worked with


class SourceMoved(Exception):
    """The source changed after its copy was said to be at rest, and something had to be read again."""


class SendingEpoch:
    """One session of an epoch, from OPENED to SEALED.

    Attributes:
        sealed_at_s: the event loop's time as SEALED came.
    """

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
        self._waiting = 0  # streams, for credit
        self._questions = Questions(control, {disk.number: disk.source.size_bytes for disk in disks})
        # As OPENED told: what is wanted again meanwhile must not be sent by the packers, too.
        held = [Coverage(disk.durable.intervals()) for disk in disks]
        self._windows = _all_windows(list(zip(disks, held, strict=True)))
        self._cutting = asyncio.Lock()
        self._queue: asyncio.Queue[tuple[SendingDisk, Packed]] = asyncio.Queue(QUEUE_FRAMES)
        self._wanted: asyncio.Queue[tuple[SendingDisk, Interval]] = asyncio.Queue()
        self._wanted_count = 0
        self._whole = asyncio.Event()
        self._streams: list[Stream] = []
        self._attaching: list[asyncio.Task[None]] = []
        self._sealing = False  # no more streams are attached
        self._at_rest = False  # SEAL is out and promises that no disk has changed
        self._sealed: asyncio.Future[Sealed] = asyncio.get_running_loop().create_future()
        self._listener: asyncio.Task[None] | None = None
        self.sealed_at_s = 0.0

    async def run(self, greetings: Sequence[Awaitable[Stream]], stale: bool) -> tuple[Sealed, bool]:
        """Send what is missing and have it sealed. True: the source changed meanwhile.

        Args:
            greetings: the data streams, once the target has accepted us on them.
            stale: it had changed before, since the epoch was begun.

        Raises:
            SourceMoved: it changed so late that SEAL no longer tells the truth: open the epoch again.
            SourceError, PeerError, TrustError, LinkError: what ended the session.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._listener = tasks.create_task(self._listen())
                packers = PACKERS_A_THREAD * self._parts.workers.threads
                background = [tasks.create_task(self._pack()) for _ in range(packers)]
                background.append(tasks.create_task(self._pack_again()))
                background += [tasks.create_task(self._carry(greeting)) for greeting in greetings]
                self._count()
                sealed, changed = await self._seal(stale)
                for task in background:
                    task.cancel()
            return sealed, changed
        except BaseException as error:
            for stream in self._streams:  # a line that stalls shall not hold up whoever gives up
                stream.abort()
            raise (cause_of(error) if isinstance(error, BaseExceptionGroup) else error) from None
        finally:
            while not self._queue.empty():
                self._parts.give(self._queue.get_nowait()[1])
            await self._windows.aclose()
            await asyncio.gather(*(stream.close() for stream in self._streams))

    # -- out -----

    async def _pack(self) -> None:
        """Take one window after the other; several of these run side by side."""
        framer = self._framer(self._parts.progress)
        while True:
            async with self._cutting:
                job = await anext(self._windows, None)
            if job is None:
                return
            await self._pack_window(framer, *job)

    async def _pack_again(self) -> None:
        """Take what the target wants again. It is sent twice, but read and matched count once."""
        framer = self._framer(Progress())
        while True:
            disk, stretch = await self._wanted.get()
            others = Coverage([(0, disk.source.size_bytes)])
            others.remove(*stretch)
            async for window in windows_of(disk, others):
                await self._pack_window(framer, disk, window)

    def _framer(self, progress: Progress) -> Framer:
        opened = self._opened
        return Framer(
            self._parts,
            opened.mode,
            opened.epoch_number,
            self._questions,
            self._may_ask,
            self._seed,
            progress,
        )

    def _may_ask(self) -> bool:
        return self._control.state is State.OPEN

    async def _pack_window(self, framer: Framer, disk: SendingDisk, window: Window) -> None:
        loop = asyncio.get_running_loop()
        difference = await framer.difference(disk, window)
        for piece in difference.pieces:
            packed = await framer.packed(disk, piece, difference.fine)
            self._parts.level.observe(self._limit(), piece.raw_bytes, loop.time())
            try:
                if self._at_rest and await disk.source.changed():
                    raise SourceMoved
                await self._queue.put((disk, packed))
            except BaseException:  # cancelled too
                self._parts.give(packed)
                raise

    def _limit(self) -> Limit:
        """What holds up the frames just now."""
        if self._queue.empty():
            return Limit.SOURCE
        if not self._queue.full():
            return Limit.NOTHING
        if not self._waiting:
            return Limit.LINE
        # All credit is used: by what the line has not taken, or by what the target has not written.
        on_their_way = sum(stream.unacknowledged_bytes for stream in self._streams)
        return Limit.LINE if 2 * on_their_way > self._opened.credit else Limit.TARGET

    async def _transmit(self, stream: Stream) -> None:
        """Send packed frames over one data stream, as credit and the stream allow."""
        while True:
            disk, packed = await self._queue.get()
            size, header = packed.frame.wire_bytes, packed.frame.header
            try:
                try:
                    while self._window.room < size:
                        self._credit.clear()
                        self._waiting += 1
                        try:
                            await self._credit.wait()
                        finally:
                            self._waiting -= 1
                    self._window.take(size)
                    again = disk.sent.relation(header.cover_start, header.cover_end) is not Relation.NEW
                    disk.sent.add(header.cover_start, header.cover_end)  # even if the stream fails just now
                    disk.claimed.add(header.cover_start, header.cover_end)
                    stream.send_data(packed.frame)
                finally:  # TLS has copied it, or nobody will
                    self._parts.give(packed)
                self._parts.progress.sent += size
                self._parts.progress.resent += size if again else 0
                await stream.drain()
            except LinkError:
                await self._verdict()
                raise

    async def _carry(self, greeting: Awaitable[Stream]) -> None:
        """Attach a data stream as soon as the target has accepted it, and use it to the end."""
        try:
            stream = await greeting
            self._streams.append(stream)
            if self._sealing:
                return
            attach = asyncio.create_task(_attach(stream, self._opened.session))
            self._attaching.append(attach)
            await attach
        except LinkError:
            await self._verdict()
            raise
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._transmit(stream))
            tasks.create_task(self._watch(stream))

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
        raise defective(f"it sent {type(message).__name__} on a data stream")

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
                    raise defective("it gave digests that were not asked for")
            elif isinstance(message, Wanted):
                self._want(message)
            elif isinstance(message, Sealed):
                self._conclude(message)
                return
            elif isinstance(message, Bye):
                raise LinkError(
                    "link.lost",
                    f"{self._control.peer_address} stopped receiving",
                    cause="the master target is being stopped",
                    fix="run the same command again when it is back",
                )
            else:
                raise defective(f"it sent {type(message).__name__}, which was not asked for")

    def _acknowledged(self, ack: Ack) -> None:
        self._window.raise_to(ack.credit)
        self._credit.set()
        for number, intervals in ((answer.disk, answer.intervals) for answer in ack.disks):
            disk = self._disks.get(number)
            for start, end in intervals:
                if disk is None or disk.claimed.relation(start, end) is not Relation.COVERED:
                    raise defective(f"it acknowledged [{start}, {end}) of disk {number}, which was not sent")
                disk.durable.add(start, end)
        self._count()

    def _want(self, wanted: Wanted) -> None:
        """A stretch leaves the coverage and is sent again."""
        disk, start, end = self._disks.get(wanted.disk), wanted.start, wanted.end
        if (
            disk is None
            or start >= end
            or start % BLOCK_BYTES
            or (end % BLOCK_BYTES and end != disk.source.size_bytes)
            or disk.claimed.relation(start, end) is not Relation.COVERED
        ):
            raise defective(f"it wants [{start}, {end}) of disk {wanted.disk} again, which was not sent")
        self._wanted_count += 1
        if self._wanted_count > WANTED_MAX:
            raise _damaging(disk.name)
        disk.claimed.remove(start, end)
        disk.durable.remove(start, end)
        self._whole.clear()
        self._count()
        self._wanted.put_nowait((disk, Interval(start, end)))

    def _conclude(self, sealed: Sealed) -> None:
        """SEALED says that all is durable, acknowledged one by one or not."""
        for disk in self._disks.values():
            if not disk.claimed.is_whole(disk.source.size_bytes):
                raise defective("it sealed an epoch of which it wanted something again")
            disk.durable.add(0, disk.source.size_bytes)
        if sealed.epoch != self._epoch:
            raise defective("it sealed another epoch")
        self.sealed_at_s = asyncio.get_running_loop().time()
        self._count()
        self._sealed.set_result(sealed)

    def _count(self) -> None:
        progress = self._parts.progress
        progress.done = sum(disk.durable.covered_bytes for disk in self._disks.values())
        if progress.done == progress.size:
            self._whole.set()

    async def _seal(self, stale: bool) -> tuple[Sealed, bool]:
        """Have the epoch sealed once it is whole. True: a source changed while it was read."""
        while True:
            await self._whole.wait()
            changed = any([await disk.source.changed() for disk in self._disks.values()])
            if self._whole.is_set():  # else something was wanted again while we looked
                break
        self._sealing = True
        await asyncio.gather(*self._attaching)  # to a session that has ended, a stream comes as a stranger
        coverage = tuple(DiskCoverage(disk.number, disk.durable.intervals()) for disk in self._disks.values())
        self._control.send(Seal(self._epoch, changed or stale, coverage))
        self._at_rest = not (changed or stale)
        return await self._sealed, changed


async def _attach(stream: Stream, session: bytes) -> None:
    stream.send(Attach(session))
    await stream.expect(Attached)


async def _all_windows(
    disks: Sequence[tuple[SendingDisk, Coverage]],
) -> AsyncGenerator[tuple[SendingDisk, Window], None]:
    """What is to be looked at, disk after disk, made as it is consumed."""
    for disk, held in disks:
        async for window in windows_of(disk, held):
            yield disk, window


def defective(what: str) -> PeerError:
    """The target did what no target does."""
    return PeerError(
        "peer.protocol",
        f"the master target misbehaved: {what}",
        cause="a defect on one of the two sides",
        fix="report it with the logs of both sides",
    )


def _damaging(disk: str) -> PeerError:
    return PeerError(
        "peer.damaged_frames",
        f"the master target has asked {WANTED_MAX} times for something of {disk} again",
        cause="what it unpacks is not what was read here: the memory of one of the two machines is failing",
        fix="check the memory of both machines, then give the same command again",
    )
