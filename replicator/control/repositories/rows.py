"""What aggregates have in common: rows by id with a revision, in pages by key; and numbers in sequence."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, RowMapping, Select, Table, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control.models import Model
from replicator.control.problems import changed, conflict, not_found
from replicator.control.tables import counters

M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True)
class Window:
    """Which part of a list is wanted: what comes after a key, or all from the start; ``limit`` at most."""

    after: str | int | None = None
    limit: int = 50


@dataclass(frozen=True, slots=True)
class Change:
    """Of which revision somebody asks for a change; None: of whatever there is."""

    id: str
    revision: int | None


def new_id(prefix: str) -> str:
    """A fresh id of 128 random bits."""
    return f"{prefix}-{secrets.token_hex(16)}"


def to_text(value: object) -> str:
    """JSON, always the same for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def shaped(model: type[M], row: Mapping[Any, Any], **more: object) -> M:
    """A row as its model: times lose the unit in their name, columns that the model has not are left out."""
    values = {str(name).removesuffix("_ns"): value for name, value in row.items()} | more
    fields = model.model_fields
    return model.model_validate(
        {name: value for name, value in values.items() if name in fields}, strict=False
    )


async def some(
    connection: AsyncConnection, rows: Select[Any], key: ColumnElement[Any], window: Window
) -> tuple[Sequence[RowMapping], str | int | None]:
    """A part of a list in the order of ``key``, and the key to go on after; None at the end."""
    wanted = rows.order_by(key).limit(window.limit + 1)
    if window.after is not None:
        wanted = wanted.where(key > window.after)
    found = (await connection.execute(wanted)).mappings().all()
    if len(found) <= window.limit:
        return found, None
    return found[: window.limit], found[window.limit - 1][key.key]


async def one(connection: AsyncConnection, table: Table, what: str, row_id: str) -> RowMapping:
    """A row by its id; ``api.not_found``."""
    found = (await connection.execute(select(table).where(table.c.id == row_id))).mappings().first()
    if found is None:
        raise not_found(f"{what} {row_id}")
    return found


async def add(connection: AsyncConnection, table: Table, values: Mapping[str, Any]) -> None:
    """A new row."""
    await connection.execute(insert(table).values(**values))


async def change(
    connection: AsyncConnection, table: Table, what: str, asked: Change, values: Mapping[str, Any]
) -> int:
    """Change a row; its new revision.

    Raises:
        UsageError: ``api.not_found``, ``api.changed``.
    """
    changing = update(table).where(table.c.id == asked.id, _is(table, asked))
    done = await connection.execute(
        changing.values(**values, revision=table.c.revision + 1).returning(table.c.revision)
    )
    revision: int | None = done.scalar()
    if revision is None:
        raise await _why(connection, table, what, asked)
    return revision


async def remove(connection: AsyncConnection, table: Table, what: str, asked: Change) -> None:
    """Delete a row; errors as ``change``."""
    done = await connection.execute(delete(table).where(table.c.id == asked.id, _is(table, asked)))
    if not done.rowcount:
        raise await _why(connection, table, what, asked)


async def check_name_is_free(
    connection: AsyncConnection, table: Table, what: str, name: str, but: str = ""
) -> None:
    """``api.conflict`` if another row than ``but`` has this name."""
    taken = select(table.c.id).where(table.c.name == name, table.c.id != but)
    if (await connection.execute(taken)).first() is not None:
        raise conflict(f"there is a {what} named {name} already", "take another name, or change that one")


async def check_there_is(connection: AsyncConnection, table: Table, what: str, row_id: str | None) -> None:
    """``api.conflict`` if the id is not None and names no row."""
    if row_id is None:
        return
    if (await connection.execute(select(table.c.id).where(table.c.id == row_id))).first() is None:
        raise conflict(f"there is no {what} {row_id}", f"make the {what} first, or name another one")


async def check_unused(
    connection: AsyncConnection, what: str, row_id: str, users: Mapping[str, ColumnElement[Any]]
) -> None:
    """``api.conflict`` if a column refers to the row. ``users``: by what their rows are called."""
    for user, column in users.items():
        if (await connection.execute(select(column).where(column == row_id).limit(1))).first() is not None:
            raise conflict(f"{what} {row_id} is still used by a {user}", f"take it out of every {user} first")


async def next_number(connection: AsyncConnection, name: str) -> tuple[int, str]:
    """The next of a sequence, and the hash kept with it; locked until the transaction ends."""
    taking = update(counters).where(counters.c.name == name).values(value=counters.c.value + 1)
    row = (await connection.execute(taking.returning(counters.c.value, counters.c.sha256))).one()
    return row.value, row.sha256


def _is(table: Table, asked: Change) -> ColumnElement[bool]:
    return table.c.revision == (table.c.revision if asked.revision is None else asked.revision)


async def _why(connection: AsyncConnection, table: Table, what: str, asked: Change) -> Exception:
    if (await connection.execute(select(table.c.id).where(table.c.id == asked.id))).first() is None:
        return not_found(f"{what} {asked.id}")
    return changed(f"{what} {asked.id}")
