"""The driver: whole conversations however they are sliced, refusals, versions, credit, the rules of time."""

import contextlib
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import NoReturn

import pytest
from xxhash import xxh3_64_intdigest

from protocol import header as head
from protocol.connection import Connection, Data, End
from protocol.constants import (
    DEAD_AFTER_S,
    HEADER_BYTES,
)
from protocol.credit import ReceiveWindow
from protocol.errors import LocalProtocolError, PeerSilent, RemoteProtocolError, WireCode
from protocol.header import FrameType, Header
from protocol.messages import (
    COVERAGE_INTERVALS_MAX,
    FRAME_TYPES,
    Attached,
    DiskCoverage,
    Fail,
    Hello,
    Interval,
    Message,
    Ping,
    Pong,
    Retry,
    Seal,
    Welcome,
)
from protocol.state import TABLES, Direction, Role, State
from protocol.wire import encode
from tests.protocol.conversations import (
    CONVERSATIONS,
    OTHER_ROLE,
    SAMPLES,
    SEED,
    Conversation,
    Feed,
    at,
    data_frame,
    frame_of,
    framed,
    frames,
    joined,
    messages_in,
    perform,
    rehashed,
    take_of,
    through_buffers,
    through_receive_data,
)

SIDES = [(talk, role) for talk in CONVERSATIONS for role in (talk.role, OTHER_ROLE[talk.role])]
FEEDS = [through_receive_data, through_buffers]


# ------------------------------------------------------------------ conversations, sliced


def random_sizes(seed: int) -> Iterator[int]:
    dice = random.Random(seed)
    while True:
        yield dice.choice([1, 2, 71, 72, 73, 4096, dice.randint(1, 1 << 16)])


@pytest.mark.parametrize(("talk", "role"), SIDES, ids=[f"{talk.name}: {role}" for talk, role in SIDES])
@pytest.mark.parametrize("feed", FEEDS)
def test_however_a_conversation_is_sliced_the_same_happens(
    talk: Conversation, role: Role, feed: Feed, seed: int
) -> None:
    take = take_of(talk, role)
    whole = perform(take, through_receive_data, repeat(1 << 30))
    assert whole.error is None or talk.name == "no common version"
    assert perform(take, feed, repeat(1 << 30)) == whole
    assert perform(take, feed, repeat(1)) == whole
    for attempt in range(20):
        assert perform(take, feed, random_sizes(seed + attempt)) == whole


@pytest.mark.parametrize(("talk", "role"), SIDES, ids=[f"{talk.name}: {role}" for talk, role in SIDES])
def test_each_side_hears_what_the_other_said(talk: Conversation, role: Role) -> None:
    account = perform(take_of(talk, role), through_receive_data, repeat(1 << 30))
    if talk.name == "no common version" and role is Role.RECEIVER:
        assert account.error == WireCode.VERSION
        return
    said = [line for ours, line in talk.lines if ours is not (role is talk.role)]
    heard = iter(account.events)
    for line in said:
        if isinstance(line, Ping | Pong):
            continue
        event = next(heard)
        if isinstance(event, tuple):
            assert not isinstance(line, Message)
            assert event == (line.header, line.table + bytes(line.payload))
        else:
            assert event == line
    assert next(heard, None) is None
    pings = sum(isinstance(line, Ping) for line in said)
    assert frames([account.output]).count(FrameType.PONG) == pings


def test_a_refusal_comes_at_the_same_byte_however_it_is_sliced(seed: int) -> None:
    good, bad = frame_of(FrameType.ACK, SEED), frame_of(FrameType.OPEN, SEED)
    stream = good + good + bad + good
    for feed in FEEDS:
        for sizes in (repeat(1 << 30), repeat(1), random_sizes(seed)):
            connection = at(Role.SENDER, State.OPEN)
            with pytest.raises(RemoteProtocolError, match="OPEN may not be received in state open"):
                feed(connection, stream, sizes)
            assert connection.events_received() == [SAMPLES[FrameType.ACK]] * 2
            assert frames(connection.data_to_send()) == [FrameType.FAIL]


