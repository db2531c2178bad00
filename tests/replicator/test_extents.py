"""Coverage and Cutter against a naive model: the set of sectors."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.constants import EXTENT_MAX_BYTES, KIB, MIB, SECTOR_BYTES
from protocol.messages import Interval
from protocol.payload import Extent
from replicator.extents import Coverage, Cutter, Piece, Relation

DISK_SECTORS = 40


def spans(minimum: int = 1):
    """(start, end) in sectors of a small disk."""
    return st.tuples(st.integers(0, DISK_SECTORS), st.integers(0, DISK_SECTORS)).filter(
        lambda span: span[1] - span[0] >= minimum
    )


histories = st.lists(spans(), max_size=20)


def covered_by(history) -> tuple[Coverage, set[int]]:
    coverage, model = Coverage(), set()
    for start, end in history:
        coverage.add(start * SECTOR_BYTES, end * SECTOR_BYTES)
        model |= set(range(start, end))
    return coverage, model


def sectors(intervals) -> list[int]:
    return [
        sector for start, end in intervals for sector in range(start // SECTOR_BYTES, end // SECTOR_BYTES)
    ]


# ------------------------------------------------------------------ coverage


@given(histories)
def test_coverage_is_the_union_in_few_intervals(history) -> None:
    coverage, model = covered_by(history)
    intervals = coverage.intervals()
    assert sectors(intervals) == sorted(model)
    assert all(before.end < after.start for before, after in pairwise(intervals))
    assert coverage.covered_bytes == len(model) * SECTOR_BYTES
    assert Coverage(intervals).intervals() == intervals


@given(histories, spans())
def test_relation_tells_new_covered_and_partial_apart(history, span) -> None:
    coverage, model = covered_by(history)
    start, end = span
    common = len(model & set(range(start, end)))
    expected = {0: Relation.NEW, end - start: Relation.COVERED}.get(common, Relation.PARTIAL)
    assert coverage.relation(start * SECTOR_BYTES, end * SECTOR_BYTES) is expected


@given(histories, spans(0))
def test_gaps_are_what_is_missing_in_order(history, span) -> None:
    coverage, model = covered_by(history)
    start, end = span
    gaps = list(coverage.gaps(start * SECTOR_BYTES, end * SECTOR_BYTES))
    assert sectors(gaps) == sorted(set(range(start, end)) - model)
    assert all(before.end < after.start for before, after in pairwise(gaps))


@given(histories, st.lists(spans(), max_size=12))
def test_gaps_stay_true_when_acknowledgements_come_in_between(history, acknowledged) -> None:
    coverage, model = covered_by(history)
    told: list[int] = []
    arriving = iter(acknowledged)
    for gap in coverage.gaps(0, DISK_SECTORS * SECTOR_BYTES):
        told += sectors([gap])
        span = next(arriving, None)
        if span is not None:
            coverage.add(span[0] * SECTOR_BYTES, span[1] * SECTOR_BYTES)
    assert told == sorted(set(told)), "something was said twice or out of order"
    assert not model & set(told), "something was said that was covered from the start"
    assert set(range(DISK_SECTORS)) - set(told) <= set(sectors(coverage.intervals())), (
        "something was left out"
    )


@given(st.lists(st.tuples(spans(), st.booleans()), max_size=20), spans())
def test_what_is_removed_is_missing_again_and_nothing_else(history, span) -> None:
    coverage = Coverage()
    model: set[int] = set()
    for (start, end), added in [*history, (span, False)]:
        (coverage.add if added else coverage.remove)(start * SECTOR_BYTES, end * SECTOR_BYTES)
        model = model | set(range(start, end)) if added else model - set(range(start, end))
        intervals = coverage.intervals()
        assert sectors(intervals) == sorted(model)
        assert all(before.end < after.start for before, after in pairwise(intervals))
        assert all(start < end for start, end in intervals)
    assert coverage.relation(span[0] * SECTOR_BYTES, span[1] * SECTOR_BYTES) is Relation.NEW


@given(histories, st.integers(1, DISK_SECTORS))
def test_whole_means_every_sector_of_the_disk(history, size) -> None:
    coverage, model = covered_by(history)
    assert coverage.is_whole(size * SECTOR_BYTES) is (set(range(size)) <= model)


@pytest.mark.parametrize("span", [(0, 0), (512, 512), (1024, 512)])
def test_an_empty_interval_is_refused(span) -> None:
    with pytest.raises(ValueError, match="empty"):
        Coverage().add(*span)
    with pytest.raises(ValueError, match="empty"):
        Coverage([(0, 4096)]).remove(*span)


# ------------------------------------------------------------------ cutter

kinds = st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=30)
limits = st.tuples(st.integers(1, 8), st.integers(1, 6))


def touching(start: int, lengths) -> list[Extent]:
    extents, position = [], start * SECTOR_BYTES
    for length, zero in lengths:
        extents.append(Extent(position, length * SECTOR_BYTES, zero))
        position += length * SECTOR_BYTES
    return extents


def cut(cutter: Cutter, extents) -> list[Piece]:
    pieces = [piece for extent in extents for piece in cutter.add(extent)]
    return pieces + list(cutter.finish())


def kind_of_sectors(extents) -> dict[int, bool]:
    return {
        sector: extent.zero for extent in extents for sector in sectors([Interval(extent.offset, extent.end)])
    }


@given(st.integers(0, 5), kinds, limits)
def test_pieces_say_exactly_what_went_in_and_keep_the_limits(start, lengths, limit) -> None:
    raw_max, extents_max = limit[0] * SECTOR_BYTES, limit[1]
    extents = touching(start, lengths)
    pieces = cut(Cutter(raw_max, extents_max, SECTOR_BYTES), extents)
    flat = [extent for piece in pieces for extent in piece.extents]
    assert kind_of_sectors(flat) == kind_of_sectors(extents)
    assert sum(extent.length for extent in flat) == sum(extent.length for extent in extents)
    position = start * SECTOR_BYTES
    for piece in pieces:
        assert piece.cover == (position, piece.extents[-1].end)
        assert 1 <= len(piece.extents) <= extents_max
        assert piece.raw_bytes == sum(extent.length for extent in piece.extents if not extent.zero) <= raw_max
        for extent in piece.extents:
            assert extent.offset == position, "extents of a piece touch"
            position = extent.end


@given(kinds, limits, st.data())
def test_the_way_the_input_is_split_does_not_change_what_is_said(lengths, limit, data) -> None:
    raw_max, extents_max = limit[0] * SECTOR_BYTES, limit[1]
    extents = touching(0, lengths)
    finer = []
    for length, zero in lengths:
        at = data.draw(st.integers(0, length))
        finer += [(part, zero) for part in (at, length - at)]
    said = [cut(Cutter(raw_max, extents_max, SECTOR_BYTES), given) for given in (extents, touching(0, finer))]
    covers = [Coverage(piece.cover for piece in pieces).intervals() for pieces in said]
    assert covers[0] == covers[1]
    kinds_said = [kind_of_sectors([e for piece in pieces for e in piece.extents]) for pieces in said]
    assert kinds_said[0] == kinds_said[1]


def test_full_pieces_are_full() -> None:
    pieces = cut(Cutter(8 * SECTOR_BYTES, 100, SECTOR_BYTES), touching(0, [(20, False)]))
    assert [piece.raw_bytes // SECTOR_BYTES for piece in pieces] == [8, 8, 4]


def test_a_zero_extent_longer_than_the_table_can_say_is_split() -> None:
    pieces = cut(Cutter(), [Extent(0, 2**41, zero=True)])
    assert sum(extent.length for piece in pieces for extent in piece.extents) == 2**41
    assert max(extent.length for piece in pieces for extent in piece.extents) == EXTENT_MAX_BYTES
    assert len(pieces) == 1


def test_after_finish_a_cutter_goes_on_elsewhere_without_covering_what_lies_between() -> None:
    cutter = Cutter()
    first = cut(cutter, [Extent(0, 512)])
    second = cut(cutter, [Extent(4096, 512)])
    assert [piece.cover for piece in first + second] == [(0, 512), (4096, 4608)]


def test_an_extent_that_does_not_touch_is_refused() -> None:
    cutter = Cutter()
    list(cutter.add(Extent(0, 512)))
    with pytest.raises(ValueError, match="does not touch"):
        list(cutter.add(Extent(1024, 512)))


@given(st.integers(0, 5), kinds, limits, st.sampled_from([2, 4, 8]))
def test_pieces_end_at_grains_and_exceed_the_limits_by_less_than_one(start, lengths, limit, grain) -> None:
    raw_max, extents_max = limit[0] * SECTOR_BYTES, limit[1]
    pieces = cut(Cutter(raw_max, extents_max, grain * SECTOR_BYTES), touching(start * grain, lengths))
    for piece in pieces[:-1]:
        assert piece.cover.end % (grain * SECTOR_BYTES) == 0
    for piece in pieces:
        assert piece.raw_bytes < raw_max + grain * SECTOR_BYTES
        assert len(piece.extents) < extents_max + 2 * grain


def test_a_disk_of_data_is_cut_into_frames_of_one_mebibyte() -> None:
    pieces = cut(Cutter(), [Extent(0, 4 * MIB + 512)])
    assert [piece.raw_bytes for piece in pieces] == [MIB] * 4 + [512]


def test_what_is_skipped_is_covered_without_extents() -> None:
    cutter = Cutter()
    assert list(cutter.add(Extent(0, 64 * KIB))) == []
    cutter.skip(64 * KIB, 3 * MIB)
    assert list(cutter.add(Extent(3 * MIB, 64 * KIB, zero=True))) == []
    assert list(cutter.finish()) == [
        Piece(
            Interval(0, 3 * MIB + 64 * KIB),
            (Extent(0, 64 * KIB), Extent(3 * MIB, 64 * KIB, zero=True)),
            64 * KIB,
        )
    ]
    cutter.skip(0, MIB)
    assert list(cutter.finish()) == [Piece(Interval(0, MIB), (), 0)]
    cutter.skip(0, MIB)
    with pytest.raises(ValueError, match="does not touch"):
        cutter.skip(2 * MIB, 3 * MIB)
