"""One TLS connection: the shell around the sans-IO ``protocol.Connection``.

Received bytes go straight into the protocol's buffers (for DATA: aligned, pooled memory), events come out of
``receive``. What ends a stream is turned into one of our errors, once, and every waiter gets it. Not here:
how a connection comes to be (``dial.py``, ``accept.py``) and what messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import TypeVar, cast

from protocol.connection import Body, Connection, Data, End, plain_allocate
from protocol.credit import ReceiveWindow
from protocol.errors import PeerSilent, RemoteProtocolError
from protocol.messages import Bye, Fail, Message
from protocol.payload import DataFrame
from protocol.state import Role, State
from replicator import linux
from replicator.clock import Clock
from replicator.errors import ReplicatorError
from replicator.transport import failures

M = TypeVar("M", bound=Message)

TICK_S = 1.0
CLOSE_S = 2.0  # a peer that does not take our last bytes in this time does not get them
WRITE_HIGH_BYTES = 2 * 1024 * 1024  # two frames: one being encrypted, one being sent
UNREAD_MAX = 64  # control messages that nobody has taken yet; past this, reading stops (an emergency brake)
USER_TIMEOUT_MS = 15_000
NOTSENT_LOWAT_BYTES = 1024 * 1024


def tune(sock: socket.socket) -> None:
    """Socket options of both sides: no Nagle, dead peers noticed, little queued in the kernel, BBR if had."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
    with contextlib.suppress(OSError):  # a kernel without the module: its default serves
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")


