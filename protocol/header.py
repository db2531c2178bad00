"""The header, the same on the wire and in the log: pack, unpack, and the one list of reasons to refuse it.

Not here: what may come when (``state.py``) and what is in a body (``messages.py``, ``payload.py``).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from xxhash import xxh3_64_intdigest

from protocol.constants import (
    DISK_MAX_BYTES,
    EXTENT_BYTES,
    HEADER_BYTES,
    MAGIC,
    RAW_MAX_BYTES,
    SECTOR_BYTES,
    TABLE_MAX_BYTES,
    VERSION,
)
from protocol.errors import RemoteProtocolError, WireCode

_FIELDS = struct.Struct("<4sHBBIIIIQQQQQ")  # all but header_hash
_HASH = struct.Struct("<Q")
assert _FIELDS.size + _HASH.size == HEADER_BYTES  # noqa: S101 - a layout error must stop the import


class FrameType(IntEnum):
    """Frame types of both conversations. 1-31 data, 32-63 join, 64 and up are the log's own records."""

    HELLO = 1
    WELCOME = 2
    OPEN = 3
    OPENED = 4
    ATTACH = 5
    ATTACHED = 6
    DATA = 7
    ACK = 8
    WANTED = 9
    DIGESTS_WANTED = 10
    DIGESTS = 11
    SEAL = 12
    SEALED = 13
    PING = 14
    PONG = 15
    FAIL = 16
    BYE = 17
    CA = 32
    JOIN = 33
    RENEW = 34
    JOINED = 35


class Flags(IntFlag):
    """Header flags."""

    NONE = 0
    ZSTD = 1  # the payload of a DATA frame is one zstd frame; without it, it is as it was read


@dataclass(frozen=True, slots=True)
class Header:
    """The header's fields but magic and header_hash; offsets in SPEC.md. Lengths and positions in bytes."""

    type: FrameType
    body_len: int
    flags: Flags = Flags.NONE
    version: int = VERSION
    table_len: int = 0
    raw_len: int = 0
    disk: int = 0
    epoch: int = 0
    cover_start: int = 0
    cover_end: int = 0
    raw_hash: int = 0
    body_hash: int = 0


_TYPES = {int(kind): kind for kind in FrameType}
_FLAGS = {0: Flags.NONE, 1: Flags.ZSTD}
_TYPE_AT = 6

UNSEEDED = frozenset({FrameType.HELLO, FrameType.WELCOME, FrameType.FAIL, FrameType.BYE})
"""Frames hashed with seed 0 always: a peer that has not read WELCOME, or cannot, sends and reads them too."""


def seed_for(kind: int, seed: int) -> int:
    """What frames of type ``kind`` are hashed with on a connection whose WELCOME named ``seed``."""
    return 0 if kind in UNSEEDED else seed


def pack(header: Header, seed: int) -> bytes:
    """The 72 bytes of a header, with its hash. ``seed``: the connection's; see ``seed_for``."""
    fields = _FIELDS.pack(
        MAGIC,
        header.version,
        header.type,
        header.flags,
        header.body_len,
        header.table_len,
        header.raw_len,
        header.disk,
        header.epoch,
        header.cover_start,
        header.cover_end,
        header.raw_hash,
        header.body_hash,
    )
    return fields + _HASH.pack(xxh3_64_intdigest(fields, seed_for(header.type, seed)))


def unpack(data: bytes | bytearray | memoryview, seed: int) -> Header:
    """Check and take apart 72 bytes: hash first, then every rule that a header alone can break.

    Raises:
        RemoteProtocolError: with the reason; nothing was allocated.
    """
    view = memoryview(data)
    if bytes(view[:4]) != MAGIC:
        raise RemoteProtocolError(WireCode.MAGIC, f"a frame starts with {bytes(view[:4])!r}, not {MAGIC!r}")
    expected = xxh3_64_intdigest(view[: _FIELDS.size], seed_for(view[_TYPE_AT], seed))
    if _HASH.unpack_from(view, _FIELDS.size)[0] != expected:
        raise RemoteProtocolError(WireCode.HEADER_HASH, "a header does not match its hash")
    _, version, kind, flags, *rest = _FIELDS.unpack_from(view)
    if version != VERSION:
        raise RemoteProtocolError(WireCode.VERSION, f"a frame has version {version}, this side {VERSION}")
    if kind not in _TYPES:
        raise RemoteProtocolError(WireCode.HEADER, f"unknown frame type {kind}")
    if flags not in _FLAGS:
        raise RemoteProtocolError(WireCode.HEADER, f"unknown flags {flags:#x}")
    body_len, table_len, raw_len, disk, epoch, cover_start, cover_end, raw_hash, body_hash = rest
    header = Header(
        _TYPES[kind],
        body_len,
        _FLAGS[flags],
        version,
        table_len,
        raw_len,
        disk,
        epoch,
        cover_start,
        cover_end,
        raw_hash,
        body_hash,
    )
    reason = invalid(header)
    if reason is not None:
        raise RemoteProtocolError(WireCode.HEADER, reason)
    return header


def invalid(header: Header) -> str | None:
    """Why a header cannot be right in any conversation, or None. Limits per type are in ``messages.py``."""
    if header.type is FrameType.DATA:
        return _invalid_data(header)
    if header.flags or header.table_len or header.raw_len or header.raw_hash:
        return f"{header.type.name} has payload fields, which only DATA has"
    if header.disk or header.epoch or header.cover_start or header.cover_end:
        return f"{header.type.name} names a disk or epoch in its header, which only DATA does"
    return None


def _invalid_data(header: Header) -> str | None:
    payload_len = header.body_len - header.table_len
    if header.table_len > TABLE_MAX_BYTES or header.table_len % EXTENT_BYTES:
        return f"extent table of {header.table_len} bytes: over {TABLE_MAX_BYTES} or not whole extents"
    if header.raw_len > RAW_MAX_BYTES or header.raw_len % SECTOR_BYTES:
        return f"payload of {header.raw_len} bytes raw: over {RAW_MAX_BYTES} or not whole sectors"
    if payload_len < 0:
        return f"body of {header.body_len} bytes is shorter than its table of {header.table_len}"
    if header.flags & Flags.ZSTD:
        if not 0 < payload_len < header.raw_len:
            return f"compressed payload of {payload_len} bytes for {header.raw_len} raw: empty or not smaller"
    elif payload_len != header.raw_len:
        return f"uncompressed payload of {payload_len} bytes announced as {header.raw_len}"
    if header.cover_start % SECTOR_BYTES or header.cover_end % SECTOR_BYTES:
        return f"cover [{header.cover_start}, {header.cover_end}) is not whole sectors"
    if not header.cover_start < header.cover_end <= DISK_MAX_BYTES:
        return f"cover [{header.cover_start}, {header.cover_end}) is empty, reversed or past the largest disk"
    return None
