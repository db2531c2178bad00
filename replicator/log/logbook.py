"""The record of a group's sealed epochs together with their logs: what of it is there, fits, and is needed.

Not here: the images (``holding.py``) and how segments are applied to them (``apply.py``). All of it blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

from protocol.messages import NO_ID, Consistency, Mode
from replicator.errors import StateError
from replicator.failpoints import reach
from replicator.images.directory import Lineage
from replicator.log import log as logs
from replicator.log import points
from replicator.log.log import Kind, Log
from replicator.log.place import GroupDirectory
from replicator.log.points import GroupRecord, Retention, SealedDisk, SealedEpoch
from replicator.private_directory import unusable

_log = logging.getLogger(__name__)


class Logbook:
    """Record and logs of one group, from ``open`` to ``close``.

    Attributes:
        record: the sealed epochs that are kept.
        pending: redo logs of epochs that are sealed and not applied, by epoch number, oldest first.
        redo: log of the epoch under way, if it has one.
    """

    def __init__(self, place: GroupDirectory, seed: int) -> None:
        self.pending: dict[int, Log] = {}
        self.redo: Log | None = None
        self._place = place
        self._seed = seed
        self._files = place.files
        self._undo: tuple[int, Log] | None = None
        self.record = place.load()
        try:
            self._dir_fd = place.open()
        except OSError as error:
            raise unusable(place.directory.path, "opened", error) from error

    @classmethod
    def open(cls, place: GroupDirectory, sealed: bytes, under_way: bytes, seed: int) -> Self:
        """What of a group's record and logs fits the epochs that the catalogue names; the rest is dropped.

        Raises:
            StateError: ``group.damaged``, ``state.unusable``.
        """
        book = cls(place, seed)
        try:
            epochs = book.record.epochs
            if epochs and epochs[-1].id == under_way:  # the catalogue never heard of the seal
                book._unseal(epochs[-1])
            if book.record.sealed == sealed:
                book._open_pending()
            else:
                book.forget()
        except BaseException:
            book.close()
            raise
        return book

    @property
    def lineage(self) -> Lineage:
        """What the logs say of the images."""
        pending = [epoch for epoch in self.record.epochs if epoch.number in self.pending]
        base = pending[0].parent if pending else self.record.sealed
        applying = {epoch.id for epoch in pending}
        if self.record.early:
            applying.add(self.record.under_way)
        newest = self.record.find(base)
        if newest is not None and (Kind.UNDO, newest.number) in logs.found(self._files, self._dir_fd):
            applying.add(base)  # a crash may have come between its last segment and the end of it
        return Lineage(base, frozenset(applying), self.record.history)

    @property
    def size_bytes(self) -> int:
        """What the redo logs take on the retention volume."""
        return sum(log.size_bytes for log in self._redo_logs())

    def oldest_pending(self) -> tuple[SealedEpoch, Log] | None:
        """The sealed epoch that is to be applied next, and its log."""
        number = min(self.pending, default=0)
        epoch = next((known for known in self.record.epochs if known.number == number), None)
        return None if epoch is None else (epoch, self.pending[number])

    def early_segment(self) -> int | None:
        """The oldest segment of the epoch under way, if it can be applied before the seal.

        Never its last one: from that the log goes on counting, and undo goes by the number of a segment.
        """
        segments = self.redo.segments() if self.redo is not None else ()
        return segments[0] if len(segments) > 1 else None

    def begin(self, number: int) -> Log:
        """Open or make the redo log of the epoch under way; logs that lead nowhere are removed."""
        known = {number, *(epoch.number for epoch in self.record.epochs)}
        self._remove(lambda _, found: found not in known)
        try:
            self.redo = Log.open(self._files, self._dir_fd, Kind.REDO, number, self._seed)
        except StateError as error:
            _log.error("group %s: %s; what was acknowledged of it is sent again", self._place.group, error)
            logs.remove(self._files, self._dir_fd, Kind.REDO, number)
        if self.redo is None:
            self.redo = Log.create(self._files, self._dir_fd, Kind.REDO, number, self._seed)
        return self.redo

    def seal(
        self,
        epoch: bytes,
        number: int,
        mode: Mode,
        consistency: Consistency,
        disks: Sequence[SealedDisk],
        now_ns: int,
    ) -> None:
        """One record makes the epoch the newest; a FULL one begins a new history. Durable on return."""
        if self.redo is not None:
            self.redo.finish()
        begun = replace(self.record, under_way=epoch, number=number, mode=mode)
        record = points.seal(begun, now_ns, consistency, disks)
        reach("seal.before_record")
        self._place.store(record)
        reach("seal.recorded")
        self.record = record
        if self.redo is not None:
            self.pending[number] = self.redo
            self.redo = None

    def note_early(self, epoch: bytes, number: int) -> None:
        """From now on the images hold a part of an epoch that is not sealed. Durable on return."""
        if not self.record.early:
            self._store(replace(self.record, under_way=epoch, number=number, early=True))

    def note_undone(self) -> None:
        """They no longer do: what was applied of it was undone. Durable on return."""
        self._store(replace(self.record, under_way=NO_ID, early=False))

    def undo_of(self, number: int) -> Log:
        """The undo log of an epoch that is being applied; the one before is let go of."""
        if self._undo is None or self._undo[0] != number:
            self.close_undo()
            place = (self._files, self._dir_fd, Kind.UNDO, number, self._seed)
            self._undo = (number, Log.open(*place) or Log.create(*place))
        return self._undo[1]

    def close_undo(self) -> None:
        """Let go of the undo log: after an error of it, it must be opened anew."""
        if self._undo is not None:
            self._undo[1].close()
            self._undo = None

    def applied(self, number: int) -> None:
        """The last segment of a sealed epoch is applied, and the images are settled."""
        self.undo_of(number).finish()
        self.close_undo()
        self.pending.pop(number).close()
        logs.remove(self._files, self._dir_fd, Kind.REDO, number)

    def forget(self) -> None:
        """The images are not what logs and points say: none of it is to be believed."""
        for log in self.pending.values():
            log.close()
        self.pending.clear()
        self.close_undo()
        if self.record.epochs:
            _log.warning("group %s: recovery points and log do not fit the disks: dropped", self._place.group)
        self._store(GroupRecord(self._place.group))
        self._remove(lambda *_: True)

    def prune(self, now_ns: int, retention: Retention) -> None:
        """Let go of recovery points past their time, and of the history that leads nowhere."""
        gone = set(points.expired(self.record, now_ns, retention)) - self.pending.keys()
        if gone:
            self._store(points.forget(self.record, gone))
        needed = points.undo_needed(self.record) | self.pending.keys()
        self._remove(lambda kind, number: kind is Kind.UNDO and number not in needed)

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        for log in self._redo_logs():
            log.close()
        self.close_undo()
        if self._dir_fd >= 0:
            self._files.close(self._dir_fd)
            self._dir_fd = -1

    def _unseal(self, newest: SealedEpoch) -> None:
        """Nobody was told that the newest epoch is sealed: it is under way again. Durable on return."""
        early = (Kind.UNDO, newest.number) in logs.found(self._files, self._dir_fd)
        before = self.record.epochs[:-1]
        self._store(
            replace(self.record, epochs=before, under_way=newest.id, number=newest.number, early=early)
        )

    def _open_pending(self) -> None:
        """The logs of sealed epochs; if one does not hold, none of the record does."""
        redo = {number for kind, number in logs.found(self._files, self._dir_fd) if kind is Kind.REDO}
        numbers = [known.number for known in self.record.epochs]
        try:
            for number in sorted(redo.intersection(numbers)):
                log = Log.open(self._files, self._dir_fd, Kind.REDO, number, self._seed)
                if log is not None:
                    self.pending[number] = log
        except StateError as error:
            _log.error("group %s: %s; both sides compare", self._place.group, error)
            self.forget()
        if list(self.pending) != numbers[len(numbers) - len(self.pending) :]:
            _log.error("group %s: a sealed epoch's log is missing; both sides compare", self._place.group)
            self.forget()

    def _remove(self, is_needless: Callable[[Kind, int], bool]) -> None:
        """Remove the logs, by kind and epoch number, that are."""
        for kind, number in logs.found(self._files, self._dir_fd):
            if is_needless(kind, number):
                logs.remove(self._files, self._dir_fd, kind, number)

    def _store(self, record: GroupRecord) -> None:
        self._place.store(record)
        self.record = record

    def _redo_logs(self) -> list[Log]:
        return [*self.pending.values(), *([self.redo] if self.redo is not None else [])]
