"""The OpenAPI 3.1 document, made from the route table and the models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeAlias

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from replicator import __version__
from replicator.control.auth import Access
from replicator.control.cursor import PAGE_DEFAULT
from replicator.control.models import COUNT_MAX, PAGE_MAX, Model, Problem
from replicator.control.problems import CONTENT_TYPE
from replicator.control.reading import IDEMPOTENCY_KEY, IF_MATCH
from replicator.control.route import Route

Json: TypeAlias = dict[str, Any]

_REFERENCE: Final = "#/components/schemas/{model}"
_SCHEMES: Final = {
    "token": {"type": "http", "scheme": "bearer", "description": "An operator's token"},
    "certificate": {"type": "mutualTLS", "description": "A certificate of this installation"},
}
_SECURITY: Final[dict[Access, list[Json]]] = {
    Access.PUBLIC: [],
    Access.IDENTIFIED: [{"token": []}, {"certificate": []}],
}


def document(routes: Iterable[Route]) -> Json:
    """The document, as JSON wants it."""
    table = tuple(routes)
    paths: dict[str, Json] = {}
    for route in table:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Replicator control server", "version": __version__},
        "paths": paths,
        "components": {"schemas": _schemas(table), "securitySchemes": _SCHEMES},
    }


def _schemas(table: tuple[Route, ...]) -> Json:
    taken = {route.body for route in table if route.body is not None}
    given = {route.answer for route in table if route.answer is not None} | {Problem}
    wanted: list[tuple[type[Model], Any]] = [(model, "validation") for model in taken]
    wanted += [(model, "serialization") for model in given]
    wanted.sort(key=lambda pair: pair[0].__name__)
    _, schemas = models_json_schema(wanted, ref_template=_REFERENCE)
    definitions: Json = schemas["$defs"]
    return definitions


def _operation(route: Route) -> Json:
    operation: Json = {
        "summary": route.summary,
        "description": f"For {route.access}.",
        "operationId": _operation_id(route),
        "security": _SECURITY.get(route.access, [{"token": []}]),
        "parameters": list(_parameters(route)),
        "responses": _responses(route),
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": _json(_reference(route.body))}
    return operation


def _operation_id(route: Route) -> str:
    return "_".join([route.method.lower(), *route.path.replace("{id}", "one").strip("/").split("/")])


def _responses(route: Route) -> Json:
    success: Json = {"description": "Done"}
    if route.shows_revision:
        success["headers"] = {"ETag": {"description": "The revision shown", "schema": {"type": "string"}}}
    if route.answer is not None and route.paged is not None:
        success["content"] = _json(_page_of(route.answer))
    elif route.answer is not None:
        success["content"] = _json(_reference(route.answer))
    elif route.status != 204:
        success["content"] = {route.media_type: {}}
    answers: Json = {str(route.status): success}
    if route.shows_revision and not route.changes:
        answers["304"] = {"description": "What If-None-Match names is the present one"}
    problem = {CONTENT_TYPE: {"schema": _reference(Problem)}}
    return answers | {"default": {"description": "A problem", "content": problem}}


def _page_of(model: type[Model]) -> Json:
    return {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": _reference(model)},
            "next": {"type": ["string", "null"], "description": "The cursor of the following part"},
        },
        "required": ["items", "next"],
        "additionalProperties": False,
    }


def _parameters(route: Route) -> Iterator[Json]:
    if route.id_type is not None:
        yield _parameter("id", "path", TypeAdapter(route.id_type).json_schema(), required=True)
    if route.paged is not None:
        limit = {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_DEFAULT}
        yield _parameter("limit", "query", limit)
        yield _parameter("cursor", "query", {"type": "string"})
    for name, adapter in route.filters.items():
        yield _parameter(name, "query", adapter.json_schema())
    if route.conditional:
        yield _parameter("If-Match", "header", {"type": "string", "pattern": f"^{IF_MATCH}$"}, required=True)
    if route.shows_revision and not route.changes:
        yield _parameter("If-None-Match", "header", {"type": "string"})
    if route.method == "POST":
        yield _parameter("Idempotency-Key", "header", {"type": "string", "pattern": f"^{IDEMPOTENCY_KEY}$"})
    if route.media_type == "text/event-stream":
        number = {"type": "integer", "minimum": 0, "maximum": COUNT_MAX}
        yield _parameter("Last-Event-ID", "header", number)


def _parameter(name: str, where: str, schema: Json, *, required: bool = False) -> Json:
    return {"name": name, "in": where, "required": required, "schema": schema}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _reference(model: type[Model]) -> Json:
    return {"$ref": _REFERENCE.format(model=model.__name__)}
