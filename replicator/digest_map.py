"""The sender's digests of a sealed epoch: what the target holds, known without asking it.

One file a disk, of pages of 4 KiB with 255 digests each (``digest.py``). A page of zero blocks alone is not
written, so a sparse disk has a sparse map. A map is believed only if its root, a hash over every page that is
there, is the one that was published with it: a torn, cut, mixed-up or half-written file is none. Which map
belongs to which epoch and target is the business of ``sender_state.py``. All of it blocks.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock
from typing import Self

from xxhash import xxh3_64_digest, xxh3_128

from protocol.constants import KIB
from protocol.messages import Interval
from replicator.digest import BLOCK_BYTES, DIGEST_BYTES, Digester, zero_row
from replicator.extents import Coverage
from replicator.files import Files, read_fully, write_fully

_log = logging.getLogger(__name__)

PAGE_BYTES = 4 * KIB
BLOCKS_A_PAGE = PAGE_BYTES // DIGEST_BYTES - 1  # the first 16 bytes hold the page's hash and its number
PAGE_SPAN_BYTES = BLOCKS_A_PAGE * BLOCK_BYTES
_HEAD_BYTES = DIGEST_BYTES
_NO_DIGESTS = bytes(PAGE_BYTES)


def block_count(size: int) -> int:
    """Blocks of a disk of ``size`` bytes."""
    return -(-size // BLOCK_BYTES)


class DigestMapBuilder:
    """A map while its epoch is under way. Digests come in any order, from any thread; full pages leave
    memory.

    Args:
        files: the I/O seam.
        dir_fd: the directory of the map; stays the caller's.
        name: its file's name; an old file is replaced, and stays what it was for whoever has it open.
        size: of the disk, in bytes.
        seed: of the digests.

    A block may be recorded again: the last time counts. A file that cannot be written makes no map.
    """

    def __init__(self, files: Files, dir_fd: int, name: str, size: int, seed: int) -> None:
        self.name = name
        self._files = files
        self._size = size
        self._lock = Lock()
        self._seed = seed
        self._known = Coverage()
        self._pages: dict[int, tuple[bytearray, Coverage]] = {}
        self._written: set[int] = set()  # pages that are in the file
        self._failed = False
        with suppress(FileNotFoundError):
            files.unlink(dir_fd, name)
        self._fd = files.open_beneath(dir_fd, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            files.truncate(self._fd, -(-block_count(size) // BLOCKS_A_PAGE) * PAGE_BYTES)
        except OSError:
            self.close()
            raise

    def take(self, digester: Digester) -> None:
        """Record all that a digester found."""
        with self._lock:
            if self._failed:
                return
            try:
                for start, digests in digester.rows:
                    self.record(start, digests)
                for start, end in digester.zeros:
                    self.record_zeros(start, end)
            except OSError as error:  # what is lost is a comparison with the target, not the send
                self._failed = True
                _log.warning("no digest map this time: %s cannot be written: %s", self.name, error.strerror)

    def record(self, start: int, digests: bytes) -> None:
        """The blocks from ``start`` (a multiple of the block size) on have these digests. One thread at a
        time.
        """
        end = min(start + len(digests) // DIGEST_BYTES * BLOCK_BYTES, self._size)
        self._known.add(start, end)
        position = 0
        while start < end:
            page, first = divmod(start // BLOCK_BYTES, BLOCKS_A_PAGE)
            count = min(BLOCKS_A_PAGE - first, len(digests) // DIGEST_BYTES - position)
            row = digests[position * DIGEST_BYTES : (position + count) * DIGEST_BYTES]
            if count == BLOCKS_A_PAGE and page not in self._pages:
                self._write(page, row)
            else:
                content, known = self._page(page)
                content[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES] = row
                self._filled(page, known, start, min(start + count * BLOCK_BYTES, end))
            position += count
            start += count * BLOCK_BYTES

    def record_zeros(self, start: int, end: int) -> None:
        """The blocks of [start, end) are zero; both are block bounds, or ``end`` is the disk's."""
        self._known.add(start, end)
        while start < end:
            page = start // PAGE_SPAN_BYTES
            behind = min((page + 1) * PAGE_SPAN_BYTES, end)
            if behind - start < PAGE_SPAN_BYTES or page in self._written or page in self._pages:
                content, known = self._page(page)
                first = start // BLOCK_BYTES % BLOCKS_A_PAGE * DIGEST_BYTES
                row = zero_row(Interval(start, behind), self._size, self._seed)
                content[first : first + len(row)] = row
                self._filled(page, known, start, behind)
            start = behind

    def finish(self) -> bytes | None:
        """Make the map durable; its root, or None when digests are missing. Ends the builder."""
        try:
            if self._failed or self._fd < 0 or not self._known.is_whole(self._size):
                return None
            for page in list(self._pages):
                self._write(page, self._pages.pop(page)[0])
            self._files.fdatasync(self._fd)
            return _root(self._files, self._fd, self._size, self._seed)
        except OSError as error:
            _log.warning("no digest map this time: %s cannot be written: %s", self.name, error.strerror)
            return None
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    def _page(self, page: int) -> tuple[bytearray, Coverage]:
        if page not in self._pages:
            content, known = self._zero_page(page), Coverage()
            if page in self._written:  # its blocks are told again after a break, perhaps not all of them
                read_fully(self._files, self._fd, memoryview(content), page * PAGE_BYTES + _HEAD_BYTES)
                known.add(page * PAGE_SPAN_BYTES, min((page + 1) * PAGE_SPAN_BYTES, self._size))
            self._pages[page] = (content, known)
        return self._pages[page]

    def _zero_page(self, page: int) -> bytearray:
        start = page * PAGE_SPAN_BYTES
        row = zero_row(Interval(start, min(start + PAGE_SPAN_BYTES, self._size)), self._size, self._seed)
        return bytearray(row.ljust(BLOCKS_A_PAGE * DIGEST_BYTES, b"\0"))

    def _filled(self, page: int, known: Coverage, start: int, end: int) -> None:
        known.add(start, end)
        first = page * PAGE_SPAN_BYTES
        if known.covered_bytes == min(PAGE_SPAN_BYTES, self._size - first):
            self._write(page, self._pages.pop(page)[0])

    def _write(self, page: int, content: bytes | bytearray) -> None:
        if page not in self._written and content == self._zero_page(page):
            return
        self._written.add(page)
        write_fully(self._files, self._fd, _page_head(page, content) + content, page * PAGE_BYTES)


