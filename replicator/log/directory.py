"""The logs of a directory: which there are, and how they are removed.

Not here: what is in them (``log.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from replicator.failpoints import reach
from replicator.files import Files
from replicator.images.opening import failure
from replicator.log.records import Kind, log_name, parse_name, segment_name


def segment_numbers(files: Files, dir_fd: int, kind: Kind, epoch: int) -> list[int]:
    """Numbers of a log's segments in a directory, ascending. ``OSError`` if it cannot be read."""
    parsed = map(parse_name, files.list_directory(dir_fd))
    return sorted(found[2] for found in parsed if found is not None and found[:2] == (kind, epoch))


def remove(files: Files, dir_fd: int, kind: Kind, epoch: int) -> None:
    """Remove all segments of a log, durably, the newest first: what a removal that was cut short leaves is
    the beginning of the log. Idempotent. No ``Log`` of it may be open.

    Raises:
        TargetError: ``log.write_failed``.
    """
    try:
        numbers = segment_numbers(files, dir_fd, kind, epoch)
        unlink_segments(files, dir_fd, [segment_name(kind, epoch, number) for number in reversed(numbers)])
    except OSError as error:
        raise failure(error, "log.write_failed", f"cannot remove {log_name(kind, epoch)}") from error


def found(files: Files, dir_fd: int) -> list[tuple[Kind, int]]:
    """The logs that exist in a directory, by kind and epoch, sorted.

    Raises:
        TargetError: ``log.open_failed``.
    """
    try:
        parsed = map(parse_name, files.list_directory(dir_fd))
    except OSError as error:
        raise failure(error, "log.open_failed", "cannot read the directory of the log") from error
    return sorted({each[:2] for each in parsed if each is not None})


def unlink_segments(files: Files, dir_fd: int, names: Iterable[str]) -> None:
    """Remove files in this order, durably; those that are gone are. ``OSError``."""
    for name in names:
        reach("log.before_drop")
        with suppress(FileNotFoundError):
            files.unlink(dir_fd, name)
    files.fsync(dir_fd)
    reach("log.dropped")
