"""A group's record: sealed epochs stay in order, what expires is past its time, damage is told."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import NO_ID, Consistency, Mode
from replicator.errors import StateError
from replicator.files import Files
from replicator.log import points
from replicator.log.points import (
    FILE,
    GroupRecord,
    Retention,
    SealedDisk,
    SealedEpoch,
    describe,
    expired,
    forget,
    load,
    seal,
    store,
    undo_needed,
)
from replicator.private_directory import HeldDirectory, PrivateDirectory

MIB = 1024 * 1024
S = 1_000_000_000
FUZZY, PER_DISK, CRASH = Consistency.FUZZY, Consistency.PER_DISK, Consistency.CRASH
DISKS = (SealedDisk(1, "system", 8 * MIB, 5 * S), SealedDisk(2, "data", 512, 5 * S))


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldDirectory]:
    with PrivateDirectory(Files(), tmp_path / "group").held() as held:
        yield held


def id_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def under_way(record: GroupRecord, number: int, mode: Mode = Mode.INCREMENTAL) -> GroupRecord:
    return replace(record, under_way=id_of(number), number=number, mode=mode, early=True)


def sealed(*epochs: tuple[int, Consistency], every_s: int = 10) -> GroupRecord:
    """A group whose epochs 1, 2, … were sealed so, `every_s` seconds apart, from 0 s on."""
    record = GroupRecord("web")
    for number, consistency in epochs:
        record = seal(under_way(record, number), (number - 1) * every_s * S, consistency, DISKS)
    return record


def line_of(*kinds: Consistency) -> GroupRecord:
    return sealed(*enumerate(kinds, 1))


# ------------------------------------------------------------------ sealing


def test_sealing_appends_and_each_is_the_parent_of_the_next() -> None:
    record = line_of(CRASH, FUZZY, CRASH)
    assert record.history == (id_of(1), id_of(2), id_of(3))
    assert [epoch.parent for epoch in record.epochs] == [NO_ID, id_of(1), id_of(2)]
    assert (record.sealed, record.under_way, record.early, record.number) == (id_of(3), NO_ID, False, 3)
    assert [epoch.is_point for epoch in record.epochs] == [True, False, True]


def test_a_full_epoch_begins_a_new_history() -> None:
    record = seal(under_way(line_of(CRASH, CRASH), 3, Mode.FULL), 99, CRASH, DISKS)
    assert record.epochs == (SealedEpoch(id_of(3), 3, NO_ID, 99, CRASH, DISKS),)


def test_nothing_under_way_cannot_be_sealed() -> None:
    with pytest.raises(ValueError, match="no epoch"):
        seal(line_of(CRASH), 1, CRASH, DISKS)


def test_an_id_that_was_used_again_names_the_newer_epoch(held: HeldDirectory) -> None:
    record = replace(line_of(CRASH, CRASH), under_way=id_of(1), number=3)
    record = seal(record, 99, CRASH, DISKS)
    assert record.find(id_of(1)) == record.epochs[2]
    assert record.find(id_of(2)) == record.epochs[1]
    assert record.find(id_of(9)) is None
    store(held, record)
    assert load(held, "web") == record


# ------------------------------------------------------------------ what goes


@pytest.mark.parametrize(
    ("kinds", "now_s", "retention", "gone"),
    [
        ([CRASH] * 4, 30, Retention(keep_s=100), []),
        ([CRASH] * 4, 30, Retention(keep_s=15), [1, 2]),
        ([CRASH] * 4, 30, Retention(keep_s=20), [1]),
        ([CRASH] * 4, 20, Retention(keep_s=20), []),
        ([CRASH] * 4, 9999, Retention(keep_s=20), [1, 2, 3]),
        ([FUZZY] * 4, 9999, Retention(keep_s=20), [1, 2, 3]),
        ([CRASH, CRASH, FUZZY, FUZZY], 9999, Retention(keep_s=20), [1]),  # the only way back that is left
        ([FUZZY, CRASH, CRASH], 9999, Retention(keep_s=20), [1, 2]),
        ([CRASH] * 4, 0, Retention(keep_s=1e9, keep_count=2), [1, 2]),
        ([CRASH] * 4, 0, Retention(keep_s=1e9, keep_count=1), [1, 2, 3]),
        ([CRASH] * 4, 0, Retention(keep_s=1e9, keep_count=0), [1, 2, 3]),
        ([CRASH] * 4, 0, Retention(keep_s=1e9, keep_count=4), []),
        ([CRASH, FUZZY, CRASH, FUZZY], 0, Retention(keep_s=1e9, keep_count=1), [1, 2]),
        ([CRASH, FUZZY, FUZZY], 0, Retention(keep_s=1e9, keep_count=1), []),
        ([FUZZY, FUZZY, FUZZY], 0, Retention(keep_s=1e9, keep_count=1), []),
        ([CRASH] * 4, -9999, Retention(keep_s=1), []),  # a clock that was set back
        ([], 0, Retention(), []),
        ([CRASH], 9999, Retention(keep_s=0, keep_count=0), []),
    ],
)
def test_what_expires(kinds: list[Consistency], now_s: int, retention: Retention, gone: list[int]) -> None:
    assert list(expired(line_of(*kinds), now_s * S, retention)) == gone


def test_by_default_a_day_is_kept_however_many_points_it_has() -> None:
    record = sealed(*((number, CRASH) for number in range(1, 1001)), every_s=100)
    now_ns = record.epochs[-1].sealed_ns
    assert len(expired(record, now_ns, Retention())) == 1000 - 864 - 1


@given(
    st.lists(st.sampled_from([CRASH, FUZZY, PER_DISK]), min_size=1, max_size=12),
    st.integers(-50, 200),
    st.integers(0, 100),
    st.none() | st.integers(0, 6),
)
def test_whatever_expires_the_newest_epoch_and_the_newest_point_stay(
    kinds: list[Consistency], now_s: int, keep_s: int, keep_count: int | None
) -> None:
    record = line_of(*kinds)
    gone = expired(record, now_s * S, Retention(keep_s, keep_count))
    left = forget(record, gone)
    assert left.sealed == record.sealed
    assert any(epoch.is_point for epoch in left.epochs) == any(epoch.is_point for epoch in record.epochs)
    assert not expired(left, now_s * S, Retention(keep_s, keep_count))  # at once all that may go
    young = {epoch.number for epoch in record.epochs if now_s * S - epoch.sealed_ns <= keep_s * S}
    if keep_count is None:
        assert not young & set(gone)


def test_the_record_never_outgrows_its_file(held: HeldDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "ROWS_MAX", 30)  # an epoch of two disks has three
    assert list(expired(line_of(*[CRASH] * 12), 0, Retention(keep_s=1e9))) == [1, 2]
    assert not expired(line_of(*[CRASH] * 10), 0, Retention(keep_s=1e9))


def test_a_full_record_can_be_read_again(held: HeldDirectory) -> None:
    disks = tuple(SealedDisk(number, f"disk-{number}", 1 << 62, 1 << 62) for number in range(1, 4))
    epochs, parent = [], NO_ID
    for number in range(1, points.ROWS_MAX // 4 + 1):
        epochs.append(SealedEpoch(id_of(1 << 127 | number), number, parent, 1 << 62, CRASH, disks))
        parent = epochs[-1].id
    record = GroupRecord("web", tuple(epochs), number=len(epochs))
    store(held, record)
    assert (held.path / FILE).stat().st_size < points.FILE_MAX_BYTES / 2
    assert load(held, "web") == record


def test_only_the_oldest_can_be_forgotten() -> None:
    record = line_of(CRASH, CRASH, CRASH)
    assert forget(record, ()) == record
    assert forget(record, (1, 2)).epochs == record.epochs[2:]
    for numbers in [(2,), (1, 3), (1, 2, 3), (9,), (1, 1)]:
        with pytest.raises(ValueError, match="oldest"):
            forget(record, numbers)


def test_undo_is_needed_while_it_leads_to_something_retained() -> None:
    record = line_of(CRASH, CRASH, CRASH)
    assert undo_needed(record) == {1, 2, 3}  # that of 1 leads to what was there before
    assert undo_needed(forget(record, (1,))) == {3}  # 2 can be gone back to, 1 cannot
    assert undo_needed(forget(record, (1, 2))) == set()
    assert undo_needed(under_way(forget(record, (1, 2)), 7)) == {7}
    assert undo_needed(GroupRecord("web")) == set()


# ------------------------------------------------------------------ telling


def test_recovery_points_are_told_and_fuzzy_passes_are_not() -> None:
    record = line_of(CRASH, FUZZY)
    late = (DISKS[0], replace(DISKS[1], snapshot_ns=5 * S + 1_500_001))
    record = seal(under_way(record, 3), 77 * S, PER_DISK, late)
    record = seal(under_way(record, 4), 1_700_000_000_123_999_999, CRASH, (SealedDisk(3, "third", 512),))
    assert [epoch.skew_ms for epoch in record.epochs] == [0, 0, 2, 0]
    assert describe(record) == [
        {
            "id": id_of(number).hex(),
            "epoch": id_of(number).hex(),
            "time": time,
            "consistency": consistency,
            "skew_ms": skew_ms,
            "disks": disks,
        }
        for number, time, consistency, skew_ms, disks in [
            (1, "1970-01-01T00:00:05.000Z", "crash", 0, ["system", "data"]),
            (3, "1970-01-01T00:00:05.000Z", "per-disk", 2, ["system", "data"]),
            (4, "2023-11-14T22:13:20.123Z", "crash", 0, ["third"]),
        ]
    ]
    assert json.dumps(describe(record))


# ------------------------------------------------------------------ on disk


def test_what_is_stored_comes_back(held: HeldDirectory) -> None:
    assert load(held, "web") == GroupRecord("web")
    for record in (
        GroupRecord("web"),
        line_of(CRASH),
        under_way(line_of(CRASH, FUZZY, PER_DISK), 9),
        forget(line_of(*Consistency), (1, 2)),
        replace(line_of(CRASH), name='wéb "1" 🙂', mode=Mode.RESYNC),
    ):
        store(held, record)
        assert load(held, record.name) == record


def test_the_record_of_another_group_is_refused(held: HeldDirectory) -> None:
    store(held, line_of(CRASH))
    with pytest.raises(StateError, match="belongs to the group 'web'") as caught:
        load(held, "db")
    assert caught.value.code == "group.damaged"


def rehashed(record: dict) -> bytes:
    """As a later release or an editor that knows the hash would write it."""
    rest = {name: value for name, value in record.items() if name != "hash"}
    return json.dumps(rest | {"hash": points._hash(rest)}).encode()


def test_damage_is_told_and_never_taken_for_a_new_group(
    held: HeldDirectory, seed: int, count: Callable
) -> None:
    store(held, under_way(line_of(CRASH, FUZZY), 3))
    path, rng = held.path / FILE, random.Random(seed)
    good = path.read_bytes()
    record = json.loads(good)
    first, second = record["epochs"]
    assert rehashed(record) + b"\n" == good
    damaged = [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        *(good[:cut] for cut in range(0, len(good) - 1, 7)),
    ]
    changes: list[dict[str, object]] = [
        {"version": 2},
        {"number": True},
        {"number": 1},
        {"early": 0},
        {"mode": "HALF"},
        {"under_way": "aa"},
        {"under_way": "x" * 32},
        {"before": "aa"},
        {"names": {}},
        {"epochs": [1]},
        {"epochs": [second, first]},
        {"epochs": [first, first]},
        {"epochs": [first | {"id": "aa"}, second]},
        {"epochs": [first | {"consistency": "SURE"}, second]},
        {"epochs": [first | {"disks": [[1, 512]]}, second]},
        {"epochs": [first | {"disks": [[1, 512, True]]}, second]},
        {"epochs": [first | {"disks": [[1, 511, 0]]}, second]},
        {"epochs": [first | {"disks": [[1, 0, 0]]}, second]},
        {"epochs": [first | {"disks": [[1, 512, -1]]}, second]},
        {"epochs": [first | {"disks": [[7, 512, 0]]}, second]},
        {"epochs": [first | {"more": 1}, second]},
        {"more": 1},
    ]
    damaged += [rehashed(record | change) for change in changes]
    for _ in range(count(300, 10_000)):
        content = bytearray(good)
        content[rng.randrange(len(good) - 1)] ^= 1 << rng.randrange(8)
        damaged.append(bytes(content))
    for spoilt in damaged:
        path.write_bytes(spoilt)
        with pytest.raises(StateError) as caught:
            load(held, "web")
        assert caught.value.code == "group.damaged", spoilt
    path.write_bytes(good)
    assert load(held, "web") == under_way(line_of(CRASH, FUZZY), 3)


def test_a_record_that_cannot_be_read_is_not_a_damaged_one(held: HeldDirectory) -> None:
    (held.path / FILE).mkdir()
    with pytest.raises(StateError) as caught:
        load(held, "web")
    assert caught.value.code == "state.unusable"
