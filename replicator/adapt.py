"""Picks the compression of the next frame from what was seen so far.

Pure: observations in, a level out. ``auto`` is simple in this version. A send queue that is full says that
the line is the limit: compress harder. An empty one says that our CPU is: compress less, down to not at all.
Between them the level stays, and it moves one step at a time, after several frames that agree, so that one
burst changes nothing.
"""

from __future__ import annotations

from typing import Protocol

LEVELS = (0, 1, 3, 6, 9)  # 0: raw. Each step costs about twice the CPU of the one before
AGREEING = 8  # frames: some 8 MiB


class Level(Protocol):
    """What picks the compression."""

    @property
    def level(self) -> int:
        """Zstd level for the next frame; 0 is raw."""
        ...

    def observe(self, queued: int, room: int) -> None:
        """The state of the send queue as a frame becomes ready."""
        ...


class FixedLevel:
    """The level that the operator asked for; 0 is off."""

    def __init__(self, level: int) -> None:
        self.level = level

    def observe(self, queued: int, room: int) -> None:
        """Nothing to learn."""


class AutoLevel:
    """Follows the bottleneck. Starts at 1: on most disks it pays at once on any line below 5 Gbit/s."""

    def __init__(self) -> None:
        self._step = 1
        self._votes = 0

    @property
    def level(self) -> int:
        """Zstd level for the next frame; 0 means raw."""
        return LEVELS[self._step]

    def observe(self, queued: int, room: int) -> None:
        """The send queue holds ``queued`` frames of ``room`` at the moment that another one is ready."""
        vote = 1 if queued >= room else -1 if queued == 0 else 0
        self._votes = self._votes + vote if vote and self._votes * vote >= 0 else vote
        if abs(self._votes) >= AGREEING:
            self._step = min(max(self._step + vote, 0), len(LEVELS) - 1)
            self._votes = 0
