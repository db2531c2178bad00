"""A log gives back what was written to it, in order, from one session or many; and how it writes and reads.

After crashes and faults: `test_recovery.py`, `test_power_cuts.py`, `test_log_faults.py`, `test_log_kill.py`.
"""

import ctypes
import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from queue import SimpleQueue

import pytest

from protocol.header import FrameType, Header
from replicator import linux
from replicator.buffers import BufferPool
from replicator.errors import SpaceError, StateError
from replicator.files import Files
from replicator.log.log import Entry, Kind, Log, found, record_bytes, remove
from replicator.log.records import ALIGN, index_bytes, segment_name
from replicator.log.segment import batch_bytes
from tests.faulty_files import FaultyFiles
from tests.replicator.images.conformance import is_direct
from tests.replicator.log.batches import (
    EPOCH,
    KIB,
    MIB,
    PAGE,
    SEED,
    batch,
    directory,
    frame,
    held,
    held_singly,
    opened,
    plain,
)

SMALL = 256 * KIB


@pytest.fixture
def dir_fd(place: Path) -> Iterator[int]:
    with directory(place) as fd:
        yield fd


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


def create(dir_fd: int, files: Files | None = None, *, kind: Kind = Kind.REDO, segment_bytes=SMALL) -> Log:
    return Log.create(files or Files(), dir_fd, kind, EPOCH, SEED, segment_bytes=segment_bytes)


def reopen(dir_fd: int, files: Files | None = None, *, kind: Kind = Kind.REDO) -> Log:
    log = Log.open(files or Files(), dir_fd, kind, EPOCH, SEED, segment_bytes=SMALL)
    assert log is not None
    return log


