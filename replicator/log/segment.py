"""One segment file: made, written a batch at a time, closed; and read, past the page cache where that goes.

Errors are ``OSError`` here; ``log.py`` makes them ours. Not here: what a segment means beside its neighbours
(``log.py``), and what is done about one that was never closed (``recovery.py``).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

from replicator import linux
from replicator.failpoints import reach
from replicator.files import Files
from replicator.log.gather import Frame, Scratch, paged
from replicator.log.records import (
    ALIGN,
    ROW_BYTES,
    Batch,
    Identity,
    Mark,
    Position,
    Trailer,
    index_bytes,
    pack_batch,
    pack_index,
    pack_segment,
    pack_trailer,
    record_bytes,
    segment_name,
)

_PIECES_MAX: Final = 1024  # IOV_MAX of Linux
_NO_DIRECT: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
_NO_FALLOCATE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

_log = logging.getLogger(__name__)


class SegmentFile:
    """A segment's file, open with O_DIRECT as long as the file system takes it. Memory given to it is
    page-aligned, offsets and lengths are whole blocks.

    Attributes:
        name: in its directory.
        size_bytes: as last seen.
    """

    def __init__(self, files: Files, dir_fd: int, name: str, flags: int) -> None:
        self.name = name
        self._files = files
        self._dir_fd = dir_fd
        self._flags = flags
        self._fd, self._direct = self._open()
        self._fds = [self._fd]
        try:
            status = files.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EOPNOTSUPP, "not a regular file", name)
        except OSError:
            self.close()
            raise
        self.size_bytes = status.st_size

    def write(self, pieces: Iterable[memoryview], offset: int) -> None:
        """Write all of ``pieces``, one behind the other, however short the single writes are."""
        left = [piece for piece in pieces if piece]
        while left:
            try:
                count = self._files.pwritev(self._fd, left[:_PIECES_MAX], offset)
            except OSError as error:
                self._give_up_direct(error)
                continue
            if count == 0:  # POSIX leaves it open; without this it would be tried for ever
                raise OSError(errno.EIO, f"wrote nothing at {offset}", self.name)
            offset += count
            left = _behind(left, count)

    def read(self, view: memoryview, offset: int) -> memoryview:
        """Fill ``view`` from ``offset``; returns the part of it that the file has."""
        if offset + len(view) > self.size_bytes:  # it may be one that is being written
            self.size_bytes = self._files.fstat(self._fd).st_size
        wanted = max(0, min(len(view), self.size_bytes - offset))
        done = 0
        while done < wanted:
            try:
                count = self._files.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                self._give_up_direct(error)
                continue
            if count == 0:
                raise OSError(errno.EIO, "the file became shorter", self.name)
            done += count
        return view[:wanted]

    def allocate(self, size_bytes: int) -> None:
        """Have the file system set space aside, where it can; the file does not grow."""
        try:
            self._files.fallocate(self._fd, linux.FALLOC_FL_KEEP_SIZE, 0, size_bytes)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise

    def truncate(self, size_bytes: int) -> None:
        """Cut it off there, with what was set aside behind."""
        self._files.truncate(self._fd, size_bytes)

    def sync_data(self) -> None:
        """fdatasync; an error is final for the file."""
        self._files.fdatasync(self._fd)

    def sync(self) -> None:
        """fsync; an error is final for the file."""
        self._files.fsync(self._fd)

    def close(self) -> None:
        """Let go of it. Idempotent."""
        fds, self._fds, self._fd = self._fds, [], -1
        for fd in fds:
            if not self._direct:
                with suppress(OSError):  # only advice
                    self._files.drop_cache(fd)
            self._files.close(fd)

    def _open(self) -> tuple[int, bool]:
        flags = self._flags | os.O_NONBLOCK  # a FIFO must not hold us
        try:
            fd = self._files.open_beneath(self._dir_fd, self.name, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
        else:
            said = linux.direct_alignment(fd)
            if said is None or max(said) <= ALIGN:
                return fd, True
            self._files.close(fd)
        # Again without it. Some file systems have made the file before they refuse.
        return self._open_buffered(flags & ~os.O_EXCL), False

    def _open_buffered(self, flags: int) -> int:
        fd = self._files.open_beneath(self._dir_fd, self.name, flags)
        with suppress(OSError):  # only advice: what is read shall come from the medium
            self._files.drop_cache(fd)
        return fd

    def _give_up_direct(self, error: OSError) -> None:
        """Go on through the page cache if ``error`` says that O_DIRECT does not work, else raise it."""
        if not self._direct or error.errno not in _NO_DIRECT:
            raise error
        _log.warning("%s: O_DIRECT is refused here (%s)", self.name, error.strerror)
        fd = self._open_buffered(self._flags & ~(os.O_CREAT | os.O_EXCL))
        self._fds.append(fd)  # another thread may be reading through the old one
        self._fd, self._direct = fd, False


class OpenSegment:
    """A segment that is not closed. It takes the file over.

    Attributes:
        identity: what its blocks name.
        room_bytes: how large it may become, index and trailer included.
        end: behind its last batch.
        rows, marks: of the index, so far.
    """

    def __init__(self, file: SegmentFile, identity: Identity, room_bytes: int, seed: int) -> None:
        self.identity = identity
        self.room_bytes = room_bytes
        self.end = ALIGN
        self.rows = bytearray()
        self.marks: list[Mark] = []
        self._file = file
        self._seed = seed

    @classmethod
    def create(
        cls,
        files: Files,
        dir_fd: int,
        identity: Identity,
        previous_end: int,
        room_bytes: int,
        seed: int,
    ) -> OpenSegment:
        """A new segment, durable in its directory; ``FileExistsError`` if there is one of its name."""
        name = segment_name(identity.kind, identity.epoch, identity.segment)
        reach("log.before_create")
        file = SegmentFile(files, dir_fd, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            file.allocate(room_bytes)
            header = pack_segment(identity, previous_end, seed)
            file.write([paged(header)], 0)
            file.sync()
            files.fsync(dir_fd)
        except OSError:
            file.close()
            with suppress(OSError):  # a recovery removes it, too
                files.unlink(dir_fd, name)
            raise
        reach("log.created")
        return cls(file, identity, room_bytes, seed)

    def resume(self, end: int, rows: bytes | bytearray, marks: Iterable[Mark]) -> None:
        """Take it that the segment ends there and has this index so far."""
        self.end, self.rows, self.marks = end, bytearray(rows), list(marks)

    def fits(self, frames: Sequence[Frame]) -> bool:
        """Whether a batch of these leaves room for the index."""
        records = len(self.rows) // ROW_BYTES + len(frames)
        index = index_bytes(records, len(self.marks) + 1)
        return self.end + batch_bytes(frames) + index + ALIGN <= self.room_bytes

    def make_room(self, room_bytes: int) -> None:
        """Let it become as large as this."""
        self._file.allocate(room_bytes)
        self.room_bytes = room_bytes

    def append(self, frames: Sequence[Frame], previous: Position, note: int, scratch: Scratch) -> None:
        """Write one batch; durable on return. After an error nothing more may be done with the file."""
        position = self.end + batch_bytes(frames) - ALIGN
        record = pack_batch(self.identity, position, Batch(len(frames), previous, note), self._seed)
        gathered = scratch.gather(frames, self.end, record, self._seed)
        reach("log.before_write")
        self._file.write(gathered.pieces, self.end)
        self._file.sync_data()
        reach("log.written")
        self.rows += b"".join(gathered.rows)
        self.marks.append(Mark(position, note))
        self.end = position + ALIGN

    def finish(self, *, last: bool) -> int:
        """Write index and trailer, durably, and cut off what is behind; returns the file's size in bytes."""
        trailer = Trailer(self.end, len(self.rows) // ROW_BYTES, len(self.marks), last)
        index = pack_index(self.identity, self.end, self.rows, self.marks, self._seed)
        content = index + pack_trailer(self.identity, trailer, self._seed)
        size_bytes = self.end + len(content)
        reach("log.before_finish")
        # Before the cut: it gives back the space that was set aside for them.
        self._file.write([paged(content)], self.end)
        self._file.truncate(size_bytes)
        self._file.sync()
        reach("log.finished")
        self.close()
        return size_bytes

    def close(self) -> None:
        """Let go of the file as it is. Idempotent."""
        self._file.close()


def batch_bytes(frames: Sequence[Frame]) -> int:
    """Bytes of a batch in its segment."""
    return sum(record_bytes(header) for header, _ in frames) + ALIGN


def first_room_bytes(frames: Sequence[Frame], segment_bytes: int) -> int:
    """Room of a new segment that is to begin with this batch."""
    return max(segment_bytes, ALIGN + batch_bytes(frames) + index_bytes(len(frames), 1) + ALIGN)


def _behind(pieces: list[memoryview], count: int) -> list[memoryview]:
    """What is left of ``pieces`` after their first ``count`` bytes."""
    for number, piece in enumerate(pieces):
        if count < len(piece):
            return [piece[count:], *pieces[number + 1 :]]
        count -= len(piece)
    return []
