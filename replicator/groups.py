"""The groups of a master target: who has which in hand, and the work that goes on behind the sessions.

Sealed epochs are applied in the background, one segment at a time and a few groups at once, whether a
session is there or not; an epoch that outgrows its log makes the session wait until a part of it is applied.
Not here: what lies in files (``holding.py``) and what a session says (``session.py``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

from protocol.constants import MIB
from protocol.messages import Open
from replicator.clock import Clock
from replicator.errors import ReplicatorError, SpaceError
from replicator.holding import Holding
from replicator.images.directory import ImageDirectory
from replicator.log.gather import Frame
from replicator.log.log import SEGMENT_BYTES
from replicator.log.place import GroupDirectory
from replicator.log.points import Retention
from replicator.log.workspace import Workspace
from replicator.private_directory import PrivateDirectory
from replicator.workers import Workers

_log = logging.getLogger(__name__)

APPLIERS = 2  # groups at once: more would only take the disk from one another and the threads from sessions
SPACE_RETRY_S = 5.0
LOG_BYTES_MIN = 4 * SEGMENT_BYTES  # one is written, one applied, and what was granted comes meanwhile

Turns: TypeAlias = "asyncio.LifoQueue[Workspace]"
"""Memory to apply with: who has taken one applies."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a group may keep.

    Attributes:
        log_bytes: of an epoch that is not applied; more is applied early. At least LOG_BYTES_MIN.
        retention: how long its recovery points stay.
    """

    log_bytes: int = 16 * 1024 * MIB
    retention: Retention = field(default_factory=Retention)


class Groups:
    """All groups of a master target.

    Args:
        images: the datastore directory.
        retention: what is the master target's own.
        seed: the installation's hash seed.
    """

    def __init__(
        self,
        images: ImageDirectory,
        retention: PrivateDirectory,
        workers: Workers,
        seed: int,
        clock: Clock,
        limits: Limits | None = None,
    ) -> None:
        self._images = images
        self._retention = retention
        self._workers = workers
        self._seed = seed
        self._clock = clock
        self._limits = limits or Limits()
        self._turns: Turns = asyncio.LifoQueue()  # so that a group alone uses one memory, again and again
        for _ in range(APPLIERS):
            self._turns.put_nowait(Workspace(begin=workers.begin))
        self._in_hand: dict[str, GroupInHand] = {}

    async def start(self) -> None:
        """Go on applying what was sealed before. Damage is logged, and met again by the next OPEN."""
        for name in await self._workers.run(GroupDirectory.names, self._retention):
            await self._go_on(name)

    async def open(self, owner: str, wanted: Open) -> GroupInHand:
        """Take a group in hand for an epoch; whoever had it has left it. One caller at a time for a group.

        If the epoch is sealed already, the images hold it, and nothing else, on return.

        Raises:
            ReplicatorError: as ``Holding.open``; what was sealed before is applied all the same.
        """
        await self._workers.run(self._images.check, owner, wanted)
        before = self._in_hand.get(wanted.group)
        if before is not None:
            if {disk.name for disk in wanted.disks} != {disk.name for disk in before.holding.disks}:
                await before.applied()  # whoever comes knows nothing of the disks that are left out
            await before.stop()
        place = GroupDirectory(self._retention, wanted.group)
        try:
            holding = await self._workers.run(
                Holding.open, place, self._images, owner, wanted, self._seed, self._clock.now_ns()
            )
        except ReplicatorError:
            await self._go_on(wanted.group)
            raise
        group = self._take(wanted.group, holding)
        if holding.group.sealed:
            try:
                await group.applied()
            except BaseException:  # cancelled, too
                group.leave()
                raise
        return group

    async def stop(self) -> None:
        """Stop at the next segment, let go of everything; the rest is applied after the next start."""
        await asyncio.gather(*(group.stop() for group in list(self._in_hand.values())))

    def _take(self, name: str, holding: Holding) -> GroupInHand:
        group = GroupInHand(name, holding, self._workers, self._clock, self._limits, self._turns)
        self._in_hand[name] = group
        group.on_closed = lambda: self._in_hand.pop(name, None)
        return group

    async def _go_on(self, name: str) -> None:
        """Apply what of a group is sealed and not applied, without a session."""
        place = GroupDirectory(self._retention, name)
        try:
            holding = await self._workers.run(Holding.open_again, place, self._images, self._seed)
        except ReplicatorError as error:
            _log.error("group %s cannot be applied now: %s", name, error)
            return
        if holding is not None:
            self._take(name, holding).leave()


class GroupInHand:
    """One group in hand: what a session asks of it, and its applier.

    Attributes:
        holding: what it is; only for looking at.
        on_closed: called once, when nobody holds it any more.
    """

    def __init__(
        self,
        name: str,
        holding: Holding,
        workers: Workers,
        clock: Clock,
        limits: Limits,
        turns: Turns,
    ) -> None:
        self.holding = holding
        self.on_closed: Callable[[], object] = lambda: None
        self._name = name
        self._workers = workers
        self._clock = clock
        self._limits = limits
        self._turns = turns
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self._early = False
        self._stopping = False
        self._left = False
        self._closed = False
        self._moved = asyncio.Event()
        self._failure: Exception | None = None
        if holding.pending:
            self._work()

    async def commit(self, frames: Sequence[Frame]) -> None:
        """Make frames durable; waits for room in the log. Raises as ``Holding.commit``, or what stopped the
        applier.
        """
        size = sum(len(body) for _, body in frames)
        while self.holding.log_bytes + size > self._limits.log_bytes and self.holding.can_give_way:
            self._early = True
            await self._one_step()
        await self._workers.run(self.holding.commit, frames)

    async def seal(self, fuzzy: bool) -> bytes:
        """Seal the epoch; its recovery point. Raises as ``Holding.seal``."""
        point = await self._workers.run(self.holding.seal, fuzzy, self._clock.now_ns())
        if self.holding.pending:
            self._work()
        return point

    async def applied(self) -> None:
        """Wait until the images hold the newest sealed epoch. Raises what stopped the applier."""
        while self.holding.pending:
            await self._one_step()

    def leave(self) -> None:
        """The session is over: what is sealed is applied to its end, then everything is let go of."""
        self._left = True
        self._early = False
        self._work()

    async def stop(self) -> None:
        """Stop at the next segment and let go of everything."""
        self._stopping = self._left = True
        self._work()
        task = self._task
        if task is not None:
            await asyncio.wait([task])

    async def _one_step(self) -> None:
        """Wait until the applier got on."""
        self._moved.clear()
        self._work()
        await self._moved.wait()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        """Have the applier look for work."""
        if self._closed:
            return
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._apply())

    async def _apply(self) -> None:
        try:
            while self._again:
                self._again = False
                await self._apply_all()
        except ReplicatorError as error:
            _log.error("group %s: what is sealed cannot be applied now: %s", self._name, error)
            self._failure = error
        except Exception as error:  # a defect: whoever waits hears of it, instead of asking again at once
            _log.exception("group %s: what is sealed cannot be applied", self._name)
            self._failure = error
        finally:
            self._moved.set()
            if self._left:
                self._closed = True
                await self._workers.run(self.holding.close)
                self.on_closed()

    async def _apply_all(self) -> None:
        while not self._stopping and self._failure is None:
            self._early = self._early and self.holding.log_bytes > self._limits.log_bytes // 2
            try:
                worked = await self._apply_one()
            except SpaceError as error:
                _log.warning("group %s: waiting for space: %s", self._name, error)
                with suppress(SpaceError):  # what says which points are left is written anew before they go
                    await self._prune(Retention(keep_s=0))
                await asyncio.sleep(SPACE_RETRY_S)
                continue
            self._moved.set()
            if not worked:
                break
        if not self._stopping:
            with suppress(SpaceError):  # they go with the next epoch
                await self._prune(self._limits.retention)

    async def _apply_one(self) -> bool:
        """Apply a segment, when it is this group's turn. False if there is none."""
        workspace = await self._turns.get()
        try:
            return await self._workers.run(self.holding.apply_next, self._early, workspace)
        finally:
            self._turns.put_nowait(workspace)

    async def _prune(self, retention: Retention) -> None:
        await self._workers.run(self.holding.prune, self._clock.now_ns(), retention)
