"""Digests of blocks: against the plain bytes, however they are told."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from protocol.constants import SECTOR_BYTES
from protocol.messages import Interval
from replicator.digest import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    FINE_BYTES,
    Digester,
    differing,
    digests_of,
    zero_digest,
    zero_row,
)
from replicator.extents import Coverage

SEED = 7

# (what comes, sectors): data, zeros as data, zeros told as zeros
TOLD = st.lists(st.tuples(st.sampled_from(["data", "stored", "zero"]), st.integers(1, 400)), max_size=8)


def plain(content: bytes, block: int = BLOCK_BYTES) -> list[bytes]:
    """The digests of the blocks of some bytes, the long way."""
    return [xxh3_128_digest(content[at : at + block], SEED) for at in range(0, len(content), block)]


def found_by(digester: Digester, size: int) -> dict[int, bytes]:
    """Every block's digest by its offset; none may be told twice."""
    found: dict[int, bytes] = {}
    for start, row in digester.rows:
        for number in range(len(row) // DIGEST_BYTES):
            assert found.setdefault(start + number * BLOCK_BYTES, row[number * 16 :][:16]) is not None
    for start, end in digester.zeros:
        assert start % BLOCK_BYTES == end % BLOCK_BYTES == 0
        for at in range(start, end, BLOCK_BYTES):
            assert at not in found
            found[at] = xxh3_128_digest(bytes(min(BLOCK_BYTES, size - at)), SEED)
    return found


@given(TOLD, st.integers(0, 3), st.integers(0, 2**32))
def test_a_digester_finds_the_digests_of_the_plain_bytes(
    told: list[tuple[str, int]], first_block: int, seed: int
) -> None:
    digester, content, rng = Digester(SEED), bytearray(), random.Random(seed)
    first = first_block * BLOCK_BYTES
    digester.at(first)
    for kind, sectors in told:
        digester.at(first + len(content))
        length = sectors * SECTOR_BYTES
        if kind == "zero":
            digester.zero(length)
            content += bytes(length)
        else:
            data = rng.randbytes(length) if kind == "data" else bytes(length)
            digester.data(memoryview(data))
            content += data
    digester.finish()
    expected = {first + number * BLOCK_BYTES: row for number, row in enumerate(plain(bytes(content)))}
    assert found_by(digester, first + len(content)) == expected


def test_a_digester_can_go_on_elsewhere() -> None:
    content = random.Random(1).randbytes(BLOCK_BYTES + SECTOR_BYTES)
    digester = Digester(SEED)
    digester.at(10 * BLOCK_BYTES)
    digester.data(memoryview(content))
    digester.at(2 * BLOCK_BYTES)
    digester.data(memoryview(content))
    digester.finish()
    digester.finish()
    rows = plain(content)
    expected = dict(zip([10 * BLOCK_BYTES, 11 * BLOCK_BYTES], rows, strict=True))
    expected |= dict(zip([2 * BLOCK_BYTES, 3 * BLOCK_BYTES], rows, strict=True))
    assert found_by(digester, 12 * BLOCK_BYTES) == expected


@pytest.mark.parametrize("block", [BLOCK_BYTES, FINE_BYTES])
@pytest.mark.parametrize("size", [SECTOR_BYTES, FINE_BYTES, BLOCK_BYTES, 3 * BLOCK_BYTES + 5 * SECTOR_BYTES])
def test_rows_are_the_digests_of_the_blocks_the_last_one_short(block: int, size: int) -> None:
    content = random.Random(size).randbytes(size)
    assert digests_of(memoryview(content), SEED, block) == b"".join(plain(content, block))
    assert zero_row(Interval(0, size), size, SEED, block) == b"".join(plain(bytes(size), block))


def test_only_the_disks_own_end_makes_a_short_block() -> None:
    size = 2 * BLOCK_BYTES + SECTOR_BYTES
    assert zero_row(Interval(0, BLOCK_BYTES), size, SEED) == zero_digest(SEED)
    assert zero_row(Interval(2 * BLOCK_BYTES, size), size, SEED) == zero_digest(SEED, SECTOR_BYTES)


@given(
    st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 5), st.integers(1, BLOCK_BYTES // 512)
)
def test_what_differs_is_exactly_the_blocks_whose_digests_do(
    differs: list[bool], first_block: int, last_sectors: int
) -> None:
    start = first_block * BLOCK_BYTES
    end = start + (len(differs) - 1) * BLOCK_BYTES + last_sectors * SECTOR_BYTES
    ours = b"".join(bytes([number]) * DIGEST_BYTES for number in range(len(differs)))
    theirs = b"".join(
        bytes([number, 0xFF] if differ else [number, number]) * 8 for number, differ in enumerate(differs)
    )
    found = list(differing(ours, theirs, start, end))
    blocks = [
        any(first <= start + number * BLOCK_BYTES < behind for first, behind in found)
        for number in range(len(differs))
    ]
    assert blocks == differs
    assert all(first.end < then.start for first, then in itertools.pairwise(found))
    assert all(b % BLOCK_BYTES == 0 or b == end for interval in found for b in interval)


@given(st.lists(st.tuples(st.integers(0, 1999), st.integers(1, 600)), max_size=4))
def test_in_long_rows_just_what_differs_is_found(stretches: list[tuple[int, int]]) -> None:
    expected = Coverage((first, min(first + count, 2000)) for first, count in stretches)
    theirs = bytearray(2000 * DIGEST_BYTES)
    for first, end in expected.intervals():
        theirs[first * DIGEST_BYTES : end * DIGEST_BYTES] = b"\1" * (end - first) * DIGEST_BYTES
    found = differing(bytes(len(theirs)), bytes(theirs), 0, 2000 * BLOCK_BYTES)
    blocks = [(first // BLOCK_BYTES, end // BLOCK_BYTES) for first, end in found]
    assert blocks == [tuple(interval) for interval in expected.intervals()]


@pytest.mark.parametrize("lengths", [(1, 2), (2, 1), (1, 1), (3, 3)])
def test_rows_that_do_not_fit_are_refused(lengths: tuple[int, int]) -> None:
    ours, theirs = (bytes(count * DIGEST_BYTES) for count in lengths)
    with pytest.raises(ValueError, match="fit"):
        list(differing(ours, theirs, 0, 2 * BLOCK_BYTES))
