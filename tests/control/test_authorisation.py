"""Nobody gets more than the route table says: a walk over every route, with every kind of sender."""

import asyncio
import ssl
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from replicator import certificates
from replicator.certificates import ServerKind
from replicator.control.api import make_application
from replicator.control.auth import Access
from replicator.control.models import OperatorWanted, Role
from replicator.control.repositories import operators, servers
from replicator.control.repositories.rows import Change
from replicator.control.route import Parts, Route
from replicator.control.routes import ROUTES
from replicator.errors import StateError
from replicator.transport.tls import client_context, server_context
from tests.control.conftest import Api
from tests.replicator.trust import SetClock

Check = Callable[..., Any]

# The one list that a reader compares with the routes: whoever opens a route says so here, too.
OPEN = {("GET", "/healthz")}
FOR_EVERY_SERVER = {("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/api/v1/openapi.json")}
MAY = {
    Access.PUBLIC: set(Role),
    Access.IDENTIFIED: set(Role),
    Access.VIEWER: set(Role),
    Access.OPERATOR: {Role.OPERATOR, Role.ADMIN},
    Access.ADMIN: {Role.ADMIN},
}
closed = [route for route in ROUTES if route.access is not Access.PUBLIC]


def sample_id(route: Route) -> str:
    """An id of the right form that names nothing."""
    prefix = {
        "servers": "ps-",
        "policies": "pol-",
        "connections": "con-",
        "groups": "grp-",
        "machines": "vm-",
    }
    aggregate = route.path.split("/")[3] if route.path.startswith("/api/") else ""
    return {"tokens": "0" * 16, "operators": "op-" + "0" * 32}.get(aggregate) or prefix.get(
        aggregate, ""
    ) + "0" * 32


