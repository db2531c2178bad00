"""A managed disk as a disk of a cycle: our incremental snapshots, known by their tags, and what changed
between two.

Not here: which of them are needed (``cycle.py``), how Azure is asked for them (``compute.py``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from protocol.messages import Interval
from replicator.azure.access import Export
from replicator.azure.arm import ResourceRef
from replicator.azure.blob import PageBlob
from replicator.azure.blob_disk import believed
from replicator.azure.compute import Disks, DiskSnapshot, ManagedDisk
from replicator.azure.cycle import Taken
from replicator.azure.exports import Renewed, Tag
from replicator.azure.limits import diffable
from replicator.clock import Clock
from replicator.errors import ReplicatorError
from replicator.sources.page_blob import PageBlobSource
from replicator.workers import Workers


class ManagedDiskInAzure:
    """See ``cycle.DiskInAzure``, whose methods these are; each raises as ``compute.Disks``.

    Args:
        name: at the target.
        disks: those of its subscription.
        ref: of the disk.
        whose: group, and the target's installation: whose its snapshots are.
        trust_diff: believe Azure's word on what changed, where it gives one.
        workers, clock: as everywhere.
        tell: takes a line for people.
    """

    def __init__(
        self,
        name: str,
        disks: Disks,
        ref: ResourceRef,
        whose: tuple[str, str],
        trust_diff: bool,
        workers: Workers,
        clock: Clock,
        tell: Callable[[str], None],
    ) -> None:
        self.name = name
        self._disks = disks
        self._ref = ref
        self._group, self._installation = whose
        self._trust_diff = trust_diff
        self._workers = workers
        self._clock = clock
        self._tell = tell
        self._disk: ManagedDisk | None = None
        self._known: dict[str, DiskSnapshot] = {}
        self._read: dict[str, PageBlob] = {}

    async def ours(self) -> list[Taken]:
        """Those of this very disk: of one that was deleted and made anew under its name, they are others'."""
        self._disk = await self._disks.disk(self._ref)
        found = await self._disks.ours(self._disk, self._group, self._installation)
        return [self._taken(snapshot) for snapshot in found]

    async def take(self, epoch: bytes) -> Taken:
        """See ``cycle.DiskInAzure``."""
        disk = self._disk or await self._disks.disk(self._ref)
        return self._taken(await self._disks.take(disk, Tag(self._group, epoch, self._installation)))

    async def delete(self, taken: Taken) -> None:
        """See ``cycle.DiskInAzure``."""
        await self._disks.delete(self._known[taken.id])

    async def open(self, taken: Taken, opened: AsyncExitStack) -> PageBlobSource:
        """See ``cycle.DiskInAzure``. Access to the snapshot ends with ``opened``."""
        blob, _ = await opened.enter_async_context(self._exported(self._known[taken.id]))
        source = await PageBlobSource.open(blob, self._workers, taken.id)
        opened.push_async_callback(source.close)
        self._read[taken.id] = blob
        return source

    async def may_differ(self, since: Taken, source: PageBlobSource) -> Iterable[Interval] | None:
        """See ``cycle.DiskInAzure``. The diff is asked of the newer export, with the URL of the older."""
        before, now = self._known[since.id], self._known[source.identity]
        if not self._trust_diff or not diffable(before.size_bytes, now.size_bytes):
            return None
        async with self._exported(before) as (_, renewed):
            diff = await self._read[source.identity].changes(await renewed.url())
        return believed(diff, source, self._ref.name, self._tell)

    def _taken(self, snapshot: DiskSnapshot) -> Taken:
        self._known[snapshot.ref.name] = snapshot
        return Taken(snapshot.tag.epoch, snapshot.ref.name, snapshot.taken_ns)

    @asynccontextmanager
    async def _exported(self, snapshot: DiskSnapshot) -> AsyncIterator[tuple[PageBlob, Renewed]]:
        """The blob of a snapshot, open for reading as long as the block lasts."""
        renewed = Renewed(
            partial(self._disks.grant, snapshot), partial(self._disks.revoke, snapshot), self._clock
        )
        export = Export(renewed.url)
        try:
            yield PageBlob(export, f"snapshot {snapshot.ref.name} of disk {self._ref.name}"), renewed
        finally:
            await export.close()
            try:
                await renewed.close()
            except ReplicatorError as error:  # what was read is right all the same
                self._tell(f"{error.message} ({error.code}); the access ends by itself within a day")
