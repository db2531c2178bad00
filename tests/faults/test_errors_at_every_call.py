"""A file system that is full, or fails, at any call of the story: nothing is lost, and it ends the same."""

import copy
import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from replicator.errors import ReplicatorError
from tests.faults.chapters import Chapter, Chapters
from tests.faults.checks import recovers
from tests.faults.oracle import Oracle, Violation
from tests.faulty_files import FaultyFiles

TRIES = 3
SYNCS = frozenset({"fsync", "fdatasync"})
"""After one of these failed, the power does not fail as well: see README.md, "What is left out"."""


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
    if chapter.calls[kth - 1] in SYNCS:
        files.let_go()
    else:
        files.power_cut()
    return path, oracle


@pytest.mark.timeout(0)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_nothing_is_lost_and_it_ends_the_same(
    in_memory: Path, seed: int, count: Callable[[int, int], int], error: int
) -> None:
    chapters = Chapters(in_memory / "story", seed)
    every = count(20, 1)
    places = [
        (chapter, kth)
        for chapter in chapters.all
        for kth, kind in enumerate(chapter.calls, 1)
        if kind != "close"  # it has nothing to tell: what must be durable was synced
    ]
    kinds: Counter[str] = Counter()
    for chapter, kth in places[seed % every :: every]:
        where = f"story {seed:#x}, step {chapter.step}, call {kth}: {errno.errorcode[error]}"
        try:
            path, oracle = with_error(chapters, chapter, kth, error)
            recovers(path, oracle, random.Random(seed + kth))
        except (AssertionError, OSError, ReplicatorError) as found:
            raise Violation(f"{where}: {type(found).__name__}: {found}") from found
        kinds[chapter.calls[kth - 1]] += 1
    assert kinds["fdatasync"] and kinds["fsync"] and kinds["pwritev"], kinds
    print(f"{kinds.total()} calls failed: {dict(kinds)}")
