"""Epochs for tests: random changes of a few disks, models of the disks, redo logs, and images.

What a log or an image holds is found here by means that share no code with what is tested.
"""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from protocol.header import Header
from protocol.messages import Interval
from protocol.payload import Extent, build, new_compressor, new_decompressor, unpack
from replicator.files import Files
from replicator.images.device import RawImage
from replicator.log.apply import apply_segment
from replicator.log.log import Kind, Log
from replicator.log.workspace import Workspace
from tests.replicator.log.batches import KIB, MIB, PAGE, SEED, directory, held

SECTOR = 512
SIZES = {1: 3 * MIB + 3 * SECTOR, 4: 700 * KIB}
SMALL_SEGMENT = 512 * KIB

Models = dict[int, bytes]
"""Content by disk number."""


@dataclass(frozen=True)
class Change:
    """What one frame says. ``raw``: the bytes of the extents that are not zero."""

    disk: int
    cover: Interval
    extents: tuple[Extent, ...]
    raw: bytes = field(repr=False)


# ------------------------------------------------------------------ random epochs


def random_epoch(rng: random.Random, sizes: Mapping[int, int] = SIZES, share: float = 0.6) -> list[Change]:
    """Changes of about this share of the disks, in any order, of every kind that there is."""
    changes = []
    for disk, size in sizes.items():
        position = 0
        while position < size:
            length = rng.choice(
                (SECTOR, PAGE, 40 * KIB, 200 * KIB, MIB + SECTOR, rng.randrange(1, 400) * SECTOR)
            )
            cover = Interval(position, min(size, position + length))
            position = cover.end
            if rng.random() < share:
                extents = tuple(random_extents(rng, cover))
                changes.append(change(rng, disk, extents, cover))
    rng.shuffle(changes)
    return changes


def random_extents(rng: random.Random, cover: Interval) -> Iterator[Extent]:
    kind = rng.choice(("none", "all", "zero", "scattered", "scattered"))
    if kind in ("all", "zero"):
        yield Extent(cover.start, cover.end - cover.start, kind == "zero")
    position = cover.start if kind == "scattered" else cover.end
    unit = rng.choice((SECTOR, PAGE))
    while position < cover.end:
        length = min(cover.end - position, rng.choice((1, 1, 2, 3, 40)) * unit)
        yield Extent(position, length, rng.random() < 0.2)
        position += length + rng.choice((0, 1, 2, 7, 60)) * unit


