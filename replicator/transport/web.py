"""An accepted TLS connection handed to aiohttp: what the door gives to whoever speaks HTTP.

aiohttp has no deadline for the first headers and no bound on connections; both are here. Not here: handshakes
(``accept.py``), routes and who may call them (``replicator/health.py``, ``replicator/control``).
"""

from __future__ import annotations

import asyncio
from typing import cast

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

HEADERS_S = 5.0  # from the end of the handshake to the end of the first request's headers
IDLE_S = 15.0  # between two requests, the second's headers included
CONNECTIONS_MAX = 512  # most belong to nobody: 64 KiB each, so that all of them stay below 32 MiB
HEADER_MAX_BYTES = 8190
STOP_S = 2.0  # what a request has to end in when the server stops


class WebServer:
    """Serves an application on connections that others accept. ``start``, then ``stop``.

    Args:
        app: not started yet; a middleware is put before its own.
        connections_max: more at once are closed as they come.
    """

    def __init__(self, app: web.Application, connections_max: int = CONNECTIONS_MAX) -> None:
        self._connections_max = connections_max
        self._waiting: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}
        self.over_budget = 0
        app.middlewares.insert(0, self._arrived())
        app.on_response_prepare.append(_nameless)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=IDLE_S,
            max_line_size=HEADER_MAX_BYTES,
            max_field_size=HEADER_MAX_BYTES,
            shutdown_timeout=STOP_S,
        )

    @property
    def connections(self) -> int:
        """How many there are now."""
        server = self._runner.server
        return len(server.connections) if server else 0

    async def start(self) -> None:
        """Be ready for connections."""
        await self._runner.setup()

    async def stop(self) -> None:
        """End all connections; a request under way has a moment to finish."""
        for timer in self._waiting.values():
            timer.cancel()
        self._waiting.clear()
        if self._runner.server is not None:
            await self._runner.cleanup()

    def protocol(self) -> asyncio.BaseProtocol:
        """What takes a connection whose TLS is up just now."""
        server = self._runner.server
        if server is None or len(server.connections) >= self._connections_max:
            self.over_budget += 1
            return _Refusal()
        taken = server()
        loop = asyncio.get_running_loop()
        self._waiting[taken] = loop.call_later(HEADERS_S, self._too_slow, taken)
        return taken

    def _too_slow(self, taken: web.RequestHandler) -> None:
        del self._waiting[taken]
        if taken.transport is not None:
            taken.transport.abort()

    def _arrived(self) -> Middleware:
        """A middleware that ends the wait for the headers."""

        @web.middleware
        async def arrived(request: web.Request, handler: Handler) -> web.StreamResponse:
            timer = self._waiting.pop(request.protocol, None)
            if timer is not None:
                timer.cancel()
            return await handler(request)

        return arrived


class _Refusal(asyncio.Protocol):
    """Closes the connection that it is given."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is not taken."""
        cast(asyncio.Transport, transport).abort()


async def _nameless(_: web.Request, response: web.StreamResponse) -> None:
    """Who asks need not know what answers: no names and versions of libraries."""
    response.headers["Server"] = "replicator"
