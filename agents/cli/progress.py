"""Shows how a send gets on: a bar on a terminal, a line every ten seconds elsewhere. Always on stderr."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Awaitable
from typing import TypeVar

from agents.cli.output import in_units, say
from replicator.sending import Progress

T = TypeVar("T")

TERMINAL_S = 0.2
LINE_S = 10.0
RATE_OVER_S = 10.0  # long enough to be calm, short enough to show a stall


class Meter:
    """Rate and time left, from what was counted in the last seconds."""

    def __init__(self, now: float) -> None:
        self._seen: deque[tuple[float, int]] = deque([(now, 0)])

    def observe(self, done: int, now: float) -> float:
        """Bytes per second of late."""
        self._seen.append((now, done))
        while now - self._seen[0][0] > RATE_OVER_S and len(self._seen) > 2:
            self._seen.popleft()
        since, before = self._seen[0]
        return (done - before) / (now - since) if now > since else 0.0


def line(name: str, progress: Progress, rate: float) -> str:
    """One line that says it all."""
    share = progress.done / progress.size if progress.size else 0.0
    left = (progress.size - progress.done) / rate if rate else None
    return (
        f"{name} {share:4.0%} {in_units(progress.done)} of {in_units(progress.size)}, {in_units(rate)}/s, "
        f"matched {in_units(progress.matched)}, zero {in_units(progress.zero)}, "
        f"sent {in_units(progress.sent)}, {_duration(left)} left"
    )


async def shown(work: Awaitable[T], progress: Progress, name: str) -> T:
    """Do ``work`` and show its progress meanwhile."""
    show = asyncio.ensure_future(_bar(progress, name) if sys.stderr.isatty() else _lines(progress, name))
    try:
        return await work
    finally:
        show.cancel()
        await asyncio.wait([show])


async def _lines(progress: Progress, name: str) -> None:
    meter = Meter(time.monotonic())
    while True:
        await asyncio.sleep(LINE_S)
        say(line(name, progress, meter.observe(progress.done, time.monotonic())))


async def _bar(progress: Progress, name: str) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    meter = Meter(time.monotonic())
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        while True:
            table = Table.grid()
            table.add_row(ProgressBar(total=progress.size or 1, completed=progress.done))
            table.add_row(line(name, progress, meter.observe(progress.done, time.monotonic())))
            live.update(table, refresh=True)
            await asyncio.sleep(TERMINAL_S)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "? s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )
