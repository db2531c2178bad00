"""Which way bytes and zeros go; that they arrive is the conformance suite's business."""

import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from protocol.payload import Extent
from replicator import linux
from replicator.errors import TargetError
from replicator.files import Files
from replicator.images.device import RawImage
from tests.replicator.images.conformance import MIB, SECTOR, aligned, is_direct

KIB = 1 << 10


class Recording(Files):
    """Lists writes, reads and what is read ahead, as (way, offset, length), and the fallocate modes."""

    def __init__(self) -> None:
        self.writes: list[tuple[str, int, int]] = []
        self.reads: list[tuple[str, int, int]] = []
        self.modes: list[int] = []
        self.broken = False

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if data:
            if self.broken:
                raise OSError(errno.EIO, "Input/output error")
            self.writes.append(("direct" if is_direct(fd) else "buffered", offset, len(data)))
        return super().pwrite(fd, data, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.reads.append(("direct" if is_direct(fd) else "buffered", offset, sum(map(len, buffers))))
        return super().preadv(fd, buffers, offset)

    def will_need(self, fd: int, offset: int, length: int) -> None:
        self.reads.append(("ahead", offset, length))
        super().will_need(fd, offset, length)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self.modes.append(mode)
        super().fallocate(fd, mode, offset, length)


@pytest.fixture
def files() -> Recording:
    return Recording()


@pytest.fixture
def image(tmp_path: Path, files: Recording) -> Iterator[RawImage]:
    image = RawImage.create(files, tmp_path / "disk", 4 * MIB)
    yield image
    image.close()


def write(image: RawImage, *extents: Extent) -> None:
    image.write(extents, aligned(bytes(sum(e.length for e in extents if not e.zero))))


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, MIB, [("direct", 0, MIB)]),
        (4096, 64 * KIB, [("direct", 4096, 64 * KIB)]),
        (4096, 64 * KIB - SECTOR, [("buffered", 4096, 64 * KIB - SECTOR)]),
        (
            SECTOR,
            MIB,
            [("buffered", SECTOR, 3584), ("direct", 4096, MIB - 4096), ("buffered", MIB, SECTOR)],
        ),
        (3 * MIB + SECTOR, 512, [("buffered", 3 * MIB + SECTOR, 512)]),
    ],
)
def test_long_runs_go_direct_and_their_edges_are_exact(
    image: RawImage, files: Recording, offset: int, length: int, expected: list[tuple[str, int, int]]
) -> None:
    write(image, Extent(offset, length))
    assert files.writes == expected


def test_extents_that_touch_are_one_run(image: RawImage, files: Recording) -> None:
    write(image, *(Extent(MIB + number * 4096, 4096) for number in range(16)), Extent(3 * MIB, SECTOR))
    assert files.writes == [("direct", MIB, 64 * KIB), ("buffered", 3 * MIB, SECTOR)]


def test_zeros_between_them_part_two_runs(image: RawImage, files: Recording) -> None:
    write(image, Extent(0, 64 * KIB), Extent(64 * KIB, 4096, True), Extent(68 * KIB, 64 * KIB))
    assert files.writes == [("direct", 0, 64 * KIB), ("direct", 68 * KIB, 64 * KIB)]


@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([(0, MIB)], [("direct", 0, MIB)]),
        (
            [(SECTOR, MIB)],  # to an odd place in memory
            [("buffered", SECTOR, 3584), ("direct", 4096, MIB - 4096), ("buffered", MIB, SECTOR)],
        ),
        (
            [(offset, 4096) for offset in (0, 8 * KIB, 28 * KIB, 49 * KIB)],
            [
                ("ahead", 0, 32 * KIB),
                ("ahead", 49 * KIB, 4096),
                ("buffered", 0, 32 * KIB),
                ("buffered", 49 * KIB, 4096),
            ],
        ),
        (
            [(0, SECTOR), (MIB, MIB), (3 * MIB, SECTOR)],
            [
                ("ahead", 0, SECTOR),
                ("ahead", 3 * MIB, SECTOR),
                ("direct", MIB, MIB),
                ("buffered", 0, SECTOR),
                ("buffered", 3 * MIB, SECTOR),
            ],
        ),
    ],
)
def test_long_runs_are_read_direct_and_small_ones_near_each_other_together(
    image: RawImage, files: Recording, extents: list[tuple[int, int]], expected: list[tuple[str, int, int]]
) -> None:
    wanted = [Extent(*extent) for extent in extents]
    image.read_ahead(wanted)
    first = wanted[0].offset  # so that memory and file agree on where pages begin
    memory = aligned(bytes(first + sum(extent.length for extent in wanted)))[first:]
    image.read_into(wanted, memory)
    assert sorted(files.reads) == sorted(expected)


def test_memory_at_an_odd_address_goes_through_the_page_cache(image: RawImage, files: Recording) -> None:
    image.write([Extent(0, MIB)], aligned(bytes(MIB + 1))[1:])
    assert files.writes == [("buffered", 0, MIB)]


def test_a_blank_image_needs_no_zeros_until_a_write_fails(image: RawImage, files: Recording) -> None:
    write(image, Extent(0, MIB, True))
    assert files.modes == []
    files.broken = True
    with pytest.raises(TargetError):
        write(image, Extent(0, SECTOR))
    files.broken = False
    write(image, Extent(0, SECTOR, True))
    assert files.modes == [linux.FALLOC_FL_PUNCH_HOLE | linux.FALLOC_FL_KEEP_SIZE]


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_thin_file_gives_zeroed_space_back(tmp_path: Path, image: RawImage) -> None:
    write(image, Extent(0, 4 * MIB))
    image.sync()
    assert allocated(tmp_path / "disk") >= 4 * MIB
    image.blank = False
    write(image, Extent(MIB, 2 * MIB, True))
    image.sync()
    assert allocated(tmp_path / "disk") < 2 * MIB + 64 * KIB


def test_a_thick_file_keeps_its_space_and_is_never_punched(tmp_path: Path, files: Recording) -> None:
    image = RawImage.create(files, tmp_path / "thick", 4 * MIB, thin=False)
    assert allocated(tmp_path / "thick") >= 4 * MIB
    image.blank = False
    write(image, Extent(0, 4 * MIB, True))
    image.sync()
    assert allocated(tmp_path / "thick") >= 4 * MIB
    assert not any(mode & linux.FALLOC_FL_PUNCH_HOLE for mode in files.modes)
    image.close()


def test_a_file_system_with_larger_blocks_or_sectors_is_respected(
    tmp_path: Path, files: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux, "direct_alignment", lambda fd: linux.DirectAlignment(512, 16 * KIB))
    image = RawImage.create(files, tmp_path / "disk", MIB)
    write(image, Extent(4096, 128 * KIB))
    assert [entry for entry in files.writes if entry[0] == "direct"] == [("direct", 16 * KIB, 112 * KIB)]
    image.close()


def test_when_one_of_two_syncs_under_way_fails_both_do(tmp_path: Path) -> None:
    """The kernel tells a lost write to one caller; to the next it says all is well."""
    calls = 0
    second: Future[None]

    class FailsOnce(Files):
        def fdatasync(self, fd: int) -> None:
            nonlocal calls, second
            calls += 1
            if calls == 1:
                second = pool.submit(image.sync)
                wait([second], timeout=0.2)  # were it let in, it would be done long before
                raise OSError(errno.EIO, "Input/output error")

    image = RawImage.create(FailsOnce(), tmp_path / "disk", MIB)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(TargetError, match="Input/output error"):
            image.sync()
        with pytest.raises(TargetError, match="an earlier sync failed"):
            second.result()
    assert calls == 1
    image.close()
