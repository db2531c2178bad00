"""Digests of what an image holds: against its plain bytes, with holes and in parts."""

import errno
import os
import random
from pathlib import Path

import pytest

from protocol.constants import MIB, SECTOR_BYTES
from protocol.messages import Interval
from replicator.digest import BLOCK_BYTES, DIGEST_BYTES, FINE_BYTES, digests_of, zero_row
from replicator.files import Files
from replicator.images.reading import Digested, digest_blocks

SEED = 7
TIB = 1 << 40


def put_together(parts: list[Digested], size: int, block: int) -> tuple[list[Interval], bytes]:
    """The intervals that were answered, and their row, holes filled in."""
    covered: list[Interval] = []
    row = b""
    for part in parts:
        at, holes = 0, list(part.holes)
        for start, end in part.intervals:
            if covered and covered[-1].end == start:
                covered[-1] = Interval(covered[-1].start, end)
            else:
                covered.append(Interval(start, end))
            position = start
            while position < end:
                if holes and holes[0].start == position:
                    hole = holes.pop(0)
                    row += zero_row(hole, size, SEED, block)
                    position = hole.end
                else:
                    behind = min(holes[0].start, end) if holes else end
                    count = -(-(behind - position) // block) * DIGEST_BYTES
                    row += part.digests[at : at + count]
                    at, position = at + count, behind
        assert at == len(part.digests)
        assert not holes
    return covered, row


def in_parts(fd: int, files: Files, intervals: list[Interval], block: int, most: int) -> list[Digested]:
    """As a session asks: again and again, until nothing is left."""
    parts, rest = [], intervals
    while rest:
        parts.append(digest_blocks(files, fd, rest, block, SEED, most))
        assert len(parts[-1].digests) <= most * DIGEST_BYTES
        reached = parts[-1].intervals[-1].end
        rest = [Interval(max(start, reached), end) for start, end in rest if end > reached]
    return parts


def sparse_file(path: Path, seed: int, size: int) -> bytes:
    rng = random.Random(seed)
    content = bytearray(size)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(12):
            start = rng.randrange(size // FINE_BYTES) * FINE_BYTES
            data = rng.randbytes(
                min(size - start, rng.choice([512, FINE_BYTES, BLOCK_BYTES, 3 * BLOCK_BYTES]))
            )
            os.pwrite(file.fileno(), data, start)
            content[start : start + len(data)] = data
    return bytes(content)


@pytest.mark.parametrize("block", [BLOCK_BYTES, FINE_BYTES])
@pytest.mark.parametrize("most", [1, 5, 4096])
@pytest.mark.parametrize("holes", [True, False])
def test_all_parts_together_are_the_digests_of_the_plain_bytes(
    tmp_path: Path, seed: int, block: int, most: int, holes: bool
) -> None:
    class NoHoles(Files):
        def seek(self, fd: int, offset: int, whence: int) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

    size = 40 * BLOCK_BYTES + 3 * SECTOR_BYTES
    content = sparse_file(tmp_path / "disk", seed, size)
    wanted = [
        Interval(0, 3 * BLOCK_BYTES),
        Interval(4 * BLOCK_BYTES, 5 * BLOCK_BYTES),
        Interval(9 * BLOCK_BYTES, size),
    ]
    files = Files() if holes else NoHoles()
    fd = os.open(tmp_path / "disk", os.O_RDONLY)
    covered, row = put_together(in_parts(fd, files, wanted, block, most), size, block)
    os.close(fd)
    assert covered == wanted
    assert row == b"".join(digests_of(memoryview(content[a:b]), SEED, block) for a, b in wanted)


def test_a_hole_of_2_tib_is_told_as_one_without_being_read(tmp_path: Path) -> None:
    class Counting(Files):
        read = 0

        def preadv(self, fd, buffers, offset: int) -> int:
            found = super().preadv(fd, buffers, offset)
            self.read += found
            return found

    path, files = tmp_path / "disk", Counting()
    path.touch()
    os.truncate(path, 2 * TIB)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"x", TIB)
    found = digest_blocks(files, fd, [Interval(0, 2 * TIB)], BLOCK_BYTES, SEED, 4096)
    os.close(fd)
    assert found.intervals == (Interval(0, 2 * TIB),)
    assert len(found.holes) == 2
    assert files.read <= 2 * MIB


def test_a_file_that_ends_inside_the_disk_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * BLOCK_BYTES)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="ends inside the disk"):
        digest_blocks(Files(), fd, [Interval(0, 2 * BLOCK_BYTES)], BLOCK_BYTES, SEED, 4096)
    os.close(fd)
