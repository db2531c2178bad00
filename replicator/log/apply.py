"""Applying: what a closed segment of a redo log says is written into the images, what it replaces kept.

Once and for all, whatever happens: pre-images are durable before the image is touched where they come from,
and are never taken twice, since by then the image may hold a part of the new; the segment goes away only
after the images are durable. Not here: which segment is next, and what an epoch's state is called meanwhile.

A note in the undo log says how far a segment is kept: how many of its records, counted in the order in which
they are applied (``_in_order``), which is therefore part of the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from protocol.header import Header
from replicator.failpoints import reach
from replicator.images.base import Image
from replicator.log.history import images_of, keep
from replicator.log.log import Log
from replicator.log.records import Entry
from replicator.log.workspace import Workspace, windows

_COUNT_BITS: Final = 32


@dataclass(frozen=True, slots=True)
class ApplyCounts:
    """What was done: records applied, bytes of data in them (zeros not counted), bytes of pre-images kept."""

    records: int
    data_bytes: int
    kept_bytes: int


def apply_segment(
    redo: Log,
    segment: int,
    bases: Mapping[int, Image],
    undo: Log | None,
    seed: int,
    workspace: Workspace | None = None,
) -> ApplyCounts:
    """Apply a closed segment of ``redo``, durably, and remove it. Blocks; after a crash it is called again.

    Args:
        redo: ``segment`` is the oldest that it has.
        bases: images by disk number, all of the segment's; nobody else writes to them meanwhile.
        undo: takes what is replaced; None where no history is wanted.
        seed: the installation's hash seed.
        workspace: made for this call if there is none.

    Raises:
        StateError: ``log.damaged``, ``log.disk_missing``. SpaceError, TargetError: of a log or an image. The
        same call may be made again, once what must not be used any more is opened anew.
    """
    workspace = workspace or Workspace()
    entries = _in_order(redo.entries(segment))
    images = images_of(entries, bases)
    done = len(entries) if undo is None else _kept(undo, segment)
    for window in windows(entries[:done]):
        _write(workspace.read(redo, segment, window), bases, seed, workspace)
    kept_bytes, written = 0, _nothing
    try:
        for window in windows(entries[done:]):
            records = workspace.read(redo, segment, window)
            done += len(window)
            if undo is not None:
                reach("apply.before_undo")
                note = segment << _COUNT_BITS | done
                kept_bytes += keep(records, bases, undo, note, seed, workspace)
                reach("apply.undo_kept")
            written()  # the window before, while this one's past was kept
            written = workspace.begin(partial(_write, records, bases, seed, workspace))
    finally:
        written()
    reach("apply.base_written")
    for image in images:
        image.sync()
    reach("apply.base_synced")
    if undo is not None:
        undo.roll()  # what leads back is told from a torn end from now on: nothing else holds it
    redo.drop(segment)
    reach("apply.dropped")
    return ApplyCounts(len(entries), sum(entry.header.raw_len for entry in entries), kept_bytes)


def _in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Records as they are applied: by disk and place. They never overlap, being of one epoch."""
    return sorted(entries, key=lambda entry: (entry.header.disk, entry.header.cover_start, entry.offset))


def _kept(undo: Log, segment: int) -> int:
    """How many records of a segment have their pre-images in ``undo``, whole and durable."""
    counts = [note & (1 << _COUNT_BITS) - 1 for note in undo.notes() if note >> _COUNT_BITS == segment]
    return max(counts, default=0)


def _nothing() -> None:
    """There is no window before the first."""


def _write(
    records: Sequence[tuple[Header, memoryview]], bases: Mapping[int, Image], seed: int, workspace: Workspace
) -> None:
    reach("apply.before_base")
    for header, body in records:
        bases[header.disk].write(*workspace.unpack(header, body, seed))
