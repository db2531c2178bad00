"""Tries again after what passes by itself, and says meanwhile what it waits for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from replicator.clock import Clock
from replicator.errors import Remedy, ReplicatorError

T = TypeVar("T")

FIRST_WAIT_S = 0.1  # a reset is over at once: resumed within a second
LONGEST_WAIT_S = 10.0  # a line that comes back is found within this
GROWTH = 2.0
CALM_S = 30.0  # what fails after so long is another failure: begin with the short waits again
AFTER_CONTACT = frozenset({"link.closed_before_welcome"})  # final only for who was never let in


async def keep_trying(
    attempt: Callable[[], Awaitable[T]],
    met: Callable[[], bool],
    tell: Callable[[str], None],
    clock: Clock,
    give_up_after_s: float | None,
) -> T:
    """Call ``attempt`` until it succeeds or fails for good.

    Args:
        attempt: one try; it goes on where the one before ended.
        met: whether the peer has let us in at least once. Before that an error is final, unless
            ``give_up_after_s`` is given: it is more likely a wrong address than a bad line.
        tell: takes a line for people.
        clock: for the time spent.
        give_up_after_s: seconds without any success after which the last error is final; None: never.

    Raises:
        ReplicatorError: what cannot pass by itself, or the last error.
    """
    wait_s = FIRST_WAIT_S
    failing_since: float | None = None
    while True:
        began = clock.monotonic_s()
        try:
            return await attempt()
        except ReplicatorError as error:
            now = clock.monotonic_s()
            if now - began > CALM_S or failing_since is None:
                wait_s, failing_since = FIRST_WAIT_S, now
            passing = error.remedy is Remedy.RETRY or (met() and error.code in AFTER_CONTACT)
            patient = met() if give_up_after_s is None else now - failing_since < give_up_after_s
            if not passing or not patient:
                raise
            tell(f"{error.message} ({error.code}); trying again in {wait_s:.1f} s. {error.fix}")
        await asyncio.sleep(wait_s * random.uniform(0.8, 1.0))  # noqa: S311 - spreads, guards nothing
        wait_s = min(wait_s * GROWTH, LONGEST_WAIT_S)
