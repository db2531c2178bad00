"""What the files of a log still hold after whatever happened, and whether that is all.

Closed segments are believed by their trailer and index. One that was never closed, or whose end is damaged,
is read record by record. Its valid prefix ends at the last batch record that is reached with everything
before it whole. All that was acknowledged lies in it, unless a valid block behind says that more had been
durable: then acknowledged data is lost, and nothing is changed. What else lies behind is one batch in flight:
torn, promised to nobody. Such a segment is closed where its valid prefix ends; writing goes on in a new one.

What a sync was to make durable before recovery, and perhaps did not, is written once more and not only
synced: after a sync that failed, the kernel may hold as clean what the medium does not have, and the next
sync says nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from protocol.constants import MIB
from replicator.errors import StateError
from replicator.files import Files
from replicator.log.directory import segment_numbers
from replicator.log.gather import pages
from replicator.log.records import (
    ALIGN,
    Identity,
    Index,
    Kind,
    Mark,
    Position,
    Trailer,
    parse_name,
    segment_name,
    unpack_index,
    unpack_segment,
    unpack_trailer,
)
from replicator.log.scan import Scan, durable_end, has_batches, scan
from replicator.log.segment import OpenSegment, SegmentFile

_STEP_BYTES: Final = 8 * MIB


@dataclass(frozen=True, slots=True)
class Closed:
    """A closed segment.

    Attributes:
        end: behind its last batch; there its index begins.
        size_bytes: of its file.
        notes: of its batches, but 0.
        last: whether it ends a finished log.
    """

    end: int
    size_bytes: int
    notes: frozenset[int]
    last: bool


@dataclass(frozen=True, slots=True)
class Recovered:
    """A log as it is: its id, and its segments by number, ascending, at least one; all closed and durable."""

    log: bytes
    segments: dict[int, Closed]


@dataclass(frozen=True, slots=True)
class _Examined:
    """What one file was found to be. With a ``scan`` it has yet to be closed."""

    identity: Identity
    previous_end: int
    closed: Closed
    scan: Scan | None


def damaged(what: str) -> StateError:
    """The error for data that had been durable and is not there any more, or not as it was."""
    return StateError(
        "log.damaged",
        what,
        cause="the disk of the retention directory lost or changed what it had confirmed, or "
        "somebody changed its files",
        fix="look into the kernel log and check that disk, then send the group again: what is missing is "
        "sent anew",
    )


def recover(files: Files, dir_fd: int, kind: Kind, epoch: int, seed: int) -> Recovered | None:
    """Bring a log into order after a stop of any kind; None if there is none.

    Raises:
        OSError. StateError: ``log.damaged``; then nothing was changed.
    """
    numbers = segment_numbers(files, dir_fd, kind, epoch)
    if not numbers:
        return None
    if kind is Kind.UNDO and numbers[0] != 1:  # only of redo logs the oldest are dropped
        raise damaged(f"{segment_name(kind, epoch, 1)} is missing")
    found: list[_Examined] = []
    for number in numbers:
        name = segment_name(kind, epoch, number)
        examined = _examine(files, dir_fd, name, newest=number == numbers[-1], seed=seed)
        if examined is not None:
            _check_place(name, examined, Identity(kind, examined.identity.log, epoch, number), found)
            found.append(examined)
    # Nothing is missing; only now is anything changed.
    if len(found) < len(numbers):
        files.unlink(dir_fd, segment_name(kind, epoch, numbers[-1]))
    segments = {each.identity.segment: _in_order(files, dir_fd, each, seed) for each in found}
    newest = found[-1] if found else None
    if newest is not None and newest.scan is None:  # the sync that was to close it may have come to nothing
        closed = newest.closed
        close_again(files, dir_fd, newest.identity, closed, seed, last=closed.last)
    files.fsync(dir_fd)
    return Recovered(found[0].identity.log, segments) if found else None


def open_segment_file(files: Files, dir_fd: int, identity: Identity, flags: int) -> SegmentFile:
    """The file of this segment. ``OSError``."""
    name = segment_name(identity.kind, identity.epoch, identity.segment)
    return SegmentFile(files, dir_fd, name, flags)


def read_index(file: SegmentFile, identity: Identity, closed: Closed, seed: int) -> Index:
    """The index of a closed segment. ``OSError``; StateError: ``log.damaged``."""
    index = _try_index(file, identity, closed.end, closed.size_bytes, seed)
    if index is None:
        raise damaged(f"the index of {file.name} does not match its hash")
    return index


def close_again(
    files: Files, dir_fd: int, identity: Identity, closed: Closed, seed: int, *, last: bool
) -> Closed:
    """Write a closed segment's end once more. ``OSError``; StateError: ``log.damaged``."""
    with closing(open_segment_file(files, dir_fd, identity, os.O_RDWR)) as file:
        index = read_index(file, identity, closed, seed)
        segment = OpenSegment(file, identity, closed.size_bytes, seed)
        segment.resume(closed.end, index.rows, index.marks)
        return Closed(closed.end, segment.finish(last=last), closed.notes, last)


