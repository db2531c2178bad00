"""The bytes of the log that are no frames: names, segment headers, batch records, indexes, trailers.

FORMAT.md is normative; this module is it as code. Pure: bytes in, values out. Not here: files, and what is
done about blocks that do not hold (``recovery.py``).
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

from xxhash import xxh3_64_intdigest

from protocol.constants import HEADER_BYTES, MAGIC
from protocol.header import Flags, FrameType, Header

ALIGN: Final = 4096  # what O_DIRECT asks of offsets and lengths nearly everywhere, and a page of memory
FORMAT_VERSION: Final = 1
LOG_ID_BYTES: Final = 16

_PREFIX = struct.Struct("<4sHBB16sQIIQ")  # magic version type kind | log id | epoch | segment 0 position
_FIRST = struct.Struct("<4sHBB")
_SEGMENT = struct.Struct("<Q")
_BATCH = struct.Struct("<IIQQ")
_COUNTS = struct.Struct("<II")
_TRAILER = struct.Struct("<QIII")
_HASH = struct.Struct("<Q")
_POSITION_AT = _PREFIX.size - 8
_HASHED_BYTES = ALIGN - _HASH.size

_ROW = struct.Struct("<Q72s")
ROW_BYTES: Final = _ROW.size
_ROW_FIELDS = struct.Struct("<QxxxxHBBIIIIQQQQQxxxxxxxx")  # as in protocol/header.py, behind the offset
_MARK = struct.Struct("<QQ")
_FLAGS: Final = {0: Flags.NONE, 1: Flags.ZSTD}

_NAME = re.compile(r"(redo|undo)-(\d{10,})-(\d{6,})\.seg")

View: TypeAlias = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a log holds: frames as they were received, or what stood at their place before."""

    REDO = 1
    UNDO = 2


class BlockType(IntEnum):
    """Types of the log's own blocks. The wire's frame types end below 64."""

    SEGMENT = 64
    BATCH = 65
    INDEX = 66
    TRAILER = 67


class Position(NamedTuple):
    """A place in a log: byte ``offset`` of a segment. Segments count from 1; 0 is "before the log"."""

    segment: int
    offset: int


BEFORE_THE_LOG: Final = Position(0, 0)


class Mark(NamedTuple):
    """A batch record as the index has it: its position in the segment, and its note."""

    position: int
    note: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A record: its frame's header, and its offset in the segment in bytes."""

    header: Header
    offset: int


@dataclass(frozen=True, slots=True)
class Identity:
    """What every block of one segment names, so that no other segment's block is taken for one of it."""

    kind: Kind
    log: bytes
    epoch: int
    segment: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch record. ``previous``: where the batch before it ended, be it in the segment before."""

    records: int
    previous: Position
    note: int


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last block of a closed segment. ``end``: behind its last batch; there the index begins."""

    end: int
    records: int
    batches: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Index:
    """What a closed segment holds. ``rows``: 80 bytes a record, offset and header; see ``entries``."""

    rows: bytes
    marks: tuple[Mark, ...]


# ------------------------------------------------------------------ names and sizes


def log_name(kind: Kind, epoch: int) -> str:
    """What an operator would call a log."""
    return f"the {kind.name.lower()} log of epoch {epoch}"


def segment_name(kind: Kind, epoch: int, segment: int) -> str:
    """File name of a segment."""
    return f"{kind.name.lower()}-{epoch:010}-{segment:06}.seg"


def parse_name(name: str) -> tuple[Kind, int, int] | None:
    """Kind, epoch and segment number from a file name; None if it is not one of ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    kind, epoch, segment = Kind[match[1].upper()], int(match[2]), int(match[3])
    return (kind, epoch, segment) if segment and name == segment_name(kind, epoch, segment) else None


def padded(length: int) -> int:
    """``length`` and what fills up its last block."""
    return -(-length // ALIGN) * ALIGN


def head_bytes(header: Header) -> int:
    """Bytes of a record before its payload: header, extent table, padding."""
    return padded(HEADER_BYTES + header.table_len)


def record_bytes(header: Header) -> int:
    """Bytes of a record in its segment."""
    return head_bytes(header) + padded(header.body_len - header.table_len)


def index_bytes(records: int, batches: int) -> int:
    """Bytes of a segment's index."""
    rows = records * _ROW.size + batches * _MARK.size
    return padded(_PREFIX.size + _COUNTS.size + rows + _HASH.size)


# ------------------------------------------------------------------ blocks


def pack_segment(identity: Identity, previous_end: int, seed: int) -> bytes:
    """Block 0. ``previous_end``: where the batches of the segment before it end, 0 for segment 1."""
    return _sealed(_prefix(identity, BlockType.SEGMENT, 0) + _SEGMENT.pack(previous_end), ALIGN, seed)


def unpack_segment(block: View, seed: int) -> tuple[Identity, int] | None:
    """Identity and previous end of a segment header; None if it does not hold."""
    if not _holds(block, seed):
        return None
    magic, version, kind, log_kind, log, epoch, segment, zero, position = _PREFIX.unpack_from(block)
    known = (MAGIC, FORMAT_VERSION, BlockType.SEGMENT, 0, 0)
    if (magic, version, kind, zero, position) != known or log_kind not in tuple(Kind):
        return None
    return Identity(Kind(log_kind), log, epoch, segment), _SEGMENT.unpack_from(block, _PREFIX.size)[0]


