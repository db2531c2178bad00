"""What applying, rolling back and merging work with: memory of a fixed size, and the codecs.

Used again from call to call, so that no page is faulted in twice; for one call at a time. Not here: what is
read into it, and what becomes of that.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Final, TypeAlias

from protocol.constants import KIB, MIB, RAW_MAX_BYTES
from protocol.errors import RemoteProtocolError
from protocol.header import Flags, Header
from protocol.payload import DataFrame, Extent, new_compressor, new_decompressor, parse_table, unpack
from replicator.buffers import Buffer
from replicator.errors import StateError
from replicator.log.log import Log
from replicator.log.records import ALIGN, Entry, record_bytes
from replicator.log.recovery import damaged

FRAME_BYTES: Final = MIB  # of raw data in a frame of ours: what a view must read to get at one sector of it
FRAME_EXTENTS: Final = 1024
SLOTS: Final = 12  # frames a commit: it costs the disk a flush, which a dozen MiB outweigh

_BODIES_BYTES: Final = 8 * MIB  # of one window; there is room for two
_TABLES_BYTES: Final = MIB  # 65,536 extents: some 10 MiB as Python has them
_LEAD_BYTES: Final = 32 * KIB  # room for a frame's table before its payload; zeros found add a few extents
_HUGE_PAGE_BYTES: Final = 2 * MIB


class Slot:
    """Memory for one frame of ours: its raw data, at ``first`` of the buffer, and in the end its body."""

    first = _LEAD_BYTES

    def __init__(self, memory: mmap.mmap, start: int) -> None:
        self.buffer = Buffer(memory, start, _LEAD_BYTES + FRAME_BYTES)
        self.raw = self.buffer.view[_LEAD_BYTES:]

    def body(self, frame: DataFrame) -> memoryview:
        """The body of a frame that was built from ``raw``, in one piece, its payload at a page's start."""
        view, table = self.buffer.view, frame.table
        begin, end = _LEAD_BYTES - len(table), _LEAD_BYTES + len(frame.payload)
        view[begin:_LEAD_BYTES] = table
        if frame.header.flags & Flags.ZSTD:
            view[_LEAD_BYTES:end] = frame.payload
        return view[begin:end]


Begin: TypeAlias = Callable[[Callable[[], object]], Callable[[], None]]
"""Begins a function; what it returns waits for the end and raises what the function raised."""


def at_once(function: Callable[[], object]) -> Callable[[], None]:
    """A ``Begin`` for those who have no thread to spare."""
    function()
    return lambda: None


class Workspace:
    """Some 34 MiB.

    Args:
        level: of zstd for frames of ours; None leaves them as they are.
        begin: runs one thing beside another.

    Attributes:
        slots: for frames of ours.
        compressor: for them; None without one.
        begin: as given.
    """

    def __init__(self, level: int | None = None, begin: Begin = at_once) -> None:
        slot_bytes = _LEAD_BYTES + FRAME_BYTES
        memory, start = _huge_pages(2 * _BODIES_BYTES + RAW_MAX_BYTES + SLOTS * slot_bytes)
        view = memoryview(memory)
        other_at = start + _BODIES_BYTES
        raw_at = other_at + _BODIES_BYTES
        slots_at = raw_at + RAW_MAX_BYTES
        self._bodies, self._bodies_before = view[start:other_at], view[other_at:raw_at]
        self._raw = view[raw_at:slots_at]
        self.begin = begin
        self.slots = tuple(Slot(memory, slots_at + number * slot_bytes) for number in range(SLOTS))
        self.compressor = None if level is None else new_compressor(level)
        self._decompressor = new_decompressor()

    def read(self, log: Log, segment: int, entries: Sequence[Entry]) -> list[tuple[Header, memoryview]]:
        """Headers and bodies of records, one of ``windows``; they hold until the call after the next.

        Raises:
            As ``Log.read``.
        """
        self._bodies, self._bodies_before = self._bodies_before, self._bodies
        in_file = sorted(entries, key=lambda entry: entry.offset)
        bodies: dict[int, memoryview] = {}
        position = 0
        while len(bodies) < len(in_file):
            rest = in_file[len(bodies) :]
            run = log.read_run(segment, rest, self._bodies[position:])
            bodies.update(zip([entry.offset for entry in rest[: len(run)]], run, strict=True))
            position += _end(rest[len(run) - 1]) - rest[0].offset
        return [(entry.header, bodies[entry.offset]) for entry in entries]

    def unpack(self, header: Header, body: memoryview, seed: int) -> tuple[list[Extent], memoryview]:
        """Extents and raw bytes of a record, verified end to end; the bytes hold until the next call.

        Raises:
            StateError: ``log.damaged``.
        """
        into = self._raw[: header.raw_len] if header.flags & Flags.ZSTD else None
        try:
            return unpack(header, body, into, self._decompressor, seed)
        except RemoteProtocolError as error:
            raise broken(header, error) from None


def windows(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries, in their order, in portions that fit into a workspace: bodies, extents, and raw data."""
    window: list[Entry] = []
    bodies = tables = raw = 0
    for entry in entries:
        header = entry.header
        bodies += _room(entry)
        tables += header.table_len
        raw += header.raw_len
        if window and (bodies > _BODIES_BYTES or tables > _TABLES_BYTES or raw > SLOTS * FRAME_BYTES):
            yield window
            window = []
            bodies, tables, raw = _room(entry), header.table_len, header.raw_len
        window.append(entry)
    if window:
        yield window


def extents_of(header: Header, body: memoryview) -> list[Extent]:
    """The extents of a record.

    Raises:
        StateError: ``log.damaged``.
    """
    try:
        return parse_table(header, body)
    except RemoteProtocolError as error:
        raise broken(header, error) from None


def broken(header: Header, error: RemoteProtocolError) -> StateError:
    """The error for a record whose body matches its hash and cannot be right all the same."""
    where = f"[{header.cover_start}, {header.cover_end}) of disk {header.disk}"
    return damaged(f"the log's record of {where} in epoch {header.epoch} cannot be used: {error}")


def _room(entry: Entry) -> int:
    return record_bytes(entry.header) + ALIGN  # a batch record may stand behind it, and is read with it


def _end(entry: Entry) -> int:
    return entry.offset + record_bytes(entry.header)


def _huge_pages(size: int) -> tuple[mmap.mmap, int]:
    """Memory, and where in it ``size`` bytes begin that may lie in huge pages.

    Of 4 KiB pages a direct read of a MiB is 256 pieces, more than a disk's queue takes at once: in huge pages
    it was twice as fast.
    """
    memory = mmap.mmap(-1, size + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE_BYTES
