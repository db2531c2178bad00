"""Windows of records fit into the memory that is there for them, and leave nothing out."""

import random
from pathlib import Path

import pytest

from protocol.constants import RAW_MAX_BYTES, TABLE_MAX_BYTES
from protocol.header import FrameType, Header
from protocol.messages import Interval
from protocol.payload import Extent
from replicator.files import Files
from replicator.log import workspace
from replicator.log.log import Kind, Log
from replicator.log.records import ALIGN, Entry, record_bytes
from replicator.log.workspace import FRAME_BYTES, SLOTS, Workspace, windows
from tests.replicator.log.batches import KIB, MIB, SEED, directory
from tests.replicator.log.epochs import SECTOR, Change, frame


def entry(table: int, payload: int, raw: int) -> Entry:
    return Entry(Header(FrameType.DATA, table + payload, table_len=table, raw_len=raw), 0)


@pytest.mark.parametrize(
    ("table", "payload", "raw"),
    [
        (0, 0, 0),
        (16, SECTOR, SECTOR),
        (16, MIB, MIB),
        (16, 9 * KIB, RAW_MAX_BYTES),
        (TABLE_MAX_BYTES, 0, 0),
        (TABLE_MAX_BYTES, RAW_MAX_BYTES, RAW_MAX_BYTES),
    ],
)
def test_a_window_is_as_large_as_memory_allows_and_no_larger(table: int, payload: int, raw: int) -> None:
    one = entry(table, payload, raw)
    room, extents, most = 8 * MIB, MIB // 16, SLOTS * FRAME_BYTES
    needs = record_bytes(one.header) + ALIGN  # a batch record may stand behind each
    fits = min(room // needs, extents * 16 // table if table else room, most // raw if raw else room)
    found = [len(window) for window in windows([one] * 5000)]
    assert found[:-1] == [fits] * (len(found) - 1)
    assert sum(found) == 5000
    assert found[-1] <= fits


def test_what_fits_nowhere_has_a_window_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "SLOTS", 1)
    large = entry(16, 9 * KIB, RAW_MAX_BYTES)
    assert list(windows([large] * 3)) == [[large]] * 3
    assert list(windows([])) == []


def test_records_are_read_in_any_order_whatever_stands_between_them(in_memory: Path, seed: int) -> None:
    """Each in a batch of its own, so that as much as can be lies between them."""
    rng = random.Random(seed)
    with directory(in_memory / "logs") as dir_fd:
        log = Log.create(Files(), dir_fd, Kind.REDO, 1, SEED)
        for number in range(1600):
            change = Change(1, Interval(0, SECTOR), (Extent(0, SECTOR),), number.to_bytes(SECTOR, "little"))
            log.write([frame(change, 1, None)])
        log.finish()
        wanted = list(log.entries(1))
        rng.shuffle(wanted)
        memory = Workspace()
        found = list[bytes]()
        before = list[tuple[Header, memoryview]]()
        for window in windows(wanted):
            read = memory.read(log, 1, window)
            found += [bytes(body[16:]) for _, body in before]  # which a next call leaves alone
            before = read
        found += [bytes(body[16:]) for _, body in before]
        numbers = {each.offset: number for number, each in enumerate(log.entries(1))}
        assert [int.from_bytes(body, "little") for body in found] == [numbers[each.offset] for each in wanted]
        log.close()
