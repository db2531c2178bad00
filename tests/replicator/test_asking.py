"""Questions for digests: answers in parts are put together, and what was not asked for is refused."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import Digests, DigestsWanted, Interval
from replicator.asking import Questions
from replicator.digest import BLOCK_BYTES, DIGEST_BYTES, FINE_BYTES, zero_digest, zero_row
from replicator.transport.stream import Stream

SEED = 7
SIZE = 100 * BLOCK_BYTES + 512
B = BLOCK_BYTES


class Control:
    """Takes what is sent."""

    def __init__(self) -> None:
        self.sent: list[DigestsWanted] = []

    def send(self, message: DigestsWanted) -> None:
        self.sent.append(message)


def questions() -> tuple[Questions, Control]:
    control = Control()
    return Questions(cast("Stream", control), {1: SIZE}), control


def row(first: int, count: int) -> bytes:
    return b"".join(number.to_bytes(DIGEST_BYTES, "big") for number in range(first + 1, first + count + 1))


async def asked(
    made: Questions, intervals: Sequence[Interval], block: int = BLOCK_BYTES
) -> asyncio.Task[bytes]:
    task = asyncio.create_task(made.ask(1, intervals, block, SEED))
    await asyncio.sleep(0)
    return task


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.sets(st.integers(1, 29)), st.booleans())
async def test_an_answer_in_parts_with_holes_is_the_row_that_was_asked_for(
    holes: list[bool], cuts: set[int], short: bool
) -> None:
    """Block n is a hole or has digest n + 1; the answer is cut in parts anywhere."""
    made, control = questions()
    first = 101 - len(holes) if short else 3
    end = SIZE if short else (first + len(holes)) * B
    wanted = await asked(made, [Interval(first * B, end)])
    truth = b"".join(
        zero_row(Interval(at * B, min(at * B + B, SIZE)), SIZE, SEED) if hole else row(at, 1)
        for at, hole in enumerate(holes, first)
    )
    bounds = [0, *sorted(cut for cut in cuts if cut < len(holes)), len(holes)]
    for start, behind in itertools.pairwise(bounds):
        told: list[Interval] = []
        data = b""
        for at in range(start, behind):
            interval = Interval((first + at) * B, min((first + at + 1) * B, SIZE))
            if not holes[at]:
                data += row(first + at, 1)
            elif told and told[-1].end == interval.start:
                told[-1] = Interval(told[-1].start, interval.end)
            else:
                told.append(interval)
        part = Interval((first + start) * B, min((first + behind) * B, SIZE))
        assert not wanted.done()
        assert made.answered(Digests(control.sent[0].request, (part,), tuple(told), data))
    assert await wanted == truth


async def test_questions_side_by_side_are_answered_in_order() -> None:
    made, control = questions()
    first = await asked(made, [Interval(0, B), Interval(5 * B, 7 * B)])
    second = await asked(made, [Interval(FINE_BYTES, B)], FINE_BYTES)
    one, two = (message.request for message in control.sent)
    assert [message.block for message in control.sent] == [B, FINE_BYTES]
    assert not made.answered(Digests(two, (Interval(FINE_BYTES, B),), (), row(1, 15)))
    assert made.answered(Digests(one, (Interval(0, B), Interval(5 * B, 6 * B)), (), row(0, 1) + row(5, 1)))
    assert made.answered(Digests(one, (Interval(6 * B, 7 * B),), (Interval(6 * B, 7 * B),), b""))
    assert await first == row(0, 1) + row(5, 1) + zero_digest(SEED)
    assert made.answered(Digests(two, (Interval(FINE_BYTES, B),), (), row(1, 15)))
    assert await second == row(1, 15)


async def test_the_answer_to_a_question_that_nobody_waits_for_is_taken() -> None:
    made, control = questions()
    wanted = await asked(made, [Interval(0, B)])
    wanted.cancel()
    await asyncio.gather(wanted, return_exceptions=True)
    assert made.answered(Digests(control.sent[0].request, (Interval(0, B),), (), row(0, 1)))
    assert not made.answered(Digests(control.sent[0].request, (Interval(0, B),), (), row(0, 1)))


BOTH = (Interval(2 * B, 4 * B), Interval(6 * B, 8 * B))
HOSTILE = {
    "another request": Digests(99, BOTH, (), row(0, 4)),
    "nothing": Digests(1, (), (), b""),
    "another place": Digests(1, (Interval(10 * B, 12 * B), Interval(16 * B, 18 * B)), (), row(0, 4)),
    "out of order": Digests(1, (Interval(6 * B, 8 * B),), (), row(0, 2)),
    "the middle": Digests(1, (Interval(3 * B, 4 * B),), (), row(0, 1)),
    "past the end": Digests(1, (Interval(2 * B, 8 * B),), (), row(0, 6)),
    "more than was asked": Digests(1, (*BOTH, Interval(9 * B, 10 * B)), (), row(0, 5)),
    "no whole blocks": Digests(1, (Interval(2 * B, 2 * B + 512),), (), row(0, 1)),
    "too few digests": Digests(1, BOTH, (), row(0, 3)),
    "too many digests": Digests(1, BOTH, (), row(0, 5)),
    "a piece of a digest": Digests(1, BOTH, (), row(0, 3) + b"x"),
    "a hole over the gap": Digests(1, BOTH, (Interval(2 * B, 6 * B),), b""),
    "a hole over the gap and digests": Digests(1, BOTH, (Interval(2 * B, 6 * B),), row(0, 2)),
    "a hole of 8 EiB": Digests(1, BOTH, (Interval(2 * B, 2**63 - B),), b""),
    "a hole before": Digests(1, BOTH, (Interval(0, 4 * B),), row(0, 2)),
    "a hole behind": Digests(1, BOTH, (Interval(20 * B, 21 * B),), row(0, 4)),
    "a hole of no whole blocks": Digests(1, BOTH, (Interval(2 * B, 2 * B + 512),), row(0, 3)),
    "a hole that begins in a block": Digests(1, BOTH, (Interval(2 * B + 512, 3 * B),), row(0, 4)),
    "holes and all digests": Digests(1, BOTH, (Interval(2 * B, 3 * B),), row(0, 4)),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_an_answer_that_does_not_fit_is_refused(name: str) -> None:
    made, _ = questions()
    wanted = await asked(made, BOTH)
    assert not made.answered(HOSTILE[name])
    assert not wanted.done()
    wanted.cancel()


async def test_an_answer_that_nobody_asked_for_is_refused() -> None:
    made, _ = questions()
    assert not made.answered(Digests(1, BOTH, (), row(0, 4)))
