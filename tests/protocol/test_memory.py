"""Bombs and forged lengths: refused before memory is spent on them.

Python's own memory is measured by tracemalloc; that of the zstd library, which tracemalloc does not see, by
the peak resident size of a process of its own.
"""

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol import header as head
from protocol.connection import Connection
from protocol.constants import CONTROL_MAX_BYTES, RAW_MAX_BYTES, TABLE_MAX_BYTES
from protocol.errors import ProtocolError, RemoteProtocolError, WireCode
from protocol.header import Flags, FrameType, Header
from protocol.messages import FRAME_TYPES
from protocol.state import TABLES, Direction, Role, State
from tests.protocol.conversations import SEED, at, frame_of, framed, refusal

ROOT = Path(__file__).resolve().parents[2]
SMALL_BYTES = 64 * 1024  # an exception, its text, a few objects
COUNT = b"\xff\xff\xff\xff"


def peak_of(action: Callable[[], object]) -> tuple[int, ProtocolError | None]:
    """Bytes allocated at most while something ran, and how it ended."""
    tracemalloc.start()
    try:
        error = refusal(action)
        return tracemalloc.get_traced_memory()[1], error
    finally:
        tracemalloc.stop()


def assert_refused_cheaply(
    connection: Connection, data: bytes, code: WireCode, most: int = SMALL_BYTES
) -> None:
    peak, error = peak_of(lambda: connection.receive_data(data, 0.0))
    assert isinstance(error, RemoteProtocolError)
    assert error.code is code
    assert peak < most


LISTS = {
    "OPEN disks": (FrameType.OPEN, b"\x01\x00g" + bytes(4 + 16 + 16) + b"\x01\x00" + bytes(8) + COUNT),
    "OPEN assignment": (FrameType.OPEN, b"\x01\x00g" + COUNT),
    "OPEN group": (FrameType.OPEN, b"\xff\xff"),
    "OPENED disks": (FrameType.OPENED, bytes(16 + 8 + 8) + COUNT),
    "OPENED intervals": (FrameType.OPENED, bytes(16 + 8 + 8) + b"\x01\0\0\0" + bytes(4) + COUNT),
    "ACK disks": (FrameType.ACK, bytes(16) + COUNT),
    "ACK intervals": (FrameType.ACK, bytes(16) + b"\x01\0\0\0" + bytes(4) + COUNT),
    "DIGESTS_WANTED intervals": (FrameType.DIGESTS_WANTED, bytes(12) + COUNT),
    "DIGESTS intervals": (FrameType.DIGESTS, bytes(4) + COUNT),
    "DIGESTS holes": (FrameType.DIGESTS, bytes(4 + 4) + COUNT),
    "DIGESTS digests": (FrameType.DIGESTS, bytes(4 + 4 + 4) + COUNT),
    "SEAL disks": (FrameType.SEAL, bytes(17) + COUNT),
    "SEAL intervals": (FrameType.SEAL, bytes(17) + b"\x01\0\0\0" + bytes(4) + COUNT),
    "CA certificate": (FrameType.CA, COUNT),
    "JOIN request": (FrameType.JOIN, bytes(24) + COUNT),
    "RENEW signature": (FrameType.RENEW, bytes(8) + COUNT),
    "JOINED certificate": (FrameType.JOINED, COUNT),
    "FAIL message": (FrameType.FAIL, b"\0\0\0\xff\xff"),
}


def home_of(kind: FrameType) -> Connection:
    """A connection that may receive this frame."""
    role, state = next(
        (role, state)
        for role, table in TABLES.items()
        for state, steps in table.items()
        if (Direction.RECEIVE, kind) in steps
    )
    return at(role, state)


