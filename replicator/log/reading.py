"""Reading records: segment files that are kept open for it, and records taken apart in the reader's memory.

Not here: where records stand (``log.py``), and segments that cannot be trusted yet (``scan.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Final

from protocol.constants import HEADER_BYTES
from protocol.header import Header
from replicator.log.records import ALIGN, Entry, head_bytes, record_bytes
from replicator.log.segment import SegmentFile

KEPT: Final = 4  # a log; there may be hundreds of logs


@dataclass(slots=True)
class _Reader:
    file: SegmentFile
    users: int = 0


class Readers:
    """Files by segment number. ``open_file`` opens one."""

    def __init__(self, open_file: Callable[[int], SegmentFile]) -> None:
        self._open_file = open_file
        self._lock = Lock()
        self._kept: dict[int, _Reader] = {}

    @contextmanager
    def using(self, segment: int) -> Iterator[SegmentFile]:
        """The segment's file, which stays open inside. Errors are those of ``open_file``."""
        with self._lock:
            reader = self._kept.pop(segment, None) or _Reader(self._open_file(segment))
            self._kept[segment] = reader  # the latest used come last
            reader.users += 1
        try:
            yield reader.file
        finally:
            with self._lock:
                reader.users -= 1
                if not reader.users and self._kept.get(segment) is not reader:
                    reader.file.close()
                self._forget_some()

    def forget(self, segment: int) -> None:
        """The segment is gone: whoever reads it may go on, nobody else finds it."""
        with self._lock:
            reader = self._kept.pop(segment, None)
            if reader is not None and not reader.users:
                reader.file.close()

    def close(self) -> None:
        """Close all files that nobody uses, the others when they are let go."""
        for segment in list(self._kept):
            self.forget(segment)

    def _forget_some(self) -> None:
        idle = [segment for segment, reader in self._kept.items() if not reader.users]
        for segment in idle[: max(0, len(self._kept) - KEPT)]:
            self._kept.pop(segment).file.close()


def run_of(entries: Sequence[Entry], room_bytes: int) -> tuple[int, int]:
    """How many of the first entries one read of at most ``room_bytes`` takes, and where it ends."""
    start = end = entries[0].offset
    for count, entry in enumerate(entries):
        behind = entry.offset + record_bytes(entry.header)
        if not end <= entry.offset <= end + ALIGN or behind - start > room_bytes:
            return end, count
        end = behind
    return end, len(entries)


def body_of(record: memoryview, header: Header) -> memoryview:
    """The body of a record, its table moved to where the payload begins."""
    payload_at = head_bytes(header)
    start = payload_at - header.table_len
    record[start:payload_at] = record[HEADER_BYTES : HEADER_BYTES + header.table_len]
    return record[start : start + header.body_len]
