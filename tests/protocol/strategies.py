"""Hypothesis strategies made from the schemas, so that a new field is tested without a new line here."""

from __future__ import annotations

from enum import IntEnum
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from protocol.constants import DISK_MAX_BYTES, EXTENT_MAX_BYTES, RAW_MAX_BYTES, SECTOR_BYTES
from protocol.messages import FRAME_TYPES, Interval, Message
from protocol.payload import Extent
from protocol.wire import Choice, Codec, Fixed, Intervals, Items, Opaque, Text, Unsigned, schema

SECTORS_MAX = DISK_MAX_BYTES // SECTOR_BYTES


def values(codec: Codec) -> st.SearchStrategy[Any]:
    """All values that a field may have; lists stay short."""
    match codec:
        case Unsigned(width):
            return st.integers(0, 2 ** (8 * width) - 1)
        case Choice(kind):
            return st.sampled_from(list(kind)) if issubclass(kind, IntEnum) else st.booleans()
        case Fixed(size):
            return st.binary(min_size=size, max_size=size)
        case Opaque(limit):
            return st.binary(max_size=min(limit, 200))
        case Text(limit):
            return st.text(max_size=64).filter(lambda text: len(text.encode()) <= limit)
        case Items(kind, limit):
            return st.lists(records(kind), max_size=min(limit, 4)).map(tuple)
        case Intervals():
            return intervals()
    raise AssertionError(f"no strategy for {codec}")


def intervals() -> st.SearchStrategy[tuple[Interval, ...]]:
    """Sorted, disjoint, not touching, whole sectors."""
    bounds = st.lists(st.integers(0, SECTORS_MAX), max_size=12, unique=True)
    return bounds.map(
        lambda found: tuple(
            Interval(start * SECTOR_BYTES, end * SECTOR_BYTES)
            for start, end in list(pairwise(sorted(found)))[::2]
        )
    )


def records(kind: type) -> st.SearchStrategy[Any]:
    """Messages or records of one dataclass."""
    return st.builds(kind, **{name: values(codec) for name, codec in schema(kind)})


def messages() -> st.SearchStrategy[Message]:
    """Any control message."""
    return st.one_of([records(kind.message) for kind in FRAME_TYPES.values() if kind.message])


@st.composite
def data(draw: st.DrawFn) -> tuple[int, int, Interval, tuple[Extent, ...], bytes]:
    """disk, epoch, cover, extents and raw bytes of a DATA frame."""
    position = start = draw(st.integers(0, SECTORS_MAX // 2))
    extents, raw_len = [], 0
    for zero in draw(st.lists(st.booleans(), max_size=8)):
        position += draw(st.integers(0, 64))
        most = (
            EXTENT_MAX_BYTES // SECTOR_BYTES if zero else min(64, (RAW_MAX_BYTES - raw_len) // SECTOR_BYTES)
        )
        length = draw(st.integers(1, most))
        extents.append(Extent(position * SECTOR_BYTES, length * SECTOR_BYTES, zero))
        position += length
        raw_len += 0 if zero else length * SECTOR_BYTES
    end = position + draw(st.integers(0 if extents else 1, 64))
    pattern = draw(st.binary(min_size=1, max_size=512))
    raw = (pattern * (raw_len // len(pattern) + 1))[:raw_len]
    cover = Interval(start * SECTOR_BYTES, end * SECTOR_BYTES)
    return draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**64 - 1)), cover, tuple(extents), raw
