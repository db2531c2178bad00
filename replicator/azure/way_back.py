"""The way back: disks at home become page blobs in Azure, cycle after cycle, each sealed by snapshots.

The same planner decides what an epoch says (``plan.py``), the same code finds and packs it (``differ.py``,
``framing.py``), the same coverage says what is durable; no wire lies between, since one process reads the
disk and speaks to Azure. What a later run needs is remembered as a sender remembers it (``sender_state.py``).
Not here: the import of a blob as a managed disk (``compute.py``).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from uuid import UUID

from protocol.constants import ID_BYTES
from protocol.messages import NO_ID, Consistency, Interval, Mode
from replicator.azure.access import Account
from replicator.azure.blob import BlobAddress
from replicator.azure.blob_epochs import BlobEpochs, state_of
from replicator.changes import Changes
from replicator.clock import Clock
from replicator.digest_map import DigestMap
from replicator.extents import Coverage
from replicator.framing import Progress, SendingDisk
from replicator.images.coverage_journal import CoverageJournal, journal_name, remove_journal
from replicator.local import LocalDisk, LocalEpoch
from replicator.plan import Action, Decision, TargetState, decide
from replicator.private_directory import PrivateDirectory
from replicator.sender import DiskToSend, Outcome, consistency_of
from replicator.sender_state import GroupMemory, GroupRecord
from replicator.workers import Workers

POINTS_KEPT = 3  # snapshots of each blob: the one that the next epoch may be given up to, and two before it


@dataclass(frozen=True, slots=True)
class DiskToBlob:
    """A disk that goes back to Azure. ``disk``: what is read, and its name; ``blob``: what it becomes."""

    disk: DiskToSend
    blob: BlobAddress


class WayBack:
    """Brings a group of disks to page blobs.

    Args:
        account: the storage account; stays the caller's.
        workers: threads for disk and CPU work.
        state: directory for what is remembered.
        clock: for the footers of new blobs.
        progress: counters to keep.
        tell: takes a line for people.
        points_kept: snapshots of each blob that stay.
    """

    def __init__(
        self,
        account: Account,
        workers: Workers,
        state: PrivateDirectory,
        clock: Clock,
        progress: Progress,
        tell: Callable[[str], None],
        points_kept: int = POINTS_KEPT,
    ) -> None:
        self._account = account
        self._workers = workers
        self._state = state
        self._clock = clock
        self._progress = progress
        self._tell = tell
        self._points_kept = points_kept

    async def send(self, group: str, disks: Sequence[DiskToBlob], changes: Changes | None = None) -> Outcome:
        """Bring the group's epoch to its seal. After a failure the same call goes on with the same epoch.

        Args:
            group, disks: what to send; nobody else writes to the blobs meanwhile.
            changes: what has changed, if somebody knows; used if the blobs are still at that epoch.

        Raises:
            SourceError, TargetError, LinkError, TrustError, StateError: what stood in the way.
        """
        cycle = await self._plan(group, disks, changes)
        self._tell(f"{cycle.decision.mode.name.lower()}: {cycle.decision.why}")
        if cycle.decision.action is Action.UP_TO_DATE:
            changed, worth = False, cycle.blobs[0].points[-1].consistency
            await self._workers.run(cycle.finish, ())
        else:
            changed, worth = await self._run(cycle, changes)
        for blob in cycle.blobs:
            await blob.prune(self._points_kept)
        point = NO_ID if worth is Consistency.FUZZY else cycle.epoch
        return Outcome(cycle.epoch, cycle.decision.mode, point, worth, changed, stale=False, settled=True)

    async def _plan(self, group: str, disks: Sequence[DiskToBlob], changes: Changes | None) -> _Cycle:
        """Which epoch, and what it has to say."""
        pin = sha256("\n".join(str(disk.blob) for disk in disks).encode()).digest()
        memory = GroupMemory(self._state, pin, group)
        journals = self._state.below("way-back").below(sha256(pin + group.encode()).hexdigest()[:32])
        record = await self._workers.run(memory.load)
        blobs = [await self._open(group, disk) for disk in disks]
        target = state_of(blobs)
        sources = {disk.disk.name: await disk.disk.source.fingerprint() for disk in disks}
        epoch = record.under_way
        if epoch == NO_ID or record.sources != sources or "" in sources.values():
            # What an earlier run began showed another state of the sources: it is given up.
            epoch = secrets.token_bytes(ID_BYTES)
            await self._workers.run(memory.begin, epoch, sources)
        parent = record.sealed if record.maps else changes.since if changes is not None else NO_ID
        decision = decide(epoch, parent, target)
        seed = int.from_bytes(pin[:8], "big")
        return _Cycle(disks, blobs, memory, journals, record, target, epoch, decision, seed)

    async def _open(self, group: str, disk: DiskToBlob) -> BlobEpochs:
        identity = UUID(bytes=sha256(str(disk.blob).encode()).digest()[:16])
        return await BlobEpochs.open(
            self._account, disk.blob, group, disk.disk.source.size_bytes, identity, self._clock.now()
        )

    async def _run(self, cycle: _Cycle, changes: Changes | None) -> tuple[bool, Consistency]:
        """Say the epoch and seal it. Whether a source changed meanwhile, and what the point is worth."""
        for blob in cycle.blobs:
            await blob.begin(cycle.epoch, cycle.decision.mode)
        async with AsyncExitStack() as opened:
            journal = await self._workers.run(cycle.open_journal)
            opened.push_async_callback(self._workers.run, journal.close)
            local = _local_disks(cycle, journal)
            await self._workers.run(cycle.recall, local, changes, opened)
            mode, seed = cycle.decision.mode, cycle.seed
            await LocalEpoch(local, mode, self._workers, seed, self._progress, journal.append).run()
            changed = any([await disk.disk.source.changed() for disk in cycle.disks])
            worth = Consistency.FUZZY if changed else consistency_of([disk.disk for disk in cycle.disks])
            for blob in cycle.blobs:
                await blob.seal(cycle.epoch, worth)
            await self._workers.run(cycle.finish, local)
        return changed, worth


@dataclass(frozen=True, slots=True)
class _Cycle:
    """One epoch on its way; its methods block."""

    disks: Sequence[DiskToBlob]
    blobs: Sequence[BlobEpochs]
    memory: GroupMemory
    journals: PrivateDirectory
    record: GroupRecord
    target: TargetState
    epoch: bytes
    decision: Decision
    seed: int

    @property
    def number(self) -> int:
        """Of the journal: journals of two epochs are never mixed up."""
        return int.from_bytes(self.epoch[:8], "big")

    def open_journal(self) -> CoverageJournal:
        """What is durable of the epoch: nothing, unless the blobs say that it is under way."""
        with self.journals.held() as held:
            for name in self.journals.names():
                if name != journal_name(self.number) or self.target.under_way != self.epoch:
                    held.remove(name)
            return CoverageJournal.open(held, self.number)

    def recall(self, local: Sequence[LocalDisk], changes: Changes | None, opened: AsyncExitStack) -> None:
        """Give the disks what is known of the blobs, and the maps that are being made."""
        sizes = {disk.sending.name: disk.image.size_bytes for disk in local}
        maps: Mapping[str, DigestMap] = {}
        listed: Mapping[str, Sequence[Interval]] = {}
        if self.decision.mode is Mode.INCREMENTAL and self.target.clean:  # else the blobs are asked
            if self.target.sealed == self.record.sealed:
                maps = self.memory.open_maps(self.record, sizes, self.seed)
            if changes is not None and changes.since == self.target.sealed:
                listed = changes.disks
        for known in maps.values():
            opened.callback(known.close)
        for disk in local:
            sending, size = disk.sending, disk.image.size_bytes
            sending.known, sending.listed = maps.get(sending.name), listed.get(sending.name)
            sending.building = self.memory.build(self.epoch, sending.number, size, self.seed)
            opened.callback(sending.building.close)

    def finish(self, local: Sequence[LocalDisk]) -> None:
        """The epoch is sealed: its maps become the ones to believe."""
        builders = {
            disk.sending.name: (disk.sending.building, disk.image.size_bytes)
            for disk in local
            if disk.sending.building is not None
        }
        self.memory.publish(self.epoch, builders)
        with self.journals.held() as held:
            remove_journal(held, self.number)


def _local_disks(cycle: _Cycle, journal: CoverageJournal) -> list[LocalDisk]:
    found = []
    for number, (disk, blob) in enumerate(zip(cycle.disks, cycle.blobs, strict=True), 1):
        sending = SendingDisk(disk.disk.name, disk.disk.source, disk.disk.snapshot_ns, number=number)
        sending.durable = journal.disks.get(number, Coverage())
        found.append(LocalDisk(sending, blob.image))
    return found
