"""Opening a log that was not closed, or was damaged: what was acknowledged is there, or its loss is told."""

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from protocol.constants import HEADER_BYTES
from protocol.header import FrameType, Header, pack
from protocol.messages import Interval
from protocol.payload import Extent, build
from replicator.errors import StateError
from replicator.files import Files
from replicator.log import records
from replicator.log.log import Kind, Log
from replicator.log.records import ALIGN, Batch, Identity, Position, head_bytes, segment_name
from tests.replicator.log.batches import (
    EPOCH,
    KIB,
    SEED,
    Batches,
    Content,
    batch,
    directory,
    frame,
    held,
    opened,
    plain,
    restore,
    snapshot,
    written,
)

FIRST = segment_name(Kind.REDO, EPOCH, 1)
SECOND = segment_name(Kind.REDO, EPOCH, 2)
THIRD = segment_name(Kind.REDO, EPOCH, 3)


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


def one_each(rng: random.Random, batches: int, size: int = 8 * KIB) -> Batches:
    """Batches of one frame. With 8 KiB they have four blocks: head, two of payload, batch record."""
    return [[frame(rng, size)] for _ in range(batches)]


def identity(path: Path, number: int = 1) -> Identity:
    """What the blocks of a segment name."""
    head = records.unpack_segment((path / segment_name(Kind.REDO, EPOCH, number)).read_bytes()[:ALIGN], SEED)
    assert head is not None
    return head[0]


