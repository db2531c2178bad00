"""A decoder written from the specification alone agrees with its examples and with the product."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages, payload
from protocol.connection import Connection
from protocol.state import Role
from tests.protocol.second_implementation import (
    AFTER_WELCOME,
    DATA,
    DISK_MAX,
    ENUMERATIONS,
    HEADER_FIELDS,
    JOINER,
    LATER,
    LAYOUTS,
    RECORDS,
    SECTOR,
    SENDER,
    TABLES,
    Epoch,
    Frame,
    Refused,
    Side,
    transitions,
)

DOCUMENT = (Path(__file__).parents[2] / "protocol" / "SPEC.md").read_text("utf-8")
EXAMPLE = re.compile(r"^#### ([^\n]+)\n\n```json\n(.+?)```\n\n```hex\n(.+?)```", re.MULTILINE | re.DOTALL)
TYPES = {name: kind for kind, (name, _, _) in LAYOUTS.items()} | {"DATA": DATA}
ENDS = {"data": (Role.SENDER, Role.RECEIVER), "join": (Role.JOINER, Role.AUTHORITY)}


class Example(NamedTuple):
    """One example of section 12."""

    title: str
    told: dict[str, Any]
    data: bytes


def all_examples() -> list[Example]:
    found = EXAMPLE.findall(DOCUMENT)
    return [Example(title, json.loads(told), bytes.fromhex(data)) for title, told, data in found]


EXAMPLES = all_examples()
VALID = [example for example in EXAMPLES if "error" not in example.told]
MALFORMED = [example for example in EXAMPLES if "error" in example.told]


def title(example: object) -> str:
    assert isinstance(example, Example)
    return example.title


def plain(value: Any) -> Any:
    """As the examples write it: bytes in hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def accepting(name: str) -> tuple[str, str]:
    """A role and a state in which this type is received."""
    if name in ("PING", "PONG", "FAIL", "BYE"):
        return "receiver", "open"
    steps = ((table, *step) for table in TABLES for step in TABLES[table])
    table, state, marked = next(step for step in steps if step[2][1:] == name)
    return ENDS[table]["?!".index(marked[0])].value, state


def only(frames: list[Frame], rest: bytes) -> Frame:
    assert len(frames) == 1 and rest == b""
    return frames[0]


# The document


def test_every_example_was_found() -> None:
    """None is lost to the parser."""
    assert len(EXAMPLES) == DOCUMENT.count("```hex\n")
    assert {example.told["header"]["type"] for example in VALID} == set(TYPES)


def layouts_of(text: str) -> dict[str, tuple[int, int, str]]:
    heads = re.findall(r"^#### (\w+) \((\d+)\), body at most (\d+) bytes\n(.*?)(?=^####)", text, re.M | re.S)
    return {name: (int(kind), int(limit), fields_of(rows)) for name, kind, limit, rows in heads}


def fields_of(rows: str) -> str:
    return ", ".join(f"{name}:{kind}" for name, kind in re.findall(r"^\| `(\w+)` \| (.+) \|$", rows, re.M))


def test_layouts() -> None:
    """The tables of section 4.2 are those of the decoder."""
    text = DOCUMENT.split("<!-- generated: messages -->")[1].split("<!-- end -->")[0] + "####"
    assert layouts_of(text) == {name: (kind, *rest) for kind, (name, *rest) in LAYOUTS.items()}
    records = re.findall(r"^#### Record (\w+)\n(.*?)(?=^####)", text, re.M | re.S)
    assert {name: fields_of(rows) for name, rows in records} == RECORDS
    enumerations = re.findall(r"^#### Enumeration (\w+)\n(.*?)(?=^####)", text, re.M | re.S)
    values = {name: re.findall(r"^\| (\d+) \| (\w+) \|$", rows, re.M) for name, rows in enumerations}
    assert {name: {int(value): word for value, word in rows} for name, rows in values.items()} == ENUMERATIONS


