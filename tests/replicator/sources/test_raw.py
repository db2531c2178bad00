"""Raw files and block devices as sources, on real file systems and a real block device."""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

from replicator.files import Files
from replicator.sources.raw import RawSource
from replicator.workers import Workers
from tests.real_disks import loop_device, mounted
from tests.replicator.sources.conformance import (
    ALLOCATION_BYTES,
    Disk,
    Layout,
    SourceConformance,
    extents_of,
    random_layout,
)

PLACES = [
    "temporary",
    "tmpfs",
    pytest.param("ext4", marks=pytest.mark.peer("mkfs.ext4", "losetup", "mount", "umount")),
    pytest.param("xfs", marks=pytest.mark.peer("mkfs.xfs", "losetup", "mount", "umount")),
]


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("ext4", tmp_path_factory.mktemp("mount")) as place:
        yield place


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("xfs", tmp_path_factory.mktemp("mount")) as place:
        yield place


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A fresh folder on each of the file systems."""
    if request.param == "temporary":
        yield tmp_path
        return
    parent = Path("/dev/shm") if request.param == "tmpfs" else request.getfixturevalue(request.param)
    folder = Path(tempfile.mkdtemp(prefix="replicator-test-", dir=parent))
    yield folder
    shutil.rmtree(folder)


def make_file(path: Path, layout: Layout) -> Path:
    with path.open("wb") as file:
        file.truncate(layout.size_bytes)
        for offset, data in layout.pieces:
            os.pwrite(file.fileno(), data, offset)
    return path


@pytest.fixture(params=[1, 4099, 40_001], ids="{} sectors".format)
def layout(request: pytest.FixtureRequest, seed: int) -> Layout:
    return random_layout(seed, request.param)


class TestRawFile(SourceConformance):
    """The contract, for sparse files made at random."""

    @pytest.fixture
    def disk(self, place: Path, layout: Layout, workers: Workers) -> Disk:
        path = make_file(place / "disk.img", layout)
        return Disk(layout.content, partial(RawSource.open, Files(), workers, path))


@pytest.mark.peer("losetup")
class TestBlockDevice(SourceConformance):
    """The contract, for a loop device that nobody writes to."""

    @pytest.fixture
    def disk(self, tmp_path: Path, layout: Layout, workers: Workers) -> Iterator[Disk]:
        with loop_device(make_file(tmp_path / "disk.img", layout)) as device:
            yield Disk(layout.content, partial(RawSource.open, Files(), workers, device, quiesced=True))


# ------------------------------------------------------------------ holes


@pytest.fixture
async def opened(workers: Workers) -> AsyncIterator:
    """Opens sources, and closes them when the test is over."""
    sources = []

    async def open_one(path: Path, files: Files | None = None, **how: bool) -> RawSource:
        sources.append(await RawSource.open(files or Files(), workers, path, **how))
        return sources[-1]

    yield open_one
    for source in sources:
        await source.close()


async def test_every_hole_is_found(place: Path, seed: int, opened) -> None:
    layout = random_layout(seed, 60_000)
    source = await opened(make_file(place / "disk.img", layout))
    known_zero = bytearray(layout.size_bytes)
    for extent in await extents_of(source):
        if extent.zero:
            known_zero[extent.offset : extent.end] = b"\1" * extent.length
    written = bytearray(layout.size_bytes)
    for offset, data in layout.pieces:
        written[offset : offset + len(data)] = b"\1" * len(data)
    for start in range(0, layout.size_bytes - ALLOCATION_BYTES + 1, ALLOCATION_BYTES):
        if not any(written[start : start + ALLOCATION_BYTES]):
            assert all(known_zero[start : start + ALLOCATION_BYTES]), f"the hole at {start} went unnoticed"


async def test_preallocated_space_that_was_never_written_is_a_hole(place: Path, opened) -> None:
    path = place / "disk.img"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 << 20)
        os.pwrite(file.fileno(), b"x" * 4096, 1 << 20)
    source = await opened(path)
    found = [extent for extent in await extents_of(source) if not extent.zero]
    assert any(extent.offset <= 1 << 20 < extent.end for extent in found)
    if "shm" not in str(place):  # tmpfs has no space that is allocated and unwritten
        assert sum(extent.length for extent in found) <= ALLOCATION_BYTES


async def test_a_disk_without_any_data_is_one_zero_extent(place: Path, opened) -> None:
    source = await opened(make_file(place / "disk.img", Layout(10 << 20, ())))
    assert await extents_of(source) == [(0, 10 << 20, True)]


@pytest.mark.peer("losetup")
async def test_a_block_device_is_data_throughout(tmp_path: Path, opened) -> None:
    with loop_device(make_file(tmp_path / "disk.img", Layout(3 << 20, ()))) as device:
        source = await opened(device)
        found = await extents_of(source, 512)
        await source.close()
    assert found == [(512, (3 << 20) - 512, False)]
