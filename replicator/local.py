"""An epoch that is said to images in this process: the sender's windows, differences and frames, no wire.

What a session does with frames in two processes, this does in one: the same planner has decided what the
epoch says, the same code finds it, packs it and takes the zeros and what is equal out of it; only that a
piece goes straight to its image, and that digests are asked of the image itself. Not here: which epoch it is
and when it is sealed (for page blobs: ``azure/way_back.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

from protocol.messages import Interval, Mode
from protocol.payload import DataFrame, parse_table
from replicator.adapt import FixedLevel
from replicator.asking import rows_in_order
from replicator.buffers import BufferPool
from replicator.differ import Window
from replicator.errors import cause_of
from replicator.extents import Coverage
from replicator.framing import Framer, Progress, SendingDisk, SendingParts, windows_of
from replicator.images.base import Image
from replicator.images.reading import DIGESTS_A_PART
from replicator.sending import PACKERS_A_THREAD
from replicator.workers import Workers

KEEP_BYTES = 32 * 1024 * 1024
EPOCH_NUMBER = 1  # in frames that nobody but we see

Note = Callable[[Sequence[tuple[int, int, int]]], None]
"""Makes durable that the images hold (disk number, start, end) of each. Blocks."""


@dataclass(frozen=True, slots=True)
class LocalDisk:
    """A disk that is read, and the image that becomes it. ``sending.durable``: what the image holds of it."""

    sending: SendingDisk
    image: Image


class LocalEpoch:
    """One epoch, from what is durable of it to all of it.

    Args:
        disks: with numbers that differ.
        mode: what the epoch has to say, as ``plan.decide`` says.
        workers: threads for disk and CPU work.
        seed: of digests.
        progress: counters to keep; nothing is sent, so ``sent`` stays 0.
        note: is told what an image holds, after its ``sync``.
    """

    def __init__(
        self,
        disks: Sequence[LocalDisk],
        mode: Mode,
        workers: Workers,
        seed: int,
        progress: Progress,
        note: Note,
    ) -> None:
        self._disks = disks
        self._workers = workers
        self._seed = seed
        self._progress = progress
        self._note = note
        self._stored: list[tuple[LocalDisk, Interval]] = []
        self._noting = asyncio.Lock()
        self._parts = SendingParts(workers, FixedLevel(0), progress, BufferPool(KEEP_BYTES))
        self._mode = mode
        self._asks = _OfImages(workers, {disk.sending.number: disk.image for disk in disks})
        self._windows = _all_windows(disks)
        self._cutting = asyncio.Lock()

    async def run(self) -> None:
        """Say what is missing. Ended in the middle, another one goes on from what was noted.

        Raises:
            SourceError, TargetError, SpaceError, LinkError, TrustError: what sources and images raise, and
            what ``note`` raises.
        """
        self._count()
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(PACKERS_A_THREAD * self._workers.threads):
                    tasks.create_task(self._say())
        except BaseExceptionGroup as group:
            raise cause_of(group) from None
        finally:
            await self._windows.aclose()

    async def _say(self) -> None:
        """Take one window after the other; several of these run side by side."""
        framer = Framer(
            self._parts, self._mode, EPOCH_NUMBER, self._asks, _always, self._seed, self._progress
        )
        while True:
            async with self._cutting:
                job = await anext(self._windows, None)
            if job is None:
                return
            await self._say_window(framer, *job)

    async def _say_window(self, framer: Framer, disk: LocalDisk, window: Window) -> None:
        difference = await framer.difference(disk.sending, window)
        for piece in difference.pieces:
            packed = await framer.packed(disk.sending, piece, difference.fine)
            try:
                await self._workers.run(_store, disk.image, packed.frame)
            finally:
                self._parts.give(packed)
            self._stored.append((disk, piece.cover))
            async with self._noting:  # one commit at a time, for all that was stored before it began
                await self._commit()

    async def _commit(self) -> None:
        batch, self._stored = self._stored, []
        if batch:
            await self._workers.run(self._keep, batch)
            for disk, cover in batch:
                disk.sending.durable.add(*cover)
            self._count()

    def _keep(self, batch: Sequence[tuple[LocalDisk, Interval]]) -> None:
        for disk in self._disks:
            disk.image.sync()
        self._note([(disk.sending.number, *cover) for disk, cover in batch])

    def _count(self) -> None:
        self._progress.size = sum(disk.image.size_bytes for disk in self._disks)
        self._progress.done = sum(disk.sending.durable.covered_bytes for disk in self._disks)


class _OfImages:
    """Answers from the images themselves; see ``framing.Asks``."""

    def __init__(self, workers: Workers, images: Mapping[int, Image]) -> None:
        self._workers = workers
        self._images = images

    async def ask(self, disk: int, intervals: Sequence[Interval], block: int, seed: int) -> bytes:
        image = self._images[disk]
        rows: list[bytes] = []
        rest = tuple(intervals)
        while rest:
            found = await self._workers.run(image.digests, rest, block, seed, DIGESTS_A_PART)
            rows.extend(rows_in_order(*found, image.size_bytes, block, seed))
            rest = found.left_of(rest)
        return b"".join(rows)


def _store(image: Image, frame: DataFrame) -> None:
    """Write what a frame says."""
    image.write(parse_table(frame.header, memoryview(frame.table)), memoryview(frame.payload))


async def _all_windows(disks: Sequence[LocalDisk]) -> AsyncGenerator[tuple[LocalDisk, Window], None]:
    """What is to be looked at, disk after disk, made as it is consumed."""
    for disk in disks:
        sending = disk.sending
        held = Coverage(sending.durable.intervals())
        async for window in windows_of(sending, held):
            yield disk, window


def _always() -> bool:
    """An image can be asked at any time."""
    return True