@pytest.mark.parametrize(("name", "table"), [("sender", SENDER), ("joiner", JOINER)])
def test_diagrams(name: str, table: str) -> None:
    """The diagrams of sections 6 and 7 are the tables of the state checker."""
    text = DOCUMENT.split(f"<!-- generated: {name} -->")[1].split("<!-- end -->")[0]
    drawn = re.findall(r"^ +(\w+) --> (\w+): ([!?]\w+)$", text, re.M)
    assert {(before, marked): after for before, after, marked in drawn} == transitions(table)


def test_states_after_welcome() -> None:
    text = DOCUMENT.split("<!-- generated: accepted -->")[1].split("<!-- end -->")[0]
    assert set(re.findall(r"`(\w+)`", text)) == AFTER_WELCOME


def test_retry() -> None:
    """The codes of section 9 that may be tried again."""
    assert set(re.findall(r"\| `(protocol\.\w+)` \| LATER \|", DOCUMENT)) == LATER


# The examples


@pytest.mark.parametrize("example", VALID, ids=title)
def test_valid(example: Example) -> None:
    """It decodes to the values that are stated."""
    told = example.told
    name = told["header"]["type"]
    role, state = accepting(name)
    frame = only(*Side(role, state, int(told["seed"], 16)).decode(example.data))
    assert frame.name == name
    hashes = {field: int(word, 16) for field, word in told["header"].items() if field.endswith("_hash")}
    stated = dict.fromkeys(HEADER_FIELDS, 0) | told["header"] | hashes | {"type": TYPES[name]}
    assert frame.header == stated
    if name == "DATA":
        pattern, times = told["raw"]
        assert [list(extent) for extent in frame.extents] == told["extents"]
        assert frame.raw == bytes.fromhex(pattern) * times
    else:
        assert plain(frame.message) == told["message"]


@pytest.mark.parametrize("example", MALFORMED, ids=title)
def test_malformed(example: Example) -> None:
    """It is refused with the code that is stated."""
    told = example.told
    low, high = told.get("offered", (1, 1))
    seed = int(told["seed"], 16)
    side = Side(told["role"], told["state"], seed, offered=(low, high), credit=told.get("credit"))
    with pytest.raises(Refused) as refused:
        side.decode(example.data)
    assert refused.value.code == told["error"]


@pytest.mark.parametrize("example", VALID, ids=title)
def test_in_pieces(example: Example) -> None:
    """A frame is none before its last byte."""
    name = example.told["header"]["type"]
    for size in range(len(example.data)):
        side = Side(*accepting(name), int(example.told["seed"], 16))
        assert side.decode(example.data[:size]) == ([], example.data[:size])


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "sender",
            "HELLO, WELCOME, OPEN, OPENED, ACK, DIGESTS_WANTED, DIGESTS, SEAL, SEALED, BYE",
        ),
        ("receiver", "HELLO, WELCOME, ATTACH, ATTACHED, DATA, FAIL"),
        ("joiner", "CA, JOIN, JOINED"),
        ("authority", "CA, RENEW, JOINED"),
    ],
)
def test_conversation(role: str, names: str) -> None:
    """The examples in a row are conversations; nothing else may come in their places."""
    first = {example.told["header"]["type"]: example for example in reversed(VALID)}
    side = Side(role)
    for name in names.split(", "):
        connecting = any(marked == f"!{name}" for table in TABLES.values() for _, marked in table)
        sent = connecting == (role in ("sender", "joiner"))
        only(*side.decode(first[name].data, sent=sent))
    assert side.state == {"BYE": "closed", "FAIL": "closed", "JOINED": "joined"}[name]


def test_closed_drops() -> None:
    """What comes behind BYE is dropped unread."""
    bye = next(example.data for example in VALID if example.title == "BYE")
    frames, rest = Side("authority").decode(bye + b"anything")
    assert [frame.name for frame in frames] == ["BYE"] and rest == b""


