"""The OpenAPI document, and the API fuzzed from it on both kinds of database: no 5xx, answers as it says."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any, cast

import hypothesis
import pytest
import requests
import schemathesis
import uvloop
from aiohttp.test_utils import TestServer
from openapi_pydantic import OpenAPI
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from replicator.control.api import make_application
from replicator.control.database import open_database
from replicator.control.models import OperatorWanted, Role
from replicator.control.openapi import document
from replicator.control.repositories import operators, servers
from replicator.control.route import Parts
from replicator.control.routes import ROUTES
from replicator.files import Files
from tests.control.conftest import Api
from tests.replicator.trust import SetClock

STREAM = "/api/v1/events/stream"  # it has no end: test_events.py reads it


def test_the_document_is_one_and_has_every_route() -> None:
    made = document(ROUTES)
    OpenAPI.model_validate(made)
    described = {(method.upper(), path) for path, item in made["paths"].items() for method in item}
    assert described == {(route.method, route.path) for route in ROUTES}
    names = [operation["operationId"] for item in made["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)


async def test_the_document_is_served_to_those_with_an_identity(api: Api) -> None:
    response = await api.ask("GET", "/api/v1/openapi.json", Role.VIEWER)
    assert await response.json() == document(ROUTES)


@contextmanager
def served(url: str) -> Iterator[tuple[str, str]]:
    """The API in a loop of its own: its address, and an administrator's token."""
    told: SimpleQueue[tuple[str, str, Callable[[], Any]] | BaseException] = SimpleQueue()

    async def serve() -> None:
        clock, ended = SetClock(), asyncio.Event()
        database = await open_database(url, Files())
        async with database.write() as connection:
            wanted = OperatorWanted(name="fuzz", role=Role.ADMIN)
            _, token = await operators.create(connection, wanted, clock.now_ns())
            await servers.joined(connection, "ps-" + "a" * 32, 1)
        server = TestServer(make_application(Parts(database, clock, bytes(32), lambda _: None)))
        await server.start_server()
        loop = asyncio.get_running_loop()
        told.put((str(server.make_url("")), token, lambda: loop.call_soon_threadsafe(ended.set)))
        await ended.wait()
        await server.close()
        await database.close()

    def run() -> None:
        try:
            uvloop.run(serve())
        except BaseException as error:
            told.put(error)
            raise

    thread = Thread(target=run)
    thread.start()
    found = told.get()
    assert not isinstance(found, BaseException)
    address, token, end = found
    try:
        yield address, token
    finally:
        end()
        thread.join()


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def things(address: str, headers: dict[str, str]) -> dict[str, str]:
    """One thing of each kind, so that not every made-up request is about nothing: path of its list -> id."""
    found = {}
    wanted: dict[str, dict[str, Any]] = {
        "policies": {},
        "connections": {"kind": "azure", "address": "", "secret": "s"},
        "groups": {},
        "machines": {"disks": [{"name": "a", "source": "b", "size_bytes": 0}]},
        "operators": {"role": "viewer"},
    }
    for name, more in wanted.items():
        path = f"/api/v1/{name}"
        response = requests.post(address + path, json={"name": "kept", **more}, headers=headers, timeout=20)
        assert response.status_code == 201, response.text
        found[path] = response.json()["id"]
    return found | {"/api/v1/servers": "ps-" + "a" * 32}


@pytest.mark.timeout(28_800)
def test_whatever_is_sent_the_api_answers_as_its_document_says(
    url: str, count: Callable[[int, int], int], seed: int
) -> None:
    cases = count(500, 50_000)
    done: Counter[int] = Counter()
    with served(url) as (address, token):
        headers = {"Authorization": f"Bearer {token}"}
        known = things(address, headers)
        described = document(ROUTES)
        del described["paths"][STREAM]
        schema = schemathesis.openapi.from_dict(described)
        schema.config.update(base_url=address)
        operations = [cast(Any, found).ok() for found in schema.get_all_operations()]
        for operation in operations:
            fuzz(operation, headers, known, -(-cases // len(operations)), seed, done)
    print(f"answers by status: {dict(sorted(done.items()))}")
    assert done.total() >= cases * 0.8, f"only {done.total()} of {cases}"
    assert {200, 201, 204, 400, 404} <= set(done), "what was sent was too much alike"


def fuzz(
    operation: Any, headers: dict[str, str], known: dict[str, str], each: int, seed: int, done: Counter[int]
) -> None:
    fits = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    does_not = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    bare = operation.method == "get" and not operation.query and not operation.path_parameters
    there = known.get(operation.path.partition("/{id}")[0])

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=each, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=fits if bare else fits | does_not, about_known=hypothesis.strategies.booleans())
    def ask(case: Any, about_known: bool) -> None:
        if about_known and there is not None and "id" in (case.path_parameters or {}):
            case.path_parameters["id"] = there
            case.headers["If-Match"] = "*"
        response = case.call(headers=headers)
        done[response.status_code] += 1
        chosen = CHECKS[:4] if about_known else CHECKS
        case.validate_response(response, checks=chosen)

    ask()
