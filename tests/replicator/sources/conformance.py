"""What every source must do. A test module subclasses `SourceConformance` and gives it a fixture `disk`.

Not here: how sources of one kind find their holes, fail or refuse to open.
"""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from protocol.constants import SECTOR_BYTES
from protocol.payload import Extent
from replicator.errors import SourceError
from replicator.sources.base import Source

ALLOCATION_BYTES = 64 * 1024  # no file system of ours keeps holes by larger units


@dataclass(frozen=True, slots=True)
class Layout:
    """What a disk holds: bytes were written at `pieces`, the rest never was."""

    size_bytes: int
    pieces: tuple[tuple[int, bytes], ...]

    @property
    def content(self) -> bytes:
        content = bytearray(self.size_bytes)
        for offset, data in self.pieces:
            content[offset : offset + len(data)] = data
        return bytes(content)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk made for a test: its true content, and a way to open it for a source that nobody writes to."""

    content: bytes
    open: Callable[[], Awaitable[Source]]


def random_layout(seed: int, sectors: int) -> Layout:
    """Stretches of data, of stored zeros and of nothing, from one sector to a quarter of the disk."""
    choose = random.Random(seed)
    pieces, position = [], 0
    while position < sectors:
        length = min(sectors - position, choose.choice([1, 7, 8, 128, 1 + sectors // 4]))
        kind = choose.choice(["data", "zeros", "nothing", "nothing"])
        if kind == "data":
            pieces.append((position * SECTOR_BYTES, choose.randbytes(length * SECTOR_BYTES)))
        elif kind == "zeros":
            pieces.append((position * SECTOR_BYTES, bytes(length * SECTOR_BYTES)))
        position += length
    return Layout(sectors * SECTOR_BYTES, tuple(pieces))


async def extents_of(source: Source, start: int = 0) -> list[Extent]:
    return [extent async for extent in source.extents(start)]


def nothing() -> None:
    pass


async def read(source: Source, offset: int, length: int) -> bytes:
    found = bytearray(b"\xa5" * length)
    await source.read_into([Extent(offset, length)], memoryview(found), nothing)
    return bytes(found)


@contextmanager
def refused(code: str, *words: str) -> Iterator[None]:
    """What happens here is refused with this code, these words, a cause and a fix."""
    with pytest.raises(SourceError) as caught:
        yield
    assert caught.value.code == code
    for word in (*words, "Cause: ", "Fix: "):
        assert word in str(caught.value)


class SourceConformance:
    """The contract of `replicator/sources/base.py`. Fixture `disk`: a `Disk` of at least one sector."""

    async def test_size_and_name_are_told(self, disk: Disk) -> None:
        source = await disk.open()
        assert source.size_bytes == len(disk.content)
        assert source.name
        await source.close()

    async def test_extents_touch_from_start_to_end_in_whole_sectors(self, disk: Disk, seed: int) -> None:
        source = await disk.open()
        sectors = len(disk.content) // SECTOR_BYTES
        for start in {0, SECTOR_BYTES * random.Random(seed).randrange(sectors)}:
            position = start
            for extent in await extents_of(source, start):
                assert extent.offset == position
                assert extent.length > 0
                assert extent.length % SECTOR_BYTES == 0
                position = extent.end
            assert position == len(disk.content)
        assert await extents_of(source, len(disk.content)) == []
        await source.close()

    async def test_extents_called_zero_are_zero(self, disk: Disk) -> None:
        source = await disk.open()
        for extent in await extents_of(source):
            assert not extent.zero or not any(disk.content[extent.offset : extent.end])
        await source.close()

    async def test_extents_read_one_after_the_other_are_the_disk(self, disk: Disk) -> None:
        source = await disk.open()
        found = bytearray()
        for extent in await extents_of(source):
            found += bytes(extent.length) if extent.zero else await read(source, extent.offset, extent.length)
        assert found == disk.content
        await source.close()

    async def test_reads_side_by_side_do_not_mix(self, disk: Disk, seed: int) -> None:
        source = await disk.open()
        choose = random.Random(seed)
        sectors = len(disk.content) // SECTOR_BYTES
        ranges = []
        for _ in range(100):
            first = choose.randrange(sectors)
            count = choose.randint(1, min(400, sectors - first))
            ranges.append(Extent(first * SECTOR_BYTES, count * SECTOR_BYTES))
        walks = [asyncio.create_task(extents_of(source)) for _ in range(4)]
        found = await asyncio.gather(*(read(source, extent.offset, extent.length) for extent in ranges))
        for extent, content in zip(ranges, found, strict=True):
            assert content == disk.content[extent.offset : extent.end]
        assert len({tuple(await walk) for walk in walks}) == 1
        await source.close()

    async def test_extents_of_one_read_fill_the_memory_one_after_the_other(
        self, disk: Disk, seed: int
    ) -> None:
        source = await disk.open()
        choose = random.Random(seed)
        sectors = len(disk.content) // SECTOR_BYTES
        extents = [
            Extent(first * SECTOR_BYTES, choose.randint(1, min(9, sectors - first)) * SECTOR_BYTES)
            for first in (choose.randrange(sectors) for _ in range(300))
        ]
        found = bytearray(sum(extent.length for extent in extents) + 2)
        await source.read_into(extents, memoryview(found)[1:-1], nothing)
        assert found[1:-1] == b"".join(disk.content[extent.offset : extent.end] for extent in extents)
        assert found[0] == found[-1] == 0
        await source.read_into([], memoryview(b""), nothing)
        await source.close()

    async def test_what_follows_a_read_has_its_bytes_and_leaves_the_event_loop_alone(
        self, disk: Disk
    ) -> None:
        source = await disk.open()
        found = bytearray(SECTOR_BYTES)
        here = threading.get_ident()

        def then() -> tuple[bytes, bool]:
            return bytes(found), threading.get_ident() == here

        answer = await source.read_into([Extent(0, SECTOR_BYTES)], memoryview(found), then)
        assert answer == (disk.content[:SECTOR_BYTES], False)
        with pytest.raises(ZeroDivisionError):
            await source.read_into([Extent(0, SECTOR_BYTES)], memoryview(found), lambda: 1 // 0)
        await source.close()

    async def test_extents_can_be_left_in_the_middle(self, disk: Disk) -> None:
        source = await disk.open()
        walk = source.extents()
        await anext(walk)
        await walk.aclose()  # type: ignore[attr-defined]  # every source's is a generator
        assert await read(source, 0, SECTOR_BYTES) == disk.content[:SECTOR_BYTES]
        await source.close()

    @pytest.mark.parametrize("where", [(-1, 2), (0, 1), (1, 1), (-(10**9), 1)])
    async def test_a_read_outside_the_disk_is_refused(self, disk: Disk, where: tuple[int, int]) -> None:
        source = await disk.open()
        first, sectors = where
        with pytest.raises(ValueError, match="outside"):
            await read(source, len(disk.content) + first * SECTOR_BYTES, sectors * SECTOR_BYTES)
        await source.close()

    @pytest.mark.parametrize("length", [0, 511, 513])
    async def test_memory_that_does_not_fit_the_extents_is_refused(self, disk: Disk, length: int) -> None:
        source = await disk.open()
        with pytest.raises(ValueError, match="length"):
            await source.read_into([Extent(0, SECTOR_BYTES)], memoryview(bytearray(length)), nothing)
        await source.close()

    @pytest.mark.parametrize("start", [-512, 1, 511])
    async def test_extents_from_no_sector_are_refused(self, disk: Disk, start: int) -> None:
        source = await disk.open()
        for bad in (start, len(disk.content) + 512):
            with pytest.raises(ValueError, match="sector"):
                await extents_of(source, bad)
        await source.close()

    async def test_a_source_that_nobody_writes_to_has_not_changed(self, disk: Disk) -> None:
        source = await disk.open()
        assert not await source.changed()
        await extents_of(source)
        await read(source, 0, SECTOR_BYTES)
        assert not await source.changed()
        await source.close()

    async def test_closing_is_idempotent_and_final(self, disk: Disk) -> None:
        source = await disk.open()
        await asyncio.gather(source.close(), source.close())
        await source.close()
        with pytest.raises(ValueError, match="closed"):
            await read(source, 0, SECTOR_BYTES)
        with pytest.raises(ValueError, match="closed"):
            await extents_of(source)
        with pytest.raises(ValueError, match="closed"):
            await source.changed()

    async def test_a_source_can_be_opened_twice(self, disk: Disk) -> None:
        first, second = await disk.open(), await disk.open()
        await first.close()
        assert await read(second, 0, SECTOR_BYTES) == disk.content[:SECTOR_BYTES]
        await second.close()
