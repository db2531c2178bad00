"""The digest map on disk: what was recorded comes back, and nothing else is ever believed."""

import errno
import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.constants import SECTOR_BYTES
from protocol.messages import Interval
from replicator.digest import BLOCK_BYTES, DIGEST_BYTES, Digester, digests_of, zero_row
from replicator.digest_map import PAGE_BYTES, PAGE_SPAN_BYTES, DigestMap, DigestMapBuilder
from replicator.files import Files

SEED = 7
TIB = 1 << 40
SIZE = 3 * PAGE_SPAN_BYTES + 5 * BLOCK_BYTES + 3 * SECTOR_BYTES  # four pages, a short last block
BLOCKS = -(-SIZE // BLOCK_BYTES)


@pytest.fixture
def dir_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def random_row(seed: int, blocks: int = BLOCKS) -> bytes:
    return random.Random(seed).randbytes(blocks * DIGEST_BYTES)


def row_of_zeros(size: int = SIZE) -> bytes:
    return zero_row(Interval(0, size), size, SEED)


def publish(dir_fd: int, name: str, row: bytes, size: int = SIZE, seed: int = SEED) -> bytes:
    builder = DigestMapBuilder(Files(), dir_fd, name, size, seed)
    builder.record(0, row)
    root = builder.finish()
    assert root is not None
    return root


def read_back(dir_fd: int, name: str, root: bytes, size: int = SIZE, seed: int = SEED) -> bytes | None:
    opened = DigestMap.open(Files(), dir_fd, name, root, size, seed)
    if opened is None:
        return None
    row = opened.digests(0, size)
    opened.close()
    opened.close()
    return row


# ------------------------------------------------------------------ what was recorded comes back


def test_digests_recorded_in_any_order_from_any_thread_come_back(dir_fd: int, seed: int) -> None:
    rng, row = random.Random(seed), random_row(seed)
    cuts = sorted({0, BLOCKS, *(rng.randrange(BLOCKS) for _ in range(40))})
    parts = list(itertools.pairwise(cuts))
    rng.shuffle(parts)
    builder = DigestMapBuilder(Files(), dir_fd, "map", SIZE, SEED)

    def told(part: tuple[int, int]) -> None:
        digester = Digester(SEED)
        digester.rows.append((part[0] * BLOCK_BYTES, row[part[0] * 16 : part[1] * 16]))
        builder.take(digester)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(told, parts))
    root = builder.finish()
    assert root is not None
    assert read_back(dir_fd, "map", root) == row
    opened = DigestMap.open(Files(), dir_fd, "map", root, SIZE, SEED)
    assert opened is not None
    for first, end in parts:
        assert opened.digests(first * BLOCK_BYTES, min(end * BLOCK_BYTES, SIZE)) == row[first * 16 : end * 16]
    opened.close()


# After a break, blocks are read and told again: (first, count, kind), the last one counts.
AGAIN = st.lists(
    st.tuples(
        st.integers(0, BLOCKS - 1),
        st.sampled_from([1, 3, 254, 255, 256, BLOCKS]),
        st.sampled_from(["data", "zeros"]),
    ),
    max_size=8,
)


@given(AGAIN, st.integers(0, 2**32))
def test_of_blocks_told_more_than_once_the_last_time_counts(
    tmp_path_factory: pytest.TempPathFactory, told: list[tuple[int, int, str]], seed: int
) -> None:
    fd = os.open(tmp_path_factory.getbasetemp(), os.O_RDONLY | os.O_DIRECTORY)
    rng = random.Random(seed)
    builder = DigestMapBuilder(Files(), fd, "again.map", SIZE, SEED)
    model, zeros = bytearray(BLOCKS * 16), row_of_zeros()
    for first, count, kind in [(0, BLOCKS, rng.choice(["data", "zeros"])), *told]:
        end = min(first + count, BLOCKS)
        digester = Digester(SEED)
        if kind == "data":
            row = rng.randbytes((end - first) * 16)
            digester.rows.append((first * BLOCK_BYTES, row))
            model[first * 16 : end * 16] = row
        else:
            digester.zeros.append(Interval(first * BLOCK_BYTES, min(end * BLOCK_BYTES, SIZE)))
            model[first * 16 : end * 16] = zeros[first * 16 : end * 16]
        builder.take(digester)
    root = builder.finish()
    assert root is not None
    assert read_back(fd, "again.map", root) == bytes(model)
    os.close(fd)


