"""Machines and their disks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from replicator.control import tables
from replicator.control.models import Disk, Machine, MachineWanted
from replicator.control.problems import conflict
from replicator.control.repositories.rows import (
    Change,
    Window,
    add,
    change,
    check_name_is_free,
    check_there_is,
    new_id,
    one,
    remove,
    shaped,
    some,
)

_TABLE = tables.machines
_WHAT = "machine"


async def page(
    connection: AsyncConnection, window: Window, group: str | None = None
) -> tuple[list[Machine], str | int | None]:
    """A part of all machines, or of those of a group, by id."""
    wanted = select(_TABLE) if group is None else select(_TABLE).where(_TABLE.c.replication_group == group)
    rows, following = await some(connection, wanted, _TABLE.c.id, window)
    disks = await _disks(connection, [row["id"] for row in rows])
    return [
        shaped(Machine, row, group=row["replication_group"], disks=disks[row["id"]]) for row in rows
    ], following


async def get(connection: AsyncConnection, machine_id: str) -> Machine:
    """One machine; ``api.not_found``."""
    row = await one(connection, _TABLE, _WHAT, machine_id)
    disks = await _disks(connection, [machine_id])
    return shaped(Machine, row, group=row["replication_group"], disks=disks[machine_id])


async def create(connection: AsyncConnection, wanted: MachineWanted) -> Machine:
    """A new machine; ``api.conflict``."""
    await _check(connection, wanted)
    machine_id = new_id("vm")
    await add(connection, _TABLE, _row(wanted) | {"id": machine_id, "revision": 1})
    await _add_disks(connection, machine_id, wanted.disks)
    return await get(connection, machine_id)


async def replace(connection: AsyncConnection, asked: Change, wanted: MachineWanted) -> Machine:
    """Change a machine and its disks; ``api.not_found``, ``api.changed``, ``api.conflict``."""
    await _check(connection, wanted, but=asked.id)
    await change(connection, _TABLE, _WHAT, asked, _row(wanted))
    await _drop_disks(connection, asked.id)
    await _add_disks(connection, asked.id, wanted.disks)
    return await get(connection, asked.id)


async def delete_machine(connection: AsyncConnection, asked: Change) -> None:
    """Forget a machine; ``api.not_found``, ``api.changed``."""
    await _drop_disks(connection, asked.id)
    await remove(connection, _TABLE, _WHAT, asked)


def _row(wanted: MachineWanted) -> dict[str, str | None]:
    return {
        "name": wanted.name,
        "reference": wanted.reference,
        "connection": wanted.connection,
        "replication_group": wanted.group,
    }


async def _check(connection: AsyncConnection, wanted: MachineWanted, but: str = "") -> None:
    await check_name_is_free(connection, _TABLE, _WHAT, wanted.name, but)
    await check_there_is(connection, tables.connections, "connection", wanted.connection)
    await check_there_is(connection, tables.groups, "group", wanted.group)
    if len({disk.name for disk in wanted.disks}) < len(wanted.disks):
        raise conflict(
            f"two disks of machine {wanted.name} have the same name", "give each a name of its own"
        )


async def _disks(connection: AsyncConnection, machines: list[str]) -> dict[str, list[Disk]]:
    table = tables.disks
    found: dict[str, list[Disk]] = defaultdict(list)
    wanted = select(table).where(table.c.machine.in_(machines)).order_by(table.c.machine, table.c.position)
    for row in (await connection.execute(wanted)).mappings():
        found[row["machine"]].append(shaped(Disk, row))
    return found


async def _add_disks(connection: AsyncConnection, machine_id: str, disks: Iterable[Disk]) -> None:
    rows = [
        disk.model_dump() | {"machine": machine_id, "position": position}
        for position, disk in enumerate(disks)
    ]
    if rows:
        await connection.execute(insert(tables.disks), rows)


async def _drop_disks(connection: AsyncConnection, machine_id: str) -> None:
    await connection.execute(delete(tables.disks).where(tables.disks.c.machine == machine_id))
