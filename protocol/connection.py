"""Drives one connection through its state table, without I/O and without a clock of its own.

The contract is small. In: ``receive_data`` (or, without a copy, ``get_buffer`` and ``buffer_updated``),
``receive_eof``, ``tick``. Out: ``events_received`` and ``data_to_send``. Commands: ``send``, ``send_data``,
``attach``. What the peer does wrong raises RemoteProtocolError after a FAIL was queued; what came before it
is still in ``events_received``. Not here: sessions of several streams, and what the messages mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from xxhash import xxh3_64_intdigest

from protocol import header as head
from protocol.constants import (
    DEAD_AFTER_S,
    FRAME_GRACE_S,
    FRAME_MIN_BYTES_S,
    HEADER_BYTES,
    PING_AFTER_S,
)
from protocol.credit import ReceiveWindow
from protocol.errors import ACCIDENTS, LocalProtocolError, PeerSilent, RemoteProtocolError, WireCode
from protocol.header import FrameType, Header
from protocol.messages import (
    FRAME_TYPES,
    TYPE_OF,
    Attached,
    Fail,
    Hello,
    Message,
    Ping,
    Pong,
    Retry,
    Welcome,
)
from protocol.payload import DataFrame
from protocol.state import ACCEPTED, DEADLINE_S, TABLES, Direction, Role, State
from protocol.wire import Malformed, decode, encode


class Body(Protocol):
    """Memory for a DATA body; ``view`` has exactly the size that was asked for."""

    view: memoryview


@dataclass(slots=True)
class PlainBody:
    """Ordinary memory, for whoever needs no aligned buffers."""

    view: memoryview


def plain_allocate(size: int, lead: int) -> Body:
    """Memory of ``size`` bytes; ``lead``, the byte that should be page-aligned, is ignored."""
    return PlainBody(memoryview(bytearray(size)))


@dataclass(frozen=True, slots=True)
class Data:
    """A DATA frame arrived: limits and body hash hold, table and payload are still to be unpacked."""

    header: Header
    body: Body


@dataclass(frozen=True, slots=True)
class End:
    """The peer closed its side. ``state``: where that found us; ``partial``: in the middle of a frame."""

    state: State
    partial: bool


Event: TypeAlias = Message | Data | End


class Connection:
    """One connection's protocol.

    Args:
        role: which end this is.
        now: monotonic seconds.
        allocate: gives the memory of DATA bodies: (size, byte that should be page-aligned) -> Body.
    """

    def __init__(self, role: Role, now: float, allocate: Callable[[int, int], Body] = plain_allocate) -> None:
        self.role = role
        self.state = State.START
        self._table = TABLES[role]
        self._allocate = allocate
        self._seed = 0
        self._offered: Hello | None = None
        self._window: ReceiveWindow | None = None
        self._events: list[Event] = []
        self._out: list[bytes | memoryview] = []
        self._heard_at = now
        self._asked = False
        self._frame_at: float | None = None
        self._frame_bytes = 0
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._header: Header | None = None
        self._body: Body | None = None
        self._target = self._head
        self._filled = 0

    # -- in --------------------------------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        """Where the next received bytes belong. Never empty; valid until the next call of another method."""
        if self.state is State.CLOSED:
            return self._head
        return self._target[self._filled :]

    def buffer_updated(self, count: int, now: float) -> None:
        """``count`` bytes were put into ``get_buffer()``.

        Raises:
            RemoteProtocolError: they break the protocol; FAIL is queued and the connection is closed.
        """
        if self.state is State.CLOSED:
            return
        self._heard_at = now
        self._asked = False
        if self._frame_at is None:
            self._frame_at = now
            self._frame_bytes = 0
        self._filled += count
        self._frame_bytes += count
        if self._filled < len(self._target):
            return
        try:
            if self._header is None:
                self._header_complete()
            if self._header is not None and self._filled == len(self._target):
                self._body_complete()
        except RemoteProtocolError as error:
            self._refuse(error)
            raise

    def receive_data(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """Take received bytes, however sliced. Raises as ``buffer_updated``."""
        view = memoryview(data)
        while view and self.state is not State.CLOSED:
            target = self.get_buffer()
            count = min(len(target), len(view))
            target[:count] = view[:count]
            view = view[count:]
            self.buffer_updated(count, now)

    def receive_eof(self) -> None:
        """The peer closed its side."""
        self._events.append(End(self.state, partial=self._frame_at is not None))
        self._close()

    def tick(self, now: float) -> float:
        """Let time pass; may queue a PING. Returns in how many seconds silence has its next consequence.

        Call it then, and about once a second for frames that trickle in.

        Raises:
            PeerSilent: the peer is dead, or did not say in time what this state waits for.
            RemoteProtocolError: a frame trickles in more slowly than any line would bring it.
        """
        if self.state is State.CLOSED:
            return DEAD_AFTER_S
        silent_s = now - self._heard_at
        if self.state in ACCEPTED:
            if silent_s >= DEAD_AFTER_S:
                self._close()
                raise PeerSilent(silent_s, "any sign of life")
            if silent_s >= PING_AFTER_S and not self._asked:
                self._asked = True
                self.send(Ping(0))
        elif silent_s >= DEADLINE_S[self.state]:
            awaited = self._awaited()
            self._close()
            raise PeerSilent(silent_s, awaited)
        if self._frame_at is not None:
            under_way_s = now - self._frame_at
            if under_way_s > FRAME_GRACE_S and self._frame_bytes < under_way_s * FRAME_MIN_BYTES_S:
                error = RemoteProtocolError(
                    WireCode.SLOW, f"{self._frame_bytes} bytes of a frame came in {under_way_s:.0f} s"
                )
                self._refuse(error)
                raise error
        limit_s = DEADLINE_S.get(self.state, DEAD_AFTER_S if self._asked else PING_AFTER_S)
        return max(limit_s - silent_s, 0.0)

    # -- out -------------------------------------------------------------------------------------------------

    def events_received(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> list[bytes | memoryview]:
        """Pieces to be written, in order. A DATA payload is passed on as given: keep it till then."""
        out, self._out = self._out, []
        return out

    # -- commands --------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Queue a control message.

        Raises:
            LocalProtocolError: not allowed in this state, or it does not fit its schema; nothing was queued.
        """
        kind = TYPE_OF[type(message)]
        after = self._after(Direction.SEND, kind)
        if kind is FrameType.ATTACHED and self._window is None:
            raise LocalProtocolError(
                "ATTACHED without a credit window: DATA would go uncounted; use attach()"
            )
        try:
            body = encode(message)
        except Malformed as error:
            raise LocalProtocolError(f"{kind.name}: {error}") from None
        if len(body) > FRAME_TYPES[kind].body_max:
            raise LocalProtocolError(f"{kind.name} of {len(body)} bytes is over its limit")
        body_hash = xxh3_64_intdigest(body, head.seed_for(kind, self._seed))
        header = Header(kind, len(body), body_hash=body_hash)
        self._out += (head.pack(header, self._seed), body)
        self.state = after
        if isinstance(message, Hello):
            self._offered = message
        elif isinstance(message, Welcome):
            self._seed = message.hash_seed

    def send_data(self, frame: DataFrame) -> None:
        """Queue a DATA frame, made with this connection's ``seed``."""
        self.state = self._after(Direction.SEND, FrameType.DATA)
        self._out += (frame.header_bytes, frame.table, frame.payload)

    def attach(self, window: ReceiveWindow) -> None:
        """Answer ATTACH: this stream may carry DATA, charged to the session's window."""
        self._window = window
        self.send(Attached())

    @property
    def seed(self) -> int:
        """What frames are hashed with now, but for ``header.UNSEEDED``: 0 until WELCOME names the seed."""
        return self._seed

    # -- inside ----------------------------------------------------------------------------------------------

    def _after(self, direction: Direction, kind: FrameType) -> State:
        after = self._table[self.state].get((direction, kind))
        if after is not None:
            return after
        if direction is Direction.SEND:
            raise LocalProtocolError(f"{kind.name} may not be sent in state {self.state}")
        raise RemoteProtocolError(WireCode.STATE, f"{kind.name} may not be received in state {self.state}")

    def _awaited(self) -> str:
        awaited = [
            kind.name
            for direction, kind in self._table[self.state]
            if direction is Direction.RECEIVE and kind not in (FrameType.FAIL, FrameType.BYE)
        ]
        return " or ".join(awaited) or "the end"

    def _header_complete(self) -> None:
        """Hash, rules, state, limit, credit; only then memory."""
        header = self._header = head.unpack(self._target, self._seed)
        self._after(Direction.RECEIVE, header.type)
        limit = FRAME_TYPES[header.type].body_max
        if header.body_len > limit:
            raise RemoteProtocolError(
                WireCode.LIMIT, f"{header.type.name} of {header.body_len} bytes, {limit} allowed"
            )
        if header.type is FrameType.DATA:
            if self._window is not None:
                self._window.charge(HEADER_BYTES + header.body_len)
            self._body = self._allocate(header.body_len, header.table_len)
            self._target = self._body.view
        else:
            self._target = memoryview(bytearray(header.body_len))
        self._filled = 0

    def _body_complete(self) -> None:
        header, body = self._header, self._body
        assert header is not None  # noqa: S101 - the caller looked
        if xxh3_64_intdigest(self._target, head.seed_for(header.type, self._seed)) != header.body_hash:
            raise RemoteProtocolError(
                WireCode.BODY_HASH, f"a body of {header.type.name} does not match its hash"
            )
        message = None if body is not None else self._decoded(header)
        self._header = self._body = self._frame_at = None
        self._target, self._filled = self._head, 0
        if body is not None:
            self._events.append(Data(header, body))
        if message is not None:
            self.state = self._after(Direction.RECEIVE, header.type)
            self._received(message)

    def _decoded(self, header: Header) -> Message:
        kind = FRAME_TYPES[header.type].message
        assert kind is not None  # noqa: S101 - only DATA has none
        try:
            return decode(kind, self._target)
        except Malformed as error:
            raise RemoteProtocolError(WireCode.MESSAGE, f"{header.type.name}: {error}") from None

    def _received(self, message: Message) -> None:
        if isinstance(message, Ping):
            self.send(Pong(message.nonce))
        elif not isinstance(message, Pong):
            if isinstance(message, Hello):
                self._check_range(message)
            elif isinstance(message, Welcome):
                self._check_version(message)
                self._seed = message.hash_seed
            self._events.append(message)

    def _check_range(self, hello: Hello) -> None:
        ours = Hello()
        if max(hello.version_min, ours.version_min) > min(hello.version_max, ours.version_max):
            raise RemoteProtocolError(
                WireCode.VERSION,
                f"the peer speaks versions {hello.version_min} to {hello.version_max}, "
                f"this side {ours.version_min} to {ours.version_max}",
            )

    def _check_version(self, welcome: Welcome) -> None:
        offered = self._offered
        if offered is None or not offered.version_min <= welcome.version <= offered.version_max:
            reason = f"the peer chose version {welcome.version}, which was not offered"
            raise RemoteProtocolError(WireCode.VERSION, reason)

    def _refuse(self, error: RemoteProtocolError) -> None:
        """Tell the peer why, unless it was a FAIL that broke a rule, and close."""
        is_fail = self._header is not None and self._header.type is FrameType.FAIL
        if self.state is not State.CLOSED and not is_fail:
            retry = Retry.LATER if error.code in ACCIDENTS else Retry.STOP
            self.send(Fail(error.code, retry, error.reason))
        self._close()

    def _close(self) -> None:
        """Nothing more is taken in; memory given to a frame that will not be whole is let go."""
        self.state = State.CLOSED
        self._header = self._body = self._frame_at = None
        self._target, self._filled = self._head, 0
