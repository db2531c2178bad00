"""The driver over time: silence, PING, slow frames, and the end of a stream."""

import pytest

from protocol.connection import Connection, End
from protocol.constants import (
    DEAD_AFTER_S,
    FIRST_FRAME_S,
    FRAME_GRACE_S,
    FRAME_MIN_BYTES_S,
    PING_AFTER_S,
)
from protocol.errors import PeerSilent, RemoteProtocolError, WireCode
from protocol.header import FrameType
from protocol.messages import (
    Fail,
    Interval,
    Ping,
    Pong,
    Retry,
)
from protocol.payload import Extent, build
from protocol.state import ACCEPTED, DEADLINE_S, TABLES, Role, State
from protocol.wire import encode
from tests.protocol.conversations import (
    SAMPLES,
    SEED,
    at,
    frame_of,
    framed,
    frames,
    joined,
    messages_in,
)

# ------------------------------------------------------------------ the end


@pytest.mark.parametrize("role", Role)
def test_the_end_of_a_stream_says_where_it_found_us(role: Role) -> None:
    for state in set(TABLES[role]) - {State.CLOSED}:
        connection = at(role, state)
        connection.receive_eof()
        assert connection.events_received() == [End(state, partial=False)]
        assert connection.state is State.CLOSED
        connection = at(role, state)
        connection.receive_data(frame_of(FrameType.FAIL, 0)[:10], 0.0)
        connection.receive_eof()
        assert connection.events_received() == [End(state, partial=True)]


def test_a_whole_frame_before_the_end_still_counts() -> None:
    connection = at(Role.SENDER, State.OPEN)
    connection.receive_data(frame_of(FrameType.ACK, SEED), 0.0)
    connection.receive_eof()
    assert connection.events_received() == [SAMPLES[FrameType.ACK], End(State.OPEN, partial=False)]


# ------------------------------------------------------------------ time


def test_a_tick_says_when_silence_has_its_next_consequence() -> None:
    connection = at(Role.SENDER, State.OPEN)
    assert connection.tick(1.0) == PING_AFTER_S - 1.0
    assert connection.tick(PING_AFTER_S) == DEAD_AFTER_S - PING_AFTER_S
    assert connection.tick(14.5) == 0.5
    waiting = at(Role.RECEIVER, State.START)
    assert waiting.tick(1.0) == DEADLINE_S[State.START] - 1.0


@pytest.mark.parametrize(
    ("role", "state"), [(role, state) for role in Role for state in TABLES[role] if state in ACCEPTED]
)
def test_silence_is_answered_with_one_ping_and_then_given_up(role: Role, state: State) -> None:
    connection = at(role, state)
    connection.tick(PING_AFTER_S - 0.01)
    assert connection.data_to_send() == []
    connection.tick(PING_AFTER_S)
    assert frames(connection.data_to_send()) == [FrameType.PING]
    for second in range(6, 15):
        connection.tick(float(second))
    assert connection.data_to_send() == []
    assert connection.state is state
    with pytest.raises(PeerSilent, match="any sign of life") as caught:
        connection.tick(DEAD_AFTER_S)
    assert caught.value.silent_s == DEAD_AFTER_S
    assert connection.state is State.CLOSED
    connection.tick(1e9)
    assert connection.data_to_send() == []


def test_any_frame_is_a_sign_of_life() -> None:
    connection = at(Role.SENDER, State.OPEN)
    for round_trip in range(1, 20):
        now = round_trip * 14.0
        connection.tick(now)
        assert frames(connection.data_to_send()) == [FrameType.PING]
        connection.receive_data(frame_of(FrameType.ACK, SEED), now)
        connection.tick(now + PING_AFTER_S - 0.1)
        assert connection.data_to_send() == []


def test_a_single_byte_of_a_frame_is_a_sign_of_life_too() -> None:
    connection = at(Role.SENDER, State.OPEN)
    connection.receive_data(frame_of(FrameType.ACK, SEED)[:1], 14.0)
    connection.tick(18.9)
    assert connection.data_to_send() == []
    assert connection.state is State.OPEN


