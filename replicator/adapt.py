"""Picks the compression of the next frame from what was seen so far.

Pure: observations in, a level out; time is an argument. ``auto`` climbs towards the highest rate. What frames
wait for says which way to try: where the line is the limit, harder compression may pay; where our CPU or the
target is, less of it. Whether it did pay only the rate tells: a level is kept if it moved noticeably more of
the disk a second than the one before, and after trials that failed the next one waits longer.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

LEVELS = (0, 1, 3, 6, 9)  # 0: raw. Each step costs about twice the CPU of the one before
PERIOD_S = 0.2  # long enough for a rate, short against a send
PERIOD_FRAMES = 16
SETTLING_FRAMES = 24  # after a change: what was packed before it is still on its way
GAIN = 1.05  # what counts as faster
PATIENCE_MAX = 64  # periods between trials


class Limit(Enum):
    """What holds the frames up; the value says which way to try another level."""

    LINE = 1  # packed ones wait until the streams take more
    NOTHING = 0  # now and then one waits
    SOURCE = -1  # the streams wait for frames
    TARGET = -2  # packed ones wait for credit: the target unpacks and writes more slowly than they come


class Level(Protocol):
    """What picks the compression."""

    @property
    def level(self) -> int:
        """Zstd level for the next frame; 0 is raw."""
        ...

    def observe(self, limit: Limit, size: int, now: float) -> None:
        """A frame of ``size`` bytes of disk is ready at ``now``, monotonic seconds."""
        ...


class FixedLevel:
    """The level that the operator asked for; 0 is off."""

    def __init__(self, level: int) -> None:
        self.level = level

    def observe(self, limit: Limit, size: int, now: float) -> None:
        """Nothing to learn."""


class AutoLevel:
    """Follows the bottleneck. Starts at 1: on most disks it pays at once on any line below 5 Gbit/s."""

    def __init__(self) -> None:
        self._step = 1
        self._before: int | None = None  # the step that a trial has left
        self._rate = 0.0  # bytes of disk a second, without a trial
        self._pause = 0  # periods until the next trial
        self._patience = 1
        self._settling = SETTLING_FRAMES
        self._began = 0.0
        self._bytes = self._frames = self._balance = 0

    @property
    def level(self) -> int:
        """Zstd level for the next frame; 0 means raw."""
        return LEVELS[self._step]

    def observe(self, limit: Limit, size: int, now: float) -> None:
        """See ``Level.observe``."""
        if self._settling:
            self._settling -= 1
            self._began = now
            return
        self._bytes += size
        self._frames += 1
        self._balance += (limit.value > 0) - (limit.value < 0)
        if now - self._began >= PERIOD_S and self._frames >= PERIOD_FRAMES:
            self._judge(self._bytes / (now - self._began), self._balance)
            self._began = now
            self._bytes = self._frames = self._balance = 0

    def _judge(self, rate: float, balance: int) -> None:
        """A period is over."""
        if self._before is not None:
            faster = rate > self._rate * GAIN
            self._patience = 1 if faster else min(2 * self._patience, PATIENCE_MAX)
            self._pause = 0 if faster else self._patience
            if not faster:
                self._go_to(self._before)
            self._before = None
            if not faster:
                return
        self._rate = rate
        self._pause -= 1
        direction = (balance > 0) - (balance < 0)
        if self._pause < 0 and 0 <= self._step + direction < len(LEVELS) and direction:
            self._before = self._step
            self._go_to(self._step + direction)

    def _go_to(self, step: int) -> None:
        self._step = step
        self._settling = SETTLING_FRAMES