def notes_of(marks: Iterable[Mark]) -> frozenset[int]:
    """The notes that say something."""
    return frozenset(mark.note for mark in marks if mark.note)


def _examine(files: Files, dir_fd: int, name: str, *, newest: bool, seed: int) -> _Examined | None:
    """What a file is; None for a segment whose making was cut short, before anything was written to it."""
    with closing(SegmentFile(files, dir_fd, name, os.O_RDONLY)) as file:
        header = unpack_segment(file.read(pages(ALIGN), 0), seed)
        if header is None:
            number = parse_name(name)
            if newest and number is not None and not has_batches(file, number[2], seed):
                return None
            raise damaged(f"the header of {name} does not match its hash")
        identity, previous_end = header
        trailer = _read_trailer(file, identity, seed)
        index = None if trailer is None else _try_index(file, identity, trailer.end, file.size_bytes, seed)
        if trailer is not None and index is not None:
            closed = Closed(trailer.end, file.size_bytes, notes_of(index.marks), trailer.finished)
            return _Examined(identity, previous_end, closed, None)
        found = scan(file, identity, Position(identity.segment - 1, previous_end), seed)
        durable = durable_end(file, identity, found.end, seed) if trailer is None else trailer.end
        if durable > found.end:
            raise damaged(
                f"{name} is damaged at byte {found.end} or behind; {durable} bytes had been durable"
            )
        last = trailer is not None and trailer.finished
        closed = Closed(found.end, file.size_bytes, notes_of(found.marks), last)
        return _Examined(identity, previous_end, closed, found)


def _check_place(name: str, examined: _Examined, expected: Identity, before: list[_Examined]) -> None:
    if examined.identity != expected:
        raise damaged(f"{name} holds segment {examined.identity.segment} of epoch {examined.identity.epoch}")
    if not before:
        return
    last = before[-1]
    if last.identity.segment + 1 != expected.segment:
        raise damaged(f"segment {expected.segment - 1}, before {name}, is missing")
    if last.identity.log != expected.log or last.closed.end != examined.previous_end:
        raise damaged(f"{name} does not follow what the segment before it holds")


def _in_order(files: Files, dir_fd: int, examined: _Examined, seed: int) -> Closed:
    """The segment closed, if it was not."""
    found, closed = examined.scan, examined.closed
    if found is None:
        return closed
    with closing(open_segment_file(files, dir_fd, examined.identity, os.O_RDWR)) as file:
        _write_again(file, 0, ALIGN)
        _write_again(file, found.last_batch, found.end)  # of those before it a sync has told
        file.sync()  # before its index, which says that they are, the batches must be durable
        segment = OpenSegment(file, examined.identity, closed.size_bytes, seed)
        segment.resume(found.end, found.rows, found.marks)
        return Closed(closed.end, segment.finish(last=closed.last), closed.notes, closed.last)


def _write_again(file: SegmentFile, start: int, end: int) -> None:
    memory = pages(min(max(end - start, ALIGN), _STEP_BYTES))
    for position in range(start, end, len(memory)):
        file.write([file.read(memory[: end - position], position)], position)


def _read_trailer(file: SegmentFile, identity: Identity, seed: int) -> Trailer | None:
    position = file.size_bytes - ALIGN
    if position < ALIGN or position % ALIGN:
        return None
    return unpack_trailer(file.read(pages(ALIGN), position), identity, position, seed)


def _try_index(file: SegmentFile, identity: Identity, end: int, size_bytes: int, seed: int) -> Index | None:
    view = file.read(pages(size_bytes - ALIGN - end), end)
    return unpack_index(view, identity, end, seed)
