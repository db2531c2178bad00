"""One frozen dataclass per control message, and the table of all frame types.

Field order is wire order (``wire.py``). DATA is not here: its body is binary and large (``payload.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, NamedTuple, TypeAlias

from protocol.constants import (
    CONTROL_MAX_BYTES,
    DISKS_MAX,
    FAIL_MAX_BYTES,
    GREETING_MAX_BYTES,
    JOIN_MAX_BYTES,
    NONCE_BYTES,
    RAW_MAX_BYTES,
    TABLE_MAX_BYTES,
    VERSION,
)
from protocol.header import FrameType
from protocol.wire import U8, U16, U32, U64, Choice, Fixed, Flag, Id, Intervals, Items, Name, Opaque, Text
from protocol.wire import Interval as Interval

NO_ID = bytes(16)  # "no parent", "no recovery point"
COVERAGE_INTERVALS_MAX = 32 * 1024  # 512 KiB: half of a control message
DIGEST_INTERVALS_MAX = 16 * 1024  # 256 KiB: with the holes and digests of an answer it fits a control message
_DER = Opaque(8 * 1024)  # one certificate or request; RSA-4096 with every extension stays under 3 KiB
_PROSE = Text(2048)


class Mode(IntEnum):
    """What an epoch says of the bytes that it does not name."""

    FULL = 1  # nothing: every byte of every disk is stated
    RESYNC = 2  # as the target's digests showed them
    INCREMENTAL = 3  # as in the parent epoch


class Consistency(IntEnum):
    """What a recovery point of the epoch would be worth."""

    FUZZY = 0  # read from a live disk: moves the data, makes no recovery point
    PER_DISK = 1
    CRASH = 2
    APPLICATION = 3


class Retry(IntEnum):
    """What the peer that sent FAIL thinks of another try."""

    STOP = 0  # the same request will fail again until somebody changes something
    LATER = 1  # the same request may succeed later


@dataclass(frozen=True, slots=True)
class Hello:
    """First frame of the data conversation. ``agent`` is for people's eyes."""

    version_min: U16 = VERSION
    version_max: U16 = VERSION
    capabilities: U64 = 0
    agent: Annotated[str, Text(64)] = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The sender is accepted. Frames after this one are hashed with ``hash_seed``."""

    version: U16
    capabilities: U64
    hash_seed: U64
    streams_max: U8
    agent: Annotated[str, Text(64)] = ""


@dataclass(frozen=True, slots=True)
class OpenDisk:
    """A disk of the group: size in bytes, snapshot time in ns since 1970 UTC (0: none)."""

    name: Name
    size: U64
    snapshot_time_ns: U64 = 0


@dataclass(frozen=True, slots=True)
class Open:
    """Begins, or goes on with, an epoch of a group. ``last_ack``: highest ACK sequence seen of this epoch."""

    group: Name
    assignment: Annotated[bytes, Opaque(4096)]
    epoch: Id
    parent: Id
    mode: Annotated[Mode, Choice(Mode)]
    consistency: Annotated[Consistency, Choice(Consistency)]
    last_ack: U64
    disks: Annotated[tuple[OpenDisk, ...], Items(OpenDisk, DISKS_MAX)]


@dataclass(frozen=True, slots=True)
class DiskCoverage:
    """What is durable of a disk (by its number)."""

    disk: U32
    intervals: Annotated[tuple[Interval, ...], Intervals(COVERAGE_INTERVALS_MAX)]


@dataclass(frozen=True, slots=True)
class Opened:
    """The epoch is under way: what is durable of each disk, in OPEN's order, and what is still to be said.

    ``credit``: bytes of DATA frames allowed so far in all. ``mode``: what the epoch shall say, chosen by the
    target. ``sealed``: the group's newest sealed epoch there.
    """

    session: Id
    epoch_number: U64
    credit: U64
    disks: Annotated[tuple[DiskCoverage, ...], Items(DiskCoverage, DISKS_MAX)]
    mode: Annotated[Mode, Choice(Mode)] = Mode.FULL
    sealed: Id = NO_ID


@dataclass(frozen=True, slots=True)
class Attach:
    """Makes this connection a data stream of a session."""

    session: Id


@dataclass(frozen=True, slots=True)
class Attached:
    """The stream may carry DATA."""


@dataclass(frozen=True, slots=True)
class Ack:
    """These intervals became durable since the last ACK; ``credit`` as in OPENED. Sequence counts from 1."""

    sequence: U64
    credit: U64
    disks: Annotated[tuple[DiskCoverage, ...], Items(DiskCoverage, DISKS_MAX)]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Send this stretch again: what came did not verify."""

    disk: U32
    start: U64
    end: U64


@dataclass(frozen=True, slots=True)
class DigestsWanted:
    """Asks for the digests of what the target holds in the intervals, one per ``block`` bytes."""

    request: U32
    disk: U32
    block: U32
    intervals: Annotated[tuple[Interval, ...], Intervals(DIGEST_INTERVALS_MAX)]


@dataclass(frozen=True, slots=True)
class Digests:
    """The next part of an answer: ``intervals`` follow on those answered before.

    ``digests``: XXH3-128, 16 bytes each, of the blocks of the intervals that are not in ``holes``, in order.
    """

    request: U32
    intervals: Annotated[tuple[Interval, ...], Intervals(DIGEST_INTERVALS_MAX)]
    holes: Annotated[tuple[Interval, ...], Intervals(DIGEST_INTERVALS_MAX)]
    digests: Annotated[bytes, Opaque(384 * 1024)]


