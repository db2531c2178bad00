"""The machine's clocks: what callers compare and subtract is fit for it."""

from datetime import UTC, timedelta

from replicator.clock import Clock


def test_the_time_of_day_is_in_utc_and_goes_with_the_monotonic_clock() -> None:
    clock = Clock()
    day, monotonic_s = clock.now(), clock.monotonic_s()
    assert day.tzinfo is UTC
    readings = [clock.monotonic_s() for _ in range(100)]
    assert readings == sorted(readings)
    assert readings[0] >= monotonic_s
    assert timedelta(0) <= clock.now() - day < timedelta(seconds=60)