class Stream(asyncio.BufferedProtocol):
    """A connected stream.

    Args:
        role_of: the protocol role for the ALPN name that was agreed on; None refuses it.
        allocate: memory for DATA bodies, as for ``Connection``.

    Attributes:
        on_data: takes DATA frames as they arrive; set before ATTACHED is sent.
        peer_address: ``host:port``, for messages.
        peer_certificate: DER, or None when the peer showed none.
    """

    def __init__(
        self,
        role_of: Callable[[str | None], Role | None],
        clock: Clock,
        allocate: Callable[[int, int], Body] = plain_allocate,
    ) -> None:
        self._role_of = role_of
        self._clock = clock
        self._allocate = allocate
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._transport: asyncio.Transport | None = None
        self._messages: deque[Message] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._failure: ReplicatorError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reading = True
        self.on_data: Callable[[Data], None] | None = None
        self.alpn: str | None = None
        self.peer_address = "?"
        self.peer_certificate: bytes | None = None

    # -- what the event loop calls -----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TLS is up (its handshake is done)."""
        self._transport = cast(asyncio.Transport, transport)
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        self.alpn = tls.selected_alpn_protocol()
        self.peer_certificate = tls.getpeercert(binary_form=True)
        peer = transport.get_extra_info("peername")
        self.peer_address = f"{peer[0]}:{peer[1]}" if peer else "?"
        role = self._role_of(self.alpn)
        if role is None:
            self._fail_with(failures.unknown_conversation(self.peer_address, self.alpn))
            self._transport.abort()
            return
        self._connection = Connection(role, self._clock.monotonic_s(), self._allocate)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where received bytes go."""
        if self._connection is None:
            return memoryview(bytearray(1))
        return self._connection.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes arrived."""
        connection = self._connection
        if connection is None:
            return
        try:
            connection.buffer_updated(nbytes, self._clock.monotonic_s())
        except RemoteProtocolError as error:
            self._deliver(connection)
            self._fail_with(failures.broken(error, self.peer_address))
            self._flush()
            self._close_transport()
            return
        self._deliver(connection)

    def eof_received(self) -> bool:
        """The peer closed its side; so do we."""
        if self._connection is not None:
            self._connection.receive_eof()
            self._deliver(self._connection)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over, whoever ended it."""
        state = self._connection.state if self._connection else State.START
        self._fail_with(self._lost(state, str(exc) if exc else "the connection ended"))
        if self._connection is not None:
            self._connection.state = State.CLOSED
        if self._timer is not None:
            self._timer.cancel()
        # TLS has half a MiB with it: it shall not stay for as long as somebody keeps the error that ended us.
        self._transport = None
        self._writable.set()
        self._wake()
        if not self._gone.done():
            self._gone.set_result(None)

    def pause_writing(self) -> None:
        """More is buffered than the peer takes."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It has been taken."""
        self._writable.set()

    # -- what the rest of the house calls -----

    @property
    def state(self) -> State:
        """Where the conversation stands."""
        return self._connection.state if self._connection else State.CLOSED

    @property
    def connection(self) -> Connection:
        """The protocol of this stream, for what concerns no I/O (``seed``)."""
        if self._connection is None:
            raise self._failure or self._lost(State.START, "not connected")
        return self._connection

    @property
    def unacknowledged_bytes(self) -> int:
        """What was sent and is still in our memory, in the kernel's or on the line."""
        if self._transport is None or self._transport.is_closing():
            return 0
        sock = self._transport.get_extra_info("socket")
        return self._transport.get_write_buffer_size() + linux.unacknowledged_bytes(sock)

    def send(self, message: Message) -> None:
        """Send a control message; returns at once.

        Raises:
            ReplicatorError: the stream has ended, with what ended it. LocalProtocolError: our bug.
        """
        self._check()
        self.connection.send(message)
        self._flush()

    def send_data(self, frame: DataFrame) -> None:
        """Send a DATA frame. Its payload is no longer needed when this returns: TLS has copied it."""
        self._check()
        self.connection.send_data(frame)
        self._flush()

    def attach(self, window: ReceiveWindow) -> None:
        """Answer ATTACH: from now on DATA may come, charged to ``window``. Raises as ``send``."""
        self._check()
        self.connection.attach(window)
        self._flush()

    async def drain(self) -> None:
        """Wait until the stream takes more.

        Raises:
            ReplicatorError: the stream has ended.
        """
        await self._writable.wait()
        self._check()

    async def receive(self) -> Message:
        """The next control message.

        Raises:
            ReplicatorError: what ended the stream; a FAIL of the peer with its own code, message, cause and
            fix.
        """
        while not self._messages:
            self._check()
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message = self._messages.popleft()
        if not self._reading and self._transport is not None:
            self._reading = True
            self._transport.resume_reading()
        if isinstance(message, Fail):
            raise failures.from_fail(message, self.peer_address)
        return message

    async def expect(self, kind: type[M]) -> M:
        """The next control message, which must be a ``kind``.

        Raises:
            ReplicatorError: as ``receive``; ``link.lost`` when the peer says goodbye instead.
        """
        message = await self.receive()
        if isinstance(message, kind):
            return message
        what = "it said goodbye" if isinstance(message, Bye) else f"it sent {type(message).__name__}"
        raise self._lost(State.CLOSED, f"{what} instead of {kind.__name__}")

    def fail(self, error: ReplicatorError) -> None:
        """Tell the peer why this ends. The caller closes afterwards."""
        if self._connection is None or self._connection.state is State.CLOSED:
            return
        self._connection.send(failures.to_fail(error))
        self._flush()

    async def close(self) -> None:
        """Say goodbye if that is still possible, get the last bytes out, close. Idempotent."""
        if self._connection is not None and self._connection.state is not State.CLOSED:
            self._connection.send(Bye())
            self._flush()
        self._close_transport()
        try:
            await asyncio.wait_for(asyncio.shield(self._gone), CLOSE_S)
        except TimeoutError:
            self.abort()
        except asyncio.CancelledError:  # nobody is left to wait for the peer
            self.abort()
            raise

    def abort(self) -> None:
        """Close at once; what is buffered is lost."""
        if self._transport is not None:
            self._transport.abort()

    # -- inside -----

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _flush(self) -> None:
        if self._connection is None or self._transport is None:
            return
        pieces = self._connection.data_to_send()
        if pieces and not self._transport.is_closing():
            self._transport.writelines(pieces)

    def _deliver(self, connection: Connection) -> None:
        for event in connection.events_received():
            if isinstance(event, Data):
                if self.on_data is not None:
                    self.on_data(event)
            elif isinstance(event, End):
                if event.state is not State.CLOSED:
                    what = (
                        "the connection ended in the middle of a frame"
                        if event.partial
                        else "the peer closed it"
                    )
                    self._fail_with(self._lost(event.state, what))
            else:
                self._messages.append(event)
                self._note_end(event)
        if len(self._messages) > UNREAD_MAX and self._reading and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()
        self._flush()
        self._wake()

    def _note_end(self, message: Message) -> None:
        """FAIL and BYE close the conversation: after they have been read, and for sending at once."""
        if isinstance(message, Fail):
            self._fail_with(failures.from_fail(message, self.peer_address))
        elif isinstance(message, Bye):
            self._fail_with(failures.lost(self.peer_address, "it said goodbye"))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _close_transport(self) -> None:
        if self._transport is not None:
            self._transport.close()
        elif not self._gone.done():
            self._gone.set_result(None)

    def _tick(self) -> None:
        connection = self._connection
        if connection is None:
            return
        state = connection.state
        try:
            due_s = connection.tick(self._clock.monotonic_s())
        except PeerSilent as error:
            self._fail_with(failures.silent(self.peer_address, state, error))
            self.abort()
        except RemoteProtocolError as error:
            self._fail_with(failures.broken(error, self.peer_address))
            self._flush()
            self._close_transport()
        else:
            self._timer = self._loop.call_later(min(due_s, TICK_S), self._tick)
            self._flush()

    def _fail_with(self, error: ReplicatorError) -> None:
        """Keep the first reason: what follows from it would only hide it."""
        if self._failure is None:
            self._failure = error
        self._writable.set()
        self._wake()

    def _lost(self, state: State, what: str) -> ReplicatorError:
        before_welcome = state in (State.START, State.GREETED)
        if before_welcome and self._connection is not None and self._connection.role is Role.SENDER:
            return failures.closed_before_welcome(self.peer_address)
        return failures.lost(self.peer_address, what)