def test_data_bodies_land_in_the_memory_that_was_given_for_them() -> None:
    asked: list[tuple[int, int]] = []

    class Buffer:
        def __init__(self, size: int) -> None:
            self.view = memoryview(bytearray(size))

    def allocate(size: int, lead: int) -> Buffer:
        asked.append((size, lead))
        return Buffer(size)

    connection = Connection(Role.RECEIVER, 0.0, allocate)
    connection.receive_data(frame_of(FrameType.HELLO, 0), 0.0)
    connection.send(SAMPLES[FrameType.WELCOME])
    connection.receive_data(frame_of(FrameType.ATTACH, SEED), 0.0)
    connection.attach(ReceiveWindow(1 << 20))
    connection.receive_data(joined(data_frame(SEED)), 0.0)
    *_, event = connection.events_received()
    assert isinstance(event, Data)
    assert isinstance(event.body, Buffer)
    assert asked == [(event.header.body_len, event.header.table_len)]


def test_a_data_payload_is_passed_on_without_a_copy() -> None:
    connection = at(Role.SENDER, State.ATTACHED)
    frame = data_frame(SEED)
    connection.send_data(frame)
    assert connection.data_to_send()[-1] is frame.payload


# ------------------------------------------------------------------ refusals


def refused(connection: Connection, data: bytes) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        connection.receive_data(data, 0.0)
    assert connection.state is State.CLOSED
    return caught.value


@pytest.mark.parametrize(
    ("code", "retry"),
    [(WireCode.BODY_HASH, Retry.LATER), (WireCode.HEADER_HASH, Retry.LATER), (WireCode.MESSAGE, Retry.STOP)],
)
def test_fail_says_whether_another_try_may_help(code: WireCode, retry: Retry) -> None:
    frame = bytearray(frame_of(FrameType.PING, SEED))
    frame[{WireCode.BODY_HASH: 75, WireCode.HEADER_HASH: 70}.get(code, 0)] ^= 1
    data = framed(FrameType.PING, b"", SEED) if code is WireCode.MESSAGE else bytes(frame)
    connection = at(Role.RECEIVER, State.OPEN)
    error = refused(connection, data)
    (fail,) = messages_in(connection.data_to_send())
    assert isinstance(fail, Fail)
    assert (error.code, fail.code, fail.retry) == (code, code, retry)
    assert fail.message == error.reason


@pytest.mark.parametrize("kind", sorted(set(SAMPLES) - {FrameType.BYE, FrameType.ATTACHED}))
def test_a_body_that_does_not_fit_its_schema_is_refused_in_any_message(kind: FrameType) -> None:
    role, state = next(
        (role, state)
        for role, table in TABLES.items()
        for state, steps in table.items()
        if (Direction.RECEIVE, kind) in steps
    )
    connection = at(role, state)
    body = encode(SAMPLES[kind])
    assert refused(connection, framed(kind, body[:-1], connection.seed)).code is WireCode.MESSAGE
    connection = at(role, state)
    assert refused(connection, framed(kind, body + b"\0", connection.seed)).code is WireCode.MESSAGE


def test_a_message_longer_than_its_limit_is_refused_before_its_body_comes() -> None:
    for role, table in TABLES.items():
        for state, steps in table.items():
            for way, kind in steps:
                if way is Direction.SEND or kind is FrameType.DATA:
                    continue
                connection = at(role, state)
                limit = head_limit(kind)
                ok = head.pack(Header(kind, limit), connection.seed)
                connection.receive_data(ok, 0.0)
                assert len(connection.get_buffer()) == limit
                connection = at(role, state)
                over = head.pack(Header(kind, limit + 1), connection.seed)
                assert refused(connection, over).code is WireCode.LIMIT


def head_limit(kind: FrameType) -> int:
    return FRAME_TYPES[kind].body_max


def test_a_message_of_ours_that_is_malformed_or_too_long_is_not_sent() -> None:
    connection = at(Role.SENDER, State.OPEN)
    with pytest.raises(LocalProtocolError, match="PING"):
        connection.send(Ping(2**64))
    with pytest.raises(LocalProtocolError, match="FAIL"):
        connection.send(Fail("x", Retry.STOP, "\ud800"))
    disks = tuple(wide_coverage(number) for number in range(3))
    with pytest.raises(LocalProtocolError, match="over its limit"):
        connection.send(Seal(bytes(16), False, disks))
    assert connection.state is State.OPEN
    assert connection.data_to_send() == []