def test_a_map_with_a_block_missing_is_none(dir_fd: int) -> None:
    row = random_row(1)
    for missing in (0, 255, BLOCKS - 1):
        builder = DigestMapBuilder(Files(), dir_fd, "map", SIZE, SEED)
        if missing:
            builder.record(0, row[: missing * 16])
        if missing + 1 < BLOCKS:
            builder.record((missing + 1) * BLOCK_BYTES, row[(missing + 1) * 16 :])
        assert builder.finish() is None
        builder.close()


def test_a_sparse_disk_of_2_tib_has_a_map_of_almost_nothing(dir_fd: int, tmp_path: Path) -> None:
    size = 2 * TIB + SECTOR_BYTES
    builder = DigestMapBuilder(Files(), dir_fd, "map", size, SEED)
    builder.record_zeros(0, TIB)
    content = os.urandom(BLOCK_BYTES)
    builder.record(TIB, digests_of(memoryview(content), SEED))
    builder.record_zeros(TIB + BLOCK_BYTES, size)
    root = builder.finish()
    assert root is not None
    assert (tmp_path / "map").stat().st_blocks * 512 <= 2 * PAGE_BYTES
    opened = DigestMap.open(Files(), dir_fd, "map", root, size, SEED)
    assert opened is not None
    assert opened.digests(TIB, TIB + BLOCK_BYTES) == digests_of(memoryview(content), SEED)
    assert opened.digests(size - SECTOR_BYTES, size) == zero_row(Interval(2 * TIB, size), size, SEED)
    opened.close()


def test_holes_of_a_map_are_not_read(dir_fd: int, seed: int) -> None:
    class Counting(Files):
        read = 0

        def preadv(self, fd, buffers, offset):
            count = super().preadv(fd, buffers, offset)
            self.read += count
            return count

    size, rng = TIB // 64 + SECTOR_BYTES, random.Random(seed)
    blocks = -(-size // BLOCK_BYTES)
    row = bytearray(row_of_zeros(size))
    for first in (0, *(rng.randrange(1, blocks - 600) for _ in range(5)), blocks - 1):
        end = min(first + rng.choice((1, 300)), blocks)
        row[first * DIGEST_BYTES : end * DIGEST_BYTES] = rng.randbytes((end - first) * DIGEST_BYTES)
    root = publish(dir_fd, "map", bytes(row), size)
    files = Counting()
    opened = DigestMap.open(files, dir_fd, "map", root, size, SEED)
    assert opened is not None
    files.read = 0
    assert opened.digests(0, size) == row
    assert files.read <= 7 * 3 * PAGE_BYTES
    for first, end in ((1, 2), (254, 256), (255, 256), (blocks - 1, blocks), (blocks - 700, blocks)):
        stretch = row[first * DIGEST_BYTES : end * DIGEST_BYTES]
        assert opened.digests(first * BLOCK_BYTES, min(end * BLOCK_BYTES, size)) == stretch
    opened.close()


# ------------------------------------------------------------------ and nothing else is believed


def test_no_flipped_bit_is_believed(dir_fd: int, tmp_path: Path, seed: int, count) -> None:
    rng = random.Random(seed)
    row = random_row(1)[: -2 * 16] + row_of_zeros()[-2 * 16 :]
    root = publish(dir_fd, "map", row)
    good = (tmp_path / "map").read_bytes()
    # Hash, number, first and last digest of each page, and places at random.
    places = [page * PAGE_BYTES + at for page in range(4) for at in (0, 7, 8, 15, 16, 31, 79)]
    places += [page * PAGE_BYTES - 1 for page in (1, 2, 3, 4)]
    places += [rng.randrange(len(good)) for _ in range(count(200, 5_000))]
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "map").write_bytes(damaged)
        assert read_back(dir_fd, "map", root) is None, f"a flip at {place} was believed"
    (tmp_path / "map").write_bytes(good)
    assert read_back(dir_fd, "map", root) == row


