"""One long story of a group, told through `Holding` as sessions and the applier would: it makes the states.

A first full copy, epochs that go to the log, pending ones among them, early applies, epochs that are given up
for another or because the one before is asked for, breaks in the middle, history that is pruned. Every step
can be done again after an error, as a sender would. Not here: what must come of it (`checks.py`).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from protocol.messages import NO_ID, Consistency, Interval, Mode, Open, OpenDisk
from protocol.payload import Extent, build, new_compressor
from replicator.files import Files
from replicator.holding import Holding
from replicator.images.directory import ImageDirectory, OpenedDisk
from replicator.log.gather import Frame
from replicator.log.place import GroupDirectory
from replicator.log.points import Retention
from replicator.private_directory import PrivateDirectory
from tests.faults.oracle import KIB, SECTOR, SIZES, Source, Told

GROUP = "group"
OWNER = "a-process-server"
HASH_SEED = 0x5EED5EED5EED5EED
SEGMENT_BYTES = 80 * KIB
NOW_NS = 1_700_000_000_000_000_000
KEPT = 2


def id_of(epoch: int | None) -> bytes:
    """The id under which an epoch of the oracle goes."""
    return NO_ID if epoch is None else blake2b(f"epoch {epoch}".encode(), digest_size=16).digest()


class Machine:
    """A master target's directories, and its group through `Holding`. One object is one process's life."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self.files = files
        (path / "disks").mkdir(parents=True, exist_ok=True)
        retention = PrivateDirectory(files, path / "retention")
        self.place = GroupDirectory(retention, GROUP)
        self.images = ImageDirectory(files, path / "disks", retention, thin=True)

    def open(self, epoch: int, parent: int | None) -> Holding:
        """What OPEN does."""
        disks = tuple(OpenDisk(name, size, NOW_NS + epoch) for name, size in SIZES.items())
        mode = Mode.FULL if parent is None else Mode.INCREMENTAL
        wanted = Open(GROUP, b"", id_of(epoch), id_of(parent), mode, Consistency.CRASH, 0, disks)
        return Holding.open(self.place, self.images, OWNER, wanted, HASH_SEED, NOW_NS + epoch)

    def open_again(self) -> Holding | None:
        """What a start does."""
        return Holding.open_again(self.place, self.images, HASH_SEED)

    def flat(self, disk: str) -> Path:
        """Where a disk's data lies."""
        return self.path / "disks" / f"{disk}-flat.vmdk"

    def close(self) -> None:
        """Let go of the directory."""
        self.images.close()


class Plot(NamedTuple):
    """How an epoch goes.

    Attributes:
        epoch, parent: which, and against what its sender compares.
        breaks: so many sessions end in the middle of it.
        early: whether it is applied before it is sealed.
        seal: whether it is sealed in the end, or left as it is.
        steps: of applying after the seal; None: all.
    """

    epoch: int
    parent: int | None
    breaks: int = 0
    early: bool = False
    seal: bool = True
    steps: int | None = None


PLOTS = (
    Plot(0, None, breaks=1),
    Plot(1, 0, breaks=1, steps=1),
    Plot(2, 1, steps=0),
    Plot(3, 2, breaks=1, early=True, seal=False),
    Plot(4, 2, breaks=1, early=True, seal=False),
    Plot(2, 1),
    Plot(5, 2, breaks=1, early=True),
    Plot(6, 5),
)
SHORT = (
    Plot(0, None),
    Plot(1, 0, steps=0),
    Plot(2, 1, early=True, seal=False),
    Plot(1, 0),
)
"""Everything that is done to a group is in it once: so that something can be done at every single call."""


class Story:
    """What happens to a group. `steps` are done in order; each may be done again if it raised."""

    def __init__(
        self,
        machine: Machine,
        told: Told,
        source: Source,
        rng: random.Random,
        plots: Sequence[Plot] = PLOTS,
    ) -> None:
        self._machine = machine
        self._told = told
        self._source = source
        self._rng = rng
        self._plots = plots

    def steps(self) -> list[Callable[[], None]]:
        """What happens."""
        steps: list[Callable[[], None]] = []
        for plot in self._plots:
            steps += [partial(self.deliver, plot, whole=False)] * plot.breaks
            steps.append(partial(self.deliver, plot, whole=True))
            if plot.parent is not None and plot.seal:
                steps.append(partial(self.prune, plot))
        return steps

    def deliver(self, plot: Plot, *, whole: bool) -> None:
        """A session: what is missing of an epoch is sent, or half of it; then it is sealed and applied."""
        self._told.begins(plot.epoch)
        holding = self._machine.open(plot.epoch, plot.parent)
        try:
            if not holding.group.sealed:
                self._send(holding, plot, whole=whole)
                if not whole or not plot.seal:
                    return
                self._told.seals(plot.epoch)
                holding.seal(False, NOW_NS + plot.epoch)
            self._told.sealed(plot.epoch)
            steps = plot.steps
            while steps != 0 and holding.apply_next(False):
                steps = None if steps is None else steps - 1
        finally:
            holding.close()

    def prune(self, plot: Plot) -> None:
        """What is past its time goes."""
        holding = self._machine.open(plot.epoch, plot.parent)
        try:
            self._told.prunes(KEPT)
            holding.prune(NOW_NS + plot.epoch, Retention(keep_count=KEPT))
        finally:
            holding.close()

    def _send(self, holding: Holding, plot: Plot, *, whole: bool) -> None:
        frames = list(self.frames(holding, plot.epoch, plot.parent))
        self._rng.shuffle(frames)
        rest = iter(frames if whole else frames[: len(frames) // 2])
        while batch := list(islice(rest, self._rng.randint(1, 3))):
            for disk, extents, payload, _ in batch:
                holding.store(disk, extents, payload)
            holding.commit([frame for *_, frame in batch])
            for disk, _, _, (header, _) in batch:
                self._told.acks(disk.name, header.cover_start, header.cover_end)
            if self._rng.random() < 0.4:
                holding.apply_next(plot.early)

    def frames(
        self, holding: Holding, epoch: int, parent: int | None
    ) -> Iterator[tuple[OpenedDisk, Sequence[Extent], memoryview, Frame]]:
        """What is missing of an epoch, as a sender says it: all where images are new or unknown."""
        since = parent if holding.group.epochs.mode is Mode.INCREMENTAL else None
        for disk in holding.disks:
            for gap in disk.durable.gaps(0, SIZES[disk.name]):
                position = gap.start
                while position < gap.end:
                    end = min(gap.end, position + self._rng.choice((8, 64, 144)) * SECTOR)
                    yield disk, *self._frame(holding, disk, epoch, since, Interval(position, end))
                    position = end

    def _frame(
        self, holding: Holding, disk: OpenedDisk, epoch: int, since: int | None, cover: Interval
    ) -> tuple[Sequence[Extent], memoryview, Frame]:
        content = self._source.at(epoch)[disk.name]
        written = list(self._source.changed(disk.name, since, epoch, *cover))
        extents = [Extent(start, end - start, zero) for start, end, zero in written]
        raw = memoryview(b"".join(content[start:end] for start, end, zero in written if not zero))
        level = new_compressor(1) if self._rng.random() < 0.3 else None
        made = build(disk.number, holding.group.epochs.number, cover, extents, raw, level, HASH_SEED)
        return extents, raw, (made.header, memoryview(b"".join((made.table, made.payload))))
