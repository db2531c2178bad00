"""Making and opening what an image lies in, and saying what went wrong there.

Only files of our own folder, reached without symbolic links. Not for writing blocks: that is ``writer.py``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from protocol.constants import DISK_MAX_BYTES, MIB, SECTOR_BYTES
from replicator.errors import ReplicatorError, SpaceError, TargetError
from replicator.failpoints import reach
from replicator.files import Files, write_fully

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_FALLOCATE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

# errno -> (code, cause, fix), for what says more than "it failed"
_KNOWN: Final = {
    errno.EROFS: (
        "target.read_only",
        "the file system is mounted read-only, perhaps since an I/O error",
        "look into the kernel log, repair the file system and mount it writable",
    ),
    errno.EBUSY: (
        "target.device_busy",
        "the device is mounted, part of a volume or RAID, or open elsewhere",
        "unmount it (lsblk shows who holds it), or name another device",
    ),
    errno.EEXIST: (
        "target.exists",
        "a disk of this name is already there",
        "choose another name, or move the old files away",
    ),
    errno.ENOENT: (
        "target.missing",
        "it is not there",
        "check the name, and whether the datastore is mounted",
    ),
    errno.ENXIO: ("target.missing", "no device answers there", "check that the disk is attached"),
    errno.ELOOP: (
        "target.not_a_file",
        "a symbolic link stands in its place",
        "find out who put it there; the file itself must be in the folder",
    ),
    errno.EXDEV: (
        "target.not_a_file",
        "the path leads out of the folder",
        "put the file itself into the folder",
    ),
}


def failure(error: OSError, code: str, what: str) -> ReplicatorError:
    """Our error for an ``OSError``: by errno where that says enough, else a ``TargetError`` with ``code``."""
    if error.errno in _FULL:
        return SpaceError(
            "target.full",
            what,
            cause="the file system or the quota is full",
            fix="free some space there and start again: it goes on where it stopped",
        )
    reason = error.strerror or str(error)
    fallback = (code, reason, "look into the kernel log of the master target; check the disk and its mount")
    code, cause, fix = _KNOWN.get(error.errno or 0, fallback)
    return TargetError(code, f"{what}: {reason}", cause=cause, fix=fix)


def refuse_size(size_bytes: int, what: str) -> None:
    """Raise ``target.bad_size`` unless it is a size that a disk can have."""
    if not 0 < size_bytes <= DISK_MAX_BYTES or size_bytes % SECTOR_BYTES:
        raise TargetError(
            "target.bad_size",
            f"{what} has {size_bytes} bytes",
            cause=f"a disk is a whole number of sectors of {SECTOR_BYTES} bytes, and not empty",
            fix="name the disk itself, or make it again with the right size",
        )


def open_datastore(files: Files, path: Path) -> int:
    """A descriptor of the directory where VMDKs lie, which is there and can be written to.

    Raises:
        TargetError: ``target.missing``, ``target.unusable``, ``target.read_only``.
    """
    try:
        fd = files.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise TargetError(
            "target.missing",
            f"{path} does not exist",
            cause="a wrong path, or a datastore that is not mounted",
            fix="create the directory or mount the datastore; it is never created here, so that "
            "nothing lands below an empty mount point",
        ) from None
    except OSError as error:
        raise TargetError(
            "target.unusable",
            f"{path} cannot be used: {error.strerror}",
            cause="it is no directory, or this user may not open it",
            fix="give a directory that this user owns",
        ) from None
    flags = os.fstatvfs(fd).f_flag
    if flags & os.ST_RDONLY or not os.access(path, os.W_OK):
        files.close(fd)
        raise TargetError(
            "target.read_only",
            f"{path} cannot be written to",
            cause="the file system is mounted read-only, or this user lacks the right",
            fix="mount it read-write, or give this user the right to write",
        )
    return fd


def open_file(files: Files, dir_fd: int, name: str, flags: int) -> tuple[int, os.stat_result]:
    """Open a regular file of this folder; returns the descriptor and what fstat(2) says.

    Raises:
        FileNotFoundError: it is not there. TargetError: ``target.not_a_file``, ``target.read_only``,
            ``target.open_failed``.
    """
    try:
        fd = files.open_beneath(dir_fd, name, flags | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO must not hold us
    except FileNotFoundError:
        raise
    except OSError as error:
        raise failure(error, "target.open_failed", f"cannot open {name}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        files.close(fd)
        raise not_a_file(name)
    return fd, status


def claim(fd: int, name: str) -> None:
    """Keep every other writer of ours away from the file at ``fd``, until it is closed.

    Raises:
        TargetError: ``target.in_use``.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TargetError(
            "target.in_use",
            f"{name} is being written by another master target",
            cause="two `replicator receive` use the same directory and the same disk name",
            fix="stop one of them, or give the disk another name with --disk",
        ) from None
    except OSError as error:
        raise failure(error, "target.open_failed", f"cannot lock {name}") from error


def not_a_file(name: str) -> TargetError:
    """The refusal of what is neither a regular file nor, where one may be named, a block device."""
    return TargetError(
        "target.not_a_file",
        f"{name} is not a disk",
        cause="it is a folder, pipe or other special file",
        fix="name a regular file or a block device",
    )


def exists(dir_fd: int, name: str) -> bool:
    """Whether the folder has an entry of this name, be it a dangling link."""
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def create_file(files: Files, dir_fd: int, name: str, size_bytes: int, *, thin: bool) -> int:
    """Make a new file of this size, durable in its folder; returns its descriptor, open for writing.

    It reads as zeros; a thick one has all its space. After an error nothing is left behind.

    Raises:
        SpaceError: ``target.full``. TargetError: ``target.exists``, ``target.bad_size``,
            ``target.read_only``, ``target.create_failed``.
    """
    refuse_size(size_bytes, name)
    reach("image.before_create")
    try:
        fd = files.open_beneath(dir_fd, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except OSError as error:
        raise failure(error, "target.create_failed", f"cannot create {name}") from error
    try:
        claim(fd, name)
        if thin:
            files.truncate(fd, size_bytes)
        else:
            _allocate(files, fd, size_bytes)
        files.fsync(fd)
        files.fsync(dir_fd)
    except OSError as error:
        _remove(files, dir_fd, name, fd)
        raise failure(error, "target.create_failed", f"cannot create {name} of {size_bytes} bytes") from error
    reach("image.created")
    return fd


def _allocate(files: Files, fd: int, size_bytes: int) -> None:
    try:
        files.fallocate(fd, 0, 0, size_bytes)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        zeros = memoryview(bytes(MIB))
        for offset in range(0, size_bytes, MIB):
            write_fully(files, fd, zeros[: size_bytes - offset], offset)


def _remove(files: Files, dir_fd: int, name: str, fd: int) -> None:
    """Undo a making that failed; that failure is what the operator is told, not one in here."""
    files.close(fd)
    with suppress(OSError):
        files.unlink(dir_fd, name)
