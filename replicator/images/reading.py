"""What an image holds: as digests for resync, and as bytes for what must outlive a write.

Holes are asked of the file system and told as runs, so that a sparse image costs what its data costs. What
goes past the page cache is decided in ``writer.py``.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from protocol.constants import KIB, MIB
from protocol.messages import Interval
from replicator.digest import DIGEST_BYTES, digests_of
from replicator.files import Files, read_fully

READ_BYTES = MIB
DIGESTS_A_PART = 4096  # 64 KiB of digests, 256 MiB of disk: small enough to come while the next are read
HOLES_MAX = 4096  # of one answer
GAP_BYTES = 16 * KIB  # copied out of the cache and thrown away sooner than another call is made
_CLUSTER_BYTES = MIB
_CLUSTER_PARTS = 500  # with a gap before each, what one call takes (IOV_MAX is 1,024)
_NO_HOLES = (errno.EINVAL, errno.EOPNOTSUPP)  # not known here: block devices, some file systems

_unread = memoryview(mmap.mmap(-1, GAP_BYTES))  # takes what lies in the gaps, of all threads


class Part(NamedTuple):
    """A stretch of a file that is wanted: where, and the memory to be filled."""

    offset: int
    view: memoryview


class Found(NamedTuple):
    """How far the blocks from a position on are a hole, if they are; else how far to read at the most."""

    hole_end: int
    data_end: int


class Digested(NamedTuple):
    """Digests of the blocks of ``intervals`` that are not in ``holes``, in order."""

    intervals: tuple[Interval, ...]
    holes: tuple[Interval, ...]
    digests: bytes

    def left_of(self, asked: Sequence[Interval]) -> tuple[Interval, ...]:
        """What of the intervals that were asked for is still to be asked."""
        reached = self.intervals[-1].end
        return tuple(Interval(max(start, reached), end) for start, end in asked if end > reached)


def digest_blocks(
    files: Files, fd: int, intervals: Sequence[Interval], block: int, seed: int, most: int
) -> Digested:
    """As ``digest_found``, of a file: holes are asked of the file system. ``OSError`` if it fails."""

    def find(position: int, end: int) -> Found:
        data = min(_next_data(files, fd, position), end)
        return Found(end if data == end else data - data % block, end)

    def read(position: int, view: memoryview) -> None:
        read_whole(files, fd, view, position)

    return digest_found(find, read, intervals, block, seed, most, READ_BYTES)


def digest_found(
    find: Callable[[int, int], Found],
    read: Callable[[int, memoryview], None],
    intervals: Sequence[Interval],
    block: int,
    seed: int,
    most: int,
    read_bytes: int,
) -> Digested:
    """Digests of the blocks of intervals, from the first one's start on, at most ``most`` of them.

    Args:
        find: (position, end) -> what lies there, see ``Found``.
        read: fills memory from a position.
        intervals: each begins at a multiple of ``block``, and ends at one or with the disk.
        read_bytes: in one go.
    """
    view = memoryview(bytearray(min(read_bytes, most * block)))
    answered: list[Interval] = []
    holes: list[Interval] = []
    rows: list[bytes] = []
    left = most
    for start, end in intervals:
        position = start
        while position < end and left and len(holes) < HOLES_MAX:
            hole_end, data_end = find(position, end)
            if hole_end > position:
                holes.append(Interval(position, hole_end))
                position = hole_end
                continue
            count = min(len(view), left * block, data_end - position)
            read(position, view[:count])
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


def gather(parts: Iterable[Part]) -> list[list[Part]]:
    """Sorted parts in clusters that ``read_cluster`` takes: parts a small gap apart share one."""
    clusters: list[list[Part]] = []
    first = end = -GAP_BYTES - 1
    for part in parts:
        offset, view = part
        behind = offset + len(view)
        if (
            0 <= offset - end <= GAP_BYTES
            and behind - first <= _CLUSTER_BYTES
            and len(clusters[-1]) < _CLUSTER_PARTS
        ):
            clusters[-1].append(part)
        else:
            clusters.append([part])
            first = offset
        end = behind
    return clusters


def read_ahead(files: Files, fd: int, runs: Iterable[tuple[int, int, bool]]) -> None:
    """Have sorted runs on their way, those a small gap apart with one call; ``OSError``."""
    first = end = -1
    for offset, length, _ in runs:
        if first < 0 or not 0 <= offset - end <= GAP_BYTES or end - first >= _CLUSTER_BYTES:
            if first >= 0:
                files.will_need(fd, first, end - first)
            first = offset
        end = offset + length
    if first >= 0:
        files.will_need(fd, first, end - first)


def read_cluster(files: Files, fd: int, cluster: list[Part]) -> None:
    """Fill the parts of a cluster, with one call if all goes well.

    Raises:
        OSError: also where the file ends before they are full.
    """
    position = cluster[0].offset
    if len(cluster) > 1:
        buffers = []
        for offset, view in cluster:
            if offset > position:
                buffers.append(_unread[: offset - position])
            buffers.append(view)
            position = offset + len(view)
        if files.preadv(fd, buffers, cluster[0].offset) == position - cluster[0].offset:
            return
    for offset, view in cluster:
        read_whole(files, fd, view, offset)


def read_whole(files: Files, fd: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from ``offset``. ``OSError`` also where the file ends before it is full."""
    if read_fully(files, fd, view, offset) < len(view):
        raise OSError(errno.EIO, "the file ends inside the disk")
