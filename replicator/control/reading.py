"""How a request of a route is read: every part of it checked against what the table says, nothing ignored."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any, Final

from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from replicator.control import problems
from replicator.control.cursor import window_of
from replicator.control.models import Model
from replicator.control.repositories.rows import Change, Window
from replicator.control.route import Route, Wanted

BODY_MAX_BYTES: Final = 256 * 1024
BODY_S: Final = 20
IF_MATCH: Final = r'(\*|"([0-9]{1,15})")'
IDEMPOTENCY_KEY: Final = "[!-~]{1,128}"


async def read(route: Route, request: web.Request) -> Wanted:
    """What a request wants.

    Raises:
        UsageError: ``api.malformed``, ``api.not_found``, ``api.if_match_missing``, ``api.media_type``,
            ``api.too_large``, ``api.too_slow``.
    """
    asked = Change(_id(route, request), _revision(route, request))
    window, filters = _query(route, request)
    key = _key(request) if route.method == "POST" else None
    content = await _content(request)
    if route.body is None and content:
        raise problems.malformed("this route takes no body")
    body = None if route.body is None else _parsed(route.body, request, content)
    digest = hashlib.sha256(f"{request.method} {request.path}\n".encode() + content).hexdigest()
    return Wanted(route, asked, body, window, filters, key, digest, request.headers.get("If-None-Match"))


def _id(route: Route, request: web.Request) -> str:
    if route.id_type is None:
        return ""
    row_id = request.match_info["id"]
    try:
        TypeAdapter(route.id_type).validate_python(row_id)
    except ValidationError:
        raise problems.not_found(f"path {request.path}") from None
    return row_id


def _revision(route: Route, request: web.Request) -> int | None:
    if not route.conditional:
        return None
    text = request.headers.get("If-Match")
    if text is None:
        raise problems.if_match_missing()
    found = re.fullmatch(IF_MATCH, text)
    if found is None:
        raise problems.malformed("If-Match is no ETag of ours")
    return None if found[2] is None else int(found[2])


def _query(route: Route, request: web.Request) -> tuple[Window, dict[str, Any]]:
    query = request.query
    known = {*route.filters, *(("limit", "cursor") if route.paged is not None else ())}
    for name in query:
        if name not in known:
            raise problems.malformed("the query has a parameter that this route does not know")
        if len(query.getall(name)) > 1:
            raise problems.malformed(f"{name} is given more than once")
    window = window_of(query, route.paged) if route.paged is not None else Window()
    given = {name: adapter for name, adapter in route.filters.items() if name in query}
    return window, {name: _filter(name, adapter, query[name]) for name, adapter in given.items()}


def _filter(name: str, adapter: TypeAdapter[Any], text: str) -> Any:
    try:
        return adapter.validate_python(text)
    except ValidationError:
        raise problems.malformed(f"{name} is not of its form") from None


def _key(request: web.Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch(IDEMPOTENCY_KEY, key):
        raise problems.malformed("Idempotency-Key is not 1 to 128 visible characters")
    return key


async def _content(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_S):
            return await request.read()
    except TimeoutError:
        raise problems.too_slow(BODY_S) from None
    except web.HTTPRequestEntityTooLarge:
        raise problems.too_large(BODY_MAX_BYTES) from None


def _parsed(model: type[Model], request: web.Request, content: bytes) -> Model:
    if request.content_type != "application/json":
        raise problems.media_type()
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
        raise problems.malformed(f"{place or 'the body'}: {first['msg']}") from None