@dataclass(frozen=True, slots=True)
class Seal:
    """Everything was sent and acknowledged: close the epoch. ``fuzzy``: the source changed meanwhile."""

    epoch: Id
    fuzzy: Flag
    disks: Annotated[tuple[DiskCoverage, ...], Items(DiskCoverage, DISKS_MAX)]


@dataclass(frozen=True, slots=True)
class Sealed:
    """The epoch is whole, verified and durable. ``recovery_point`` is all zeros when it made none."""

    epoch: Id
    recovery_point: Id


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a sign of life."""

    nonce: U64


@dataclass(frozen=True, slots=True)
class Pong:
    """The sign of life; ``nonce`` of the PING."""

    nonce: U64


@dataclass(frozen=True, slots=True)
class Fail:
    """Says why, then the connection closes. ``code`` is stable and dotted; the texts are for people."""

    code: Annotated[str, Text(64)]
    retry: Annotated[Retry, Choice(Retry)]
    message: Annotated[str, _PROSE]
    cause: Annotated[str, _PROSE] = ""
    fix: Annotated[str, _PROSE] = ""


@dataclass(frozen=True, slots=True)
class Bye:
    """Nothing more will be sent."""


@dataclass(frozen=True, slots=True)
class Ca:
    """The installation's authority, in-band: the joiner trusts it only by the pin that its token holds."""

    certificate: Annotated[bytes, _DER]
    nonce: Annotated[bytes, Fixed(NONCE_BYTES)]


@dataclass(frozen=True, slots=True)
class Join:
    """Asks for an identity with a token's secret. Sent only over TLS that trusts the pinned authority."""

    token: Annotated[bytes, Fixed(8)]
    secret: Annotated[bytes, Fixed(16)] = field(repr=False)
    csr: Annotated[bytes, _DER]


@dataclass(frozen=True, slots=True)
class Renew:
    """Asks for a new certificate: ``signature`` by the old key over SPEC.md's renewal statement."""

    certificate: Annotated[bytes, _DER]
    csr: Annotated[bytes, _DER]
    signature: Annotated[bytes, Opaque(1024)]


@dataclass(frozen=True, slots=True)
class Joined:
    """The identity: a DER certificate. ``server``: the id to look for in the server's own from now on."""

    certificate: Annotated[bytes, _DER]
    server: Annotated[str, Text(64)]


Message: TypeAlias = (
    Hello
    | Welcome
    | Open
    | Opened
    | Attach
    | Attached
    | Ack
    | Wanted
    | DigestsWanted
    | Digests
    | Seal
    | Sealed
    | Ping
    | Pong
    | Fail
    | Bye
    | Ca
    | Join
    | Renew
    | Joined
)


class FrameKind(NamedTuple):
    """A frame type's message class (None: DATA) and the most bytes that its body may have."""

    message: type[Message] | None
    body_max: int


FRAME_TYPES: dict[FrameType, FrameKind] = {
    FrameType.HELLO: FrameKind(Hello, GREETING_MAX_BYTES),
    FrameType.WELCOME: FrameKind(Welcome, GREETING_MAX_BYTES),
    FrameType.OPEN: FrameKind(Open, CONTROL_MAX_BYTES),
    FrameType.OPENED: FrameKind(Opened, CONTROL_MAX_BYTES),
    FrameType.ATTACH: FrameKind(Attach, GREETING_MAX_BYTES),
    FrameType.ATTACHED: FrameKind(Attached, GREETING_MAX_BYTES),
    FrameType.DATA: FrameKind(None, TABLE_MAX_BYTES + RAW_MAX_BYTES),
    FrameType.ACK: FrameKind(Ack, CONTROL_MAX_BYTES),
    FrameType.WANTED: FrameKind(Wanted, GREETING_MAX_BYTES),
    FrameType.DIGESTS_WANTED: FrameKind(DigestsWanted, CONTROL_MAX_BYTES),
    FrameType.DIGESTS: FrameKind(Digests, CONTROL_MAX_BYTES),
    FrameType.SEAL: FrameKind(Seal, CONTROL_MAX_BYTES),
    FrameType.SEALED: FrameKind(Sealed, GREETING_MAX_BYTES),
    FrameType.PING: FrameKind(Ping, GREETING_MAX_BYTES),
    FrameType.PONG: FrameKind(Pong, GREETING_MAX_BYTES),
    FrameType.FAIL: FrameKind(Fail, FAIL_MAX_BYTES),
    FrameType.BYE: FrameKind(Bye, GREETING_MAX_BYTES),
    FrameType.CA: FrameKind(Ca, JOIN_MAX_BYTES),
    FrameType.JOIN: FrameKind(Join, JOIN_MAX_BYTES),
    FrameType.RENEW: FrameKind(Renew, JOIN_MAX_BYTES),
    FrameType.JOINED: FrameKind(Joined, JOIN_MAX_BYTES),
}

TYPE_OF: dict[type, FrameType] = {kind.message: name for name, kind in FRAME_TYPES.items() if kind.message}