class DigestMap:
    """A published map."""

    def __init__(self, files: Files, fd: int, size: int, seed: int) -> None:
        self._files = files
        self._fd = fd
        self._size = size
        self._seed = seed

    @classmethod
    def open(cls, files: Files, dir_fd: int, name: str, root: bytes, size: int, seed: int) -> Self | None:
        """The map, if it is exactly the one that was published with ``root``; else None."""
        try:
            fd = files.open_beneath(dir_fd, name, os.O_RDONLY)
        except OSError:
            return None
        try:
            believed = _root(files, fd, size, seed) == root
        except OSError:
            believed = False
        if not believed:
            files.close(fd)
            return None
        return cls(files, fd, size, seed)

    def digests(self, start: int, end: int) -> bytes:
        """Digests of the blocks of [start, end); both are block bounds, or ``end`` is the disk's.
        ``OSError``.
        """
        rows = []
        while start < end:
            first, behind = self._data_pages(start // PAGE_SPAN_BYTES, -(-end // PAGE_SPAN_BYTES))
            data = min(first * PAGE_SPAN_BYTES, end)
            if start < data:  # a hole, however long, costs no reading
                rows.append(zero_row(Interval(start, data), self._size, self._seed))
                start = data
            stop = min(behind * PAGE_SPAN_BYTES, end)
            rows += self._read(start, stop)
            start = stop
        return b"".join(rows)

    def _data_pages(self, page: int, end: int) -> tuple[int, int]:
        """The first stretch of pages [page, end) that the file has; [end, end) if it has none of them."""
        try:
            data = self._files.seek(self._fd, page * PAGE_BYTES, os.SEEK_DATA)
            hole = self._files.seek(self._fd, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but holes from here on
                raise
            return end, end
        return min(data // PAGE_BYTES, end), min(-(-hole // PAGE_BYTES), end)

    def _read(self, start: int, end: int) -> Iterator[bytes]:
        """Digests of pages that the file has. Its holes may be told as data; a page of none is a hole."""
        page, behind = start // PAGE_SPAN_BYTES, -(-end // PAGE_SPAN_BYTES)
        content = memoryview(bytearray((behind - page) * PAGE_BYTES))
        read_fully(self._files, self._fd, content, page * PAGE_BYTES)
        while start < end:
            stop = min(start - start % PAGE_SPAN_BYTES + PAGE_SPAN_BYTES, end)
            first = _HEAD_BYTES + start % PAGE_SPAN_BYTES // BLOCK_BYTES * DIGEST_BYTES
            count = -(-(stop - start) // BLOCK_BYTES) * DIGEST_BYTES
            row = bytes(content[first : first + count])
            is_hole = row == _NO_DIGESTS[:count]
            yield zero_row(Interval(start, stop), self._size, self._seed) if is_hole else row
            content, start = content[PAGE_BYTES:], stop

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1


def _page_head(page: int, content: bytes | bytearray | memoryview) -> bytes:
    return xxh3_64_digest(content, page) + page.to_bytes(8, "little")


def _root(files: Files, fd: int, size: int, seed: int) -> bytes:
    """The hash over size, numbers and hashes of the pages that are there; the pages' own hashes are checked.

    Seeded as the digests are: those of another installation are another map.

    A page that does not hold contributes something that no good page does, so the root cannot be the right
    one.
    """
    state = xxh3_128(size.to_bytes(8, "little"), seed)
    view = memoryview(bytearray(PAGE_BYTES))
    pages = -(-block_count(size) // BLOCKS_A_PAGE)
    page = 0
    while page < pages:
        try:
            page = files.seek(fd, page * PAGE_BYTES, os.SEEK_DATA) // PAGE_BYTES
        except OSError:  # ENXIO: nothing but holes from here on
            break
        count = read_fully(files, fd, view, page * PAGE_BYTES)
        if any(view[:count]):
            head, content = bytes(view[:_HEAD_BYTES]), view[_HEAD_BYTES:count]
            state.update(head if head == _page_head(page, content) else b"damaged")
        page += 1
    return state.digest()
