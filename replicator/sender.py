"""The sending side: which epoch is under way, what is remembered of it, and one try after the other to get it
sealed.

Each call of ``send`` is one session. After a break the same call goes on with the same epoch, from what the
target says is durable. Not here: the pipeline (``sending.py``), waiting between tries (``retrying.py``).
"""

from __future__ import annotations

import logging
import secrets
from asyncio import Task, create_task, gather, get_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from protocol.constants import ID_BYTES
from protocol.messages import (
    NO_ID,
    Consistency,
    Hello,
    Interval,
    Mode,
    Open,
    OpenDisk,
    Opened,
    Welcome,
)
from replicator import __version__
from replicator.adapt import Level
from replicator.buffers import BufferPool
from replicator.changes import Changes
from replicator.digest import BLOCK_BYTES
from replicator.errors import ReplicatorError
from replicator.extents import Coverage
from replicator.framing import Progress, SendingDisk, SendingParts
from replicator.sender_state import GroupMemory, GroupRecord
from replicator.sending import SendingEpoch, SourceMoved, defective
from replicator.sources.base import Source
from replicator.transport.stream import Stream
from replicator.workers import Workers

_log = logging.getLogger(__name__)

AGENT = f"replicator {__version__}"
STREAMS_DEFAULT = 4
KEEP_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DiskToSend:
    """A disk of the group.

    Attributes:
        name: at the target.
        source: where it is read.
        snapshot_ns: the moment whose content it shows, in ns since 1970 UTC: of its snapshot, or one since
            which it has been at rest; 0: it may be written to while it is read.
    """

    name: str
    source: Source
    snapshot_ns: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A sealed epoch.

    Attributes:
        epoch: its id.
        mode: what it had to say.
        recovery_point: the id of what the target made of it; zeros: none.
        consistency: what a recovery point of it is worth; FUZZY for whatever changed while it was read.
        changed: the source may have changed while it was read.
        stale: an earlier run began the epoch, and the source may have changed since.
        settled: the target's images hold it, not only its log.
        sealed_s: from the OPEN of its last session to SEALED.
    """

    epoch: bytes
    mode: Mode
    recovery_point: bytes
    consistency: Consistency
    changed: bool
    stale: bool
    settled: bool
    sealed_s: float = 0.0


@dataclass(slots=True)
class _Epoch:
    """The epoch under way.

    ``resumed``: an earlier run began it, so that the target may hold what no map tells of. ``stale``: that
    was with another state of the sources. ``opened_at_s``: the event loop's time at the last OPEN.
    """

    id: bytes
    disks: list[SendingDisk]
    resumed: bool
    stale: bool
    opened_at_s: float = 0.0


class Sender:
    """Sends one group of disks to one master target.

    Args:
        dial: opens a stream to it, TLS up.
        workers: threads for disk and CPU work.
        level: picks the compression.
        memory: what is remembered of the group.
        streams: data streams per session, 1 to 16.
        progress: counters to keep, for whoever shows them.
        tell: takes a line for people.

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
        tell: Callable[[str], None] = _log.warning,
    ) -> None:
        self._parts = SendingParts(workers, level, progress or Progress(), BufferPool(KEEP_BYTES))
        self._dial = dial
        self._memory = memory
        self._streams = streams
        self._tell = tell
        self._told = ""
        self._epoch: _Epoch | None = None
        self.welcomed = False

    async def send(
        self,
        group: str,
        disks: Sequence[DiskToSend],
        changes: Changes | None = None,
        *,
        settle: bool = False,
        epoch: bytes | None = None,
    ) -> Outcome:
        """Bring the group's epoch to its seal, in one session.

        Args:
            group, disks: what to send.
            changes: what has changed, if somebody knows; used if the target is still at that epoch.
            settle: stay until the target's images hold the epoch, as long as the stream lasts.
            epoch: its id, if the sources' snapshots carry one.

        Raises:
            SourceError, PeerError, TrustError, LinkError, StateError: what ended the session. Called again
                with the same disks, it goes on with the same epoch.
        """
        while True:
            with suppress(SourceMoved):  # the next session's SEAL will say so
                return await self._send(group, disks, changes, settle, epoch)

    async def _send(
        self,
        group: str,
        disks: Sequence[DiskToSend],
        changes: Changes | None,
        settle: bool,
        named: bytes | None,
    ) -> Outcome:
        workers = self._parts.workers
        self._parts.progress.size = sum(disk.source.size_bytes for disk in disks)
        record = await workers.run(self._memory.load)
        epoch = self._epoch or await self._begin(record, disks, named)
        self._epoch = epoch
        async with self._greetings() as greetings:
            control, welcome = await self._greet()
            try:
                opened = await self._open(control, group, epoch, record, changes)
                session = SendingEpoch(self._parts, control, epoch.id, opened, epoch.disks)
                sealed, changed = await session.run(greetings[: welcome.streams_max], epoch.stale)
                await workers.run(self._finish, epoch)
                settled = settle and await _has_settled(control, group, disks, epoch.id)
            except BaseException:
                control.abort()
                raise
            await control.close()
        return Outcome(
            sealed.epoch,
            opened.mode,
            sealed.recovery_point,
            Consistency.FUZZY if changed or epoch.stale else consistency_of(epoch.disks),
            changed,
            epoch.stale,
            settled,
            session.sealed_at_s - epoch.opened_at_s,
        )

    async def _begin(self, record: GroupRecord, disks: Sequence[DiskToSend], named: bytes | None) -> _Epoch:
        """The epoch that an earlier run left, or a new one, remembered before anything is sent of it."""
        sources = {disk.name: await disk.source.fingerprint() for disk in disks}
        sending = [SendingDisk(disk.name, disk.source, disk.snapshot_ns) for disk in disks]
        goes_on = named in (None, record.under_way) and record.under_way != NO_ID
        if goes_on and record.sources.keys() == sources.keys():
            stale = record.sources != sources or "" in sources.values()
            return _Epoch(record.under_way, sending, resumed=True, stale=stale)
        epoch = named or secrets.token_bytes(ID_BYTES)
        await self._parts.workers.run(self._memory.begin, epoch, sources)
        return _Epoch(epoch, sending, resumed=False, stale=False)

    async def _open(
        self, control: Stream, group: str, epoch: _Epoch, record: GroupRecord, changes: Changes | None
    ) -> Opened:
        """OPEN and its answer: numbers and what is durable of each disk, and what is known of the others."""
        sizes = {disk.name: disk.source.size_bytes for disk in epoch.disks}
        _forget_maps(epoch)
        maps = {}
        if not epoch.resumed:
            seed = control.connection.seed
            maps = await self._parts.workers.run(self._memory.open_maps, record, sizes, seed)
        for disk in epoch.disks:
            disk.known = maps.get(disk.name)
        parent = record.sealed if maps else changes.since if changes is not None else NO_ID
        epoch.opened_at_s = get_running_loop().time()
        control.send(
            Open(
                group,
                assignment=b"",
                epoch=epoch.id,
                parent=parent,
                mode=Mode.INCREMENTAL if parent != NO_ID else Mode.RESYNC,
                consistency=consistency_of(epoch.disks),
                last_ack=0,
                disks=tuple(
                    OpenDisk(disk.name, disk.source.size_bytes, disk.snapshot_ns) for disk in epoch.disks
                ),
            )
        )
        opened = await control.expect(Opened)
        _check_opened(opened, list(sizes.values()))
        if opened.sealed != record.sealed:
            _forget_maps(epoch)
        listed = self._usable(changes, opened)
        for disk, answer in zip(epoch.disks, opened.disks, strict=True):
            disk.number = answer.disk
            disk.durable, disk.claimed = Coverage(answer.intervals), Coverage(answer.intervals)
            disk.listed = listed.get(disk.name)
            if disk.building is None:
                disk.building = await self._parts.workers.run(
                    self._memory.build, epoch.id, disk.number, sizes[disk.name], control.connection.seed
                )
        return opened

    def _usable(self, changes: Changes | None, opened: Opened) -> Mapping[str, Sequence[Interval]]:
        """The changed blocks by disk, if the target holds just what they are said to be changes of."""
        if changes is None:
            return {}
        if opened.sealed == changes.since and opened.mode is Mode.INCREMENTAL:
            return changes.disks
        why = f"the target's newest is {opened.sealed.hex()}"
        if opened.sealed == NO_ID:
            why = "the target has sealed none"
        elif opened.sealed == changes.since:
            why = "the target's images are new or may hold something else"
        line = f"the list of changed extents is not used: it is since epoch {changes.since.hex()}, but {why}"
        if line != self._told:
            self._tell(line)
            self._told = line
        return {}

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
        # The errors of a session refer to all of it, and to one another: it may be long until they are freed.
        self._parts.pool.let_go()

    async def settled(self, group: str, disks: Sequence[DiskToSend], epoch: bytes) -> None:
        """Wait until the images of the target hold a sealed epoch: before that it does not answer its OPEN.

        Raises:
            LinkError, PeerError, TrustError, TargetError: what ended the wait; the epoch stays sealed.
        """
        control, _ = await self._greet()
        try:
            await _settle(control, group, disks, epoch)
        except BaseException:
            control.abort()
            raise
        await control.close()

    @asynccontextmanager
    async def _greetings(self) -> AsyncIterator[list[Task[Stream]]]:
        """Data streams, on their way while the control stream takes its round trips; closed in the end."""
        greetings = [create_task(self._data_stream()) for _ in range(self._streams)]
        try:
            yield greetings
        finally:
            for greeting in greetings:
                greeting.cancel()
            for stream in await gather(*greetings, return_exceptions=True):
                if isinstance(stream, Stream):
                    stream.abort()

    async def _data_stream(self) -> Stream:
        stream, _ = await self._greet()
        return stream

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


async def _settle(control: Stream, group: str, disks: Sequence[DiskToSend], epoch: bytes) -> None:
    asked = tuple(OpenDisk(disk.name, disk.source.size_bytes) for disk in disks)
    control.send(Open(group, b"", epoch, NO_ID, Mode.RESYNC, Consistency.FUZZY, 0, asked))
    await control.expect(Opened)


async def _has_settled(control: Stream, group: str, disks: Sequence[DiskToSend], epoch: bytes) -> bool:
    """Whether the stream lasted until the target's images held the epoch, which is sealed in any case."""
    try:
        await _settle(control, group, disks, epoch)
    except ReplicatorError:
        return False
    return True


def consistency_of(disks: Iterable[DiskToSend | SendingDisk]) -> Consistency:
    """What a recovery point of these disks is worth, by the moments that they show."""
    moments = {disk.snapshot_ns for disk in disks}
    if not moments or 0 in moments:
        return Consistency.FUZZY
    return Consistency.CRASH if len(moments) == 1 else Consistency.PER_DISK


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
        raise defective(reason)
