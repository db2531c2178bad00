"""The transition tables: mirrored, whole, and obeyed by the driver for every frame in every state."""

import pytest

from protocol.connection import Connection
from protocol.credit import ReceiveWindow
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.header import FrameType
from protocol.messages import TYPE_OF, Fail
from protocol.state import ACCEPTED, DEADLINE_S, TABLES, Direction, Role, State
from tests.protocol.conversations import (
    CREDIT,
    OTHER_ROLE,
    SAMPLES,
    apply,
    at,
    data_frame,
    frame_of,
    frames,
    paths,
)

PAIRS = [(role, state) for role, table in TABLES.items() for state in table]
OTHER_DIRECTION = {Direction.SEND: Direction.RECEIVE, Direction.RECEIVE: Direction.SEND}
EVERYWHERE = {FrameType.FAIL, FrameType.BYE}


@pytest.mark.parametrize("role", Role)
def test_each_table_is_the_mirror_of_its_peer(role: Role) -> None:
    ours, theirs = TABLES[role], TABLES[OTHER_ROLE[role]]
    assert set(ours) == set(theirs)
    for state, steps in ours.items():
        mirrored = {(OTHER_DIRECTION[way], kind): after for (way, kind), after in theirs[state].items()}
        assert steps == mirrored, state


@pytest.mark.parametrize("role", Role)
def test_every_state_is_reached_and_ends_in_closed(role: Role) -> None:
    assert set(paths(role)) == set(TABLES[role])
    for state, steps in TABLES[role].items():
        for direction in Direction:
            for kind in EVERYWHERE:
                expected = None if state is State.CLOSED else State.CLOSED
                assert steps.get((direction, kind)) is expected
    assert TABLES[role][State.CLOSED] == {}


def test_every_state_belongs_to_a_conversation() -> None:
    assert {state for table in TABLES.values() for state in table} == set(State)


def test_every_state_has_a_rule_of_time() -> None:
    assert not ACCEPTED & set(DEADLINE_S)
    assert ACCEPTED | set(DEADLINE_S) | {State.CLOSED} == set(State)


def test_before_welcome_and_in_the_join_no_ping_keeps_a_peer_alive() -> None:
    for table in TABLES.values():
        for state, steps in table.items():
            for direction in Direction:
                for kind in (FrameType.PING, FrameType.PONG):
                    assert ((direction, kind) in steps) is (state in ACCEPTED)


def test_data_flows_on_attached_streams_only() -> None:
    for role, table in TABLES.items():
        for state, steps in table.items():
            allowed = {way for way, kind in steps if kind is FrameType.DATA}
            if state is State.ATTACHED:
                assert allowed == {Direction.SEND if role is Role.SENDER else Direction.RECEIVE}
            else:
                assert not allowed


@pytest.mark.parametrize(("role", "state"), PAIRS)
@pytest.mark.parametrize("kind", FrameType)
def test_receiving_follows_the_table(role: Role, state: State, kind: FrameType) -> None:
    connection = at(role, state)
    expected = TABLES[role][state].get((Direction.RECEIVE, kind))
    if state is State.CLOSED:
        connection.receive_data(frame_of(kind, connection.seed), 1.0)
        assert connection.state is State.CLOSED
        assert connection.events_received() == [] == connection.data_to_send()
    elif expected is None:
        with pytest.raises(RemoteProtocolError) as caught:
            connection.receive_data(frame_of(kind, connection.seed), 1.0)
        assert caught.value.code is WireCode.STATE
        assert connection.state is State.CLOSED
        assert connection.events_received() == []
        assert frames(connection.data_to_send()) == [FrameType.FAIL]
    else:
        connection.receive_data(frame_of(kind, connection.seed), 1.0)
        assert connection.state is expected
        silent = kind in (FrameType.PING, FrameType.PONG)
        assert len(connection.events_received()) == (0 if silent else 1)
        assert frames(connection.data_to_send()) == ([FrameType.PONG] if kind is FrameType.PING else [])


@pytest.mark.parametrize(("role", "state"), PAIRS)
@pytest.mark.parametrize("kind", FrameType)
def test_sending_follows_the_table(role: Role, state: State, kind: FrameType) -> None:
    connection = at(role, state)
    expected = TABLES[role][state].get((Direction.SEND, kind))
    if expected is None:
        with pytest.raises(LocalProtocolError):
            apply(connection, Direction.SEND, kind)
        assert connection.state is state
        assert connection.data_to_send() == []
    else:
        apply(connection, Direction.SEND, kind)
        assert connection.state is expected
        assert frames(connection.data_to_send()) == [kind]


@pytest.mark.parametrize(("role", "state"), [pair for pair in PAIRS if pair[1] is not State.CLOSED])
def test_a_frame_that_may_not_come_is_refused_by_its_header_alone(role: Role, state: State) -> None:
    allowed = {kind for way, kind in TABLES[role][state] if way is Direction.RECEIVE}
    for kind in set(FrameType) - allowed:
        connection = at(role, state)
        with pytest.raises(RemoteProtocolError) as caught:
            connection.receive_data(frame_of(kind, connection.seed)[:72], 1.0)
        assert caught.value.code is WireCode.STATE


def test_after_a_refusal_everything_is_dropped_and_nothing_can_be_sent() -> None:
    connection = at(Role.RECEIVER, State.OPEN)
    with pytest.raises(RemoteProtocolError):
        connection.receive_data(frame_of(FrameType.OPEN, connection.seed) * 3, 1.0)
    assert frames(connection.data_to_send()) == [FrameType.FAIL]
    connection.receive_data(frame_of(FrameType.FAIL, connection.seed), 1.0)
    connection.receive_data(b"\xff" * 1000, 1.0)
    connection.tick(1e9)
    for message in SAMPLES.values():
        with pytest.raises(LocalProtocolError):
            connection.send(message)
    with pytest.raises(LocalProtocolError):
        connection.send_data(data_frame(connection.seed))
    with pytest.raises(LocalProtocolError):
        connection.attach(ReceiveWindow(CREDIT))
    assert connection.events_received() == [] == connection.data_to_send()


def test_fail_is_never_answered_so_two_sides_cannot_go_on_failing() -> None:
    for role, state in PAIRS:
        if state is State.CLOSED:
            continue
        connection = at(role, state)
        connection.receive_data(frame_of(FrameType.FAIL, connection.seed), 1.0)
        assert connection.events_received() == [SAMPLES[FrameType.FAIL]]
        assert connection.data_to_send() == []


def test_a_refused_fail_ends_too() -> None:
    connection = at(Role.SENDER, State.OPEN)
    damaged = bytearray(frame_of(FrameType.FAIL, 0))
    damaged[-1] ^= 1
    with pytest.raises(RemoteProtocolError):
        connection.receive_data(damaged, 1.0)
    peer = at(Role.RECEIVER, State.OPEN)
    peer.send(Fail("x", SAMPLES[FrameType.FAIL].retry, ""))  # type: ignore[union-attr]
    peer.data_to_send()
    peer.receive_data(b"".join(connection.data_to_send()), 1.0)
    assert peer.data_to_send() == [] == peer.events_received()


def test_no_message_is_left_out_of_the_walk() -> None:
    assert set(TYPE_OF.values()) | {FrameType.DATA} == set(FrameType)
    assert Connection(Role.SENDER, 0.0).state is State.START
