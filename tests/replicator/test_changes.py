"""A list of changed extents is taken whole or refused: what is misread of it would be missing data."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import Interval
from replicator.changes import Changes, parse_changes
from replicator.digest import BLOCK_BYTES
from replicator.errors import UsageError
from replicator.extents import Coverage, Relation

SINCE = "0123456789abcdef0123456789ABCDEF"
SIZE = 100 * BLOCK_BYTES + 512
SIZES = {"system": SIZE, "data": 512}


def text_of(disks: object, since: object = SINCE, **more: object) -> bytes:
    return json.dumps({"since": since, "disks": disks} | more).encode()


def parsed(content: bytes) -> Changes:
    return parse_changes(content, "changes.json", SIZES)


def refused(content: bytes) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parsed(content)
    assert "changes.json" in caught.value.message
    return caught.value


def test_extents_become_blocks_sorted_and_joined() -> None:
    found = parsed(
        text_of(
            {
                "system": [
                    [5 * BLOCK_BYTES + 512, 512],
                    [SIZE - 512, 512],
                    [0, 512],
                    [BLOCK_BYTES - 512, 1024],
                    [5 * BLOCK_BYTES, BLOCK_BYTES],
                    [6 * BLOCK_BYTES, 512],
                ],
                "data": [],
            }
        )
    )
    assert found.since == bytes.fromhex(SINCE)
    assert found.disks == {
        "system": (
            Interval(0, 2 * BLOCK_BYTES),
            Interval(5 * BLOCK_BYTES, 7 * BLOCK_BYTES),
            Interval(100 * BLOCK_BYTES, SIZE),
        ),
        "data": (),
    }


@given(st.lists(st.tuples(st.integers(0, SIZE // 512 - 1), st.integers(1, 500))))
def test_no_changed_byte_is_left_out_and_no_block_too_many_is_in(spans: list[tuple[int, int]]) -> None:
    extents = [[first * 512, min(count, SIZE // 512 - first) * 512] for first, count in spans]
    found = Coverage(parsed(text_of({"system": extents, "data": []})).disks["system"])
    for offset, length in extents:
        assert found.relation(offset, offset + length) is Relation.COVERED
    touched = {
        block
        for offset, length in extents
        for block in range(offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1)
    }
    whole = sum(min(BLOCK_BYTES, SIZE - block * BLOCK_BYTES) for block in touched)
    assert found.covered_bytes == whole


def test_a_long_list_out_of_order_takes_no_time() -> None:
    extents = [[number * 2 * BLOCK_BYTES, 512] for number in range(200_000)]
    random.Random(1).shuffle(extents)
    size = 400_000 * BLOCK_BYTES
    found = parse_changes(text_of({"vast": extents}), "changes.json", {"vast": size})
    assert len(found.disks["vast"]) == 200_000


GOOD = {"system": [[0, 512]], "data": []}

MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"{",
    "cut short": text_of(GOOD)[:-1],
    "two documents": text_of(GOOD) * 2,
    "not text": b"\xff\xfe",
    "a deep nest": b"[" * 100_000,
    "a list": b"[]",
    "nothing in it": b"{}",
    "no since": json.dumps({"disks": GOOD}).encode(),
    "no disks": json.dumps({"since": SINCE}).encode(),
    "another field": text_of(GOOD, blocks=4096),
    "since is a number": text_of(GOOD, since=7),
    "since is short": text_of(GOOD, since=SINCE[:-1]),
    "since is long": text_of(GOOD, since=SINCE + "0"),
    "since is no hex": text_of(GOOD, since="x" * 32),
    "since has dashes": text_of(GOOD, since="01234567-89ab-cdef-0123-456789abcd"),
    "since is no epoch": text_of(GOOD, since="0" * 32),
    "disks is a list": text_of([["system", 0, 512]]),
    "a disk is a record": text_of({"system": {"0": 512}, "data": []}),
    "a disk is nothing": text_of({"system": None, "data": []}),
    "an extent is a number": text_of({"system": [0, 512], "data": []}),
    "an extent is a record": text_of({"system": [{"offset": 0, "length": 512}], "data": []}),
    "an extent of one": text_of({"system": [[0]], "data": []}),
    "an extent of three": text_of({"system": [[0, 512, 1]], "data": []}),
    "text for a number": text_of({"system": [["0", 512]], "data": []}),
    "a fraction": text_of({"system": [[0.0, 512]], "data": []}),
    "true for a number": text_of({"system": [[0, True]], "data": []}),
    "infinity": b'{"since": "%s", "disks": {"system": [[0, Infinity]], "data": []}}' % SINCE.encode(),
    "a disk twice": b'{"since": "%s", "disks": {"system": [], "data": [], "system": [[0, 512]]}}'
    % SINCE.encode(),
    "disks twice": b'{"since": "%s", "disks": {}, "disks": {"system": [], "data": []}}' % SINCE.encode(),
}


@pytest.mark.parametrize("how", MALFORMED)
def test_what_is_no_list_is_refused(how: str) -> None:
    assert refused(MALFORMED[how]).code == "changes.malformed"


@pytest.mark.parametrize(
    ("extent", "code"),
    [
        ([SIZE, 512], "changes.out_of_range"),
        ([SIZE - 512, 1024], "changes.out_of_range"),
        ([0, SIZE + 512], "changes.out_of_range"),
        ([1 << 70, 512], "changes.out_of_range"),
        ([-512, 512], "changes.out_of_range"),
        ([-512, 1024], "changes.out_of_range"),
        ([512, 0], "changes.out_of_range"),
        ([512, -512], "changes.out_of_range"),
        ([1, 512], "changes.misaligned"),
        ([512, 1], "changes.misaligned"),
        ([512, 513], "changes.misaligned"),
        ([511, 513], "changes.misaligned"),
    ],
)
def test_an_extent_that_the_disk_cannot_have_is_refused(extent: list[int], code: str) -> None:
    error = refused(text_of({"system": [[0, 512], extent], "data": []}))
    assert error.code == code
    assert str(extent) in error.message and "'system'" in error.message


def test_the_list_is_about_the_disks_that_are_sent_and_all_of_them() -> None:
    error = refused(text_of(GOOD | {"other": []}))
    assert error.code == "changes.unknown_disk" and "'other'" in error.message
    error = refused(text_of({"system": []}))
    assert error.code == "changes.missing_disk" and "'data'" in error.message
    assert refused(text_of({})).code == "changes.missing_disk"
