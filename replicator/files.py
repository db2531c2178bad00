"""The I/O seam: every durable step of ours goes through one small object.

``Files`` is the real file system. Tests put their own object of the same shape in its place: it records,
tears, forgets what was not synced, and fails at the k-th call. All methods block; ``workers.py`` keeps them
off the loop. Not here: what is written where, and in which order; that is the business of the callers.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from replicator import linux
from replicator.failpoints import reach

_PIECE_BYTES: Final = 64 * 1024


class Files:
    """System calls on files and directories. Offsets and lengths are bytes; errors are ``OSError``."""

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
        """Open ``path`` as given by the operator: symbolic links are followed."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def open_beneath(self, dir_fd: int, name: str, flags: int, mode: int = 0o600) -> int:
        """Open ``name`` below a directory; a path that leaves it or crosses a symbolic link is refused."""
        return linux.openat2(dir_fd, name, flags, mode, linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS)

    def close(self, fd: int) -> None:
        """Close ``fd``. What must last was synced before, by a call that told: what this one says is no news,
        and the descriptor is gone whatever it says.
        """
        try:
            os.close(fd)
        except OSError as error:
            if error.errno == errno.EBADF:  # a defect of ours: the next one could be somebody else's file
                raise

    def fstat(self, fd: int) -> os.stat_result:
        """fstat(2)."""
        return os.fstat(fd)

    def device_size(self, fd: int) -> int:
        """Size in bytes of the block device open at ``fd``."""
        return linux.block_device_size(fd)

    def seek(self, fd: int, offset: int, whence: int) -> int:
        """lseek(2), for SEEK_DATA and SEEK_HOLE: nothing of ours uses a file's own position."""
        return os.lseek(fd, offset, whence)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read once at ``offset``; returns the bytes read, which may be fewer than asked for."""
        return os.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write once at ``offset``; returns the bytes written, which may be fewer than given."""
        return os.pwrite(fd, data, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write ``buffers`` one behind the other, once; returns the bytes written, as ``pwrite``."""
        return os.pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Set the size of a file; what is added reads as zeros."""
        os.ftruncate(fd, size)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        linux.fallocate(fd, mode, offset, length)

    def zero_device(self, fd: int, offset: int, length: int) -> None:
        """Make a range of a block device read as zeros."""
        linux.block_device_zero(fd, offset, length)

    def fdatasync(self, fd: int) -> None:
        """Make a file's data durable. An error is final for the file: never retried."""
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Make a file, or a directory's entries, durable. An error is final for the file: never retried."""
        os.fsync(fd)

    def will_need(self, fd: int, offset: int, length: int) -> None:
        """Have the kernel begin to read a range that is read soon; returns before it is there."""
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)

    def drop_cache(self, fd: int) -> None:
        """Have what is read next come from the medium: the kernel forgets the file's clean pages."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def list_directory(self, dir_fd: int) -> list[str]:
        """Names of all entries of the directory open at ``dir_fd``, in no order."""
        return os.listdir(dir_fd)

    def rename(self, dir_fd: int, old: str, new: str) -> None:
        """Rename within one directory, replacing ``new``."""
        os.rename(old, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def unlink(self, dir_fd: int, name: str) -> None:
        """Remove a directory entry."""
        os.unlink(name, dir_fd=dir_fd)


def read_fully(files: Files, fd: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from ``offset``; returns fewer bytes than asked for only at the end of the file."""
    done = 0
    while done < len(view):
        count = files.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write_fully(files: Files, fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, however short the single writes are."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        count = files.pwrite(fd, view[done:], offset + done)
        if count == 0:  # POSIX leaves it open; without this it would be tried for ever
            raise OSError(errno.EIO, f"wrote nothing of {len(view) - done} bytes at {offset + done}")
        done += count


def read_small_file(files: Files, dir_fd: int, name: str, limit_bytes: int = 1 << 20) -> bytes:
    """The whole of a small file below a directory; ``OSError`` (EFBIG) when it is larger than the limit."""
    flags = os.O_RDONLY | os.O_NONBLOCK  # a FIFO put there must not hold a worker for ever
    fd = files.open_beneath(dir_fd, name, flags)
    try:
        return read_whole_file(files, fd, name, limit_bytes)
    finally:
        files.close(fd)


def read_whole_file(files: Files, fd: int, name: str, limit_bytes: int) -> bytes:
    """All of an open file, whose size costs memory, not the limit; ``name`` is for the error.

    Raises:
        OSError: EFBIG when it has more bytes than the limit, and what the kernel says.
    """
    content, piece = bytearray(), memoryview(bytearray(_PIECE_BYTES))
    while len(content) <= limit_bytes:
        count = read_fully(files, fd, piece, len(content))
        content += piece[:count]
        if count < _PIECE_BYTES:
            break
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"larger than {limit_bytes} bytes", name)
    return bytes(content)


def replace_file(files: Files, dir_fd: int, name: str, content: bytes, mode: int = 0o600) -> None:
    """Replace a small file whole and durably: after a crash it holds either the old content or the new.

    One caller at a time per name: the content is made ready under a second name, ``.NAME.new``.
    """
    temporary = f".{name}.new"
    reach("replace.before_write")
    fd = files.open_beneath(dir_fd, temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        try:
            write_fully(files, fd, content, 0)
            reach("replace.before_fsync")
            files.fsync(fd)
        finally:
            files.close(fd)
        reach("replace.before_rename")
        files.rename(dir_fd, temporary, name)
    except OSError:
        with suppress(OSError):  # why it failed is what the caller must hear
            files.unlink(dir_fd, temporary)
        raise
    reach("replace.before_fsync_dir")
    files.fsync(dir_fd)
    reach("replace.done")