def wide_coverage(disk: int) -> DiskCoverage:
    return DiskCoverage(
        disk, tuple(Interval(at * 1024, at * 1024 + 512) for at in range(COVERAGE_INTERVALS_MAX))
    )


def test_a_frame_over_the_credit_gets_no_memory() -> None:
    def allocate(size: int, lead: int) -> NoReturn:
        raise AssertionError("memory was asked for")

    frame = data_frame(SEED)
    for granted in (0, HEADER_BYTES, frame.wire_bytes - 1):
        connection = Connection(Role.RECEIVER, 0.0, allocate)
        connection.receive_data(frame_of(FrameType.HELLO, 0), 0.0)
        connection.send(SAMPLES[FrameType.WELCOME])
        connection.receive_data(frame_of(FrameType.ATTACH, SEED), 0.0)
        connection.attach(ReceiveWindow(granted))
        assert refused(connection, frame.header_bytes).code is WireCode.CREDIT


def test_streams_of_a_session_share_one_window() -> None:
    frame = data_frame(SEED)
    window = ReceiveWindow(2 * frame.wire_bytes)
    streams = [at(Role.RECEIVER, State.ATTACHING) for _ in range(3)]
    for stream in streams:
        stream.attach(window)
    for stream in streams[:2]:
        stream.receive_data(joined(frame), 0.0)
    assert window.received == window.granted
    assert refused(streams[2], frame.header_bytes).code is WireCode.CREDIT


def test_a_stream_cannot_be_attached_without_a_window() -> None:
    connection = at(Role.RECEIVER, State.ATTACHING)
    with pytest.raises(LocalProtocolError, match="window"):
        connection.send(Attached())
    assert connection.state is State.ATTACHING
    assert connection.data_to_send() == []


