"""A second decoder of the wire format, written from protocol/SPEC.md alone.

It shares nothing with the product: where the two disagree, one of them or the specification is wrong. It
decodes what one side of a connection receives (or sends) and keeps that side's state, seed and credit.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import TypeAlias

import xxhash
import zstandard

Value: TypeAlias = "int | str | bytes | list[Value] | dict[str, Value]"
Message: TypeAlias = "dict[str, Value]"

SECTOR = 512
DISK_MAX = 2**63 - SECTOR
RAW_MAX = 4_194_304
TABLE_MAX = 262_144
WINDOW_MAX = 8_388_608
BLOCKS_MAX = 8_192

HEADER = struct.Struct("<4sHBBIIIIQQQQQQ")
ONLY_DATA = ("table_len", "raw_len", "disk", "epoch", "cover_start", "cover_end", "raw_hash")
HEADER_FIELDS = ("version", "type", "flags", "body_len", *ONLY_DATA, "body_hash", "header_hash")
ENTRY = struct.Struct("<QII")
DATA = 7
LIMIT_DATA = RAW_MAX + TABLE_MAX

MIB = 1_048_576
PARTS = "intervals:intervals<=16384"
COVERAGES = "disks:list<=256 of DiskCoverage"
IDS = "group:text<=255, assignment:bytes<=4096, epoch:bytes[16], parent:bytes[16]"
MODE = "mode:u8 Mode"
SESSION = "session:bytes[16], epoch_number:u64"
CYCLE = f"{IDS}, {MODE}, consistency:u8 Consistency"
PROSE = "message:text<=2048, cause:text<=2048, fix:text<=2048"

# Type: name, limit of the body, fields (section 4.2).
LAYOUTS: dict[int, tuple[str, int, str]] = {
    1: ("HELLO", 1024, "version_min:u16, version_max:u16, capabilities:u64, agent:text<=64"),
    2: ("WELCOME", 1024, "version:u16, capabilities:u64, hash_seed:u64, streams_max:u8, agent:text<=64"),
    3: ("OPEN", MIB, f"{CYCLE}, last_ack:u64, disks:list<=256 of OpenDisk"),
    4: ("OPENED", MIB, f"{SESSION}, credit:u64, {COVERAGES}, {MODE}, sealed:bytes[16]"),
    5: ("ATTACH", 1024, "session:bytes[16]"),
    6: ("ATTACHED", 1024, ""),
    8: ("ACK", MIB, f"sequence:u64, credit:u64, {COVERAGES}"),
    9: ("WANTED", 1024, "disk:u32, start:u64, end:u64"),
    10: ("DIGESTS_WANTED", MIB, f"request:u32, disk:u32, block:u32, {PARTS}"),
    11: ("DIGESTS", MIB, f"request:u32, {PARTS}, holes:intervals<=16384, digests:bytes<=393216"),
    12: ("SEAL", MIB, f"epoch:bytes[16], fuzzy:bool, {COVERAGES}"),
    13: ("SEALED", 1024, "epoch:bytes[16], recovery_point:bytes[16]"),
    14: ("PING", 1024, "nonce:u64"),
    15: ("PONG", 1024, "nonce:u64"),
    16: ("FAIL", 16_384, f"code:text<=64, retry:u8 Retry, {PROSE}"),
    17: ("BYE", 1024, ""),
    32: ("CA", 32_768, "certificate:bytes<=8192, nonce:bytes[32]"),
    33: ("JOIN", 32_768, "token:bytes[8], secret:bytes[16], csr:bytes<=8192"),
    34: ("RENEW", 32_768, "certificate:bytes<=8192, csr:bytes<=8192, signature:bytes<=1024"),
    35: ("JOINED", 32_768, "certificate:bytes<=8192, server:text<=64"),
}
RECORDS = {
    "DiskCoverage": "disk:u32, intervals:intervals<=32768",
    "OpenDisk": "name:text<=255, size:u64, snapshot_time_ns:u64",
}
ENUMERATIONS: dict[str, dict[int, bool | str]] = {
    "Consistency": {0: "FUZZY", 1: "PER_DISK", 2: "CRASH", 3: "APPLICATION"},
    "Mode": {1: "FULL", 2: "RESYNC", 3: "INCREMENTAL"},
    "Retry": {0: "STOP", 1: "LATER"},
}
SEED_ZERO = {1, 2, 16, 17}  # HELLO, WELCOME, FAIL, BYE: also header version 1 for ever
LATER = {"protocol.header_hash", "protocol.body_hash", "protocol.raw_hash", "protocol.slow"}

# Sections 6 and 7, as the connecting side sees them; the accepting side sees `!` and `?` swapped.
SENDER = """
start !HELLO greeted, greeted ?WELCOME ready, ready !OPEN opening, ready !ATTACH attaching,
opening ?OPENED open, open ?ACK open, open ?WANTED open, open !DIGESTS_WANTED open, open ?DIGESTS open,
open !SEAL sealing, sealing ?ACK sealing, sealing ?WANTED sealing, sealing ?DIGESTS sealing,
sealing ?SEALED sealed, sealed !OPEN opening, attaching ?ATTACHED attached,
attached !DATA attached
"""
JOINER = "start ?CA offered, offered !JOIN asking, offered !RENEW asking, asking ?JOINED joined"
AFTER_WELCOME = {"ready", "opening", "open", "sealing", "sealed", "attaching", "attached"}


class Refused(Exception):
    """The frame is refused with this code (section 9)."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code = code
        self.later = code in LATER


