"""Medians, spreads and ratios: what a figure of the table is."""

import pytest

from bench.results import Run, Standing, ranked, standing

SIZE = 1_000_000_000


def run(number: int, seconds: float, **more: object) -> Run:
    return Run(number, seconds, 100, 80, {"near": 1.0, "far": 0.5}, {"near": 10, "far": 20 + number}, **more)  # type: ignore[arg-type]


def test_a_standing_is_the_median_with_its_spread() -> None:
    found = standing("it", [run(0, 4.0), run(1, 1.0), run(2, 2.0)], SIZE)
    assert (found.seconds, found.seconds_min, found.seconds_max) == (2.0, 1.0, 4.0)
    assert found.mb_s == 500.0
    assert found.cpu_s_per_gb == 1.5
    assert found.peak_bytes == {"far": 21, "near": 10}
    assert found.wire_bytes == 100
    assert found.line_use is None


def test_line_use_is_what_went_towards_the_receiver() -> None:
    found = standing("it", [run(0, 2.0)], SIZE, rate_bit_s=640.0)
    assert found.line_use == pytest.approx(80 * 8 / 2.0 / 640.0)


def test_one_bad_run_and_there_is_no_figure() -> None:
    found = standing("it", [run(0, 4.0), run(1, 1.0, problem="wrong data"), run(2, 2.0)], SIZE)
    assert found.problem == "wrong data"
    assert found.mb_s == 0.0


def named(name: str, mb_s: float, *, ours: bool = False, problem: str | None = None) -> Standing:
    return Standing(name, ours, (), problem, mb_s=mb_s)


def test_the_ratio_is_to_the_best_peer_with_figures_never_to_ourselves() -> None:
    found = ranked(
        [named("a", 100.0), named("b", 400.0), named("ours", 800.0, ours=True), named("c", 9e9, problem="x")]
    )
    assert [each.ratio for each in found] == [0.25, 1.0, 2.0, None]


def test_without_a_peer_there_is_no_ratio() -> None:
    assert [each.ratio for each in ranked([named("ours", 1.0, ours=True)])] == [None]
