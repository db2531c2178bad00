"""Against a model of packers, a queue and a line, `auto` finds the level that moves most of the disk."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.adapt import (
    LEVELS,
    PATIENCE_MAX,
    PERIOD_FRAMES,
    PERIOD_S,
    SETTLING_FRAMES,
    AutoLevel,
    FixedLevel,
    Limit,
)

ROOM = 8
MIB = 1 << 20


def limit(queued: int) -> Limit:
    return {0: Limit.SOURCE, ROOM: Limit.LINE}.get(queued, Limit.NOTHING)


@dataclass
class Machine:
    """`pack`: frames a second that our CPUs make at a level; `line`: what is taken of them a second."""

    pack: Callable[[int], float]
    line: Callable[[int], float]
    noise: float = 0.0
    now: float = 0.0
    queued: float = 0.0

    def run(self, level: AutoLevel, frames: int, chance: random.Random | None = None) -> list[int]:
        seen = []
        for _ in range(frames):
            pack, line = self.pack(level.level), self.line(level.level)
            wobble = chance.uniform(1 - self.noise, 1 + self.noise) if chance else 1.0
            step = wobble / (min(pack, line) if self.queued >= ROOM or pack < line else pack)
            self.now += step
            self.queued = min(max(self.queued + 1 - line * step, 0.0), float(ROOM))
            level.observe(limit(round(self.queued)), MIB, self.now)
            seen.append(level.level)
        return seen


def by_level(values: Mapping[int, float]) -> Callable[[int], float]:
    return lambda level: values[level]


PACK = {0: 4000.0, 1: 900.0, 3: 500.0, 6: 150.0, 9: 70.0}  # frames of a MiB a second: two quick cores
RATIO = {0: 1.0, 1: 2.8, 3: 3.1, 6: 3.3, 9: 3.4}


def line_of(mib_s: float) -> Callable[[int], float]:
    return lambda level: mib_s * RATIO[level]


def share(seen: list[int], level: int) -> float:
    return seen.count(level) / len(seen)


def test_it_starts_at_a_level_that_pays_on_most_lines() -> None:
    assert AutoLevel().level == 1


@pytest.mark.parametrize(("mib_s", "best"), [(6.0, 9), (12.0, 9), (55.0, 3), (250.0, 1), (3900.0, 0)])
def test_it_finds_the_best_level_and_stays_there(mib_s: float, best: int) -> None:
    machine = Machine(by_level(PACK), line_of(mib_s))
    rate = {level: min(PACK[level], line_of(mib_s)(level)) for level in LEVELS}
    level = AutoLevel()
    machine.run(level, 4000)
    late = machine.run(level, 8000)
    found = sum(rate[at] for at in late) / len(late)
    assert found >= 0.93 * max(rate.values())
    assert rate[best] == max(rate.values()), "the example says what it means"


def test_compression_that_slows_down_everything_is_given_up_though_the_queue_is_full_without_it() -> None:
    """Both ends on the same cores: what compression takes, encryption lacks."""
    taken = {0: 500.0, 1: 330.0, 3: 250.0, 6: 120.0, 9: 60.0}
    machine = Machine(by_level({**taken, 0: 4000.0}), by_level({**taken, 0: 500.0}))
    level = AutoLevel()
    machine.run(level, 1000)
    assert share(machine.run(level, 10_000), 0) > 0.9


def test_a_line_that_becomes_slow_is_noticed() -> None:
    level = AutoLevel()
    machine = Machine(by_level(PACK), line_of(3900.0))
    machine.run(level, 5000)
    assert level.level == 0
    machine.line = line_of(12.0)
    machine.run(level, 6000)
    assert share(machine.run(level, 2000), 0) == 0


def test_content_that_cannot_be_compressed_is_soon_sent_as_it_is() -> None:
    machine = Machine(by_level(PACK), lambda level: 1200.0)
    level = AutoLevel()
    machine.run(level, 1000)
    assert share(machine.run(level, 10_000), 0) > 0.9


def test_noise_does_not_make_it_wander(seed: int) -> None:
    machine = Machine(by_level(PACK), line_of(55.0), noise=0.5)
    level, chance = AutoLevel(), random.Random(seed)
    machine.run(level, 2000, chance)
    late = machine.run(level, 20_000, chance)
    assert share(late, 3) + share(late, 1) > 0.85


def test_trials_that_fail_become_rare() -> None:
    machine = Machine(by_level(PACK), line_of(250.0))
    level = AutoLevel()
    machine.run(level, 60_000)
    seen = machine.run(level, 60_000)
    changes = sum(one != other for one, other in pairwise(seen))
    seconds = 60_000 / min(PACK[1], line_of(250.0)(1))
    assert 0 < changes <= 2 * (seconds / PERIOD_S / PATIENCE_MAX + 1)


def test_a_slow_target_is_no_reason_to_compress_harder() -> None:
    """It has to unpack and write the same whatever came over the line: less of our CPU is tried, not more."""
    level, seen, now = AutoLevel(), set[int](), 0.0
    for _ in range(5000):
        now += 0.005
        level.observe(Limit.TARGET, MIB, now)
        seen.add(level.level)
    assert seen == {0, 1}
    assert level.level == 1, "nothing became faster without compression, so the line is spared"


def test_a_queue_between_full_and_empty_keeps_the_level() -> None:
    level = AutoLevel()
    for number in range(2000):
        level.observe(Limit.NOTHING, MIB, number * 0.01)
    assert level.level == 1


def test_too_few_frames_or_too_little_time_change_nothing() -> None:
    slow, quick = AutoLevel(), AutoLevel()
    for number in range(SETTLING_FRAMES + PERIOD_FRAMES - 1):
        slow.observe(Limit.LINE, MIB, number * 10.0)
    for number in range(10_000):
        quick.observe(Limit.LINE, MIB, number * PERIOD_S / 10_100)
    assert slow.level == quick.level == 1


@given(st.lists(st.tuples(st.sampled_from(Limit), st.floats(0, 1)), max_size=500))
def test_whatever_comes_it_moves_one_step_at_a_time(limits: list[tuple[Limit, float]]) -> None:
    level = AutoLevel()
    before = LEVELS.index(level.level)
    now = 0.0
    for found, passed in limits:
        now += passed
        level.observe(found, MIB, now)
        step = LEVELS.index(level.level)
        assert abs(step - before) <= 1
        before = step


def test_a_fixed_level_stays() -> None:
    level = FixedLevel(6)
    for found in [Limit.SOURCE] * 100 + [Limit.LINE] * 100:
        level.observe(found, MIB, 1.0)
    assert level.level == 6