def test_no_torn_or_cut_map_is_believed(dir_fd: int, tmp_path: Path) -> None:
    root = publish(dir_fd, "map", random_row(1))
    good = (tmp_path / "map").read_bytes()
    for cut in range(0, len(good), 512):
        (tmp_path / "map").write_bytes(good[:cut])
        assert read_back(dir_fd, "map", root) is None, f"cut at {cut}"
        torn = good[:cut] + bytes(512) + good[cut + 512 :]
        if torn != good:
            (tmp_path / "map").write_bytes(torn)
            assert read_back(dir_fd, "map", root) is None, f"sector {cut} torn"


def test_pages_that_changed_places_are_not_believed(dir_fd: int, tmp_path: Path) -> None:
    root = publish(dir_fd, "map", random_row(1))
    good = (tmp_path / "map").read_bytes()
    pages = [good[at : at + PAGE_BYTES] for at in range(0, len(good), PAGE_BYTES)]
    (tmp_path / "map").write_bytes(pages[1] + pages[0] + b"".join(pages[2:]))
    assert read_back(dir_fd, "map", root) is None


def test_no_map_of_another_epoch_disk_size_or_installation_is_believed(dir_fd: int, tmp_path: Path) -> None:
    mine, other = publish(dir_fd, "mine", random_row(1)), publish(dir_fd, "other", random_row(2))
    (tmp_path / "mine").rename(tmp_path / "spare")
    assert read_back(dir_fd, "mine", mine) is None
    (tmp_path / "other").rename(tmp_path / "mine")
    (tmp_path / "spare").rename(tmp_path / "other")
    assert read_back(dir_fd, "mine", mine) is None
    assert read_back(dir_fd, "other", other) is None
    assert read_back(dir_fd, "other", mine) == random_row(1)
    assert read_back(dir_fd, "other", mine, size=SIZE - SECTOR_BYTES) is None
    assert read_back(dir_fd, "other", mine, size=SIZE + SECTOR_BYTES) is None
    assert read_back(dir_fd, "other", mine, seed=SEED + 1) is None


def test_who_begins_the_same_map_again_does_not_disturb_the_first(dir_fd: int) -> None:
    """Two processes that send the same disk: neither may publish the other's holes as zeros."""
    first = DigestMapBuilder(Files(), dir_fd, "map", SIZE, SEED)
    first.record(0, random_row(1))
    second = DigestMapBuilder(Files(), dir_fd, "map", SIZE, SEED)
    root = first.finish()
    assert root is not None
    assert read_back(dir_fd, "map", root) is None
    second.record(0, random_row(2))
    root = second.finish()
    assert root is not None
    assert read_back(dir_fd, "map", root) == random_row(2)


@pytest.mark.parametrize("kind", ["pwrite", "fdatasync"])
def test_a_map_that_cannot_be_written_is_none_and_ends_nothing(dir_fd: int, kind: str) -> None:
    class Full(Files):
        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            if kind == "pwrite" and offset >= PAGE_BYTES:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().pwrite(fd, data, offset)

        def fdatasync(self, fd: int) -> None:
            if kind == "fdatasync":
                raise OSError(errno.EIO, "Input/output error")

    builder = DigestMapBuilder(Full(), dir_fd, "map", SIZE, SEED)
    digester = Digester(SEED)
    digester.rows.append((0, random_row(1)))
    builder.take(digester)
    builder.take(digester)
    assert builder.finish() is None
    assert builder.finish() is None


def test_no_descriptor_is_left_open(dir_fd: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    root = publish(dir_fd, "map", random_row(1))
    assert DigestMap.open(Files(), dir_fd, "map", bytes(16), SIZE, SEED) is None
    assert DigestMap.open(Files(), dir_fd, "missing", root, SIZE, SEED) is None

    class Full(Files):
        def truncate(self, fd: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        DigestMapBuilder(Full(), dir_fd, "map", SIZE, SEED)
    assert len(os.listdir("/proc/self/fd")) == before
