"""Windows cover exactly what is missing, and what is said of them makes the target equal to the source."""

import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.constants import MIB, SECTOR_BYTES
from protocol.messages import DIGEST_INTERVALS_MAX, Interval
from protocol.payload import Extent, new_decompressor, unpack
from replicator import differ
from replicator.buffers import BufferPool
from replicator.differ import (
    Difference,
    Held,
    Window,
    compared,
    everything,
    listed,
    listed_windows,
    windows,
)
from replicator.digest import BLOCK_BYTES, DIGEST_BYTES, FINE_BYTES, digests_of
from replicator.extents import Coverage
from replicator.packing import pack

T = TypeVar("T")
SEED = 7
GIB = 1024 * MIB


@dataclass
class ModelSource:
    """A source with just these extents, over content that may be left out (`None`: nothing is read)."""

    found: Sequence[Extent]
    content: bytes | None = None
    name: str = "model"
    size_bytes: int = 0

    def __post_init__(self) -> None:
        self.size_bytes = self.found[-1].end

    async def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        for extent in self.found:
            if extent.end > start:
                first = max(extent.offset, start)
                yield Extent(first, extent.end - first, extent.zero)

    async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
        assert self.content is not None
        view[:] = b"".join(self.content[extent.offset : extent.end] for extent in extents)
        return then()

    async def fingerprint(self) -> str:
        return "same"

    async def changed(self) -> bool:
        return False

    async def close(self) -> None:
        pass


def touching(lengths: Sequence[tuple[int, bool]]) -> list[Extent]:
    found, position = [], 0
    for sectors, zero in lengths:
        found.append(Extent(position, sectors * SECTOR_BYTES, zero))
        position = found[-1].end
    return found


def block_coverage(blocks: Sequence[tuple[int, int]], size: int) -> Coverage:
    done = Coverage()
    for first, count in blocks:
        start, end = first * BLOCK_BYTES, min((first + count) * BLOCK_BYTES, size)
        if start < end:
            done.add(start, end)
    return done


async def all_windows(source: ModelSource, done: Coverage) -> list[Window]:
    return [window async for window in windows(source, done)]


def check_windows(source: ModelSource, done: Coverage, found: list[Window]) -> None:
    covered = Coverage()
    for window in found:
        position = window.cover.start
        assert position % BLOCK_BYTES == 0
        assert window.cover.end % BLOCK_BYTES == 0 or window.cover.end == source.size_bytes
        for extent in window.extents:
            assert extent.offset == position
            assert extent.length > 0
            position = extent.end
        assert position == window.cover.end
        assert not any(covered.relation(*window.cover).value == known for known in ("covered", "partial"))
        covered.add(*window.cover)
        data = sum(extent.length for extent in window.extents if not extent.zero)
        assert data <= differ.WINDOW_DATA_BYTES + BLOCK_BYTES
        assert position - window.cover.start <= differ.WINDOW_SPAN_BYTES + BLOCK_BYTES
    assert covered.intervals() == tuple(done.gaps(0, source.size_bytes))
    kinds = {extent.end: extent.zero for window in found for extent in window.extents}
    truth = Coverage([(extent.offset, extent.end) for extent in source.found if extent.zero])
    for end, zero in kinds.items():
        assert (truth.relation(end - SECTOR_BYTES, end).value == "covered") is zero


@given(
    st.lists(st.tuples(st.sampled_from([1, 7, 128, 129, 5_000, 70_000]), st.booleans()), min_size=1),
    st.lists(st.tuples(st.integers(0, 2_000), st.integers(1, 300)), max_size=6),
)
async def test_windows_cover_exactly_the_gaps(
    lengths: list[tuple[int, bool]], blocks: list[tuple[int, int]]
) -> None:
    source = ModelSource(touching(lengths))
    done = block_coverage(blocks, source.size_bytes)
    check_windows(source, done, await all_windows(source, done))


