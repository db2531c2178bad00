"""The few Linux system calls that Python 3.11 lacks, one function each.

Errors are ``OSError`` with errno and path, as from ``os``. No policy here: who falls back to what is decided
by the callers.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import socket
import struct
from typing import NamedTuple

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

_SYS_OPENAT2 = 437  # the same number on every architecture, as all calls since 2019
_OPEN_HOW = struct.Struct("QQQ")

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKZEROOUT = 0x127F

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_STATX_DIO_OFFSET = 0x98  # stx_dio_mem_align, stx_dio_offset_align: linux/stat.h, since 6.1

_SIOCOUTQ = 0x5411

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]


class DirectAlignment(NamedTuple):
    """What O_DIRECT asks for: alignments in bytes of memory addresses and of file offsets and lengths."""

    memory: int
    offset: int


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch or zero ``length`` bytes at ``offset``; ``mode`` as in fallocate(2)."""
    while _libc.fallocate(fd, mode, offset, length) < 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number), f"fd {fd}")


def openat2(dir_fd: int, name: str, flags: int, mode: int, resolve: int) -> int:
    """Open ``name`` below ``dir_fd`` with the restrictions of ``resolve``; openat2(2), Linux 5.6."""
    mode = mode if flags & os.O_CREAT else 0
    how = ctypes.create_string_buffer(_OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, resolve), _OPEN_HOW.size)
    path = os.fsencode(name)
    if b"\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
    result = _libc.syscall(_SYS_OPENAT2, dir_fd, ctypes.c_char_p(path), how, ctypes.c_size_t(_OPEN_HOW.size))
    return _check(result, name)


def block_device_size(fd: int) -> int:
    """Size in bytes of the block device open at ``fd``."""
    size = array.array("Q", [0])
    fcntl.ioctl(fd, _BLKGETSIZE64, size)
    return size[0]


def logical_sector_size(fd: int) -> int:
    """Logical sector size in bytes of the block device open at ``fd``."""
    size = array.array("i", [0])
    fcntl.ioctl(fd, _BLKSSZGET, size)
    return size[0]


def block_device_zero(fd: int, offset: int, length: int) -> None:
    """Make a range of a block device read as zeros (BLKZEROOUT; multiples of the logical sector size)."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))


def direct_alignment(fd: int) -> DirectAlignment | None:
    """What O_DIRECT asks for at ``fd``; None where it is not supported or the kernel cannot say.

    Source: statx(2), STATX_DIOALIGN, Linux 6.1.
    """
    found = ctypes.create_string_buffer(_STATX_SIZE)
    _check(_libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found), f"fd {fd}")
    mask = struct.unpack_from("I", found, 0)[0]
    memory, offset = struct.unpack_from("II", found, _STATX_DIO_OFFSET)
    if not mask & _STATX_DIOALIGN or not memory or not offset:
        return None
    return DirectAlignment(memory, offset)


def unacknowledged_bytes(sock: socket.socket) -> int:
    """What was written to a TCP socket and the other host has not confirmed, sent or not."""
    count = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), _SIOCOUTQ, count)
    return count[0]
