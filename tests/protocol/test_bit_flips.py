"""Single flipped bits, anywhere in a frame: each one is detected."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from protocol.connection import Data
from protocol.errors import RemoteProtocolError
from protocol.header import FrameType
from protocol.messages import Interval
from protocol.payload import Extent, build, new_compressor, new_decompressor, unpack
from protocol.state import TABLES, Direction, Role, State
from tests.protocol.conversations import RAW, SEED, at, data_frame, frame_of, joined, refusal, rehashed

DATA_FRAMES = [
    data_frame(SEED),
    data_frame(SEED, level=3),
    build(1, 7, Interval(0, 1 << 20), (Extent(0, 4096),), memoryview(RAW), new_compressor(19), SEED),
]
CONTROL = sorted(set(FrameType) - {FrameType.DATA})


def home_of(kind: FrameType) -> tuple[Role, State]:
    """Somewhere this frame may be received."""
    return next(
        (role, state)
        for role, table in TABLES.items()
        for state, steps in table.items()
        if (Direction.RECEIVE, kind) in steps
    )


def part(frame: bytes, name: str) -> range:
    """The bits of a part of a frame."""
    table_end = 72 + int.from_bytes(frame[12:16], "little")
    bounds = {
        "header": (0, 72),
        "table": (72, table_end),
        "payload": (table_end, len(frame)),
        "control body": (72, len(frame)),
    }[name]
    return range(bounds[0] * 8, bounds[1] * 8)


@pytest.mark.parametrize("name", ["header", "table", "payload", "control body"])
def test_every_flipped_bit_on_the_way_is_detected(
    name: str, seed: int, count: Callable[[int, int], int]
) -> None:
    dice = random.Random(seed)
    total, detected = count(2_000, 100_000), 0
    for _ in range(total):
        if name == "control body" or (name == "header" and dice.random() < 0.5):
            kind = dice.choice(CONTROL)
            role, state = home_of(kind)
            frame = frame_of(kind, SEED if state not in (State.START, State.GREETED) else 0)
            if not part(frame, name):
                frame, role, state = frame_of(FrameType.ACK, SEED), Role.SENDER, State.OPEN
        else:
            frame, role, state = joined(dice.choice(DATA_FRAMES)), Role.RECEIVER, State.ATTACHED
        connection = at(role, state)
        if role in (Role.JOINER, Role.AUTHORITY):
            frame = frame_of(FrameType(frame[6]), 0)
        damaged = bytearray(frame)
        bit = dice.choice(part(frame, name))
        damaged[bit // 8] ^= 1 << bit % 8
        error = refusal(lambda: connection.receive_data(damaged, 0.0))  # noqa: B023
        detected += isinstance(error, RemoteProtocolError) and connection.events_received() == []
    assert detected == total


@pytest.mark.parametrize("name", ["table", "payload"])
def test_every_flipped_bit_before_the_body_was_hashed_is_detected_end_to_end(
    name: str, seed: int, count: Callable[[int, int], int]
) -> None:
    """Memory that rots between reading a block and hashing its frame: only the content hash sees it."""
    dice = random.Random(seed)
    decompressor = new_decompressor()
    total, detected, harmless = count(2_000, 100_000), 0, 0
    for _ in range(total):
        frame = dice.choice(DATA_FRAMES)
        damaged = bytearray(joined(frame))
        bit = dice.choice(part(bytes(damaged), name))
        damaged[bit // 8] ^= 1 << bit % 8
        connection = at(Role.RECEIVER, State.ATTACHED)
        connection.receive_data(rehashed(bytes(damaged), SEED), 0.0)
        (event,) = connection.events_received()
        assert isinstance(event, Data)
        into = memoryview(bytearray(event.header.raw_len)) if event.header.flags else None
        try:
            extents, raw = unpack(event.header, event.body.view, into, decompressor, SEED)
        except RemoteProtocolError:
            detected += 1
        else:  # a bit of the zstd frame that means nothing: what comes out is what was read
            assert frame.header.flags
            assert raw == RAW
            assert len(extents) == frame.header.table_len // 16
            harmless += 1
    assert detected + harmless == total
    assert name == "payload" or harmless == 0


@pytest.mark.parametrize("field", ["disk", "raw_hash"])
def test_a_frame_whose_header_was_rebuilt_for_another_place_is_detected(field: str) -> None:
    frame = DATA_FRAMES[0]
    header = replace(frame.header, **{field: getattr(frame.header, field) + 1})
    body = memoryview(frame.table + bytes(frame.payload))
    with pytest.raises(RemoteProtocolError, match="content does not match"):
        unpack(header, body, None, new_decompressor(), SEED)