@pytest.mark.parametrize(
    ("shift", "data", "hole"), [(1, 128, 128), (8, 128, 128), (127, 128, 128), (0, 3, 4)]
)
async def test_extents_that_seldom_end_with_a_block_still_make_bounded_windows(
    shift: int, data: int, hole: int
) -> None:
    pairs = 400_000 // (data + hole)
    lengths = [(shift, False)] * bool(shift) + [(data, False), (hole, True)] * pairs
    source = ModelSource(touching(lengths))
    found = await all_windows(source, Coverage())
    check_windows(source, Coverage(), found)
    assert len(found) > 3


async def test_a_hole_of_2_tib_is_some_hundred_windows() -> None:
    source = ModelSource([Extent(0, 2048 * GIB + SECTOR_BYTES, True)])
    found = await all_windows(source, Coverage())
    assert len(found) == 513
    assert sum(end - start for start, end in (window.cover for window in found)) == source.size_bytes
    assert all(not piece.raw_bytes for window in found for piece in everything(window).pieces)


# ------------------------------------------------------------------ compared


@dataclass
class Model:
    """What a target holds, and what it was asked."""

    content: bytearray
    asked: list[tuple[tuple[Interval, ...], int]] = field(default_factory=list)
    said: Coverage = field(default_factory=Coverage)

    async def theirs(self, cover: Interval) -> bytes:
        return digests_of(memoryview(self.content[cover.start : cover.end]), SEED)

    async def ask(self, intervals: Sequence[Interval], block: int) -> bytes:
        assert 0 < len(intervals) <= DIGEST_INTERVALS_MAX
        assert all(first.end < then.start for first, then in itertools.pairwise(intervals))
        self.asked.append((tuple(intervals), block))
        return b"".join(
            digests_of(memoryview(self.content[start:end]), SEED, block) for start, end in intervals
        )

    def apply(self, source: ModelSource, difference: Difference, window: Window, pool: BufferPool) -> None:
        covers = Coverage()
        assert source.content is not None
        for piece in difference.pieces:
            assert covers.relation(*piece.cover).value == "new"
            covers.add(*piece.cover)
            buffer = pool.take(piece.raw_bytes)
            wanted = [extent for extent in piece.extents if not extent.zero]
            buffer.view[:] = b"".join(source.content[extent.offset : extent.end] for extent in wanted)
            frame = pack(1, 1, piece, buffer, None, SEED, difference.fine).frame
            body = memoryview(frame.table + bytes(frame.payload))
            extents, raw = unpack(frame.header, body, None, new_decompressor(), SEED)
            position = 0
            for offset, length, zero in extents:
                self.said.add(offset, offset + length)
                self.content[offset : offset + length] = (
                    bytes(length) if zero else raw[position : position + length]
                )
                position += 0 if zero else length
        assert covers.intervals() == (window.cover,)


def changed_disk(seed: int, sectors: int, share: float, hole_share: float) -> tuple[ModelSource, bytes]:
    """A source of `sectors`, and the old content of its target, which differs in a share of 4 KiB blocks."""
    rng = random.Random(seed)
    size = sectors * SECTOR_BYTES
    old = bytearray(rng.randbytes(size))
    new, extents = bytearray(old), []
    for start in range(0, size, FINE_BYTES):
        end = min(start + FINE_BYTES, size)
        hole = rng.random() < hole_share
        if hole:
            new[start:end] = bytes(end - start)
            if rng.random() < 0.5:
                old[start:end] = bytes(end - start)
        elif rng.random() < share:
            new[start + rng.randrange(end - start)] ^= 1
        extents.append(Extent(start, end - start, hole))
    return ModelSource(extents, bytes(new)), bytes(old)


