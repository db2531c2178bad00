"""The document of what to replicate: what goes in comes out, and nothing else gets in."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import desired
from replicator.desired import Desired, DesiredError, Disk, Group, Peer, Retention, decode, encode

SERVER = "mt-" + "0" * 32
GROUP = Group(
    name="web",
    disks=(Disk("system", "/dev/sda"), Disk("data", "azure://account/container/blob")),
    peer=Peer("10.0.0.5:9443", SERVER),
    interval_s=300.0,
    jitter_s=0.5,
    retention=Retention(3600.0, 7),
    streams=8,
    level=3,
    quiesced=True,
    generation=12,
    assignment=b"\x00\xff",
)
DOCUMENT = Desired(41, (GROUP,), ("mt-" + "1" * 32, "ps-" + "0" * 32))

names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=60)
groups = st.builds(
    Group,
    name=names,
    disks=st.lists(
        st.builds(Disk, names, names),
        min_size=1,
        max_size=4,
        unique_by=(lambda d: d.name, lambda d: d.source),
    ).map(tuple),
    peer=st.builds(Peer, st.sampled_from(["h:1", "[::1]:65535", "a.b-c:0"]), st.sampled_from(["", SERVER])),
    interval_s=st.floats(1, desired.INTERVAL_MAX_S),
    jitter_s=st.floats(0, 1),
    retention=st.builds(
        Retention, st.floats(0, desired.KEEP_MAX_S), st.none() | st.integers(1, desired.KEEP_COUNT_MAX)
    ),
    streams=st.integers(1, 16),
    level=st.none() | st.integers(0, 19),
    quiesced=st.booleans(),
    generation=st.integers(0, desired.GENERATION_MAX),
    assignment=st.binary(max_size=200),
)
documents = st.builds(
    Desired,
    st.integers(0, desired.GENERATION_MAX),
    st.lists(groups, max_size=4, unique_by=lambda group: group.name).map(tuple),
    st.lists(st.integers(0, 1 << 128).map(lambda n: f"ps-{n % (1 << 128):032x}"), unique=True, max_size=4)
    .map(sorted)
    .map(tuple),
)


@given(documents)
def test_what_goes_in_comes_out(document: Desired) -> None:
    assert decode(encode(document)) == document


def test_the_same_document_is_the_same_bytes() -> None:
    assert encode(DOCUMENT) == encode(decode(encode(DOCUMENT)))


@given(st.binary(max_size=200) | documents.map(encode), st.integers(0, 1 << 16), st.integers(1, 255))
def test_damage_is_refused_or_another_document(content: bytes, at: int, flip: int) -> None:
    damaged = bytearray(content)
    if damaged:
        damaged[at % len(damaged)] ^= flip
    try:
        found = decode(bytes(damaged))
    except DesiredError as error:
        assert error.mistakes
    else:
        assert decode(encode(found)) == found


# ------------------------------------------------------------------ what is refused


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(encode(DOCUMENT))
    change(content)
    return json.dumps(content).encode()


def at(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Sets what a path such as ``groups.0.name`` names."""

    def change(content: dict[str, Any]) -> None:
        *way, last = path.split(".")
        found: Any = content
        for step in way:
            found = found[int(step)] if step.isdigit() else found[step]
        found[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        (at("version", 2), "version: 2 is not known, 1 is"),
        (at("revision", -1), "revision: a number from 0 is wanted"),
        (at("revision", "41"), "document.revision: of the wrong type"),
        (at("revision", True), "document.revision: of the wrong type"),
        (at("more", 1), "document.more: unknown"),
        (lambda content: content.pop("revoked"), "document.revoked: missing"),
        (at("groups", {}), "document.groups: of the wrong type"),
        (at("groups", [7]), "groups[0]: not a record"),
        (at("groups.0.more", 1), "groups[0].more: unknown"),
        (at("groups.0.name", ""), "groups[0].name: 1 to 255 printable bytes are wanted"),
        (at("groups.0.name", "a\n"), "groups[0].name: 1 to 255 printable bytes are wanted"),
        (at("groups.0.name", "\ud800"), "groups[0].name: 1 to 255 printable bytes are wanted"),
        (at("groups.0.disks", []), "groups[0].disks: 1 to 64 are wanted, not 0"),
        (at("groups.0.disks", ["a"]), "groups[0].disks[0]: not a record"),
        (at("groups.0.disks", [{"name": "a"}]), "groups[0].disks[0].source: missing"),
        (
            at("groups.0.disks", [{"name": "a", "source": "b"}, {"name": "a", "source": "c"}]),
            "groups[0].disks: the name 'a' stands there twice",
        ),
        (at("groups.0.peer.address", "10.0.0.5"), "groups[0].peer: its address is to be HOST:PORT"),
        (at("groups.0.peer.address", "h:65536"), "groups[0].peer: its address is to be HOST:PORT"),
        (at("groups.0.peer.id", "mt-0"), "groups[0].peer: its id is no id of a server"),
        (at("groups.0.interval_s", 0.5), "groups[0].interval_s: 1 to 604800 s are wanted"),
        (at("groups.0.interval_s", 1e308 * 10), "document: not JSON, or a key stands in it twice"),
        (at("groups.0.interval_s", 10**400), "groups[0].interval_s: too large"),
        (at("groups.0.jitter_s", 301), "groups[0].jitter_s: 0 to interval_s is wanted"),
        (at("groups.0.retention.keep_s", -1), "groups[0].retention: keep_s is to be 0 to 31622400"),
        (
            at("groups.0.retention.keep_count", 0),
            "groups[0].retention: keep_count is to be 1 to 1048576, or none",
        ),
        (at("groups.0.streams", 17), "groups[0].streams: 1 to 16 are wanted"),
        (at("groups.0.streams", 4.0), "groups[0].streams: of the wrong type"),
        (at("groups.0.level", 20), "groups[0].level: 0 to 19 is wanted, or none"),
        (at("groups.0.quiesced", 1), "groups[0].quiesced: of the wrong type"),
        (at("groups.0.generation", 1 << 63), "groups[0].generation: too large"),
        (at("groups.0.assignment", "0"), "groups[0].assignment: not in hex"),
        (at("groups.0.assignment", "0 1 "), "groups[0].assignment: not in hex"),
        (at("groups.0.assignment", "00" * 4097), "groups[0].assignment: over 4096 bytes"),
        (at("revoked", ["x"]), "revoked: 'x' is no id of a server"),
        (at("revoked", [1]), "revoked[0]: not text"),
        (at("revoked", [SERVER, SERVER]), "revoked: not sorted, or an id twice"),
        (lambda content: content["groups"].append(content["groups"][0]), "groups: 'web' stands there twice"),
    ],
)
def test_a_wrong_document_is_refused(change: Callable[[dict[str, Any]], object], mistake: str) -> None:
    with pytest.raises(DesiredError) as caught:
        decode(changed(change))
    assert caught.value.mistakes == (mistake,)


def test_every_mistake_is_told_at_once() -> None:
    wrong = replace(DOCUMENT, groups=(replace(GROUP, name="", streams=0, jitter_s=-1.0),))
    with pytest.raises(DesiredError) as caught:
        encode(wrong)
    assert len(caught.value.mistakes) == 3


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10_000, b'{"version":1,"version":1}', b"NaN"]
)
def test_what_is_no_document_is_refused(content: bytes) -> None:
    with pytest.raises(DesiredError):
        decode(content)


def test_a_document_without_bounds_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(DOCUMENT)
    monkeypatch.setattr(desired, "DOCUMENT_MAX_BYTES", len(content) - 1)
    with pytest.raises(DesiredError, match="more than"):
        decode(content)


def test_a_thousand_groups_are_a_document_and_one_more_are_none() -> None:
    many = tuple(replace(GROUP, name=f"group {number}") for number in range(desired.GROUPS_MAX + 1))
    assert len(decode(encode(Desired(1, many[:-1]))).groups) == desired.GROUPS_MAX
    with pytest.raises(DesiredError, match="at most 1000"):
        encode(Desired(1, many))
