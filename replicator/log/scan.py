"""Reads a segment record by record, for one that was never closed or whose end is damaged.

Errors are ``OSError``. What follows from what is found is decided in ``recovery.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from xxhash import xxh3_64

from protocol.constants import HEADER_BYTES, MIB
from protocol.errors import RemoteProtocolError
from protocol.header import FrameType, Header, unpack
from replicator.log.gather import pages
from replicator.log.records import (
    ALIGN,
    ROW_BYTES,
    BlockType,
    Identity,
    Mark,
    Position,
    any_segments_batch,
    block_starts,
    head_bytes,
    pack_row,
    record_bytes,
    unpack_batch,
    unpack_index,
)
from replicator.log.segment import SegmentFile

_WINDOW_BYTES: Final = 8 * MIB  # more than the largest record


@dataclass(slots=True)
class Scan:
    """The valid prefix of a segment. ``end``: behind its last batch. ``rows``, ``marks``: its index."""

    end: int = ALIGN
    rows: bytearray = field(default_factory=bytearray)
    marks: list[Mark] = field(default_factory=list)

    @property
    def last_batch(self) -> int:
        """Where its last batch begins; ``end`` if it has none."""
        return self.marks[-2].position + ALIGN if len(self.marks) > 1 else ALIGN


def scan(file: SegmentFile, identity: Identity, previous: Position, seed: int) -> Scan:
    """The valid prefix: up to the last batch record that is reached with everything before it whole.

    ``previous``: where the batch before the first one ended.
    """
    window = _Window(file)
    found = Scan()
    position, rows = found.end, bytearray()
    while True:
        batch = unpack_batch(window.view(position, ALIGN), identity, position, seed)
        if batch is None:
            header = _record(window, position, seed)
            if header is None:
                return found
            rows += pack_row(position, bytes(window.view(position, HEADER_BYTES)))
            position += record_bytes(header)
            continue
        if batch.records != len(rows) // ROW_BYTES or batch.previous != previous:
            return found
        found.rows += rows
        found.marks.append(Mark(position, batch.note))
        position += ALIGN
        found.end, previous, rows = position, Position(identity.segment, position), bytearray()


def durable_end(file: SegmentFile, identity: Identity, start: int, seed: int) -> int:
    """The greatest end of a batch that valid blocks at ``start`` or behind say was durable before them.

    0 if there is no such block. A batch record says it of the batch before its own, an index of all.
    """
    greatest = 0
    window = _Window(file)
    for position, view in _blocks(file, window, start, BlockType.BATCH):
        batch = unpack_batch(view, identity, position, seed)
        if batch is not None and batch.previous.segment == identity.segment:
            greatest = max(greatest, batch.previous.offset)
    for position, _ in _blocks(file, _Window(file), start, BlockType.INDEX):
        if unpack_index(window.view(position, _WINDOW_BYTES), identity, position, seed) is not None:
            greatest = max(greatest, position)
    return greatest


def has_batches(file: SegmentFile, number: int, seed: int) -> bool:
    """Whether there is a batch record of segment ``number`` of whatever log, its header being unreadable."""
    blocks = _blocks(file, _Window(file), ALIGN, BlockType.BATCH)
    return any(any_segments_batch(view, number, position, seed) for position, view in blocks)


class _Window:
    """A file, seen through one piece of memory."""

    def __init__(self, file: SegmentFile) -> None:
        self._file = file
        self._memory = pages(min(_WINDOW_BYTES, max(ALIGN, -(-file.size_bytes // ALIGN) * ALIGN)))
        self._start = self._end = 0

    def view(self, offset: int, length: int) -> memoryview:
        """``length`` bytes at ``offset``, or as many as the file and the memory have; until the next call."""
        if not self._start <= offset <= offset + length <= self._end:
            self._start = offset
            self._end = offset + len(self._file.read(self._memory, offset))
        return self._memory[offset - self._start : min(offset + length, self._end) - self._start]


def _blocks(
    file: SegmentFile, window: _Window, start: int, kind: BlockType
) -> Iterator[tuple[int, memoryview]]:
    """Position and content of the blocks from ``start`` on that begin as one of this type does."""
    for position in range(start, file.size_bytes, _WINDOW_BYTES):
        view = window.view(position, _WINDOW_BYTES)
        whole = view[: len(view) - len(view) % ALIGN]
        for at in block_starts(whole, kind):
            yield position + at, whole[at : at + ALIGN]


def _record(window: _Window, position: int, seed: int) -> Header | None:
    """The header of the record at ``position``, if there is one and it is whole."""
    head = window.view(position, HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        return None
    try:
        header = unpack(head, seed)
    except RemoteProtocolError:
        return None
    size = record_bytes(header)
    view = window.view(position, size)
    if header.type is not FrameType.DATA or len(view) < size:
        return None
    payload_at = head_bytes(header)
    state = xxh3_64(view[HEADER_BYTES : HEADER_BYTES + header.table_len], seed)
    state.update(view[payload_at : payload_at + header.body_len - header.table_len])
    return header if state.intdigest() == header.body_hash else None
