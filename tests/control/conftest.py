"""Databases for the control server's tests, of both kinds, and an API that is served from one."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient, TestServer

from replicator.control.api import make_application
from replicator.control.database import Database, open_database
from replicator.control.models import OperatorWanted, Role
from replicator.control.repositories import operators
from replicator.control.route import Parts
from replicator.files import Files
from tests.control.postgresql import Cluster, cluster
from tests.replicator.trust import Installation, SetClock

KINDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.peer("postgres"))]


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database: each test that takes it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'control.sqlite'}"
    running: Cluster = request.getfixturevalue("postgresql")
    return running.new()


@pytest_asyncio.fixture
async def database(url: str) -> AsyncIterator[Database]:
    opened = await open_database(url, Files())
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


class Api:
    """The API on a port of its own, an operator of each role. `certificate`: what TLS would have checked."""

    def __init__(self, client: TestClient[Any, Any], parts: Parts, installation: Installation) -> None:
        self.client = client
        self.parts = parts
        self.database = parts.database
        self.installation = installation
        self.certificate: bytes | None = None
        self.tokens: dict[Role, str] = {}
        self.ids: dict[Role, str] = {}

    async def ask(
        self, method: str, path: str, role: Role | None = Role.ADMIN, json: Any = None, **headers: str
    ) -> Any:
        """The response, read. Header names with underscores; role None: no token."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if role is not None:
            sent["Authorization"] = f"Bearer {self.tokens[role]}"
        response = await self.client.request(method, path, json=json, headers=sent)
        await response.read()
        return response

    async def make(self, path: str, **fields: Any) -> Any:
        """The document of what is made."""
        response = await self.ask("POST", f"/api/v1/{path}", json=fields)
        assert response.status == 201, await response.text()
        return await response.json()


@pytest.fixture
def installation(tmp_path: Path, clock: SetClock) -> Installation:
    return Installation(tmp_path / "authority", clock)


@pytest_asyncio.fixture
async def api(database: Database, clock: SetClock, installation: Installation) -> AsyncIterator[Api]:
    shown: list[Api] = []
    parts = Parts(database, clock, installation.authority.pin, lambda _: shown[0].certificate)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(TestClient(TestServer(make_application(parts))))
        served = Api(client, parts, installation)
        shown.append(served)
        async with database.write() as connection:
            for role in Role:
                made, token = await operators.create(
                    connection, OperatorWanted(name=role, role=role), clock.now_ns()
                )
                served.tokens[role], served.ids[role] = token, made.id
        yield served


@pytest.fixture
def problem() -> Callable[[Any, int, str], Any]:
    """Checks a refusal: its status, its code, and that it says what to do."""

    async def check(response: Any, status: int, code: str) -> None:
        assert response.status == status, await response.text()
        assert response.content_type == "application/problem+json"
        found = await response.json()
        assert (found["status"], found["code"]) == (status, code)
        assert found["title"] and found["cause"] and found["fix"]

    return check
