"""Samples of every frame, whole conversations, and connections brought to any state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from xxhash import xxh3_64_intdigest

from protocol import header as head
from protocol.connection import Connection, Data, Event
from protocol.constants import NONCE_BYTES
from protocol.credit import ReceiveWindow
from protocol.errors import ProtocolError, RemoteProtocolError
from protocol.header import FrameType, Header
from protocol.messages import (
    NO_ID,
    TYPE_OF,
    Ack,
    Attach,
    Attached,
    Bye,
    Ca,
    Consistency,
    Digests,
    DigestsWanted,
    DiskCoverage,
    Fail,
    Hello,
    Interval,
    Join,
    Joined,
    Message,
    Mode,
    Open,
    OpenDisk,
    Opened,
    Ping,
    Pong,
    Renew,
    Retry,
    Seal,
    Sealed,
    Wanted,
    Welcome,
)
from protocol.payload import DataFrame, Extent, build, new_compressor
from protocol.state import TABLES, Direction, Role, State
from protocol.wire import decode, encode

SEED = 0x5EED_0F_0E1D_2C3B
CREDIT = 64 * 1024 * 1024
SESSION = bytes(range(16))
EPOCH = bytes(range(16, 32))
DISKS = (DiskCoverage(1, ()), DiskCoverage(2, (Interval(0, 512),)))

SAMPLES: dict[FrameType, Message] = {
    TYPE_OF[type(message)]: message
    for message in (
        Hello(1, 1, 0, "replicator 0.1.0"),
        Welcome(1, 0, SEED, 16, "replicator 0.1.0"),
        Open(
            "web",
            b"signed assignment",
            EPOCH,
            NO_ID,
            Mode.FULL,
            Consistency.CRASH,
            0,
            (OpenDisk("web-os", 4096, 1_700_000_000_000_000_000), OpenDisk("web-däta", 8192)),
        ),
        Opened(SESSION, 7, CREDIT, DISKS, Mode.RESYNC, sealed=bytes(range(32, 48))),
        Attach(SESSION),
        Attached(),
        Ack(1, CREDIT, (DiskCoverage(1, (Interval(0, 512), Interval(1024, 4096))),)),
        Wanted(1, 512, 1024),
        DigestsWanted(5, 1, 65536, (Interval(0, 262144), Interval(524288, 589824))),
        Digests(5, (Interval(0, 262144),), (Interval(65536, 131072),), bytes(range(48))),
        Seal(EPOCH, False, (DiskCoverage(1, (Interval(0, 4096),)),)),
        Sealed(EPOCH, NO_ID),
        Ping(42),
        Pong(42),
        Fail("target.full", Retry.LATER, "no space left", "the datastore is full", "add space"),
        Bye(),
        Ca(b"a certificate", bytes(range(NONCE_BYTES))),
        Join(b"token-id", b"sixteen  secrets", b"a request"),
        Renew(b"the old certificate", b"a request", b"a signature"),
        Joined(b"a certificate", "mt-1"),
    )
}
OTHER_ROLE = {
    Role.SENDER: Role.RECEIVER,
    Role.RECEIVER: Role.SENDER,
    Role.JOINER: Role.AUTHORITY,
    Role.AUTHORITY: Role.JOINER,
}

RAW = b"Replicator " * 372 + b"...."
assert len(RAW) == 4096


def data_frame(seed: int, start: int = 0, *, level: int = 0) -> DataFrame:
    """Two extents with bytes and one of zeros in [start, start + 8192)."""
    extents = (Extent(start, 1024), Extent(start + 1024, 512, True), Extent(start + 4096, 3072))
    compressor = new_compressor(level) if level else None
    return build(1, 7, Interval(start, start + 8192), extents, memoryview(RAW), compressor, seed)


def joined(frame: DataFrame) -> bytes:
    """A DATA frame in one piece."""
    return b"".join((frame.header_bytes, frame.table, frame.payload))


def framed(kind: FrameType, body: bytes, seed: int, **fields: int) -> bytes:
    """A frame with right hashes, whatever is in it."""
    body_hash = xxh3_64_intdigest(body, head.seed_for(kind, seed))
    return head.pack(Header(kind, len(body), body_hash=body_hash, **fields), seed) + body  # type: ignore[arg-type]


def frame_of(kind: FrameType, seed: int) -> bytes:
    """A valid frame of this type."""
    if kind is FrameType.DATA:
        return joined(data_frame(seed, level=3))
    return framed(kind, encode(SAMPLES[kind]), seed)


def rehashed(frame: bytes, seed: int) -> bytes:
    """The frame with body_hash and header_hash made right again, as an attacker would."""
    kind = frame[6]
    chosen = head.seed_for(kind, seed)
    fields = frame[:56] + xxh3_64_intdigest(frame[72:], chosen).to_bytes(8, "little")
    return fields + xxh3_64_intdigest(fields, chosen).to_bytes(8, "little") + frame[72:]


def apply(connection: Connection, direction: Direction, kind: FrameType) -> None:
    """Make the connection send or receive the sample of this type."""
    if direction is Direction.RECEIVE:
        connection.receive_data(frame_of(kind, connection.seed), 0.0)
    elif kind is FrameType.DATA:
        connection.send_data(data_frame(connection.seed))
    elif kind is FrameType.ATTACHED:
        connection.attach(ReceiveWindow(CREDIT))
    else:
        connection.send(SAMPLES[kind])


def paths(role: Role) -> dict[State, list[tuple[Direction, FrameType]]]:
    """The shortest way to every state that can be reached."""
    found: dict[State, list[tuple[Direction, FrameType]]] = {State.START: []}
    queue = [State.START]
    for state in queue:
        for step, after in TABLES[role][state].items():
            if after not in found:
                found[after] = [*found[state], step]
                queue.append(after)
    return found


def at(role: Role, state: State) -> Connection:
    """A fresh connection, brought to ``state`` at time 0, with its events and output taken."""
    connection = Connection(role, 0.0)
    for direction, kind in paths(role)[state]:
        apply(connection, direction, kind)
    assert connection.state is state
    connection.events_received()
    connection.data_to_send()
    return connection


# ------------------------------------------------------------------ whole conversations

Line: TypeAlias = "Message | DataFrame"


@dataclass(frozen=True)
class Conversation:
    """Who says what: True for the connecting side. Frames are kept with the side that receives them."""

    name: str
    role: Role
    lines: tuple[tuple[bool, Line], ...]


def _c(name: str, role: Role, *lines: tuple[bool, FrameType | Line]) -> Conversation:
    return Conversation(
        name,
        role,
        tuple((ours, SAMPLES[line] if isinstance(line, FrameType) else line) for ours, line in lines),
    )


_GREETING = ((True, FrameType.HELLO), (False, FrameType.WELCOME))
CONVERSATIONS = (
    _c(
        "control stream",
        Role.SENDER,
        *_GREETING,
        (True, FrameType.OPEN),
        (False, FrameType.OPENED),
        (True, FrameType.DIGESTS_WANTED),
        (False, FrameType.DIGESTS),
        (False, FrameType.DIGESTS),
        (False, FrameType.ACK),
        (True, FrameType.PING),
        (False, FrameType.WANTED),
        (True, FrameType.SEAL),
        (False, FrameType.DIGESTS),
        (False, FrameType.ACK),
        (False, FrameType.WANTED),
        (False, FrameType.ACK),
        (False, FrameType.SEALED),
        (True, FrameType.OPEN),
        (False, FrameType.OPENED),
        (True, FrameType.SEAL),
        (False, FrameType.PING),
        (False, FrameType.SEALED),
        (True, FrameType.BYE),
    ),
    _c(
        "data stream",
        Role.SENDER,
        *_GREETING,
        (True, FrameType.ATTACH),
        (False, FrameType.ATTACHED),
        (True, data_frame(SEED)),
        (True, data_frame(SEED, 8192, level=3)),
        (False, FrameType.PING),
        (True, FrameType.PING),
        (True, build(2, 7, Interval(0, 1 << 30), (), memoryview(b""), None, SEED)),
        (True, build(2, 7, Interval(0, 512), (Extent(0, 512, True),), memoryview(b""), None, SEED)),
        (True, FrameType.BYE),
    ),
    _c(
        "join",
        Role.JOINER,
        (False, FrameType.CA),
        (True, FrameType.JOIN),
        (False, FrameType.JOINED),
        (True, FrameType.BYE),
    ),
    _c("first look", Role.JOINER, (False, FrameType.CA), (True, FrameType.BYE)),
    _c(
        "renewal",
        Role.JOINER,
        (False, FrameType.CA),
        (True, FrameType.RENEW),
        (False, FrameType.JOINED),
        (False, FrameType.BYE),
    ),
    _c("refused join", Role.JOINER, (False, FrameType.CA), (True, FrameType.JOIN), (False, FrameType.FAIL)),
    _c("refused sender", Role.SENDER, (True, FrameType.HELLO), (False, FrameType.FAIL)),
    _c(
        "failure while open",
        Role.SENDER,
        *_GREETING,
        (True, FrameType.OPEN),
        (False, FrameType.OPENED),
        (False, FrameType.FAIL),
    ),
    _c("sender gives up", Role.SENDER, *_GREETING, (True, FrameType.OPEN), (True, FrameType.FAIL)),
    _c(
        "no common version",
        Role.SENDER,
        (True, Hello(2, 3)),
        (False, Fail("protocol.version", Retry.STOP, "")),
    ),
)


@dataclass
class Take:
    """What one side of a conversation does: bytes to be received, then things to say, and so on."""

    role: Role
    turns: list[tuple[bytes, list[Line]]] = field(default_factory=list)


def say(connection: Connection, line: Line, credit: int = CREDIT) -> None:
    """Send a line of a conversation."""
    if isinstance(line, DataFrame):
        connection.send_data(line)
    elif isinstance(line, Attached):
        connection.attach(ReceiveWindow(credit))
    else:
        connection.send(line)


def take_of(conversation: Conversation, role: Role) -> Take:
    """One side's part, with the bytes that the other side would send."""
    ours = role is conversation.role
    take = Take(role, [(b"", [])])
    seed = 0
    for from_connecting, line in conversation.lines:
        if from_connecting is ours:
            take.turns[-1][1].append(line)
        else:
            piece = joined(line) if isinstance(line, DataFrame) else _control(line, seed)
            received, said = take.turns[-1]
            if said:
                take.turns.append((piece, []))
            else:
                take.turns[-1] = (received + piece, said)
        if isinstance(line, Welcome):
            seed = line.hash_seed
    return take