@pytest.mark.parametrize(("kind", "body"), LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("padded", [False, True])
def test_a_count_of_four_billion_is_refused_before_a_list_is_made(
    kind: FrameType, body: bytes, padded: bool
) -> None:
    connection = home_of(kind)
    if padded:  # as much behind the count as the frame may hold
        body += bytes(1000)
    frame = framed(kind, body, connection.seed)
    assert_refused_cheaply(connection, frame, WireCode.MESSAGE)


def test_a_count_that_its_limit_allows_must_be_there_too() -> None:
    connection = at(Role.SENDER, State.OPEN)
    body = bytes(16) + b"\x01\0\0\0" + bytes(4) + (32 * 1024).to_bytes(4, "little") + bytes(16)
    assert_refused_cheaply(connection, framed(FrameType.ACK, body, SEED), WireCode.MESSAGE)


@pytest.mark.parametrize("kind", sorted(set(FrameType) - {FrameType.DATA}))
@pytest.mark.parametrize("length", [2**32 - 1, CONTROL_MAX_BYTES + 1])
def test_a_body_over_its_limit_is_refused_before_it_gets_memory(kind: FrameType, length: int) -> None:
    connection = home_of(kind)
    assert_refused_cheaply(connection, head.pack(Header(kind, length), connection.seed), WireCode.LIMIT)


@pytest.mark.parametrize(
    ("table_len", "raw_len", "code"),
    [
        (TABLE_MAX_BYTES + 16, 512, WireCode.HEADER),
        (2**32 - 16 - 512, 512, WireCode.HEADER),
        (16, RAW_MAX_BYTES + 512, WireCode.HEADER),
        (16, 2**32 - 1024, WireCode.HEADER),
    ],
)
def test_a_data_frame_over_its_limits_is_refused_before_it_gets_memory(
    table_len: int, raw_len: int, code: WireCode
) -> None:
    for flags in (Flags.NONE, Flags.ZSTD):
        header = Header(
            FrameType.DATA,
            table_len + raw_len - int(flags),
            flags,
            table_len=table_len,
            raw_len=raw_len,
            cover_end=1 << 20,
        )
        assert_refused_cheaply(at(Role.RECEIVER, State.ATTACHED), head.pack(header, SEED), code)


def test_a_data_frame_over_the_credit_is_refused_before_it_gets_memory() -> None:
    connection = at(Role.RECEIVER, State.ATTACHED)
    size = RAW_MAX_BYTES
    header = Header(FrameType.DATA, size, raw_len=size, cover_end=size)
    assert connection._window is not None
    connection._window.granted = size  # the header is not in it
    assert_refused_cheaply(connection, head.pack(header, SEED), WireCode.CREDIT)


def test_a_stranger_pins_less_than_64_kib() -> None:
    for role, state in (
        (Role.RECEIVER, State.START),
        (Role.JOINER, State.START),
        (Role.AUTHORITY, State.OFFERED),
    ):
        for way, kind in TABLES[role][state]:
            if way is Direction.RECEIVE:
                peak, _ = peak_of(lambda: hold_the_largest(role, state, kind))  # noqa: B023
                assert peak < 64 * 1024


def hold_the_largest(role: Role, state: State, kind: FrameType) -> int:
    """Feed the largest frame of a kind, but for its last byte; returns the bytes that are waited for."""
    connection = at(role, state)
    header = head.pack(Header(kind, FRAME_TYPES[kind].body_max), connection.seed)
    connection.receive_data(header, 0.0)
    while (left := len(connection.get_buffer()) - 1) > 0:
        connection.receive_data(bytes(min(left, 500)), 0.0)
    return len(connection.get_buffer())


def test_a_long_stream_in_small_pieces_takes_no_more_memory_than_its_frames() -> None:
    connection = at(Role.SENDER, State.OPEN)
    stream = frame_of(FrameType.PONG, SEED) * 20_000
    peak, error = peak_of(lambda: connection.receive_data(stream, 0.0))
    assert error is None
    assert peak < SMALL_BYTES


# ------------------------------------------------------------------ zstd, in a process of its own

PRELUDE = """
import struct, sys, zstandard
from protocol.constants import *
from protocol.errors import RemoteProtocolError
from protocol.header import *
from protocol.payload import *
from protocol.messages import Interval
SIZE = RAW_MAX_BYTES
decompressor = new_decompressor()
into = memoryview(bytearray(SIZE))
into[:] = b"x" * SIZE  # every page of it is there before we measure

def peak_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

def reset_peak_kib():
    # Not ru_maxrss: that begins with the peak of the process that started us.
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    return peak_kib()

def attempt(payload, raw_len=SIZE):
    table = pack_table([Extent(0, raw_len)])
    header = Header(FrameType.DATA, len(table) + len(payload), Flags.ZSTD, table_len=len(table),
                    raw_len=raw_len, cover_end=1 << 30)
    assert invalid(header) is None, invalid(header)
    try:
        unpack(header, memoryview(table + payload), into[:raw_len], decompressor, 0)
    except RemoteProtocolError as error:
        return error.code.value
    return "accepted"

compress = zstandard.ZstdCompressor(level=3, write_content_size=True).compress
warm = compress(b"y" * SIZE)
assert attempt(warm) == "protocol.raw_hash"
def rle(size, last): return (size << 3 | 1 << 1 | last).to_bytes(3, "little") + b"A"
BLOCK = 128 * 1024
def bomb(total): return b"".join(rle(BLOCK, at + BLOCK >= total) for at in range(0, total, BLOCK))
def single(size, blocks):
    return b"\\x28\\xb5\\x2f\\xfd" + bytes([0b10100000]) + struct.pack("<I", size) + blocks
def windowed(window, size, blocks):
    head = b"\\x28\\xb5\\x2f\\xfd" + bytes([0b10000000 if size is not None else 0, window])
    return head + (struct.pack("<I", size) if size is not None else b"") + blocks
"""

BOMBS = {
    "256 MiB, honest about it": "single(256 * MIB, bomb(256 * MIB))",
    "256 MiB announced as 4": "single(SIZE, bomb(256 * MIB))",
    "256 MiB without a size": "windowed(0x70, None, bomb(256 * MIB))",
    "256 MiB from the library": "compress(bytes(256 * MIB))",
    "256 MiB streamed, no size": "zstandard.ZstdCompressor().compressobj().compress(bytes(256 * MIB)) + b''",
    "4 MiB announced as 2 GiB": "single(2**31, bomb(SIZE))",
    "a window of 16 MiB": "windowed(0x70, SIZE, bomb(SIZE))",
    "a window of 2 GiB": "windowed(0xA8, SIZE, bomb(SIZE))",
    "two frames of 4 MiB": "warm + warm",
    "a thousand frames": "warm * 1000",
    "trailing data": "warm + bytes(3 * MIB)",
    "a million empty blocks": "single(SIZE, bytes(3) * 1_000_000 + bomb(SIZE))",
}


@pytest.mark.parametrize("payload", BOMBS.values(), ids=BOMBS.keys())
def test_a_zstd_bomb_is_refused_within_the_memory_of_one_frame(payload: str) -> None:
    script = f"""{PRELUDE}
payload = {payload}
before_kib = reset_peak_kib()
end = attempt(payload)
grown_kib = peak_kib() - before_kib
print(end, grown_kib)
"""
    # Making the bomb may itself take hundreds of MiB: those are made by another process.
    if "compress" in payload and "MIB" in payload:
        script = script.replace(f"payload = {payload}", "payload = sys.stdin.buffer.read()")
        made = run(f"{PRELUDE}\nsys.stdout.buffer.write({payload})")
        end, grown_kib = run(script, made).split()
    else:
        end, grown_kib = run(script).split()
    assert end == b"protocol.payload"
    print("grown KiB", int(grown_kib))
    assert int(grown_kib) < 8 * 1024  # two of the largest frames


def run(script: str, standard_input: bytes = b"") -> bytes:
    done = subprocess.run(
        [sys.executable, "-c", script], input=standard_input, cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_the_measure_sees_a_bomb_that_goes_off() -> None:
    """Without the checks before it, the library does grow: so the figures above mean something."""
    script = f"""{PRELUDE}
payload = single(256 * MIB, bomb(256 * MIB))
before_kib = reset_peak_kib()
zstandard.ZstdDecompressor().decompress(payload, max_output_size=SIZE)
print(peak_kib() - before_kib)
"""
    assert int(run(script)) > 200 * 1024
