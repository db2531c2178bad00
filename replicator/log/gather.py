"""A batch as one gathered write: what lies well in memory goes as it lies, the rest through scratch pages.

Not here: where in the file it goes, and when it is durable (``segment.py``).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from protocol.constants import KIB
from protocol.header import Header, pack
from replicator.buffers import address_of
from replicator.log.records import ALIGN, pack_row, padded, record_bytes

Frame: TypeAlias = tuple[Header, memoryview]
"""A frame to be written: its header, and its body, table and payload in one piece."""

# Below, copying costs less than one more piece of a gathered write.
_COPY_BELOW_BYTES: Final = 16 * KIB
_KEEP_BYTES: Final = 8 * 1024 * KIB
_ZEROS: Final = memoryview(bytes(ALIGN))


def is_aligned(view: memoryview) -> bool:
    """Whether O_DIRECT takes this memory."""
    address = address_of(view)
    return address is not None and address % ALIGN == 0


def pages(size: int) -> memoryview:
    """``size`` bytes of page-aligned memory, all zeros."""
    return memoryview(mmap.mmap(-1, size))


def paged(content: bytes) -> memoryview:
    """A copy in page-aligned memory."""
    view = pages(len(content))
    view[:] = content
    return view


class Gathered(NamedTuple):
    """A batch ready to be written.

    Attributes:
        pieces: of memory, to be written one after the other; addresses and lengths are multiples of ALIGN.
        rows: of the index, one a record.
    """

    pieces: list[memoryview]
    rows: list[bytes]


class Scratch:
    """Page-aligned memory for what cannot be written as it lies. For one writer at a time."""

    def __init__(self) -> None:
        self._memory = pages(ALIGN)

    def gather(self, frames: Sequence[Frame], start: int, last: bytes, seed: int) -> Gathered:
        """The records of ``frames``, to stand at ``start``, and the block ``last`` behind them.

        The pieces hold until the next call, and as long as the frames' memory.
        """
        as_they_lie = [_as_it_lies(header, body) for header, body in frames]
        size = sum(record_bytes(header) for header, _ in frames) + padded(len(last)) - sum(as_they_lie)
        scratch = self._room(size)
        pieces: list[memoryview] = []
        rows: list[bytes] = []
        position, at, begun = start, 0, 0
        for (header, body), direct in zip(frames, as_they_lie, strict=True):
            packed = pack(header, seed)
            rows.append(pack_row(position, packed))
            table_end = header.table_len
            first = at
            at = _put(scratch, at, packed, body[:table_end])
            payload = body[table_end:]
            if direct:
                pieces += (scratch[begun:at], payload[:direct])
                begun = at
            at = _put(scratch, at, payload[direct:])
            position += at - first + direct
        at = _put(scratch, at, last)
        pieces.append(scratch[begun:at])
        return Gathered(pieces, rows)

    def _room(self, size: int) -> memoryview:
        if not size <= len(self._memory) <= max(2 * size, _KEEP_BYTES):
            self._memory = pages(1 << (size - 1).bit_length())
        return self._memory


def _put(scratch: memoryview, at: int, *parts: bytes | memoryview) -> int:
    """Copy ``parts`` there and fill up the last block with zeros; returns where it ends."""
    start = at
    for part in parts:
        scratch[at : at + len(part)] = part
        at += len(part)
    end = start + padded(at - start)
    scratch[at:end] = _ZEROS[: end - at]
    return end


def _as_it_lies(header: Header, body: memoryview) -> int:
    """How many bytes of the payload are written from where they lie."""
    payload = body[header.table_len :]
    if len(payload) < _COPY_BELOW_BYTES or not is_aligned(payload):
        return 0
    return len(payload) - len(payload) % ALIGN
