"""The sending side: which epoch is under way, what is remembered of it, and one try after the other to get it
sealed.

Each call of ``send`` is one session. After a break the same call goes on with the same epoch, from what the
target says is durable. Not here: the pipeline (``sending.py``), waiting between tries (``retrying.py``).
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from protocol.constants import ID_BYTES
from protocol.messages import NO_ID, Consistency, Hello, Mode, Open, OpenDisk, Opened, Welcome
from replicator import __version__
from replicator.adapt import Level
from replicator.buffers import BufferPool
from replicator.digest import BLOCK_BYTES
from replicator.errors import PeerError
from replicator.extents import Coverage
from replicator.sender_state import GroupMemory, GroupRecord
from replicator.sending import Progress, SendingDisk, SendingEpoch, SendingParts
from replicator.sources.base import Source
from replicator.transport.stream import Stream
from replicator.workers import Workers

AGENT = f"replicator {__version__}"
STREAMS_DEFAULT = 4
KEEP_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DiskToSend:
    """A disk of the group."""

    name: str
    source: Source


@dataclass(frozen=True, slots=True)
class Outcome:
    """A sealed epoch.

    Attributes:
        epoch: its id.
        mode: what it had to say.
        recovery_point: zeros, since nothing here is read from a snapshot yet.
        changed: the source may have changed while it was read.
        stale: an earlier run began the epoch, and the source may have changed since.
    """

    epoch: bytes
    mode: Mode
    recovery_point: bytes
    changed: bool
    stale: bool


@dataclass(slots=True)
class _Epoch:
    """The epoch under way.

    ``resumed``: an earlier run began it, so that the target may hold what no map tells of. ``stale``: that
    was with another state of the sources.
    """

    id: bytes
    disks: list[SendingDisk]
    resumed: bool
    stale: bool


class Sender:
    """Sends one group of disks to one master target.

    Args:
        dial: opens a stream to it, TLS up.
        workers: threads for disk and CPU work.
        level: picks the compression.
        memory: what is remembered of the group.
        streams: data streams per session, 1 to 16.
        progress: counters to keep, for whoever shows them.

    Attributes:
        welcomed: the target has let us in at least once.
    """

    def __init__(
        self,
        dial: Callable[[], Awaitable[Stream]],
        workers: Workers,
        level: Level,
        memory: GroupMemory,
        streams: int = STREAMS_DEFAULT,
        progress: Progress | None = None,
    ) -> None:
        self._parts = SendingParts(
            self._greet, workers, level, progress or Progress(), BufferPool(KEEP_BYTES)
        )
        self._dial = dial
        self._memory = memory
        self._streams = streams
        self._epoch: _Epoch | None = None
        self.welcomed = False

    async def send(self, group: str, disks: Sequence[DiskToSend]) -> Outcome:
        """Bring the group's epoch to its seal, in one session.

        Raises:
            SourceError, PeerError, TrustError, LinkError, StateError: what ended the session. Called again
                with the same disks, it goes on with the same epoch.
        """
        workers = self._parts.workers
        self._parts.progress.size = sum(disk.source.size_bytes for disk in disks)
        record = await workers.run(self._memory.load)
        epoch = self._epoch or await self._begin(record, disks)
        self._epoch = epoch
        control, welcome = await self._greet()
        try:
            seed = control.connection.seed
            opened = await self._open(control, group, epoch, record, seed)
            for disk in epoch.disks:
                if disk.building is None:
                    disk.building = await workers.run(
                        self._memory.build, epoch.id, disk.number, disk.source.size_bytes, seed
                    )
            streams = min(self._streams, welcome.streams_max)
            session = SendingEpoch(self._parts, control, epoch.id, opened, epoch.disks)
            sealed, changed = await session.run(streams, epoch.stale)
        except BaseException:
            control.abort()
            raise
        await control.close()
        await workers.run(self._finish, epoch)
        return Outcome(sealed.epoch, opened.mode, sealed.recovery_point, changed, epoch.stale)

    async def _begin(self, record: GroupRecord, disks: Sequence[DiskToSend]) -> _Epoch:
        """The epoch that an earlier run left, or a new one, remembered before anything is sent of it."""
        sources = {disk.name: await disk.source.fingerprint() for disk in disks}
        sending = [SendingDisk(disk.name, disk.source) for disk in disks]
        if record.under_way != NO_ID and record.sources.keys() == sources.keys():
            stale = record.sources != sources or "" in sources.values()
            return _Epoch(record.under_way, sending, resumed=True, stale=stale)
        epoch = secrets.token_bytes(ID_BYTES)
        await self._parts.workers.run(self._memory.begin, epoch, sources)
        return _Epoch(epoch, sending, resumed=False, stale=False)

    async def _open(
        self, control: Stream, group: str, epoch: _Epoch, record: GroupRecord, seed: int
    ) -> Opened:
        """OPEN and its answer: numbers and what is durable of each disk."""
        sizes = {disk.name: disk.source.size_bytes for disk in epoch.disks}
        _forget_maps(epoch)
        maps = {}
        if not epoch.resumed:
            maps = await self._parts.workers.run(self._memory.open_maps, record, sizes, seed)
        for disk in epoch.disks:
            disk.known = maps.get(disk.name)
        control.send(
            Open(
                group,
                assignment=b"",
                epoch=epoch.id,
                parent=record.sealed if maps else NO_ID,
                mode=Mode.INCREMENTAL if maps else Mode.RESYNC,
                consistency=Consistency.FUZZY,
                last_ack=0,
                disks=tuple(OpenDisk(disk.name, disk.source.size_bytes) for disk in epoch.disks),
            )
        )
        opened = await control.expect(Opened)
        _check_opened(opened, list(sizes.values()))
        if opened.sealed != record.sealed:
            _forget_maps(epoch)
        for disk, answer in zip(epoch.disks, opened.disks, strict=True):
            disk.number = answer.disk
            disk.durable = Coverage(answer.intervals)
        return opened

    def _finish(self, epoch: _Epoch) -> None:
        """The epoch is sealed: its maps become the ones to believe. Blocks."""
        builders = {
            disk.name: (disk.building, disk.source.size_bytes)
            for disk in epoch.disks
            if disk.building is not None
        }
        self._memory.publish(epoch.id, builders)
        self.close()

    def close(self) -> None:
        """Let go of the epoch under way; the next ``send`` goes on with it. Idempotent. Blocks."""
        if self._epoch is not None:
            _forget_maps(self._epoch)
            for disk in self._epoch.disks:
                if disk.building is not None:
                    disk.building.close()
        self._epoch = None

    async def _greet(self) -> tuple[Stream, Welcome]:
        """A stream on which the target has accepted us."""
        stream = await self._dial()
        try:
            stream.send(Hello(agent=AGENT))
            welcome = await stream.expect(Welcome)
        except BaseException:
            stream.abort()
            raise
        self.welcomed = True
        return stream, welcome


def _forget_maps(epoch: _Epoch) -> None:
    for disk in epoch.disks:
        if disk.known is not None:
            disk.known.close()
        disk.known = None


def _check_opened(opened: Opened, sizes: Sequence[int]) -> None:
    """Refuse an answer that does not fit the disks: coverage is whole blocks, inside the disk."""
    numbers = [answer.disk for answer in opened.disks]
    reason = None
    if len(numbers) != len(sizes) or len(set(numbers)) != len(sizes):
        reason = f"it opened {len(numbers)} disks of {len(sizes)}"
    for answer, size in zip(opened.disks, sizes, strict=False):
        for start, end in answer.intervals:
            if start % BLOCK_BYTES or (end % BLOCK_BYTES and end != size) or end > size:
                reason = f"it claims to hold [{start}, {end}) of disk {answer.disk}, of {size} bytes"
    if reason is not None:
        raise PeerError(
            "peer.protocol",
            f"the master target misbehaved: {reason}",
            cause="a defect on one of the two sides",
            fix="report it with the logs of both sides",
        )
