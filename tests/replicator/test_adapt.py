"""The ladder of levels: up on a full queue, down on an empty one, one step at a time, never past its ends."""

from hypothesis import given
from hypothesis import strategies as st

from replicator.adapt import AGREEING, LEVELS, AutoLevel, FixedLevel

ROOM = 8


def after(level: AutoLevel, *queued: int) -> int:
    for found in queued:
        level.observe(found, ROOM)
    return level.level


def test_it_starts_at_a_level_that_pays_on_most_lines() -> None:
    assert AutoLevel().level == 1


def test_a_full_queue_raises_it_step_by_step_to_the_top() -> None:
    level = AutoLevel()
    seen = [after(level, *[ROOM] * AGREEING) for _ in range(len(LEVELS))]
    assert seen == [3, 6, 9, 9, 9]


def test_an_empty_queue_lowers_it_to_raw() -> None:
    level = AutoLevel()
    assert [after(level, *[0] * AGREEING) for _ in range(2)] == [0, 0]


def test_it_comes_back_from_both_ends_as_soon_as_from_anywhere() -> None:
    """What is counted past an end must not have to be paid back."""
    for first, second, expected in ((0, ROOM, 1), (ROOM, 0, 6)):
        level = AutoLevel()
        after(level, *[first] * AGREEING * 20)
        assert after(level, *[second] * (AGREEING - 1)) == LEVELS[0 if first == 0 else -1]
        assert after(level, second) == expected


def test_less_than_enough_frames_that_agree_change_nothing() -> None:
    level = AutoLevel()
    assert after(level, *[ROOM] * (AGREEING - 1)) == 1
    assert after(level, ROOM) == 3


def test_one_frame_that_disagrees_starts_the_count_anew() -> None:
    for other in (0, ROOM // 2):
        level = AutoLevel()
        after(level, *[ROOM] * (AGREEING - 1), other)
        assert after(level, *[ROOM] * (AGREEING - 1)) == 1
        assert after(level, ROOM) == 3


def test_a_queue_between_full_and_empty_keeps_the_level() -> None:
    for queued in (1, ROOM // 2, ROOM - 1):
        assert after(AutoLevel(), *[queued] * 100) == 1


@given(st.lists(st.integers(0, ROOM), max_size=500))
def test_whatever_comes_it_moves_one_step_at_a_time(queued: list[int]) -> None:
    level = AutoLevel()
    before = LEVELS.index(level.level)
    for found in queued:
        level.observe(found, ROOM)
        now = LEVELS.index(level.level)
        assert abs(now - before) <= 1
        before = now


def test_a_fixed_level_stays() -> None:
    level = FixedLevel(6)
    for found in [0] * 100 + [ROOM] * 100:
        level.observe(found, ROOM)
    assert level.level == 6