def test_coverage() -> None:
    """Section 5.4, of which there are no examples: new, duplicate, wanted, partial, another disk or epoch."""
    data = next(example for example in VALID if example.title == "DATA, raw")
    seed = int(data.told["seed"], 16)

    def decode(epoch: Epoch) -> Frame:
        return only(*Side("receiver", "attached", seed, epoch=epoch).decode(data.data))

    epoch = Epoch(7, {1: 8192})
    assert decode(epoch).raw
    assert not decode(epoch).raw
    epoch.wanted(1, 4608, 5120)
    with pytest.raises(Refused, match=r"protocol\.coverage"):
        decode(epoch)
    epoch.wanted(1, 0, 8192)
    assert decode(epoch).raw
    partial = {1: [(0, 4608), (1 << 20, 1 << 21)]}
    others = (Epoch(7, {2: 8192}), Epoch(6, {1: 8192}), Epoch(7, {1: 7680}))
    for wrong in (Epoch(7, {1: 8192}, partial), *others):
        with pytest.raises(Refused, match=r"protocol\.coverage"):
            decode(wrong)


# The product

BOUNDS = {"HELLO": {"version_min": (0, 1), "version_max": (1, 2**16 - 1)}, "WELCOME": {"version": (1, 1)}}
FEW = 5
ELSEWHERE = ("?ATTACHED", "!DATA")  # the product has calls of their own for them
STEPS = [(table, *step) for table, steps in TABLES.items() for step in steps if step[1] not in ELSEWHERE]
STATES = {table: sorted({"start", *steps.values()}) for table, steps in TABLES.items()}


