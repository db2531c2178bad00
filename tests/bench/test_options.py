"""What is measured when nothing else is said, and what makes no sense."""

from math import inf

import pytest

from bench.errors import BenchError
from bench.options import GIB, MIB, Line, Options, plan


def test_the_default_is_what_the_page_promises() -> None:
    made = plan(Options(), ("cubic",))
    assert (made.size_bytes, made.rounds) == (4 * GIB, 5)
    assert [share for share, _ in made.shares] == [0.01, 0.10]
    pairs = [(line.rate_mbit, line.round_trip_ms) for line in made.lines if not line.loss]
    assert pairs == [(rate, trip) for rate in (100, 1000) for trip in (0, 20, 100, 200)]
    assert [line.loss for line in made.lines if line.loss] == [0.01]


def test_loss_is_also_measured_with_cubic_where_that_is_not_the_default() -> None:
    lossy = [line for line in plan(Options(), ("bbr", "cubic")).lines if line.loss]
    assert [line.congestion for line in lossy] == ["", "cubic"]
    assert lossy[1].title == "100 Mbit/s, 20 ms, 1% loss, cubic"
    assert lossy[1].key == "line-100-20-loss-cubic"


def test_quick_is_less_of_everything() -> None:
    quick, whole = plan(Options(quick=True), ("cubic",)), plan(Options(), ("cubic",))
    assert quick.size_bytes < whole.size_bytes and quick.rounds < whole.rounds
    assert len(quick.lines) < len(whole.lines) and len(quick.shares) < len(whole.shares)


def test_time_is_limited_unless_somebody_asks_for_more() -> None:
    bounded = plan(Options(), ("cubic",))
    assert bounded.full_s + sum(seconds for _, seconds in bounded.shares) < 15 * 60
    for asked in (Options(rounds=9), Options(size_bytes=8 * GIB)):
        made = plan(asked, ("cubic",))
        assert {made.full_s, *(seconds for _, seconds in made.shares)} == {inf}


def test_no_disk_of_a_line_is_larger_than_what_was_asked_for() -> None:
    made = plan(Options(size_bytes=64 * MIB), ("cubic",))
    assert max(line.size_bytes for line in made.lines) == 64 * MIB


def test_keys_of_a_plan_are_unique() -> None:
    lines = plan(Options(), ("bbr", "cubic")).lines
    assert len({line.key for line in lines}) == len(lines)


def test_half_of_the_round_trip_is_spent_each_way() -> None:
    spec = Line(100, 200, MIB).spec(1)
    assert [spec.direction(way).delay_s for way in (0, 1)] == [0.1, 0.1]
    assert spec.direction(0).rate_bytes_s == 12.5e6
    assert spec.direction(0).seed != spec.direction(1).seed


@pytest.mark.parametrize(
    ("options", "reason"),
    [(Options(size_bytes=MIB), "too small"), (Options(parts=("full", "speed")), "no part speed")],
)
def test_nonsense_is_refused(options: Options, reason: str) -> None:
    with pytest.raises(BenchError, match=reason):
        plan(options, ("cubic",))