def pack_batch(identity: Identity, position: int, batch: Batch, seed: int) -> bytes:
    """A batch record that stands at ``position``."""
    fields = _BATCH.pack(batch.records, *batch.previous, batch.note)
    return _sealed(_prefix(identity, BlockType.BATCH, position) + fields, ALIGN, seed)


def unpack_batch(block: View, identity: Identity, position: int, seed: int) -> Batch | None:
    """The batch record of this very segment and position; None if the block is something else."""
    if not _is(block, identity, BlockType.BATCH, position) or not _holds(block, seed):
        return None
    records, segment, offset, note = _BATCH.unpack_from(block, _PREFIX.size)
    return Batch(records, Position(segment, offset), note)


def pack_index(identity: Identity, position: int, rows: View, marks: Sequence[Mark], seed: int) -> bytes:
    """The index of a segment, to stand at ``position``, behind its last batch."""
    records = len(rows) // _ROW.size
    listed = b"".join([_MARK.pack(*mark) for mark in marks])
    fields = _prefix(identity, BlockType.INDEX, position) + _COUNTS.pack(records, len(marks))
    return _sealed(fields + bytes(rows) + listed, index_bytes(records, len(marks)), seed)


def unpack_index(blocks: View, identity: Identity, position: int, seed: int) -> Index | None:
    """The index that stands at ``position``; None if it does not hold. What follows it is not looked at."""
    if len(blocks) < ALIGN or not _is(blocks, identity, BlockType.INDEX, position):
        return None
    records, batches = _COUNTS.unpack_from(blocks, _PREFIX.size)
    blocks = memoryview(blocks)[: index_bytes(records, batches)]
    if not _holds(blocks, seed):
        return None
    start = _PREFIX.size + _COUNTS.size
    behind = start + records * _ROW.size
    marks = _MARK.iter_unpack(blocks[behind : behind + batches * _MARK.size])
    return Index(bytes(blocks[start:behind]), tuple(Mark(*mark) for mark in marks))


def pack_trailer(identity: Identity, trailer: Trailer, seed: int) -> bytes:
    """The trailer; it stands right behind the index."""
    position = trailer.end + index_bytes(trailer.records, trailer.batches)
    fields = _TRAILER.pack(trailer.end, trailer.records, trailer.batches, trailer.finished)
    return _sealed(_prefix(identity, BlockType.TRAILER, position) + fields, ALIGN, seed)


def unpack_trailer(block: View, identity: Identity, position: int, seed: int) -> Trailer | None:
    """The trailer that stands at ``position``; None if the block is something else."""
    if not _is(block, identity, BlockType.TRAILER, position) or not _holds(block, seed):
        return None
    end, records, batches, finished = _TRAILER.unpack_from(block, _PREFIX.size)
    if end + index_bytes(records, batches) != position or finished > 1:
        return None
    return Trailer(end, records, batches, bool(finished))


def any_segments_batch(block: View, segment: int, position: int, seed: int) -> bool:
    """Whether it is a batch record for this segment number and position, of whatever log."""
    if not _holds(block, seed):
        return False
    magic, _, kind, _, _, _, number, _, at = _PREFIX.unpack_from(block)
    return (magic, kind, number, at) == (MAGIC, BlockType.BATCH, segment, position)


def block_starts(view: memoryview, kind: BlockType) -> Iterator[int]:
    """Offsets in ``view``, a whole number of blocks, of those that begin as a block of this type does."""
    firsts = view.cast("Q")[:: ALIGN // 8].tolist()
    wanted = {
        int.from_bytes(_FIRST.pack(MAGIC, FORMAT_VERSION, kind, log_kind), sys.byteorder) for log_kind in Kind
    }
    return (number * ALIGN for number, first in enumerate(firsts) if first in wanted)


def _prefix(identity: Identity, kind: BlockType, position: int) -> bytes:
    return _PREFIX.pack(
        MAGIC,
        FORMAT_VERSION,
        kind,
        identity.kind,
        identity.log,
        identity.epoch,
        identity.segment,
        0,
        position,
    )


def _is(block: View, identity: Identity, kind: BlockType, position: int) -> bool:
    return bytes(block[: _PREFIX.size]) == _prefix(identity, kind, position)


def _sealed(fields: bytes, size: int, seed: int) -> bytes:
    """``fields`` and zeros up to ``size``, the last eight bytes of which are the hash of all before."""
    content = fields.ljust(size - _HASH.size, b"\0")
    return content + _HASH.pack(xxh3_64_intdigest(content, seed))


def _holds(blocks: View, seed: int) -> bool:
    view = memoryview(blocks)
    at = len(view) - _HASH.size
    return bool(at > 0 and _HASH.unpack_from(view, at)[0] == xxh3_64_intdigest(view[:at], seed))


# ------------------------------------------------------------------ rows of the index


def pack_row(offset: int, header_bytes: bytes) -> bytes:
    """A record's row: its offset and the 72 bytes of its header."""
    return _ROW.pack(offset, header_bytes)


def entries(rows: View) -> list[Entry]:
    """The records of an index that held: their headers are not checked once more."""
    return list(_entries(_ROW_FIELDS.iter_unpack(rows)))


def _entries(rows: Iterable[tuple[int, ...]]) -> Iterator[Entry]:
    data, flag = FrameType.DATA, _FLAGS
    for offset, version, _, flags, body_len, *rest in rows:
        yield Entry(Header(data, body_len, flag[flags], version, *rest), offset)
