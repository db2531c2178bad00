"""Hostile input on all four roles: whatever comes, only documented errors, a closed connection, and one FAIL.

A conversation is played up to a random frame, which is then damaged or forged. Forged frames get right
hashes, so that they reach the checks behind the hashes.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import zstandard

from protocol.connection import Connection, Data
from protocol.constants import RAW_MAX_BYTES
from protocol.credit import ReceiveWindow
from protocol.errors import ProtocolError, RemoteProtocolError, WireCode
from protocol.header import FrameType
from protocol.messages import Fail, Interval
from protocol.payload import Extent, build, new_compressor, new_decompressor, raw_hash, unpack
from protocol.state import Role, State
from protocol.wire import decode
from tests.protocol.conversations import (
    CONVERSATIONS,
    CREDIT,
    OTHER_ROLE,
    SAMPLES,
    SEED,
    Take,
    data_frame,
    frame_of,
    joined,
    refusal,
    rehashed,
    say,
    take_of,
    through_buffers,
    through_receive_data,
)

TAKES = [take_of(talk, role) for talk in CONVERSATIONS for role in (talk.role, OTHER_ROLE[talk.role])]
HELLO, ATTACH = frame_of(FrameType.HELLO, 0), frame_of(FrameType.ATTACH, SEED)
NOISE = bytes(at * at * 7 >> 3 & 0xFF for at in range(1536)) + bytes(512)
CORPUS = [frame_of(kind, seed) for kind in FrameType for seed in (0, SEED)] + [joined(data_frame(SEED))]
HEADER_FIELDS = [
    (4, 2),
    (6, 1),
    (7, 1),
    (8, 4),
    (12, 4),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 8),
    (40, 8),
    (48, 8),
]
DECOMPRESSOR = new_decompressor()


def split(stream: bytes) -> list[bytes]:
    frames = []
    while stream:
        size = 72 + int.from_bytes(stream[8:12], "little")
        frames.append(stream[:size])
        stream = stream[size:]
    return frames


# ------------------------------------------------------------------ mutations: (dice, frame, seed) -> bytes


def flip_bits(dice: random.Random, frame: bytes, seed: int) -> bytes:
    damaged = bytearray(frame)
    for _ in range(dice.choice([1, 1, 2, 8])):
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
    return bytes(damaged)


def truncate(dice: random.Random, frame: bytes, seed: int) -> bytes:
    return frame[: dice.randrange(len(frame))]


def splice(dice: random.Random, frame: bytes, seed: int) -> bytes:
    other = dice.choice(CORPUS)
    return frame[: dice.randrange(len(frame))] + other[dice.randrange(len(other)) :]


def duplicate(dice: random.Random, frame: bytes, seed: int) -> bytes:
    return frame * dice.randint(2, 3)


def other_frame(dice: random.Random, frame: bytes, seed: int) -> bytes:
    return dice.choice(CORPUS)


def insert(dice: random.Random, frame: bytes, seed: int) -> bytes:
    at = dice.randrange(len(frame) + 1)
    return frame[:at] + dice.randbytes(dice.randint(1, 80)) + frame[at:]


def a_number(dice: random.Random, width: int, old: int) -> int:
    """A number of ``width`` bytes of the kind that breaks things."""
    top = 1 << 8 * width
    near = [old + 1, old - 1, old + 512, old - 512, old * 2, old ^ 1 << dice.randrange(8 * width)]
    return dice.choice([0, 1, 2, top - 1, top - 512, top // 2, dice.randrange(top), *near]) % top


def forge_header(dice: random.Random, frame: bytes, seed: int) -> bytes:
    forged = bytearray(frame)
    for _ in range(dice.choice([1, 1, 2])):
        at, width = dice.choice(HEADER_FIELDS)
        old = int.from_bytes(forged[at : at + width], "little")
        forged[at : at + width] = a_number(dice, width, old).to_bytes(width, "little")
    return rehashed(bytes(forged), seed)


def forge_body(dice: random.Random, frame: bytes, seed: int) -> bytes:
    body = bytearray(frame[72:])
    for _ in range(dice.choice([1, 1, 3])):
        width = dice.choice([1, 2, 4, 8])
        at = dice.randrange(max(1, len(body)))
        old = int.from_bytes(body[at : at + width], "little")
        body[at : at + width] = a_number(dice, width, old).to_bytes(width, "little")
    body = dice.choice([body, body, body + dice.randbytes(3), body[: dice.randrange(len(body) + 1)]])
    return rehashed(frame[:8] + len(body).to_bytes(4, "little") + frame[12:72] + bytes(body), seed)


def body_of_another(dice: random.Random, frame: bytes, seed: int) -> bytes:
    body = dice.choice(CORPUS)[72:]
    return rehashed(frame[:8] + len(body).to_bytes(4, "little") + frame[12:72] + body, seed)


def forge_content(dice: random.Random, frame: bytes, seed: int) -> bytes:
    """Change the body of DATA and make the content hash right as well, where there is content at all."""
    if frame[6] != FrameType.DATA:
        return forge_body(dice, frame, seed)
    forged = bytearray(frame)
    table_end = 72 + int.from_bytes(frame[12:16], "little")
    low, high = dice.choice([(72, table_end), (table_end, len(frame))])
    for _ in range(dice.choice([1, 1, 4])):
        if low < high:
            width = dice.choice([1, 4, 8])
            at = dice.randrange(low, high)
            old = int.from_bytes(forged[at : at + width], "little")
            end = min(at + width, high)
            forged[at:end] = a_number(dice, width, old).to_bytes(width, "little")[: end - at]
    raw: bytes = bytes(forged[table_end:])
    if forged[7]:
        try:
            raw = zstandard.ZstdDecompressor().decompressobj().decompress(raw)[:RAW_MAX_BYTES]
        except zstandard.ZstdError:
            raw = b""
    disk = int.from_bytes(forged[20:24], "little")
    forged[48:56] = raw_hash(disk, bytes(forged[72:table_end]), raw, seed).to_bytes(8, "little")
    return rehashed(bytes(forged), seed)


MUTATIONS: list[Callable[[random.Random, bytes, int], bytes]] = [
    flip_bits,
    truncate,
    splice,
    duplicate,
    other_frame,
    insert,
    forge_header,
    forge_header,
    forge_body,
    forge_body,
    body_of_another,
    forge_content,
    forge_content,
]


# ------------------------------------------------------------------ one attack


def sizes(dice: random.Random) -> Iterator[int]:
    while True:
        yield dice.choice([1, 7, 72, 1 << 20, 1 << 20, dice.randint(1, 5000)])


def attack(dice: random.Random, take: Take) -> str:
    """Play one side with one frame mutated; says how it ended."""
    connection = Connection(take.role, 0.0)
    feed = dice.choice([through_buffers, through_receive_data])
    credit = CREDIT if dice.random() < 0.9 else dice.randrange(12_000)
    total = sum(len(split(received)) for received, _ in take.turns)
    victim, position, now = dice.randrange(max(1, total)), 0, 0.0
    how = "whole"
    for received, said in take.turns:
        for whole in split(received):
            frame = whole
            if position == victim:
                frame = dice.choice(MUTATIONS)(dice, whole, connection.seed)
            position += 1
            error = refusal(lambda data=frame: feed(connection, data, sizes(dice)))  # type: ignore[misc]
            how = settle(connection, error) or how
            if position > victim and dice.random() < 0.1:
                now += dice.choice([1.0, 6.0, 16.0])
                how = settle(connection, refusal(lambda at=now: connection.tick(at))) or how  # type: ignore[misc]
        for line in said:
            refusal(lambda this=line: say(connection, this, credit))  # type: ignore[misc]
    connection.receive_eof()
    return settle(connection, None) or how


def settle(connection: Connection, error: ProtocolError | None) -> str | None:
    """Check what a step left behind; a word for its end if it was one."""
    code: str | None = None
    output = b"".join(connection.data_to_send())
    if isinstance(error, RemoteProtocolError):
        code = error.code.value
        last = split(output)[-1] if output else bytes(72)
        if "FAIL" in error.reason and error.code is not WireCode.HEADER:  # it is not answered
            assert last[6] != FrameType.FAIL
        elif error.code is not WireCode.SLOW or last[6] not in (0, FrameType.PING):
            # What trickles in may be a FAIL too, which is not answered; a PING may have gone out just before.
            assert last[6] == FrameType.FAIL
            assert decode(Fail, last[72:]).code == code
    if error is not None:
        assert connection.state is State.CLOSED
        connection.receive_data(CORPUS[0], 0.0)
        assert connection.data_to_send() == []
        code = code or type(error).__name__
    for event in connection.events_received():
        if isinstance(event, Data):
            into = memoryview(bytearray(event.header.raw_len)) if event.header.flags else None
            view, header = event.body.view, event.header
            found = refusal(lambda: unpack(header, view, into, DECOMPRESSOR, connection.seed))  # noqa: B023
            assert found is None or isinstance(found, RemoteProtocolError)
            if isinstance(found, RemoteProtocolError):
                code = found.code.value
    return code


@pytest.mark.timeout(8 * 3600)
def test_hostile_frames_end_in_documented_errors_only(seed: int, count: Callable[[int, int], int]) -> None:
    print(f"seed {seed:#x}")
    dice = random.Random(seed)
    ends: Counter[str] = Counter()
    attacked: Counter[Role] = Counter()
    for _ in range(count(5_000, 10_000_000)):
        take = dice.choice(TAKES)
        attacked[take.role] += 1
        ends[attack(dice, take)] += 1
    print(dict(ends))
    assert set(attacked) == set(Role)
    # The attack must get as far as these checks, or its silence proves nothing.
    assert {
        WireCode.MAGIC,
        WireCode.HEADER_HASH,
        WireCode.HEADER,
        WireCode.VERSION,
        WireCode.STATE,
        WireCode.LIMIT,
        WireCode.BODY_HASH,
        WireCode.MESSAGE,
    } <= set(ends)


@pytest.mark.timeout(8 * 3600)
def test_forged_tables_and_payloads_end_in_documented_errors_only(
    seed: int, count: Callable[[int, int], int]
) -> None:
    print(f"seed {seed:#x}")
    dice = random.Random(seed)
    ends: Counter[str | None] = Counter()
    small = build(1, 7, Interval(0, 4096), (Extent(0, 2048),), memoryview(NOISE), new_compressor(19), SEED)
    victims = [joined(frame) for frame in (data_frame(SEED), data_frame(SEED, level=1), small)]
    for _ in range(count(5_000, 10_000_000)):
        connection = Connection(Role.RECEIVER, 0.0)
        connection.receive_data(HELLO, 0.0)
        connection.send(SAMPLES[FrameType.WELCOME])
        connection.receive_data(ATTACH, 0.0)
        connection.attach(ReceiveWindow(CREDIT))
        frame = forge_content(dice, dice.choice(victims), SEED)
        for _ in range(dice.choice([0, 0, 1])):
            frame = forge_header(dice, frame, SEED)
        error = refusal(lambda data=frame: connection.receive_data(data, 0.0))  # type: ignore[misc]  # noqa: B023
        ends[settle(connection, error)] += 1
    print(dict(ends))
    assert {None, WireCode.HEADER, WireCode.TABLE, WireCode.PAYLOAD, WireCode.RAW_HASH} <= set(ends)


@pytest.mark.parametrize("role", Role)
def test_noise_is_refused_at_once(role: Role, seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(200):
        connection = Connection(role, 0.0)
        error = refusal(lambda: connection.receive_data(dice.randbytes(500), 0.0))  # noqa: B023
        assert isinstance(error, RemoteProtocolError)
        assert error.code is WireCode.MAGIC
