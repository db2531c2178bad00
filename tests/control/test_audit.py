"""The audit log: every change leaves an entry, entries cannot be changed, and what was changed is found."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import select, text, update

from replicator.control import audit
from replicator.control.audit import Deed
from replicator.control.database import Database
from replicator.control.models import Role
from replicator.control.repositories import servers
from replicator.control.routes import ROUTES
from replicator.control.tables import metadata
from tests.control.conftest import Api
from tests.replicator.trust import refused


async def fill(database: Database, count: int) -> None:
    async with database.write() as connection:
        for number in range(count):
            deed = Deed("op-1", "change", f"thing-{number}", {"number": number, "name": "\u00e4"})
            await audit.append(connection, deed, number)


async def tamper(database: Database, statement: str) -> None:
    """As somebody would who may do anything to the database."""
    async with database.write() as connection:
        if database.is_shared:
            await connection.execute(text("DROP TRIGGER IF EXISTS audit_append_only ON audit"))
        else:
            for verb in ("UPDATE", "DELETE"):
                await connection.execute(text(f"DROP TRIGGER IF EXISTS audit_no_{verb}"))
        await connection.execute(text(statement))


async def verdict(database: Database) -> tuple[bool, int | None]:
    async with database.read() as connection:
        found = await audit.verify(connection)
    return found.whole, found.broken_at


async def test_a_whole_log_is_found_whole_however_long(database: Database) -> None:
    assert await verdict(database) == (True, None)
    await fill(database, 1005)
    assert await verdict(database) == (True, None)
    async with database.read() as connection:
        found = await audit.verify(connection)
    assert found.entries == 1005


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'x'", "DELETE FROM audit WHERE seq = 1"])
async def test_the_database_refuses_to_change_it(database: Database, statement: str) -> None:
    await fill(database, 3)
    with refused("store.unavailable" if database.is_shared else "store.conflict"):
        async with database.write() as connection:
            await connection.execute(text(statement))
    assert await verdict(database) == (True, None)


@pytest.mark.parametrize(
    ("statement", "broken_at"),
    [
        *(
            (f"UPDATE audit SET {column} = {value} WHERE seq = 3", 3)
            for column, value in [
                ("time_ns", "7"),
                ("actor", "'op-2'"),
                ("action", "'delete'"),
                ("thing", "'other'"),
                ("details", "'{}'"),
                ("previous_sha256", "'00'"),
                ("sha256", "'00'"),
            ]
        ),
        ("DELETE FROM audit WHERE seq = 1", 1),
        ("DELETE FROM audit WHERE seq = 3", 3),
        ("DELETE FROM audit WHERE seq > 3", 4),
        ("UPDATE audit SET seq = seq + 1 WHERE seq = 5", 5),
        ("UPDATE counters SET sha256 = '00' WHERE name = 'audit'", 6),
    ],
)
async def test_what_was_changed_cut_out_or_cut_off_is_found(
    database: Database, statement: str, broken_at: int
) -> None:
    await fill(database, 5)
    await tamper(database, statement)
    assert await verdict(database) == (False, broken_at)


async def test_an_entry_made_anew_does_not_fit_the_next(database: Database) -> None:
    """Its own hash is right; what gives it away is the entry after it."""
    await fill(database, 5)
    await tamper(database, "UPDATE audit SET actor = 'op-2' WHERE seq = 3")
    async with database.write() as connection:
        table = metadata.tables["audit"]
        row = (await connection.execute(select(table).where(table.c.seq == 3))).mappings().one()
        digest = audit._digest(row)
        await connection.execute(update(table).where(table.c.seq == 3).values(sha256=digest))
    assert await verdict(database) == (False, 4)


async def test_entries_of_many_at_once_are_one_chain(database: Database) -> None:
    await asyncio.gather(*(fill(database, 5) for _ in range(6)))
    assert await verdict(database) == (True, None)


async def test_a_change_that_fails_leaves_no_entry(api: Api) -> None:
    await api.make("policies", name="one")
    refusal = await api.ask("POST", "/api/v1/policies", json={"name": "one"})
    assert refusal.status == 409
    page = await (await api.ask("GET", "/api/v1/audit")).json()
    assert [(item["actor"], item["action"]) for item in page["items"]] == [
        (api.ids[Role.ADMIN], "create policy")
    ]


async def test_every_route_that_changes_something_is_noted(api: Api) -> None:
    """One successful request of each, and an entry for each that names who and what."""
    done: dict[tuple[str, str], Any] = {}

    async def do(method: str, path: str, json: Any = None, **ids: str) -> Any:
        response = await api.ask(method, path.format(**ids), json=json, If_Match="*")
        assert response.status < 300, (path, await response.text())
        done[method, path] = response.status
        return await response.json() if response.status != 204 else None

    named = {"policies": {}, "connections": {"kind": "esxi", "address": "a", "secret": "s"}, "groups": {}}
    for path, fields in {**named, "machines": {}}.items():
        wanted = {"name": "one", **fields}
        made = await do("POST", f"/api/v1/{path}", wanted)
        await do("PUT", f"/api/v1/{path}/{{id}}", wanted, id=made["id"])
        await do("DELETE", f"/api/v1/{path}/{{id}}", id=made["id"])
    token = await do("POST", "/api/v1/tokens", {"kind": "ps"})
    await do("DELETE", "/api/v1/tokens/{id}", id=token["id"])
    operator = await do("POST", "/api/v1/operators", {"name": "ann", "role": "viewer"})
    await do("POST", "/api/v1/operators/{id}/revoke", id=operator["id"])
    server = "ps-" + "3" * 32
    async with api.database.write() as connection:
        await servers.joined(connection, server, 0)
    await do("PUT", "/api/v1/servers/{id}", {"name": "a", "address": ""}, id=server)
    await do("POST", "/api/v1/servers/{id}/revoke", id=server)
    await do("PUT", "/api/v1/settings", {})
    assert set(done) == {(route.method, route.path) for route in ROUTES if route.changes}
    page = await (await api.ask("GET", "/api/v1/audit?limit=200")).json()
    assert len(page["items"]) == len(done)
    assert {item["actor"] for item in page["items"]} == {api.ids[Role.ADMIN]}
    found = await (await api.ask("GET", "/api/v1/audit/verdict")).json()
    assert (found["whole"], found["entries"]) == (True, len(done))
