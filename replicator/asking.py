"""Questions to the target for the digests of what it holds, and their answers, which come in parts and in
order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from protocol.messages import Digests, DigestsWanted, Interval
from replicator.digest import DIGEST_BYTES, zero_row
from replicator.transport.stream import Stream


@dataclass(slots=True)
class _Question:
    """One request under way; ``rest`` is unanswered, ``rows`` are in the order of its blocks."""

    number: int
    disk: int
    block: int
    seed: int
    rest: deque[Interval]
    answer: asyncio.Future[bytes]
    rows: list[bytes] = field(default_factory=list)


class Questions:
    """The questions of one session.

    Args:
        control: the session's control stream.
        sizes: of the disks, in bytes, by number.
    """

    def __init__(self, control: Stream, sizes: Mapping[int, int]) -> None:
        self._control = control
        self._sizes = sizes
        self._asked: deque[_Question] = deque()
        self._count = 0

    async def ask(self, disk: int, intervals: Sequence[Interval], block: int, seed: int) -> bytes:
        """The target's digests of all blocks of the intervals, in order.

        Raises:
            ReplicatorError: the stream has ended.
        """
        self._count += 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked.append(_Question(self._count, disk, block, seed, deque(intervals), future))
        self._control.send(DigestsWanted(self._count, disk, block, tuple(intervals)))
        return await future

    def answered(self, message: Digests) -> bool:
        """Take a part of an answer; False if it fits no question. What does not fit is never looked up."""
        question = self._asked[0] if self._asked else None
        if question is None or message.request != question.number or not message.intervals:
            return False
        try:
            _follow(question, message.intervals)
            size = self._sizes[question.disk]
            told = (message.intervals, message.holes, message.digests)
            question.rows.append(b"".join(rows_in_order(*told, size, question.block, question.seed)))
        except ValueError:
            return False
        if not question.rest:
            self._asked.popleft()
            if not question.answer.done():  # its asker may have been cancelled
                question.answer.set_result(b"".join(question.rows))
        return True


def rows_in_order(
    intervals: Iterable[Interval],
    holes: Iterable[Interval],
    digests: bytes,
    size: int,
    block: int,
    seed: int,
) -> Iterator[bytes]:
    """The digests of all blocks of the intervals, those of the holes put in their places.

    Args:
        intervals, holes: sorted, of whole blocks.
        digests: of the blocks that are in no hole.
        size: of the disk, whose last block may be short.
        block, seed: of the digests.

    Raises:
        ValueError: they don't fit each other.
    """
    at, waiting = 0, deque(holes)
    for start, end in intervals:
        position = start
        while position < end:
            behind = min(end, waiting[0].start) if waiting else end
            if behind < position or (behind % block and behind != end):
                raise ValueError("a hole out of order or not of whole blocks")
            count = -(-(behind - position) // block) * DIGEST_BYTES
            if at + count > len(digests):
                raise ValueError("too few digests")
            yield digests[at : at + count]
            at, position = at + count, behind
            if position < end:
                hole = waiting.popleft()
                if hole.end > end or (hole.end % block and hole.end != end):
                    raise ValueError("a hole outside the interval or not of whole blocks")
                yield zero_row(hole, size, seed, block)
                position = hole.end
    if waiting or at != len(digests):
        raise ValueError("more than was asked for")


def _follow(question: _Question, intervals: Sequence[Interval]) -> None:
    """Take the intervals off what is missing; ``ValueError`` unless they are what comes next."""
    for start, end in intervals:
        wanted = question.rest.popleft() if question.rest else Interval(0, 0)
        if start != wanted.start or end > wanted.end or (end < wanted.end and end % question.block):
            raise ValueError("not what was asked for")
        if end < wanted.end:
            question.rest.appendleft(Interval(end, wanted.end))
