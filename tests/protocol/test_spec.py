"""SPEC.md against the code: every example decodes and encodes again, every table says what the code does."""

import json
import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from importlib import resources
from typing import Any

import pytest

from protocol import constants
from protocol import header as head
from protocol.connection import Connection, Data
from protocol.constants import DEAD_AFTER_S, FIRST_FRAME_S, FRAME_GRACE_S, FRAME_MIN_BYTES_S, PING_AFTER_S
from protocol.credit import ReceiveWindow
from protocol.errors import ACCIDENTS, RemoteProtocolError, WireCode
from protocol.header import Flags, FrameType
from protocol.messages import (
    COVERAGE_INTERVALS_MAX,
    DIGEST_INTERVALS_MAX,
    FRAME_TYPES,
    Digests,
    Hello,
    Interval,
    Welcome,
)
from protocol.payload import Extent, build, new_decompressor, unpack
from protocol.state import TABLES, Direction, Role, State
from protocol.wire import Choice, Codec, Fixed, Intervals, Items, Opaque, decode, encode, schema
from tests.protocol.conversations import CREDIT, apply, framed, joined, paths

SPEC = (resources.files("protocol") / "SPEC.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(
    r"^#### ([^\n]+)\n\n```json\n(.*?)\n```\n\n```hex\n(.*?)\n```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Example:
    name: str
    says: dict[str, Any]
    frame: bytes

    @property
    def seed(self) -> int:
        return int(self.says["seed"], 16)


EXAMPLES = [
    Example(name, json.loads(says), bytes.fromhex(dump)) for name, says, dump in EXAMPLE.findall(SPEC)
]
CONTROL = [example for example in EXAMPLES if "message" in example.says]
DATA = [example for example in EXAMPLES if "extents" in example.says]
MALFORMED = [example for example in EXAMPLES if "error" in example.says]


def name_of(example: Example) -> str:
    return example.name


def plain(value: Any) -> Any:
    """A decoded value as the examples write it."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, IntEnum):
        return value.name
    if isinstance(value, int):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Interval):
        return list(value)
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    kind: type = type(value)
    return {name: plain(getattr(value, name)) for name, _ in schema(kind)}


def built(codec: Codec, value: Any) -> Any:
    """The value that an example writes."""
    match codec:
        case Choice(kind):
            return kind[value] if issubclass(kind, IntEnum) else value
        case Fixed() | Opaque():
            return bytes.fromhex(value)
        case Items(kind):
            return tuple(message(kind, item) for item in value)
        case Intervals():
            return tuple(Interval(*pair) for pair in value)
    return value


def message(kind: type, says: dict[str, Any]) -> Any:
    codecs = dict(schema(kind))
    assert list(says) == list(codecs)
    return kind(**{name: built(codec, says[name]) for name, codec in codecs.items()})


# ------------------------------------------------------------------ examples


def test_there_is_an_example_of_everything() -> None:
    assert len(EXAMPLES) == SPEC.count("```hex\n")
    shown = {example.says["header"]["type"] for example in CONTROL + DATA}
    assert shown == {kind.name for kind in FrameType}
    assert {example.says["header"]["flags"] for example in DATA} == {0, 1}
    assert (
        {example.seed == 0 for example in CONTROL} == {example.seed == 0 for example in DATA} == {True, False}
    )
    assert any(
        all(zero for *_, zero in example.says["extents"]) for example in DATA if example.says["extents"]
    )
    assert any(not example.says["extents"] for example in DATA)
    assert len({example.name for example in EXAMPLES}) == len(EXAMPLES)
    shown = {example.says["error"] for example in MALFORMED}
    assert shown == {code.value for code in WireCode} - {WireCode.COVERAGE, WireCode.SLOW}


def check_header(example: Example) -> None:
    """The header says what the example says, read without the product's own unpacking."""
    names = "magic version type flags body_len table_len raw_len disk epoch cover_start cover_end raw_hash"
    values = struct.unpack("<4sHBBIIIIQQQQQQ", example.frame[:72])
    found = dict(zip([*names.split(), "body_hash", "header_hash"], values, strict=True))
    assert found.pop("magic") == b"RPLF"
    for name, value in example.says["header"].items():
        if name == "type":
            assert FrameType[value] == found[name]
        else:
            assert (int(value, 16) if isinstance(value, str) else value) == found[name], name
    assert all(found[name] == 0 for name in set(found) - set(example.says["header"]))
    assert len(example.frame) == 72 + found["body_len"]


@pytest.mark.parametrize("example", CONTROL, ids=name_of)
def test_a_control_example_decodes_to_what_it_says_and_encodes_to_the_same_bytes(example: Example) -> None:
    check_header(example)
    header = head.unpack(example.frame[:72], example.seed)
    kind = FRAME_TYPES[header.type].message
    assert kind is not None
    decoded = decode(kind, example.frame[72:])
    assert plain(decoded) == example.says["message"]
    assert message(kind, example.says["message"]) == decoded
    connection = bring(example, *next(place for place in places() if place[2] is header.type)[:2])
    connection.receive_data(example.frame, 0.0)
    silent = header.type in (FrameType.PING, FrameType.PONG)
    assert connection.events_received() == ([] if silent else [decoded])
    assert framed(header.type, encode(decoded), example.seed) == example.frame


def places() -> list[tuple[Role, State, FrameType]]:
    """Where each type may be received."""
    return [
        (role, state, kind)
        for role, table in TABLES.items()
        for state, steps in table.items()
        for way, kind in steps
        if way is Direction.RECEIVE
    ]


def bring(example: Example, role: Role, state: State) -> Connection:
    """A connection in this state whose WELCOME named the example's seed."""
    connection = Connection(role, 0.0)
    for direction, kind in paths(role)[state]:
        if kind is FrameType.WELCOME:
            welcome = Welcome(1, 0, example.seed, 16)
            if role is Role.RECEIVER:
                connection.send(welcome)
            else:
                connection.receive_data(framed(kind, encode(welcome), 0), 0.0)
        elif kind is FrameType.ATTACHED and role is Role.RECEIVER:
            connection.attach(ReceiveWindow(example.says.get("credit", CREDIT)))
        elif kind is FrameType.HELLO and role is Role.SENDER:
            connection.send(Hello(*example.says.get("offered", (1, 1))))
        else:
            apply(connection, direction, kind)
    connection.events_received()
    connection.data_to_send()
    return connection


@pytest.mark.parametrize("example", DATA, ids=name_of)
def test_a_data_example_decodes_to_what_it_says_and_encodes_to_the_same_bytes(example: Example) -> None:
    check_header(example)
    connection = bring(example, Role.RECEIVER, State.ATTACHED)
    connection.receive_data(example.frame, 0.0)
    (event,) = connection.events_received()
    assert isinstance(event, Data)
    header = event.header
    into = memoryview(bytearray(header.raw_len)) if header.flags else None
    extents, content = unpack(header, event.body.view, into, new_decompressor(), example.seed)
    pattern, times = example.says["raw"]
    raw = bytes.fromhex(pattern) * times
    assert content == raw
    assert extents == [Extent(*entry) for entry in example.says["extents"]]
    cover = Interval(header.cover_start, header.cover_end)
    again = build(header.disk, header.epoch, cover, extents, memoryview(raw), None, example.seed)
    if header.flags & Flags.ZSTD:  # another encoder may compress otherwise; all else is the same
        assert again.table == example.frame[72 : 72 + header.table_len]
        assert again.header.raw_hash == header.raw_hash
    else:
        assert joined(again) == example.frame


@pytest.mark.parametrize("example", MALFORMED, ids=name_of)
def test_a_malformed_example_is_refused_with_its_code(example: Example) -> None:
    connection = bring(example, Role(example.says["role"]), State(example.says["state"]))
    with pytest.raises(RemoteProtocolError) as caught:
        connection.receive_data(example.frame, 0.0)
        (event,) = connection.events_received()
        assert isinstance(event, Data)
        into = memoryview(bytearray(event.header.raw_len))
        unpack(event.header, event.body.view, into, new_decompressor(), example.seed)
    assert caught.value.code == example.says["error"]


# ------------------------------------------------------------------ tables


def rows(section: str) -> list[list[str]]:
    """The rows of the first table behind a heading."""
    behind = SPEC.split(f"\n{section}\n", 1)[1]
    table = re.search(r"^\|.*?(?=\n\n)", behind, re.DOTALL | re.MULTILINE)
    assert table is not None
    return [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in table[0].split("\n")[2:]]


def test_the_offsets_are_those_of_the_code() -> None:
    table = rows("## 3. Frames")
    position = 0
    for offset, size, _, _ in table:
        assert int(offset) == position
        position += int(size)
    assert position == constants.HEADER_BYTES
    for name, at in (("type", 6), ("table_len", 12), ("cover_start", 32), ("body_hash", 56)):
        assert next(int(row[0]) for row in table if row[2] == name) == at


def test_the_types_are_those_of_the_code() -> None:
    assert [(int(row[0]), row[1]) for row in rows("### 3.1 Types")] == [
        (int(kind), kind.name) for kind in FrameType
    ]
    assert [row[1] for row in rows("### 3.2 Flags")] == [flag.name for flag in Flags]
    unseeded = re.search(r"\| ([A-Z, ]+): header and body, whenever", SPEC)
    assert unseeded is not None
    assert {FrameType[name] for name in unseeded[1].split(", ")} == head.UNSEEDED


def test_the_codes_are_those_of_the_code() -> None:
    assert {row[0] for row in rows("### 9.2 Codes")} == {code.value for code in WireCode}
    steps = rows("## 9. Refusing")
    assert {row[2] for row in steps} == {code.value for code in WireCode}
    assert {row[2] for row in steps if row[3] == "LATER"} == {code.value for code in ACCIDENTS}


def digests_max() -> int:
    codec = dict(schema(Digests))["digests"]
    assert isinstance(codec, Opaque)
    return codec.limit


def test_the_limits_are_those_of_the_code() -> None:
    assert {row[0]: row[1].replace(",", "") for row in rows("## 10. Limits")} == {
        "raw payload": str(constants.RAW_MAX_BYTES),
        "extent table": str(constants.TABLE_MAX_BYTES),
        "extent": str(constants.EXTENT_MAX_BYTES),
        "disk size, ends of intervals": "2^63 - 512",
        "control body": str(constants.CONTROL_MAX_BYTES),
        "intervals per list of coverage": str(COVERAGE_INTERVALS_MAX),
        "intervals of DIGESTS_WANTED, of a part of DIGESTS, and of its holes": str(DIGEST_INTERVALS_MAX),
        "digests of a part": str(digests_max()),
        "body of a greeting, PING and the like": str(constants.GREETING_MAX_BYTES),
        "body of FAIL": str(constants.FAIL_MAX_BYTES),
        "body in the join conversation": str(constants.JOIN_MAX_BYTES),
        "name": str(constants.NAME_MAX_BYTES),
        "disks of a group": str(constants.DISKS_MAX),
        "data streams of a session": str(constants.STREAMS_MAX),
        "zstd window": str(constants.ZSTD_WINDOW_MAX_BYTES),
        "zstd blocks of a frame": str(constants.ZSTD_BLOCKS_MAX),
    }
    assert constants.DISK_MAX_BYTES == 2**63 - 512


def test_the_times_are_those_of_the_code() -> None:
    values = [row[1] for row in rows("## 8. Time")]
    expected = (PING_AFTER_S, DEAD_AFTER_S, FIRST_FRAME_S, DEAD_AFTER_S, FRAME_GRACE_S)
    assert values[:5] == [f"{value:.0f} s" for value in expected]
    assert values[5] == f"{FRAME_MIN_BYTES_S:,} B/s"


def test_every_link_inside_leads_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", SPEC, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", SPEC)) <= anchors
