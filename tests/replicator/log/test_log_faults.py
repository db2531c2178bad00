"""A file system that fails: the log stops at once, syncs nothing twice, and opened anew has all of it."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator.errors import ReplicatorError, SpaceError, StateError, TargetError
from replicator.files import Files
from replicator.log.log import Kind, Log, found, remove
from replicator.log.records import segment_name
from tests.faulty_files import FaultyFiles
from tests.replicator.log.batches import (
    EPOCH,
    KIB,
    SEED,
    Batches,
    directory,
    frame,
    held,
    opened,
    plain,
    restore,
    snapshot,
    written,
)

SEGMENT_BYTES = 48 * KIB
FIRST = segment_name(Kind.REDO, EPOCH, 1)
# What may fail and is not needed: it only says that something is over, or that space is not set aside.
HARMLESS = {"close"}


@pytest.fixture
def batches(seed: int) -> Batches:
    rng = random.Random(seed)
    sizes = [[20 * KIB, 512], [512], [4096, 0], [20 * KIB], []]
    return [[frame(rng, size) for size in each] for each in sizes]


def use(files: Files, dir_fd: int, batches: Batches, done: list[str]) -> Log:
    """Everything that changes a log; says in `done` how far it came. The oldest segment is dropped."""
    done.append("")
    log = Log.create(files, dir_fd, Kind.REDO, EPOCH, SEED, segment_bytes=SEGMENT_BYTES)
    try:
        for number, frames in enumerate(batches):
            done.append(f"write {number}")
            log.write(frames, number + 1)
        done.append("roll")
        log.roll()
        done.append("drop")
        log.drop(1)
        done.append("finish")
        log.finish()
        done.append("done")
    except ReplicatorError:
        stopped(log, batches[0])
        raise
    finally:
        log.close()
    return log


def stopped(log: Log, frames) -> None:
    """The log refuses everything that would change it."""
    oldest = log.segments()[0] if log.segments() else 0
    refused: list[Callable[[], None]] = [lambda: log.write(frames), log.roll]
    if not log.finished:
        refused.append(log.finish)
    if log.closed(oldest):
        refused.append(lambda: log.drop(oldest))
    for again in refused:
        with pytest.raises(TargetError, match="any more") as caught:
            again()
        assert caught.value.code == "log.write_failed"


def first_calls(path: Path, batches: Batches) -> list[str]:
    """Kinds of the calls of a use without faults."""
    files = FaultyFiles()
    with directory(path / "counted") as dir_fd:
        use(files, dir_fd, batches, [])
    files.let_go()
    return [call.kind for call in files.calls]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_fault_at_any_call_stops_the_log_and_loses_nothing(
    in_memory: Path, batches: Batches, error: int
) -> None:
    calls = first_calls(in_memory, batches)
    assert len(calls) > 30
    for kth, kind in enumerate(calls, 1):
        files, done = FaultyFiles(), list[str]()
        files.fail("any", kth, error)
        path = in_memory / f"{kth}"
        failed = False
        with directory(path) as dir_fd:
            try:
                use(files, dir_fd, batches, done)
            except (SpaceError, TargetError) as caught:
                failed = True
                assert isinstance(caught, SpaceError) == (error == errno.ENOSPC), caught
                assert caught.code in {"target.full", "log.write_failed", "log.open_failed"}
        files.let_go()
        assert failed == (kind not in HARMLESS), f"call {kth}, {kind}"
        is_whole_or_one_less(path, batches, done[-1])


def is_whole_or_one_less(path: Path, batches: Batches, last: str) -> None:
    """What a log that stopped in the step `last` may hold: whether that step happened is open, no more."""
    content = opened(path)
    if last.startswith("write"):
        number = int(last.split()[1])
        assert content in (plain(batches[:number]), plain(batches[: number + 1])), last
    elif last in ("roll", "drop"):
        assert content in (plain(batches), plain(batches[1:])), last
    elif last:
        assert content == plain(batches[1:]), last
    else:
        assert content in (None, [])


@pytest.mark.parametrize("kind", ["fdatasync", "fsync"])
def test_after_a_sync_that_failed_nothing_is_synced_through_that_descriptor(
    in_memory: Path, batches: Batches, kind: str
) -> None:
    """The kernel has marked as clean what it could not write: the next sync would say that all is well."""
    total = first_calls(in_memory, batches).count(kind)
    assert total >= 5
    for kth in range(1, total + 1):
        files = Descriptors()
        files.fail(kind, kth, errno.EIO)
        with directory(in_memory / f"{kth}") as dir_fd:
            with pytest.raises(TargetError):
                use(files, dir_fd, batches, [])
            failed = files.failed
            if failed != dir_fd:  # which is the caller's
                assert failed in files.closed
            assert files.later == [], "written or synced after the error"
        files.let_go()


class Descriptors(FaultyFiles):
    """Notes the descriptor of a sync that failed, and what is done with it later."""

    failed = -1

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[int] = []
        self.later: list[str] = []

    def _sync(self, kind, fd, really) -> None:
        self._seen(kind, fd)
        try:
            super()._sync(kind, fd, really)
        except OSError:
            self.failed = fd
            self.closed.clear()
            raise

    def _seen(self, kind: str, fd: int) -> None:
        if fd == self.failed and fd not in self.closed:
            self.later.append(kind)

    def pwritev(self, fd, buffers, offset) -> int:
        self._seen("pwritev", fd)
        return super().pwritev(fd, buffers, offset)

    def truncate(self, fd, size) -> None:
        self._seen("truncate", fd)
        super().truncate(fd, size)

    def close(self, fd) -> None:
        self.closed.append(fd)
        super().close(fd)


def test_what_a_failed_sync_lost_is_not_found_and_not_missed(
    in_memory: Path, batches: Batches, seed: int, count
) -> None:
    """The disk loses what the sync was for; only the batch that was being written may be gone."""
    lost = 0
    for number in range(count(60, 2_000)):
        path, files, done = in_memory / f"{number}", FaultyFiles(seed + number), list[str]()
        kth = number % len(batches) + 1
        files.fail("fdatasync", kth, errno.EIO)
        with directory(path) as dir_fd:
            with pytest.raises(TargetError):
                use(files, dir_fd, batches, done)
            files.power_cut()
        assert done[-1] == f"write {kth - 1}"
        is_whole_or_one_less(path, batches, done[-1])
        lost += opened(path) == plain(batches[: kth - 1])
    assert lost > 20


# ------------------------------------------------------------------ opening and removing


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_fault_at_any_call_while_a_log_is_opened_is_told_and_changes_nothing_that_counts(
    in_memory: Path, batches: Batches, error: int
) -> None:
    written(in_memory, batches, segment_bytes=SEGMENT_BYTES)
    before = snapshot(in_memory)
    files = FaultyFiles()
    opened(in_memory, files=files)
    files.let_go()
    kinds = [call.kind for call in files.calls]
    for kth, kind in enumerate(kinds, 1):
        restore(in_memory, before)
        files = FaultyFiles()
        files.fail("any", kth, error)
        if kind in HARMLESS:
            assert opened(in_memory, files=files) == plain(batches)
        else:
            with pytest.raises((SpaceError, TargetError)) as caught:
                opened(in_memory, files=files)
            assert caught.value.code in {"target.full", "log.open_failed", "log.read_failed"}, (
                f"{kth}, {kind}"
            )
        files.let_go()
        assert opened(in_memory) == plain(batches), f"call {kth}, {kind}"


def test_a_read_that_fails_is_told_and_the_log_goes_on(in_memory: Path, batches: Batches) -> None:
    files = FaultyFiles()
    with directory(in_memory) as dir_fd:
        log = Log.create(files, dir_fd, Kind.REDO, EPOCH, SEED, segment_bytes=SEGMENT_BYTES)
        log.write(batches[0])
        files.fail("preadv", 1, errno.EIO)
        with pytest.raises(TargetError, match=f"cannot read {FIRST}: Input/output error") as caught:
            held(log)
        assert caught.value.code == "log.read_failed"
        log.write(batches[1])
        assert held(log) == plain(batches[:2])
        log.close()
    files.let_go()


def test_damage_of_a_closed_segment_is_told_when_it_is_read(in_memory: Path, batches: Batches) -> None:
    with directory(in_memory) as dir_fd:
        log = Log.create(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        log.write(batches[0])
        log.roll()
        good = (in_memory / FIRST).read_bytes()
        size = len(good)
        for place, told in ((8192, "the record at byte 4096"), (size - 8192, "the index of")):
            with (in_memory / FIRST).open("r+b") as file:
                file.seek(place)
                file.write(bytes([good[place] ^ 1]))
            with pytest.raises(StateError, match=f"{told}.*{FIRST}.*does not match its hash") as caught:
                held(log)
            assert caught.value.code == "log.damaged"
            (in_memory / FIRST).write_bytes(good)
        assert held(log) == plain(batches[:1])
        with (in_memory / FIRST).open("r+b") as file:
            file.truncate(8192)
        with pytest.raises(TargetError, match="became shorter"):
            log.entries(1)
        log.close()


def test_a_segment_that_became_shorter_under_an_open_log_is_told(in_memory: Path, batches: Batches) -> None:
    with directory(in_memory) as dir_fd:
        log = Log.create(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        log.write(batches[0])
        with (in_memory / FIRST).open("r+b") as file:
            file.truncate(3 * 4096)
        with pytest.raises(StateError, match=f"{FIRST} ends inside") as caught:
            held(log)
        assert caught.value.code == "log.damaged"
        log.close()


def test_a_removal_that_fails_half_way_leaves_the_beginning(in_memory: Path, batches: Batches) -> None:
    written(in_memory, batches, kind=Kind.UNDO, segment_bytes=SEGMENT_BYTES)
    names = list(snapshot(in_memory))
    assert len(names) > 2
    for kth in range(1, len(names) + 1):
        files = FaultyFiles()
        files.fail("unlink", 2, errno.EIO)
        with directory(in_memory) as dir_fd:
            if len(names) - kth >= 1:
                with pytest.raises(TargetError, match="cannot remove the undo log of epoch 7"):
                    remove(files, dir_fd, Kind.UNDO, EPOCH)
            else:
                remove(files, dir_fd, Kind.UNDO, EPOCH)
        files.let_go()
        assert list(snapshot(in_memory)) == names[: len(names) - kth]


def test_a_directory_that_cannot_be_read_is_told(in_memory: Path) -> None:
    files = FaultyFiles()
    files.fail("list_directory", 1, errno.EIO)
    with directory(in_memory) as dir_fd, pytest.raises(TargetError) as caught:
        found(files, dir_fd)
    assert caught.value.code == "log.open_failed"
    files.let_go()


def test_what_is_no_regular_file_is_not_opened(in_memory: Path) -> None:
    for make in (os.mkfifo, os.mkdir):
        make(in_memory / FIRST)
        with directory(in_memory) as dir_fd, pytest.raises(TargetError) as caught:
            Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        assert caught.value.code == "log.open_failed"
        if (in_memory / FIRST).is_dir():
            (in_memory / FIRST).rmdir()
        else:
            (in_memory / FIRST).unlink()
