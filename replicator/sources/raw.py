"""A disk that lies in a raw file or is a block device; opened for reading only, never changed.

Holes are asked of the file system, not searched for: zeros that are stored are data here. Not here: formats
that wrap a disk (VMDK, VHD), and the tracking of changes between cycles.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple, ParamSpec, Self, TypeVar

from protocol.constants import SECTOR_BYTES
from protocol.payload import Extent
from replicator.errors import SourceError
from replicator.files import Files, read_fully
from replicator.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")

EXTENTS_A_CALL = 2048  # 2-4 ms of system calls: the hand-over to a worker is paid once for all of them
TICK_NS = 10_000_000  # file times advance by the kernel's tick; this is the slowest, at 100 Hz

_NO_HOLES = (errno.EINVAL, errno.EOPNOTSUPP)  # SEEK_DATA is not known here (block devices, some file systems)


class _Identity(NamedTuple):
    """What of a file changes when somebody writes to it."""

    modified_ns: int
    changed_ns: int


class RawSource:
    """A raw file or block device as a ``Source`` (``base.py``). Made by ``open``.

    Attributes:
        name, size_bytes: see ``Source``.
        watched: a change is seen as one, so that after it another pass may find the disk at rest.
    """

    def __init__(self, files: Files, workers: Workers, path: str, quiesced: bool) -> None:
        self.name = path
        self.size_bytes = 0
        self.watched = False
        self._files = files
        self._workers = workers
        self._quiesced = quiesced
        self._fd = -1
        self._is_device = False
        self._identity = _Identity(0, 0)
        self._settled = True
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, files: Files, workers: Workers, path: str | os.PathLike[str], *, quiesced: bool = False
    ) -> Self:
        """Open ``path``, a file or a block device of whole sectors.

        Args:
            files: the I/O seam.
            workers: where blocking calls go; closed later than the source.
            path: as the operator gave it; symbolic links are followed.
            quiesced: the caller vouches that nobody writes to this device while it is open. Without that a
                device counts as changed, since nothing about it tells. Files are watched in any case.

        Raises:
            SourceError: ``source.missing``, ``source.unreadable``, ``source.unsuitable``, ``source.empty``,
                ``source.misaligned``. Nothing stays open.
        """
        source = cls(files, workers, os.fspath(path), quiesced)
        try:
            await source._call(source._open)
            if source._just_written(source._identity):
                # Two writes within a tick leave the same times; from three ticks on they can be told apart.
                await asyncio.sleep(3 * TICK_NS / 1e9)
                source._identity = await source._call(source._look)
                source._settled = not source._just_written(source._identity)
        except BaseException:  # a cancelled caller too: the call under way may have opened the file
            await source.close()
            raise
        return source

    async def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        """See ``Source.extents``. Extents of one kind may touch; one may be as long as the disk."""
        if start % SECTOR_BYTES or not 0 <= start <= self.size_bytes:
            raise ValueError(f"position {start} is not a sector of a disk of {self.size_bytes} bytes")
        while start < self.size_bytes:
            found = await self._call(self._map, start)
            for extent in found:
                yield extent
            start = found[-1].end

    async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        """See ``Source.read_into``. At most as many calls run at once as there are workers."""
        if sum(extent.length for extent in extents) != len(view):
            raise ValueError(f"extents and memory of {len(view)} bytes differ in length")
        if any(not 0 <= extent.offset < extent.end <= self.size_bytes for extent in extents):
            raise ValueError(f"an extent is outside a disk of {self.size_bytes} bytes")
        return await self._call(self._read, extents, view, then)

    async def fingerprint(self) -> str:
        """See ``Source.fingerprint``: size and times of a file.

        A device tells nothing of what it was, nor does a file that was written just now.
        """
        identity = await self._call(self._look)
        if self._is_device or self._just_written(identity):
            return ""
        return f"{self.size_bytes} {identity.modified_ns} {identity.changed_ns}"

    async def changed(self) -> bool:
        """See ``Source.changed``: by size and times; a device counts as changed unless it is quiesced."""
        identity = await self._call(self._look)
        if self._is_device:
            return not self._quiesced
        return identity != self._identity or not self._settled

    async def close(self) -> None:
        """See ``Source.close``. Waits for calls under way: nothing else may get their descriptor."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._idle.wait()
        if self._fd >= 0:
            await self._workers.run(self._files.close, self._fd)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._closing is not None:
            raise ValueError(f"{self.name} is closed")
        self._calls += 1
        self._idle.clear()
        try:
            return await self._workers.run(function, *args, **kwargs)
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def _just_written(self, identity: _Identity) -> bool:
        """Whether a further write may leave the same times. Times far ahead are a file server's own."""
        return not self._is_device and abs(time.time_ns() - max(identity)) < 2 * TICK_NS

    # What follows blocks and runs in a worker.

    def _open(self) -> None:
        try:
            self._fd = _open_read_only(self._files, self.name)
            found = self._files.fstat(self._fd)
            self._is_device = stat.S_ISBLK(found.st_mode)
            self.watched = not self._is_device
            if self.watched and not stat.S_ISREG(found.st_mode):
                raise _unsuitable(self.name, _KINDS.get(stat.S_IFMT(found.st_mode), "something else"))
            size = self._files.device_size(self._fd) if self._is_device else found.st_size
        except OSError as error:
            raise _not_opened(self.name, error) from error
        if size == 0:
            raise _empty(self.name, self._is_device)
        if size % SECTOR_BYTES:
            raise _misaligned(self.name, size)
        self.size_bytes = size
        self._identity = _Identity(found.st_mtime_ns, found.st_ctime_ns)

    def _look(self) -> _Identity:
        try:
            found = self._files.fstat(self._fd)
            size = self._files.device_size(self._fd) if self._is_device else found.st_size
        except OSError as error:
            raise self._read_failed(0, self.size_bytes, error) from error
        if size > self.size_bytes:
            raise _grew(self.name, self.size_bytes, size)
        if size < self.size_bytes:
            raise _shrank(self.name, self.size_bytes, size)
        return _Identity(found.st_mtime_ns, found.st_ctime_ns)

    def _read(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        position = 0
        for extent in extents:
            part = view[position : position + extent.length]
            position += extent.length
            try:
                count = read_fully(self._files, self._fd, part, extent.offset)
            except OSError as error:
                raise self._read_failed(extent.offset, extent.end, error) from error
            if count < extent.length:
                raise _shrank(self.name, self.size_bytes, extent.offset + count)
        return then()

    def _map(self, start: int) -> list[Extent]:
        """The next extents from ``start``: at least one, at most about ``EXTENTS_A_CALL``.

        The bounds of data are widened to whole sectors. Positions given to ``seek`` are absolute and its
        answer does not depend on the descriptor's own position, so that calls may run side by side.
        """
        found: list[Extent] = []
        try:
            while start < self.size_bytes and len(found) < EXTENTS_A_CALL:
                data = self._next_data(start)
                first = max(start, data - data % SECTOR_BYTES)
                if first > start:
                    found.append(Extent(start, first - start, zero=True))
                if data == self.size_bytes:
                    break
                hole = self._next_hole(data)
                # At least a sector: a hole punched between the two questions must not stop the walk.
                end = min(max(hole + -hole % SECTOR_BYTES, first + SECTOR_BYTES), self.size_bytes)
                found.append(Extent(first, end - first))
                start = end
        except OSError as error:
            raise self._read_failed(start, self.size_bytes, error) from error
        return found

    def _next_data(self, start: int) -> int:
        """Where data begins at or behind ``start``; the disk's size when there is none."""
        try:
            return min(self._files.seek(self._fd, start, os.SEEK_DATA), self.size_bytes)
        except OSError as error:
            if error.errno in _NO_HOLES:
                return start
            if error.errno != errno.ENXIO:
                raise
        self._look()  # ENXIO: a hole up to the end, or the end came before ``start``
        return self.size_bytes

    def _next_hole(self, data: int) -> int:
        try:
            return self._files.seek(self._fd, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno in _NO_HOLES:
                return self.size_bytes
            if error.errno != errno.ENXIO:
                raise
        self._look()
        return data

    def _read_failed(self, start: int, end: int, error: OSError) -> SourceError:
        return SourceError(
            "source.read_failed",
            f"bytes [{start}, {end}) of {self.name} cannot be read: {os.strerror(error.errno or errno.EIO)}",
            cause="the disk, its controller or the connection to it is failing",
            fix="see the kernel's log (dmesg); copy the disk to a sound one or repair it, then try again",
        )


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
}


def _open_read_only(files: Files, path: str) -> int:
    # O_NONBLOCK: the opening of a FIFO would wait for its writer; for files and disks it means nothing.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return files.open(path, flags | os.O_NOATIME)
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
        return files.open(path, flags)  # O_NOATIME is for a file's owner only


def _not_opened(path: str, error: OSError) -> SourceError:
    reason = os.strerror(error.errno or errno.EIO)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return SourceError(
            "source.missing",
            f"there is no {path}",
            cause="the path is misspelt, or the disk is not attached or mounted",
            fix="check the path; lsblk shows the block devices that are there",
        )
    if error.errno in (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
        return _unsuitable(path, f"something without a disk behind it ({reason})")
    return SourceError(
        "source.unreadable",
        f"{path} cannot be opened for reading: {reason}",
        cause="this user may not read it, or a folder on the way to it",
        fix="run as a user who may, or grant it: for block devices that is the group disk",
    )


def _unsuitable(path: str, what: str) -> SourceError:
    return SourceError(
        "source.unsuitable",
        f"{path} is {what}, not a disk",
        cause="a source is a raw disk image (a regular file) or a block device",
        fix="name the image or the device itself",
    )


def _empty(path: str, is_device: bool) -> SourceError:
    return SourceError(
        "source.empty",
        f"{path} has no bytes",
        cause="no medium or backing file is attached"
        if is_device
        else "the image was created and never filled",
        fix="check that this is the disk that was meant",
    )


def _misaligned(path: str, size: int) -> SourceError:
    return SourceError(
        "source.misaligned",
        f"{path} has {size} bytes, which is not a multiple of {SECTOR_BYTES}",
        cause="it is not a raw disk image, or its copy ended early",
        fix=f"copy the image again; if it is whole, pad it: truncate --size=%{SECTOR_BYTES} FILE",
    )


def _grew(path: str, expected: int, found: int) -> SourceError:
    return SourceError(
        "source.grew",
        f"{path} grew from {expected} to {found} bytes while it was being read",
        cause="somebody resized it or is still writing it",
        fix="wait until that is done, then start again: the disk's new size needs a new image",
    )


def _shrank(path: str, expected: int, found: int) -> SourceError:
    return SourceError(
        "source.shrank",
        f"{path} ends at {found} bytes, {expected} were there when it was opened",
        cause="somebody truncated, replaced or resized it meanwhile",
        fix="find out who writes to it; start again once its size is settled",
    )