def change(rng: random.Random, disk: int, extents: Sequence[Extent], cover: Interval | None = None) -> Change:
    """A change with random data, which half of the time can be compressed, and now and then is zeros."""
    length = sum(extent.length for extent in extents if not extent.zero)
    data = rng.choice((rng.randbytes(length), rng.randbytes(16) * (length // 16), bytes(length)))
    return Change(disk, cover or Interval(extents[0].offset, extents[-1].end), tuple(extents), data)


def moved(each: Change, by: int) -> Change:
    """The same, ``by`` bytes further on."""
    extents = tuple(extent._replace(offset=extent.offset + by) for extent in each.extents)
    return replace(each, cover=Interval(each.cover.start + by, each.cover.end + by), extents=extents)


def changed(models: Mapping[int, bytes], changes: Sequence[Change]) -> Models:
    """The models after an epoch."""
    after = {disk: bytearray(content) for disk, content in models.items()}
    for each in changes:
        position = 0
        for offset, length, zero in each.extents:
            after[each.disk][offset : offset + length] = (
                bytes(length) if zero else each.raw[position : position + length]
            )
            position += 0 if zero else length
    return {disk: bytes(content) for disk, content in after.items()}


# ------------------------------------------------------------------ logs


def frame(each: Change, epoch: int, level: int | None) -> tuple[Header, memoryview]:
    """As a log takes it; its memory is not aligned."""
    compressor = None if level is None else new_compressor(level)
    made = build(each.disk, epoch, each.cover, each.extents, memoryview(each.raw), compressor, SEED)
    return made.header, memoryview(b"".join((made.table, made.payload)))


def write_redo(
    dir_fd: int,
    epoch: int,
    changes: Sequence[Change],
    rng: random.Random,
    segment_bytes: int = SMALL_SEGMENT,
) -> None:
    """A finished redo log of an epoch: batches of one to four frames, compressed or not."""
    log = Log.create(Files(), dir_fd, Kind.REDO, epoch, SEED, segment_bytes=segment_bytes)
    rest = [frame(each, epoch, rng.choice((None, 1))) for each in changes]
    while rest:
        count = rng.randint(1, 4)
        log.write(rest[:count])
        rest = rest[count:]
    log.finish()
    log.close()


def said(log: Log) -> list[tuple[int, Extent, bytes]]:
    """Everything that an undo log says, in its order: disk, extent, and the bytes there."""
    found = []
    decompressor = new_decompressor()
    for header, body in held(log):
        into = memoryview(bytearray(header.raw_len))
        extents, raw = unpack(header, memoryview(body), into, decompressor, SEED)
        position = 0
        for extent in extents:
            length = 0 if extent.zero else extent.length
            data = bytes(extent.length) if extent.zero else bytes(raw[position : position + length])
            found.append((header.disk, extent, data))
            position += length
    return found


def undone(models: Mapping[int, bytes], *logs: Log) -> Models:
    """What the disks were before, by their undo logs, oldest given first; of one log the first is right."""
    before = {disk: bytearray(content) for disk, content in models.items()}
    for log in reversed(logs):
        for disk, extent, data in reversed(said(log)):
            before[disk][extent.offset : extent.end] = data
    return {disk: bytes(content) for disk, content in before.items()}


def untrue(log: Log, before: Mapping[int, bytes]) -> list[tuple[int, Extent]]:
    """What an undo log says that was not so, even if something else in it is what counts."""
    return [
        (disk, extent) for disk, extent, data in said(log) if before[disk][extent.offset : extent.end] != data
    ]


# ------------------------------------------------------------------ a group


class Group:
    """Raw images and a directory of logs below a folder. What is opened is closed with it."""

    def __init__(self, folder: Path, dir_fd: int, files: Files, stack: ExitStack) -> None:
        self.folder = folder
        self.dir_fd = dir_fd
        self.files = files
        self._stack = stack
        numbers = sorted(int(path.stem) for path in folder.glob("*.img"))
        self.bases = {number: RawImage.open(files, image_path(folder, number)) for number in numbers}
        for base in self.bases.values():
            stack.callback(base.close)

    def log(self, kind: Kind, epoch: int) -> Log:
        """That log, new if there is none."""
        place = (self.files, self.dir_fd, kind, epoch, SEED)
        log = Log.open(*place) or Log.create(*place)
        self._stack.callback(log.close)
        return log

    def apply(
        self,
        epoch: int,
        *,
        undo: bool = True,
        segments: int | None = None,
        workspace: Workspace | None = None,
    ) -> Log | None:
        """Apply what is there of an epoch, or some segments of it; its undo log, if wanted."""
        redo = Log.open(self.files, self.dir_fd, Kind.REDO, epoch, SEED)
        history = self.log(Kind.UNDO, epoch) if undo else None
        if redo is not None:
            self._stack.callback(redo.close)
            for segment in redo.segments()[:segments]:
                apply_segment(redo, segment, self.bases, history, SEED, workspace)
        return history

    def contents(self) -> Models:
        """What the images hold."""
        return {number: image_path(self.folder, number).read_bytes() for number in self.bases}


@contextmanager
def group(folder: Path, files: Files | None = None) -> Iterator[Group]:
    """The images and logs that are there."""
    with directory(folder / "logs") as dir_fd, ExitStack() as stack:
        yield Group(folder, dir_fd, files or Files(), stack)


def make_images(folder: Path, rng: random.Random, sizes: Mapping[int, int] = SIZES) -> Models:
    """Thin images, some of their first half data, the rest holes; returns what they hold."""
    folder.mkdir(exist_ok=True)
    (folder / "logs").mkdir()
    models = {}
    for number, size in sizes.items():
        fd = os.open(image_path(folder, number), os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, size)
        position = 0
        while position < size // 2:
            length = min(size - position, rng.randrange(1, 300) * SECTOR)
            if rng.random() < 0.7:
                os.pwrite(fd, rng.randbytes(length), position)
            position += length
        os.fsync(fd)
        os.close(fd)
        models[number] = image_path(folder, number).read_bytes()
    return models


def image_path(folder: Path, number: int) -> Path:
    """Where an image lies."""
    return folder / f"{number}.img"
