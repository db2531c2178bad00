"""Control messages: each survives its encoding, is refused when cut or extended, and fits its limit."""

import pytest
from hypothesis import given

from protocol.constants import CONTROL_MAX_BYTES, RAW_MAX_BYTES, TABLE_MAX_BYTES
from protocol.header import FrameType
from protocol.messages import FRAME_TYPES, TYPE_OF, Message
from protocol.wire import (
    Choice,
    Codec,
    Fixed,
    Intervals,
    Items,
    Malformed,
    Opaque,
    Text,
    Unsigned,
    decode,
    encode,
    schema,
)
from tests.protocol.conversations import SAMPLES
from tests.protocol.strategies import messages


@given(message=messages())
def test_every_message_survives_its_encoding(message: Message) -> None:
    body = encode(message)
    assert decode(type(message), body) == message
    assert encode(decode(type(message), memoryview(body))) == body


@pytest.mark.parametrize("message", SAMPLES.values(), ids=lambda message: type(message).__name__)
def test_a_message_that_is_cut_or_extended_is_refused(message: Message) -> None:
    body = encode(message)
    for wrong in (*(body[:length] for length in range(len(body))), body + b"\0"):
        with pytest.raises(Malformed):
            decode(type(message), wrong)


def test_every_frame_type_has_a_row_and_every_message_a_type() -> None:
    assert set(FRAME_TYPES) == set(FrameType)
    assert set(TYPE_OF.values()) == set(FrameType) - {FrameType.DATA}
    assert set(SAMPLES) == set(TYPE_OF.values())
    assert all(FRAME_TYPES[kind].message is message for message, kind in TYPE_OF.items())


def largest(codec: Codec) -> int:
    """The most bytes that a field can take."""
    match codec:
        case Unsigned(width):
            return width
        case Choice():
            return 1
        case Fixed(size):
            return size
        case Opaque(limit):
            return 4 + limit
        case Text(limit):
            return 2 + limit
        case Intervals(limit):
            return 4 + 16 * limit
        case Items(kind, limit):
            return 4 + limit * sum(largest(inner) for _, inner in schema(kind))
    raise AssertionError(codec)


COVERAGE_LISTS = {
    FrameType.OPENED,
    FrameType.ACK,
    FrameType.SEAL,
}  # bounded by the frame; the sender splits or rounds


@pytest.mark.parametrize("kind", sorted(set(TYPE_OF.values()) - COVERAGE_LISTS))
def test_the_largest_message_fits_the_limit_of_its_frame(kind: FrameType) -> None:
    message, body_max = FRAME_TYPES[kind]
    assert message is not None
    layout: type = message
    assert sum(largest(codec) for _, codec in schema(layout)) <= body_max


def test_the_largest_coverage_of_one_disk_fits_a_control_message() -> None:
    for kind in COVERAGE_LISTS:
        message = FRAME_TYPES[kind].message
        assert message is not None
        layout: type = message
        disks = dict(schema(layout))["disks"]
        assert isinstance(disks, Items)
        one_disk = sum(largest(codec) for _, codec in schema(disks.kind))
        rest = sum(largest(codec) for name, codec in schema(layout) if name != "disks")
        assert rest + 4 + one_disk <= CONTROL_MAX_BYTES


def test_a_data_body_is_a_table_and_a_payload() -> None:
    assert FRAME_TYPES[FrameType.DATA].body_max == TABLE_MAX_BYTES + RAW_MAX_BYTES
