"""The HTTP API: an aiohttp application that is made from the route table.

A request is taken apart in this order, and whatever does not fit ends it: who asks, what for, the body (which
may be slow to come), then one transaction in which it is decided again who asks, done, and noted. Not here:
TLS and connections (``transport/``), how a request is read (``reading.py``), what routes do (``routes.py``),
who may (``auth.py``).
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from replicator.control import problems
from replicator.control.auth import Access, ask, decide
from replicator.control.cursor import cursor_of
from replicator.control.openapi import document
from replicator.control.raw import DOCUMENT
from replicator.control.reading import BODY_MAX_BYTES, read
from replicator.control.repositories import replies
from replicator.control.repositories.replies import Kept
from replicator.control.route import Call, Parts, Reply, Route, Wanted
from replicator.control.routes import ROUTES
from replicator.errors import ReplicatorError
from replicator.health import refusal

log = logging.getLogger(__name__)

JSON: Final = "application/json"
_EVERYWHERE: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def make_application(parts: Parts, routes: tuple[Route, ...] = ROUTES) -> web.Application:
    """The API, ready to be served."""
    application = web.Application(middlewares=[_answering(parts)], client_max_size=BODY_MAX_BYTES)
    application[DOCUMENT] = json.dumps(document(routes)).encode()
    for route in routes:
        application.router.add_route(route.method, route.path, _endpoint(parts, route))

    async def end_streams(_: web.Application) -> None:
        parts.feed.close()

    application.on_shutdown.append(end_streams)
    return application


# ------------------------------------------------------------------ around every request


def _answering(parts: Parts) -> Any:
    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        began, number = parts.clock.monotonic_s(), secrets.token_hex(8)
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else "unknown"
        # A method that nobody knows could be anything: it must not become a label.
        method = request.method if request.match_info.http_exception is None else "unknown"
        response = await _answered(parts, request, handler, number)
        took = parts.clock.monotonic_s() - began
        parts.metrics.requests.labels(method, path, str(response.status)).inc()
        parts.metrics.seconds.labels(method, path).observe(took)
        log.debug("%s %s %s: %d in %.1f ms", number, method, path, response.status, took * 1000)
        if not response.prepared:
            response.headers.update(_EVERYWHERE | {"X-Request-Id": number})
        return response

    return answer


async def _answered(parts: Parts, request: web.Request, handler: Handler, number: str) -> web.StreamResponse:
    try:
        if request.match_info.http_exception is not None:
            return await _nowhere(parts, request, request.match_info.http_exception)
        return await handler(request)
    except ReplicatorError as error:
        level = logging.ERROR if problems.status_of(error) >= 500 else logging.INFO
        log.log(level, "%s %s %s: %s", number, request.method, request.path, error)
        return _problem(error)
    except Exception:  # a defect: it must end this request alone, and be seen
        log.exception("%s %s %s failed", number, request.method, request.path)
        return _problem(problems.defect())


async def _nowhere(parts: Parts, request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    await ask(parts.database, parts.shown(request), Access.IDENTIFIED, parts.clock.now_ns())
    if isinstance(error, web.HTTPMethodNotAllowed):
        response = _problem(problems.method_unknown(request.method, request.path))
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        return response
    raise problems.not_found(f"path {request.path}")


def _problem(error: ReplicatorError) -> web.Response:
    status = problems.status_of(error)
    response = refusal(error, status)
    response.headers.update({401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}.get(status, {}))
    return response


# ------------------------------------------------------------------ one route


def _endpoint(parts: Parts, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def endpoint(request: web.Request) -> web.StreamResponse:
        shown = parts.shown(request)
        caller = await ask(parts.database, shown, route.access, parts.clock.now_ns())
        if route.raw is not None:
            return await route.raw(request, parts)
        wanted = await read(route, request)
        if not route.changes:
            async with parts.database.read() as connection:
                return await _done(Call(parts, connection, caller, parts.clock.now_ns(), wanted))
        async with parts.database.write() as connection:
            now_ns = parts.clock.now_ns()
            # Once more: while the body came, or while others wrote, the sender may have been revoked.
            caller = await decide(connection, shown, route.access, now_ns)
            response = await _done(Call(parts, connection, caller, now_ns, wanted))
        parts.feed.wake()
        return response

    return endpoint


async def _done(call: Call) -> web.Response:
    wanted = call.wanted
    if wanted.key is None:
        return _response(wanted, await _reply(call))
    actor = call.caller.actor
    kept = await replies.begin(call.connection, actor, wanted.key, wanted.digest, call.now_ns)
    if kept is not None:
        headers = {**kept.headers, "Idempotency-Replayed": "true"}
        return web.Response(status=kept.status, text=kept.body, headers=headers, content_type=JSON)
    reply = await _reply(call)
    response = _response(wanted, reply)
    body = reply.body.model_dump_json() if reply.body is not None else ""
    headers = {name: response.headers[name] for name in ("ETag", "Location") if name in response.headers}
    await replies.keep(call.connection, actor, wanted.key, Kept(response.status, headers, body))
    return response


async def _reply(call: Call) -> Reply:
    if call.wanted.route.does is None:
        raise ValueError(f"{call.wanted.route.path} has no handler")
    return await call.wanted.route.does(call)


def _response(wanted: Wanted, reply: Reply) -> web.Response:
    headers = {}
    if reply.revision is not None:
        headers["ETag"] = f'"{reply.revision}"'
        if headers["ETag"] == wanted.known:
            return web.Response(status=304, headers=headers)
    if reply.location:
        headers["Location"] = reply.location
    told = reply.told or reply.body
    if reply.items is not None:
        items = [item.model_dump(mode="json") for item in reply.items]
        text = json.dumps({"items": items, "next": cursor_of(reply.following)})
    elif told is not None:
        text = told.model_dump_json()
    else:
        return web.Response(status=wanted.route.status, headers=headers)
    return web.Response(status=wanted.route.status, text=text, headers=headers, content_type=JSON)
