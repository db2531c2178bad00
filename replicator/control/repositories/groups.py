"""Groups, and the signed assignments that say who serves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.certificates import ServerKind
from replicator.control import tables
from replicator.control.models import Group, GroupWanted
from replicator.control.problems import conflict
from replicator.control.repositories.rows import (
    Change,
    Window,
    add,
    change,
    check_name_is_free,
    check_there_is,
    check_unused,
    new_id,
    next_number,
    one,
    remove,
    shaped,
    some,
)

_TABLE = tables.groups
_WHAT = "group"


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who may serve a group, until when. Of two generations the higher one holds."""

    group: str
    generation: int
    process_server: str
    master_target: str
    issued_ns: int
    expires_ns: int


async def page(connection: AsyncConnection, window: Window) -> tuple[list[Group], str | int | None]:
    """A part of all groups, by id."""
    rows, following = await some(connection, select(_TABLE), _TABLE.c.id, window)
    return [shaped(Group, row) for row in rows], following


async def get(connection: AsyncConnection, group_id: str) -> Group:
    """One group; ``api.not_found``."""
    return shaped(Group, await one(connection, _TABLE, _WHAT, group_id))


async def create(connection: AsyncConnection, wanted: GroupWanted) -> Group:
    """A new group; ``api.conflict``: its name is taken, or what it names is not there."""
    await _check(connection, wanted)
    row = wanted.model_dump() | {"id": new_id("grp"), "generation": 0, "revision": 1}
    await add(connection, _TABLE, row)
    return shaped(Group, row)


async def replace(connection: AsyncConnection, asked: Change, wanted: GroupWanted) -> Group:
    """Change a group; ``api.not_found``, ``api.changed``, ``api.conflict``."""
    await _check(connection, wanted, but=asked.id)
    await change(connection, _TABLE, _WHAT, asked, wanted.model_dump())
    return await get(connection, asked.id)


async def delete_group(connection: AsyncConnection, asked: Change) -> None:
    """Delete a group without machines; ``api.not_found``, ``api.changed``, ``api.conflict``."""
    await check_unused(connection, _WHAT, asked.id, {"machine": tables.machines.c.replication_group})
    await connection.execute(delete(tables.assignments).where(tables.assignments.c.group_id == asked.id))
    await remove(connection, _TABLE, _WHAT, asked)


async def assign(
    connection: AsyncConnection,
    group: Group,
    until: tuple[int, int],
    sign: Callable[[Assignment], str],
) -> Assignment:
    """A new assignment for the two servers that the group names, in force when the transaction ends.

    Args:
        until: when it is issued and when it expires, ns since 1970.
        sign: gives the text that is kept and shown.

    Raises:
        UsageError: ``api.conflict``: the group names no process server or no master target.
    """
    if group.process_server is None or group.master_target is None:
        raise conflict(f"group {group.name} has not both of its servers", "choose them first")
    # One sequence for all groups: a group that is deleted and made again must not begin below what its
    # master target has seen.
    generation, _ = await next_number(connection, "generation")
    made = Assignment(group.name, generation, group.process_server, group.master_target, *until)
    values = {
        "group_id": group.id,
        "generation": generation,
        "process_server": made.process_server,
        "master_target": made.master_target,
        "issued_ns": made.issued_ns,
        "expires_ns": made.expires_ns,
        "signed": sign(made),
    }
    await connection.execute(insert(tables.assignments).values(**values))
    counting = update(_TABLE).where(_TABLE.c.id == group.id)
    await connection.execute(counting.values(generation=generation, revision=_TABLE.c.revision + 1))
    return made


async def signed_assignment(connection: AsyncConnection, group_id: str) -> str | None:
    """The text of the latest assignment of a group; None: it has none."""
    table = tables.assignments
    latest = select(table.c.signed).where(table.c.group_id == group_id).order_by(table.c.generation.desc())
    signed: str | None = await connection.scalar(latest.limit(1))
    return signed


async def _check(connection: AsyncConnection, wanted: GroupWanted, but: str = "") -> None:
    await check_name_is_free(connection, _TABLE, _WHAT, wanted.name, but)
    await check_there_is(connection, tables.policies, "policy", wanted.policy)
    await _check_server(connection, wanted.process_server, ServerKind.PROCESS_SERVER)
    await _check_server(connection, wanted.master_target, ServerKind.MASTER_TARGET)


async def _check_server(connection: AsyncConnection, server_id: str | None, kind: ServerKind) -> None:
    if server_id is None:
        return
    table = tables.servers
    wanted = select(table.c.id).where(
        table.c.id == server_id, table.c.kind == kind, table.c.revoked_ns.is_(None)
    )
    if (await connection.execute(wanted)).first() is None:
        raise conflict(
            f"{server_id} is no server of the kind {kind} that may serve a group",
            "list the servers and take one of that kind that is not revoked",
        )