class Held:
    """Memory of a DATA body that can be watched."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))


def halfway(kept: list[weakref.ref[Held]]) -> Connection:
    """A connection that waits for a DATA body; the memory given to it is noted in ``kept``."""

    def allocate(size: int, lead: int) -> Held:
        held = Held(size)
        kept.append(weakref.ref(held))
        return held

    connection = Connection(Role.RECEIVER, 0.0, allocate)
    connection.receive_data(frame_of(FrameType.HELLO, 0), 0.0)
    connection.send(SAMPLES[FrameType.WELCOME])
    connection.receive_data(frame_of(FrameType.ATTACH, SEED), 0.0)
    connection.attach(ReceiveWindow(1 << 20))
    connection.receive_data(data_frame(SEED).header_bytes, 0.0)
    assert len(connection.get_buffer()) > HEADER_BYTES
    assert kept[-1]() is not None
    return connection


ENDS: dict[str, tuple[type[Exception] | None, Callable[[Connection], object]]] = {
    "end of stream": (None, lambda connection: connection.receive_eof()),
    "silence": (PeerSilent, lambda connection: connection.tick(DEAD_AFTER_S)),
    "slow": (RemoteProtocolError, lambda connection: connection.tick(DEAD_AFTER_S - 1)),
    "body hash": (
        RemoteProtocolError,
        lambda connection: connection.receive_data(bytes(len(connection.get_buffer())), 0.0),
    ),
}


@pytest.mark.parametrize(("error", "end"), ENDS.values(), ids=ENDS.keys())
def test_memory_of_a_frame_that_will_not_be_whole_is_let_go(
    error: type[Exception] | None, end: Callable[[Connection], object]
) -> None:
    kept: list[weakref.ref[Held]] = []
    connection = halfway(kept)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        end(connection)
    assert connection.state is State.CLOSED
    assert len(connection.get_buffer()) == HEADER_BYTES
    gc.collect()
    assert kept[0]() is None


def test_the_end_in_the_middle_of_a_frame_is_told_as_such() -> None:
    connection = halfway([])
    connection.events_received()
    connection.receive_eof()
    assert connection.events_received() == [End(State.ATTACHED, partial=True)]


# ------------------------------------------------------------------ seeds and versions


def test_what_is_hashed_with_another_seed_is_refused() -> None:
    for seed in (0, SEED ^ 1):
        connection = at(Role.RECEIVER, State.OPEN)
        assert refused(connection, frame_of(FrameType.PING, seed)).code is WireCode.HEADER_HASH
    connection = at(Role.RECEIVER, State.OPEN)
    frame = bytearray(frame_of(FrameType.PING, SEED))
    frame[56:64] = xxh3_64_intdigest(frame[72:], 0).to_bytes(8, "little")
    frame[64:72] = xxh3_64_intdigest(frame[:64], SEED).to_bytes(8, "little")
    assert refused(connection, bytes(frame)).code is WireCode.BODY_HASH


@pytest.mark.parametrize("kind", [FrameType.FAIL, FrameType.BYE])
def test_a_sender_that_gives_up_before_it_has_read_welcome_is_understood(kind: FrameType) -> None:
    sender, receiver = Connection(Role.SENDER, 0.0), Connection(Role.RECEIVER, 0.0)
    sender.send(Hello())
    receiver.receive_data(b"".join(sender.data_to_send()), 0.0)
    receiver.send(SAMPLES[FrameType.WELCOME])
    sender.send(SAMPLES[kind])
    receiver.receive_data(b"".join(sender.data_to_send()), 0.0)
    assert receiver.events_received() == [Hello(), SAMPLES[kind]]


@pytest.mark.parametrize(("lowest", "highest"), [(2, 3), (0, 0), (2, 1), (65535, 65535), (1, 0)])
def test_without_a_common_version_fail_names_both_ranges(lowest: int, highest: int) -> None:
    connection = Connection(Role.RECEIVER, 0.0)
    error = refused(connection, framed(FrameType.HELLO, encode(Hello(lowest, highest)), 0))
    assert error.code is WireCode.VERSION
    (fail,) = messages_in(connection.data_to_send())
    assert isinstance(fail, Fail)
    assert f"versions {lowest} to {highest}" in fail.message
    assert "1 to 1" in fail.message
    assert connection.events_received() == []


@pytest.mark.parametrize(("lowest", "highest"), [(1, 1), (0, 1), (1, 65535), (0, 65535)])
def test_any_range_that_holds_our_version_is_good(lowest: int, highest: int) -> None:
    connection = Connection(Role.RECEIVER, 0.0)
    connection.receive_data(framed(FrameType.HELLO, encode(Hello(lowest, highest)), 0), 0.0)
    assert connection.events_received() == [Hello(lowest, highest)]


def test_a_version_that_was_not_offered_is_refused_and_the_receiver_understands_it() -> None:
    sender, receiver = Connection(Role.SENDER, 0.0), Connection(Role.RECEIVER, 0.0)
    sender.send(Hello())
    receiver.receive_data(b"".join(sender.data_to_send()), 0.0)
    receiver.send(Welcome(2, 0, SEED, 1))
    assert refused(sender, b"".join(receiver.data_to_send())).code is WireCode.VERSION
    receiver.receive_data(b"".join(sender.data_to_send()), 0.0)
    *_, fail = receiver.events_received()
    assert isinstance(fail, Fail)
    assert fail.code == WireCode.VERSION


def test_a_forged_body_with_right_hashes_is_judged_by_its_schema() -> None:
    frame = bytearray(frame_of(FrameType.SEAL, SEED))
    frame[72 + 16] = 2  # fuzzy: neither 0 nor 1
    connection = at(Role.RECEIVER, State.OPEN)
    assert refused(connection, rehashed(bytes(frame), SEED)).code is WireCode.MESSAGE


def test_a_fail_that_breaks_a_rule_is_not_answered() -> None:
    sender, receiver = Connection(Role.SENDER, 0.0), Connection(Role.RECEIVER, 0.0)
    sender.send(Fail("x", Retry.STOP, "y"))
    frame = bytearray(b"".join(sender.data_to_send()))
    frame[-1] ^= 1
    with pytest.raises(RemoteProtocolError) as caught:
        receiver.receive_data(frame, 0.0)
    assert caught.value.code is WireCode.BODY_HASH
    assert receiver.state is State.CLOSED
    assert receiver.data_to_send() == []
