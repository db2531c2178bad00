"""What a log that is opened after a failed sync believes is durable, whatever became of that sync."""

import errno
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from replicator.errors import ReplicatorError
from replicator.files import Files
from replicator.log.gather import Frame
from replicator.log.log import Kind, Log
from tests.faulty_files import FaultyFiles
from tests.replicator.log.batches import EPOCH, KIB, SEED, Batches, Content, directory, frame, held

SEGMENT_BYTES = 64 * KIB


def use(files: Files, dir_fd: int, batches: Batches) -> None:
    """A log is made, written over several segments, and finished."""
    log = Log.create(files, dir_fd, Kind.REDO, EPOCH, SEED, segment_bytes=SEGMENT_BYTES)
    try:
        for number, frames in enumerate(batches):
            log.write(frames, number + 1)
        log.finish()
    finally:
        log.close()


def found(files: Files, dir_fd: int, *more: Frame) -> tuple[Content, bool]:
    """What the log holds, once it is opened, and whether it is finished; if not, `more` is written to it."""
    place = (files, dir_fd, Kind.REDO, EPOCH, SEED)
    log = Log.open(*place, segment_bytes=SEGMENT_BYTES)
    if log is None and more:
        log = Log.create(*place, segment_bytes=SEGMENT_BYTES)
    if log is None:
        return [], False
    try:
        if more and not log.finished:
            log.write(more)
        return held(log), log.finished
    finally:
        log.close()


def syncs(path: Path, batches: Batches) -> int:
    """How many syncs a log takes that none of them fails."""
    files = FaultyFiles()
    with directory(path) as dir_fd:
        use(files, dir_fd, batches)
    files.let_go()
    return sum(call.kind in ("fsync", "fdatasync") for call in files.calls)


class FailingSyncs(FaultyFiles):
    """The `kth` sync of any kind fails, and what it was to make durable is clean from then on. So does the
    next try to remove what could not be synced.

    Attributes:
        left: how many syncs it is until then; 0: none fails.
    """

    def __init__(self, kth: int, seed: int) -> None:
        super().__init__(seed)
        self.left = kth

    def _sync(self, kind: str, fd: int, really: Callable[[int], None]) -> None:
        self.left -= 1
        if self.left == 0:
            self.fail(kind, 1, errno.EIO)
            self.fail("unlink", 1, errno.EIO)
        super()._sync(kind, fd, really)


def test_what_is_found_after_a_sync_that_failed_survives_a_power_cut(in_memory: Path, seed: int) -> None:
    batches = [[frame(random.Random(seed), size)] for size in (20 * KIB, 512, 40 * KIB, 8 * KIB, 12 * KIB)]
    for kth in range(1, syncs(in_memory / "counted", batches) + 1):
        for number in range(8):
            path = in_memory / f"{kth}-{number}"
            files = FailingSyncs(kth, seed + number)
            with directory(path) as dir_fd:
                with pytest.raises(ReplicatorError):
                    use(files, dir_fd, batches)
                with suppress(ReplicatorError):
                    found(files, dir_fd)
                more = [frame(random.Random(number), 4 * KIB)] if number % 2 else []
                believed = found(files, dir_fd, *more)
                files.power_cut()
                assert found(Files(), dir_fd) == believed, (kth, number)


def test_a_recovery_whose_syncs_fail_can_be_repeated_and_promises_no_more(in_memory: Path, seed: int) -> None:
    batches = [[frame(random.Random(seed), size)] for size in (20 * KIB, 512)]
    for kth in range(1, 8):
        files = FailingSyncs(0, seed + kth)
        with directory(in_memory / f"{kth}") as dir_fd:
            files.fail("fdatasync", len(batches), errno.EIO)
            with pytest.raises(ReplicatorError):
                use(files, dir_fd, batches)
            files.left = kth
            with suppress(ReplicatorError):
                found(files, dir_fd)
            files.left = 0
            believed = found(files, dir_fd)
            files.power_cut()
            assert found(Files(), dir_fd) == believed, kth
