"""What SPEC.md's examples say besides frames: digests, token, renewal statement, and the number of blocks."""

import base64
import hashlib
import json
import re
import struct
import zlib
from typing import Any

import pytest
import xxhash
import zstandard

from protocol import payload
from protocol.errors import RemoteProtocolError, WireCode
from protocol.messages import Digests, DigestsWanted
from protocol.wire import decode
from replicator.enrolment import renewal_statement
from replicator.tokens import parse_token
from tests.protocol.second_implementation import Refused, decompress
from tests.protocol.test_spec import CONTROL, SPEC, Example

BLOCK_BYTES = 65_536


def examples(name: str) -> list[Example]:
    return [example for example in CONTROL if example.says["header"]["type"] == name]


def values(title: str) -> dict[str, str]:
    """The values of an example that has no frame."""
    found = re.search(rf"^#### {title}\n\n```json\n(.*?)\n```$", SPEC, re.DOTALL | re.MULTILINE)
    assert found is not None
    told: dict[str, str] = json.loads(found[1])
    return told


# ------------------------------------------------------------------ digests


def blocks_of(intervals: list[list[int]], block: int) -> list[tuple[int, int]]:
    return [(at, min(at + block, end)) for start, end in intervals for at in range(start, end, block)]


@pytest.mark.parametrize("example", examples("DIGESTS"), ids=lambda example: example.name)
def test_digests_are_those_of_the_blocks_that_are_told(example: Example) -> None:
    says: dict[str, Any] = example.says["message"]
    contents = [bytes.fromhex(pattern) * times for pattern, times in example.says["blocks"]]
    assert {len(content) for content in contents} == {BLOCK_BYTES}
    found = b"".join(xxhash.xxh3_128_intdigest(each, example.seed).to_bytes(16, "big") for each in contents)
    assert found.hex() == says["digests"]
    assert b"".join(xxhash.xxh3_128_digest(each, example.seed) for each in contents) == found
    holes = set(blocks_of(says["holes"], BLOCK_BYTES))
    assert len(contents) == len(set(blocks_of(says["intervals"], BLOCK_BYTES)) - holes)


def test_the_parts_of_an_answer_are_what_was_asked_for() -> None:
    (asked,) = (decode(DigestsWanted, example.frame[72:]) for example in examples("DIGESTS_WANTED"))
    parts = [decode(Digests, example.frame[72:]) for example in examples("DIGESTS")]
    assert {part.request for part in parts} == {asked.request}
    answered = [list(interval) for part in parts for interval in part.intervals]
    for later in range(len(answered) - 1, 0, -1):  # cut between two parts
        if answered[later - 1][1] == answered[later][0]:
            answered[later - 1 : later + 1] = [[answered[later - 1][0], answered[later][1]]]
    assert answered == [list(interval) for interval in asked.intervals]
    assert len(parts) > 1


# ------------------------------------------------------------------ token and statement


def test_the_token_is_made_as_told_and_read_by_the_product() -> None:
    told = values("Token")
    body = bytes.fromhex(told["id"] + told["secret"] + told["pin"])
    crc = struct.pack(">I", zlib.crc32(body))
    assert crc.hex() == told["crc"]
    text = base64.b64encode(body + crc, b"-_").decode().rstrip("=")
    assert told["token"] == f"rpl1.{text}"
    assert set("-_") & set(text), "an example that tells base64url from base64"
    token = parse_token(told["token"])
    assert (token.id.hex(), token.secret.hex(), token.pin.hex()) == (told["id"], told["secret"], told["pin"])
    assert token.to_text() == told["token"]


def test_the_renewal_statement_is_what_the_product_signs() -> None:
    told = values("Renewal statement")
    nonce, csr, certificate = (bytes.fromhex(told[name]) for name in ("nonce", "csr", "certificate"))
    digests = hashlib.sha256(csr).digest() + hashlib.sha256(certificate).digest()
    assert (b"replicator renewal v1" + nonce + digests).hex() == told["statement"]
    assert renewal_statement(nonce, csr, certificate).hex() == told["statement"]


# ------------------------------------------------------------------ blocks of a zstd frame


def zstd_frame(empty: int) -> bytes:
    """The frame that section 12.3 describes."""
    size = 32_768
    return (
        b"\x28\xb5\x2f\xfd\xa0"
        + struct.pack("<I", size)
        + bytes(3) * empty
        + (size << 3 | 1 << 1 | 1).to_bytes(3, "little")
        + b"A"
    )


def test_one_block_too_many_is_refused_by_both_implementations() -> None:
    content = b"A" * 32_768
    into = memoryview(bytearray(len(content)))
    allowed, over = zstd_frame(8_191), zstd_frame(8_192)
    assert decompress(allowed, len(content)) == content
    payload._decompress(memoryview(allowed), into, payload.new_decompressor())
    assert into == content
    assert zstandard.decompress(over) == content, "nothing else is wrong with it"
    with pytest.raises(Refused, match=r"protocol\.payload"):
        decompress(over, len(content))
    with pytest.raises(RemoteProtocolError) as caught:
        payload._decompress(memoryview(over), into, payload.new_decompressor())
    assert caught.value.code is WireCode.PAYLOAD