async def knock(api: Api, route: Route, role: Role | None, **headers: str) -> int:
    """The status that a route answers with; a stream is not read."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if role is not None:
        sent["Authorization"] = f"Bearer {api.tokens[role]}"
    path = route.path.replace("{id}", sample_id(route))
    async with api.client.request(route.method, path, headers=sent) as response:
        return response.status


def certificate_of(api: Api, server: str) -> bytes:
    authority = api.installation.authority
    return authority.issue(certificates.new_key().public_key(), server, api.parts.clock.now())


async def join(api: Api, server: str) -> None:
    async with api.database.write() as connection:
        await servers.joined(connection, server, api.parts.clock.now_ns())


def test_the_table_opens_what_it_should_and_no_more() -> None:
    by_access = {
        access: {(route.method, route.path) for route in ROUTES if route.access is access}
        for access in Access
    }
    assert by_access[Access.PUBLIC] == OPEN
    assert by_access[Access.IDENTIFIED] == FOR_EVERY_SERVER
    viewer = by_access[Access.VIEWER]
    assert {method for method, _ in viewer} == {"GET"}
    secret = {"tokens", "operators", "audit"}
    assert not [path for _, path in viewer if secret & set(path.split("/"))]


async def test_every_route_of_the_server_stands_in_the_table(api: Api) -> None:
    served = {
        (route.method, route.resource.canonical)
        for route in api.client.app.router.routes()
        if route.resource is not None
    }
    assert served == {(route.method, route.path) for route in ROUTES}


async def test_without_an_identity_nothing_but_healthz_answers(api: Api) -> None:
    for route in ROUTES:
        expected = 200 if (route.method, route.path) in OPEN else 401
        assert await knock(api, route, None) == expected, route.path
    assert (await api.ask("GET", "/api/v1/not-a-route", role=None)).status == 401
    assert (await api.ask("PATCH", "/api/v1/groups", role=None)).status == 401


async def test_each_role_gets_what_the_table_gives_it_and_no_more(api: Api) -> None:
    for route in ROUTES:
        for role in Role:
            status = await knock(api, route, role)
            if role in MAY[route.access]:
                assert status not in (401, 403), (route.path, role)
            else:
                assert status == 403, (route.path, role)


async def test_a_server_gets_what_is_for_servers_and_no_more(api: Api) -> None:
    await join(api, "ps-" + "1" * 32)
    api.certificate = certificate_of(api, "ps-" + "1" * 32)
    for route in ROUTES:
        status = await knock(api, route, None)
        open_to_it = (route.method, route.path) in OPEN | FOR_EVERY_SERVER
        assert status == (200 if open_to_it else 403), route.path


@pytest.mark.parametrize("kind", ["revoked", "never joined", "not ours"])
async def test_a_server_that_is_not_trusted_gets_nothing(api: Api, kind: str) -> None:
    server = "ps-" + "1" * 32
    api.certificate = certificate_of(api, server)
    if kind == "revoked":
        await join(api, server)
        async with api.database.write() as connection:
            await servers.revoke(connection, Change(server, None), 1)
    if kind == "not ours":
        api.certificate = b"no certificate at all"
    for route in closed:
        assert await knock(api, route, None) == 401, route.path


@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_an_operator_that_is_no_longer_one_gets_nothing(api: Api, clock: SetClock, how: str) -> None:
    async with api.database.write() as connection:
        wanted = OperatorWanted(name="leaver", role=Role.ADMIN, life_s=60)
        made, api.tokens[Role.ADMIN] = await operators.create(connection, wanted, clock.now_ns())
    settings = next(route for route in ROUTES if route.path.endswith("/settings"))
    assert await knock(api, settings, Role.ADMIN) == 200
    if how == "revoked":
        async with api.database.write() as connection:
            await operators.revoke(connection, Change(made.id, None), clock.now_ns())
    else:
        clock.advance(timedelta(seconds=60))
    for route in closed:
        assert await knock(api, route, Role.ADMIN) == 401, route.path


async def test_when_the_database_fails_everybody_is_refused(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    await api.database.close()

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(api.database, "_reader", type("Broken", (), {"connect": broken})())
    for route in closed:
        for role in (None, *Role):
            assert await knock(api, route, role) == 503, route.path


@pytest.mark.peer("postgres")
async def test_when_postgresql_is_gone_everybody_is_refused_and_all_is_well_when_it_is_back(
    api: Api, request: pytest.FixtureRequest
) -> None:
    if not api.database.is_shared:
        return
    cluster = request.getfixturevalue("postgresql")
    some = [route for route in closed if route.path in ("/readyz", "/api/v1/groups", "/api/v1/operators")]
    cluster.stop()
    try:
        for route in some:
            assert await knock(api, route, Role.ADMIN) == 503, route.path
    finally:
        cluster.start()
    assert await knock(api, next(route for route in some if route.path == "/readyz"), Role.ADMIN) == 200


@pytest.mark.parametrize("defect", [LookupError("a defect"), StateError("x.y", "m", cause="c", fix="f")])
async def test_when_deciding_itself_fails_everybody_is_refused(
    api: Api, monkeypatch: pytest.MonkeyPatch, defect: Exception
) -> None:
    async def fails(*_: object) -> None:
        raise defect

    monkeypatch.setattr(operators, "bearer", fails)
    for route in closed:
        assert await knock(api, route, Role.ADMIN) in (500, 503), route.path


async def test_a_wrong_token_is_not_saved_by_a_good_certificate(api: Api) -> None:
    await join(api, "ps-" + "1" * 32)
    api.certificate = certificate_of(api, "ps-" + "1" * 32)
    ready = next(route for route in ROUTES if route.path == "/readyz")
    assert await knock(api, ready, None) == 200
    good = api.tokens[Role.ADMIN]
    for wrong in (
        "",
        "Bearer",
        "Bearer ",
        f"Basic {good}",
        good,
        f"Bearer {good[:-1]}",
        f"Bearer {good}x",
        f"Bearer {good[:-2]}{'A' if good[-2] != 'A' else 'B'}{good[-1]}",
        f"Bearer {good.removeprefix('rpo1.')}",
        f"Bearer rpo1.{'A' * 52}",
        "Bearer \u00fc" + good,
    ):
        assert await knock(api, ready, None, Authorization=wrong) == 401, wrong
    assert await knock(api, ready, None, Authorization=f"bearer {good}") == 200


async def test_who_is_revoked_while_the_body_comes_changes_nothing(api: Api) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def body() -> Any:
        yield b'{"name": '
        begun.set()
        await go_on.wait()
        yield b'"late"}'

    headers = {
        "Authorization": f"Bearer {api.tokens[Role.OPERATOR]}",
        "Content-Type": "application/json",
    }
    asking = asyncio.create_task(api.client.post("/api/v1/policies", data=body(), headers=headers))
    await begun.wait()
    revoked = await api.ask("POST", f"/api/v1/operators/{api.ids[Role.OPERATOR]}/revoke", If_Match="*")
    assert revoked.status == 200
    go_on.set()
    assert (await asking).status == 401
    assert (await (await api.ask("GET", "/api/v1/policies")).json())["items"] == []


async def test_over_tls_a_certificate_is_known_and_one_of_another_installation_is_not(api: Api) -> None:
    authority, clock = api.installation.authority, api.parts.clock
    own = authority.own_credentials(ServerKind.CONTROL_SERVER, clock.now())
    server_id = "mt-" + "2" * 32
    await join(api, server_id)
    key = certificates.new_key()
    credentials = certificates.Credentials(
        authority.issue(key.public_key(), server_id, clock.now()), certificates.key_to_pem(key)
    )

    def certificate_of_tls(request: web.Request) -> bytes | None:
        tls = request.get_extra_info("ssl_object")
        found: bytes | None = tls.getpeercert(binary_form=True)
        return found

    parts = Parts(api.database, clock, authority.pin, certificate_of_tls)
    server = TestServer(make_application(parts), scheme="https")
    accepting = server_context(own, authority.certificate)
    accepting.set_alpn_protocols(["http/1.1"])
    await server.start_server(ssl=accepting)
    showing = client_context(credentials, authority.certificate)
    silent = ssl.create_default_context(cadata=authority.certificate)
    for context in (showing, silent):
        context.check_hostname = False
    async with TestClient(server) as client:
        assert (await client.get("/readyz", ssl=showing)).status == 200
        assert (await client.get("/readyz", ssl=silent)).status == 401
        assert (await client.get("/api/v1/groups", ssl=showing)).status == 403
