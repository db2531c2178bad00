"""A file system that is full, or fails, at any call of the story: nothing is lost, and it ends the same."""

import copy
import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from replicator.errors import ReplicatorError
from tests.faults.chapters import Chapter, Chapters
from tests.faults.checks import recovers
from tests.faults.oracle import Oracle, Violation
from tests.faults.story import PLOTS, SHORT
from tests.faulty_files import FaultyFiles

TRIES = 3


class Watched(FaultyFiles):
    """Notes whether a file is written to or synced after one of its syncs failed."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._failed: set[int] = set()

    def _sync(self, kind: str, fd: int, really: Callable[[int], None]) -> None:
        self._refuse(fd)
        try:
            super()._sync(kind, fd, really)
        except OSError:
            if not os.path.isdir(f"/proc/self/fd/{fd}"):
                self._failed.add(fd)
            raise

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._refuse(fd)
        return super().pwrite(fd, data, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._refuse(fd)
        return super().pwritev(fd, buffers, offset)

    def close(self, fd: int) -> None:
        super().close(fd)
        self._failed.discard(fd)

    def _refuse(self, fd: int) -> None:
        if fd in self._failed:
            raise Violation(f"{self._name(fd)} is used after a sync of it failed")


def with_error(chapters: Chapters, chapter: Chapter, kth: int, error: int) -> tuple[Path, Oracle]:
    """The step with one call that fails, done again while it says that it failed; then the power fails."""
    path, oracle = chapters.copy(chapter.start), copy.deepcopy(chapter.before)
    files = Watched(kth)
    files.fail("any", kth, error)
    for tried in range(TRIES):
        try:
            chapters.run(chapter.step, path, files, oracle)
            break
        except ReplicatorError:
            if tried == TRIES - 1:
                raise
    files.power_cut()
    return path, oracle


def places(chapters: Chapters, others: int) -> Iterator[tuple[Chapter, int, int]]:
    """What fails: ENOSPC every call, EIO every sync and of the other calls every so many."""
    calls = [(chapter, kth) for chapter in chapters.all for kth in range(1, len(chapter.calls) + 1)]
    for number, (chapter, kth) in enumerate(calls):
        yield chapter, kth, errno.ENOSPC
        if chapter.calls[kth - 1] in ("fsync", "fdatasync") or number % others == 0:
            yield chapter, kth, errno.EIO


@pytest.mark.timeout(0)
def test_whichever_call_fails_nothing_is_lost_and_it_ends_the_same(in_memory: Path, seed: int, count) -> None:
    chapters = Chapters(in_memory / "story", seed, count(SHORT, PLOTS))
    kinds: Counter[str] = Counter()
    for chapter, kth, error in places(chapters, count(24, 1)):
        where = f"story {seed:#x}, step {chapter.step}, call {kth}: {errno.errorcode[error]}"
        try:
            path, oracle = with_error(chapters, chapter, kth, error)
            recovers(path, oracle, random.Random(seed + kth))
        except (AssertionError, OSError, ReplicatorError) as found:
            raise Violation(f"{where}: {type(found).__name__}: {found}") from found
        kinds[chapter.calls[kth - 1]] += 1
    assert kinds["fdatasync"] and kinds["fsync"] and kinds["pwritev"] and kinds["close"], kinds
    print(f"{kinds.total()} calls failed: {dict(kinds)}")
