"""Which snapshots a cycle goes on with, compares with and leaves behind: a pure decision."""

import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import NO_ID, Interval
from replicator.azure.cycle import Plan, Taken, blocks, plan
from replicator.sender_state import GroupRecord

KIB = 1024
A, B, C, D = (bytes([letter]) * 16 for letter in b"abcd")


def there(*epochs: bytes, disks: str = "xy") -> dict[str, list[Taken]]:
    """One snapshot of each disk for each epoch, oldest first."""
    return {
        disk: [Taken(epoch, f"{disk}{number}", number * 10 + at) for number, epoch in enumerate(epochs, 1)]
        for at, disk in enumerate(disks)
    }


def ids(snapshots: Mapping[str, Taken]) -> dict[str, str]:
    return {disk: taken.id for disk, taken in snapshots.items()}


def left(found: Plan) -> list[str]:
    return sorted(taken.id for snapshots in found.left_over.values() for taken in snapshots)


@pytest.mark.parametrize(
    ("record", "epochs", "goes_on", "since", "left_over"),
    [
        (GroupRecord(), [], NO_ID, NO_ID, []),
        (GroupRecord(sealed=A), [A], NO_ID, A, []),
        # A run was killed with its snapshots taken: before it wrote that down, and after.
        (GroupRecord(sealed=A), [A, B], B, A, []),
        (GroupRecord(sealed=A, under_way=B, sources={"x": "x2", "y": "y2"}), [A, B], B, A, []),
        # It was killed after the seal: what is older than the sealed one goes.
        (GroupRecord(sealed=B), [A, B], NO_ID, B, ["x1", "y1"]),
        (GroupRecord(sealed=B), [A, B, C], C, B, ["x1", "y1"]),
        # The memory is lost: the newest goes on, sealed or not; nothing is deleted before that is sealed.
        (GroupRecord(), [A], A, NO_ID, []),
        (GroupRecord(), [A, B], B, A, []),
        (GroupRecord(), [A, B, C], C, B, []),
        # The memory is old, or the sealed epoch's snapshots are gone: nothing older goes on.
        (GroupRecord(sealed=D), [A, B], NO_ID, B, []),
        (GroupRecord(sealed=A, under_way=B, sources={"x": "x2", "y": "y2"}), [A], NO_ID, A, []),
        # What was sent under this id was of another snapshot.
        (GroupRecord(sealed=A, under_way=B, sources={"x": "x9", "y": "y2"}), [A, B], NO_ID, A, ["x2", "y2"]),
    ],
)
def test_what_is_there_and_what_is_remembered_decide(
    record: GroupRecord, epochs: list[bytes], goes_on: bytes, since: bytes, left_over: list[str]
) -> None:
    found = plan(record, there(*epochs))
    assert (found.epoch, found.since, left(found)) == (goes_on, since, left_over)
    assert bool(found.current) == (goes_on != NO_ID) and bool(found.base) == (since != NO_ID)


def test_an_epoch_that_lacks_a_disk_is_of_no_use() -> None:
    """Killed between two disks, or a disk was added to the group."""
    found = there(A, B)
    del found["y"][1]
    decided = plan(GroupRecord(sealed=A), found)
    assert (decided.epoch, decided.since, left(decided)) == (NO_ID, A, ["x2"])
    decided = plan(GroupRecord(sealed=B), there(A, B) | {"z": []})
    assert (decided.epoch, decided.since, left(decided)) == (NO_ID, NO_ID, ["x1", "x2", "y1", "y2"])


def test_of_two_snapshots_for_one_epoch_the_one_that_was_sent_counts() -> None:
    """An answer was lost on the way, and the request repeated."""
    found = there(A, B)
    found["x"].append(Taken(B, "x2-again", 25))
    sent = {"x": "x2-again", "y": "y2"}
    decided = plan(GroupRecord(sealed=A, under_way=B, sources=sent), found)
    assert ids(decided.current) == sent and left(decided) == ["x2"]
    # Nothing tells which: neither is used.
    decided = plan(GroupRecord(sealed=A), found)
    assert (decided.epoch, decided.since, left(decided)) == (NO_ID, A, ["x2", "x2-again", "y2"])


def test_an_epoch_whose_snapshots_are_of_different_times_is_compared_with_what_is_older_on_every_disk() -> (
    None
):
    """Two answers were lost, and of each disk somebody deleted another of the two snapshots."""
    found = there(B, A, B)
    del found["x"][0], found["y"][2]
    decided = plan(GroupRecord(), found)
    assert (decided.epoch, decided.since) == (B, NO_ID)
    assert ids(decided.current) == {"x": found["x"][1].id, "y": found["y"][0].id}


@given(st.lists(st.sampled_from([A, B, C, D]), max_size=6), st.sampled_from([NO_ID, A, B]), st.integers())
def test_what_is_compared_with_is_older_and_what_is_used_is_kept(
    epochs: Sequence[bytes], sealed: bytes, seed: int
) -> None:
    """Of any snapshots, some of them deleted by somebody."""
    choose = random.Random(seed)
    found = {
        disk: [taken for taken in snapshots if choose.random() < 0.9]
        for disk, snapshots in there(*epochs).items()
    }
    decided = plan(GroupRecord(sealed=sealed), found)
    used = {*ids(decided.current).values(), *ids(decided.base).values()}
    assert not used & set(left(decided))
    assert decided.epoch != decided.since or decided.epoch == NO_ID
    for disk, base in decided.base.items():
        if decided.current:
            assert base.moment_ns < decided.current[disk].moment_ns
    if sealed in {taken.epoch for taken in decided.base.values()}:
        assert decided.since == sealed


def test_blocks_are_whole_and_inside_the_disk() -> None:
    size = 1000 * KIB + 512
    found = blocks([Interval(999 * KIB, 2000 * KIB), Interval(70 * KIB, 71 * KIB), Interval(512, 1024)], size)
    assert list(found) == [(0, 128 * KIB), (960 * KIB, size)]
    # A footer lies behind the disk.
    assert list(blocks([Interval(size, size + 512)], size)) == []
