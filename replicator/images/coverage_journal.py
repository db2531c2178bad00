"""What is durable of an epoch under way, kept so that a killed master target goes on where it was.

One small file an epoch in the retention directory. Each entry is durable before the ACK that names it is
sent. The file may say less than what the images hold, never more: what is missing is sent again. Which epoch
is under way stands in the catalogue (``directory.py``). All of it blocks.

Layout, little-endian: entries of u32 disk, u64 start, u64 end, u64 XXH3-64 of these, seeded with the epoch's
number. The first entry that does not hold ends the file; it is cut off there when it is opened. What holds is
written once more then: after a sync that failed, the kernel may hold as clean what the medium does not have.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import Self

from xxhash import xxh3_64_intdigest

from protocol.constants import DISK_MAX_BYTES
from replicator.extents import Coverage
from replicator.failpoints import reach
from replicator.files import Files, read_fully, write_fully
from replicator.images.opening import failure
from replicator.private_directory import HeldDirectory

_FIELDS = struct.Struct("<IQQ")
_ENTRY = struct.Struct("<IQQQ")
_READ_BYTES = 1024 * _ENTRY.size


class CoverageJournal:
    """The journal of one epoch, open for more. ``disks``: what it held when it was opened, by disk number."""

    def __init__(self, files: Files, fd: int, number: int) -> None:
        self.disks: dict[int, Coverage] = {}
        self._files = files
        self._fd = fd
        self._number = number
        self._end = 0

    @classmethod
    def open(cls, held: HeldDirectory, number: int) -> Self:
        """The journal of epoch ``number`` in a retention directory, empty if new.

        Raises:
            SpaceError, TargetError: it cannot be read or made.
        """
        name, files = journal_name(number), held.files
        try:
            fd = files.open_beneath(held.fd, name, os.O_RDWR | os.O_CREAT)
            journal = cls(files, fd, number)
            try:
                journal._load()
                files.truncate(fd, journal._end)
                files.fsync(fd)
                files.fsync(held.fd)
            except BaseException:
                files.close(fd)
                raise
        except OSError as error:
            raise failure(error, "target.journal_failed", f"cannot use {held.path / name}") from error
        return journal

    def append(self, entries: Iterable[tuple[int, int, int]]) -> None:
        """Add (disk, start, end) of bytes that are durable in their images; durable itself on return.

        Raises:
            SpaceError, TargetError: it may or may not have been added; the journal must be opened anew.
        """
        data = b"".join([_ENTRY.pack(*entry, self._hash(_FIELDS.pack(*entry))) for entry in entries])
        reach("coverage.before_append")
        try:
            write_fully(self._files, self._fd, data, self._end)
            self._files.fdatasync(self._fd)
        except OSError as error:
            what = f"cannot note what is durable in {journal_name(self._number)}"
            raise failure(error, "target.journal_failed", what) from error
        self._end += len(data)
        reach("coverage.appended")

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1

    def _load(self) -> None:
        view = memoryview(bytearray(_READ_BYTES))
        while True:
            count = read_fully(self._files, self._fd, view, self._end)
            valid = 0
            while valid + _ENTRY.size <= count and self._take(view[valid : valid + _ENTRY.size]):
                valid += _ENTRY.size
            write_fully(self._files, self._fd, view[:valid], self._end)
            self._end += valid
            if valid < _READ_BYTES:
                return

    def _take(self, entry: memoryview) -> bool:
        disk, start, end, hashed = _ENTRY.unpack(entry)
        holds = hashed == self._hash(entry[: _FIELDS.size]) and start < end <= DISK_MAX_BYTES
        if holds:
            self.disks.setdefault(disk, Coverage()).add(start, end)
        return bool(holds)

    def _hash(self, fields: bytes | memoryview) -> int:
        return xxh3_64_intdigest(fields, self._number)


def journal_name(number: int) -> str:
    """File name of an epoch's journal."""
    return f"epoch-{number}.coverage"


def remove_journal(held: HeldDirectory, number: int) -> None:
    """The epoch is sealed or given up: its journal, if there is one, says nothing any more."""
    held.remove(journal_name(number))
