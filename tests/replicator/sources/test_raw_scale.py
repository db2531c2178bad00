"""What a raw source costs: memory and time follow what is there, not the size of the disk."""

import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from replicator.files import Files
from replicator.sources.raw import RawSource
from replicator.workers import Workers

TIB = 1 << 40


class CountingWorkers(Workers):
    """Workers that know how often they were asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    async def run(self, function: Callable, *args, **kwargs):
        self.calls += 1
        return await super().run(function, *args, **kwargs)


async def walk(source: RawSource) -> tuple[int, int, int]:
    """(extents, bytes of data, peak of memory) of a walk that keeps nothing."""
    tracemalloc.start()
    extents = data_bytes = 0
    async for extent in source.extents():
        extents += 1
        data_bytes += 0 if extent.zero else extent.length
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return extents, data_bytes, peak


async def test_two_tib_with_little_data_take_milliseconds_and_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(2 * TIB)
        for offset in range(0, 2 * TIB, TIB // 8):
            os.pwrite(file.fileno(), b"x" * 4096, offset)
    with Workers() as workers:
        source = await RawSource.open(Files(), workers, path)
        begun = time.monotonic()
        extents, data_bytes, peak = await walk(source)
        seconds = time.monotonic() - begun
        await source.close()
    assert (extents, data_bytes) == (32, 16 * 4096)
    assert seconds < 0.25
    assert peak < 200_000


async def test_a_fragmented_file_costs_few_calls_and_the_memory_of_one(tmp_path: Path) -> None:
    pieces = 10_000
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(pieces * 8192)
        for number in range(pieces):
            os.pwrite(file.fileno(), b"x", number * 8192)
    with CountingWorkers() as workers:
        source = await RawSource.open(Files(), workers, path)
        before = workers.calls
        extents, data_bytes, peak = await walk(source)
        calls = workers.calls - before
        await source.close()
    assert (extents, data_bytes) == (2 * pieces, pieces * 4096)
    assert calls <= 2 * pieces // 1000
    assert peak < 1_000_000