def test_ping_is_answered_with_its_nonce_and_pong_is_not_answered() -> None:
    connection = at(Role.RECEIVER, State.ATTACHED)
    connection.receive_data(framed(FrameType.PING, encode(Ping(77)), SEED), 0.0)
    assert messages_in(connection.data_to_send()) == [Pong(77)]
    connection.receive_data(framed(FrameType.PONG, encode(Pong(78)), SEED), 0.0)
    assert connection.data_to_send() == []
    assert connection.events_received() == []


@pytest.mark.parametrize(
    ("role", "state"), [(role, state) for role in Role for state in TABLES[role] if state in DEADLINE_S]
)
def test_before_it_is_accepted_a_silent_peer_is_given_up_without_a_ping(role: Role, state: State) -> None:
    connection = at(role, state)
    connection.tick(DEADLINE_S[state] - 0.01)
    assert connection.data_to_send() == []
    with pytest.raises(PeerSilent):
        connection.tick(DEADLINE_S[state])
    assert connection.state is State.CLOSED


def test_who_waits_for_the_first_frame_says_so() -> None:
    assert DEADLINE_S[State.START] == FIRST_FRAME_S
    with pytest.raises(PeerSilent, match="waiting for HELLO"):
        Connection(Role.RECEIVER, 100.0).tick(100.0 + FIRST_FRAME_S)
    with pytest.raises(PeerSilent, match="waiting for JOIN or RENEW"):
        at(Role.AUTHORITY, State.OFFERED).tick(FIRST_FRAME_S)


@pytest.mark.parametrize("role", [Role.RECEIVER, Role.JOINER])
def test_a_stranger_that_trickles_is_cut_off_within_seconds(role: Role) -> None:
    connection = Connection(role, 0.0)
    frame = frame_of(FrameType.HELLO if role is Role.RECEIVER else FrameType.CA, 0)
    now = 0.0
    with pytest.raises(RemoteProtocolError) as caught:
        for byte in frame:
            connection.receive_data(bytes([byte]), now)
            now += 1.0
            connection.tick(now)
    assert caught.value.code is WireCode.SLOW
    assert now <= FRAME_GRACE_S + 1
    (fail,) = messages_in(connection.data_to_send())
    assert isinstance(fail, Fail)
    assert fail.retry is Retry.LATER


def test_a_slow_line_that_keeps_the_minimum_rate_is_left_alone() -> None:
    connection = at(Role.RECEIVER, State.ATTACHED)
    frame = large_data()
    now, step = 0.0, FRAME_MIN_BYTES_S + 1
    for position in range(0, len(frame), step):
        connection.receive_data(frame[position : position + step], now)
        now += 1.0
        connection.tick(now)
    assert now > 2 * FRAME_GRACE_S
    assert len(connection.events_received()) == 1


def large_data() -> bytes:
    size = 64 * 1024
    return joined(build(1, 7, Interval(0, size), (Extent(0, size),), memoryview(bytes(size)), None, SEED))


def test_a_frame_that_falls_below_the_minimum_rate_is_cut_off() -> None:
    connection = at(Role.RECEIVER, State.ATTACHED)
    frame = large_data()
    now, step = 0.0, FRAME_MIN_BYTES_S // 2
    with pytest.raises(RemoteProtocolError, match="came in") as caught:
        for position in range(0, len(frame), step):
            connection.receive_data(frame[position : position + step], now)
            now += 1.0
            connection.tick(now)
    assert caught.value.code is WireCode.SLOW
    assert now <= FRAME_GRACE_S + 1


def test_the_time_between_frames_is_not_that_of_a_frame() -> None:
    connection = at(Role.SENDER, State.OPEN)
    now = 0.0
    for _ in range(10):
        connection.receive_data(frame_of(FrameType.ACK, SEED), now)
        now += 10.0
        connection.tick(now)
    assert connection.state is State.OPEN


def test_bytes_of_earlier_frames_do_not_count_for_a_trickling_one() -> None:
    connection = at(Role.RECEIVER, State.ATTACHED)
    connection.receive_data(large_data(), 0.0)
    connection.receive_data(frame_of(FrameType.PING, SEED)[:-1], 1.0)
    connection.tick(1.0 + FRAME_GRACE_S)
    with pytest.raises(RemoteProtocolError) as caught:
        connection.tick(1.1 + FRAME_GRACE_S)
    assert caught.value.code is WireCode.SLOW
