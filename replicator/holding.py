"""What a master target holds of one group: its images, the epoch under way, and the logs beside them.

A first epoch is written straight into new images. Every later one goes to a redo log, changes nothing
before it is sealed, and is applied afterwards, segment by segment, with what it replaces kept in an undo log.
So after any crash the images and the logs together are exactly a sealed epoch. An epoch that outgrows the log
is applied early, its undo forced on: giving it up means undoing it. All of it blocks. One caller at a time,
but for ``store``, ``commit`` and ``apply_next``, which may run side by side. Who runs what, and when, is for
``groups.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import Lock

from protocol.messages import NO_ID, Consistency, Mode, Open, OpenDisk
from protocol.payload import Extent
from replicator import refusals
from replicator.errors import SpaceError
from replicator.extents import Coverage
from replicator.images.directory import ImageDirectory, OpenedDisk, OpenedGroup
from replicator.images.flat_vmdk import FlatVmdk
from replicator.log.apply import apply_segment
from replicator.log.gather import Frame
from replicator.log.history import roll_back
from replicator.log.log import Log
from replicator.log.logbook import Logbook
from replicator.log.place import GroupDirectory
from replicator.log.points import Retention, SealedDisk
from replicator.log.workspace import Workspace

_log = logging.getLogger(__name__)


class Holding:
    """A group in hand, from ``open`` or ``open_again`` to ``close``.

    Attributes:
        group: its images and epochs.
        disks: of the epoch, with what of it was durable as the group was opened.
    """

    def __init__(
        self, images: ImageDirectory, book: Logbook, group: OpenedGroup, wanted: Open | None, seed: int
    ) -> None:
        self.group = group
        self.disks = group.disks
        self._images = images
        self._book = book
        self._wanted = wanted
        self._seed = seed
        self._unsettled = NO_ID  # the epoch that the sidecars call half-written
        self._applying = Lock()

    @classmethod
    def open(
        cls, place: GroupDirectory, images: ImageDirectory, owner: str, wanted: Open, seed: int, now_ns: int
    ) -> Holding:
        """Take a group in hand for an epoch, and decide what the epoch has to say.

        Raises:
            PeerError, TargetError, SpaceError, StateError: as the images and logs say. Nothing stays open.
        """
        known = images.epochs_of(wanted.group)
        with ExitStack() as opening:
            book = Logbook.open(place, known.sealed, known.under_way, seed)
            opening.callback(book.close)
            if wanted.epoch == NO_ID or wanted.epoch in book.record.history[:-1]:
                raise refusals.unusable_epoch(wanted.group, wanted.epoch)
            group = images.open_group(owner, wanted, book.lineage)
            opening.callback(group.close)
            holding = cls(images, book, group, wanted, seed)
            if group.journal is None:
                holding._begin_logged(now_ns)
            elif book.record.epochs:
                book.forget()
            opening.pop_all()
        return holding

    @classmethod
    def open_again(cls, place: GroupDirectory, images: ImageDirectory, seed: int) -> Holding | None:
        """Take a group in hand whose sealed epochs are still to be applied, or were just before they could
        be told to be; None: nothing to do.
        """
        known = images.epochs_of(place.group)
        with ExitStack() as opening:
            book = Logbook.open(place, known.sealed, known.under_way, seed)
            opening.callback(book.close)
            newest = book.record.epochs[-1:]
            disks = [OpenDisk(disk.name, disk.size) for epoch in newest for disk in epoch.disks]
            if not book.pending and (book.record.early or images.settled(disk.name for disk in disks)):
                return None
            group = images.open_again(place.group, disks, book.lineage)
            if group is None:
                return None
            opening.callback(group.close)
            if not book.pending:
                images.settle(group, known.sealed)
            opening.pop_all()
        return cls(images, book, group, None, seed)

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        self.group.close()
        self._book.close()

    # -- an epoch comes in -----

    def store(self, disk: OpenedDisk, extents: Sequence[Extent], payload: memoryview) -> None:
        """A frame was verified: a direct epoch's is written now, a logged one's with its commit."""
        if self.group.journal is not None:
            disk.image.write(extents, payload)

    def commit(self, frames: Sequence[Frame]) -> None:
        """Make frames durable that were stored: one group commit.

        Raises:
            TargetError, SpaceError, StateError: they may or may not be; the group must be opened anew.
        """
        if self._book.redo is not None:
            self._book.redo.write(frames)
        elif self.group.journal is not None:
            numbers = {header.disk for header, _ in frames}
            for disk in self.group.disks:
                if disk.number in numbers:
                    disk.image.sync()
            self.group.journal.append(
                (header.disk, header.cover_start, header.cover_end) for header, _ in frames
            )

    def seal(self, fuzzy: bool, now_ns: int) -> bytes:
        """The epoch is whole: it becomes the newest. Its recovery point, NO_ID if it is none. Idempotent.

        Raises:
            TargetError, SpaceError, StateError: it is not sealed; the same call may be made again.
        """
        group, wanted = self.group, self._wanted
        if not group.sealed:
            assert wanted is not None  # noqa: S101 - whoever receives an epoch came by open()
            direct = group.journal is not None
            self._book.seal(
                group.epoch,
                group.epochs.number,
                Mode.FULL if direct else group.epochs.mode,
                Consistency.FUZZY if fuzzy else wanted.consistency,
                self._sealed_disks(),
                now_ns,
            )
            self._images.seal(group)
            if group.journal is not None:
                group.journal.close()
            self.group = replace(group, epochs=replace(group.epochs, sealed=group.epoch), sealed=True)
        epoch = self._book.record.find(group.epoch)
        return epoch.id if epoch is not None and epoch.is_point else NO_ID

    # -- what is sealed is applied -----

    @property
    def pending(self) -> bool:
        """Whether a sealed epoch is still to be applied."""
        return bool(self._book.pending)

    @property
    def can_give_way(self) -> bool:
        """Whether applying something would give log space back."""
        return self.pending or self._book.early_segment() is not None

    @property
    def log_bytes(self) -> int:
        """What the redo logs take on the retention volume."""
        return self._book.size_bytes

    def apply_next(self, early: bool, workspace: Workspace | None = None) -> bool:
        """Apply one segment, of the oldest sealed epoch or, if ``early``, of the one under way. False if
        there is none. ``workspace``: as for ``apply_segment``.

        Raises:
            TargetError, SpaceError, StateError: nothing is lost; the group must be opened anew, but for
            SpaceError, after which the same call may be made again.
        """
        with self._applying:
            try:
                return self._apply_oldest(workspace) or (early and self._apply_early(workspace))
            except SpaceError:
                self._book.close_undo()
                raise

    def prune(self, now_ns: int, retention: Retention) -> None:
        """Let go of recovery points past their time. Raises ``StateError``, ``TargetError``."""
        with self._applying:
            self._book.prune(now_ns, retention)

    # -- inside -----

    def _begin_logged(self, now_ns: int) -> None:
        """The images are VMDKs that count: see that they are what the logs say, and open the epoch's."""
        group, book = self.group, self._book
        if group.adopted:
            book.forget()
            book.seal(
                group.epochs.sealed,
                group.adopted,
                Mode.RESYNC,
                Consistency.FUZZY,
                self._sealed_disks(),
                now_ns,
            )
        elif book.record.early and (group.sealed or book.record.number != group.epochs.number):
            self._undo_early()  # by number: an id may come again
        being_applied = book.pending or book.record.early
        if not being_applied and not self._images.settled(disk.name for disk in group.disks):
            self._images.settle(group, group.epochs.sealed)  # a crash came between the last write and this
        if not group.sealed:
            redo = book.begin(group.epochs.number)
            durable = {disk.number: Coverage(disk.durable.intervals()) for disk in group.disks}
            for segment in redo.segments():
                for number, start, end in _covers(redo, segment):
                    durable[number].add(start, end)
            self.disks = tuple(replace(disk, durable=durable[disk.number]) for disk in group.disks)

    def _undo_early(self) -> None:
        """Another epoch comes in the place of one that was applied in part: back to before it."""
        _log.warning(
            "group %s: undoing what was applied of an epoch that was given up", self.group.epochs.name
        )
        roll_back(self._book.undo_of(self._book.record.number), self._bases, self._seed)
        self._images.settle(self.group, self.group.epochs.sealed)
        self._book.note_undone()

    @property
    def _bases(self) -> dict[int, FlatVmdk]:
        return {disk.number: disk.image for disk in self.group.disks}

    def _apply_oldest(self, workspace: Workspace | None) -> bool:
        """Apply a segment of the oldest sealed epoch; with the last one, the images are settled."""
        oldest = self._book.oldest_pending()
        if oldest is None:
            return False
        epoch, redo = oldest
        segments = redo.segments()
        if segments:
            self._apply(redo, segments[0], epoch.number, epoch.id, workspace)
        if len(segments) <= 1:
            self._images.settle(self.group, epoch.id)
            self._unsettled = NO_ID
            self._book.applied(epoch.number)
        return True

    def _apply(self, redo: Log, segment: int, number: int, epoch: bytes, workspace: Workspace | None) -> None:
        if self._unsettled != epoch:
            self._images.unsettle(self.group, epoch)
            self._unsettled = epoch
        apply_segment(redo, segment, self._bases, self._book.undo_of(number), self._seed, workspace)

    def _apply_early(self, workspace: Workspace | None) -> bool:
        """Apply a segment of an epoch that is not sealed; noted first: it may be undone, or gone on with."""
        redo, segment = self._book.redo, self._book.early_segment()
        if redo is None or segment is None:
            return False
        number, epoch = self.group.epochs.number, self.group.epoch
        self._book.note_early(epoch, number)
        self._images.note_durable(number, _covers(redo, segment))
        self._apply(redo, segment, number, epoch, workspace)
        return True

    def _sealed_disks(self) -> list[SealedDisk]:
        times = {disk.name: disk.snapshot_time_ns for disk in self._wanted.disks} if self._wanted else {}
        return [
            SealedDisk(disk.number, disk.name, disk.image.size_bytes, times.get(disk.name, 0))
            for disk in self.group.disks
        ]


def _covers(redo: Log, segment: int) -> Iterator[tuple[int, int, int]]:
    """(disk, start, end) of every record of a segment."""
    for entry in redo.entries(segment):
        yield entry.header.disk, entry.header.cover_start, entry.header.cover_end
