"""Segment files kept open for readers: few of them, none closed under a reader, none forgotten open."""

import os
from pathlib import Path

import pytest

from replicator.files import Files
from replicator.log.reading import KEPT, Readers
from replicator.log.segment import SegmentFile
from tests.replicator.log.batches import directory


class Opened:
    """Opens segment files of any number, and knows which are open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times: list[int] = []

    def __call__(self, segment: int) -> SegmentFile:
        self.times.append(segment)
        (self.path / str(segment)).touch()
        with directory(self.path) as dir_fd:
            return SegmentFile(Files(), dir_fd, str(segment), os.O_RDONLY)

    def still(self) -> list[int]:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        targets = [Path(os.readlink(link)) for link in links if os.path.islink(link)]
        return sorted(int(target.name) for target in targets if target.parent == self.path)


@pytest.fixture
def opened(in_memory: Path) -> Opened:
    return Opened(in_memory)


def test_a_file_is_opened_once_and_the_latest_few_are_kept(opened: Opened) -> None:
    readers = Readers(opened)
    for segment in [1, 1, *range(2, 10), 7, 7]:
        with readers.using(segment) as file:
            assert file.name == str(segment)
            assert len(opened.still()) <= KEPT + 1
    assert opened.times == list(range(1, 10))
    assert opened.still() == [6, 7, 8, 9]
    with readers.using(6), readers.using(1):
        pass
    assert opened.still() == [1, 6, 7, 9], "8 was used before 7"
    readers.close()
    assert opened.still() == []


def test_a_file_in_use_stays_open_whatever_else_is_opened_or_forgotten(opened: Opened) -> None:
    readers = Readers(opened)
    with readers.using(1):
        for segment in range(2, 10):
            with readers.using(segment):
                assert {1, segment} <= set(opened.still())
        readers.forget(1)
        assert 1 in opened.still()
        with readers.using(1), readers.using(1):
            readers.forget(1)
            readers.close()
            assert opened.still() == [1, 1]
        assert opened.still() == [1]
    assert opened.still() == []


def test_a_file_that_cannot_be_opened_is_not_remembered(opened: Opened) -> None:
    def fails(segment: int) -> SegmentFile:
        raise LookupError(segment)

    readers = Readers(fails)
    for _ in range(2):
        with pytest.raises(LookupError), readers.using(1):
            pass
    readers.forget(1)
    readers.close()