def demand(condition: bool, code: str, why: str) -> None:
    """Refuse what does not hold."""
    if not condition:
        raise Refused(f"protocol.{code}", why)


def transitions(text: str) -> dict[tuple[str, str], str]:
    """The table of one of the diagrams: state and marked name to the next state."""
    steps = (step.split() for step in text.split(","))
    return {(before, marked): after for before, marked, after in steps}


TABLES = {"data": transitions(SENDER), "join": transitions(JOINER)}


@dataclass(frozen=True)
class Frame:
    """One decoded frame; `message` for control frames, `extents` and `raw` for DATA."""

    name: str
    header: dict[str, int]
    message: Message
    extents: list[tuple[int, int, bool]] = field(default_factory=list)
    raw: bytes = b""


class Body:
    """A control body that is read from front to back (section 4)."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        demand(count <= len(self.data) - self.at, "message", "it ends inside a field")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def count(self, size: int, most: int, each: int) -> int:
        """A count or length, checked against its limit and what is left."""
        count = self.number(size)
        demand(count <= most, "message", "over its limit")
        demand(count * each <= len(self.data) - self.at, "message", "it ends inside a field")
        return count


def read_intervals(body: Body, most: int) -> list[Value]:
    found: list[Value] = []
    last = -1
    for _ in range(body.count(4, most, 16)):
        start, end = body.number(8), body.number(8)
        demand(start % SECTOR == 0 and end % SECTOR == 0, "message", "not in sectors")
        demand(start < end <= DISK_MAX, "message", "empty, reversed or too far")
        demand(start > last, "message", "unsorted, overlapping or touching")
        last = end
        found.append([start, end])
    return found


def read_text(body: Body, most: int) -> str:
    try:
        return body.take(body.count(2, most, 1)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("protocol.message", "not UTF-8") from error


def read_value(body: Body, kind: str) -> Value:
    """One field, by its type as section 4.1 writes it."""
    if number := re.fullmatch(r"u(8|16|32|64)", kind):
        return body.number(int(number[1]) // 8)
    if kind == "bool" or kind.startswith("u8 "):
        values = {0: False, 1: True} if kind == "bool" else ENUMERATIONS[kind.removeprefix("u8 ")]
        value = body.number(1)
        demand(value in values, "message", f"no such {kind}")
        return values[value]
    if exact := re.fullmatch(r"bytes\[(\d+)\]", kind):
        return body.take(int(exact[1]))
    limited = re.fullmatch(r"(bytes|text|intervals|list)<=(\d+)(?: of (\w+))?", kind)
    assert limited, kind
    most = int(limited[2])
    if limited[1] == "bytes":
        return body.take(body.count(4, most, 1))
    if limited[1] == "text":
        return read_text(body, most)
    if limited[1] == "intervals":
        return read_intervals(body, most)
    return [read_fields(body, RECORDS[limited[3]]) for _ in range(body.count(4, most, 1))]


def read_fields(body: Body, fields: str) -> Message:
    pairs = (each.split(":") for each in fields.split(", ") if each)
    return {name: read_value(body, kind) for name, kind in pairs}


def read_message(kind: int, data: bytes) -> Message:
    """Step 11."""
    body = Body(data)
    message = read_fields(body, LAYOUTS[kind][2])
    demand(body.at == len(data), "message", "bytes left over")
    return message


def read_extents(header: dict[str, int], table: bytes) -> list[tuple[int, int, bool]]:
    """Step 14."""
    extents = []
    last, length_sum = header["cover_start"], 0
    for offset, length, flags in ENTRY.iter_unpack(table):
        demand(flags in (0, 1), "table", "unknown flag")
        demand(offset % SECTOR == 0 and length % SECTOR == 0 and length > 0, "table", "not in sectors")
        demand(last <= offset and offset + length <= header["cover_end"], "table", "overlap, order or cover")
        last = offset + length
        length_sum += 0 if flags else length
        extents.append((offset, length, flags == 1))
    demand(length_sum == header["raw_len"], "table", "does not add up")
    return extents


def zstd_header(payload: bytes, raw_len: int) -> tuple[int, bool]:
    """The zstd frame header's length, and whether a checksum follows the blocks."""
    demand(len(payload) >= 5 and payload[:4] == b"\x28\xb5\x2f\xfd", "payload", "no zstd frame")
    flags = payload[4]
    single, dictionary = flags >> 5 & 1, (0, 1, 2, 4)[flags & 3]
    at = 5 if single else 6
    size_len = (1 if single else 0, 2, 4, 8)[flags >> 6]
    demand(size_len > 0 and len(payload) >= at + dictionary + size_len, "payload", "no content size")
    demand(not any(payload[at : at + dictionary]), "payload", "a dictionary")
    demand(not flags & 8, "payload", "reserved bit")
    at += dictionary + size_len
    size = int.from_bytes(payload[at - size_len : at], "little") + (256 if size_len == 2 else 0)
    demand(size == raw_len, "payload", "wrong content size")
    if not single:
        window = 1 << 10 + (payload[5] >> 3)
        demand(window + window // 8 * (payload[5] & 7) <= WINDOW_MAX, "payload", "window")
    return at, bool(flags & 4)


def decompress(payload: bytes, raw_len: int) -> bytes:
    """Step 15: the frame's structure first, its content then."""
    at, checksum = zstd_header(payload, raw_len)
    blocks, last = 0, False
    while not last:
        demand(len(payload) >= at + 3, "payload", "it ends inside a block header")
        block = int.from_bytes(payload[at : at + 3], "little")
        last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        demand(kind != 3, "payload", "reserved block type")
        at += 3 + (1 if kind == 1 else size)
        blocks += 1
        demand(blocks <= BLOCKS_MAX, "payload", "blocks")
    demand(at + (4 if checksum else 0) == len(payload), "payload", "length")
    try:
        raw = zstandard.ZstdDecompressor().decompress(payload, max_output_size=raw_len)
    except zstandard.ZstdError as error:
        raise Refused("protocol.payload", str(error)) from error
    demand(len(raw) == raw_len, "payload", "another length than announced")
    return raw


def check_data_header(header: dict[str, int]) -> None:
    """Step 6 for DATA."""
    table_len, raw_len = header["table_len"], header["raw_len"]
    demand(table_len <= TABLE_MAX and table_len % ENTRY.size == 0, "header", "table_len")
    demand(raw_len <= RAW_MAX and raw_len % SECTOR == 0, "header", "raw_len")
    sent = header["body_len"] - table_len
    fits = 1 <= sent < raw_len if header["flags"] else sent == raw_len
    demand(fits, "header", "body_len")
    start, end = header["cover_start"], header["cover_end"]
    demand(start % SECTOR == 0 and end % SECTOR == 0 and start < end <= DISK_MAX, "header", "cover")


@dataclass
class Epoch:
    """What step 13 needs to know: the epoch that is open, its disks' sizes, and what was covered."""

    number: int
    sizes: dict[int, int]
    covered: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def arrives(self, header: dict[str, int]) -> bool:
        """Add a new cover (True) or find a duplicate (False); anything else is refused."""
        disk, start, end = header["disk"], header["cover_start"], header["cover_end"]
        known = header["epoch"] == self.number and disk in self.sizes and end <= self.sizes[disk]
        demand(known, "coverage", "epoch, disk or size")
        covers = self.covered.setdefault(disk, [])
        old = sum(max(0, min(end, e) - max(start, s)) for s, e in covers)
        demand(old in (0, end - start), "coverage", "partial overlap")
        covers += [(start, end)] if old == 0 else []
        return old == 0

    def wanted(self, disk: int, start: int, end: int) -> None:
        """The stretch leaves the coverage."""
        cut = [part for s, e in self.covered[disk] for part in ((s, min(e, start)), (max(s, end), e))]
        self.covered[disk] = [(s, e) for s, e in cut if s < e]


@dataclass
class Side:
    """One side of a connection (sections 6, 7, 9): its state, the decoder of what it receives and sends."""

    role: str
    state: str = "start"
    seed: int = 0
    version: int = 1
    offered: tuple[int, int] = (1, 1)
    credit: int | None = None
    epoch: Epoch | None = None

    def decode(self, data: bytes, *, sent: bool = False) -> tuple[list[Frame], bytes]:
        """Complete frames, and the beginning of one that is not; Refused at the first that must be."""
        frames = []
        while self.state != "closed" and len(data) >= HEADER.size:
            header = self.check_header(data[: HEADER.size], sent=sent)
            end = HEADER.size + header["body_len"]
            if len(data) < end:
                break
            frames.append(self.check_body(header, data[HEADER.size : end], sent=sent))
            self.state = self.after(frames[-1].name, sent=sent)
            data = data[end:]
        return frames, b"" if self.state == "closed" else data

    def after(self, name: str, *, sent: bool) -> str:
        """Step 7: the state that follows a frame, or its refusal."""
        if name in ("FAIL", "BYE") and self.state != "closed":
            return "closed"
        if name in ("PING", "PONG") and self.state in AFTER_WELCOME:
            return self.state
        mirrored = self.role in ("receiver", "authority")
        marked = ("!" if sent != mirrored else "?") + name
        table = TABLES["data" if self.role in ("sender", "receiver") else "join"]
        demand((self.state, marked) in table, "state", f"{name} in {self.state}")
        return table[self.state, marked]

    def seed_of(self, kind: int) -> int:
        return 0 if kind in SEED_ZERO else self.seed

    def check_header(self, data: bytes, *, sent: bool) -> dict[str, int]:
        """Steps 1 to 9."""
        demand(data[:4] == b"RPLF", "magic", "not a frame")
        values = HEADER.unpack(data)
        header: dict[str, int] = dict(zip(HEADER_FIELDS, values[1:], strict=True))
        kind = header["type"]
        expected = xxhash.xxh3_64_intdigest(data[:64], self.seed_of(kind))
        demand(header["header_hash"] == expected, "header_hash", "header")
        demand(header["version"] == (1 if kind in SEED_ZERO else self.version), "version", "header")
        demand(kind == DATA or kind in LAYOUTS, "header", "type")
        demand(header["flags"] <= (1 if kind == DATA else 0), "header", "flags")
        if kind == DATA:
            check_data_header(header)
        else:
            demand(not any(header[name] for name in ONLY_DATA), "header", "fields of DATA")
        self.after("DATA" if kind == DATA else LAYOUTS[kind][0], sent=sent)
        limit = LIMIT_DATA if kind == DATA else LAYOUTS[kind][1]
        demand(header["body_len"] <= limit, "limit", "body_len")
        if kind == DATA and self.credit is not None:
            demand(HEADER.size + header["body_len"] <= self.credit, "credit", "exceeded")
        return header

    def check_body(self, header: dict[str, int], body: bytes, *, sent: bool) -> Frame:
        """Steps 10 to 16."""
        kind = header["type"]
        hashed = xxhash.xxh3_64_intdigest(body, self.seed_of(kind))
        demand(header["body_hash"] == hashed, "body_hash", "body")
        if kind == DATA:
            return self.check_data(header, body)
        message = read_message(kind, body)
        if kind == 1:
            self.hello(message, sent=sent)
        elif kind == 2:
            self.welcome(message)
        return Frame(LAYOUTS[kind][0], header, message)

    def hello(self, message: Message, *, sent: bool) -> None:
        """Step 12. A receiver's `offered` is what it speaks; who sees HELLO sent learns what was offered."""
        low, high = message["version_min"], message["version_max"]
        assert isinstance(low, int) and isinstance(high, int)
        if sent:
            self.offered = low, high
        else:
            demand(max(low, self.offered[0]) <= min(high, self.offered[1]), "version", "none in common")

    def welcome(self, message: Message) -> None:
        """Step 12, and the seed and version of everything behind it."""
        version, seed = message["version"], message["hash_seed"]
        assert isinstance(version, int) and isinstance(seed, int)
        demand(self.offered[0] <= version <= self.offered[1], "version", "not offered")
        self.version, self.seed = version, seed

    def check_data(self, header: dict[str, int], body: bytes) -> Frame:
        """Steps 13 to 16; a duplicate is dropped: it comes out without extents and bytes."""
        if self.credit is not None:
            self.credit -= HEADER.size + len(body)
        if self.epoch and not self.epoch.arrives(header):
            return Frame("DATA", header, {})
        table, payload = body[: header["table_len"]], body[header["table_len"] :]
        extents = read_extents(header, table)
        raw = decompress(payload, header["raw_len"]) if header["flags"] else payload
        proof = header["disk"].to_bytes(4, "little") + table + raw
        demand(header["raw_hash"] == xxhash.xxh3_64_intdigest(proof, self.seed), "raw_hash", "placement")
        return Frame("DATA", header, {}, extents, raw)
