"""A page blob as a disk of a cycle: our snapshots, known by their metadata, and what changed between two.

Not here: which of them are needed (``cycle.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Final
from urllib.parse import quote

from protocol.messages import Interval
from replicator.azure.access import Account
from replicator.azure.blob import BlobAddress, Diff, InAccount, PageBlob, Snapshot, snapshots
from replicator.azure.cycle import Taken
from replicator.azure.limits import PREMIUM_BLOB, has_room, wait_s
from replicator.clock import Clock
from replicator.errors import SourceError
from replicator.sources.page_blob import PageBlobSource
from replicator.workers import Workers

# Metadata names are those of C# identifiers: no hyphens.
GROUP: Final = "replicator_group"
EPOCH: Final = "replicator_epoch"
INSTALLATION: Final = "replicator_installation"


class BlobDisk:
    """See ``cycle.DiskInAzure``, whose methods these are; each raises as ``PageBlob``.

    Args:
        name: at the target.
        account: in which it lies; stays the caller's to close.
        address: of the blob.
        group, installation: whose its snapshots are: of this group, for this target's authority.
        trust_diff: believe the service's word on what changed, where it gives one.
        workers, clock: as everywhere.
        tell: takes a line for people.
    """

    def __init__(
        self,
        name: str,
        account: Account,
        address: BlobAddress,
        whose: tuple[str, str],
        trust_diff: bool,
        workers: Workers,
        clock: Clock,
        tell: Callable[[str], None],
    ) -> None:
        self.name = name
        self._account = account
        self._address = address
        self._tags = dict(zip((GROUP, INSTALLATION), (quote(text, safe="") for text in whose), strict=True))
        self._trust_diff = trust_diff
        self._blob = PageBlob(InAccount(account, address), str(address))
        self._workers = workers
        self._clock = clock
        self._tell = tell

    async def ours(self) -> list[Taken]:
        """Only what carries our tag, whole; whatever else is there is somebody else's."""
        found = []
        for snapshot in await snapshots(self._account, self._address):
            epoch = snapshot.metadata.get(EPOCH, "")
            if self._tags.items() <= snapshot.metadata.items() and _is_id(epoch):
                found.append(Taken(bytes.fromhex(epoch), snapshot.id, snapshot.moment_ns))
        return found

    async def take(self, epoch: bytes) -> Taken:
        """Waits where the blob is a premium one, of which Azure takes a snapshot every ten minutes.

        Raises:
            SourceError: ``azure.snapshot_limit``.
        """
        if (await self._blob.properties()).premium:
            await self._keep_to_limits(await snapshots(self._account, self._address))
        taken = await self._blob.take_snapshot(self._tags | {EPOCH: epoch.hex()})
        return Taken(epoch, taken.id, taken.moment_ns)

    async def delete(self, taken: Taken) -> None:
        """See ``cycle.DiskInAzure``."""
        await self._blob.at(taken.id).delete()

    async def open(self, taken: Taken, opened: AsyncExitStack) -> PageBlobSource:
        """See ``cycle.DiskInAzure``."""
        source = await PageBlobSource.open(self._blob.at(taken.id), self._workers)
        opened.push_async_callback(source.close)
        return source

    async def may_differ(self, since: Taken, source: PageBlobSource) -> Iterable[Interval] | None:
        """See ``cycle.DiskInAzure``."""
        if not self._trust_diff:
            return None
        diff = await self._blob.at(source.identity).changes(since.id)
        return believed(diff, source, str(self._address), self._tell)

    async def _keep_to_limits(self, there: Sequence[Snapshot]) -> None:
        what = f"the snapshot of {self._address}"
        if not has_room(PREMIUM_BLOB, len(there)):
            raise SourceError(
                "azure.snapshot_limit",
                f"{what} is not possible: there are {len(there)}, and Azure keeps {PREMIUM_BLOB.held}",
                cause="others take snapshots of this blob, too, and do not delete them",
                fix="delete some that nobody needs; `replicator` deletes its own",
            )
        seconds = wait_s(PREMIUM_BLOB, [one.moment_ns for one in there], self._clock.now_ns())
        if seconds > 0:
            self._tell(f"{what} waits {seconds:.0f} s: of a premium blob Azure takes one in 600 s")
            await asyncio.sleep(seconds)


def believed(
    diff: Diff | None, source: PageBlobSource, name: str, tell: Callable[[str], None]
) -> Iterable[Interval] | None:
    """What the service says has changed; None if it does not say, or cannot be believed.

    A diff that names all pages of the new snapshot and none as cleared may be one that was never made: to
    believe it would leave at the target what was cleared.
    """
    if diff is not None and (diff.cleared or diff.written != source.listed):
        return (*diff.written, *diff.cleared)
    why = "was refused" if diff is None else "is the whole list"
    tell(f"{name}: the list of what changed {why}, so all that is written is read and compared")
    return None


def _is_id(text: str) -> bool:
    return len(text) == 32 and all(letter in "0123456789abcdef" for letter in text)
