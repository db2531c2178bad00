"""One group of a process server, replicated again and again by its own timer.

The interval is from begin to begin; a cycle that takes longer is followed by the next at once. What fails is
told and tried again soon, whatever the interval. Not here: what a cycle does (``process_server.py``) and
which groups there are (``process_daemon.py``).
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime

from agents.config import ProcessDaemonConfig
from agents.log_ids import ids
from agents.membership import Membership
from agents.send_config import DiskConfig, SendConfig, SendReport
from replicator.clock import Clock
from replicator.desired import Group
from replicator.errors import ReplicatorError, StateError
from replicator.framing import Progress
from replicator.health import Problem
from replicator.transport.dial import Address

log = logging.getLogger(__name__)

GIVE_UP_S = 60.0  # of trying within a cycle: then other groups have their turn
RETRY_S = (2.0, 60.0)  # after a failed cycle: at first, and at the longest
COUNTED = ("read", "zero", "matched", "sent", "resent")

Send = Callable[[SendConfig, Progress, Callable[[str], None]], Awaitable[SendReport]]
"""One cycle: ``process_server.send``, with clock and files."""


@dataclass(slots=True)
class GroupFigures:
    """What is known of a group since the daemon's start.

    Attributes:
        state: ``joining``, ``waiting`` (for its time), ``queued`` (for its turn), ``sending``, ``failing``.
        shown_at: the begin of the newest cycle that was sealed: what the target has is as new as that.
        cycles: how many ended, by ``sealed`` and ``failed``.
        counted: bytes of the cycles that ended, by the names of ``Progress``.
        progress: of the cycle under way, or an empty one.
        problem: what stands in the way, if anything.
    """

    state: str = "joining"
    shown_at: datetime | None = None
    cycles: dict[str, int] = field(default_factory=lambda: {"sealed": 0, "failed": 0})
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    progress: Progress = field(default_factory=Progress)
    problem: Problem | None = None

    def bytes_of(self, name: str) -> int:
        """Bytes so far, the cycle under way included: never less than before."""
        under_way: int = getattr(self.progress, name)
        return self.counted[name] + under_way

    def end_cycle(self, result: str) -> None:
        """Count what is over."""
        self.cycles[result] += 1
        for name in COUNTED:
            self.counted[name] = self.bytes_of(name)
        self.progress = Progress()


@dataclass(frozen=True, slots=True)
class Cycling:
    """What the groups of a daemon share. ``turns``: so many cycles at once. ``draining``: begin no other."""

    send: Send
    clock: Clock
    turns: asyncio.Semaphore
    draining: asyncio.Event


class GroupCycles:
    """Cycles of one group. ``run`` until cancelled, or until what is shared drains."""

    def __init__(
        self, group: Group, config: ProcessDaemonConfig, membership: Membership, shared: Cycling
    ) -> None:
        self.group = group
        self.figures = GroupFigures()
        self._config = send_config(group, config)
        self._membership = membership
        self._shared = shared

    async def run(self) -> None:
        """Cycle after cycle."""
        with ids(group=self.group.name):
            if await self._first(self._membership.joined.wait()):
                return
            retry_s = RETRY_S[0]
            while True:
                began_s = self._shared.clock.monotonic_s()
                sealed = await self._cycle()
                spent_s = self._shared.clock.monotonic_s() - began_s
                if sealed:
                    retry_s, wait_s = RETRY_S[0], self._until_next(spent_s)
                else:
                    wait_s = min(retry_s, self.group.interval_s)
                    retry_s = min(retry_s * 2, RETRY_S[1])
                if await self._first(asyncio.sleep(wait_s)):
                    return

    def _until_next(self, spent_s: float) -> float:
        jitter_s = random.uniform(0, self.group.jitter_s)  # noqa: S311 - spreads, guards nothing
        return max(0.0, self.group.interval_s + jitter_s - spent_s)

    async def _first(self, awaited: Awaitable[object]) -> bool:
        """Wait for this, or for the drain. True: it is the drain."""
        other = asyncio.ensure_future(awaited)
        draining = asyncio.ensure_future(self._shared.draining.wait())
        try:
            await asyncio.wait((other, draining), return_when=asyncio.FIRST_COMPLETED)
            return draining.done()
        finally:
            other.cancel()
            draining.cancel()

    async def _cycle(self) -> bool:
        """One cycle, when it is this group's turn. True: it was sealed."""
        self.figures.state = "queued"
        async with self._shared.turns:
            if self._shared.draining.is_set():
                return False
            self.figures.state = "sending"
            with ids(cycle=secrets.token_hex(4)):
                return await self._send()

    async def _send(self) -> bool:
        began = self._shared.clock.now()
        log.info("a cycle begins")
        try:
            report = await self._shared.send(self._config, self.figures.progress, log.info)
        except ReplicatorError as error:
            self._failed(error)
        except Exception as error:  # a defect: it must not end the other groups, and be seen
            log.exception("the cycle failed in a way that we do not know")
            self._failed(_defect(self.group.name, error))
        else:
            self.figures.end_cycle("sealed")
            self.figures.state = "waiting"
            self.figures.shown_at, self.figures.problem = began, None
            what = f"{report.mode}, {report.consistency}, {report.sent_bytes} bytes sent"
            log.info("epoch %s is sealed: %s, %.1f s", report.epoch, what, report.seconds)
            return True
        return False

    def _failed(self, error: ReplicatorError) -> None:
        self.figures.end_cycle("failed")
        self.figures.state = "failing"
        log.warning("the cycle failed: %s", error)
        known = self.figures.problem
        if known is None or known.code != error.code:
            self.figures.problem = Problem.of(error, self.group.name, self._shared.clock.now())


def send_config(group: Group, config: ProcessDaemonConfig) -> SendConfig:
    """What a cycle of the group is told."""
    return SendConfig(
        group=group.name,
        disks=tuple(DiskConfig(disk.name, disk.source) for disk in group.disks),
        to=Address.parse(group.peer.address),
        token=None,
        state=config.state,
        streams=group.streams,
        level=group.level,
        quiesced=group.quiesced,
        give_up_after_s=GIVE_UP_S,
        azure=config.azure,
    )


def _defect(group: str, error: Exception) -> StateError:
    return StateError(
        "group.defect",
        f"a cycle of group {group!r} failed in a way that we do not know: {type(error).__name__}",
        cause="a defect in this release",
        fix="report it with the log, which names the place; the cycle is tried again",
    )