class Pieces(Files):
    """Remembers which way data goes: for each pwritev, fdatasync and preadv, whether it is direct."""

    def __init__(self, refuse: Callable[[str, int], bool] = lambda kind, number: False) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.addresses: list[list[tuple[int, int]]] = []
        self._refuse = refuse

    def _step(self, kind: str, fd: int) -> None:
        self.calls.append((kind, is_direct(fd)))
        number = sum(1 for each, _ in self.calls if each == kind)
        if is_direct(fd) and self._refuse(kind, number):
            raise OSError(errno.EINVAL, "Invalid argument")

    def open_beneath(self, dir_fd: int, name: str, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_DIRECT and self._refuse("open", 1):
            if flags & os.O_CREAT:  # as some file systems do
                os.close(super().open_beneath(dir_fd, name, flags & ~os.O_DIRECT, mode))
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().open_beneath(dir_fd, name, flags, mode)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._step("pwritev", fd)
        self.addresses.append([(address(view), len(view)) for view in buffers])
        return super().pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._step("preadv", fd)
        return super().preadv(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self.calls.append(("fdatasync", is_direct(fd)))
        super().fdatasync(fd)


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


# ------------------------------------------------------------------ what goes in comes out


def test_what_was_written_is_read_in_order_in_the_session_and_after_it(
    place: Path, dir_fd: int, rng: random.Random
) -> None:
    batches = []
    with closing(create(dir_fd)) as log:
        for _ in range(40):
            batches.append(batch(rng, 5))
            log.write(batches[-1])
            if rng.random() < 0.2:
                assert held(log) == plain(batches), "of the segment being written, too"
        assert held(log) == held_singly(log) == plain(batches)
        assert len(log.segments()) > 2
    for _ in range(3):
        with closing(reopen(dir_fd)) as log:
            assert held(log) == plain(batches)
            batches.append(batch(rng, 5))
            log.write(batches[-1])
    with closing(reopen(dir_fd)) as log:
        log.finish()
    with closing(reopen(dir_fd)) as log:
        assert held(log) == held_singly(log) == plain(batches)


def test_frames_of_all_sizes_and_kinds_of_memory_come_back(dir_fd: int, rng: random.Random) -> None:
    sizes = [0, 512, PAGE - 512, PAGE, 16 * KIB - 512, 16 * KIB, 64 * KIB + 1536, MIB, 4 * MIB]
    frames = [
        frame(rng, size, aligned=aligned, level=level)
        for size in sizes
        for aligned in (True, False)
        for level in (None, 1)
    ]
    frames += [(header, body.toreadonly()) for header, body in frames[:6]]
    frames += [(header, memoryview(bytes(body))) for header, body in frames[-8:]]
    rng.shuffle(frames)
    with closing(create(dir_fd, segment_bytes=64 * MIB)) as log:
        log.write(frames)
        assert held(log) == plain([frames])


def test_a_batch_of_very_many_pieces_is_written(dir_fd: int, rng: random.Random) -> None:
    """One pwritev takes 1,024 pieces at the most."""
    frames = [frame(rng, 16 * KIB) for _ in range(700)]
    with closing(create(dir_fd, segment_bytes=64 * MIB)) as log:
        log.write(frames)
        assert held(log) == plain([frames])


def test_thousands_of_small_records_take_a_few_reads(dir_fd: int, rng: random.Random) -> None:
    frames = [frame(rng, 512) for _ in range(50)] * 160
    files = Pieces()
    with closing(create(dir_fd, files, segment_bytes=128 * MIB)) as log:
        log.write(frames)
        log.roll()
        assert len(log.entries(1)) == 8000
        before = len(files.calls)
        assert held(log) == plain([frames])
        assert len(files.calls) - before <= 6


def test_an_empty_log_and_an_empty_batch_are_nothing_to_read(place: Path, dir_fd: int) -> None:
    with closing(create(dir_fd)) as log:
        assert (log.segments(), log.entries(1), held(log)) == ((1,), [], [])
        log.write([], note=5)
    with closing(reopen(dir_fd)) as log:
        assert held(log) == []
        assert log.notes() == {5}
    assert opened(place / "elsewhere") is None


def test_what_is_no_whole_data_frame_is_refused_and_the_log_goes_on(dir_fd: int, rng: random.Random) -> None:
    good = [frame(rng, 512)]
    header, body = good[0]
    with closing(create(dir_fd)) as log:
        for bad in [(header, body[:-1]), (Header(FrameType.PING, 8), memoryview(bytes(8)))]:
            with pytest.raises(ValueError, match="not a whole DATA frame"):
                log.write([*good, bad])
        log.write(good)
        assert held(log) == plain([good])


# ------------------------------------------------------------------ segments


def test_a_batch_never_spans_segments_and_fills_one_to_its_last_block(
    place: Path, dir_fd: int, rng: random.Random
) -> None:
    def filling(blocks: int) -> list:
        """A batch that leaves so many blocks of a segment, beside its header, index and trailer."""
        room = SMALL - 2 * ALIGN - index_bytes(1, 1) - 2 * ALIGN
        frames = [frame(rng, room - blocks * ALIGN)]
        assert batch_bytes(frames) == SMALL - 2 * ALIGN - index_bytes(1, 1) - blocks * ALIGN
        return frames

    batches = [filling(0), filling(-1), filling(0), filling(1), filling(0)]
    with closing(create(dir_fd)) as log:
        for number, frames in enumerate(batches, 1):
            log.write(frames)
            assert log.segments() == tuple(range(1, number + 1))
        log.finish()
        assert held(log) == plain(batches)
    sizes = [found.stat().st_size for found in sorted(place.iterdir())]
    assert sizes == [SMALL, SMALL + ALIGN, SMALL, SMALL - ALIGN, SMALL]
    with closing(reopen(dir_fd)) as log:
        assert held(log) == plain(batches)


@pytest.mark.parametrize(("before", "more"), [([25, 25], 0), ([50], 1)], ids=["a batch", "a record"])
def test_what_does_not_fit_any_more_may_be_the_index(
    dir_fd: int, rng: random.Random, before: list[int], more: int
) -> None:
    """Of 50 records in 2 batches it has one block; another record or batch makes it two."""
    assert index_bytes(50, 2) == ALIGN < index_bytes(50, 3) == index_bytes(51, 2) == 2 * ALIGN
    records = [frame(rng, 0) for _ in range(50)]
    blocks = 1 + sum(before) + len(before) + more + 1 + 1 + 1
    for spare, segments in ((0, (1, 2)), (1, (1,))):
        size = (blocks + spare) * ALIGN
        with closing(Log.create(Files(), dir_fd, Kind.REDO, spare, SEED, segment_bytes=size)) as log:
            for number in [*before, more]:
                log.write(records[:number])
            assert log.segments() == segments


def test_padding_is_zeros_whatever_was_written_before(place: Path, dir_fd: int, rng: random.Random) -> None:
    with closing(create(dir_fd)) as log:
        log.write([frame(rng, 15 * KIB, aligned=False)] * 3)
        log.write([frame(rng, 512)])
        content = (place / segment_name(Kind.REDO, EPOCH, 1)).read_bytes()
    head, payload = content[-3 * ALIGN : -2 * ALIGN], content[-2 * ALIGN : -ALIGN]
    assert head[:4] == b"RPLF"
    assert head[88:] == bytes(ALIGN - 88)
    assert payload[:512] != bytes(512)
    assert payload[512:] == bytes(ALIGN - 512)


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_larger_than_a_segment_gets_a_segment_as_large_as_it_needs(
    place: Path, dir_fd: int, rng: random.Random, first: bool
) -> None:
    small, large = [frame(rng, 512)], [frame(rng, MIB) for _ in range(3)]
    batches = [large, small] if first else [small, large, small]
    with closing(create(dir_fd)) as log:
        for frames in batches:
            log.write(frames)
        assert [len(log.entries(segment)) for segment in log.segments()] == [len(each) for each in batches]
        assert held(log) == plain(batches)
    assert opened(place) == plain(batches)


def test_roll_closes_what_was_written_and_nothing_else(dir_fd: int, rng: random.Random) -> None:
    with closing(create(dir_fd)) as log:
        log.roll()
        assert (log.segments(), log.closed(1)) == ((1,), False)
        frames = [frame(rng, 512)]
        log.write(frames)
        assert not log.closed(1)
        log.roll()
        log.roll()
        assert (log.segments(), log.closed(1)) == ((1,), True)
        log.write(frames)
        assert (log.segments(), log.closed(1), log.closed(2)) == ((1, 2), True, False)
        assert held(log, 2) == plain([frames])


def test_a_finished_log_takes_no_more(dir_fd: int, rng: random.Random) -> None:
    frames = [frame(rng, 512)]
    with closing(create(dir_fd)) as log:
        log.write(frames)
        states = [log.finished]
        log.finish()
        log.finish()
        assert [*states, log.finished] == [False, True]
    with closing(reopen(dir_fd)) as log:
        assert log.finished
        log.finish()
        for more in (lambda: log.write(frames), log.roll):
            with pytest.raises(ValueError, match="the redo log of epoch 7 is finished"):
                more()
        assert held(log) == plain([frames])


@pytest.mark.parametrize("segments", [0, 1, 3])
def test_a_log_is_finished_after_it_was_opened_anew(dir_fd: int, rng: random.Random, segments: int) -> None:
    batches = [[frame(rng, 512)] for _ in range(segments)]
    with closing(create(dir_fd)) as log:
        for frames in batches:
            log.write(frames)
            log.roll()
    with closing(reopen(dir_fd)) as log:
        assert not log.finished
        log.finish()
    with closing(reopen(dir_fd)) as log:
        assert log.finished
        assert held(log) == plain(batches)


def test_segments_are_dropped_oldest_first_and_stay_gone(
    place: Path, dir_fd: int, rng: random.Random
) -> None:
    batches = [[frame(rng, 20 * KIB)] for _ in range(4)]
    with closing(create(dir_fd)) as log:
        for frames in batches:
            log.write(frames)
            log.roll()
        log.write([])
        for wrong in (2, 5):
            with pytest.raises(ValueError, match="not the oldest, closed segment"):
                log.drop(wrong)
        log.drop(1)
        log.drop(1)
        log.drop(77)
        assert log.segments() == (2, 3, 4, 5)
        with pytest.raises(LookupError):
            log.entries(1)
    assert not (place / segment_name(Kind.REDO, EPOCH, 1)).exists()
    with closing(reopen(dir_fd)) as log:
        assert log.segments() == (2, 3, 4, 5)
        log.drop(2)
        assert held(log) == plain(batches[2:])
    assert opened(place) == plain(batches[2:])


def test_no_segment_number_is_used_twice_while_the_log_is_not_finished(
    dir_fd: int, rng: random.Random
) -> None:
    """An undo log remembers which of them it has pre-images of."""
    used: list[int] = []
    create(dir_fd).close()
    for _ in range(4):
        with closing(reopen(dir_fd)) as log:
            log.write([frame(rng, 512)])
            log.roll()
            used.append(log.segments()[-1])
            for segment in log.segments()[: rng.randint(1, 2)]:
                log.drop(segment)
            assert log.segments(), "the next one was made before the last one went"
    assert used == sorted(set(used))


def test_a_finished_log_is_dropped_to_the_last_segment(place: Path, dir_fd: int, rng: random.Random) -> None:
    with closing(create(dir_fd)) as log:
        log.write([frame(rng, 512)])
        log.finish()
        log.drop(1)
        assert (log.segments(), log.size_bytes, held(log)) == ((), 0, [])
    assert (list(place.iterdir()), opened(place)) == ([], None)


def test_an_undo_log_keeps_its_notes_and_is_removed_whole(
    place: Path, dir_fd: int, rng: random.Random
) -> None:
    with closing(create(dir_fd, kind=Kind.UNDO)) as log:
        for note in (0, 3, 0, 5, 3, 2**64 - 1):
            log.write([frame(rng, 60 * KIB)], note)
        assert log.notes() == {3, 5, 2**64 - 1}
        assert len(log.segments()) > 1
        with pytest.raises(ValueError, match="not the oldest, closed segment of a redo log"):
            log.drop(1)
    with closing(reopen(dir_fd, kind=Kind.UNDO)) as log:
        assert log.notes() == {3, 5, 2**64 - 1}
        log.write([], 6)
        assert log.notes() == {3, 5, 6, 2**64 - 1}
    files = FaultyFiles()
    remove(files, dir_fd, Kind.UNDO, EPOCH)
    names = [call.name for call in files.calls if call.kind == "unlink"]
    assert names == [segment_name(Kind.UNDO, EPOCH, number) for number in range(len(names), 0, -1)]
    assert files.calls[-1].kind == "fsync"
    files.let_go()
    remove(Files(), dir_fd, Kind.UNDO, EPOCH)
    assert list(place.iterdir()) == []


def test_the_logs_of_a_directory_are_found_and_told_apart(place: Path, dir_fd: int) -> None:
    (place / "group.json").write_bytes(b"{}")
    (place / ".group.json.new").write_bytes(b"")
    logs = [(Kind.REDO, 2), (Kind.UNDO, 1), (Kind.UNDO, 10)]
    for kind, epoch in logs:
        Log.create(Files(), dir_fd, kind, epoch, SEED).close()
    assert found(Files(), dir_fd) == logs
    with pytest.raises(StateError, match="redo-0000000002-000001") as caught:
        Log.create(Files(), dir_fd, Kind.REDO, 2, SEED)
    assert caught.value.code == "log.exists"
    assert Log.open(Files(), dir_fd, Kind.UNDO, 2, SEED) is None
    for kind, epoch in logs:
        remove(Files(), dir_fd, kind, epoch)
    assert found(Files(), dir_fd) == []
    assert sorted(os.listdir(place)) == [".group.json.new", "group.json"]


def test_space_is_set_aside_and_given_back_when_a_segment_is_closed(
    tmp_path: Path, rng: random.Random
) -> None:
    """On the test's own file system: a tmpfs sets whole files aside."""
    with directory(tmp_path / "log") as fd, closing(create(fd, segment_bytes=8 * MIB)) as log:
        path = tmp_path / "log" / segment_name(Kind.REDO, EPOCH, 1)
        log.write([frame(rng, 20 * KIB)])
        assert log.size_bytes == 8 * MIB
        assert path.stat().st_blocks * 512 >= 8 * MIB
        log.roll()
        assert log.size_bytes == path.stat().st_size == 4096 * (1 + 6 + 1 + 1 + 1)
        assert path.stat().st_blocks * 512 < 128 * KIB


# ------------------------------------------------------------------ ways of writing and reading


def test_eight_frames_of_1_mib_are_one_direct_write_of_their_own_memory_and_one_sync(
    tmp_path: Path, rng: random.Random
) -> None:
    pool = BufferPool(64 * MIB)
    frames = []
    for _ in range(8):
        header, body = frame(rng, MIB)
        buffer = pool.take(len(body), lead=header.table_len)
        buffer.view[:] = body
        frames.append((header, buffer.view))
    files = Pieces()
    with directory(tmp_path / "log") as fd, closing(create(fd, files, segment_bytes=64 * MIB)) as log:
        files.calls.clear()
        files.addresses.clear()
        log.write(frames)
        assert files.calls == [("pwritev", True), ("fdatasync", True)]
        assert files.addresses[0][1::2] == [(address(body[16:]), MIB) for _, body in frames]
        assert sum(length for _, length in files.addresses[0]) == 8 * MIB + 9 * ALIGN
        assert held(log) == plain([frames])
        assert all(direct for kind, direct in files.calls if kind == "preadv")


REFUSALS: dict[str, Callable[[str, int], bool]] = {
    "at once": lambda kind, number: kind == "open",
    "when written": lambda kind, number: kind == "pwritev",
    "from the third write on": lambda kind, number: kind == "pwritev" and number > 2,
    "when read": lambda kind, number: kind == "preadv",
}


@pytest.mark.parametrize("refuse", REFUSALS.values(), ids=REFUSALS)
def test_where_direct_io_is_refused_all_goes_through_the_page_cache(
    dir_fd: int, rng: random.Random, refuse: Callable[[str, int], bool]
) -> None:
    batches = [batch(rng, 4) for _ in range(6)]
    files = Pieces(refuse)
    with closing(create(dir_fd, files)) as log:
        for frames in batches:
            log.write(frames)
        assert held(log) == plain(batches)
    with closing(reopen(dir_fd, files)) as log:
        assert held(log) == held_singly(log) == plain(batches)
    assert any(not direct for _, direct in files.calls)


def test_a_file_system_with_larger_blocks_is_written_through_the_page_cache(
    dir_fd: int, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "direct_alignment", lambda fd: linux.DirectAlignment(512, 16 * KIB))
    frames, files = batch(rng, 4), Pieces()
    with closing(create(dir_fd, files)) as log:
        log.write(frames)
        assert held(log) == plain([frames])
    assert not any(direct for _, direct in files.calls)


@pytest.mark.parametrize("length", [3, 512, 4096, 4096 + 512, 24 * KIB])
def test_short_writes_and_reads_are_gone_on_with(dir_fd: int, rng: random.Random, length: int) -> None:
    batches = [[frame(rng, 20 * KIB), frame(rng, 512)] for _ in range(3)]
    files = FaultyFiles()
    for kth in range(1, 40):
        files.shorten("pwritev", kth, length)
        files.shorten("preadv", 2 * kth, length)
    log = create(dir_fd, files)
    for frames in batches:
        log.write(frames)
    assert held(log) == plain(batches)
    log.close()
    log = reopen(dir_fd, files)
    assert held(log) == plain(batches)
    log.close()
    files.let_go()


def test_bodies_lie_in_the_given_memory_with_the_payload_on_a_page(dir_fd: int, rng: random.Random) -> None:
    frames = [frame(rng, 20 * KIB), frame(rng, 0)]
    pool = BufferPool(0)
    with closing(create(dir_fd)) as log:
        log.write(frames)
        for entry, (header, body) in zip(log.entries(1), frames, strict=True):
            assert entry.header == header
            into = pool.take(record_bytes(header)).view
            got = log.read(1, entry, into)
            assert got == body
            payload = address(got[16:]) if len(got) > 16 else 0
            assert payload % PAGE == 0
            start = address(into)
            assert start <= address(got) <= start + len(into) - len(got)


def test_memory_that_is_too_small_or_lies_oddly_is_refused(dir_fd: int, rng: random.Random) -> None:
    frames = [frame(rng, 20 * KIB)] * 2
    memory = BufferPool(0).take(MIB).view
    with closing(create(dir_fd)) as log:
        log.write(frames)
        entries = log.entries(1)
        size = record_bytes(entries[0].header)
        for bad in (memory[: size - 1], memory[512:], memory.toreadonly(), memory[:0]):
            with pytest.raises(ValueError, match="too few"):
                log.read(1, entries[0], bad)
        assert len(log.read_run(1, entries, memory[: 2 * size - 1])) == 1
        assert len(log.read_run(1, entries, memory[: 2 * size])) == 2
        assert len(log.read_run(1, entries[::-1], memory)) == 1, "against the order of the log"


def test_a_log_that_is_closed_is_used_no_more_and_leaves_nothing_open(
    dir_fd: int, rng: random.Random
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    log = create(dir_fd)
    for _ in range(12):
        log.write([frame(rng, 512)])
        log.roll()
    held(log)
    assert len(os.listdir("/proc/self/fd")) - before <= 6, "few are kept open, however many segments"
    log.close()
    log.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(Exception, match="cannot write the redo log of epoch 7 any more"):
        log.write([])


# ------------------------------------------------------------------ several threads


def test_segments_are_read_and_dropped_while_others_are_written(place: Path, dir_fd: int, seed: int) -> None:
    """A writer, an applier that drops, and two that look at everything that is there."""
    batches = [batch(random.Random(seed + number), 4) for number in range(120)]
    expected = plain(batches)
    with closing(create(dir_fd)) as log, ThreadPoolExecutor(4) as threads:
        turns: list[SimpleQueue[bool]] = [SimpleQueue() for _ in range(3)]

        def write() -> None:
            try:
                for frames in batches:
                    log.write(frames)
                    for turn in turns:
                        turn.put(True)
                log.finish()
            finally:
                for turn in turns:
                    turn.put(False)

        def apply() -> list:
            applied = []
            more = True
            while more:
                more = turns[0].get()
                for segment in filter(log.closed, log.segments()):
                    applied += held(log, segment)
                    log.drop(segment)
            return applied

        def look(turn: SimpleQueue[bool]) -> int:
            times = 0
            while turn.get():
                for segment in log.segments():
                    with suppress(LookupError):
                        content = held(log, segment)
                        assert content == [] or content[0] in expected
                        times += bool(content)
                assert log.size_bytes >= 0 and log.notes() == frozenset()
            return times

        looking = [threads.submit(look, turn) for turn in turns[1:]]
        applying, writing = threads.submit(apply), threads.submit(write)
        writing.result()
        assert applying.result() == expected
        assert all(each.result() for each in looking)
    assert list(place.iterdir()) == []


def test_an_entry_of_a_segment_that_is_gone_is_not_found(dir_fd: int, rng: random.Random) -> None:
    memory = BufferPool(0).take(MIB).view
    with closing(create(dir_fd)) as log:
        log.write([frame(rng, 512)])
        log.roll()
        entry: Entry = log.entries(1)[0]
        log.read(1, entry, memory)
        log.drop(1)
        for gone in (lambda: log.read(1, entry, memory), lambda: log.entries(1), lambda: log.entries(9)):
            with pytest.raises(LookupError):
                gone()


def test_whoever_reads_a_segment_in_the_moment_of_its_removal_is_told_that_it_is_gone(dir_fd: int) -> None:
    class Reads(Files):
        seen = 0

        def unlink(self, dir_fd: int, name: str) -> None:
            super().unlink(dir_fd, name)
            with pytest.raises(LookupError):
                log.entries(1)
            assert log.segments() == (2,)
            self.seen += 1

    files = Reads()
    with closing(create(dir_fd, files)) as log:
        log.write([])
        log.roll()
        log.drop(1)
    assert files.seen == 1


def test_a_full_disk_is_told_before_anything_is_written(place: Path, dir_fd: int) -> None:
    files = FaultyFiles()
    files.fail("fallocate", 1, errno.ENOSPC)
    with pytest.raises(SpaceError) as caught:
        create(dir_fd, files)
    assert caught.value.code == "target.full"
    assert list(place.iterdir()) == []
    files.let_go()
