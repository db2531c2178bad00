"""The servers of the installation: who has joined, and who may not come back."""

from __future__ import annotations

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.certificates import ServerKind, kind_of
from replicator.control import tables
from replicator.control.models import Server, ServerWanted
from replicator.control.problems import conflict
from replicator.control.repositories.rows import Change, Window, change, one, shaped, some

_TABLE = tables.servers


async def page(
    connection: AsyncConnection, window: Window, kind: ServerKind | None = None
) -> tuple[list[Server], str | int | None]:
    """A part of all servers, or those of one kind, by id."""
    wanted = select(_TABLE) if kind is None else select(_TABLE).where(_TABLE.c.kind == kind)
    rows, following = await some(connection, wanted, _TABLE.c.id, window)
    return [shaped(Server, row) for row in rows], following


async def get(connection: AsyncConnection, server_id: str) -> Server:
    """One server; ``api.not_found``."""
    return shaped(Server, await one(connection, _TABLE, "server", server_id))


async def joined(connection: AsyncConnection, server_id: str, now_ns: int) -> None:
    """A server has joined; if it had before, nothing changes."""
    known = await connection.execute(select(_TABLE.c.id).where(_TABLE.c.id == server_id))
    if known.first() is None:
        kind = kind_of(server_id)
        name = f"{kind}-{server_id.partition('-')[2][:8]}"
        row = {"id": server_id, "kind": kind, "name": name, "address": "", "version": ""}
        await connection.execute(insert(_TABLE).values(**row, joined_ns=now_ns, revision=1))


async def replace(connection: AsyncConnection, asked: Change, wanted: ServerWanted) -> Server:
    """Change what an operator says of it; ``api.not_found``, ``api.changed``."""
    await change(connection, _TABLE, "server", asked, wanted.model_dump())
    return await get(connection, asked.id)


async def revoke(connection: AsyncConnection, asked: Change, now_ns: int) -> tuple[Server, bool]:
    """Take its identity from it, for good; whether it had it until now.

    Raises:
        UsageError: ``api.not_found``, ``api.changed``, ``api.conflict``.
    """
    server = await get(connection, asked.id)
    if server.kind is ServerKind.CONTROL_SERVER:
        raise conflict(f"{asked.id} is a control server", "take it out of service instead")
    if server.revoked is not None:
        return server, False
    await change(connection, _TABLE, "server", asked, {"revoked_ns": now_ns})
    return await get(connection, asked.id), True


async def is_trusted(connection: AsyncConnection, server_id: str) -> bool:
    """Whether it has joined and is not revoked."""
    wanted = select(_TABLE.c.id).where(_TABLE.c.id == server_id, _TABLE.c.revoked_ns.is_(None))
    return (await connection.execute(wanted)).first() is not None


async def is_revoked(connection: AsyncConnection, server_id: str) -> bool:
    """Whether it was revoked; a server that is not known was not."""
    wanted = select(_TABLE.c.id).where(_TABLE.c.id == server_id, _TABLE.c.revoked_ns.is_not(None))
    return (await connection.execute(wanted)).first() is not None
