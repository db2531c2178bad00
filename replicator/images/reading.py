"""What an image holds, as digests: for resync, by the side that is written to.

Holes are asked of the file system and told as runs, so that a sparse image costs what its data costs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

from protocol.constants import MIB
from protocol.messages import Interval
from replicator.digest import DIGEST_BYTES, digests_of
from replicator.files import Files, read_fully

READ_BYTES = MIB
HOLES_MAX = 4096  # of one answer
_NO_HOLES = (errno.EINVAL, errno.EOPNOTSUPP)  # not known here: block devices, some file systems


class Digested(NamedTuple):
    """Digests of the blocks of ``intervals`` that are not in ``holes``, in order."""

    intervals: tuple[Interval, ...]
    holes: tuple[Interval, ...]
    digests: bytes


def digest_blocks(
    files: Files, fd: int, intervals: Sequence[Interval], block: int, seed: int, most: int
) -> Digested:
    """Digests of the blocks of intervals, from the first one's start on, at most ``most`` of them.

    An interval begins at a multiple of ``block``, and ends at one or with the disk. ``OSError`` if it fails.
    """
    view = memoryview(bytearray(min(READ_BYTES, most * block)))
    answered: list[Interval] = []
    holes: list[Interval] = []
    rows: list[bytes] = []
    left = most
    for start, end in intervals:
        position = start
        while position < end and left and len(holes) < HOLES_MAX:
            data = min(_next_data(files, fd, position), end)
            hole_end = end if data == end else data - data % block
            if hole_end > position:
                holes.append(Interval(position, hole_end))
                position = hole_end
                continue
            count = min(len(view), left * block, end - position)
            if read_fully(files, fd, view[:count], position) < count:
                raise OSError(errno.EIO, "the file ends inside the disk")
            rows.append(digests_of(view[:count], seed, block))
            left -= len(rows[-1]) // DIGEST_BYTES
            position += count
        if position > start:
            answered.append(Interval(start, position))
        if position < end:
            break
    return Digested(tuple(answered), tuple(holes), b"".join(rows))


def _next_data(files: Files, fd: int, position: int) -> int:
    """Where data begins at or behind ``position``; far behind the disk when there is none."""
    try:
        return files.seek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno in _NO_HOLES:
            return position
        if error.errno == errno.ENXIO:
            return 1 << 63
        raise
