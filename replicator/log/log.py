"""A log: the segments of one kind and epoch in one directory, written in group commits, read by segment.

Not here: what the records mean and what is done with them (``apply.py``, ``history.py``, ``views.py``); how
a log is brought into order after a crash (``recovery.py``).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Final

from xxhash import xxh3_64_intdigest

from protocol.constants import MIB
from protocol.header import FrameType
from replicator.errors import StateError, TargetError
from replicator.files import Files
from replicator.images.opening import failure
from replicator.log.directory import found, remove, segment_numbers, unlink_segments
from replicator.log.gather import Frame, Scratch, is_aligned
from replicator.log.reading import Readers, body_of, run_of
from replicator.log.records import (
    BEFORE_THE_LOG,
    LOG_ID_BYTES,
    Entry,
    Identity,
    Kind,
    Position,
    entries,
    log_name,
    record_bytes,
    segment_name,
)
from replicator.log.recovery import (
    Closed,
    close_again,
    damaged,
    notes_of,
    open_segment_file,
    read_index,
    recover,
)
from replicator.log.segment import OpenSegment, SegmentFile, first_room_bytes

__all__ = ["SEGMENT_BYTES", "Entry", "Kind", "Log", "found", "record_bytes", "remove"]

SEGMENT_BYTES: Final = 64 * MIB


class Log:
    """One log, open. All methods block.

    ``write``, ``roll``, ``finish`` and ``drop`` wait for one another; the others may be called from any
    thread at any time. The directory stays the caller's, and open as long as the log is.

    After an error of a method that writes, every later one raises: close the log and open it anew.

    Attributes:
        kind, epoch: which log it is.
        finished: whether it is whole, durably: nothing more is written.
    """

    def __init__(self, files: Files, dir_fd: int, identity: Identity, seed: int, segment_bytes: int) -> None:
        self.kind = identity.kind
        self.epoch = identity.epoch
        self.finished = False
        self._files = files
        self._dir_fd = dir_fd
        self._id = identity.log
        self._seed = seed
        self._segment_bytes = segment_bytes
        self._closed: dict[int, Closed] = {}  # replaced, never changed: other threads look at it
        self._open: OpenSegment | None = None
        self._end = BEFORE_THE_LOG
        self._scratch = Scratch()
        self._changing = Lock()
        self._failed = False
        self._readers = Readers(self._open_file)

    @classmethod
    def create(
        cls,
        files: Files,
        dir_fd: int,
        kind: Kind,
        epoch: int,
        seed: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> Log:
        """A new log, durable in its directory.

        Raises:
            StateError: ``log.exists``. SpaceError: ``target.full``.
            TargetError: ``log.open_failed``, ``log.write_failed``.
        """
        try:
            if segment_numbers(files, dir_fd, kind, epoch):
                raise StateError(
                    "log.exists",
                    f"{segment_name(kind, epoch, 1)} or a later segment is there already",
                    cause="a defect: the log was to be opened or removed first",
                    fix="report it with the log of the master target",
                )
        except OSError as error:
            raise failure(error, "log.open_failed", f"cannot make {log_name(kind, epoch)}") from error
        identity = Identity(kind, secrets.token_bytes(LOG_ID_BYTES), epoch, 0)
        log = cls(files, dir_fd, identity, seed, segment_bytes)
        with log._change():
            log._begin_segment([])
        return log

    @classmethod
    def open(
        cls,
        files: Files,
        dir_fd: int,
        kind: Kind,
        epoch: int,
        seed: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> Log | None:
        """The log that is there, with everything in it that a ``write`` ever returned from; None if there is
        none. What it holds is durable. All its segments are closed; the next ``write`` begins another.

        Raises:
            StateError: ``log.damaged``: data that was durable is lost; nothing was changed.
            SpaceError: ``target.full``. TargetError: ``log.open_failed``.
        """
        try:
            recovered = recover(files, dir_fd, kind, epoch, seed)
        except OSError as error:
            raise failure(error, "log.open_failed", f"cannot open {log_name(kind, epoch)}") from error
        if recovered is None:
            return None
        log = cls(files, dir_fd, Identity(kind, recovered.log, epoch, 0), seed, segment_bytes)
        log._closed = recovered.segments
        newest = max(recovered.segments)
        log._end = Position(newest, recovered.segments[newest].end)
        log.finished = recovered.segments[newest].last
        return log

    # ------------------------------------------------------------------ writing

    def write(self, frames: Sequence[Frame], note: int = 0) -> None:
        """Append frames of type DATA as one batch; all are durable on return.

        After an error, none or all of them may be found when the log is opened anew. The body of a frame is
        its extent table and, right behind it, its payload. A payload that begins on a page boundary of
        writable memory (``BufferPool.take(..., lead=table_len)``) is written from there, others are copied.
        ``frames`` may be empty: then the note alone is written.

        Args:
            frames: headers and bodies; that a body matches its hash has been checked.
            note: kept with the batch, see ``notes``; 0 for none.

        Raises:
            SpaceError: ``target.full``. TargetError: ``log.write_failed``. ValueError: no DATA frame, a body
            of the wrong length, or the log is finished.
        """
        for header, body in frames:
            if header.type is not FrameType.DATA or len(body) != header.body_len:
                raise ValueError(f"not a whole DATA frame: {header} with a body of {len(body)} bytes")
        self._refuse_if_finished()
        with self._change():
            segment = self._open or self._begin_segment(frames)
            if not segment.fits(frames):
                if segment.marks:
                    self._close_segment(last=False)
                    segment = self._begin_segment(frames)
                else:
                    segment.make_room(first_room_bytes(frames, self._segment_bytes))
            segment.append(frames, self._end, note, self._scratch)
            self._end = Position(segment.identity.segment, segment.end)

    def roll(self) -> None:
        """Close the segment that is being written, if anything is in it: it can be dropped then.

        Raises:
            SpaceError: ``target.full``. TargetError: ``log.write_failed``. ValueError: the log is finished.
        """
        self._refuse_if_finished()
        with self._change():
            if self._open is not None and self._open.marks:
                self._close_segment(last=False)

    def finish(self) -> None:
        """Close the log for good: nothing more is written to it. Idempotent.

        Raises:
            SpaceError: ``target.full``. StateError: ``log.damaged``. TargetError: ``log.write_failed``.
        """
        if self.finished:
            return
        with self._change():
            if self._open is not None:
                self._close_segment(last=True)
            else:
                number = self._end.segment
                named, closed = self._named(number), self._closed[number]
                closed = close_again(self._files, self._dir_fd, named, closed, self._seed, last=True)
                self._closed = {**self._closed, number: closed}
            self.finished = True

    def drop(self, segment: int) -> None:
        """Remove the oldest segment, which is closed; durable on return. Nothing happens if it is gone.

        The numbers of segments are not used twice while an epoch lasts: the only segment of a log that is
        not finished makes way for a new, empty one. Undo logs are removed whole, by ``remove``.

        Raises:
            ValueError: it is not closed, not the oldest, or of an undo log.
            SpaceError: ``target.full``. TargetError: ``log.write_failed``.
        """
        there = self.segments()
        if segment not in there:
            return
        if segment != there[0] or not self.closed(segment) or self.kind is Kind.UNDO:
            raise ValueError(f"segment {segment} is not the oldest, closed segment of a redo log")
        with self._change():
            if not self.finished and self._open is None and len(self._closed) == 1:
                self._begin_segment([])
            # First, so that whoever reads meanwhile and finds no file knows why.
            self._closed = {number: each for number, each in self._closed.items() if number != segment}
            unlink_segments(self._files, self._dir_fd, [segment_name(self.kind, self.epoch, segment)])
        self._readers.forget(segment)

    def close(self) -> None:
        """Let go of the files, without making anything durable. Idempotent. No call may be under way."""
        self._failed = True
        self._readers.close()
        if self._open is not None:
            self._open.close()

    # ------------------------------------------------------------------ reading

    def segments(self) -> tuple[int, ...]:
        """Numbers of the segments that are there, ascending."""
        being_written = self._open  # first: when it is closed, it is found among the closed ones
        numbers = set(self._closed)
        if being_written is not None:
            numbers.add(being_written.identity.segment)
        return tuple(sorted(numbers))

    def closed(self, segment: int) -> bool:
        """Whether a segment is there and will not change any more."""
        return segment in self._closed

    def notes(self) -> frozenset[int]:
        """Notes of all durable batches of all segments that are there, but 0."""
        being_written = self._open
        of_closed = (each.notes for each in self._closed.values())
        return frozenset().union(*of_closed, notes_of(being_written.marks if being_written else ()))

    @property
    def size_bytes(self) -> int:
        """Bytes on disk; of the segment that is being written, what is set aside for it."""
        being_written = self._open
        room_bytes = being_written.room_bytes if being_written else 0
        return room_bytes + sum(each.size_bytes for each in self._closed.values())

    def entries(self, segment: int) -> Sequence[Entry]:
        """The records of a segment that are durable, in the order of the log.

        Raises:
            LookupError: no such segment (any more). StateError: ``log.damaged``.
            TargetError: ``log.read_failed``.
        """
        being_written = self._open
        if being_written is not None and being_written.identity.segment == segment:
            return entries(bytes(being_written.rows))
        with self._reading(segment) as file:
            closed = self._closed.get(segment)
            if closed is None:
                raise LookupError(f"{file.name} is gone")
            return entries(read_index(file, self._named(segment), closed, self._seed).rows)

    def read(self, segment: int, entry: Entry, into: memoryview) -> memoryview:
        """The body of a record, table and payload in one piece, checked against its hash.

        ``into`` is page-aligned memory (a ``Buffer``'s view) of at least ``record_bytes(entry.header)``. The
        body lies in it, its payload on a page boundary. The page cache is left alone where that can be.

        Raises:
            LookupError: no such segment (any more). StateError: ``log.damaged``.
            TargetError: ``log.read_failed``. ValueError: ``into`` is too small or not page-aligned.
        """
        return self.read_run(segment, [entry], into)[0]

    def read_run(self, segment: int, entries: Sequence[Entry], into: memoryview) -> list[memoryview]:
        """The bodies of the first of ``entries``, at least one, with one read; see ``read``.

        As many as stand one behind the other in the segment and fit into ``into``: given all entries in the
        order of the log, this is the fast way through a segment, above all with many small records.
        """
        start = entries[0].offset
        end, count = run_of(entries, len(into))
        if not count or not is_aligned(into):
            raise ValueError(f"{len(into)} bytes are too few for {entries[0]}, or not page-aligned")
        with self._reading(segment) as file:
            view = file.read(into[: end - start], start)
        if len(view) < end - start:
            raise damaged(f"{file.name} ends inside the record at byte {start}")
        bodies = []
        for entry in entries[:count]:
            body = body_of(view[entry.offset - start :], entry.header)
            if xxh3_64_intdigest(body, self._seed) != entry.header.body_hash:
                raise damaged(f"the record at byte {entry.offset} of {file.name} does not match its hash")
            bodies.append(body)
        return bodies

    # ------------------------------------------------------------------ parts

    @contextmanager
    def _change(self) -> Iterator[None]:
        """One change at a time. Whatever stops it in the middle, it was the last."""
        with self._changing:
            what = f"cannot write {log_name(self.kind, self.epoch)}"
            if self._failed:
                raise TargetError(
                    "log.write_failed",
                    f"{what} any more",
                    cause="an earlier write failed, or the log was closed",
                    fix="none is needed here: it is opened anew, and what was not acknowledged is sent again",
                )
            self._failed = True
            try:
                yield
            except OSError as error:
                raise failure(error, "log.write_failed", what) from error
            self._failed = False

    def _refuse_if_finished(self) -> None:
        if self.finished:
            raise ValueError(f"{log_name(self.kind, self.epoch)} is finished")

    def _named(self, segment: int) -> Identity:
        return Identity(self.kind, self._id, self.epoch, segment)

    def _begin_segment(self, frames: Sequence[Frame]) -> OpenSegment:
        self._open = OpenSegment.create(
            self._files,
            self._dir_fd,
            self._named(self._end.segment + 1),
            self._end.offset,
            first_room_bytes(frames, self._segment_bytes),
            self._seed,
        )
        return self._open

    def _close_segment(self, *, last: bool) -> None:
        segment = self._open
        assert segment is not None  # noqa: S101 - for the type checker
        number = segment.identity.segment
        size_bytes = segment.finish(last=last)
        closed = Closed(segment.end, size_bytes, notes_of(segment.marks), last)
        self._closed = {**self._closed, number: closed}
        self._end = Position(number, segment.end)
        self._open = None

    def _open_file(self, segment: int) -> SegmentFile:
        if segment not in self.segments():
            raise LookupError(f"segment {segment} of {log_name(self.kind, self.epoch)} is gone")
        return open_segment_file(self._files, self._dir_fd, self._named(segment), os.O_RDONLY)

    @contextmanager
    def _reading(self, segment: int) -> Iterator[SegmentFile]:
        try:
            with self._readers.using(segment) as file:
                yield file
        except OSError as error:
            if segment not in self.segments():  # dropped meanwhile
                raise LookupError(f"{segment_name(self.kind, self.epoch, segment)} is gone") from error
            what = f"cannot read {segment_name(self.kind, self.epoch, segment)}"
            raise failure(error, "log.read_failed", what) from error