@st.composite
def cuts(draw: st.DrawFn, start: int = 0, end: int = DISK_MAX) -> list[tuple[int, int]]:
    """Some intervals between sorted points, none touching another."""
    points = sorted(draw(st.sets(st.integers(start // SECTOR, end // SECTOR), max_size=2 * FEW)))
    return [(a * SECTOR, b * SECTOR) for a, b in zip(points[::2], points[1::2], strict=False)]


def texts(limit: int) -> st.SearchStrategy[str]:
    return st.text(max_size=limit).filter(lambda text: len(text.encode()) <= limit)


def values(kind: str) -> st.SearchStrategy[Any]:
    """Values of a field's type, as the product takes them."""
    if kind == "bool":
        return st.booleans()
    if kind.startswith("u8 "):
        return st.sampled_from(list(getattr(messages, kind.removeprefix("u8 "))))
    if kind.startswith("intervals"):
        return cuts().map(lambda found: tuple(messages.Interval(*each) for each in found))
    if kind.startswith("list"):
        return st.lists(built(kind.rpartition(" ")[2]), max_size=FEW).map(tuple)
    number = int(re.sub(r"\D", "", kind))
    if kind.startswith("u"):
        return st.integers(0, 2**number - 1)
    if kind.startswith("text"):
        return texts(number)
    return st.binary(min_size=0 if "<=" in kind else number, max_size=number)


def built(name: str) -> st.SearchStrategy[Any]:
    """Messages and records of the product, by their names in the specification."""
    fields = RECORDS[name] if name in RECORDS else LAYOUTS[TYPES[name]][2]
    kinds = dict(each.split(":") for each in fields.split(", ") if each)
    drawn = {field: values(kind) for field, kind in kinds.items()}
    drawn |= {field: st.integers(*each) for field, each in BOUNDS.get(name, {}).items()}
    in_product = name if name in RECORDS else "".join(word.title() for word in name.split("_"))
    return st.builds(getattr(messages, in_product), **drawn)


def told_by(value: Any) -> Any:
    """A message of the product, as the decoder has it."""
    if dataclasses.is_dataclass(value):
        return {each.name: told_by(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [told_by(each) for each in value]
    return value.name if isinstance(value, enum.Enum) else value


def empty_frame(kind: int, seed: int) -> bytes:
    """An encoder of frames without a body."""
    head = struct.pack("<4sHB49xQ", b"RPLF", 1, kind, xxhash.xxh3_64_intdigest(b"", seed))
    return head + xxhash.xxh3_64_digest(head, seed)[::-1]


def shortest(table: str, goal: str) -> list[str]:
    """The types that lead from start to a state."""
    paths: dict[str, list[str]] = {"start": []}
    while goal not in paths:
        for (before, marked), after in TABLES[table].items():
            if before in paths:
                paths.setdefault(after, [*paths[before], marked])
    return paths[goal]


class Talk:
    """Two connections of the product, and the decoder listening."""

    def __init__(self, table: str) -> None:
        self.ends = [Connection(role, 0.0) for role in ENDS[table]]
        self.side = Side(ENDS[table][0].value)

    def say(self, marked: str, message: messages.Message) -> None:
        """The end that may encodes it; the decoder must have the same."""
        sent = marked[0] == "!"
        speaker, listener = self.ends if sent else reversed(self.ends)
        speaker.send(message)
        data = b"".join(speaker.data_to_send())
        frame = only(*self.side.decode(data, sent=sent))
        assert (frame.name, frame.message) == (marked[1:], told_by(message))
        listener.receive_data(data, 0.0)

    def reach(self, draw: Callable[[st.SearchStrategy[Any]], Any], table: str, state: str) -> None:
        for marked in shortest(table, state):
            if marked == "?ATTACHED":
                data = empty_frame(TYPES["ATTACHED"], self.side.seed)
                only(*self.side.decode(data))
                self.ends[0].receive_data(data, 0.0)
            else:
                self.say(marked, draw(built(marked[1:])))


@pytest.mark.parametrize(("table", "state", "marked"), STEPS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_product_message(table: str, state: str, marked: str, data: st.DataObject) -> None:
    """Every arrow of the diagrams, with random messages all the way to it."""
    talk = Talk(table)
    talk.reach(data.draw, table, state)
    talk.say(marked, data.draw(built(marked[1:])))
    assert talk.side.state == TABLES[table][state, marked]


@pytest.mark.parametrize(("table", "state"), [(table, state) for table in TABLES for state in STATES[table]])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_product_anywhere(table: str, state: str, data: st.DataObject) -> None:
    """FAIL and BYE in every state, PING and PONG behind WELCOME."""
    talk = Talk(table)
    talk.reach(data.draw, table, state)
    names = ["FAIL", "BYE", *(["PING", "PONG"] if state in AFTER_WELCOME else [])]
    marked = data.draw(st.sampled_from("!?")) + data.draw(st.sampled_from(names))
    talk.say(marked, data.draw(built(marked[1:])))
    assert talk.side.state == (state if "NG" in marked else "closed")


@st.composite
def bodies(draw: st.DrawFn) -> tuple[messages.Interval, list[payload.Extent], bytes]:
    """A cover, extents in it, and the bytes of those that are not zero; some compress."""
    start, end = draw(cuts().filter(bool).map(lambda found: found[0]))
    bounded = cuts(start, min(end, start + (1 << 17)))
    extents = [payload.Extent(a, b - a, draw(st.booleans())) for a, b in draw(bounded)]
    raw_len = sum(extent.length for extent in extents if not extent.zero)
    pattern = draw(st.binary(min_size=1, max_size=16))
    repeated = (pattern * (raw_len // len(pattern) + 1))[:raw_len]
    noise = draw(st.randoms(use_true_random=False)).randbytes(raw_len)
    return messages.Interval(start, end), extents, draw(st.sampled_from((repeated, noise)))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_product_data(data: st.DataObject) -> None:
    """DATA frames one behind the other, raw and compressed."""
    talk = Talk("data")
    talk.reach(data.draw, "data", "attached")
    sent = bytearray()
    expected = []
    for cover, extents, raw in data.draw(st.lists(bodies(), max_size=3)):
        disk, epoch = data.draw(values("u32")), data.draw(values("u64"))
        compressor = payload.new_compressor(3) if data.draw(st.booleans()) else None
        view = memoryview(raw)
        frame = payload.build(disk, epoch, cover, extents, view, compressor, talk.side.seed)
        talk.ends[0].send_data(frame)
        sent += b"".join(talk.ends[0].data_to_send())
        expected.append((disk, epoch, *cover, [tuple(extent) for extent in extents], raw))
    frames, rest = talk.side.decode(bytes(sent), sent=True)
    named = ("disk", "epoch", "cover_start", "cover_end")
    found = [(*(each.header[name] for name in named), each.extents, each.raw) for each in frames]
    assert found == expected and rest == b""