def _control(message: Message, seed: int) -> bytes:
    return framed(TYPE_OF[type(message)], encode(message), seed)


Feed: TypeAlias = Callable[[Connection, bytes, Iterator[int]], None]


def through_receive_data(connection: Connection, data: bytes, sizes: Iterator[int]) -> None:
    """Feed slices of these sizes."""
    position = 0
    while position < len(data):
        size = next(sizes)
        connection.receive_data(data[position : position + size], 0.0)
        position += size


def through_buffers(connection: Connection, data: bytes, sizes: Iterator[int]) -> None:
    """Feed as an event loop does that fills our buffers."""
    position = 0
    while position < len(data):
        target = connection.get_buffer()
        assert len(target) > 0
        count = min(len(target), next(sizes), len(data) - position)
        target[:count] = data[position : position + count]
        connection.buffer_updated(count, 0.0)
        position += count


@dataclass(frozen=True)
class Account:
    """All that a conversation left behind on one side."""

    events: list[object]
    output: bytes
    state: State
    error: str | None


def comparable(event: Event) -> object:
    """An event whose equality is that of its content."""
    return (event.header, bytes(event.body.view)) if isinstance(event, Data) else event


def perform(take: Take, feed: Feed, sizes: Iterator[int]) -> Account:
    """Play one side, its input cut into ``sizes``."""
    connection = Connection(take.role, 0.0)
    error = None
    output: list[bytes | memoryview] = []
    try:
        for received, said in take.turns:
            feed(connection, received, sizes)
            for line in said:
                if connection.state is not State.CLOSED:
                    say(connection, line)
            output += connection.data_to_send()
    except RemoteProtocolError as caught:
        error = caught.code.value
    events = [comparable(event) for event in connection.events_received()]
    output += connection.data_to_send()
    return Account(events, b"".join(output), connection.state, error)


def frames(output: Iterable[bytes | memoryview]) -> list[FrameType]:
    """The types of the frames in some output."""
    data, found = b"".join(output), []
    while data:
        found.append(FrameType(data[6]))
        data = data[72 + int.from_bytes(data[8:12], "little") :]
    return found


def refusal(action: Callable[[], object]) -> ProtocolError | None:
    """The documented error that an action ends in, or None. Anything else is a finding and comes through."""
    try:
        action()
    except ProtocolError as error:
        return error
    return None


def messages_in(output: list[bytes | memoryview]) -> list[Message]:
    """The control messages in some output."""
    data = b"".join(output)
    found: list[Message] = []
    while data:
        length = int.from_bytes(data[8:12], "little")
        kind = FrameType(data[6])
        message = {FrameType.FAIL: Fail, FrameType.PING: Ping, FrameType.PONG: Pong}[kind]
        found.append(decode(message, data[72 : 72 + length]))
        data = data[72 + length :]
    return found
