"""One cycle of a group of disks in Azure: a snapshot of each, what changed since the one before, and which
snapshots are of no more use.

::

    ours ─▶ plan ─▶ left-overs deleted ─▶ taken, or found again ─▶ opened, compared ─▶ (sent, sealed) ─▶ older
                                                                                                    deleted

A snapshot carries the id of its epoch, so that what is there tells what was done, whatever was forgotten: an
epoch that was interrupted goes on with its own snapshots, and one that is lost costs a comparison. Beside
``azure/blob.py`` and ``azure/compute.py``, since both kinds of disk go through it. Not here: sending
(``sender.py``), how snapshots are asked for (``blob_disk.py`` for page blobs).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from protocol.messages import NO_ID, Interval
from replicator.changes import Changes
from replicator.digest import BLOCK_BYTES
from replicator.errors import cause_of
from replicator.extents import Coverage
from replicator.failpoints import reach
from replicator.sender import DiskToSend
from replicator.sender_state import GroupRecord
from replicator.sources.page_blob import PageBlobSource

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot that is ours.

    Attributes:
        epoch: that it was taken for.
        id: what its kind of disk knows it by; no two of a disk have the same.
        moment_ns: that it shows, in ns since 1970 UTC.
    """

    epoch: bytes
    id: str
    moment_ns: int


