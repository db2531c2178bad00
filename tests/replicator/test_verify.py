"""The digest of a disk's content: the same for the same bytes however they lie, another for any other."""

import hashlib
import os
import random
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from protocol.payload import Extent
from replicator.errors import SourceError
from replicator.files import Files
from replicator.sources.raw import RawSource
from replicator.verify import CHUNK_BYTES, content_digest
from replicator.workers import Workers
from tests.replicator.pipeline import MIB, ends

SIZE = 5 * MIB + 512


@pytest.fixture
def workers():
    with Workers(2) as made:
        yield made


@pytest.fixture
def digest_of(workers: Workers) -> Callable[[Path], Coroutine[Any, Any, str]]:
    async def digest(path: Path) -> str:
        source = await RawSource.open(Files(), workers, path)
        try:
            return await content_digest(source)
        finally:
            await source.close()

    return digest


def content(seed: int) -> bytes:
    """Data, a stretch of zeros over chunk bounds, data, zeros up to the end."""
    made = bytearray(random.Random(seed).randbytes(SIZE))
    made[MIB // 2 : 3 * MIB + 4096] = bytes(3 * MIB + 4096 - MIB // 2)
    made[-600:] = bytes(600)
    return bytes(made)


def sparse(path: Path, data: bytes) -> Path:
    """The bytes with a hole wherever a block of 4 KiB is zero."""
    with path.open("wb") as file:
        file.truncate(len(data))
        for start in range(0, len(data), 4096):
            if any(data[start : start + 4096]):
                os.pwrite(file.fileno(), data[start : start + 4096], start)
    return path


def dense(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


async def test_how_the_zeros_are_stored_makes_no_difference(tmp_path: Path, digest_of, seed: int) -> None:
    data = content(seed)
    assert any(not data[start : start + CHUNK_BYTES].strip(b"\0") for start in range(0, SIZE, CHUNK_BYTES))
    assert os.stat(sparse(tmp_path / "a", data)).st_blocks < os.stat(dense(tmp_path / "b", data)).st_blocks
    punched = dense(tmp_path / "c", data)
    with punched.open("r+b") as file:
        from replicator.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate

        fallocate(file.fileno(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, MIB, 2 * MIB)
    assert len({await digest_of(tmp_path / name) for name in "abc"}) == 1


async def test_it_is_the_digest_that_its_page_describes(tmp_path: Path, digest_of, seed: int) -> None:
    """SHA-256 of the size and of every chunk that is not zero, each behind its position."""
    data = content(seed)
    expected = hashlib.sha256(struct.pack("<Q", SIZE))
    for start in range(0, SIZE, MIB):
        chunk = data[start : start + MIB]
        if any(chunk):
            expected.update(struct.pack("<Q", start) + chunk)
    assert await digest_of(sparse(tmp_path / "a", data)) == expected.hexdigest()


@pytest.mark.parametrize("at", [0, MIB // 2 - 1, 2 * MIB, 3 * MIB, 3 * MIB + 4096, SIZE - 601, SIZE - 1])
async def test_any_other_bit_makes_another_digest(tmp_path: Path, digest_of, seed: int, at: int) -> None:
    data = content(seed)
    other = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    digests = {await digest_of(sparse(tmp_path / name, disk)) for name, disk in (("a", data), ("b", other))}
    assert len(digests) == 2


async def test_the_same_chunks_at_other_places_make_another_digest(
    tmp_path: Path, digest_of, seed: int
) -> None:
    one = random.Random(seed).randbytes(MIB)
    disks = [one + bytes(2 * MIB), bytes(MIB) + one + bytes(MIB), one + bytes(3 * MIB)]
    assert len({await digest_of(dense(tmp_path / str(n), data)) for n, data in enumerate(disks)}) == 3


async def test_an_empty_disk_of_any_size_is_told_apart(tmp_path: Path, digest_of) -> None:
    digests = set()
    for size in (512, MIB, 1 << 40):
        with (tmp_path / str(size)).open("wb") as file:
            file.truncate(size)
        digests.add(await digest_of(tmp_path / str(size)))
    assert len(digests) == 3


class Scattered:
    """A source whose extents begin and end anywhere, several in one chunk."""

    name = "scattered"

    def __init__(self, data: bytes, bounds: list[int], fails: bool = False) -> None:
        self.size_bytes = len(data)
        self._data = data
        self._bounds = bounds
        self._fails = fails
        self.read = 0

    async def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        for first, end in zip([0, *self._bounds], [*self._bounds, self.size_bytes], strict=True):
            yield Extent(first, end - first, not any(self._data[first:end]))

    async def read_into(self, extents, view: memoryview, then):
        if self._fails:
            raise SourceError("source.read_failed", "no", cause="no", fix="no")
        position = 0
        for extent in extents:
            view[position : position + extent.length] = self._data[extent.offset : extent.end]
            position += extent.length
            self.read += extent.length
        return then()

    async def fingerprint(self) -> str:
        return ""

    async def changed(self) -> bool:
        return False

    async def close(self) -> None: ...


async def test_where_extents_begin_and_end_makes_no_difference(tmp_path: Path, digest_of, seed: int) -> None:
    data = content(seed)
    expected = await digest_of(sparse(tmp_path / "a", data))
    chance = random.Random(seed)
    for _ in range(20):
        bounds = sorted(chance.sample(range(512, SIZE, 512), chance.randrange(1, 40)))
        source = Scattered(data, bounds)
        assert await content_digest(source) == expected
        assert source.read <= SIZE + CHUNK_BYTES  # no chunk is read twice


async def test_a_disk_that_cannot_be_read_has_no_digest() -> None:
    with ends(SourceError, "source.read_failed"):
        await content_digest(Scattered(b"x" * 4096, [512], fails=True))
