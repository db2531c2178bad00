"""The accepting side: our own accept loop, so that failed handshakes are seen, counted and limited.

asyncio's ``Server`` hides them. Each accepted stream goes to the handler of its ALPN name; what the handler
raises as a ReplicatorError is told to the peer as FAIL and logged. A connection that speaks HTTP is handed
over whole, as soon as its TLS is up (``web.py`` makes what takes it).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from protocol.connection import Body, plain_allocate
from protocol.state import Role
from replicator.clock import Clock
from replicator.errors import LinkError, PeerError, ReplicatorError, TargetError
from replicator.transport.dial import HANDSHAKE_S, Address
from replicator.transport.stream import Stream, tune
from replicator.transport.tls import ALPN_HTTP

log = logging.getLogger(__name__)

BACKLOG = 512
HANDSHAKES_MAX = 256  # under way at once; 40 KiB of OpenSSL each
HANDSHAKES_PER_SOURCE_MAX = 32  # two sessions of 16 streams starting at once


@dataclass(frozen=True, slots=True)
class Handler:
    """What serves the streams of one ALPN name."""

    role: Role
    serve: Callable[[Stream], Awaitable[None]]


@dataclass(slots=True)
class Counts:
    """What happened at the door since start, for metrics."""

    accepted: int = 0
    over_budget: int = 0
    failed: Counter[str] = field(default_factory=Counter)


class _Arrival(asyncio.Protocol):
    """A connection while it shakes hands: what it becomes shows when TLS is up, before a byte is read.

    Attributes:
        became: the protocol that has taken its place.
    """

    def __init__(self, become: Callable[[str | None], asyncio.BaseProtocol]) -> None:
        self._become = become
        self.became: asyncio.BaseProtocol | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TLS is up (its handshake is done)."""
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        self.became = self._become(tls.selected_alpn_protocol())
        cast(asyncio.Transport, transport).set_protocol(self.became)
        self.became.connection_made(transport)


class Acceptor:
    """Listens, shakes hands, hands streams over.

    Args:
        tls: gives the server's context; asked anew for every connection, so that a renewed certificate is
        used. handlers: by ALPN name. web: makes the protocol for a connection that speaks HTTP by its ALPN
        name or has none; without it such a connection is refused. Whoever made the protocol ends it.
    """

    def __init__(
        self,
        tls: Callable[[], ssl.SSLContext],
        handlers: Mapping[str, Handler],
        clock: Clock,
        allocate: Callable[[int, int], Body] = plain_allocate,
        web: Callable[[], asyncio.BaseProtocol] | None = None,
    ) -> None:
        self._tls = tls
        self._handlers = handlers
        self._clock = clock
        self._allocate = allocate
        self._web = web
        self._socket: socket.socket | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way: Counter[str] = Counter()
        self.counts = Counts()

    async def start(self, address: Address) -> Address:
        """Listen; returns the address with the port that was given.

        Raises:
            TargetError: ``listen.port_taken``, ``listen.failed``.
        """
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(tuple(address))
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            raise _listen_error(address, error) from None
        self._socket = sock
        self._loop_task = asyncio.create_task(self._accept(sock), name="accept")
        return Address(address.host, sock.getsockname()[1])

    async def drain(self) -> None:
        """Stop listening, and wait for the end of the streams that are there."""
        await self._stop_listening()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def stop(self) -> None:
        """Stop listening, cancel the handlers, wait for them."""
        await self._stop_listening()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _stop_listening(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task])
        if self._socket is not None:
            self._socket.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(listening)
            except OSError as error:  # out of descriptors, or the peer was gone before we looked
                self.counts.failed[errno.errorcode.get(error.errno or 0, "?")] += 1
                await asyncio.sleep(0.05 if error.errno in (errno.EMFILE, errno.ENFILE) else 0)
                continue
            source = peer[0]
            if (
                self._under_way.total() >= HANDSHAKES_MAX
                or self._under_way[source] >= HANDSHAKES_PER_SOURCE_MAX
            ):
                self.counts.over_budget += 1
                sock.close()
                continue
            self._under_way[source] += 1
            task = asyncio.create_task(self._serve(sock, source), name=f"serve {source}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket, source: str) -> None:
        try:
            stream = await self._shake_hands(sock, source)
        finally:
            self._under_way[source] -= 1
            if not self._under_way[source]:
                del self._under_way[source]
        if stream is None:
            return
        handler = self._handlers.get(stream.alpn or "")
        try:
            if handler is not None:
                await handler.serve(stream)
            else:
                self._failed(source, "unknown ALPN name")
        except ReplicatorError as error:
            log.log(
                logging.INFO if isinstance(error, LinkError) else logging.WARNING, "%s: %s", source, error
            )
            stream.fail(error)
        except Exception:  # a defect: it must end this stream alone, and be seen
            log.exception("%s: the stream's handler failed", source)
            stream.fail(_defect())
        finally:
            await stream.close()

    async def _shake_hands(self, sock: socket.socket, source: str) -> Stream | None:
        """The stream; None: there is none, or the connection is for the web."""
        loop = asyncio.get_running_loop()
        arrival = _Arrival(self._become)
        try:
            tune(sock)
            await loop.connect_accepted_socket(  # its answer names uvloop's TLS protocol, not ours
                lambda: arrival,
                sock,
                ssl=self._tls(),
                ssl_handshake_timeout=HANDSHAKE_S,
            )
        except OSError as error:
            sock.close()
            reason = getattr(error, "reason", None)  # of OpenSSL's; errors that Python makes have none
            self._failed(source, reason or type(error).__name__)
            return None
        except BaseException:  # cancelled: the socket is ours until TLS is up
            sock.close()
            raise
        self.counts.accepted += 1
        return arrival.became if isinstance(arrival.became, Stream) else None

    def _become(self, alpn: str | None) -> asyncio.BaseProtocol:
        if self._web is not None and alpn in (ALPN_HTTP, None):
            return self._web()
        return Stream(self._role_of, self._clock, self._allocate)

    def _failed(self, source: str, reason: str) -> None:
        self.counts.failed[reason] += 1
        log.info("handshake with %s failed: %s", source, reason)

    def _role_of(self, alpn: str | None) -> Role | None:
        handler = self._handlers.get(alpn or "")
        return handler.role if handler else None


def _defect() -> PeerError:
    return PeerError(
        "peer.defect",
        "the other side failed in a way that it does not know",
        cause="a defect in it",
        fix="report it with its log, which names the place",
    )


def _listen_error(address: Address, error: OSError) -> TargetError:
    if error.errno == errno.EADDRINUSE:
        return TargetError(
            "listen.port_taken",
            f"port {address.port} of {address.host} is taken",
            cause="another process listens there, perhaps another master target",
            fix=f"stop it (`ss -ltnp 'sport = :{address.port}'` names it) or give another port with --listen",
        )
    return TargetError(
        "listen.failed",
        f"cannot listen on {address}: {error.strerror or error}",
        cause="the address is not one of this machine, or the port needs rights that we lack",
        fix="give an address of this machine with --listen, or a port over 1023",
    )
