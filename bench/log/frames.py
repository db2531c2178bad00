"""Frames as a receiver has them in memory, table and payload in one piece, of three kinds of changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from bench.micro import sample_frames
from protocol.constants import MIB
from protocol.header import Header
from protocol.messages import Interval
from protocol.payload import Extent, build, new_compressor
from replicator.buffers import BufferPool

SEED = 1
DISK, EPOCH = 1, 1
BLOCK_BYTES = 4096
DISTINCT = 16  # MiB of content, again and again: nothing here looks for the same bytes elsewhere
LEVEL = 1


@dataclass(frozen=True, slots=True)
class Change:
    """What one frame says: extents of a disk, sorted, and their bytes, one after the other."""

    extents: tuple[Extent, ...]
    raw: memoryview


@dataclass(frozen=True, slots=True)
class Kind:
    """Changes of one kind.

    Attributes:
        title: for tables. changes: sorted. level: that their frames are compressed with; None: not at all.
    """

    title: str
    changes: Sequence[Change]
    level: int | None = None

    @property
    def size_bytes(self) -> int:
        """What changes."""
        return sum(len(change.raw) for change in self.changes)


def kinds(applied_bytes: int, blocks_bytes: int, base_bytes: int, seed: int) -> Iterator[Kind]:
    """Whole MiB at random places, random and compressible, and blocks of 4 KiB, of a disk of a size."""
    random = Random(seed)
    noise = [memoryview(random.randbytes(MIB)) for _ in range(DISTINCT)]
    text = [memoryview(frame) for frame in sample_frames(DISTINCT)]
    places = sorted(random.sample(range(base_bytes // MIB), applied_bytes // MIB))
    for title, contents, level in (("whole MiB", noise, None), ("whole MiB, compressible", text, LEVEL)):
        changes = [
            Change((Extent(place * MIB, MIB),), contents[number % DISTINCT])
            for number, place in enumerate(places)
        ]
        yield Kind(title, changes, level)
    blocks = sorted(random.sample(range(base_bytes // BLOCK_BYTES), blocks_bytes // BLOCK_BYTES))
    step = MIB // BLOCK_BYTES
    yield Kind(
        "blocks of 4 KiB",
        [
            Change(
                tuple(Extent(block * BLOCK_BYTES, BLOCK_BYTES) for block in blocks[first : first + step]),
                noise[first // step % DISTINCT][: len(blocks[first : first + step]) * BLOCK_BYTES],
            )
            for first in range(0, len(blocks), step)
        ],
    )


def frames(kind: Kind, pool: BufferPool) -> list[tuple[Header, memoryview]]:
    """A frame of each change, in memory of ``pool`` that stays taken."""
    compressor = None if kind.level is None else new_compressor(kind.level)
    made = []
    for change in kind.changes:
        cover = Interval(change.extents[0].offset, change.extents[-1].end)
        frame = build(DISK, EPOCH, cover, change.extents, change.raw, compressor, SEED)
        body = pool.take(frame.header.body_len, frame.header.table_len).view
        body[: frame.header.table_len] = frame.table
        body[frame.header.table_len :] = frame.payload
        made.append((frame.header, body))
    return made
