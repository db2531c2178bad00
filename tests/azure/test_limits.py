"""What may be taken, and when, by Azure's limits."""

import pytest

from replicator.azure.limits import (
    CRASH_POINT,
    DIFF_BOUNDARY_BYTES,
    INCREMENTAL,
    NS_PER_S,
    PREMIUM_BLOB,
    SnapshotLimits,
    diffable,
    has_room,
    wait_s,
)

NOW = 1_800_000_000 * NS_PER_S


@pytest.mark.parametrize("limits", [PREMIUM_BLOB, INCREMENTAL, CRASH_POINT], ids=lambda limits: limits.name)
def test_as_many_as_allowed_are_taken_at_once_and_the_next_waits_for_the_oldest(
    limits: SnapshotLimits,
) -> None:
    taken: list[int] = []
    for _ in range(limits.count):
        assert wait_s(limits, taken, NOW) == 0
        taken.insert(0, NOW)
    assert wait_s(limits, taken, NOW) == limits.window_s
    assert wait_s(limits, taken, NOW + limits.window_s * NS_PER_S // 2) == limits.window_s / 2
    assert wait_s(limits, taken, NOW + limits.window_s * NS_PER_S) == 0


def test_only_the_last_ones_count_in_whatever_order_they_are_told() -> None:
    old = [NOW - minutes * 60 * NS_PER_S for minutes in range(6, 100)]
    recent = [NOW - seconds * NS_PER_S for seconds in (10, 250, 200, 30, 100, 60)]
    assert wait_s(INCREMENTAL, [*recent, *old], NOW) == 0
    assert wait_s(INCREMENTAL, [*old, *recent, NOW], NOW) == 50


@pytest.mark.parametrize(("held", "room"), [(0, True), (499, True), (500, False), (501, False)])
def test_no_more_exist_than_azure_keeps(held: int, room: bool) -> None:
    assert has_room(INCREMENTAL, held) is room


@pytest.mark.parametrize(
    ("before", "after", "known"),
    [
        (1 << 30, 1 << 30, True),
        (1 << 30, DIFF_BOUNDARY_BYTES, True),
        (DIFF_BOUNDARY_BYTES, DIFF_BOUNDARY_BYTES + (1 << 30), False),
        (DIFF_BOUNDARY_BYTES + (1 << 30), 1 << 30, False),
        (DIFF_BOUNDARY_BYTES + (1 << 30), DIFF_BOUNDARY_BYTES + (2 << 30), True),
    ],
)
def test_a_resize_across_four_tib_leaves_no_diff(before: int, after: int, known: bool) -> None:
    assert diffable(before, after) is known