class DiskInAzure(Protocol):
    """A disk of which snapshots are taken for one group and one target.

    Attributes:
        name: at the target.
    """

    name: str

    def ours(self) -> Coroutine[Any, Any, list[Taken]]:
        """All snapshots that carry this group's and this target's tag."""
        ...

    def take(self, epoch: bytes) -> Coroutine[Any, Any, Taken]:
        """A new snapshot for an epoch, once the limits of Azure allow it."""
        ...

    def delete(self, taken: Taken) -> Coroutine[Any, Any, None]:
        """Delete a snapshot; one that is gone is fine."""
        ...

    def open(self, taken: Taken, opened: AsyncExitStack) -> Coroutine[Any, Any, PageBlobSource]:
        """What a snapshot holds, whose ``fingerprint`` is ``taken.id``; closed with ``opened``."""
        ...

    def may_differ(
        self, since: Taken, source: PageBlobSource
    ) -> Coroutine[Any, Any, Iterable[Interval] | None]:
        """Where a source may differ from an older snapshot, in any order, all of it; None: nobody knows, so
        everything is to be compared, what was cleared, too.
        """
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What a cycle is to do.

    Attributes:
        epoch: to go on with; NO_ID: a new one.
        current: its snapshots, by disk; empty if they are to be taken.
        since: the epoch to compare with; NO_ID: none.
        base: its snapshots, by disk.
        left_over: by disk, what no cycle can need.
    """

    epoch: bytes
    current: Mapping[str, Taken]
    since: bytes
    base: Mapping[str, Taken]
    left_over: Mapping[str, Sequence[Taken]]


def plan(record: GroupRecord, found: Mapping[str, Sequence[Taken]]) -> Plan:
    """What to do, from what is remembered and what is there. Pure.

    Only an epoch of which every disk has its snapshot is of use. The newest of them that is not sealed goes
    on; the sealed one, or the next older, is what it is compared with. Whether the target is there, it says
    itself when it is asked.

    Args:
        record: may be empty, or old: then what is there decides.
        found: our snapshots, by disk; all disks of the group.
    """
    whole = _whole_epochs(record, found)
    by_age = sorted(whole, key=lambda epoch: max(taken.moment_ns for taken in whole[epoch].values()))
    epoch = NO_ID
    if record.under_way in whole:
        epoch = record.under_way
    elif by_age and by_age[-1] != record.sealed and (record.sealed in whole or record.sealed == NO_ID):
        epoch = by_age[-1]
    current = whole.get(epoch, {})
    # Of every disk: where an answer was lost and a snapshot deleted, an epoch may be of two different times.
    older = [
        one for one in by_age if all(whole[one][disk].moment_ns < current[disk].moment_ns for disk in current)
    ]
    since = record.sealed if record.sealed in older else (older or [NO_ID])[-1]
    # Older than what was sealed, or not whole: the target cannot be there, or nothing comes of it.
    done = older[: older.index(record.sealed)] if record.sealed in older else []
    kept = {taken.id for one in set(by_age) - set(done) for taken in whole[one].values()}
    return Plan(
        epoch,
        current,
        since,
        whole.get(since, {}),
        {disk: [taken for taken in there if taken.id not in kept] for disk, there in found.items()},
    )


def _whole_epochs(
    record: GroupRecord, found: Mapping[str, Sequence[Taken]]
) -> dict[bytes, Mapping[str, Taken]]:
    """The epochs of which each disk has one snapshot, or the one that is remembered."""
    whole: dict[bytes, Mapping[str, Taken]] = {}
    for epoch in {taken.epoch for there in found.values() for taken in there}:
        of_epoch = {disk: [one for one in there if one.epoch == epoch] for disk, there in found.items()}
        if epoch == record.under_way:
            # A lost answer may have left two; what was sent is of the one that is written down.
            of_epoch = {
                disk: [one for one in there if one.id == record.sources.get(disk)]
                for disk, there in of_epoch.items()
            }
        if all(len(there) == 1 for there in of_epoch.values()):
            whole[epoch] = {disk: there[0] for disk, there in of_epoch.items()}
    return whole


@dataclass(slots=True)
class Cycle:
    """A cycle under way: what is to be sent, and what is to be deleted once it is sealed. Made by ``begin``.

    Attributes:
        epoch: its id.
        disks: to be sent. changes: what of them, if there is something to compare with.
        went_on: an earlier run had taken the snapshots: what was written since is not in them.
    """

    epoch: bytes
    disks: list[DiskToSend]
    changes: Changes | None
    went_on: bool
    _parts: Sequence[DiskInAzure] = field(default_factory=tuple)
    _current: Mapping[str, Taken] = field(default_factory=dict)

    async def sealed(self) -> None:
        """The target has sealed the epoch: whatever else is ours is of no more use. May be repeated."""

        async def only(disk: DiskInAzure) -> None:
            for taken in await disk.ours():
                if taken.id != self._current[disk.name].id:
                    await _delete(disk, taken)

        await _each(only(disk) for disk in self._parts)


async def begin(
    disks: Sequence[DiskInAzure], record: GroupRecord, new_epoch: bytes, opened: AsyncExitStack
) -> Cycle:
    """Have the snapshots of a cycle, its sources and its list of changes.

    Args:
        disks: of the group.
        record: what is remembered of it.
        new_epoch: a random id, in case that one is needed.
        opened: closes the sources.

    Raises:
        SourceError, TrustError, LinkError: Azure refused something. It may be tried again.
    """
    found = dict(zip([disk.name for disk in disks], await _each(disk.ours() for disk in disks), strict=True))
    planned = plan(record, found)
    for disk in disks:
        for taken in planned.left_over[disk.name]:
            await _delete(disk, taken)
    epoch, current = planned.epoch, planned.current
    if epoch == NO_ID:
        epoch, current = new_epoch, await _take(disks, new_epoch)
    sources = {disk.name: await disk.open(current[disk.name], opened) for disk in disks}
    changes = None
    if planned.since != NO_ID:
        lists = [disk.may_differ(planned.base[disk.name], sources[disk.name]) for disk in disks]
        changes = Changes(
            planned.since,
            {
                disk.name: tuple(blocks(intervals, sources[disk.name].size_bytes))
                for disk, intervals in zip(disks, await _each(lists), strict=True)
                if intervals is not None
            },
        )
    sending = [DiskToSend(disk.name, sources[disk.name], current[disk.name].moment_ns) for disk in disks]
    return Cycle(epoch, sending, changes, planned.epoch != NO_ID, disks, current)


def blocks(intervals: Iterable[Interval], size_bytes: int) -> Iterator[Interval]:
    """The blocks of a disk that hold something of the intervals, in order, neighbours joined."""
    covered = Coverage()
    for start, end in intervals:
        behind = min(end + -end % BLOCK_BYTES, size_bytes)
        if start < behind:
            covered.add(start - start % BLOCK_BYTES, behind)
    yield from covered.intervals()


async def _take(disks: Sequence[DiskInAzure], epoch: bytes) -> Mapping[str, Taken]:
    """Snapshots of all disks, as close to one another as can be."""
    reach("snapshot.before_take")
    taken = await _each(disk.take(epoch) for disk in disks)
    reach("snapshot.taken")
    return {disk.name: one for disk, one in zip(disks, taken, strict=True)}


async def _delete(disk: DiskInAzure, taken: Taken) -> None:
    reach("snapshot.before_delete")
    await disk.delete(taken)
    reach("snapshot.deleted")


async def _each(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return, side by side; the first that fails ends the others and is told."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as failed:
        raise cause_of(failed) from None
    return [task.result() for task in tasks]
