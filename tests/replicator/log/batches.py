"""Logs for tests: frames of random content, batches of them, and what is found in a log, read both ways."""

import mmap
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.header import Header
from protocol.messages import Interval
from protocol.payload import Extent, build, new_compressor
from replicator.files import Files
from replicator.log.gather import Frame
from replicator.log.log import Kind, Log

SEED = 0x5EED5EED5EED5EED
EPOCH = 7
KIB = 1 << 10
MIB = 1 << 20
PAGE = 4 * KIB
SIZES = (0, 512, PAGE, PAGE + 512, 3 * PAGE, 20 * KIB, 33 * KIB)


class _Memory(threading.local):
    """What each thread reads into."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, 16 * MIB))


_MEMORY = _Memory()

Content = list[tuple[Header, bytes]]
Batches = list[list[Frame]]


@contextmanager
def directory(path: Path) -> Iterator[int]:
    """A descriptor of the directory, which is made if it is not there."""
    path.mkdir(exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def frame(rng: random.Random, size: int, *, aligned: bool = True, level: int | None = None) -> Frame:
    """A DATA frame with `size` random bytes, of size 0 one with a zero extent. `level`: compress it."""
    disk, offset = rng.randrange(1, 5), rng.randrange(1 << 20) * 512
    raw = rng.randbytes(size) if level is None else rng.randbytes(size // 2).ljust(size, b"\0")
    extent = Extent(offset, size) if size else Extent(offset, MIB, True)
    compressor = None if level is None else new_compressor(level)
    made = build(disk, EPOCH, Interval(offset, extent.end), [extent], memoryview(raw), compressor, SEED)
    lead = len(made.table)
    start = PAGE - lead if aligned else PAGE - lead + 512
    memory = memoryview(mmap.mmap(-1, start + made.header.body_len))[start:]
    memory[:lead] = made.table
    memory[lead:] = made.payload
    return made.header, memory


def batch(rng: random.Random, most: int = 3) -> list[Frame]:
    """Up to `most` frames of sizes that go all the ways into a segment."""
    return [
        frame(rng, rng.choice(SIZES), aligned=rng.random() < 0.8, level=rng.choice((None, None, 1)))
        for _ in range(rng.randint(0, most))
    ]


def plain(batches: Batches) -> Content:
    """What a log that was given these batches has to hold."""
    return [(header, bytes(body)) for frames in batches for header, body in frames]


def held(log: Log, *segments: int) -> Content:
    """What a log holds, or these segments of it, read a run at a time."""
    found = []
    for segment in segments or log.segments():
        entries = list(log.entries(segment))
        while entries:
            bodies = log.read_run(segment, entries, _MEMORY.view)
            found += [(entry.header, bytes(body)) for entry, body in zip(entries, bodies, strict=False)]
            entries = entries[len(bodies) :]
    return found


def held_singly(log: Log) -> Content:
    """The same, record by record."""
    return [
        (entry.header, bytes(log.read(segment, entry, _MEMORY.view)))
        for segment in log.segments()
        for entry in log.entries(segment)
    ]


def written(path: Path, batches: Batches, *, kind: Kind = Kind.REDO, segment_bytes: int = MIB) -> None:
    """A log of these batches in a directory, let go of without being closed: its last segment is open."""
    with directory(path) as dir_fd:
        log = Log.create(Files(), dir_fd, kind, EPOCH, SEED, segment_bytes=segment_bytes)
        for number, frames in enumerate(batches, 1):
            log.write(frames, note=number if kind is Kind.UNDO else 0)
        log.close()


def opened(path: Path, *, files: Files | None = None, kind: Kind = Kind.REDO) -> Content | None:
    """What a log in a directory holds when it is opened; None if there is none."""
    with directory(path) as dir_fd:
        log = Log.open(files or Files(), dir_fd, kind, EPOCH, SEED)
        if log is None:
            return None
        try:
            return held(log)
        finally:
            log.close()


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {found.name: found.read_bytes() for found in sorted(path.iterdir())}


def restore(path: Path, files: dict[str, bytes]) -> None:
    """Make a directory hold exactly these files."""
    path.mkdir(exist_ok=True)
    for found in path.iterdir():
        if found.name not in files:
            found.unlink()
    for name, content in files.items():
        (path / name).write_bytes(content)
