"""History: what stood in the images before an epoch was applied, so that the past can be had again.

In an undo log the first record that has a byte is right about it. Not here: when it is kept (``apply.py``)
and how it is read (``views.py``).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Final, NamedTuple

from protocol.constants import MIB
from protocol.header import Header
from protocol.messages import Interval
from protocol.payload import Extent, build
from replicator.buffers import zero_runs
from replicator.errors import StateError
from replicator.extents import Coverage
from replicator.images.base import Image
from replicator.log.index import CoverIndex, Place, entry_at
from replicator.log.log import Log
from replicator.log.records import Entry
from replicator.log.workspace import FRAME_BYTES, FRAME_EXTENTS, Slot, Workspace, extents_of, windows

_STEP_BYTES: Final = 64 * MIB  # of a long extent, compared in one go
_TABLES: Final = 32  # of an older log, held against records of a newer one


class Piece(NamedTuple):
    """What one frame will hold: extents of a disk, sorted, of ``length`` bytes together."""

    disk: int
    extents: list[Extent]
    length: int


def keep(
    records: Sequence[tuple[Header, memoryview]],
    bases: Mapping[int, Image],
    undo: Log,
    note: int,
    seed: int,
    workspace: Workspace,
) -> int:
    """Put what the images hold at the places of ``records`` into ``undo``, durably; returns its bytes.

    Args:
        records: sorted by disk and place; their bodies, from ``workspace``, stay as they are.
        note: stands in the last commit only: all of it is there.

    Raises:
        StateError: ``log.damaged``. SpaceError, TargetError: of the log or an image.
    """
    frames: list[tuple[Header, memoryview]] = []
    kept_bytes = 0
    wanted = pieces(records)
    while batch := list(islice(wanted, len(workspace.slots))):
        if frames:
            undo.write(frames)
        for piece in batch:
            bases[piece.disk].read_ahead(piece.extents)
        frames = []
        for piece, slot in zip(batch, workspace.slots, strict=False):
            bases[piece.disk].read_into(piece.extents, slot.raw[: piece.length])
            extents, length = _without_zeros(piece, slot)
            frames.append(_built(piece.disk, extents, length, slot, undo, seed, workspace))
            kept_bytes += piece.length
    undo.write(frames, note)
    return kept_bytes


def pieces(records: Iterable[tuple[Header, memoryview]]) -> Iterator[Piece]:
    """The places of records, neighbours joined, cut to what a frame of ours holds."""
    disk, size, end = -1, 0, -1
    extents: list[Extent] = []
    for header, body in records:
        for offset, length, _ in extents_of(header, body):
            position, behind = offset, offset + length
            while position < behind:
                if size == FRAME_BYTES or len(extents) == FRAME_EXTENTS or (extents and disk != header.disk):
                    yield Piece(disk, extents, size)
                    extents, size, end = [], 0, -1
                taken = min(behind - position, FRAME_BYTES - size)
                if position == end:
                    extents[-1] = Extent(extents[-1].offset, extents[-1].length + taken)
                else:
                    extents.append(Extent(position, taken))
                position = end = position + taken
                disk, size = header.disk, size + taken
    if extents:
        yield Piece(disk, extents, size)


def roll_back(undo: Log, bases: Mapping[int, Image], seed: int, workspace: Workspace | None = None) -> None:
    """Put everything back that ``undo`` holds, durably: the images are as before its epoch. Idempotent.

    Args:
        undo: of an epoch that was applied whole, in part, or not at all; it stays as it is.
        bases: images by disk number, all of the log's; nobody else writes to them meanwhile.
        seed: the installation's hash seed.
        workspace: made for this call if there is none.

    Raises:
        StateError: ``log.damaged``, ``log.disk_missing``. TargetError: of the log or an image.
    """
    workspace = workspace or Workspace()
    segments = undo.segments()
    images = images_of((entry for segment in segments for entry in undo.entries(segment)), bases)
    for segment in reversed(segments):  # backwards: the first record that has a byte is written last
        for window in windows(reversed(undo.entries(segment))):
            for header, body in workspace.read(undo, segment, window):
                bases[header.disk].write(*workspace.unpack(header, body, seed))
    for image in images:
        image.sync()


def merge(older: Log, newer: Log, into: Log, seed: int, workspace: Workspace | None = None) -> None:
    """The history of two epochs, one after the other, as that of one; where both have a byte, the older is
    right. ``into`` is new, and finished on return.

    Raises:
        StateError: ``log.damaged``. SpaceError, TargetError: of a log; ``into`` is then to be removed.
    """
    workspace = workspace or Workspace()
    for segment in older.segments():
        for window in windows(older.entries(segment)):
            records = workspace.read(older, segment, window)
            into.write([(replace(header, epoch=into.epoch), body) for header, body in records])
    known = _Known(older, workspace.slots[0])
    for segment in newer.segments():
        for window in windows(newer.entries(segment)):
            records = workspace.read(newer, segment, window)
            _add_unknown(records, known, into, seed, workspace)
    into.finish()


def images_of(entries: Iterable[Entry], bases: Mapping[int, Image]) -> list[Image]:
    """The images that records are for, ready to be written more than once.

    Raises:
        StateError: ``log.disk_missing``; nothing was touched.
    """
    numbers = sorted({entry.header.disk for entry in entries})
    for number in numbers:
        if number not in bases:
            raise StateError(
                "log.disk_missing",
                f"the log holds data of disk {number}, which is not there to be written",
                cause="the disk left its group, or its files are gone, before the log was done with",
                fix="put the disk's files back, or send the group in full",
            )
        bases[number].blank = False  # what is written now may be written again, over data
    return [bases[number] for number in numbers]


def _built(
    disk: int, extents: Sequence[Extent], length: int, slot: Slot, log: Log, seed: int, workspace: Workspace
) -> tuple[Header, memoryview]:
    """A frame for ``log``, of extents whose ``length`` bytes of data lie in ``slot``."""
    cover = Interval(extents[0].offset, extents[-1].end)
    frame = build(disk, log.epoch, cover, extents, slot.raw[:length], workspace.compressor, seed)
    return frame.header, slot.body(frame)


def _without_zeros(piece: Piece, slot: Slot) -> tuple[list[Extent], int]:
    """The extents of ``piece``, long zeros told as such, and how much data is left, moved together."""
    position = kept = slot.first
    runs = zero_runs(slot.buffer, position, position + piece.length)
    if not any(run.zero for run in runs):
        return piece.extents, piece.length
    view = slot.buffer.view
    said: list[Extent] = []
    behind = iter(runs)
    run = next(behind)
    for offset, length, _ in piece.extents:
        shift, end = offset - position, position + length
        while position < end:
            if run.end == position:
                run = next(behind)
            stop = min(end, run.end)
            said.append(Extent(position + shift, stop - position, run.zero))
            if not run.zero:
                if kept < position:
                    view[kept : kept + stop - position] = view[position:stop]
                kept += stop - position
            position = stop
    return said, kept - slot.first


class _Known:
    """Of which bytes a log has a record. ``slot``: memory for one record of it."""

    def __init__(self, log: Log, slot: Slot) -> None:
        self.index = CoverIndex(log)
        self._log = log
        self._memory = slot.buffer.view
        self._tables: OrderedDict[Place, list[Extent]] = OrderedDict()

    def unknown(self, disk: int, extents: Iterable[Extent]) -> Iterator[tuple[Extent, int]]:
        """What of sorted extents it does not have, each with the position of its bytes in their payload."""
        position = 0
        for offset, length, zero in extents:
            for start in range(offset, offset + length, _STEP_BYTES):
                end = min(offset + length, start + _STEP_BYTES)
                for gap in self._said(disk, start, end).gaps(start, end):
                    yield Extent(gap.start, gap.end - gap.start, zero), position + gap.start - offset
            position += 0 if zero else length

    def _said(self, disk: int, start: int, end: int) -> Coverage:
        said = Coverage()
        for place in self.index.records(disk, start, end):
            table = self._table(place)
            first = max(0, bisect_right(table, (start,)) - 1)
            for at in range(first, bisect_left(table, (end,))):
                if table[at].end > start:
                    said.add(table[at].offset, table[at].end)
        return said

    def _table(self, place: Place) -> list[Extent]:
        table = self._tables.pop(place, None)
        if table is None:
            entry = entry_at(self._log, place)
            table = extents_of(entry.header, self._log.read(place.segment, entry, self._memory))
        self._tables[place] = table  # the last used come last
        if len(self._tables) > _TABLES:
            self._tables.popitem(last=False)
        return table


def _add_unknown(
    records: Iterable[tuple[Header, memoryview]], known: _Known, into: Log, seed: int, workspace: Workspace
) -> None:
    """Write what ``known`` does not have of the records into ``into``."""
    frames: list[tuple[Header, memoryview]] = []
    free = list(workspace.slots[1:])
    for header, body in records:
        if not known.index.records(header.disk, header.cover_start, header.cover_end):
            frames.append((replace(header, epoch=into.epoch), body))
            continue
        extents, raw = workspace.unpack(header, body, seed)
        unknown = known.unknown(header.disk, extents)
        while some := list(islice(unknown, FRAME_EXTENTS)):
            if not free:
                into.write(frames)
                frames, free = [], list(workspace.slots[1:])
            slot, kept = free.pop(), 0
            for extent, position in some:
                if not extent.zero:
                    slot.raw[kept : kept + extent.length] = raw[position : position + extent.length]
                    kept += extent.length
            frames.append(
                _built(header.disk, [extent for extent, _ in some], kept, slot, into, seed, workspace)
            )
    if frames:
        into.write(frames)
