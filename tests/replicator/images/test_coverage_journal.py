"""The coverage journal: torn, damaged or another epoch's, it may say less than is durable and never more."""

import errno
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from replicator.errors import SpaceError, TargetError
from replicator.extents import Coverage
from replicator.files import Files
from replicator.images.coverage_journal import CoverageJournal, journal_name, remove_journal
from replicator.private_directory import HeldDirectory, PrivateDirectory
from tests.faulty_files import FaultyFiles

ENTRY = 28
ENTRIES = [(1, 0, 1 << 20), (2, 512, 1024), (1, 2 << 20, 3 << 20), (1, 1 << 20, 2 << 20), (7, 0, 1 << 62)]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldDirectory]:
    with PrivateDirectory(Files(), tmp_path / "retention").held() as held:
        yield held


def covered(held: HeldDirectory, number: int = 5) -> dict[int, tuple[tuple[int, int], ...]]:
    with closing(CoverageJournal.open(held, number)) as journal:
        return {disk: coverage.intervals() for disk, coverage in journal.disks.items()}


def of(entries: list[tuple[int, int, int]]) -> dict[int, tuple[tuple[int, int], ...]]:
    found: dict[int, Coverage] = {}
    for disk, start, end in entries:
        found.setdefault(disk, Coverage()).add(start, end)
    return {disk: coverage.intervals() for disk, coverage in found.items()}


def written(held: HeldDirectory, number: int = 5) -> Path:
    with closing(CoverageJournal.open(held, number)) as journal:
        journal.append(ENTRIES[:2])
        journal.append(ENTRIES[2:])
    return held.path / journal_name(number)


def test_what_was_appended_is_there_when_it_is_opened_again(held: HeldDirectory) -> None:
    assert covered(held) == {}
    written(held)
    assert covered(held) == of(ENTRIES)
    with closing(CoverageJournal.open(held, 5)) as journal:
        journal.append([(1, 5 << 20, 6 << 20)])
    assert covered(held) == of([*ENTRIES, (1, 5 << 20, 6 << 20)])


def test_a_long_journal_is_read_whole(held: HeldDirectory) -> None:
    entries = [(1, 2 * at << 20, (2 * at + 1) << 20) for at in range(3_000)]
    with closing(CoverageJournal.open(held, 5)) as journal:
        for first in range(0, 3_000, 700):
            journal.append(entries[first : first + 700])
    assert covered(held) == of(entries)
    assert (held.path / journal_name(5)).stat().st_size == 3_000 * ENTRY


def test_torn_at_every_byte_it_says_what_is_whole_and_goes_on_from_there(held: HeldDirectory) -> None:
    path = written(held)
    good = path.read_bytes()
    assert len(good) == len(ENTRIES) * ENTRY
    for cut in range(len(good) + 1):
        for tail in (b"", bytes(ENTRY), b"\xff" * 5):
            path.write_bytes(good[:cut] + tail)
            whole = ENTRIES[: cut // ENTRY]
            assert covered(held) == of(whole), f"cut at {cut}"
            assert path.stat().st_size == len(whole) * ENTRY
    path.write_bytes(good[: ENTRY + 3])
    with closing(CoverageJournal.open(held, 5)) as journal:
        journal.append([(9, 0, 512)])
    assert covered(held) == of([ENTRIES[0], (9, 0, 512)])


def test_a_damaged_entry_ends_it(held: HeldDirectory, seed: int) -> None:
    path, rng = written(held), random.Random(seed)
    good = path.read_bytes()
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert covered(held) == of(ENTRIES[: place // ENTRY]), f"a flip at {place}"


def test_the_journal_of_another_epoch_says_nothing(held: HeldDirectory) -> None:
    content = written(held, 5).read_bytes()
    (held.path / journal_name(6)).write_bytes(content)
    assert covered(held, 6) == {}
    assert covered(held, 5) == of(ENTRIES)


def test_a_removed_journal_says_nothing(held: HeldDirectory) -> None:
    written(held)
    remove_journal(held, 5)
    remove_journal(held, 5)
    assert covered(held) == {}


def test_what_was_appended_survives_a_power_cut(tmp_path: Path, seed: int, count) -> None:
    for number in range(count(20, 500)):
        files = FaultyFiles(seed + number)
        path = tmp_path / f"{number}"
        with PrivateDirectory(files, path).held() as held:
            CoverageJournal.open(held, 5).append(ENTRIES[:2])
        files.power_cut()
        files.let_go()
        with PrivateDirectory(Files(), path).held() as held:
            assert covered(held) == of(ENTRIES[:2])


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        ("pwrite", errno.ENOSPC, "target.full"),
        ("pwrite", errno.EIO, "target.journal_failed"),
        ("fdatasync", errno.EIO, "target.journal_failed"),
    ],
)
def test_an_append_that_fails_is_told_and_what_was_there_stays(
    tmp_path: Path, kind: str, error: int, code: str
) -> None:
    class Failing(Files):
        failing = False

        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            if self.failing and kind == "pwrite":
                raise OSError(error, os.strerror(error))
            return super().pwrite(fd, data, offset)

        def fdatasync(self, fd: int) -> None:
            if self.failing and kind == "fdatasync":
                raise OSError(error, os.strerror(error))
            super().fdatasync(fd)

    files = Failing()
    with PrivateDirectory(files, tmp_path / "retention").held() as held:
        journal = CoverageJournal.open(held, 5)
        journal.append(ENTRIES[:2])
        files.failing = True
        with pytest.raises((SpaceError, TargetError)) as caught:
            journal.append(ENTRIES[2:])
        assert caught.value.code == code
        assert "what is durable" in caught.value.message
        files.failing = False
        journal.close()
        journal.close()
        found = covered(held)
        assert found in (of(ENTRIES[:2]), of(ENTRIES))


def test_what_is_found_after_a_sync_that_failed_survives_a_power_cut(tmp_path: Path, seed: int) -> None:
    for number in range(20):
        files = FaultyFiles(seed + number)
        with PrivateDirectory(files, tmp_path / f"{number}").held() as held:
            with closing(CoverageJournal.open(held, 5)) as journal:
                journal.append(ENTRIES[:2])
                files.fail("fdatasync", 1, errno.EIO)
                with pytest.raises(TargetError):
                    journal.append(ENTRIES[2:])
            believed = covered(held)
        files.power_cut()
        with PrivateDirectory(Files(), tmp_path / f"{number}").held() as held:
            assert covered(held) == believed, number


def test_a_journal_that_cannot_be_opened_leaves_nothing_open(held: HeldDirectory) -> None:
    (held.path / journal_name(5)).mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TargetError):
        CoverageJournal.open(held, 5)
    assert len(os.listdir("/proc/self/fd")) == before
