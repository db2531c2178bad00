"""Routes that make their own answer: health, metrics, the OpenAPI document, the stream of events."""

from __future__ import annotations

import logging
from typing import Final

from aiohttp import web
from sqlalchemy import select

from replicator.control.feed import STREAMS_MAX, follow, start_of
from replicator.control.metrics import CONTENT_TYPE
from replicator.control.models import Readiness
from replicator.control.problems import too_many_streams
from replicator.control.route import Parts
from replicator.errors import ReplicatorError

log = logging.getLogger(__name__)

DOCUMENT: Final = web.AppKey("document", bytes)


async def health(_: web.Request, __: Parts) -> web.StreamResponse:
    """The event loop turns: more is not said to everybody."""
    return web.Response(text="alive\n")


async def readiness(_: web.Request, parts: Parts) -> web.StreamResponse:
    """The database answers."""
    async with parts.database.read() as connection:
        await connection.execute(select(1))
    return web.json_response(text=Readiness(ready=True, state="serving", problems=[]).model_dump_json())


async def metrics(_: web.Request, parts: Parts) -> web.StreamResponse:
    """All metrics in Prometheus' text format."""
    return web.Response(body=parts.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def openapi(request: web.Request, _: Parts) -> web.StreamResponse:
    """The document that describes this API."""
    return web.Response(body=request.app[DOCUMENT], content_type="application/json")


async def stream(request: web.Request, parts: Parts) -> web.StreamResponse:
    """Events as they happen, from Last-Event-ID or from now on, until the client goes or may not stay."""
    open_streams = parts.feed.listeners
    if len(open_streams) >= STREAMS_MAX:
        raise too_many_streams(STREAMS_MAX)
    after = await start_of(parts.database, request.headers.get("Last-Event-ID"))
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    open_streams.add(response)
    parts.metrics.streams.set(len(open_streams))
    try:
        async for piece in follow(parts.database, parts.feed, parts.clock, parts.shown(request), after):
            await response.write(piece)
    except ConnectionResetError:
        return response  # the client is gone
    except ReplicatorError as error:  # its headers are sent: all that can be told now is the end
        log.info("a stream of events ends: %s", error)
    finally:
        open_streams.discard(response)
        parts.metrics.streams.set(len(open_streams))
    return response