@pytest.mark.parametrize("share", [0.0, 0.005, 0.2, 1.0])
@pytest.mark.parametrize("hole_share", [0.0, 0.3])
@pytest.mark.parametrize("sectors", [1, 8 * 1024 + 3, 40_000])
async def test_target_and_what_is_said_make_the_source(
    seed: int, share: float, hole_share: float, sectors: int
) -> None:
    source, old = changed_disk(seed, sectors, share, hole_share)
    new = source.content
    assert new is not None
    model, pool = Model(bytearray(old)), BufferPool(1 << 24)
    rows, matched = bytearray(-(-len(new) // BLOCK_BYTES) * DIGEST_BYTES), 0
    for window in await all_windows(source, Coverage()):
        difference = await compared(window, source, model.theirs, model.ask, pool, SEED)
        for start, digests in difference.equal.rows:
            at = start // BLOCK_BYTES * DIGEST_BYTES
            rows[at : at + len(digests)] = digests
        matched += difference.matched_bytes
        model.apply(source, difference, window, pool)
    assert model.content == new
    truth = digests_of(memoryview(new), SEED)
    for at in range(0, len(new), BLOCK_BYTES):
        end = min(at + BLOCK_BYTES, len(new))
        row = slice(at // BLOCK_BYTES * 16, at // BLOCK_BYTES * 16 + 16)
        if old[at:end] == new[at:end]:
            assert model.said.relation(at, end).value == "new", f"the equal block at {at} was said"
            assert rows[row] == truth[row]
            matched -= end - at
        else:
            assert not any(rows[row]), f"the differing block at {at} was called equal"
    assert matched == 0


async def test_few_differences_are_looked_at_twice_and_only_where_there_is_data() -> None:
    """A disk that was wiped at the source is said as zeros; the target need not read it in 4 KiB."""
    size = 64 * BLOCK_BYTES
    old = bytearray(random.Random(1).randbytes(size))
    new = bytearray(old)
    new[9 * BLOCK_BYTES] ^= 1
    new[20 * BLOCK_BYTES : 30 * BLOCK_BYTES] = bytes(10 * BLOCK_BYTES)
    hole = Extent(20 * BLOCK_BYTES, 10 * BLOCK_BYTES, True)
    source = ModelSource([Extent(0, hole.offset), hole, Extent(hole.end, size - hole.end)], bytes(new))
    model, pool = Model(old), BufferPool(1 << 24)
    (window,) = await all_windows(source, Coverage())
    difference = await compared(window, source, model.theirs, model.ask, pool, SEED)
    assert model.asked == [((Interval(9 * BLOCK_BYTES, 10 * BLOCK_BYTES),), FINE_BYTES)]
    model.apply(source, difference, window, pool)
    assert model.content == new


@pytest.mark.parametrize("asks", [True, False])
async def test_small_writes_into_holes_travel_without_the_zeros_around_them(asks: bool) -> None:
    """What the target holds there is known from its digests of whole blocks: nobody has to ask."""
    size = 64 * BLOCK_BYTES
    new = bytearray(size)
    written = [Extent(block * BLOCK_BYTES + 3 * FINE_BYTES, FINE_BYTES) for block in (0, 9, 10, 40, 63)]
    extents, position = list[Extent](), 0
    for extent in written:
        new[extent.offset : extent.end] = random.Random(1).randbytes(FINE_BYTES)
        extents += [Extent(position, extent.offset - position, zero=True), extent]
        position = extent.end
    source = ModelSource([*extents, Extent(position, size - position, zero=True)], bytes(new))
    model, pool = Model(bytearray(size)), BufferPool(1 << 24)
    if asks:
        (window,) = await all_windows(source, Coverage())
        difference = await compared(window, source, model.theirs, model.ask, pool, SEED)
    else:
        blocks = [
            Interval(extent.offset - 3 * FINE_BYTES, extent.offset + 13 * FINE_BYTES) for extent in written
        ]
        (window,) = [window async for window in listed_windows(source, Coverage(), blocks)]
        held = Held(digests_of(memoryview(bytes(size)), SEED), size, SEED)
        difference = await listed(window, held, None)
    model.apply(source, difference, window, pool)
    assert model.content == new
    assert model.said.covered_bytes == 5 * FINE_BYTES
    assert not model.asked


@pytest.mark.parametrize(("equal", "looks"), [(0, 0), (1, 1), (8, 1), (60, 1)])
async def test_a_closer_look_is_taken_unless_all_that_holds_data_differs(equal: int, looks: int) -> None:
    """Small writes all over a disk change most blocks and few bytes."""
    size = 64 * BLOCK_BYTES
    old = bytearray(random.Random(1).randbytes(size))
    new = bytearray(old)
    for block in range(equal, 64):
        new[block * BLOCK_BYTES] ^= 1
    source = ModelSource([Extent(0, size)], bytes(new))
    model, pool = Model(old), BufferPool(1 << 24)
    (window,) = await all_windows(source, Coverage())
    difference = await compared(window, source, model.theirs, model.ask, pool, SEED)
    assert len(model.asked) == looks
    model.apply(source, difference, window, pool)
    assert model.content == new


async def test_several_differences_in_one_long_extent_are_all_said() -> None:
    old = bytearray(random.Random(1).randbytes(64 * BLOCK_BYTES + SECTOR_BYTES))
    new = bytearray(old)
    for block in (0, 9, 10, 40, 64):
        new[block * BLOCK_BYTES + 7] ^= 1
    source = ModelSource([Extent(0, len(new))], bytes(new))
    model, pool = Model(old), BufferPool(1 << 24)
    for window in await all_windows(source, Coverage()):
        difference = await compared(window, source, model.theirs, model.ask, pool, SEED)
        model.apply(source, difference, window, pool)
    assert model.content == new
    assert model.said.covered_bytes == 4 * FINE_BYTES + SECTOR_BYTES


async def test_memory_comes_back_when_the_source_fails() -> None:
    class Failing(ModelSource):
        async def read_into(self, extents: Sequence[Extent], view: memoryview, then: Callable[[], T]) -> T:
            raise OSError

    source, pool = Failing([Extent(0, MIB)]), BufferPool(1 << 24)
    model = Model(bytearray(MIB))
    with pytest.raises(OSError):
        await compared(
            Window(Interval(0, MIB), (Extent(0, MIB),)),
            source,
            model.theirs,
            model.ask,
            pool,
            SEED,
        )
    assert pool.taken == 0


# ------------------------------------------------------------------ what somebody else has listed


class Counted(ModelSource):
    """Counts how often it is asked where its holes are."""

    looked = 0

    async def extents(self, start: int = 0) -> AsyncIterator[Extent]:
        self.looked += 1
        async for extent in super().extents(start):
            yield extent


def check_listed_windows(source: ModelSource, done: Coverage, changed: Coverage, found: list[Window]) -> None:
    covered, looked_at = Coverage(), Coverage()
    for window in found:
        position = window.cover.start
        assert position % BLOCK_BYTES == 0
        assert window.cover.end % BLOCK_BYTES == 0 or window.cover.end == source.size_bytes
        for extent in window.extents:
            assert extent.offset >= position and extent.length > 0
            position = extent.end
            looked_at.add(extent.offset, extent.end)
        assert position <= window.cover.end
        assert covered.relation(*window.cover).value == "new"
        covered.add(*window.cover)
        data = sum(extent.length for extent in window.extents if not extent.zero)
        assert data <= differ.WINDOW_DATA_BYTES + BLOCK_BYTES
        assert window.cover.end - window.cover.start <= differ.WINDOW_SPAN_BYTES
    assert covered.intervals() == tuple(done.gaps(0, source.size_bytes))
    wanted = Coverage(changed.intervals())
    for start, end in done.intervals():
        wanted.remove(start, end)
    assert looked_at.intervals() == wanted.intervals()


blocks = st.lists(st.tuples(st.integers(0, 2_000), st.integers(1, 300)), max_size=6)


@given(
    st.lists(st.tuples(st.sampled_from([1, 7, 128, 129, 5_000, 70_000]), st.booleans()), min_size=1),
    blocks,
    blocks,
)
async def test_listed_windows_cover_the_gaps_and_hold_what_is_listed(
    lengths: list[tuple[int, bool]], held: list[tuple[int, int]], changed: list[tuple[int, int]]
) -> None:
    source = ModelSource(touching(lengths))
    done = block_coverage(held, source.size_bytes)
    proposed = block_coverage(changed, source.size_bytes)
    found = [window async for window in listed_windows(source, done, proposed.intervals())]
    check_listed_windows(source, done, proposed, found)


async def test_a_vast_disk_costs_what_is_listed_and_a_window_every_4_gib() -> None:
    size = 16 * 1024 * GIB + SECTOR_BYTES
    source = Counted([Extent(0, size)])
    changed = [Interval(start, start + BLOCK_BYTES) for start in range(5 * GIB, 6 * GIB, 16 * MIB)]
    changed += [Interval(9000 * GIB, 9000 * GIB + 40 * MIB), Interval(size - SECTOR_BYTES, size)]
    found = [window async for window in listed_windows(source, Coverage(), changed)]
    check_listed_windows(source, Coverage(), Coverage(changed), found)
    assert len(found) <= 4096 + 1 + 3
    assert source.looked == 1


async def test_a_long_listed_hole_is_not_read() -> None:
    source = Counted([Extent(0, MIB), Extent(MIB, 900 * GIB, True), Extent(900 * GIB + MIB, MIB)])
    changed = [Interval(0, source.size_bytes)]
    found = [window async for window in listed_windows(source, Coverage(), changed)]
    check_listed_windows(source, Coverage(), Coverage(changed), found)
    assert sum(extent.length for window in found for extent in window.extents if not extent.zero) == 2 * MIB
    assert source.looked == 1 and len(found) <= 227


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("share", [0.002, 0.2, 1.0])
async def test_target_and_what_was_listed_make_the_source(seed: int, share: float, asks: bool) -> None:
    """The list has all that has changed, and more: what was written again with the same bytes."""
    source, old = changed_disk(seed, 40_000, share, 0.0)
    new, rng = source.content, random.Random(seed + 1)
    assert new is not None
    proposed = Coverage()
    for start in range(0, len(new), FINE_BYTES):
        if old[start : start + FINE_BYTES] != new[start : start + FINE_BYTES] or rng.random() < 0.01:
            block = start - start % BLOCK_BYTES
            proposed.add(block, min(block + BLOCK_BYTES, len(new)))
    model, pool = Model(bytearray(old)), BufferPool(1 << 24)
    before = digests_of(memoryview(old), SEED)
    rows = bytearray(before)
    async for window in listed_windows(source, Coverage(), proposed.intervals()):
        first = window.cover.start // BLOCK_BYTES * DIGEST_BYTES
        behind = -(-window.cover.end // BLOCK_BYTES) * DIGEST_BYTES
        held = Held(before[first:behind], len(old), SEED)
        difference = await listed(window, held, model.ask if asks else None)
        for start, digests in difference.equal.rows:
            at = start // BLOCK_BYTES * DIGEST_BYTES
            assert rows[at : at + len(digests)] == digests
            rows[at : at + len(digests)] = bytes(len(digests))
        model.apply(source, difference, window, pool)
    assert model.content == new
    for block in range(len(rows) // DIGEST_BYTES):  # the digests of all other blocks were kept
        position = block * BLOCK_BYTES
        is_listed = proposed.relation(position, min(position + BLOCK_BYTES, len(new))).value == "covered"
        assert any(rows[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]) is is_listed
    assert bool(model.asked) is (asks and share < 0.2)
    if model.asked:
        different = sum(
            old[start : start + FINE_BYTES] != new[start : start + FINE_BYTES]
            for start in range(0, len(new), FINE_BYTES)
        )
        assert model.said.covered_bytes == different * FINE_BYTES


async def test_a_list_without_digests_of_before_knows_none_of_the_rest() -> None:
    source = ModelSource([Extent(0, 4 * MIB)], bytes(4 * MIB))
    (window,) = [window async for window in listed_windows(source, Coverage(), [Interval(0, BLOCK_BYTES)])]
    difference = await listed(window, None, None)
    assert not difference.equal.rows and not difference.equal.zeros
    assert difference.matched_bytes == 4 * MIB - BLOCK_BYTES