def poke(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def notes(path: Path) -> frozenset[int]:
    """Notes of the log of a directory."""
    with directory(path) as dir_fd:
        log = Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        assert log is not None
        with closing(log):
            return log.notes()


def told(path: Path, kind: Kind = Kind.REDO) -> str:
    """What is told of a damaged log; opening it must have changed nothing, however often it is tried."""
    before, messages = snapshot(path), []
    for _ in range(2):
        with pytest.raises(StateError) as caught:
            opened(path, kind=kind)
        assert caught.value.code == "log.damaged"
        assert snapshot(path) == before, "the evidence was changed"
        messages.append(caught.value.message)
    assert messages[0] == messages[1]
    return messages[0]


def goes_on(path: Path, expected: Content, rng: random.Random) -> None:
    """The log holds this, takes more, and is then the same when it is opened once more."""
    frames = [frame(rng, 512)]
    with directory(path) as dir_fd:
        log = Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        assert log is not None
        with closing(log):
            assert held(log) == expected
            log.write(frames)
            assert held(log) == [*expected, *plain([frames])]
    assert opened(path) == [*expected, *plain([frames])]


# ------------------------------------------------------------------ torn


def test_a_log_that_was_never_closed_is_whole_and_goes_on(in_memory: Path, rng: random.Random) -> None:
    batches = [batch(rng) for _ in range(12)]
    written(in_memory, batches, segment_bytes=128 * KIB)
    assert len(snapshot(in_memory)) > 1
    goes_on(in_memory, plain(batches), rng)


def test_cut_off_at_every_block_the_whole_batches_are_left(in_memory: Path, rng: random.Random) -> None:
    batches = one_each(rng, 3)
    written(in_memory, batches)
    whole = snapshot(in_memory)
    size = len(whole[FIRST])
    assert size == ALIGN * (1 + 3 * 4)
    for blocks in range(1, 1 + 3 * 4 + 1):
        restore(in_memory, {FIRST: whole[FIRST][: blocks * ALIGN]})
        assert opened(in_memory) == plain(batches[: (blocks - 1) // 4]), f"cut off after {blocks} blocks"


@pytest.mark.parametrize("tail", [b"", b"\0", b"\xff" * 512, b"RPLF" * 5000])
def test_rubbish_behind_the_last_batch_is_cut_off(in_memory: Path, rng: random.Random, tail: bytes) -> None:
    batches = one_each(rng, 2)
    written(in_memory, batches)
    content = snapshot(in_memory)
    restore(in_memory, {FIRST: content[FIRST] + tail})
    goes_on(in_memory, plain(batches), rng)


@pytest.mark.parametrize("block", range(3))
def test_a_batch_record_that_arrived_before_its_data_is_torn_not_lost(
    in_memory: Path, rng: random.Random, block: int
) -> None:
    batches = one_each(rng, 3)
    written(in_memory, batches)
    poke(in_memory / FIRST, ALIGN * (1 + 2 * 4 + block), bytes(512))
    goes_on(in_memory, plain(batches[:2]), rng)


def test_a_segment_made_half_is_removed(in_memory: Path, rng: random.Random) -> None:
    batches = one_each(rng, 2)
    written(in_memory, batches)
    opened(in_memory)
    for half in (b"", bytes(100), bytes(ALIGN), b"\xff" * ALIGN):
        (in_memory / SECOND).write_bytes(half)
        assert opened(in_memory) == plain(batches)
        assert list(snapshot(in_memory)) == [FIRST]
    for half in (b"", bytes(ALIGN)):
        restore(in_memory, {FIRST: half})
        assert opened(in_memory) is None
        assert snapshot(in_memory) == {}


def test_a_closed_segment_whose_end_is_damaged_is_read_record_by_record_and_closed_again(
    in_memory: Path, rng: random.Random
) -> None:
    batches = one_each(rng, 40, 512)
    written(in_memory, batches, segment_bytes=192 * KIB)
    opened(in_memory)
    closed = snapshot(in_memory)
    assert len(closed) == 3
    for name, content in closed.items():
        for at in range(len(content) - 2 * ALIGN, len(content), 512):
            restore(in_memory, closed)
            poke(in_memory / name, at, rng.randbytes(512))
            assert opened(in_memory) == plain(batches), f"{name} at {at}"
            assert snapshot(in_memory) == closed
        for cut in (1, ALIGN, ALIGN + 5, 2 * ALIGN):
            restore(in_memory, closed)
            (in_memory / name).write_bytes(content[:-cut])
            assert opened(in_memory) == plain(batches), f"{name} without its last {cut} bytes"
            assert snapshot(in_memory) == closed


def test_a_finished_log_stays_finished_when_its_index_is_damaged(in_memory: Path, rng: random.Random) -> None:
    batches = one_each(rng, 3)
    with directory(in_memory) as dir_fd:
        log = Log.create(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        for frames in batches:
            log.write(frames)
        log.finish()
        log.close()
        before = snapshot(in_memory)
        poke(in_memory / FIRST, len(before[FIRST]) - 2 * ALIGN + 100, b"\xff" * 8)
        found = Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        assert found is not None and found.finished
        found.close()
    assert snapshot(in_memory) == before


# ------------------------------------------------------------------ forged


def test_what_another_log_wrote_at_this_place_is_not_taken_for_data(
    in_memory: Path, tmp_path: Path, rng: random.Random
) -> None:
    """Of the same kind, epoch, segment, positions and seed: only the log's id tells."""
    written(tmp_path / "older", one_each(rng, 5))
    older = (tmp_path / "older" / FIRST).read_bytes()
    batches = one_each(rng, 2)
    written(in_memory, batches)
    path = in_memory / FIRST
    own = path.read_bytes()
    for start in range(ALIGN * 9, len(older), ALIGN):
        path.write_bytes(own + bytes(start - len(own)) + older[start:])
        assert opened(in_memory) == plain(batches)


def test_batch_records_of_another_place_do_not_count(in_memory: Path, rng: random.Random) -> None:
    batches = one_each(rng, 2)
    written(in_memory, batches)
    path, own = in_memory / FIRST, identity(in_memory)
    content = path.read_bytes()
    end = len(content)
    for position, named in [
        (end, Identity(Kind.REDO, own.log, EPOCH, 2)),
        (end, Identity(Kind.REDO, own.log, EPOCH + 1, 1)),
        (end, Identity(Kind.UNDO, own.log, EPOCH, 1)),
        (end + ALIGN, own),
        (end - ALIGN, own),
    ]:
        for batch_record in (Batch(0, Position(1, end), 0), Batch(0, Position(1, end + 64 * ALIGN), 0)):
            forged = records.pack_batch(named, position, batch_record, SEED)
            path.write_bytes(content + forged)
            assert opened(in_memory) == plain(batches), (position, named)
            path.write_bytes(content + records.pack_batch(named, position, batch_record, SEED + 1))
            assert opened(in_memory) == plain(batches), (position, named)


@pytest.mark.parametrize(
    "record",
    [
        Batch(1, Position(1, 9 * ALIGN), 42),
        Batch(0, Position(1, 5 * ALIGN), 42),
        Batch(0, Position(0, 9 * ALIGN), 42),
        Batch(0, Position(0, 0), 42),
    ],
    ids=["too many records", "an older end", "another segment's end", "no end"],
)
def test_a_batch_record_that_contradicts_what_is_before_it_adds_nothing(
    in_memory: Path, rng: random.Random, record: Batch
) -> None:
    batches = one_each(rng, 2)
    written(in_memory, batches)
    path = in_memory / FIRST
    content = path.read_bytes()
    path.write_bytes(content + records.pack_batch(identity(in_memory), len(content), record, SEED))
    assert (opened(in_memory), notes(in_memory)) == (plain(batches), frozenset())
    path.write_bytes(content)
    right = replace(record, records=0, previous=Position(1, len(content)))
    path.write_bytes(content + records.pack_batch(identity(in_memory), len(content), right, SEED))
    assert notes(in_memory) == {42}, "else it were refused for something else"


def test_a_frame_that_is_no_data_is_no_record(in_memory: Path, rng: random.Random) -> None:
    """Its header and body may be whole, and a batch record may count it."""
    batches = one_each(rng, 1)
    written(in_memory, batches)
    path = in_memory / FIRST
    content = path.read_bytes()
    header = Header(FrameType.PING, 8, body_hash=xxh3_64_intdigest(bytes(8), SEED))
    foreign = pack(header, SEED).ljust(2 * ALIGN, b"\0")
    end = len(content) + len(foreign)
    counted = Batch(1, Position(1, len(content)), 42)
    path.write_bytes(content + foreign + records.pack_batch(identity(in_memory), end, counted, SEED))
    assert (opened(in_memory), notes(in_memory)) == (plain(batches), frozenset())


def test_disk_content_that_looks_like_a_log_is_disk_content(in_memory: Path, rng: random.Random) -> None:
    """A guest's disk may hold the file of a log, be it the beginning of this very one."""
    batches = one_each(rng, 2)
    path = in_memory / FIRST
    with directory(in_memory) as dir_fd:
        log = Log.create(Files(), dir_fd, Kind.REDO, EPOCH, SEED)
        for frames in batches:
            log.write(frames)
        content = memoryview(bytearray(path.read_bytes()))
        extent = Extent(0, len(content))
        made = build(1, EPOCH, Interval(0, extent.end), [extent], content, None, SEED)
        batches.append([(made.header, memoryview(made.table + bytes(content)))])
        log.write(batches[-1])
        log.close()
    whole = path.read_bytes()
    assert whole.count(whole[: ALIGN // 2]) == 2
    assert opened(in_memory) == plain(batches)
    for blocks in range(10, len(whole) // ALIGN):
        path.write_bytes(whole[: blocks * ALIGN])
        assert opened(in_memory) == plain(batches[:2]), "the batch in flight, torn"


# ------------------------------------------------------------------ lost


@pytest.mark.parametrize("sector", range(8 * 4))
def test_a_sector_lost_of_an_earlier_batch_is_told_unless_it_was_padding(
    in_memory: Path, rng: random.Random, sector: int
) -> None:
    batches = one_each(rng, 3)
    written(in_memory, batches)
    padding = 1 <= sector < 8  # the head has 88 bytes
    poke(in_memory / FIRST, ALIGN * 5 + sector * 512, bytes(512))
    lost_nothing = sector in range(8 * 3 + 1, 8 * 4 - 1)  # zeros inside the batch record
    if padding or lost_nothing:
        assert opened(in_memory) == plain(batches)
    else:
        message = told(in_memory)
        assert message.startswith(f"{FIRST} is damaged at byte {5 * ALIGN}")
        assert str(9 * ALIGN) in message


def test_a_lost_batch_is_told_even_if_the_one_behind_it_is_torn(in_memory: Path, rng: random.Random) -> None:
    written(in_memory, one_each(rng, 3))
    poke(in_memory / FIRST, ALIGN * 7, bytes(512))
    poke(in_memory / FIRST, ALIGN * 11, bytes(512))
    told(in_memory)


@pytest.mark.parametrize("missing", [FIRST, SECOND, THIRD])
def test_a_missing_segment_is_told_unless_it_is_the_oldest_or_newest(
    in_memory: Path, rng: random.Random, missing: str
) -> None:
    batches = one_each(rng, 3)
    written(in_memory, batches, segment_bytes=32 * KIB)
    assert list(snapshot(in_memory)) == [FIRST, SECOND, THIRD]
    (in_memory / missing).unlink()
    if missing == SECOND:
        assert "missing" in told(in_memory)
    else:  # as after a drop; and what the newest held, only the sender knows
        assert opened(in_memory) == plain(batches[1:] if missing == FIRST else batches[:2])


def test_an_undo_log_without_its_first_segment_is_told(in_memory: Path, rng: random.Random) -> None:
    written(in_memory, one_each(rng, 3), kind=Kind.UNDO, segment_bytes=32 * KIB)
    (in_memory / segment_name(Kind.UNDO, EPOCH, 1)).unlink()
    assert "undo-0000000007-000001.seg is missing" in told(in_memory, Kind.UNDO)


def test_a_segment_that_lost_its_last_batches_is_told_by_the_next_one(
    in_memory: Path, rng: random.Random
) -> None:
    batches = one_each(rng, 4)
    written(in_memory, batches, segment_bytes=48 * KIB)
    whole = snapshot(in_memory)
    assert len(whole) == 2
    for blocks in range(1 + 2 * 4):
        restore(in_memory, {**whole, FIRST: whole[FIRST][: blocks * ALIGN]})
        told(in_memory)
    restore(in_memory, {**whole, FIRST: whole[FIRST][: (1 + 2 * 4) * ALIGN]})
    assert opened(in_memory) == plain(batches), "only its index and trailer were missing"


def test_a_closed_segment_that_lost_its_last_batch_and_its_index_or_trailer_is_told_by_the_other(
    in_memory: Path, rng: random.Random
) -> None:
    batches = one_each(rng, 2)
    written(in_memory, batches)
    opened(in_memory)
    size = (in_memory / FIRST).stat().st_size
    closed = snapshot(in_memory)
    trailer, index, batch_record = (size - blocks * ALIGN for blocks in (1, 2, 3))
    for damaged in (trailer, index):
        restore(in_memory, closed)
        poke(in_memory / FIRST, damaged, bytes(512))
        assert opened(in_memory) == plain(batches)
        restore(in_memory, closed)
        for place in (damaged, batch_record):
            poke(in_memory / FIRST, place, bytes(512))
        assert str(batch_record + ALIGN) in told(in_memory)


def test_a_segment_of_another_log_is_told(in_memory: Path, tmp_path: Path, rng: random.Random) -> None:
    for path in (in_memory, tmp_path / "other"):
        written(path, one_each(rng, 3), segment_bytes=32 * KIB)
    ours, other = snapshot(in_memory), snapshot(tmp_path / "other")
    for name in ours:
        restore(in_memory, {**ours, name: other[name]})
        told(in_memory)
    for name, another in ((FIRST, SECOND), (SECOND, FIRST), (THIRD, SECOND)):
        restore(in_memory, {**ours, name: ours[another]})
        told(in_memory)
    restore(in_memory, {segment_name(Kind.UNDO, EPOCH, 1): ours[FIRST]})
    told(in_memory, Kind.UNDO)
    restore(in_memory, {segment_name(Kind.REDO, EPOCH + 1, 1): ours[FIRST]})
    with directory(in_memory) as dir_fd, pytest.raises(StateError, match=f"of epoch {EPOCH}"):
        Log.open(Files(), dir_fd, Kind.REDO, EPOCH + 1, SEED)


def test_a_log_of_another_installation_is_not_read(in_memory: Path, rng: random.Random) -> None:
    written(in_memory, one_each(rng, 1))
    opened(in_memory)
    (in_memory / SECOND).write_bytes(b"")
    with directory(in_memory) as dir_fd, pytest.raises(StateError, match="the header of"):
        Log.open(Files(), dir_fd, Kind.REDO, EPOCH, SEED + 1)


def test_a_damaged_header_with_batches_behind_it_is_told(in_memory: Path, rng: random.Random) -> None:
    written(in_memory, one_each(rng, 2))
    poke(in_memory / FIRST, 100, b"\1")
    assert told(in_memory) == f"the header of {FIRST} does not match its hash"


# ------------------------------------------------------------------ flipped bits


def matters(batches: Batches, segments: dict[str, bytes]) -> Iterator[tuple[str, int, int]]:
    """File, first byte and end of everything that a table or payload consists of."""
    names = iter(segments)
    name, position = next(names), ALIGN
    for frames in batches:
        size = sum(records.record_bytes(header) for header, _ in frames)
        if segments[name][position + size + 6 : position + size + 7] != bytes([records.BlockType.BATCH]):
            name, position = next(names), ALIGN
        for header, body in frames:
            yield name, position + HEADER_BYTES, position + HEADER_BYTES + header.table_len
            payload_at = position + head_bytes(header)
            yield name, payload_at, payload_at + len(body) - header.table_len
            position += records.record_bytes(header)
        position += ALIGN


@pytest.mark.parametrize("state", ["open", "closed"])
def test_no_flipped_bit_is_ever_served(in_memory: Path, rng: random.Random, count, state: str) -> None:
    """Any bit of any file: what is read is right, or the damage is told. Only the newest batch looks torn."""
    sizes = [[20 * KIB, 512], [0], [33 * KIB], [12 * KIB, 512, 0], [4608], [512, 4096]]
    batches = [[frame(rng, size) for size in each] for each in sizes]
    written(in_memory, batches, segment_bytes=80 * KIB)
    if state == "closed":
        opened(in_memory)
    good, whole = snapshot(in_memory), plain(batches)
    assert len(good) > 1
    newest = max(good)
    bodies = list(matters(batches, good))
    seen = {"told": 0, "harmless": 0, "torn": 0}
    for _ in range(count(1_000, 50_000)):
        if rng.random() < 0.5:
            name, start, end = rng.choice([each for each in bodies if each[1] < each[2]])
            place, must_tell = rng.randrange(start, end), True
        else:
            name = rng.choice(list(good))
            place, must_tell = rng.randrange(len(good[name])), False
        restore(in_memory, good)
        flipped = bytes([good[name][place] ^ 1 << rng.randrange(8)])
        poke(in_memory / name, place, flipped)
        try:
            found = opened(in_memory)
        except StateError as error:
            assert error.code == "log.damaged"
            seen["told"] += 1
            continue
        if found == whole:
            assert not must_tell, f"byte {place} of {name}"
            seen["harmless"] += 1
        else:
            assert (found, name, state) == (plain(batches[:-1]), newest, "open"), f"byte {place} of {name}"
            seen["torn"] += 1
    assert seen["told"] and seen["harmless"], seen
    assert bool(seen["torn"]) == (state == "open"), seen
