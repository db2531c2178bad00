"""The body of DATA: an extent table, then the payload, raw or one zstd frame.

Everything that a peer could forge is checked here before memory is spent on it: the table, the size that the
zstd frame announces, the end of that frame. Disk sizes and coverage are the receiver's business.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import zstandard
from xxhash import xxh3_64

from protocol.constants import (
    EXTENT_MAX_BYTES,
    HEADER_BYTES,
    SECTOR_BYTES,
    ZSTD_BLOCKS_MAX,
    ZSTD_WINDOW_MAX_BYTES,
)
from protocol.errors import LocalProtocolError, RemoteProtocolError, WireCode
from protocol.header import Flags, FrameType, Header, invalid, pack
from protocol.messages import Interval

_ENTRY = "QII"
_EXTENT_ZERO = 1
_ENTRIES = struct.Struct(f"<{_ENTRY}")
_DISK = struct.Struct("<I")

_ZSTD_BLOCK_HEADER_BYTES = 3
_ZSTD_RLE_BLOCK = 1


class Extent(NamedTuple):
    """Bytes [offset, offset + length) of a disk, multiples of 512; ``zero``: all zeros, without payload."""

    offset: int
    length: int
    zero: bool = False

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class DataFrame:
    """A DATA frame ready for the wire (and the log): three pieces, never joined."""

    header: Header
    header_bytes: bytes
    table: bytes
    payload: bytes | memoryview

    @property
    def wire_bytes(self) -> int:
        """What it costs of the credit."""
        return HEADER_BYTES + self.header.body_len


def raw_hash(disk: int, table: bytes | memoryview, raw: bytes | memoryview, seed: int) -> int:
    """The end-to-end hash: which disk, where, and what. XXH3-64."""
    state = xxh3_64(_DISK.pack(disk), seed)
    state.update(table)
    state.update(raw)
    return state.intdigest()


def pack_table(extents: Sequence[Extent]) -> bytes:
    """The extent table: u64 offset, u32 length, u32 flags each."""
    return struct.pack("<" + _ENTRY * len(extents), *chain.from_iterable(extents))


def build(
    disk: int,
    epoch: int,
    cover: Interval,
    extents: Sequence[Extent],
    raw: memoryview,
    compressor: zstandard.ZstdCompressor | None,
    seed: int,
) -> DataFrame:
    """Make a DATA frame of ``raw``, the bytes of the extents that are not zero, one after the other.

    The payload is compressed if a compressor is given and it pays; otherwise it *is* ``raw``, which the
    caller keeps alive until it is sent. A compressor belongs to one thread at a time.

    Raises:
        LocalProtocolError: the arguments break a rule of SPEC.md.
    """
    try:
        table = pack_table(extents)
        content_hash = raw_hash(disk, table, raw, seed)
    except struct.error as error:
        raise LocalProtocolError(f"a disk number, offset or length does not fit its field: {error}") from None
    flags = Flags.NONE
    payload: bytes | memoryview = raw
    if compressor is not None and len(raw):
        compressed = compressor.compress(raw)
        if len(compressed) < len(raw) - len(raw) // 32:  # less than 3 % is not worth the other side's CPU
            flags, payload = Flags.ZSTD, compressed
    body_state = xxh3_64(table, seed)
    body_state.update(payload)
    header = Header(
        FrameType.DATA,
        body_len=len(table) + len(payload),
        flags=flags,
        table_len=len(table),
        raw_len=len(raw),
        disk=disk,
        epoch=epoch,
        cover_start=cover.start,
        cover_end=cover.end,
        raw_hash=content_hash,
        body_hash=body_state.intdigest(),
    )
    reason = invalid(header) or _invalid_extents(extents, header)
    if reason is not None:
        raise LocalProtocolError(reason)
    return DataFrame(header, pack(header, seed), table, payload)


def parse_table(header: Header, body: memoryview) -> list[Extent]:
    """The extents of a DATA body, checked against the header.

    Raises:
        RemoteProtocolError: they are unsorted, overlap, leave the cover, or do not add up to ``raw_len``.
    """
    extents = []
    for offset, length, flags in _ENTRIES.iter_unpack(body[: header.table_len]):
        if flags > _EXTENT_ZERO:
            raise RemoteProtocolError(WireCode.TABLE, f"extent at {offset} has unknown flags {flags:#x}")
        extents.append(Extent(offset, length, flags == _EXTENT_ZERO))
    reason = _invalid_extents(extents, header)
    if reason is not None:
        raise RemoteProtocolError(WireCode.TABLE, reason)
    return extents


def _invalid_extents(extents: Sequence[Extent], header: Header) -> str | None:
    position, raw_len = header.cover_start, 0
    for offset, length, zero in extents:
        if not position <= offset < offset + length <= header.cover_end:
            return f"extent [{offset}, {offset + length}) is empty, unsorted or outside the cover"
        if (offset | length) % SECTOR_BYTES or length > EXTENT_MAX_BYTES:
            return f"extent [{offset}, {offset + length}) is not whole sectors or too long"
        position = offset + length
        raw_len += 0 if zero else length
    if raw_len != header.raw_len:
        return f"extents with bytes add up to {raw_len}, the header says {header.raw_len}"
    return None


def new_compressor(level: int) -> zstandard.ZstdCompressor:
    """A compressor whose frames state their size. For one thread at a time."""
    return zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)


def new_decompressor() -> zstandard.ZstdDecompressor:
    """A decompressor; what it may be given is checked in ``unpack``. For one thread at a time."""
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_MAX_BYTES)


def unpack(
    header: Header,
    body: memoryview,
    into: memoryview | None,
    decompressor: zstandard.ZstdDecompressor,
    seed: int,
) -> tuple[list[Extent], memoryview]:
    """Extents and raw bytes of a DATA frame, verified end to end.

    ``body`` has matched its hash already. ``into`` is writable memory of ``raw_len`` bytes, needed when the
    payload is compressed; otherwise the result lies in ``body``, without a copy.

    Raises:
        RemoteProtocolError: table, payload or raw hash do not hold; ``into`` may hold rubbish.
    """
    extents = parse_table(header, body)
    raw = body[header.table_len :]
    if header.flags & Flags.ZSTD:
        if into is None or len(into) != header.raw_len:
            raise LocalProtocolError(f"memory of {header.raw_len} bytes is needed for this frame")
        _decompress(raw, into, decompressor)
        raw = into
    if raw_hash(header.disk, body[: header.table_len], raw, seed) != header.raw_hash:
        raise RemoteProtocolError(WireCode.RAW_HASH, "content does not match the hash made where it was read")
    return extents, raw


def _decompress(payload: memoryview, into: memoryview, decompressor: zstandard.ZstdDecompressor) -> None:
    try:
        announced = zstandard.get_frame_parameters(payload)
        if announced.content_size != len(into):
            raise RemoteProtocolError(
                WireCode.PAYLOAD,
                f"the zstd frame announces {announced.content_size} bytes, the header {len(into)}",
            )
        if announced.window_size > ZSTD_WINDOW_MAX_BYTES:  # the library looks at it only when it streams
            raise RemoteProtocolError(
                WireCode.PAYLOAD, f"the zstd frame wants a window of {announced.window_size} bytes"
            )
        length = zstd_frame_length(payload)
        if length != len(payload):
            raise RemoteProtocolError(
                WireCode.PAYLOAD, f"the zstd frame ends after {length} of {len(payload)} bytes"
            )
        with decompressor.stream_reader(payload, closefd=False) as reader:
            if reader.readinto(into) != len(into):
                raise RemoteProtocolError(WireCode.PAYLOAD, "the zstd frame ends early")
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(WireCode.PAYLOAD, f"the zstd frame is damaged: {error}") from None


def zstd_frame_length(payload: memoryview) -> int:
    """Bytes that the first zstd frame of ``payload`` occupies, read from its block headers alone.

    Returns more than ``len(payload)`` for a frame that is cut off. Source: RFC 8878, 3.1.1.

    Raises:
        RemoteProtocolError: there is no such frame, or it has more blocks than any honest one.
    """
    try:
        position = zstandard.frame_header_size(payload)
    except zstandard.ZstdError as error:
        raise RemoteProtocolError(WireCode.PAYLOAD, f"no zstd frame: {error}") from None
    checksum = 4 if payload[4] & 0b100 else 0
    for _ in range(ZSTD_BLOCKS_MAX):
        head = int.from_bytes(payload[position : position + _ZSTD_BLOCK_HEADER_BYTES], "little")
        if position + _ZSTD_BLOCK_HEADER_BYTES > len(payload):
            return len(payload) + 1
        kind, size = head >> 1 & 3, head >> 3
        position += _ZSTD_BLOCK_HEADER_BYTES + (1 if kind == _ZSTD_RLE_BLOCK else size)
        if head & 1:  # the last block
            return position + checksum
    raise RemoteProtocolError(WireCode.PAYLOAD, f"the zstd frame has more than {ZSTD_BLOCKS_MAX} blocks")
