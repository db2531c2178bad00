"""Trying again: what passes by itself, for how long, and what is said meanwhile. No second is waited for."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest

from replicator.clock import Clock
from replicator.errors import (
    LinkError,
    PeerError,
    ReplicatorError,
    SourceError,
    SpaceError,
    StateError,
    TargetError,
    TrustError,
)
from replicator.retrying import CALM_S, FIRST_WAIT_S, LONGEST_WAIT_S, keep_trying


class Manual(Clock):
    def __init__(self) -> None:
        self.at_s = 1_000.0

    def monotonic_s(self) -> float:
        return self.at_s

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.at_s, UTC)


class Story:
    """Attempts that take some seconds and fail as told; the last one succeeds."""

    def __init__(self, clock: Manual, attempts: Sequence[tuple[float, ReplicatorError]]) -> None:
        self.clock = clock
        self.attempts = list(attempts)
        self.tries = 0
        self.met = True
        self.told: list[str] = []

    async def attempt(self) -> str:
        self.tries += 1
        if not self.attempts:
            return "done"
        seconds, error = self.attempts.pop(0)
        self.clock.at_s += seconds
        raise error

    async def run(self, give_up_after_s: float | None = None) -> str:
        return await keep_trying(
            self.attempt, lambda: self.met, self.told.append, self.clock, give_up_after_s
        )


def failed(kind: type[ReplicatorError] = LinkError, code: str = "link.lost") -> ReplicatorError:
    return kind(code, "the line to 192.0.2.1:9443 is gone", cause="a cable", fix="Plug it in")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return []


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Callable[..., Story]:
    clock = Manual()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock.at_s += seconds

    monkeypatch.setattr("replicator.retrying.asyncio.sleep", sleep)
    return lambda *attempts: Story(clock, attempts)


async def test_success_is_not_tried_again(story, waits) -> None:
    told = story()
    assert await told.run() == "done"
    assert (told.tries, told.told, waits) == (1, [], [])


async def test_waits_grow_from_a_tenth_of_a_second_to_ten(story, waits) -> None:
    told = story(*[(0.5, failed())] * 12)
    assert await told.run() == "done"
    expected = FIRST_WAIT_S
    for wait in waits:
        assert 0.8 * expected <= wait <= expected
        expected = min(2 * expected, LONGEST_WAIT_S)
    assert len(waits) == 12
    assert waits[-1] >= 0.8 * LONGEST_WAIT_S


async def test_each_wait_is_told_with_what_failed_and_what_helps(story) -> None:
    told = story((0, failed()), (0, failed(SpaceError, "target.full")))
    await told.run()
    assert [line.split("(")[1].split(")")[0] for line in told.told] == ["link.lost", "target.full"]
    for line in told.told:
        assert "the line to 192.0.2.1:9443 is gone" in line
        assert "trying again in 0." in line
        assert "Plug it in" in line


async def test_a_session_that_held_for_long_begins_with_short_waits_again(story, waits) -> None:
    told = story(*[(0, failed())] * 9, (CALM_S + 1, failed()), (0, failed()))
    await told.run()
    assert waits[8] > 5
    assert waits[9] <= FIRST_WAIT_S
    assert waits[10] <= 2 * FIRST_WAIT_S


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (PeerError, "disk.name_taken"),
        (SourceError, "source.grew"),
        (TargetError, "target.write_failed"),
        (TrustError, "trust.revoked"),
        (StateError, "state.unusable"),
    ],
)
@pytest.mark.parametrize("give_up_after_s", [None, 60.0])
async def test_what_cannot_pass_by_itself_is_final(story, waits, kind, code, give_up_after_s) -> None:
    told = story((0, failed(kind, code)))
    with pytest.raises(kind):
        await told.run(give_up_after_s)
    assert (told.tries, waits, told.told) == (1, [], [])


async def test_who_was_never_let_in_is_told_at_once(story, waits) -> None:
    told = story((0, failed()))
    told.met = False
    with pytest.raises(LinkError):
        await told.run()
    assert (told.tries, waits) == (1, [])


async def test_who_was_never_let_in_may_ask_for_patience(story) -> None:
    told = story(*[(0, failed())] * 3)
    told.met = False
    assert await told.run(give_up_after_s=60) == "done"


@pytest.mark.parametrize("met", [True, False])
async def test_a_line_closed_before_welcome_passes_only_for_who_was_let_in_before(story, met: bool) -> None:
    told = story((0, failed(TrustError, "link.closed_before_welcome")))
    told.met = met
    if met:
        assert await told.run() == "done"
    else:
        with pytest.raises(TrustError):
            await told.run()


async def test_giving_up_takes_as_long_as_was_said_and_raises_the_last_error(story) -> None:
    told = story(*[(1, failed(code=f"link.{number}")) for number in range(1_000)])
    began = told.clock.at_s
    with pytest.raises(LinkError) as caught:
        await told.run(give_up_after_s=60)
    assert 60 <= told.clock.at_s - began <= 60 + LONGEST_WAIT_S + 2
    assert caught.value.code == f"link.{told.tries - 1}"


async def test_nothing_but_our_errors_is_tried_again(story, waits) -> None:
    async def defect() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        await keep_trying(defect, lambda: True, lambda _: None, Manual(), None)
    assert waits == []


async def test_waiting_can_be_cancelled() -> None:
    told = Story(Manual(), [(0, failed())] * 100)
    task = asyncio.create_task(told.run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told.tries == 1
