"""The write engine: an image in a file or device that can be written at any byte.

Long runs go past the page cache (O_DIRECT), edges and small extents through it, zeros by the cheapest means
that leaves zeros. Nothing is read in order to write: a read-modify-write would lose a neighbour's sectors.
What the file is, and how it comes to be, is for ``flat_vmdk.py`` and ``device.py``.

Why neighbours are safe. A direct run is cut to whole pages and whole blocks of the file system, all of which
lie in the run; so no page holds both a part of it and bytes of somebody else, and the kernel, which throws a
direct write's pages out of its cache, throws out none that a neighbour dirtied. Sectors of different writers
that share a page meet in buffered writes only, where the kernel locks the page; holes and zeroed ranges
exclude writers by the inode's lock. A page that the kernel cannot throw out (somebody reads the image through
the cache with large read-ahead just then) turns into a buffered write or, at worst, into an error of the next
sync: loud, never silent.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from threading import Lock
from typing import Final, NamedTuple

from protocol.constants import KIB, MIB
from protocol.messages import Interval
from protocol.payload import Extent
from replicator import linux
from replicator.buffers import address_of
from replicator.errors import ReplicatorError, TargetError
from replicator.failpoints import reach
from replicator.files import Files, write_fully
from replicator.images.opening import failure
from replicator.images.reading import (
    Digested,
    Part,
    digest_blocks,
    gather,
    read_ahead,
    read_cluster,
    read_whole,
)

# Below, the page cache gathers writes better than a disk takes them one by one.
DIRECT_MIN_BYTES: Final = 64 * KIB

# The largest block of any Linux file system; what states more (NFS) means its transfer size.
_BLOCK_MAX_BYTES: Final = 64 * KIB
# Safe wherever the kernel does not say.
_UNSAID: Final = linux.DirectAlignment(memory=4 * KIB, offset=4 * KIB)
_NO_DIRECT: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
_NO_SUCH_ZEROING: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY})
_ZEROS: Final = memoryview(mmap.mmap(-1, MIB))

_log = logging.getLogger(__name__)


class ZeroMethod(NamedTuple):
    """A way to zero a range without sending zeros.

    ``apply(files, fd, offset, length)``: offset and length are multiples of ``granule_bytes``.
    """

    apply: Callable[[Files, int, int, int], None]
    granule_bytes: int


def _punch(files: Files, fd: int, offset: int, length: int) -> None:
    files.fallocate(fd, linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE, offset, length)


def _zero_range(files: Files, fd: int, offset: int, length: int) -> None:
    files.fallocate(fd, linux.FALLOC_FL_ZERO_RANGE | linux.FALLOC_FL_KEEP_SIZE, offset, length)


def _zero_device(files: Files, fd: int, offset: int, length: int) -> None:
    files.zero_device(fd, offset, length)


# The file systems zero the edges of a range themselves, to the byte.
THIN_ZEROING: Final = (ZeroMethod(_punch, 1), ZeroMethod(_zero_range, 1))
THICK_ZEROING: Final = (ZeroMethod(_zero_range, 1),)


def file_zeroing(thin: bool) -> tuple[ZeroMethod, ...]:
    """How to zero a range of a file: thin ones give the space back, thick ones never do."""
    return THIN_ZEROING if thin else THICK_ZEROING


def device_zeroing(sector_bytes: int) -> tuple[ZeroMethod, ...]:
    """How to zero a range of a block device with logical sectors of this size.

    Whole pages only: the kernel empties its cache of the range, and a shared page is a neighbour's too.
    """
    return (ZeroMethod(_zero_device, max(mmap.PAGESIZE, sector_bytes)),)


class FileImage:
    """An ``Image`` behind a file descriptor, which it takes over.

    While it is ``blank``, zero extents are skipped. So the caller writes each byte at most once while it is:
    data followed by zeros at the same place would stay data. A write that fails ends it, since it may be
    repeated.

    Attributes:
        name, size_bytes, blank: see ``Image``.
        direct: whether long runs go past the page cache.
        note: in words, what an operator should know about how this image is written; None when all is as
            intended.
    """

    def __init__(
        self,
        files: Files,
        name: str,
        fd: int,
        size_bytes: int,
        *,
        blank: bool,
        zeroing: tuple[ZeroMethod, ...],
    ) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.blank = blank
        self.direct = True
        self.note: str | None = None
        self._files = files
        self._fd = fd
        self._zeroing = zeroing
        self._syncing = Lock()  # the kernel reports a failed writeback to one fdatasync of several under way
        self._sync_failed = False
        self._direct_fd, self._align = self._open_direct()

    def write(self, extents: Sequence[Extent], payload: memoryview) -> None:
        """See ``Image.write``. Runs in writable, page-aligned memory are the fast ones."""
        self._refuse_after_failed_sync()
        runs = list(_runs(extents))
        if not runs:
            return
        if runs[-1].end > self.size_bytes or sum(run.length for run in runs if not run.zero) != len(payload):
            raise ValueError(f"extents and payload do not fit each other or {self.name}")
        position = offset = 0
        try:
            for offset, length, zero in runs:
                if not zero:
                    self._write_run(offset, payload[position : position + length])
                    position += length
                elif not self.blank:
                    self._zero(offset, length)
        except OSError as error:
            self.blank = False
            raise failure(
                error, "target.write_failed", f"cannot write {self.name} at byte {offset}"
            ) from error

    def read_ahead(self, extents: Sequence[Extent]) -> None:
        """See ``Image.read_ahead``. What goes past the page cache is not asked for."""
        short = (run for run in _runs(extents) if run.length < DIRECT_MIN_BYTES)
        try:
            read_ahead(self._files, self._fd, short)
        except OSError as error:
            raise self._read_failure(error) from error

    def read_into(self, extents: Sequence[Extent], view: memoryview) -> None:
        """See ``Image.read_into``."""
        self._refuse_after_failed_sync()
        runs = list(_runs(extents))
        if sum(run.length for run in runs) != len(view) or any(run.end > self.size_bytes for run in runs):
            raise ValueError(f"extents and memory do not fit each other or {self.name}")
        try:
            self._read_runs(runs, view)
        except OSError as error:
            raise self._read_failure(error) from error

    def digests(self, intervals: Sequence[Interval], block: int, seed: int, most: int) -> Digested:
        """See ``Image.digests``."""
        try:
            return digest_blocks(self._files, self._fd, intervals, block, seed, most)
        except OSError as error:
            raise self._read_failure(error) from error

    def sync(self) -> None:
        """See ``Image.sync``."""
        with self._syncing:
            self._refuse_after_failed_sync()
            reach("image.before_sync")
            try:
                self._files.fdatasync(self._fd)
            except OSError as error:
                self._sync_failed = True
                with suppress(OSError):  # what was lost shall not be read, and found equal, from the cache
                    self._files.drop_cache(self._fd)
                raise self._sync_failure(error.strerror or str(error)) from error
            reach("image.synced")

    def close(self) -> None:
        """See ``Image.close``. No call may be under way."""
        still_open = {self._fd, self._direct_fd} - {-1}
        self._fd = self._direct_fd = -1
        for fd in still_open:
            with suppress(OSError):  # it could only say that something is not durable, which is not promised
                self._files.close(fd)

    # ------------------------------------------------------------------ data

    def _read_runs(self, runs: Sequence[Extent], view: memoryview) -> None:
        cached: list[Part] = []
        direct: list[Part] = []
        position = 0
        for offset, length, _ in runs:
            part = view[position : position + length]
            position += length
            first, behind = self._direct_part(offset, part)
            if first:
                cached.append(Part(offset, part[:first]))
            if first < behind:
                direct.append(Part(offset + first, part[first:behind]))
            if behind < length:
                cached.append(Part(offset + behind, part[behind:]))
        for offset, part in direct:
            done = self._read_direct(part, offset)
            read_whole(self._files, self._fd, part[done:], offset + done)
        for cluster in gather(cached):
            read_cluster(self._files, self._fd, cluster)

    def _read_direct(self, view: memoryview, offset: int) -> int:
        """Read once, past the page cache; returns how much was read. The rest is for a buffered read."""
        try:
            return self._files.preadv(self._direct_fd, [view], offset)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self._give_up_direct(error)
            return 0

    def _read_failure(self, error: OSError) -> ReplicatorError:
        return failure(error, "target.read_failed", f"cannot read {self.name}")

    def _write_run(self, offset: int, data: memoryview) -> None:
        done = 0
        first, behind = self._direct_part(offset, data)
        if first < behind:
            write_fully(self._files, self._fd, data[:first], offset)
            done = first + self._write_direct(data[first:behind], offset + first)
        write_fully(self._files, self._fd, data[done:], offset + done)

    def _direct_part(self, offset: int, data: memoryview) -> tuple[int, int]:
        """Which part of ``data`` may go past the page cache, as [first, behind); empty when none."""
        if not self.direct or len(data) < DIRECT_MIN_BYTES:
            return 0, 0
        first = -offset % self._align.offset
        address = address_of(data)
        if address is None or (address + first) % self._align.memory:
            return 0, 0
        return first, len(data) - (offset + len(data)) % self._align.offset

    def _write_direct(self, data: memoryview, offset: int) -> int:
        """Write once, past the page cache; returns how much was written. The rest is for a buffered write."""
        try:
            return self._files.pwrite(self._direct_fd, data, offset)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self._give_up_direct(error)
            return 0

    def _open_direct(self) -> tuple[int, linux.DirectAlignment]:
        """A second descriptor of the very same file: by name it might be another one by now."""
        try:
            fd = self._files.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_DIRECT)
        except OSError as error:
            self._give_up_direct(error)
            return -1, _UNSAID
        said = linux.direct_alignment(fd) or _UNSAID
        block = os.fstat(fd).st_blksize
        offset = max(mmap.PAGESIZE, _UNSAID.offset, said.offset, block if block <= _BLOCK_MAX_BYTES else 0)
        return fd, linux.DirectAlignment(said.memory, offset)

    def _give_up_direct(self, error: OSError) -> None:
        if self.direct:
            self.direct = False
            self.note = (
                f"{self.name}: O_DIRECT is refused here ({error.strerror}): all goes through the page cache"
            )
            _log.warning("%s", self.note)

    # ------------------------------------------------------------------ zeros

    def _zero(self, offset: int, length: int) -> None:
        while self._zeroing:
            method = self._zeroing[0]
            first = min(length, -offset % method.granule_bytes)
            behind = max(first, length - (offset + length) % method.granule_bytes)
            try:
                if first < behind:
                    method.apply(self._files, self._fd, offset + first, behind - first)
            except OSError as error:
                if error.errno not in _NO_SUCH_ZEROING:
                    raise
                self._zeroing = tuple(other for other in self._zeroing if other is not method)
                continue
            self._write_zeros(offset, first)
            self._write_zeros(offset + behind, length - behind)
            return
        self._write_zeros(offset, length)

    def _write_zeros(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            part = min(
                end - offset, len(_ZEROS) - offset % len(_ZEROS)
            )  # up to a boundary, so that most are direct
            self._write_run(offset, _ZEROS[:part])
            offset += part

    # ------------------------------------------------------------------ a failed sync

    def _refuse_after_failed_sync(self) -> None:
        if self._sync_failed:
            raise self._sync_failure("an earlier sync failed")

    def _sync_failure(self, reason: str) -> TargetError:
        return TargetError(
            "target.sync_failed",
            f"cannot make {self.name} durable: {reason}",
            cause="the disk under it lost writes; the kernel forgets them: another sync would prove nothing",
            fix="check the disk and the kernel log, then start again: the image is opened anew and verified",
        )


def _runs(extents: Sequence[Extent]) -> Iterator[Extent]:
    """Extents with neighbours of the same kind joined; the payload of joined ones lies together already."""
    run: Extent | None = None
    for extent in extents:
        if run is not None and extent.offset == run.end and extent.zero == run.zero:
            run = Extent(run.offset, run.length + extent.length, run.zero)
        else:
            if run is not None:
                yield run
            run = extent
    if run is not None:
        yield run
