"""Buffers lie where O_DIRECT wants them, come back once, and zeros are found where they are."""

import mmap
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replicator.buffers import PAGE_BYTES, ZERO_BLOCK_BYTES, Buffer, BufferPool, Run, zero_runs


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 65_536, 65_537, 1 << 20, (1 << 20) + 72])
@pytest.mark.parametrize("lead", [0, 72, 88, 4095, 4096, 5000])
def test_a_buffer_has_its_size_and_its_lead_ends_on_a_page(size: int, lead: int) -> None:
    pool = BufferPool(0)
    buffer = pool.take(size, lead)
    assert len(buffer.view) == size
    assert (buffer.address + lead) % PAGE_BYTES == 0
    buffer.view[:] = b"\xa5" * size
    assert bytes(buffer.view) == b"\xa5" * size
    pool.give(buffer)


def test_a_returned_buffer_is_used_again_for_the_next_of_its_size() -> None:
    pool = BufferPool(1 << 20)
    buffer = pool.take(100_000)
    address = buffer.address
    pool.give(buffer)
    again, other = pool.take(100_001), pool.take(100_001)
    assert again.address == address
    assert other.address != address


def test_no_more_is_kept_than_allowed() -> None:
    pool = BufferPool(3 * (1 << 20))
    buffers = [pool.take(1 << 20) for _ in range(8)]
    assert pool.taken == 8
    for buffer in buffers:
        pool.give(buffer)
    assert pool.taken == 0
    kept = sum(len(memory) for memories in pool._free.values() for memory in memories)
    assert kept == 3 * (1 << 20)


def test_the_view_of_a_returned_buffer_is_dead() -> None:
    pool = BufferPool(1 << 20)
    buffer = pool.take(512)
    view = buffer.view
    pool.give(buffer)
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_giving_a_buffer_back_twice_is_refused_so_that_two_takers_never_share_memory() -> None:
    pool = BufferPool(1 << 20)
    buffer = pool.take(512)
    pool.give(buffer)
    with pytest.raises(ValueError, match="before"):
        pool.give(buffer)
    assert pool.taken == 0
    one, other = pool.take(512), pool.take(512)
    assert one.address != other.address


def test_memory_that_a_slice_still_shows_is_not_handed_out_again() -> None:
    pool = BufferPool(1 << 20)
    buffer = pool.take(512)
    buffer.view[:] = b"a" * 512
    late = buffer.view[100:200]
    pool.give(buffer)
    pool.take(512).view[:] = b"b" * 512
    assert late == b"a" * 100


def test_a_buffer_in_use_by_a_call_cannot_be_given_back() -> None:
    pool = BufferPool(1 << 20)
    buffer = pool.take(512)
    in_use = re.finditer(rb".", buffer.view)
    with pytest.raises(BufferError):
        pool.give(buffer)
    assert pool.taken == 1
    del in_use
    pool.give(buffer)
    assert pool.taken == 0


def test_a_taken_buffer_serves_direct_io(tmp_path: Path) -> None:
    path = tmp_path / "direct"
    content = os.urandom(1 << 20)
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = BufferPool(0).take((1 << 20) + 88, lead=88)
    assert os.preadv(fd, [buffer.view[88:]], 0) == 1 << 20
    os.close(fd)
    assert buffer.view[88:] == content


# ------------------------------------------------------------------ zero_runs


def naive_runs(content: bytes, start: int, end: int) -> list[Run]:
    runs: list[Run] = []
    for first in range(start, end, ZERO_BLOCK_BYTES):
        last = min(first + ZERO_BLOCK_BYTES, end)
        zero = not any(content[first:last])
        if runs and runs[-1].zero == zero:
            runs[-1] = Run(runs[-1].start, last, zero)
        else:
            runs.append(Run(first, last, zero))
    return runs


POOL = BufferPool(1 << 20)
SIZE = 5 * ZERO_BLOCK_BYTES + 1000


@given(
    st.sets(st.integers(0, SIZE - 1), max_size=6),
    st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted),
)
@example({0, SIZE - 1}, (0, SIZE))
@example({ZERO_BLOCK_BYTES - 1, 3 * ZERO_BLOCK_BYTES}, (0, SIZE))
@example(set(), (1, SIZE))
@example({5}, (5, 6))
@example({5}, (6, 6))
def test_zero_runs_agree_with_looking_at_every_byte(ones, span) -> None:
    start, end = span
    buffer = POOL.take(SIZE)
    content = bytearray(SIZE)
    for position in ones:
        content[position] = 1
    buffer.view[:] = content
    found = zero_runs(buffer, start, end)
    POOL.give(buffer)
    assert found == naive_runs(bytes(content), start, end)


def test_a_pool_that_lets_go_keeps_nothing_and_goes_on() -> None:
    pool = BufferPool(1 << 20)
    out = pool.take(4096)
    pool.give(pool.take(4096))
    pool.let_go()
    pool.give(pool.take(4096))
    assert pool.made == 3
    pool.give(out)
    assert pool.taken == 0


@pytest.mark.parametrize("span", [(-1, 10), (0, 513), (11, 10)])
def test_a_range_outside_the_buffer_is_refused(span) -> None:
    with pytest.raises(ValueError, match="outside"):
        zero_runs(BufferPool(0).take(512), *span)


def test_zeros_beside_the_range_are_not_looked_at() -> None:
    buffer = Buffer(mmap.mmap(-1, 4 * ZERO_BLOCK_BYTES), 100, 3 * ZERO_BLOCK_BYTES)
    buffer.view[0] = buffer.view[-1] = 1
    end = len(buffer.view) - 1
    assert zero_runs(buffer, 1, end) == [Run(1, end, True)]
