"""What a raw source says when reading fails, and when somebody changes or resizes the disk."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.files import Files
from replicator.sources.raw import RawSource
from replicator.workers import Workers
from tests.real_disks import loop_device, run
from tests.replicator.sources.conformance import extents_of, read, refused

MIB = 1 << 20


# ------------------------------------------------------------------ reading


@pytest.fixture
async def source(path: Path, workers, faulty) -> AsyncIterator[RawSource]:
    source = await RawSource.open(faulty, workers, path)
    yield source
    await source.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.EBADMSG])
async def test_a_failing_read_names_its_range_and_the_next_one_works(source, faulty, number) -> None:
    faulty.shorten("preadv", 1, 1024)
    faulty.fail("preadv", 2, number)
    with refused("source.read_failed", "[4096, 12288)", source.name, os.strerror(number)):
        await read(source, 4096, 8192)
    assert await read(source, 4096, 8192) == b"x" * 8192


async def test_short_reads_are_gone_on_with(source, faulty) -> None:
    for kth in range(1, 4):
        faulty.shorten("preadv", kth, 700)
    assert await read(source, 512, 8192) == b"x" * 8192


async def test_a_read_past_the_new_end_says_that_the_source_shrank(source, path: Path) -> None:
    os.truncate(path, MIB // 2)
    with refused("source.shrank", str(MIB), str(MIB // 2)):
        await read(source, 0, MIB)
    with refused("source.shrank"):
        await read(source, MIB - 512, 512)


async def test_a_failing_walk_is_a_failed_read(source, faulty) -> None:
    faulty.fail("seek", 1, errno.EIO)
    with refused("source.read_failed", f"[512, {MIB})"):
        await extents_of(source, 512)


@pytest.mark.parametrize("kth", [1, 2])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
async def test_a_file_system_that_knows_no_holes_has_data_only(source, faulty, kth, number) -> None:
    faulty.fail("seek", kth, number)
    assert await extents_of(source) == [(0, MIB, False)]


@pytest.mark.parametrize("left", [0, 512, 4096, MIB // 2])
async def test_a_walk_past_the_new_end_says_that_the_source_shrank(source, path: Path, left: int) -> None:
    os.truncate(path, left)
    with refused("source.shrank"):
        await extents_of(source)


class Cut(Files):
    """Files of a disk that somebody truncates between the question for data and the one for its end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def seek(self, fd: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            os.truncate(self.path, offset)
        return super().seek(fd, offset, whence)


async def test_a_disk_cut_off_in_the_middle_of_a_question_is_told_as_shrunk(path: Path, workers) -> None:
    source = await RawSource.open(Cut(path), workers, path)
    with refused("source.shrank"):
        await source._call(source._map, 4096)
    await source.close()


class Ranges(Files):
    """A file system that tells of holes at any byte: data lies in `ranges`, sorted and apart."""

    def __init__(self, ranges: list[tuple[int, int]], size: int) -> None:
        self.ranges = ranges
        self.size = size

    def seek(self, fd: int, offset: int, whence: int) -> int:
        inside = next((span for span in self.ranges if span[0] <= offset < span[1]), None)
        if whence == os.SEEK_HOLE:
            return inside[1] if inside else offset
        after = [span[0] for span in self.ranges if span[0] > offset]
        if inside:
            return offset
        if not after:
            raise OSError(errno.ENXIO, "no data")
        return min(after)


SECTORS = 24


@given(
    cuts=st.sets(st.integers(0, SECTORS * 512), max_size=20).map(sorted), start=st.integers(0, SECTORS - 1)
)
def test_data_at_odd_bytes_is_widened_to_just_its_sectors(
    cuts: list[int], start: int, tmp_path_factory
) -> None:
    size = SECTORS * 512
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    path = tmp_path_factory.getbasetemp() / "widened.img"
    if not path.exists():
        path.write_bytes(b"x" * size)

    async def walk() -> list:
        with Workers(1) as workers:
            source = await RawSource.open(Ranges(ranges, size), workers, path)
            try:
                return await extents_of(source, start * 512)
            finally:
                await source.close()

    said: dict[int, bool] = {}
    position = start * 512
    for extent in asyncio.run(walk()):
        assert extent.offset == position
        assert extent.length > 0
        assert extent.length % 512 == 0
        said |= dict.fromkeys(range(extent.offset // 512, extent.end // 512), not extent.zero)
        position = extent.end
    assert position == size
    for sector in range(start, SECTORS):
        holds_data = any(low < (sector + 1) * 512 and high > sector * 512 for low, high in ranges)
        assert said[sector] == holds_data


# ------------------------------------------------------------------ change


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, MIB),
        lambda path: path.touch(),
        lambda path: path.write_bytes(b"y" * MIB),
        lambda path: os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns)),
    ],
    ids=["truncated to the same size", "touched", "rewritten", "its mtime set back"],
)
async def test_a_file_that_was_written_to_has_changed(source, path: Path, change) -> None:
    assert not await source.changed()
    change(path)
    assert await source.changed()


async def test_a_write_right_after_the_opening_is_seen(path: Path, workers) -> None:
    for _ in range(20):
        fd = os.open(path, os.O_WRONLY)
        os.pwrite(fd, b"a", 0)
        source = await RawSource.open(Files(), workers, path)
        os.pwrite(fd, b"b", 0)
        os.close(fd)
        assert await source.changed()
        await source.close()


class Busy(Files):
    """Files of a disk that somebody writes to all the time."""

    def fstat(self, fd: int) -> os.stat_result:
        os.utime(f"/proc/self/fd/{fd}")
        return super().fstat(fd)


async def test_a_file_being_written_at_the_opening_counts_as_changed(path: Path, workers) -> None:
    source = await RawSource.open(Busy(), workers, path)
    source._files = Files()
    assert await source.changed()
    await source.close()


@pytest.mark.parametrize(
    ("size", "code"), [(2 * MIB, "source.grew"), (512, "source.shrank"), (0, "source.shrank")]
)
async def test_another_size_is_told_as_such(source, path: Path, size: int, code: str) -> None:
    os.truncate(path, size)
    with refused(code, str(MIB), str(size)):
        await source.changed()


@pytest.mark.peer("losetup")
@pytest.mark.parametrize(("size", "code"), [(2 * MIB, "source.grew"), (512, "source.shrank")])
async def test_a_resized_device_is_told_as_such(path: Path, workers, size: int, code: str) -> None:
    with loop_device(path) as device:
        source = await RawSource.open(Files(), workers, device, quiesced=True)
        os.truncate(path, size)
        run("losetup", "--set-capacity", device)
        with refused(code):
            await source.changed()
        await source.close()


@pytest.mark.peer("losetup")
@pytest.mark.parametrize("quiesced", [False, True])
async def test_a_device_may_have_changed_unless_the_caller_vouches_for_it(path, workers, quiesced) -> None:
    with loop_device(path) as device:
        source = await RawSource.open(Files(), workers, device, quiesced=quiesced)
        assert await source.changed() is not quiesced
        await source.close()
