"""Aggregates that are one row with a name of the caller's: policies and connections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control import tables
from replicator.control.models import Connection, ConnectionWanted, Model, Policy, PolicyWanted
from replicator.control.repositories.rows import (
    Change,
    Window,
    add,
    change,
    check_name_is_free,
    check_unused,
    new_id,
    one,
    remove,
    shaped,
    some,
)

W = TypeVar("W", bound=Model)
M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True)
class Named(Generic[W, M]):
    """The rows of one table.

    Attributes:
        what: what one is called in messages.
        prefix: of ids.
        users: columns that refer to it, by what their rows are called.
    """

    table: Table
    model: type[M]
    what: str
    prefix: str
    users: Mapping[str, ColumnElement[Any]] = field(default_factory=dict)

    async def some(self, connection: AsyncConnection, window: Window) -> tuple[list[M], str | int | None]:
        """A part of all of them, by id."""
        rows, following = await some(connection, select(self.table), self.table.c.id, window)
        return [shaped(self.model, row) for row in rows], following

    async def get(self, connection: AsyncConnection, row_id: str) -> M:
        """One of them; ``api.not_found``."""
        return shaped(self.model, await one(connection, self.table, self.what, row_id))

    async def create(self, connection: AsyncConnection, wanted: W) -> M:
        """A new one; ``api.conflict`` if its name is taken."""
        values = wanted.model_dump()
        await check_name_is_free(connection, self.table, self.what, values["name"])
        row = values | {"id": new_id(self.prefix), "revision": 1}
        await add(connection, self.table, row)
        return shaped(self.model, row)

    async def replace(self, connection: AsyncConnection, asked: Change, wanted: W) -> M:
        """Change one; ``api.not_found``, ``api.changed``, ``api.conflict``."""
        values = wanted.model_dump()
        await check_name_is_free(connection, self.table, self.what, values["name"], but=asked.id)
        revision = await change(connection, self.table, self.what, asked, values)
        return shaped(self.model, values | {"id": asked.id, "revision": revision})

    async def delete(self, connection: AsyncConnection, asked: Change) -> None:
        """Delete one; ``api.not_found``, ``api.changed``, ``api.conflict`` while it is used."""
        await check_unused(connection, self.what, asked.id, self.users)
        await remove(connection, self.table, self.what, asked)


POLICIES: Named[PolicyWanted, Policy] = Named(
    tables.policies, Policy, "policy", "pol", {"group": tables.groups.c.policy}
)
CONNECTIONS: Named[ConnectionWanted, Connection] = Named(
    tables.connections, Connection, "connection", "con", {"machine": tables.machines.c.connection}
)
